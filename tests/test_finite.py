"""NaN and infinite weights are rejected when they are loaded; NaN outputs are reported as errors, not empty masks."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from conceptseg_hf import ConceptSegForSegmentation
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.finite import check_finite, find_nonfinite, is_finite

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_is_finite_detects_a_single_value_at_any_position(dtype, value):
    largest = torch.finfo(dtype).max
    tensor = torch.full((5, 7), largest, dtype=dtype)
    assert is_finite(tensor) and is_finite(-tensor) and is_finite(tensor.T)
    for position in ((0, 0), (2, 3), (4, 6)):
        nonfinite = tensor.clone()
        nonfinite[position] = value
        assert not is_finite(nonfinite) and not is_finite(nonfinite.T)


def test_integers_empty_and_meta_tensors_are_finite():
    assert is_finite(torch.zeros(0)) and is_finite(torch.arange(3)) and is_finite(torch.tensor(True))
    assert is_finite(torch.empty(3, device="meta"))
    tensors = {"a": torch.ones(2), "b": torch.tensor([1, NAN]), "c": torch.tensor(INF)}
    assert find_nonfinite(tensors.items()) == ["b", "c"]


@pytest.fixture()
def broken(make_model):
    """Makes a model with a single NaN or infinite value in a weight of one part."""

    def make(part: str, value: float = NAN):
        model = make_model()
        name, weight = next((name, p) for name, p in model.named_parameters() if name.startswith(part))
        with torch.no_grad():
            weight.view(-1)[-1] = value
        return model, name

    return make


@pytest.mark.parametrize("part", ["vlm", "ctm", "sam"])
def test_loading_a_checkpoint_with_nan_raises(broken, part, tmp_path):
    model, name = broken(part)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"checkpoint '.*' has NaN or infinite weights \({name}\)"):
        ConceptSegForSegmentation.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["vlm", "sam"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights_are_checked(broken, part, place, tmp_path):
    model, name = broken(part)
    model.save_pretrained(tmp_path / "checkpoint")
    device_map = {"vlm": "cpu", "ctm": "cpu", "sam": "cpu"} | {part: place}
    with pytest.raises(ValueError, match=rf"has NaN or infinite weights \({name}\)"):
        ConceptSegForSegmentation.from_pretrained(
            tmp_path / "checkpoint", device_map=device_map, offload_folder=str(tmp_path / "offloaded")
        )


def test_nonfinite_backbones_are_rejected(broken):
    model, _ = broken("sam", INF)
    with pytest.raises(ValueError, match=r"SAM 3 '.*' has NaN or infinite weights"):
        ConceptSegForSegmentation.from_backbones(model.vlm, model.sam)
    with pytest.raises(ValueError, match=r"^m has NaN .* and 1 more\), .*; use an earlier checkpoint"):
        both = copy.deepcopy(model)
        with torch.no_grad():
            both.ctm.queries[0] = NAN
        check_finite(both, "m")


def test_float16_overflow_is_explained(make_model):
    model = make_model()
    with torch.no_grad():
        model.vlm.lm_head.weight[0, 0] = 1e5
    check_finite(model, "m")
    with pytest.raises(ValueError, match=r"overflow in float16; load the model in bfloat16\.$"):
        check_finite(model.to(torch.float16), "m")


@pytest.fixture()
def overflowing(make_model):
    """A model with finite weights whose CTM output overflows."""
    model = make_model()
    with torch.no_grad():
        for weight in model.ctm.parameters():
            weight.fill_(1e30)
    return model


def test_nan_output_is_reported_as_an_error(overflowing, processor, picture):
    inputs = processor([picture(0), picture(1)], "red circle")
    for result in overflowing.segment(inputs, router="full_reasoning"):
        assert "not finite (NaN)" in result.error
        assert (result.mask, result.score) == (None, 0.0)
    for result in overflowing.segment(inputs, router="sam_only"):  # does not use the CTM
        assert result.error is None and result.mask is not None


def test_records_with_nan_outputs_are_valid_json(overflowing, processor, tmp_path):
    samples = ConceptShapes("test", length=3, size=48)
    options = {"processor": processor, "output_dir": tmp_path, "batch_size": 2}
    report = evaluate(overflowing, samples, router="full_reasoning", **options)
    assert len(report.failed) == 3

    def refuse(name):
        raise AssertionError(f"{name} is not valid JSON")

    for line in (tmp_path / "records.jsonl").read_text().splitlines():
        assert "not finite" in json.loads(line, parse_constant=refuse)["error"]
    json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
