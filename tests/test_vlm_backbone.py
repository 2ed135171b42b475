from __future__ import annotations

import pytest
import torch
from transformers import CLIPConfig

from conceptseg_hf import vlm_backbone


def test_vision_token_ids_of_the_nano_preset(model):
    assert {3, 4, 5, 6} <= set(vlm_backbone.vision_token_ids(model.config.vlm_config))


def test_rejects_an_unsupported_family():
    with pytest.raises(ValueError, match="'clip'"):
        vlm_backbone.check_supported(CLIPConfig())


def test_error_lists_missing_model_inputs():
    with pytest.raises(ValueError, match="mm_token_type_ids, pixel_values, image_grid_thw"):
        vlm_backbone.model_inputs({"input_ids": 1, "attention_mask": 1, "mm_token_type_ids": None})


def test_last_hidden_states_are_post_norm_and_reset_rope_deltas(model, processor, picture):
    batch = processor.collate([processor.prepare(picture(0), "red circle")])
    with torch.no_grad():
        states = vlm_backbone.last_hidden_states(model.vlm, vlm_backbone.model_inputs(batch))
        assert model.vlm.model.rope_deltas is None
        reference = model.vlm(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(states, reference)
