"""Methods of a model that are delegated to its VLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from .devices import execution_device, loaded
from .vlm_families import Vlm


class VlmMethodsMixin(PreTrainedModel):
    """Language-model methods and properties of a model with a VLM, which TRL, PEFT and `generate` need."""

    vlm: Vlm

    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # as in Transformers' own models
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @property
    def device(self) -> torch.device:
        """The device on which the model runs and expects its inputs, even while its weights are offloaded."""
        return execution_device(self)

    @property
    def base_model(self) -> nn.Module:
        """The VLM without its language-model head; TRL applies the output embeddings to its hidden states."""
        return self.vlm.base_model if "vlm" in self._modules else self

    @property
    def generation_config(self) -> GenerationConfig:
        """The VLM's generation config."""
        return self.vlm.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if "vlm" in self._modules:  # the base class sets a default before the VLM exists
            self.vlm.generation_config = value

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate text with the VLM."""
        with loaded(self):
            return self.vlm.generate(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the VLM's input embeddings."""
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the VLM's input embeddings."""
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the VLM's language-model head."""
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the VLM's language-model head."""
        self.vlm.set_output_embeddings(new_embeddings)
