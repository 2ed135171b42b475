"""Quantised loading with bitsandbytes, on a CPU, of the nano checkpoint."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig

from conceptseg_hf import nano_checkpoint
from conceptseg_hf.data import load_benchmark
from conceptseg_hf.quantization import UNQUANTIZED_MODULES, exclude_sam_and_ctm


def test_a_configuration_is_not_changed():
    given = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["visual"])
    spared = exclude_sam_and_ctm(given)
    assert spared.llm_int8_skip_modules == ["visual", *UNQUANTIZED_MODULES] and spared.load_in_8bit
    assert given.llm_int8_skip_modules == ["visual"]
    assert exclude_sam_and_ctm(spared).llm_int8_skip_modules == spared.llm_int8_skip_modules
    assert exclude_sam_and_ctm(given.to_dict()).llm_int8_skip_modules == spared.llm_int8_skip_modules


def test_others_are_refused():
    with pytest.raises(ValueError, match="cannot leave SAM 3 out"):
        exclude_sam_and_ctm(object())


@pytest.mark.parametrize(
    ("bits", "options", "kind"),
    [
        (8, {"load_in_8bit": True}, torch.int8),
        (4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, torch.uint8),
    ],
)
def test_only_the_vlm_is_quantised(bits, options, kind):
    pytest.importorskip("bitsandbytes")
    plain = AutoModel.from_pretrained(nano_checkpoint())
    model = AutoModel.from_pretrained(
        nano_checkpoint(), quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16
    )
    quantised = [name for name, value in model.named_parameters() if value.dtype == kind]
    assert len(quantised) > 40 and all(name.startswith("vlm.model.") for name in quantised)
    for part in ("sam", "ctm"):
        wanted = getattr(plain, part).state_dict()
        assert all(
            torch.equal(value, wanted[name]) for name, value in getattr(model, part).state_dict().items()
        )

    processor = AutoProcessor.from_pretrained(nano_checkpoint())
    samples = load_benchmark("concept-shapes", split="test")
    sample = next(samples[i] for i in range(100, len(samples)) if samples[i].references)
    inputs = processor([sample.image], [sample.prompt], [sample.references])
    result = model.segment(inputs, router="full_reasoning")[0]
    assert result.error is None and result.answer and result.mask.size == sample.image.size
