from __future__ import annotations

import pytest
import torch
from transformers import CLIPConfig

from conceptseg_hf.vlm_families import FAMILIES, get_family


def test_vision_token_ids_of_the_nano_preset(model):
    config = model.config.vlm_config
    assert {3, 4, 5, 6} <= set(get_family(config).vision_token_ids(config))


def test_unknown_family_is_refused_with_the_list_and_the_guide():
    with pytest.raises(ValueError, match=r"'clip'.*'qwen2_5_vl'.*docs/families\.md"):
        get_family(CLIPConfig())


def test_error_lists_missing_model_inputs():
    with pytest.raises(ValueError, match="mm_token_type_ids, pixel_values, image_grid_thw"):
        FAMILIES["qwen2_5_vl"].model_inputs({"input_ids": 1, "attention_mask": 1, "mm_token_type_ids": None})


def test_last_hidden_states_are_post_norm_and_reset_rope_deltas(model, processor, picture):
    family = get_family(model.config.vlm_config)
    batch = processor.collate([processor.prepare(picture(0), "red circle")])
    with torch.no_grad():
        states = family.last_hidden_states(model.vlm, family.model_inputs(batch))
        assert model.vlm.model.rope_deltas is None
        reference = model.vlm(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(states, reference)
