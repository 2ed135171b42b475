"""Quantized loading of the nano checkpoint with bitsandbytes on the CPU."""

from __future__ import annotations

import pytest
import torch
from families import all_families
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig

from conceptseg_hf import Reference, nano_checkpoint
from conceptseg_hf.data import load_benchmark
from conceptseg_hf.quantization import UNQUANTIZED_MODULES, exclude_sam_and_ctm


def test_config_is_copied_and_skips_sam_and_ctm():
    original = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["visual"])
    config = exclude_sam_and_ctm(original)
    assert config.llm_int8_skip_modules == ["visual", *UNQUANTIZED_MODULES] and config.load_in_8bit
    assert original.llm_int8_skip_modules == ["visual"]
    assert exclude_sam_and_ctm(config).llm_int8_skip_modules == config.llm_int8_skip_modules
    assert exclude_sam_and_ctm(original.to_dict()).llm_int8_skip_modules == config.llm_int8_skip_modules


def test_unsupported_config_is_rejected():
    with pytest.raises(ValueError, match="cannot skip SAM 3"):
        exclude_sam_and_ctm(object())


@all_families
def test_vlm_of_each_family_is_loaded_in_four_bits(make_model, processor, picture, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_model().save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModel.from_pretrained(tmp_path, quantization_config=options, dtype=torch.bfloat16)
    quantized = {name for name, value in model.named_parameters() if value.dtype == torch.uint8}
    assert quantized and all(name.startswith("vlm.model.") for name in quantized)
    projections = [name for name, _ in model.vlm.named_modules() if name.endswith("self_attn.q_proj")]
    assert {f"vlm.{name}.weight" for name in projections if "language_model" in name} <= quantized
    references = [Reference(picture(1), box=(2, 2, 20, 20))]
    sample = processor.prepare(picture(0), "red circle", references)
    settings = {"max_new_tokens": 4}
    (result,) = model.segment(
        [sample], router="full_reasoning", generation_config=settings, processor=processor
    )
    assert result.error is None and result.mask.size == (48, 40)


@pytest.mark.parametrize(
    ("bits", "options", "kind"),
    [
        (8, {"load_in_8bit": True}, torch.int8),
        (4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, torch.uint8),
    ],
)
def test_only_the_vlm_is_quantized(bits, options, kind):
    pytest.importorskip("bitsandbytes")
    plain = AutoModel.from_pretrained(nano_checkpoint())
    model = AutoModel.from_pretrained(
        nano_checkpoint(), quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16
    )
    quantized = [name for name, value in model.named_parameters() if value.dtype == kind]
    assert len(quantized) > 40 and all(name.startswith("vlm.model.") for name in quantized)
    for part in ("sam", "ctm"):
        expected = getattr(plain, part).state_dict()
        assert all(
            torch.equal(value, expected[name]) for name, value in getattr(model, part).state_dict().items()
        )

    processor = AutoProcessor.from_pretrained(nano_checkpoint())
    samples = load_benchmark("concept-shapes", split="test")
    sample = next(samples[i] for i in range(100, len(samples)) if samples[i].references)
    inputs = processor([sample.image], [sample.prompt], [sample.references])
    result = model.segment(inputs, router="full_reasoning")[0]
    assert result.error is None and result.answer and result.mask.size == sample.image.size
