from __future__ import annotations

import pytest
import torch
from conceptseg_trainers.from_scratch.assemble import load_start

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
