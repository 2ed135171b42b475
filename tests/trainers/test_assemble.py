from __future__ import annotations

import pytest
import torch
from conceptseg_trainers.from_scratch.assemble import load_stages, load_start, write_checkpoint
from conceptseg_trainers.nano.tokenizers import build_processor
from safetensors.torch import save_file

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, nano_checkpoint


@pytest.mark.parametrize("name", ["vlm", "ctm", "sam"])
def test_training_continues_from_a_part_of_a_checkpoint(name) -> None:
    part = getattr(ConceptSegForSegmentation(ConceptSegConfig.from_preset("nano")), name)
    expected = getattr(ConceptSegForSegmentation.from_pretrained(nano_checkpoint()), name)
    load_start(part, nano_checkpoint(), name)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(part.state_dict()[key], tensor), key


def test_start_with_another_architecture_is_refused_in_one_sentence() -> None:
    part = ConceptSegForSegmentation(ConceptSegConfig.from_preset("mini")).sam
    with pytest.raises(ValueError, match="its sam has another architecture or vocabulary"):
        load_start(part, nano_checkpoint(), "sam")


def test_missing_start_is_an_error_of_the_folder(tmp_path) -> None:
    part = ConceptSegForSegmentation(ConceptSegConfig.from_preset("nano")).ctm
    with pytest.raises(OSError, match="missing"):
        load_start(part, tmp_path / "missing", "ctm")


def test_sam_3_of_a_checkpoint_replaces_its_stage(tmp_path) -> None:
    """The SAM 3 of nano serves a VLM of another family, of which only the stage "vlm" has been run."""
    start = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    vlm = ConceptSegForSegmentation(ConceptSegConfig.from_preset("nano-qwen3")).vlm
    (tmp_path / "vlm").mkdir()
    average = {f"average/vlm.{name}": value.clone() for name, value in vlm.named_parameters()}
    save_file(average, tmp_path / "vlm" / "state.safetensors")
    with pytest.raises(FileNotFoundError, match="run the stage 'sam' first"):
        load_stages("nano-qwen3", build_processor("qwen3_vl"), tmp_path)
    model = load_stages("nano-qwen3", build_processor("qwen3_vl"), tmp_path, sam=nano_checkpoint())
    for part, expected in ((model.sam, start.sam), (model.vlm, vlm)):
        for name, value in expected.named_parameters():
            assert torch.equal(part.get_parameter(name), value), name


def test_checkpoint_in_half_precision_is_loaded_in_float32(tmp_path) -> None:
    model = ConceptSegForSegmentation(ConceptSegConfig.from_preset("nano"))
    write_checkpoint(model, build_processor(), tmp_path, half=True)
    assert (tmp_path / "model.safetensors").stat().st_size < 2.2 * model.num_parameters()
    loaded = ConceptSegForSegmentation.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, value in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), value.half().float()), name
