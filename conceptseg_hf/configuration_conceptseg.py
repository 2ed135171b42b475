"""Configurations of ConceptSeg and its Concept Translation Module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, Sam3Config
from transformers.configuration_utils import SubConfigSpec


@strict
class ConceptTranslationConfig(PreTrainedConfig):
    """Configuration of the Concept Translation Module (section 3.3; architecture of the released weights).

    Args:
        hidden_size: Width C of the VLM's hidden states and of the concept queries.
        num_queries: Number L2 of concept queries (Table 7: 8; 16 in an early version of the released code).
        num_layers: Number of pre-norm cross-attention blocks.
        num_attention_heads: Number of attention heads of each block; must divide `hidden_size`.
        mlp_ratio: Ratio of the hidden width of each block's MLP to `hidden_size`.
        hidden_act: Activation function of each block's MLP.
        sam_hidden_size: Width of SAM 3's prompt space.
        layer_norm_eps: Epsilon of the layer norms.
        initializer_range: Standard deviation of the weight initialization.
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
                f"num_attention_heads {self.num_attention_heads}; use a number of heads that divides it."
            )


@strict
class ConceptSegConfig(PreTrainedConfig):
    """Configuration of `ConceptSegForSegmentation`: a VLM, a Concept Translation Module and SAM 3.

    Args:
        vlm_config: Configuration of the VLM; its `model_type` selects the family (see `vlm_families`).
        sam_config: Configuration of SAM 3.
        ctm_config: Configuration of the Concept Translation Module; its widths default to those of the VLM and SAM 3.
        tie_word_embeddings: Set to the VLM's value.
        sam_geometry_cls: Whether to append the geometry encoder's CLS token to the SAM prompt, as Meta's SAM 3 does.
        sam_geometry_cls_with_concepts: Whether that token is also appended if the prompt contains concept tokens. The
            embedded checkpoint omits it there; the released weights expect it.
        hidden_states_at: Which hidden state represents a completion token: `"token"`, the state at the position where
            the token is the input (as the released weights expect), or `"predict"`, the state that predicts it.
        router_base: Threshold of the shortcut for a one-word prompt (eq. 9: 0.1).
        sam_name_or_path: Source of SAM 3's weights if the checkpoint does not contain them.
        profile: Name of the profile of the checkpoint's settings (see `profiles`), or None.
        end_of_turn_state: Whether the CTM also attends to the hidden state of the end-of-turn token.
        router_drop_parentheses: See `ShortcutRouter.drop_parentheses`.
        router_min_words: See `ShortcutRouter.min_words`.
        missing_answer: SAM 3's text if the completion has no answer: `"prompt"` for the user's prompt, or `"empty"`.
        max_total_length: Maximum number of tokens of prompt and completion together if the generation settings set no
            limit; None to limit the completion to 768 tokens.
    """

    model_type = "conceptseg"
    sub_configs_defaults = {  # noqa: RUF012 (type expected by the base class)
        "vlm_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2_5_vl"),
        "sam_config": SubConfigSpec(config_class=Sam3Config),
        "ctm_config": SubConfigSpec(config_class=ConceptTranslationConfig),
    }

    if TYPE_CHECKING:  # dictionaries are converted to configurations by the base class
        vlm_config: Any = None
        sam_config: Any = None
        ctm_config: Any = None
    else:
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
    sam_geometry_cls_with_concepts: bool = True

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
                f"the VLM's hidden states have width {self.hidden_size}; set ctm_config.hidden_size to that width."
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
        """Load the configuration dictionary; see the base class.

        Raises:
            ValueError: If the checkpoint is in the authors' layout; the message contains the conversion command.
        """
        content, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if is_original_config(content):
            raise ValueError(conversion_hint(pretrained_model_name_or_path))
        return content, kwargs

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the non-default values as a dictionary, without the `OPTIONAL_FIELDS` at their default value."""
        content = super().to_diff_dict()
        return {
            name: content[name]
            for name in content
            if name not in OPTIONAL_FIELDS or name in self.non_default_fields
        }

    @property
    def non_default_fields(self) -> dict[str, Any]:
        """The `OPTIONAL_FIELDS` that differ from their default values, by name."""
        defaults = {name: type(self).__dataclass_fields__[name].default for name in OPTIONAL_FIELDS}
        return {
            name: getattr(self, name) for name in OPTIONAL_FIELDS if getattr(self, name) != defaults[name]
        }

    @property
    def result_settings(self) -> list[Any]:
        """Settings that affect results, apart from the weights; see `loading.configuration_hash`."""
        switches = {name: value for name, value in self.non_default_fields.items() if name != "profile"}
        return [
            self.hidden_states_at,
            self.sam_geometry_cls,
            self.router_base,
            *([switches] if switches else []),
        ]

    def sam_text_prompt(self, answer: str | None, prompt: str) -> str:
        """Return SAM 3's text for a completion.

        Args:
            answer: Answer of the completion, or None.
            prompt: The user's prompt.
        """
        return answer or (prompt if self.missing_answer == "prompt" else "")

    @property
    def hidden_size(self) -> int:
        """Width of the VLM's hidden states."""
        return self.get_text_config().hidden_size

    @property
    def image_token_id(self) -> int:
        """Id of the VLM's image token."""
        return self.vlm_config.image_token_id

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the configuration of the VLM's language model."""
        return self.vlm_config.get_text_config(decoder=decoder, encoder=encoder)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> ConceptSegConfig:
        """Create a configuration from a preset.

        Args:
            name: `"3b"` or `"7b"` (Qwen2.5-VL of this size with the released SAM 3), `"qwen3-2b"`, `"qwen3-4b"` or
                `"qwen3-8b"` (Qwen3-VL), `"nano"` or `"mini"` (the embedded checkpoints), or `"nano-qwen3"` (nano with
                Qwen3-VL).
            **overrides: Fields of `ConceptSegConfig` to override.

        Raises:
            ValueError: If the preset is unknown.
        """
        from .presets import PRESETS

        if name not in PRESETS:
            raise ValueError(
                f"ConceptSegConfig.from_preset: unknown preset {name!r}; "
                f"use one of {', '.join(map(repr, PRESETS))}."
            )
        return cls(**{**PRESETS[name](), **overrides})


PROFILE_FIELDS = (
    "end_of_turn_state",
    "router_drop_parentheses",
    "router_min_words",
    "missing_answer",
    "max_total_length",
)
"""Fields of `ConceptSegConfig` that a profile sets."""

OPTIONAL_FIELDS = ("profile", *PROFILE_FIELDS, "sam_geometry_cls_with_concepts")
"""Optional fields of `ConceptSegConfig`, saved only if they differ from their default values."""

AUTHORS_MODEL_TYPES = ("qwen2_5_vl", "qwen2_vl")  # a released config.json may contain either


def is_original_config(content: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json belongs to a released checkpoint in the authors' layout."""
    return content.get("model_type") in AUTHORS_MODEL_TYPES and (
        "num_of_query" in content
        or any(str(name).startswith("ConceptSegR1") for name in content.get("architectures") or ())
    )


def conversion_hint(checkpoint: str | os.PathLike) -> str:
    """Return the error message for a checkpoint in the authors' layout, with the conversion command."""
    return (
        f"The checkpoint {str(checkpoint)!r} is in the authors' layout; convert it with `conceptseg convert "
        f"--checkpoint {checkpoint} --sam facebook/sam3 --out DIR`."
    )
