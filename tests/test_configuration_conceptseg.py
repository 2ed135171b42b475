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


@pytest.mark.parametrize(
    ("size", "layers", "heads", "vision", "deepstack"),
    [
        ("2b", 28, 16, (24, 1024, 4096), [5, 11, 17]),
        ("4b", 36, 32, (24, 1024, 4096), [5, 11, 17]),
        ("8b", 36, 32, (27, 1152, 4304), [8, 16, 24]),
    ],
)
def test_presets_of_qwen3_have_the_published_values(size, layers, heads, vision, deepstack):
    """Values that do not change the number of parameters, too; docs/families.md names the sources."""
    config = ConceptSegConfig.from_preset(f"qwen3-{size}").vlm_config
    text, tower = config.text_config, config.vision_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (layers, heads, 8)
    assert (text.head_dim, text.max_position_embeddings, text.rms_norm_eps) == (128, 262144, 1e-6)
    assert text.rope_parameters == {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    assert (tower.depth, tower.hidden_size, tower.intermediate_size) == vision
    assert (tower.num_heads, tower.patch_size, tower.num_position_embeddings) == (16, 16, 2304)
    assert tower.deepstack_visual_indexes == deepstack and tower.hidden_act == "gelu_pytorch_tanh"
    assert tower.out_hidden_size == text.hidden_size
    assert config.tie_word_embeddings == (size != "8b")
