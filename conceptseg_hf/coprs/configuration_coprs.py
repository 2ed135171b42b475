"""Configuration of CoPRS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

SUPPORTED_SAM_TYPES = ("sam", "sam3_tracker")


@strict
class CoPRSConfig(PreTrainedConfig):
    """Configuration of `CoPRSForSegmentation`: a VLM, the modules of the positional prior, and SAM.

    Args:
        vlm_config: Configuration of the VLM; its `model_type` selects the class (default Qwen2.5-VL).
        sam_config: Configuration of SAM: of a `SamModel` (the default, as in the paper) or a `Sam3TrackerModel`.
        ref_pos_token_id: Id of the concentration token `<REF_POS>`.
        num_heads: Number of attention heads between the query and the image keys (n_head in eq. 2).
        head_dim: Width of each head (d_h in eq. 2).
        prior_bias: Initial bias of the last convolution of the fusion: initially, the prior is small everywhere.
        padding_logit: Value of the prior where SAM's input is padded.
        max_new_tokens: Maximum number of tokens of a completion (appendix B.3: 2000).
        tie_word_embeddings: Set to the VLM's value.
        initializer_range: Standard deviation of the initial weights of query head and key projection.
        profile: Unused; profiles are settings of ConceptSeg.
    """

    model_type = "coprs"
    sub_configs_defaults = {  # noqa: RUF012 (type expected by the base class)
        "vlm_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2_5_vl"),
        "sam_config": SubConfigSpec(config_class=AutoConfig, model_type="sam"),
    }

    if TYPE_CHECKING:  # dictionaries are converted to configurations by the base class
        vlm_config: Any = None
        sam_config: Any = None
    else:
        vlm_config: dict | PreTrainedConfig | None = None
        sam_config: dict | PreTrainedConfig | None = None
    ref_pos_token_id: int = 151665
    num_heads: int = 4
    head_dim: int = 64
    prior_bias: float = -1.8
    padding_logit: float = -50.0
    max_new_tokens: int = 2000
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    profile: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.vlm_config, "tie_word_embeddings", False))
        if self.sam_config.model_type not in SUPPORTED_SAM_TYPES:
            raise ValueError(
                f"CoPRSConfig: sam_config has model_type {self.sam_config.model_type!r}; use one of "
                f"{', '.join(map(repr, SUPPORTED_SAM_TYPES))}."
            )
        for name in ("num_heads", "head_dim", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"CoPRSConfig: {name} is {getattr(self, name)}; use at least 1.")

    @property
    def hidden_size(self) -> int:
        """Width of the VLM's hidden states."""
        return self.get_text_config().hidden_size

    @property
    def image_token_id(self) -> int:
        """Id of the VLM's image token."""
        return self.vlm_config.image_token_id

    @property
    def key_size(self) -> int:
        """Number of channels of SAM's image features (d_k in eq. 2)."""
        return self.sam_config.prompt_encoder_config.hidden_size

    @property
    def sam_image_size(self) -> int:
        """Side length of SAM's input in pixels."""
        return self.sam_config.prompt_encoder_config.image_size

    @property
    def grid_size(self) -> int:
        """Side length of SAM's image features; the prior and the mask have four times this resolution."""
        prompt_encoder = self.sam_config.prompt_encoder_config
        return prompt_encoder.image_size // prompt_encoder.patch_size

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the configuration of the VLM's language model."""
        return self.vlm_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def non_default_fields(self) -> dict[str, Any]:
        """Optional fields that differ from their default values, as in `ConceptSegConfig`: there are none."""
        return {}

    @property
    def result_settings(self) -> list[Any]:
        """Settings that affect results, apart from the weights; see `loading.configuration_hash`."""
        return [self.ref_pos_token_id, self.padding_logit, self.max_new_tokens]

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> CoPRSConfig:
        """Create a configuration from a preset.

        Args:
            name: `"3b"` or `"7b"` (Qwen2.5-VL of this size with the SAM ViT-H of the paper), or `"nano"` (the embedded
                checkpoint).
            **overrides: Fields of `CoPRSConfig` to override.

        Raises:
            ValueError: If the preset is unknown.
        """
        from .presets import PRESETS

        if name not in PRESETS:
            raise ValueError(
                f"CoPRSConfig.from_preset: unknown preset {name!r}; use one of {', '.join(map(repr, PRESETS))}."
            )
        return cls(**{**PRESETS[name](), **overrides})
