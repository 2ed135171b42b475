"""ConceptSeg: a VLM reasons, the Concept Translation Module translates, and a frozen SAM 3 segments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationConfig, GenerationMixin, Sam3Model
from transformers import initialization as init
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import can_return_tuple

from . import sam_prompt, vlm_backbone
from .checkpointing import CheckpointMixin
from .concept_translation import ConceptTranslationModule
from .configuration_conceptseg import ConceptSegConfig
from .devices import execution_device, loaded
from .inference import Segmenter, SegmentSettings
from .inputs import ConceptSegInputs, PreparedSample
from .losses import segmentation_loss
from .outputs import ConceptSegmentation, ConceptSegOutput, SegmentationOutputs
from .processing_conceptseg import ConceptSegProcessor
from .router import ShortcutRouter
from .sam_prompt import ImageFeatures


class ConceptSegForSegmentation(CheckpointMixin, GenerationMixin):
    """Segments what a prompt means, directly or by reasoning over reference images.

    Parts: `vlm` (the VLM), `ctm` (Concept Translation Module) and `sam` (SAM 3: frozen, and in eval mode
        whatever `train()` is called on).
    `forward` is the differentiable path of the trainers; `segment` is inference. Language-model methods act
    on the VLM.
    """

    config: ConceptSegConfig
    vlm: vlm_backbone.Vlm
    ctm: ConceptTranslationModule
    sam: Sam3Model
    hf_device_map: Mapping[str, Any]

    config_class = ConceptSegConfig
    base_model_prefix = "conceptseg"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # as Transformers' own models have it
    supports_gradient_checkpointing = True
    _no_split_modules = ["ConceptTranslationModule", *sam_prompt.NO_SPLIT_MODULES]  # noqa: RUF012 (the VLM adds its own)
    # One dtype is all a config can say; without this a reload in bfloat16 would take SAM 3 and the CTM along.
    _keep_in_fp32_modules_strict = ["sam", "ctm"]  # noqa: RUF012 (the base class reads it so)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ConceptSegConfig) -> None:
        super().__init__(config)
        vlm_backbone.check_supported(config.vlm_config)
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        # In float32 from the start, whatever dtype is asked for: weights on disk are read as what they were made.
        with local_torch_dtype(torch.float32):
            self.ctm = ConceptTranslationModule(config.ctm_config)
        self.sam = Sam3Model._from_config(config.sam_config, dtype=torch.float32)
        self.post_init()
        self._freeze_sam()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises the CTM; the VLM and SAM 3 initialise themselves."""
        std = self.config.ctm_config.initializer_range
        if isinstance(module, ConceptTranslationModule):
            init.normal_(module.queries, std=std)
            init.normal_(module.position_embedding, std=std)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    # -- SAM 3 stays frozen --

    def train(self, mode: bool = True) -> ConceptSegForSegmentation:
        """Sets the mode of the VLM and the CTM; SAM 3 stays frozen and in eval mode."""
        super().train(mode)
        self._freeze_sam()
        return self

    def detach_sam(self) -> Sam3Model:
        """Takes SAM 3 out of the module tree: `parameters`, `state_dict`, `to` and any wrapper pass it by.

        For trainers, which must neither shard nor save it. The methods of the model go on using it; whoever
        detaches it moves it to its device.
        """
        if "sam" in self._modules:
            self.__dict__["sam"] = self._modules.pop("sam")
        return self.sam

    @property
    def device(self) -> torch.device:
        """Where the model computes and its inputs belong, also while its weights are offloaded."""
        return execution_device(self)

    # -- the VLM's methods --

    @property
    def base_model(self) -> nn.Module:
        """The VLM without its language-model head: what TRL multiplies by the output embeddings."""
        return self.vlm.base_model if "vlm" in self._modules else self

    @property
    def generation_config(self) -> GenerationConfig:
        """The VLM's generation settings."""
        return self.vlm.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if "vlm" in self._modules:  # the base class sets a default before the VLM exists
            self.vlm.generation_config = value

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates text with the VLM."""
        with loaded(self):
            return self.vlm.generate(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The VLM's."""
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Exchanges the VLM's."""
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The VLM's language-model head."""
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Exchanges the VLM's language-model head."""
        self.vlm.set_output_embeddings(new_embeddings)

    # -- the differentiable path --

    def encode_concepts(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Translates the completion's hidden states into concept tokens (eq. 3).

        Args:
            hidden_states: (B, L1, C).
            mask: (B, L1), true at the tokens of the completion. A row without any is safe.

        Returns:
            (B, L2, D) concept tokens Z.
        """
        mask = mask.bool()
        # Zeros at the padding: a row without any token then has one result, however far it is padded.
        return self.ctm(hidden_states.masked_fill(~mask[..., None], 0), mask)

    def translate_completion(
        self, hidden_states: Tensor, completion_mask: Tensor, detach_hidden_states: bool = False
    ) -> Tensor:
        """The concept tokens of teacher-forced completions.

        Args:
            hidden_states: (B, L, C) last-layer, post-norm states of prompts and completions.
            completion_mask: (B, L) true at the tokens of the completion, the end-of-sequence token excluded unless
                `config.end_of_turn_state`.
            detach_hidden_states: Stop the gradient at the CTM's input (as the released code does).

        Returns:
            (B, L2, D) concept tokens Z.
        """
        states, mask = _completion_states(hidden_states, completion_mask, self.config.hidden_states_at)
        return self.encode_concepts(states.detach() if detach_hidden_states else states, mask)

    def encode_image(self, sam_pixel_values: Tensor) -> ImageFeatures:
        """Encodes (B, 3, S, S) images with SAM 3, to be decoded with any number of prompts."""
        with torch.no_grad(), self._without_autocast():
            return sam_prompt.encode_image(
                self.sam, sam_pixel_values.to(self.sam.dtype), self.config.sam_geometry_cls
            )

    def _without_autocast(self) -> torch.autocast:
        """SAM 3 keeps its dtype in mixed precision: autocast cannot mix the halves of its box encoder with bfloat16."""
        return torch.autocast(execution_device(self.sam).type, enabled=False)

    def decode_masks(
        self,
        features: ImageFeatures,
        sam_input_ids: Tensor | None = None,
        sam_attention_mask: Tensor | None = None,
        concept_embeds: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decodes the prompt [Z; E_text; geometry CLS] (eq. 4), differentiable in Z.

        Args:
            features: B encoded images.
            sam_input_ids: (B, T) text for SAM 3, or None.
            sam_attention_mask: (B, T) its mask.
            concept_embeds: (B, L2, D) concept tokens Z, or None.
            boxes: See `sam_prompt.decode`; None: no boxes, as in the paper.

        Returns:
            (B, 1, h, w) mask logits and (B, 1) presence logits.
        """
        text_embeds = text_mask = None
        device = features.device
        with self._without_autocast():
            if sam_input_ids is not None and sam_attention_mask is not None:
                with torch.no_grad():
                    text_embeds, text_mask = sam_prompt.encode_text(
                        self.sam, sam_input_ids.to(device), sam_attention_mask.to(device)
                    )
            if concept_embeds is not None:
                concept_embeds = concept_embeds.to(device, self.sam.dtype)
            if boxes is not None:
                boxes = boxes.to(device, self.sam.dtype)
            output = sam_prompt.decode(self.sam, features, text_embeds, text_mask, concept_embeds, boxes)
        masks, presence = output.semantic_seg, output.presence_logits
        assert masks is not None and presence is not None  # SAM 3 always gives both
        return masks, presence

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mm_token_type_ids: Tensor,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        completion_mask: Tensor,
        sam_pixel_values: Tensor | None = None,
        sam_features: ImageFeatures | None = None,
        sam_input_ids: Tensor | None = None,
        sam_attention_mask: Tensor | None = None,
        mask_labels: Tensor | None = None,
        detach_hidden_states: bool = False,
        output_logits: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> ConceptSegOutput | tuple[Any, ...]:
        """From a teacher-forced completion to mask logits; the trainers' path.

        Args:
            input_ids: (B, L) prompt and completion.
            attention_mask: (B, L) nonzero at tokens.
            mm_token_type_ids: (B, L) token types of the VLM's processor (1 at image tokens).
            pixel_values: (patches, d) image patches of all rows.
            image_grid_thw: (images, 3) their grids.
            completion_mask: (B, L) true at the tokens of the completion, the end-of-sequence token excluded unless
                `config.end_of_turn_state`.
            sam_pixel_values: (B, 3, S, S) target images for SAM 3; without them and `sam_features` only Z is
                computed.
            sam_features: The same, already encoded by `encode_image`.
            sam_input_ids: (B, T) answer text for SAM 3, or None to prompt with Z alone.
            sam_attention_mask: (B, T) its mask.
            mask_labels: (B, H, W) masks of 0 and 1; with them the loss is computed, at their size.
            detach_hidden_states: Stop the gradient at the CTM's input (as the released code does).
            output_logits: Also return the VLM's next-token logits.
            output_hidden_states: Also return the hidden states of all of the VLM's layers; by default as the
                config says.
            output_attentions: Also return the VLM's attention weights, which its "eager" attention alone has; by
                default as the config says.
            use_cache: Also return the VLM's key-value cache.
            return_dict: False for a tuple of what is present; by default as the config says.

        Raises:
            ValueError: If arguments contradict each other.
        """
        _check_forward_arguments(
            sam_pixel_values, sam_features, sam_input_ids, sam_attention_mask, mask_labels
        )
        config = self.config
        vlm_output = vlm_backbone.full_pass(
            self.vlm,
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "mm_token_type_ids": mm_token_type_ids,
                "pixel_values": pixel_values,
                "image_grid_thw": image_grid_thw,
            },
            output_hidden_states=(
                config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            output_attentions=config.output_attentions if output_attentions is None else output_attentions,
            use_cache=bool(use_cache),
        )
        hidden_states = vlm_output.last_hidden_state
        logits = self.get_output_embeddings()(hidden_states) if output_logits else None
        concept_embeds = self.translate_completion(hidden_states, completion_mask, detach_hidden_states)
        if sam_pixel_values is not None:
            sam_features = self.encode_image(sam_pixel_values)
        mask_logits = presence_logits = loss = dice = focal = None
        if sam_features is not None:
            mask_logits, presence_logits = self.decode_masks(
                sam_features, sam_input_ids, sam_attention_mask, concept_embeds
            )
        if mask_labels is not None and mask_logits is not None:
            loss, dice, focal = segmentation_loss(mask_logits, mask_labels.to(mask_logits.device))
        return ConceptSegOutput(
            loss=loss,
            mask_logits=mask_logits,
            presence_logits=presence_logits,
            concept_embeds=concept_embeds,
            logits=logits,
            dice_loss=dice,
            focal_loss=focal,
            past_key_values=vlm_output.past_key_values,
            hidden_states=vlm_output.hidden_states,
            attentions=vlm_output.attentions,
        )

    # -- inference --

    @overload
    def segment(
        self,
        inputs: ConceptSegInputs | Sequence[PreparedSample] | None = ...,
        router: str | ShortcutRouter = ...,
        generation_config: GenerationConfig | Mapping[str, Any] | None = ...,
        processor: None = ...,
        return_heatmap: bool = ...,
        batch_size: int | None = ...,
        sam_prompt: str = ...,
        return_logits: bool = ...,
        **tensors: Any,
    ) -> SegmentationOutputs: ...

    @overload
    def segment(
        self,
        inputs: ConceptSegInputs | Sequence[PreparedSample] | None = ...,
        router: str | ShortcutRouter = ...,
        generation_config: GenerationConfig | Mapping[str, Any] | None = ...,
        *,
        processor: ConceptSegProcessor,
        return_heatmap: bool = ...,
        batch_size: int | None = ...,
        sam_prompt: str = ...,
        return_logits: bool = ...,
        **tensors: Any,
    ) -> list[ConceptSegmentation]: ...

    @torch.no_grad()
    def segment(
        self,
        inputs: ConceptSegInputs | Sequence[PreparedSample] | None = None,
        router: str | ShortcutRouter = "adaptive",
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        processor: ConceptSegProcessor | None = None,
        return_heatmap: bool = False,
        batch_size: int | None = None,
        sam_prompt: str = "concept+text",
        return_logits: bool = False,
        **tensors: Any,
    ) -> list[ConceptSegmentation] | SegmentationOutputs:
        """Segments a batch of prompts; each takes its own route.

        Every image is encoded once by SAM 3, and only prompts that do not take the shortcut reach the VLM.

        Args:
            inputs: What the processor returns for images, prompts and references: `segment(inputs)` or
                `segment(**inputs)`. Or samples of the processor's `prepare`; those that carry an error become failed
                results.
            router: A mode of `ShortcutRouter` (with the config's `router_base` and so on), or a router.
            generation_config: How the VLM writes (see `generate_with_states`); greedy by default.
            processor: The processor, which then also post-processes the outputs. Without it the model uses its own
                (`processor`) to read what the VLM writes.
            return_heatmap: Also return the mask probabilities.
            batch_size: At most so many samples at a time; None: all at once.
            sam_prompt: What of the reasoning SAM 3 is prompted with: `"concept+text"` is the method (eq. 4); the
                others are for ablations (paper, Table 4): `"concept"` (the concept tokens Z alone), `"text"` (the
                answer alone) and `"box"` (the VLM's box alone; without one the mask is empty).
            return_logits: Also return SAM 3's mask logits, at their own size.
            **tensors: The items of `ConceptSegInputs`, in the place of `inputs`.

        Returns:
            One result per prompt, in their order; without `processor` a sequence of them that also holds the outputs
            for the processor's `post_process_concept_segmentation`.

        Raises:
            ValueError: If the inputs are incomplete, there is no processor, or the router or generation settings are
                invalid.
        """
        if (inputs is None) == (not tensors):
            raise ValueError(
                "segment: give either the inputs that a processor returned or its items as keywords, one of the two."
            )
        batch = ConceptSegInputs(tensors) if inputs is None else inputs
        samples, image_index = list(batch), None
        if isinstance(batch, Mapping):
            batch = ConceptSegInputs(dict(batch))
            samples, image_index = batch.samples, batch["image_index"].tolist()
        if isinstance(router, str):
            config = self.config
            router = ShortcutRouter(
                router, config.router_base, config.router_drop_parentheses, config.router_min_words
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(
                f"segment: batch_size is {batch_size}; use at least 1, or None for all samples at once."
            )
        own = self.processor if processor is None else processor
        segmenter = Segmenter(self, own, SegmentSettings(router, generation_config, sam_prompt))
        raw = []
        with evaluating(self), loaded(self):
            size = batch_size or max(len(samples), 1)
            for part in (slice(start, start + size) for start in range(0, len(samples), size)):
                raw += segmenter.segment(samples[part], None if image_index is None else image_index[part])
        if processor is not None:
            return processor.post_process_concept_segmentation(
                raw, return_heatmap=return_heatmap, return_logits=return_logits
            )
        post_process = partial(
            own.post_process_concept_segmentation, return_heatmap=return_heatmap, return_logits=return_logits
        )
        return SegmentationOutputs(raw, lambda output: post_process([output])[0])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, and afterwards every module into the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check_forward_arguments(
    sam_pixel_values: Tensor | None,
    sam_features: ImageFeatures | None,
    sam_input_ids: Tensor | None,
    sam_attention_mask: Tensor | None,
    mask_labels: Tensor | None,
) -> None:
    if sam_pixel_values is not None and sam_features is not None:
        raise ValueError("forward: both sam_pixel_values and sam_features are given; pass one of them.")
    if mask_labels is not None and sam_pixel_values is None and sam_features is None:
        raise ValueError(
            "forward: mask_labels need an image to segment; pass sam_pixel_values or sam_features as well."
        )
    if (sam_input_ids is None) != (sam_attention_mask is None):
        raise ValueError(
            "forward: sam_input_ids and sam_attention_mask belong together; pass both or neither."
        )


def _completion_states(
    hidden_states: Tensor, completion_mask: Tensor, hidden_states_at: str
) -> tuple[Tensor, Tensor]:
    """The columns from the first to the last completion token (at least one), and their mask."""
    mask = completion_mask.bool().to(hidden_states.device)
    if hidden_states_at == "predict":  # the state that predicts a token is that of the token before it
        mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    columns = mask.any(dim=0).nonzero()
    first, last = (int(columns[0]), int(columns[-1])) if len(columns) else (0, 0)
    return hidden_states[:, first : last + 1], mask[:, first : last + 1]
