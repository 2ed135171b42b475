from __future__ import annotations

import pytest
import torch

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, ConceptTranslationConfig


@pytest.mark.parametrize(
    ("preset", "width", "tied"),
    [
        ("3b", 2048, True),
        ("7b", 3584, False),
        ("qwen3-4b", 2560, True),
        ("qwen3-8b", 4096, False),
        ("nano", 128, True),
        ("nano-qwen3", 128, True),
    ],
)
def test_presets_match_their_backbones(preset: str, width: int, tied: bool) -> None:
    config = ConceptSegConfig.from_preset(preset)
    assert config.hidden_size == config.ctm_config.hidden_size == width
    assert config.tie_word_embeddings is tied
    assert config.ctm_config.num_queries == 8  # Table 7
    assert config.sam_geometry_cls and config.hidden_states_at == "token"


def test_round_trip_through_json(tmp_path) -> None:
    config = ConceptSegConfig.from_preset(
        "nano", sam_geometry_cls=False, hidden_states_at="predict", router_base=0.2
    )
    config.save_pretrained(tmp_path)
    loaded = ConceptSegConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.vlm_config.model_type == "qwen2_5_vl"


def test_preset_fields_can_be_overridden() -> None:
    config = ConceptSegConfig.from_preset(
        "nano",
        ctm_config={"hidden_size": 128, "num_attention_heads": 4, "sam_hidden_size": 64, "num_queries": 3},
    )
    with torch.device("meta"):
        model = ConceptSegForSegmentation(config)
    assert model.ctm.queries.shape == (3, 128)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_states_at": "second"}, "'token' or 'predict'"),
        (
            {"ctm_config": {"hidden_size": 64, "num_attention_heads": 4, "sam_hidden_size": 64}},
            "ctm_config.hidden_size is 64",
        ),
        (
            {"ctm_config": {"hidden_size": 128, "num_attention_heads": 4, "sam_hidden_size": 32}},
            "sam_hidden_size is 32",
        ),
    ],
)
def test_rejects_invalid_settings(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConceptSegConfig.from_preset("nano", **overrides)


def test_error_of_an_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(ValueError, match="'3b', '7b', 'qwen3-2b'"):
        ConceptSegConfig.from_preset("13b")


def test_number_of_heads_must_divide_the_hidden_size() -> None:
    with pytest.raises(ValueError, match="not divisible"):
        ConceptTranslationConfig(hidden_size=100, num_attention_heads=16)


def test_ctm_widths_default_to_those_of_the_backbones() -> None:
    config = ConceptSegConfig()
    assert config.ctm_config.hidden_size == config.hidden_size
    assert config.ctm_config.sam_hidden_size == config.sam_config.detr_encoder_config.hidden_size
