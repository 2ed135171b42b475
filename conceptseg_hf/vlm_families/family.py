"""The protocol of VLM families: everything that the package needs to know about the VLM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, ProcessorMixin

from ..devices import loaded, move_to_hooks

Vlm: TypeAlias = Any
"""A generative PreTrainedModel of a supported family; `Any`, since the stubs of `generate` match no model class."""


@dataclass(frozen=True)
class ImageSlices:
    """The images of one row of a batch.

    Attributes:
        images: Indices of the images among all images of the batch.
        pixels: Their part of `pixel_values`.
    """

    images: slice
    pixels: slice


class VlmFamily(ABC):
    """What the package needs to know about a family of VLMs; families have no state.

    A new family is a file with a subclass, and an entry in `vlm_families.FAMILIES`; docs/families.md is the guide. The
    model is the family's class in Transformers for `AutoModelForImageTextToText`, and must

    - have the base model (without the language-model head) as `base_model`, which returns `last_hidden_state` after the
      final norm, and continue a `DynamicCache`;
    - accept the arguments of `encoded_images` instead of `pixel_values`;
    - list its decoder layers in `_no_split_modules` (used by `device_map`), which all models in Transformers do.

    A subclass sets the attributes and implements the abstract methods. The defaults of the other methods hold for
    models with one-dimensional positions and no state besides the key-value cache.

    Attributes:
        model_type: `model_type` of the VLM's configuration.
        row_names: Inputs of the model with one row per prompt, (B, L). `collate` also returns `mm_token_type_ids` (1 at
            image tokens) for models that do not take it.
        image_names: Inputs of the model with one row per image, besides `pixel_values`; they are also fields of
            `PreparedSample`, and arguments of `ConceptSegForSegmentation.forward`.
        canvas_size: Default of the processor's `canvas_size`: a side that the image processor does not resize.
        coordinate_scale: Default of the processor's `coordinate_scale`.
        supports_vllm: Whether vLLM can write the completions; `vllm_image_data` is required then.
        vllm_options: Arguments of `vllm.LLM` that the family needs for encoded images.
        vllm_image_options: Settings with which vLLM's image processor reads images as `read_images` does, in training.
        lora_target_modules: Regular expression of the modules of a `ConceptSegForSegmentation` that get adapters by
            default: the attention projections of the language model.
    """

    model_type: ClassVar[str]
    row_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    image_names: ClassVar[tuple[str, ...]] = ()
    canvas_size: ClassVar[int]
    coordinate_scale: ClassVar[float]
    supports_vllm: ClassVar[bool] = False
    vllm_options: ClassVar[Mapping[str, Any]] = {}
    vllm_image_options: ClassVar[Mapping[str, Any]] = {}
    lora_target_modules: ClassVar[str] = r"vlm\.model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj)"

    # -- processor --

    @abstractmethod
    def image_token(self, tokenizer: Any) -> str:
        """Return the image token in texts."""

    @abstractmethod
    def read_images(
        self,
        image_processor: Any,
        images: Sequence[Any],
        canvas_size: int,
        pixel_limits: tuple[int, int] | None = None,
    ) -> tuple[dict[str, Tensor], list[int]]:
        """Preprocess images of canvas size, or of other sizes within pixel limits.

        Args:
            image_processor: The VLM's image processor.
            images: The images, (canvas_size, canvas_size) pixels each unless `pixel_limits` is given.
            canvas_size: Side of the canvas.
            pixel_limits: Minimum and maximum number of pixels, to which images are resized with their aspect ratio.
                Families with images of one size ignore them.

        Returns:
            `pixel_values` and the inputs in `image_names`, and the number of image tokens of each image.
        """

    @abstractmethod
    def make_processor(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str,
        canvas_size: int,
        pixel_limits: tuple[int, int] | None = None,
    ) -> ProcessorMixin:
        """Create the standard processor of the family, which preprocesses images as `read_images`."""

    @abstractmethod
    def chat_template(self, image_token: str) -> str:
        """Return a Jinja chat template that writes one image token per image, for tokenizers without a template."""

    def image_text(self, image_token: str, count: int) -> str:
        """Return the text that replaces the image token of an image with `count` image tokens."""
        return image_token * count

    # -- inputs --

    @abstractmethod
    def pixels_per_image(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """Return the number of rows of `pixel_values` of each image."""

    @abstractmethod
    def tokens_per_image(self, config: PreTrainedConfig, inputs: Mapping[str, Tensor]) -> list[int]:
        """Return the number of image tokens of each image."""

    @abstractmethod
    def vision_token_ids(self, config: PreTrainedConfig) -> list[int]:
        """Return the ids of vision tokens, which must not be generated since they would break the next forward pass."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the VLM's inputs."""
        return (*self.row_names, "pixel_values", *self.image_names)

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Select the VLM's inputs from a batch.

        Raises:
            ValueError: If an input is missing.
        """
        missing = [name for name in self.input_names if inputs.get(name) is None]
        if missing:
            raise ValueError(
                f"The VLM's inputs lack {', '.join(missing)}; pass the complete output of the processor's `collate`."
            )
        return {name: inputs[name] for name in self.input_names}

    def images_of_rows(self, config: PreTrainedConfig, inputs: Mapping[str, Tensor]) -> list[ImageSlices]:
        """Return the images of each row of a batch, which has them in the order of the rows."""
        tokens, pixels = self.tokens_per_image(config, inputs), self.pixels_per_image(inputs)
        rows: list[ImageSlices] = []
        image = pixel = 0
        for remaining in (inputs["input_ids"] == config.image_token_id).sum(dim=1).tolist():
            first_image, first_pixel = image, pixel
            while remaining > 0:
                remaining, pixel, image = remaining - tokens[image], pixel + pixels[image], image + 1
            rows.append(ImageSlices(slice(first_image, image), slice(first_pixel, pixel)))
        return rows

    def select_images(self, inputs: Mapping[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
        """Return `pixel_values` and the inputs in `image_names` of some images of a batch."""
        pixels = inputs["pixel_values"].split(self.pixels_per_image(inputs))
        selected = {"pixel_values": torch.cat([pixels[image] for image in images])}
        return selected | {name: inputs[name][list(images)] for name in self.image_names}

    def select_rows(
        self, config: PreTrainedConfig, inputs: Mapping[str, Tensor], rows: Sequence[int]
    ) -> dict[str, Tensor]:
        """Select rows of a batch of `model_inputs`, including their images."""
        slices = [self.images_of_rows(config, inputs)[row] for row in rows]
        selected = {name: inputs[name][list(rows)] for name in self.row_names}
        selected["pixel_values"] = torch.cat([inputs["pixel_values"][part.pixels] for part in slices])
        for name in self.image_names:
            selected[name] = torch.cat([inputs[name][part.images] for part in slices])
        return selected

    # -- images --

    @abstractmethod
    def vision_tower(self, vlm: Vlm) -> nn.Module:
        """Return the VLM's vision encoder."""

    @abstractmethod
    def encode_images(self, vlm: Vlm, images: Mapping[str, Tensor]) -> list[Tensor]:
        """Encode images.

        Args:
            vlm: The VLM.
            images: `pixel_values` and the inputs in `image_names`.

        Returns:
            (tokens, W) image tokens of each image: everything that the language model reads of it.
        """

    @abstractmethod
    def encoded_images(self, vlm: Vlm, tokens: Sequence[Tensor]) -> dict[str, Any]:
        """Return model arguments that replace `pixel_values` by the image tokens of all images of a batch, in order."""

    def vllm_prompt(self, config: PreTrainedConfig, token_ids: Sequence[int]) -> list[int]:
        """Return the tokens of a prompt for vLLM, which expands the image token of each image itself.

        Args:
            config: The VLM's configuration.
            token_ids: The prompt with expanded image tokens.
        """
        image_token = config.image_token_id
        return [
            token
            for position, token in enumerate(token_ids)
            if token != image_token or position == 0 or token_ids[position - 1] != image_token
        ]

    def vllm_image_data(self, tokens: Sequence[Tensor], images: Mapping[str, Tensor]) -> Any:
        """Return the encoded images of a prompt for vLLM, in the format of its model.

        Args:
            tokens: Image tokens of the images of the prompt.
            images: The inputs in `image_names` of the prompt.
        """
        raise NotImplementedError

    def check_vllm(self) -> None:
        """Raise a ValueError if vLLM cannot write the completions."""
        if not self.supports_vllm:
            raise ValueError(
                f"VLMs of the family {self.model_type!r} do not run with vLLM here; let Transformers write the "
                "completions."
            )

    # -- forward passes --

    def prompt_positions(self, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return the model's argument for the positions of left-padded prompts; empty if the model computes them.

        Args:
            attention_mask: (B, L) attention mask.
        """
        return {"position_ids": (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)}

    def continue_positions(self, vlm: Vlm, attention_mask: Tensor, rows: Sequence[int]) -> Tensor:
        """Compute the positions of rows that continue prompts from the VLM's last forward pass.

        Also prepares the VLM such that `generate` can continue these rows.

        Args:
            vlm: The VLM.
            attention_mask: (B, L) attention mask of prompts and completions.
            rows: (B,) index of the prompt that each row continues.

        Returns:
            (..., B, L) positions, valid only after the prompts.
        """
        return attention_mask.long().cumsum(dim=1) - 1

    def reset(self, vlm: Vlm) -> None:  # noqa: B027 (most families have no such state)
        """Reset the state that forward passes leave on the module, so that calls are independent of each other."""

    def full_pass(self, vlm: Vlm, inputs: Mapping[str, Any], **options: Any) -> Any:
        """Run a forward pass over `model_inputs` without the language-model head.

        Args:
            vlm: The VLM.
            inputs: See `model_inputs`.
            **options: `output_hidden_states`, `output_attentions` and `use_cache`, and `encoded_images`.

        Returns:
            The model output with `last_hidden_state` (B, L, C), the last-layer, post-norm hidden states, and with
            `hidden_states`, `attentions` and `past_key_values` if requested by `options`.
        """
        with loaded(vlm):
            inputs = {**inputs, **self.prompt_positions(inputs["attention_mask"])}
            output = vlm.base_model(**move_to_hooks(inputs, vlm), **options, return_dict=True)
        self.reset(vlm)
        return output

    def last_hidden_states(self, vlm: Vlm, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the (B, L, C) last-layer, post-norm hidden states of a forward pass over `model_inputs`."""
        return self.full_pass(vlm, inputs, use_cache=False).last_hidden_state
