"""A converted `sam3.pt` gives the outputs of Meta's SAM 3."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor, Sam3Config, Sam3ImageProcessor, Sam3Model

from conceptseg_hf.conversion import convert, sam3
from conceptseg_hf.conversion.plan import make_plan
from conceptseg_hf.conversion.processors import BPE_NAME, read_bpe
from conceptseg_hf.conversion.sources import TensorInfo, WeightSource

from . import meta_sam3

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("sam3") is None, reason="Meta's package is not installed"),
]

PROMPTS = ["the striped cat", "red circle", "odd one", "Square, a circle!", "zebra"]


@pytest.fixture(scope="module")
def cpu():
    with meta_sam3.on_cpu():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    meta_sam3.write_vocabulary(folder / BPE_NAME)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "sam3", **Sam3Config(**meta_sam3.SMALL_CONFIG).to_dict()})
    )
    return folder


@pytest.fixture(scope="module")
def meta(cpu, folder):
    model = meta_sam3.build(folder / BPE_NAME)
    meta_sam3.save(model, folder / "sam3.pt")
    return model


@pytest.fixture(scope="module")
def ours(meta, folder):
    return meta_sam3.load_ours(folder)


def test_tokens_match(meta, folder):
    tokenizer = read_bpe(folder / BPE_NAME)
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    mask = ids["attention_mask"].bool()
    expected = meta.backbone.language_backbone.tokenizer(PROMPTS, context_length=32)
    assert torch.equal(ids["input_ids"] * mask, expected) and mask.sum() == (expected != 0).sum()


def test_pixel_values_match(meta, picture):
    from sam3.model.sam3_image_processor import Sam3Processor

    image = picture(3, (150, 90))
    theirs = Sam3Processor(meta, resolution=meta_sam3.IMAGE_SIZE, device="cpu")
    from torchvision.transforms.v2 import functional

    expected = theirs.transform(functional.to_image(image))
    size = {"height": meta_sam3.IMAGE_SIZE, "width": meta_sam3.IMAGE_SIZE}
    pixels = Sam3ImageProcessor(size=size)(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("with_concepts", [False, True])
def test_outputs_match(meta, ours, folder, picture, with_concepts):
    size = {"height": meta_sam3.IMAGE_SIZE, "width": meta_sam3.IMAGE_SIZE}
    images = [picture(seed, (150, 90)) for seed in range(2)]
    pixels = Sam3ImageProcessor(size=size)(images=images, return_tensors="pt")["pixel_values"]
    prompts = PROMPTS[:2]
    text = read_bpe(folder / BPE_NAME)(
        prompts, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
    )
    concepts = torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(1)) if with_concepts else None

    expected = meta_sam3.run_theirs(meta, pixels, prompts, concepts)
    actual = meta_sam3.run_ours(ours, pixels, text["input_ids"], text["attention_mask"], concepts)
    mask = text["attention_mask"].bool()
    assert torch.equal(actual["text"][mask], expected["text"][mask])
    for name in ("semantic_seg", "presence", "boxes", "masks"):
        assert meta_sam3.relative_error(actual[name], expected[name]) < 1e-4, name
        assert expected[name].std() > 0.01 or name == "presence", name  # outputs are not trivial


def test_concepts_change_the_outputs(meta, picture):
    size = {"height": meta_sam3.IMAGE_SIZE, "width": meta_sam3.IMAGE_SIZE}
    pixels = Sam3ImageProcessor(size=size)(images=[picture(0)], return_tensors="pt")["pixel_values"]
    plain = meta_sam3.run_theirs(meta, pixels, PROMPTS[:1])
    other = meta_sam3.run_theirs(meta, pixels, PROMPTS[:1], torch.randn(1, 8, 256))
    assert meta_sam3.relative_error(other["semantic_seg"], plain["semantic_seg"]) > 0.01


def test_convert_with_sam3_pt_and_vocabulary(meta, ours, folder, make_parts, tmp_path, picture):
    """End-to-end test of `convert` with `sam3.pt`, loading model and processor with Auto classes."""
    parts = make_parts(prompt_width=256)  # the width of Meta's model at all sizes
    out = convert(parts.checkpoint, folder / "sam3.pt", tmp_path / "out")
    model, processor = AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out)
    for name, value in model.sam.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    ids, mask = processor.sam_text(["the striped cat"])
    expected = meta.backbone.language_backbone.tokenizer(["the striped cat"], context_length=32)
    assert torch.equal(ids * mask, expected)
    assert processor.prepare(picture(1), "cat", lazy=True).sam_pixel_values.shape == (3, 112, 112)


class Described(WeightSource):
    """A weight source with names and shapes, but without data."""

    def __init__(self, shapes):
        self.tensors = {
            name: TensorInfo(shape, torch.float32, Path("sam3.pt")) for name, shape in shapes.items()
        }
        self.files = [Path("sam3.pt")]

    def read(self, name):
        raise AssertionError("planning must not read weights")

    release = read


def test_all_tensors_of_the_released_size_are_converted(cpu, folder):
    with meta_sam3.without_memory():
        state = meta_sam3.build(folder / BPE_NAME, small=False).state_dict()
    with torch.device("meta"):
        ours = Sam3Model(Sam3Config()).state_dict()
    source = Described({f"detector.{name}": tuple(value.shape) for name, value in state.items()})
    expected = {name: tuple(value.shape) for name, value in ours.items()}
    plan = make_plan([(source, sam3.from_meta)], expected, lambda name, dtype: dtype)
    assert plan.fits, plan.mismatches()
    assert len(plan.steps) == len(expected) == 1468
    ignored = {name.removeprefix("detector.").split(".")[0] for name in plan.ignored}
    assert ignored == {"backbone", "geometry_encoder"}
    assert all("freqs_cis" in name or "points_" in name for name in plan.ignored)
