"""CoPRS with each family of VLMs."""

from __future__ import annotations

import copy

import pytest
import torch
from families import all_families, tiny_config
from random_coprs import build_processor, build_random_coprs

from conceptseg_hf import CoPRSProcessor
from conceptseg_hf.coprs.completion import format_reasoning
from conceptseg_hf.vlm_families import get_family


@pytest.fixture(scope="session")
def family_coprs(vlm_family, processor):
    """A random model with a tiny VLM of the family; `processor` provides the VLM's image processor and tokenizer."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    coprs_processor = build_processor("sam", processor.image_processor, tokenizer, vlm_family)
    config = tiny_config(vlm_family).vlm_config
    config.get_text_config().vocab_size = max(config.get_text_config().vocab_size, len(tokenizer))
    return build_random_coprs(processor=coprs_processor, vlm_config=config.to_dict())


@all_families
def test_the_generation_pass_and_forward_have_the_same_masks(family_coprs, make_image, tmp_path):
    model, processor = family_coprs, family_coprs.processor
    images, prompts = [make_image(2), make_image(3, (50, 80))], ["red circle", "star"]
    samples = [processor.prepare(*item) for item in zip(images, prompts, strict=True)]
    position, size = model.config.ref_pos_token_id, model.config.get_text_config().vocab_size
    only_position = {
        "max_new_tokens": 4,
        "suppress_tokens": [token for token in range(size) if token != position],
    }
    batch = processor.collate(samples, ["<REF_POS>", "<REF_POS>"])
    with torch.no_grad():
        expected = model(
            **batch,
            sam_pixel_values=torch.stack([sample.sam_pixel_values for sample in samples]),
            valid_sizes=torch.tensor([processor.valid_size(image.size) for image in images]),
        )
    raw = model.segment(samples, generation_config=only_position).raw
    for row, output in enumerate(raw):
        height, width = processor.valid_size(images[row].size)
        resized = torch.nn.functional.interpolate(
            expected.mask_logits[row][None], size=(128, 128), mode="bilinear"
        )
        torch.testing.assert_close(output.mask_logits, resized[0, 0, :height, :width], atol=1e-4, rtol=1e-4)
    assert (expected.concentration_states[0] - expected.concentration_states[1]).abs().max() > 1e-2

    processor.save_pretrained(tmp_path)
    assert CoPRSProcessor.from_pretrained(tmp_path).vlm_family == processor.vlm_family


@all_families
def test_images_keep_their_aspect_ratio_if_the_family_supports_it(family_coprs, vlm_family, make_image):
    """90 x 60 pixels exceed `max_pixels` = 64 * 64: they become 64 x 48, multiples of 16 pixels."""
    processor = family_coprs.processor
    sample = processor.prepare(make_image(0), "star")
    plain = processor.vlm_processor()(text=sample.vlm_text, images=[make_image(0)], return_tensors="pt")
    assert plain["input_ids"][0].tolist() == sample.input_ids.tolist()
    torch.testing.assert_close(plain["pixel_values"], sample.pixel_values)
    if vlm_family == "internvl":
        assert sample.image_grid_thw is None and sample.pixel_values.shape == (1, 3, 56, 56)
    else:
        assert sample.image_grid_thw.tolist() == [[1, 6, 8]]


@all_families
def test_defaults_of_the_family(family_coprs, vlm_family):
    processor, family = family_coprs.processor, get_family(vlm_family)
    default = CoPRSProcessor(
        processor.image_processor,
        processor.tokenizer,
        processor.sam_image_processor,
        vlm_family=vlm_family,
    )
    assert (default.canvas_size, default.coordinate_scale) == (family.canvas_size, family.coordinate_scale)
    assert ("vlm_family" in default.to_dict()) == (vlm_family != "qwen2_5_vl")


def test_a_processor_of_another_family_is_refused(make_coprs, make_image):
    model = make_coprs()
    processor = model.processor.with_settings(vlm_family="qwen3_vl")
    with pytest.raises(ValueError, match="the processor is for VLMs of the family 'qwen3_vl'"):
        model.segment([processor.prepare(make_image(0), "star")], processor=processor)


def test_forward_needs_a_completion_mask(make_coprs, make_image):
    model = make_coprs()
    batch = model.processor.collate([model.processor.prepare(make_image(0), "star")], [format_reasoning("a")])
    del batch["completion_mask"]
    with pytest.raises(ValueError, match="completion_mask is missing"):
        model(**batch, sam_pixel_values=torch.zeros(1, 3, 128, 128))
