"""Offloaded models give the same results as models in memory, on the CPU and on a simulated accelerator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, pipeline

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, Reference
from conceptseg_hf.completion import format_completion
from conceptseg_hf.devices import complete_device_map, execution_device, is_offloaded, stored_value
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.loading import fingerprint
from conceptseg_hf.quantization import exclude_sam_and_ctm
from conceptseg_hf.sam_prompt import NO_SPLIT_MODULES

GREEDY = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model) -> Path:
    """A folder with a complete checkpoint, checkpoints without SAM 3 and without the CTM, and SAM 3 alone."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_model(tied=False)
    model.sam.save_pretrained(folder / "sam")
    model.config.sam_name_or_path = str(folder / "sam")
    model.save_pretrained(folder / "full")
    for part in ("sam", "ctm"):
        state = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{part}.")}
        model.save_pretrained(folder / f"without_{part}", state_dict=state)
    return folder


@pytest.fixture(scope="module")
def outcomes(processor) -> Callable[[nn.Module], list[Any]]:
    """Runs a model on all code paths: both routes, boxes, the forward pass, generation and the pipeline."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 40, 48, 3), dtype=np.uint8)
    references = [Reference(noise[2], box=(2, 2, 20, 20)), Reference(noise[3], box=(5, 5, 40, 30))]
    inputs = processor(list(noise[:2]), ["circle", "the odd one out in the image"], [[], references])
    text = format_completion("a red circle is large", "find red", None, (10, 20, 60, 70), "red circle", 100)
    batch = processor.collate(inputs.samples, [text, "<answer> star </answer>"])
    sam_input_ids, sam_attention_mask = processor.sam_text(["red circle", "star"])
    arguments = dict(
        batch,
        sam_pixel_values=inputs.sam_pixel_values,
        sam_input_ids=sam_input_ids,
        sam_attention_mask=sam_attention_mask,
        mask_labels=torch.ones(2, 50, 60),
        output_logits=True,
    )
    prompts = processor.collate(inputs.samples)

    def run(model: nn.Module) -> list[Any]:
        results: list[Any] = []
        for options in ({"router": "sam_only"}, {"router": "full_reasoning", "sam_prompt": "concept+text"}):
            for result in model.segment(
                inputs, processor=processor, generation_config=GREEDY, return_logits=True, **options
            ):
                assert result.error is None
                results += [result.completion, result.mask_logits, result.decode_presence]
        with torch.no_grad():
            boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.6]]] * 2)
            features = model.encode_image(arguments["sam_pixel_values"])
            results += model.decode_masks(features, sam_input_ids, sam_attention_mask, boxes=boxes)
            output = model(**arguments)
        results += [
            output.loss,
            output.mask_logits,
            output.presence_logits,
            output.concept_embeds,
            output.logits,
        ]
        generated = generate_with_states(model.vlm, prompts, GREEDY)
        results += [generated.token_ids, generated.hidden_states]
        pipe = pipeline("concept-segmentation", model=model, processor=processor)
        result = pipe(noise[1], prompt="circle", router="full_reasoning", generation_config=GREEDY)
        results += [result["completion"], np.asarray(result["mask"])]
        return [
            value.float().cpu().numpy() if isinstance(value, torch.Tensor) else value for value in results
        ]

    return run


def assert_same(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for number, (value, expected_value) in enumerate(zip(actual, expected)):
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            np.testing.assert_allclose(value, expected_value, atol=1e-4, err_msg=str(number))
        else:
            assert np.array_equal(value, expected_value), number


@pytest.fixture(scope="module")
def reference(checkpoint, outcomes):
    return outcomes(AutoModel.from_pretrained(checkpoint / "full"))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# -- equal results of offloaded models --


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7, 0.9])
def test_offloading_to_disk_with_limited_memory(checkpoint, outcomes, reference, tmp_path, fraction):
    folder = checkpoint / "full"
    model = AutoModel.from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": int(fraction * size_of(folder))},
        offload_folder=tmp_path,
    )
    assert "disk" in model.hf_device_map.values() and is_offloaded(model)
    on_meta = sum(p.numel() for p in model.parameters() if p.is_meta) / model.num_parameters()
    assert on_meta > 0.9 - fraction
    assert_same(outcomes(model), reference)


@pytest.mark.parametrize(
    "device_map",
    [
        {"sam": "disk"},
        {"ctm": "disk"},
        {"vlm": "disk"},
        {"": "disk"},
        {"vlm.lm_head": "disk", "vlm.model": "cpu"},
    ],
)
def test_offloading_with_a_device_map(checkpoint, outcomes, reference, tmp_path, device_map):
    model = AutoModel.from_pretrained(checkpoint / "full", device_map=device_map, offload_folder=tmp_path)
    assert is_offloaded(model) and model.device == torch.device("cpu")
    assert_same(outcomes(model), reference)


@pytest.mark.parametrize("device_map", [{"": "disk"}, "auto"])
def test_offloaded_sam_and_ctm_keep_their_dtype(checkpoint, outcomes, tmp_path, device_map):
    """Transformers would load them from disk in the dtype of the VLM."""
    folder, options = checkpoint / "full", {"dtype": torch.bfloat16}
    expected = outcomes(AutoModel.from_pretrained(folder, **options))
    if device_map == "auto":
        options["max_memory"] = {"cpu": int(0.5 * size_of(folder))}
    model = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path, **options)
    assert model.vlm.dtype == torch.bfloat16 and model.sam.dtype == torch.float32
    assert torch.equal(stored_value(model, "ctm.queries"), AutoModel.from_pretrained(folder).ctm.queries)
    assert_same(outcomes(model), expected)


OFFLOADS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, "cpu"),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, {"vlm": "cpu", "ctm": "disk", "sam": "disk"}, offload_dir=folder
    ),
    "buffers": lambda model, folder: accelerate.cpu_offload(model, "cpu", offload_buffers=True),
    "SAM 3 alone": lambda model, folder: accelerate.cpu_offload(model.sam, "cpu"),
    "the VLM alone": lambda model, folder: accelerate.cpu_offload(model.vlm, "cpu"),
    "the CTM alone": lambda model, folder: accelerate.cpu_offload(model.ctm, "cpu"),
    "SAM 3 preloaded": lambda model, folder: accelerate.cpu_offload(
        model, "cpu", preload_module_classes=["Sam3Model"]
    ),
    "geometry encoder preloaded": lambda model, folder: accelerate.cpu_offload(
        model, "cpu", preload_module_classes=["Sam3GeometryEncoder"]
    ),
}


@pytest.mark.parametrize("way", OFFLOADS)
def test_offloading_with_accelerate(checkpoint, outcomes, reference, tmp_path, way):
    model = AutoModel.from_pretrained(checkpoint / "full")
    OFFLOADS[way](model, tmp_path / "offload")
    assert is_offloaded(model)
    assert_same(outcomes(model), reference)
    assert any(
        parameter.is_meta for parameter in model.parameters()
    )  # offloaded again after the forward pass


def test_execution_device_differs_from_the_offload_device():
    """Runs simulated_accelerator.py, which simulates an accelerator on the CPU."""
    script = Path(__file__).with_name("simulated_accelerator.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    if "no simulated accelerator" in done.stderr:
        pytest.skip("this PyTorch has no backends in Python")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("all equal: cpu_offload, ")


# -- modules that are not split --


def test_modules_with_parameters_and_children_are_not_split(model):
    """A device map of the children of such a module would not cover its own parameters."""
    names = {type(module).__name__ for module in model.modules()}
    assert set(NO_SPLIT_MODULES) <= names and set(NO_SPLIT_MODULES) <= model._no_split_modules
    kept = [
        name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules
    ]
    for name, module in model.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if tensors and list(module.children()):
            assert any(name == unit or name.startswith(f"{unit}.") for unit in kept), name


def test_largest_unsplittable_part_of_sam_is_small():
    """Accelerate reserves memory for the largest offloaded part, which must not be all of SAM 3 on a small GPU."""
    with torch.device("meta"):
        model = ConceptSegForSegmentation(ConceptSegConfig.from_preset("7b"))
    sizes = {
        name: sum(p.numel() * p.element_size() for p in module.parameters())
        for name, module in model.sam.named_modules()
        if type(module).__name__ in NO_SPLIT_MODULES
    }
    assert max(sizes.values()) < 0.1 * sum(p.numel() * p.element_size() for p in model.sam.parameters())


def test_execution_device(model):
    layer = nn.Sequential(nn.Linear(2, 2))
    assert execution_device(layer) == torch.device("cpu") == model.device
    assert execution_device(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    accelerate.cpu_offload(layer, "cpu")
    assert layer[0].weight.is_meta and execution_device(layer) == torch.device("cpu")


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ("auto", "auto"),
        ({"": 0}, {"": 0}),
        ({"sam": "disk"}, {"sam": "disk", "vlm": "cpu", "ctm": "cpu"}),
        ({"sam": "cpu", "vlm.model": 1}, {"sam": "cpu", "vlm.model": 1, "ctm": 1}),
        ({"vlm": 0, "ctm": 0, "sam": "cpu"}, {"vlm": 0, "ctm": 0, "sam": "cpu"}),
    ],
)
def test_incomplete_device_map_is_completed(device_map, expected, monkeypatch):
    monkeypatch.setattr("conceptseg_hf.devices.default_device", lambda: torch.device("cpu"))
    assert complete_device_map(device_map, ("vlm", "ctm", "sam")) == expected


# -- checkpoints --


@pytest.mark.parametrize("device_map", [{"sam": "disk"}, "auto"])
def test_offloading_a_checkpoint_without_sam(checkpoint, outcomes, reference, tmp_path, device_map):
    memory = {"max_memory": {"cpu": int(0.5 * size_of(checkpoint / "full"))}} if device_map == "auto" else {}
    folder = checkpoint / "without_sam"
    model = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path, **memory)
    assert is_offloaded(model.sam)
    assert_same(outcomes(model), reference)
    with pytest.raises(ValueError, match="offload_folder"):
        AutoModel.from_pretrained(folder, device_map=device_map, **memory)


def test_newly_initialized_ctm_cannot_be_offloaded_to_disk(checkpoint, tmp_path):
    options = {"init_ctm": True, "offload_folder": tmp_path}
    with pytest.raises(ValueError, match=r"lacks the weight ctm.*place 'ctm'"):
        AutoModel.from_pretrained(checkpoint / "without_ctm", device_map={"ctm": "disk"}, **options)
    model = AutoModel.from_pretrained(checkpoint / "without_ctm", device_map={"sam": "disk"}, **options)
    assert model.ctm.queries.std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("way", ["device_map", "cpu_offload", "disk_offload", "the CTM alone"])
@pytest.mark.parametrize("tied", [True, False])
def test_saving_an_offloaded_model_includes_all_weights(make_model, tmp_path, way, tied):
    source = make_model(tied)
    source.save_pretrained(tmp_path / "source")
    device_map = {"": "disk"} if way == "device_map" else None
    model = AutoModel.from_pretrained(tmp_path / "source", device_map=device_map)
    if way in OFFLOADS:
        OFFLOADS[way](model, tmp_path / "offload")
    assert fingerprint(model)["weights"] == fingerprint(source)["weights"]
    model.save_pretrained(tmp_path / "saved")
    loaded, info = ConceptSegForSegmentation.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_stored_value_of_a_meta_weight_raises():
    with torch.device("meta"):
        model = ConceptSegForSegmentation(ConceptSegConfig.from_preset("nano"))
    with pytest.raises(ValueError, match=r"ctm\.queries"):
        stored_value(model, "ctm.queries")


def test_from_backbones_with_an_offloaded_sam(checkpoint, make_model):
    model = ConceptSegForSegmentation.from_backbones(
        make_model().vlm,
        checkpoint / "sam",
        ctm_config={"num_attention_heads": 4},
        sam_kwargs={"device_map": {"": "disk"}},
    )
    assert model.ctm.queries.device == torch.device("cpu") and is_offloaded(model.sam)


# -- quantization --


@pytest.mark.parametrize(
    ("device_map", "allowed"),
    [
        ({"vlm": 0, "ctm": 0, "sam": "cpu"}, True),
        ({"vlm": 0, "ctm": "cpu", "sam.vision_encoder": "disk", "sam.text_encoder": 0}, True),
        ({"vlm": 0, "ctm": 0, "sam": 0}, True),
        ({"vlm.model": "cpu", "vlm.lm_head": 0, "ctm": 0, "sam": "cpu"}, False),
        ({"": "cpu"}, False),
        ("auto", False),
        (None, False),
    ],
)
def test_sam_and_ctm_may_be_offloaded_with_a_quantized_vlm(device_map, allowed):
    config = exclude_sam_and_ctm(BitsAndBytesConfig(load_in_4bit=True), device_map)
    assert config.llm_int8_enable_fp32_cpu_offload is allowed


@pytest.mark.parametrize("way", ["SAM 3 alone", "dispatch_model"])
def test_4_bit_quantization_with_offloading(checkpoint, outcomes, tmp_path, way):
    pytest.importorskip("bitsandbytes")

    def load() -> nn.Module:
        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return AutoModel.from_pretrained(
            checkpoint / "full", quantization_config=four_bits, dtype=torch.float32
        )

    expected = outcomes(load())
    model = load()
    OFFLOADS[way](model, tmp_path / "offload")
    assert is_offloaded(model.sam)
    assert_same(outcomes(model), expected)


# -- pipelines --


def test_pipeline_uses_the_execution_device(checkpoint, processor, tmp_path):
    model = AutoModel.from_pretrained(
        checkpoint / "full", device_map={"sam": "disk", "vlm": "cpu", "ctm": "cpu"}
    )
    device_map = dict(model.hf_device_map)
    pipe = pipeline("concept-segmentation", model=model, processor=processor)
    assert pipe.device == torch.device("cpu") and model.hf_device_map == device_map
    with pytest.raises(ValueError, match="cannot be moved"):
        pipeline("concept-segmentation", model=model, processor=processor, device="cpu")
