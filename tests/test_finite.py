"""Weights that are NaN or infinite are refused where they are loaded; an output that is not finite is no empty mask."""

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
def test_one_value_is_found_wherever_it_is(dtype, value):
    largest = torch.finfo(dtype).max
    tensor = torch.full((5, 7), largest, dtype=dtype)
    assert is_finite(tensor) and is_finite(-tensor) and is_finite(tensor.T)
    for position in ((0, 0), (2, 3), (4, 6)):
        wrong = tensor.clone()
        wrong[position] = value
        assert not is_finite(wrong) and not is_finite(wrong.T)


def test_what_holds_no_such_numbers_is_finite():
    assert is_finite(torch.zeros(0)) and is_finite(torch.arange(3)) and is_finite(torch.tensor(True))
    assert is_finite(torch.empty(3, device="meta"))
    tensors = {"a": torch.ones(2), "b": torch.tensor([1, NAN]), "c": torch.tensor(INF)}
    assert find_nonfinite(tensors.items()) == ["b", "c"]


@pytest.fixture()
def broken(make_model):
    """A model of which a weight of one part has one value that is not finite."""

    def make(part: str, value: float = NAN):
        model = make_model()
        name, weight = next((name, p) for name, p in model.named_parameters() if name.startswith(part))
        with torch.no_grad():
            weight.view(-1)[-1] = value
        return model, name

    return make


@pytest.mark.parametrize("part", ["vlm", "ctm", "sam"])
def test_a_checkpoint_of_a_training_that_diverged_is_refused(broken, part, tmp_path):
    model, name = broken(part)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^The checkpoint '.*' has weights that are not .*\({name}\)"):
        ConceptSegForSegmentation.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["vlm", "sam"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights_are_looked_at_where_they_are_kept(broken, part, place, tmp_path):
    model, name = broken(part)
    model.save_pretrained(tmp_path / "checkpoint")
    device_map = {"vlm": "cpu", "ctm": "cpu", "sam": "cpu"} | {part: place}
    with pytest.raises(ValueError, match=rf"has weights that are not finite numbers \({name}\)"):
        ConceptSegForSegmentation.from_pretrained(
            tmp_path / "checkpoint", device_map=device_map, offload_folder=str(tmp_path / "offloaded")
        )


def test_backbones_that_are_not_finite_are_refused(broken):
    model, _ = broken("sam", INF)
    with pytest.raises(ValueError, match=r"^The SAM 3 '.*' has weights that are not finite"):
        ConceptSegForSegmentation.from_backbones(model.vlm, model.sam)
    with pytest.raises(ValueError, match=r"^m has weights .* and 1 more\), as a training .*; use an earlier"):
        both = copy.deepcopy(model)
        with torch.no_grad():
            both.ctm.queries[0] = NAN
        check_finite(both, "m")


def test_weights_that_float16_cannot_hold_are_told_from_others(make_model):
    model = make_model()
    with torch.no_grad():
        model.vlm.lm_head.weight[0, 0] = 1e5
    check_finite(model, "m")
    with pytest.raises(ValueError, match=r"or float16 makes of large ones; load it in bfloat16\.$"):
        check_finite(model.to(torch.float16), "m")


@pytest.fixture()
def overflowing(make_model):
    """All weights are finite; what the CTM makes of them is not."""
    model = make_model()
    with torch.no_grad():
        for weight in model.ctm.parameters():
            weight.fill_(1e30)
    return model


def test_an_output_that_is_not_finite_is_an_error(overflowing, processor, picture):
    inputs = processor([picture(0), picture(1)], "red circle")
    for result in overflowing.segment(inputs, router="full_reasoning"):
        assert result.error.startswith("the model's output for this sample is not finite (NaN)")
        assert (result.mask, result.score) == (None, 0.0)
    for result in overflowing.segment(inputs, router="sam_only"):  # the CTM has no part in it
        assert result.error is None and result.mask is not None


def test_records_of_such_a_model_are_json(overflowing, processor, tmp_path):
    samples = ConceptShapes("test", length=3, size=48)
    options = {"processor": processor, "output_dir": tmp_path, "batch_size": 2}
    report = evaluate(overflowing, samples, router="full_reasoning", **options)
    assert len(report.failed) == 3

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    for line in (tmp_path / "records.jsonl").read_text().splitlines():
        assert "not finite" in json.loads(line, parse_constant=refuse)["error"]
    json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
