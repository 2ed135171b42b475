"""Models that are offloaded to the CPU or the disk, on a CPU and on a simulated accelerator: same results as whole."""

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
from conceptseg_hf.sam_prompt import UNITS

GREEDY = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model) -> Path:
    """A complete checkpoint, and beside it one without SAM 3, one without the CTM, and SAM 3 alone."""
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
    """What a model says by every path: both routes, boxes, the forward pass, completions and the pipeline."""
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
        found: list[Any] = []
        for options in ({"router": "sam_only"}, {"router": "full_reasoning", "sam_prompt": "concept+text"}):
            for result in model.segment(inputs, generation_config=GREEDY, return_logits=True, **options):
                assert result.error is None
                found += [result.completion, result.mask_logits, result.decode_presence]
        with torch.no_grad():
            boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.6]]] * 2)
            features = model.encode_image(arguments["sam_pixel_values"])
            found += model.decode_masks(features, sam_input_ids, sam_attention_mask, boxes=boxes)
            output = model(**arguments)
        found += [
            output.loss,
            output.mask_logits,
            output.presence_logits,
            output.concept_embeds,
            output.logits,
        ]
        generated = generate_with_states(model.vlm, prompts, GREEDY)
        found += [generated.token_ids, generated.hidden_states]
        pipe = pipeline("concept-segmentation", model=model, processor=processor)
        result = pipe(noise[1], prompt="circle", router="full_reasoning", generation_config=GREEDY)
        found += [result["completion"], np.asarray(result["mask"])]
        return [value.float().cpu().numpy() if isinstance(value, torch.Tensor) else value for value in found]

    return run


def assert_same(found: list[Any], wanted: list[Any]) -> None:
    assert len(found) == len(wanted)
    for number, (one, other) in enumerate(zip(found, wanted)):
        if isinstance(one, np.ndarray) and one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, atol=1e-4, err_msg=str(number))
        else:
            assert np.array_equal(one, other), number


@pytest.fixture(scope="module")
def whole(checkpoint, outcomes):
    return outcomes(AutoModel.from_pretrained(checkpoint / "full"))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# -- equal results --


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_little_memory(checkpoint, outcomes, whole, tmp_path, fraction):
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
    assert_same(outcomes(model), whole)


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
def test_a_device_map(checkpoint, outcomes, whole, tmp_path, device_map):
    model = AutoModel.from_pretrained(checkpoint / "full", device_map=device_map, offload_folder=tmp_path)
    assert is_offloaded(model) and model.device == torch.device("cpu")
    assert_same(outcomes(model), whole)


@pytest.mark.parametrize("device_map", [{"": "disk"}, "auto"])
def test_sam_and_ctm_are_read_in_their_own_precision(checkpoint, outcomes, tmp_path, device_map):
    """Transformers would read them from the disk in the dtype of the VLM."""
    folder, options = checkpoint / "full", {"dtype": torch.bfloat16}
    wanted = outcomes(AutoModel.from_pretrained(folder, **options))
    if device_map == "auto":
        options["max_memory"] = {"cpu": int(0.5 * size_of(folder))}
    model = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path, **options)
    assert model.vlm.dtype == torch.bfloat16 and model.sam.dtype == torch.float32
    assert torch.equal(stored_value(model, "ctm.queries"), AutoModel.from_pretrained(folder).ctm.queries)
    assert_same(outcomes(model), wanted)


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
    "SAM 3 at once": lambda model, folder: accelerate.cpu_offload(
        model, "cpu", preload_module_classes=["Sam3Model"]
    ),
    "its geometry encoder at once": lambda model, folder: accelerate.cpu_offload(
        model, "cpu", preload_module_classes=["Sam3GeometryEncoder"]
    ),
}


@pytest.mark.parametrize("way", OFFLOADS)
def test_accelerate(checkpoint, outcomes, whole, tmp_path, way):
    model = AutoModel.from_pretrained(checkpoint / "full")
    OFFLOADS[way](model, tmp_path / "offload")
    assert is_offloaded(model)
    assert_same(outcomes(model), whole)
    assert any(parameter.is_meta for parameter in model.parameters())  # what was brought is taken away again


def test_an_accelerator_beside_weights_on_the_cpu():
    """The device that computes is not the one that stores; see simulated_accelerator.py for how that is seen here."""
    script = Path(__file__).with_name("simulated_accelerator.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    if "no simulated accelerator" in done.stderr:
        pytest.skip("this PyTorch has no backends in Python")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("all equal: cpu_offload, ")


# -- the parts that stay together --


def test_what_adds_up_its_children_is_not_split(model):
    """A module that holds parameters beside its children would lose them in a map that names the children."""
    names = {type(module).__name__ for module in model.modules()}
    assert set(UNITS) <= names and set(UNITS) <= model._no_split_modules
    kept = [
        name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules
    ]
    for name, module in model.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if tensors and list(module.children()):
            assert any(name == unit or name.startswith(f"{unit}.") for unit in kept), name


def test_a_small_card_is_used():
    """Memory is kept free for the largest part that is offloaded: that must not be all of SAM 3."""
    with torch.device("meta"):
        model = ConceptSegForSegmentation(ConceptSegConfig.from_preset("7b"))
    sizes = {
        name: sum(p.numel() * p.element_size() for p in module.parameters())
        for name, module in model.sam.named_modules()
        if type(module).__name__ in UNITS
    }
    assert max(sizes.values()) < 0.1 * sum(p.numel() * p.element_size() for p in model.sam.parameters())


def test_where_a_module_computes(model):
    layer = nn.Sequential(nn.Linear(2, 2))
    assert execution_device(layer) == torch.device("cpu") == model.device
    assert execution_device(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    accelerate.cpu_offload(layer, "cpu")
    assert layer[0].weight.is_meta and execution_device(layer) == torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("auto", "auto"),
        ({"": 0}, {"": 0}),
        ({"sam": "disk"}, {"sam": "disk", "vlm": "cpu", "ctm": "cpu"}),
        ({"sam": "cpu", "vlm.model": 1}, {"sam": "cpu", "vlm.model": 1, "ctm": 1}),
        ({"vlm": 0, "ctm": 0, "sam": "cpu"}, {"vlm": 0, "ctm": 0, "sam": "cpu"}),
    ],
)
def test_a_device_map_names_some_parts(given, wanted, monkeypatch):
    monkeypatch.setattr("conceptseg_hf.devices.default_device", lambda: torch.device("cpu"))
    assert complete_device_map(given, ("vlm", "ctm", "sam")) == wanted


# -- checkpoints --


@pytest.mark.parametrize("device_map", [{"sam": "disk"}, "auto"])
def test_a_checkpoint_without_sam(checkpoint, outcomes, whole, tmp_path, device_map):
    memory = {"max_memory": {"cpu": int(0.5 * size_of(checkpoint / "full"))}} if device_map == "auto" else {}
    folder = checkpoint / "without_sam"
    model = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path, **memory)
    assert is_offloaded(model.sam)
    assert_same(outcomes(model), whole)
    with pytest.raises(ValueError, match="offload_folder"):
        AutoModel.from_pretrained(folder, device_map=device_map, **memory)


def test_a_new_ctm_on_the_disk(checkpoint, tmp_path):
    options = {"init_ctm": True, "offload_folder": tmp_path}
    with pytest.raises(ValueError, match=r"lacks the weight ctm.*send 'ctm' elsewhere"):
        AutoModel.from_pretrained(checkpoint / "without_ctm", device_map={"ctm": "disk"}, **options)
    model = AutoModel.from_pretrained(checkpoint / "without_ctm", device_map={"sam": "disk"}, **options)
    assert model.ctm.queries.std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("way", ["device_map", "cpu_offload", "disk_offload", "the CTM alone"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_offloaded_model_is_saved_whole(make_model, tmp_path, way, tied):
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


def test_a_weight_that_is_nowhere(checkpoint):
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


# -- quantised --


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
def test_sam_and_ctm_may_be_offloaded_beside_a_quantised_vlm(device_map, allowed):
    spared = exclude_sam_and_ctm(BitsAndBytesConfig(load_in_4bit=True), device_map)
    assert spared.llm_int8_enable_fp32_cpu_offload is allowed


@pytest.mark.parametrize("way", ["SAM 3 alone", "dispatch_model"])
def test_four_bits_and_offloading(checkpoint, outcomes, tmp_path, way):
    pytest.importorskip("bitsandbytes")

    def load() -> nn.Module:
        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return AutoModel.from_pretrained(
            checkpoint / "full", quantization_config=four_bits, dtype=torch.float32
        )

    wanted = outcomes(load())
    model = load()
    OFFLOADS[way](model, tmp_path / "offload")
    assert is_offloaded(model.sam)
    assert_same(outcomes(model), wanted)


# -- pipelines --


def test_the_device_of_a_pipeline(checkpoint, processor, tmp_path):
    model = AutoModel.from_pretrained(
        checkpoint / "full", device_map={"sam": "disk", "vlm": "cpu", "ctm": "cpu"}
    )
    device_map = dict(model.hf_device_map)
    pipe = pipeline("concept-segmentation", model=model, processor=processor)
    assert pipe.device == torch.device("cpu") and model.hf_device_map == device_map
    with pytest.raises(ValueError, match="cannot be moved"):
        pipeline("concept-segmentation", model=model, processor=processor, device="cpu")
