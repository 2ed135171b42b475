"""Configurations of ConceptSeg and of its Concept Translation Module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, Sam3Config
from transformers.configuration_utils import SubConfigSpec


@strict
class ConceptTranslationConfig(PreTrainedConfig):
    """Configuration of the Concept Translation Module (section 3.3; structure of the released weights).

    Args:
        hidden_size: Width C of the MLLM's hidden states and of the concept queries.
        num_queries: Number L2 of concept queries (Table 7: 8; 16 in an early version of the released code).
        num_layers: Number of pre-norm cross-attention blocks.
        num_attention_heads: Attention heads of each block; divides `hidden_size`.
        mlp_ratio: Hidden width of each block's MLP over `hidden_size`.
        hidden_act: Activation of each block's MLP.
        sam_hidden_size: Width of SAM 3's prompt space.
        layer_norm_eps: Epsilon of the layer norms.
        initializer_range: Standard deviation of freshly initialised weights.
    """

    model_type = "conceptseg_ctm"

    hidden_size: int = 2048
    num_queries: int = 8
    num_layers: int = 4
    num_attention_heads: int = 16
    mlp_ratio: int = 4
    hidden_act: str = "quick_gelu"
    sam_hidden_size: int = 256
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"ConceptTranslationConfig: hidden_size {self.hidden_size} is not divisible by "
                f"num_attention_heads {self.num_attention_heads}; choose a number of heads that divides it."
            )


@strict
class ConceptSegConfig(PreTrainedConfig):
    """Configuration of `ConceptSegForSegmentation`: an MLLM, a Concept Translation Module and SAM 3.

    Args:
        vlm_config: Configuration of the MLLM; its `model_type` chooses the class (default Qwen2.5-VL).
        sam_config: Configuration of SAM 3.
        ctm_config: Configuration of the Concept Translation Module; its widths follow from the others by default.
        tie_word_embeddings: Follows the MLLM's own setting.
        sam_geometry_cls: Ends the SAM prompt with the geometry encoder's CLS token, as Meta's SAM 3 always
            does.
        hidden_states_at: Which hidden state stands for a completion token: `"token"`, the state at the
            position where it is the input (as the released weights expect), or `"predict"`, the state that
            predicts it.
        router_base: Threshold of the shortcut for a one-word prompt (eq. 9: 0.1).
        sam_name_or_path: Where SAM 3's weights come from when a checkpoint holds none.
        profile: Name of the profile that this checkpoint's settings follow (see `profiles`); None: none by name.
        end_of_turn_state: Whether the end-of-turn token's hidden state is among those that the CTM reads.
        router_drop_parentheses: See `ShortcutRouter.drop_parentheses`.
        router_min_words: See `ShortcutRouter.min_words`.
        missing_answer: SAM 3's text where the completion has no answer: `"prompt"`, the user's words, or `"empty"`.
        max_total_length: Most tokens of prompt and completion together, where generation settings name no limit;
            None: 768 for the completion.
    """

    model_type = "conceptseg"
    sub_configs_defaults = {  # noqa: RUF012 (the base class reads it so)
        "vlm_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2_5_vl"),
        "sam_config": SubConfigSpec(config_class=Sam3Config),
        "ctm_config": SubConfigSpec(config_class=ConceptTranslationConfig),
    }

    vlm_config: dict | PreTrainedConfig | None = None
    sam_config: dict | PreTrainedConfig | None = None
    ctm_config: dict | PreTrainedConfig | None = None
    tie_word_embeddings: bool = False
    sam_geometry_cls: bool = True
    hidden_states_at: str = "token"
    router_base: float = 0.1
    sam_name_or_path: str | None = None
    profile: str | None = None
    end_of_turn_state: bool = False
    router_drop_parentheses: bool = False
    router_min_words: int = 1
    missing_answer: str = "prompt"
    max_total_length: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        derive_widths = self.ctm_config is None
        super().__post_init__(**kwargs)
        if derive_widths:
            self.ctm_config.hidden_size = self.hidden_size
            self.ctm_config.sam_hidden_size = self.sam_config.detr_encoder_config.hidden_size
        self.tie_word_embeddings = bool(getattr(self.vlm_config, "tie_word_embeddings", False))
        if self.hidden_states_at not in ("token", "predict"):
            raise ValueError(
                f"ConceptSegConfig: hidden_states_at is {self.hidden_states_at!r}; use 'token' or 'predict'."
            )
        if self.missing_answer not in ("prompt", "empty"):
            raise ValueError(
                f"ConceptSegConfig: missing_answer is {self.missing_answer!r}; use 'prompt' or 'empty'."
            )
        if self.router_min_words not in (0, 1):
            raise ValueError(f"ConceptSegConfig: router_min_words is {self.router_min_words}; use 0 or 1.")
        if self.max_total_length is not None and self.max_total_length < 1:
            raise ValueError(
                f"ConceptSegConfig: max_total_length is {self.max_total_length}; use at least 1, or None."
            )
        if self.ctm_config.hidden_size != self.hidden_size:
            raise ValueError(
                f"ConceptSegConfig: ctm_config.hidden_size is {self.ctm_config.hidden_size}, but "
                f"the MLLM's hidden states have width {self.hidden_size}; set ctm_config.hidden_size to that width."
            )
        prompt_size = self.sam_config.detr_encoder_config.hidden_size
        if self.ctm_config.sam_hidden_size != prompt_size:
            raise ValueError(
                f"ConceptSegConfig: ctm_config.sam_hidden_size is {self.ctm_config.sam_hidden_size}, but "
                f"SAM 3's prompt space has width {prompt_size}; set ctm_config.sam_hidden_size to that width."
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in the base class, but refuses a checkpoint in the authors' layout.

        Raises:
            ValueError: If it is one; the message says how to convert it.
        """
        content, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if is_authors_config(content):
            raise ValueError(how_to_convert(pretrained_model_name_or_path))
        return content, kwargs

    def to_diff_dict(self) -> dict[str, Any]:
        """As in the base class, without those of `SWITCHES` that are as usual."""
        content = super().to_diff_dict()
        return {name: content[name] for name in content if name not in SWITCHES or name in self.switches}

    @property
    def switches(self) -> dict[str, Any]:
        """Those of `SWITCHES` that are not as usual, by name."""
        usual = {name: type(self).__dataclass_fields__[name].default for name in SWITCHES}
        return {name: getattr(self, name) for name in SWITCHES if getattr(self, name) != usual[name]}

    def sam_words(self, answer: str | None, prompt: str) -> str:
        """SAM 3's text of a completion.

        Args:
            answer: The completion's answer, if it has one.
            prompt: The user's words.
        """
        return answer or (prompt if self.missing_answer == "prompt" else "")

    @property
    def hidden_size(self) -> int:
        """Width of the MLLM's hidden states."""
        return self.get_text_config().hidden_size

    @property
    def image_token_id(self) -> int:
        """The MLLM's token that stands for an image."""
        return self.vlm_config.image_token_id

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The MLLM's language-model configuration."""
        return self.vlm_config.get_text_config(decoder=decoder, encoder=encoder)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> ConceptSegConfig:
        """Builds a configuration by size.

        Args:
            name: `"3b"` or `"7b"` (Qwen2.5-VL of that size with the released SAM 3) or `"nano"` (the
                embedded checkpoint's).
            **overrides: Fields of `ConceptSegConfig` to replace.

        Raises:
            ValueError: If no preset has that name.
        """
        if name not in PRESETS:
            raise ValueError(
                f"ConceptSegConfig.from_preset: no preset is named {name!r}; "
                f"use one of {', '.join(map(repr, PRESETS))}."
            )
        return cls(**{**PRESETS[name](), **overrides})


SWITCHES = (
    "profile",
    "end_of_turn_state",
    "router_drop_parentheses",
    "router_min_words",
    "missing_answer",
    "max_total_length",
)
"""Fields of `ConceptSegConfig` that are saved only where they are set."""

AUTHORS_MODEL_TYPES = ("qwen2_5_vl", "qwen2_vl")  # a released config.json may say either


def is_authors_config(content: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is that of a released checkpoint, in the authors' layout."""
    return content.get("model_type") in AUTHORS_MODEL_TYPES and (
        "num_of_query" in content
        or any(str(name).startswith("ConceptSegR1") for name in content.get("architectures") or ())
    )


def how_to_convert(checkpoint: str | os.PathLike) -> str:
    """One sentence for who loads a checkpoint in the authors' layout."""
    return (
        f"The checkpoint {str(checkpoint)!r} is in the authors' layout; make one that loads with `conceptseg convert "
        f"--checkpoint {checkpoint} --sam facebook/sam3 --out DIR`."
    )


def _qwen2_5_vl(
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_key_value_heads: int,
    vocab_size: int,
    tie_word_embeddings: bool,
) -> dict[str, Any]:
    """The published configuration of Qwen2.5-VL at one size."""
    return {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": tie_word_embeddings,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_key_value_heads,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tie_word_embeddings,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [16, 24, 24],
            },
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
    }


def _preset_3b() -> dict[str, Any]:
    return {
        "vlm_config": _qwen2_5_vl(2048, 11008, 36, 16, 2, 151936, tie_word_embeddings=True),
        "ctm_config": {"hidden_size": 2048},
    }


def _preset_7b() -> dict[str, Any]:
    return {
        "vlm_config": _qwen2_5_vl(3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False),
        "ctm_config": {"hidden_size": 3584},
    }


NANO_IMAGE_SIZE = 128
NANO_MLLM_VOCABULARY_SIZE = 384
NANO_SAM_VOCABULARY_SIZE = 160
NANO_SAM_TEXT_LENGTH = 8


def _preset_nano() -> dict[str, Any]:
    """Small enough to train on a laptop; the classes and the data flow are those of the large models."""
    width, sam_width = 128, 64
    return {
        "vlm_config": {
            "model_type": "qwen2_5_vl",
            "tie_word_embeddings": True,
            # The first tokens of the nano tokenizer, in its order.
            "vision_start_token_id": 3,
            "vision_end_token_id": 4,
            "image_token_id": 5,
            "video_token_id": 6,
            "text_config": {
                "model_type": "qwen2_5_vl_text",
                "vocab_size": NANO_MLLM_VOCABULARY_SIZE,
                "hidden_size": width,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "tie_word_embeddings": True,
                "initializer_range": 0.04,
                "pad_token_id": 0,
                "bos_token_id": None,
                "eos_token_id": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 6, 6]},
            },
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "depth": 3,
                "hidden_size": 64,
                "intermediate_size": 192,
                "num_heads": 4,
                "out_hidden_size": width,
                "patch_size": 8,
                "spatial_merge_size": 2,
                "temporal_patch_size": 1,
                "window_size": NANO_IMAGE_SIZE,
                "fullatt_block_indexes": [0, 1, 2],
                "initializer_range": 0.04,
            },
        },
        "sam_config": {
            "vision_config": {
                "backbone_config": {
                    "model_type": "sam3_vit_model",
                    "hidden_size": 128,
                    "intermediate_size": 384,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 4,
                    "image_size": NANO_IMAGE_SIZE,
                    "patch_size": 8,
                    "window_size": 8,
                    "global_attn_indexes": [1, 3],
                    "pretrain_image_size": NANO_IMAGE_SIZE,
                },
                "fpn_hidden_size": sam_width,
                "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
                "scale_factors": [2.0, 1.0, 0.5, 0.5],
            },
            "text_config": {
                "model_type": "clip_text_model",
                "vocab_size": NANO_SAM_VOCABULARY_SIZE,
                "hidden_size": sam_width,
                "intermediate_size": 128,
                "projection_dim": sam_width,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": NANO_SAM_TEXT_LENGTH,
                "hidden_act": "gelu",
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            "geometry_encoder_config": {
                "hidden_size": sam_width,
                "num_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 128,
                "dropout": 0.0,
                "roi_size": 3,
            },
            "detr_encoder_config": {
                "hidden_size": sam_width,
                "num_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 192,
                "dropout": 0.0,
            },
            "detr_decoder_config": {
                "hidden_size": sam_width,
                "num_layers": 2,
                "num_queries": 8,
                "num_attention_heads": 4,
                "intermediate_size": 192,
                "dropout": 0.0,
            },
            "mask_decoder_config": {
                "hidden_size": sam_width,
                "num_attention_heads": 4,
                "num_upsampling_stages": 2,
            },
        },
        "ctm_config": {"hidden_size": width, "num_attention_heads": 4, "sam_hidden_size": sam_width},
    }


PRESETS = {"3b": _preset_3b, "7b": _preset_7b, "nano": _preset_nano}
