"""ConceptSeg model: a VLM, the Concept Translation Module (CTM) and a frozen SAM 3."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationConfig, GenerationMixin, Sam3Model
from transformers import initialization as init
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import can_return_tuple

from . import sam_prompt as sam_adapter
from .checkpointing import CheckpointMixin
from .concept_prompt import ConceptPrompt, as_concept
from .concept_translation import ConceptTranslationModule
from .configuration_conceptseg import ConceptSegConfig
from .devices import execution_device, loaded
from .hashing import weights, weights_counters
from .inference import Segmenter, SegmentSettings, evaluating, segment_batches, to_results
from .inputs import ConceptSegInputs, PreparedSample, given_samples
from .losses import segmentation_loss
from .outputs import ConceptSegmentation, ConceptSegOutput, SegmentationOutputs
from .phrase_embeddings import PhraseEmbeddings
from .processing_conceptseg import ConceptSegProcessor
from .router import ShortcutRouter
from .sam_prompt import ImageFeatures
from .shared_references import DEFAULT_MAX_BYTES, ReferenceStore
from .streaming import StreamingMixin
from .teacher_forcing import check_forward_arguments, completion_states
from .vlm_engines import VlmEngineMixin
from .vlm_families import Vlm, get_family
from .vlm_methods import VlmMethodsMixin


class ConceptSegForSegmentation(
    VlmMethodsMixin, CheckpointMixin, VlmEngineMixin, StreamingMixin, GenerationMixin
):
    """Segment the concept that a prompt describes, either directly or by reasoning over reference images.

    The model consists of `vlm` (the VLM), `ctm` (the Concept Translation Module) and `sam` (SAM 3, which is frozen and
    always in eval mode, regardless of `train()`). `forward` is the differentiable path used for training, `segment`
    runs inference. Language-model methods such as `generate` and `get_input_embeddings` are delegated to the VLM.
    """

    config: ConceptSegConfig
    vlm: Vlm
    ctm: ConceptTranslationModule
    sam: Sam3Model
    hf_device_map: Mapping[str, Any]
    _references: ReferenceStore | None = None
    _checked_concept: Hashable = None

    config_class = ConceptSegConfig
    base_model_prefix = "conceptseg"
    _no_split_modules = ["ConceptTranslationModule", *sam_adapter.NO_SPLIT_MODULES]  # noqa: RUF012 (the VLM adds its own modules)
    # A config stores a single dtype: without this, reloading in bfloat16 would also cast SAM 3 and the CTM.
    _keep_in_fp32_modules_strict = ["sam", "ctm"]  # noqa: RUF012 (type expected by the base class)

    def __init__(self, config: ConceptSegConfig) -> None:
        super().__init__(config)
        get_family(config.vlm_config)  # raises an error for families that are not supported
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        # The CTM and SAM 3 are always float32, regardless of the requested dtype.
        with local_torch_dtype(torch.float32):
            self.ctm = ConceptTranslationModule(config.ctm_config)
        self.sam = Sam3Model._from_config(config.sam_config, dtype=torch.float32)
        self._phrase_embeddings = PhraseEmbeddings()
        self.post_init()
        self._freeze_sam()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the CTM; the VLM and SAM 3 initialize their own weights."""
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
        """Set the mode of the VLM and the CTM; SAM 3 stays frozen and in eval mode."""
        super().train(mode)
        self._freeze_sam()
        return self

    def detach_sam(self) -> Sam3Model:
        """Remove SAM 3 from the module tree, which excludes it from `parameters`, `state_dict`, `to` and wrappers.

        Trainers use this to avoid sharding and saving SAM 3. The model's methods still use it, and the caller is
        responsible for moving it to its device.
        """
        if "sam" in self._modules:
            self.__dict__["sam"] = self._modules.pop("sam")
        return self.sam

    # -- training --

    def encode_concepts(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Translate the hidden states of completions into concept tokens (eq. 3).

        Args:
            hidden_states: (B, L1, C) hidden states.
            mask: (B, L1), true at completion tokens. Rows without completion tokens are allowed.

        Returns:
            (B, L2, D) concept tokens Z.
        """
        mask = mask.bool()
        # Zero the padding: the result of a row without completion tokens must not depend on the padded length.
        return self.ctm(hidden_states.masked_fill(~mask[..., None], 0), mask)

    def translate_completion(
        self, hidden_states: Tensor, completion_mask: Tensor, detach_hidden_states: bool = False
    ) -> Tensor:
        """Compute the concept tokens of teacher-forced completions.

        Args:
            hidden_states: (B, L, C) last-layer, post-norm hidden states of prompts and completions.
            completion_mask: (B, L) true at completion tokens; the end-of-sequence token is excluded unless
                `config.end_of_turn_state` is set.
            detach_hidden_states: Stop the gradient at the CTM's input (as in the released code).

        Returns:
            (B, L2, D) concept tokens Z.
        """
        states, mask = completion_states(hidden_states, completion_mask, self.config.hidden_states_at)
        return self.encode_concepts(states.detach() if detach_hidden_states else states, mask)

    def encode_image(self, sam_pixel_values: Tensor) -> ImageFeatures:
        """Encode (B, 3, S, S) images with SAM 3; the features can be decoded with any number of prompts."""
        with torch.no_grad(), self._without_autocast():
            return sam_adapter.encode_image(
                self.sam, sam_pixel_values.to(self.sam.dtype), self.config.sam_geometry_cls
            )

    def _without_autocast(self) -> torch.autocast:
        """Disable autocast for SAM 3: its box encoder mixes dtypes that autocast to bfloat16 does not support."""
        return torch.autocast(execution_device(self.sam).type, enabled=False)

    def decode_masks(
        self,
        features: ImageFeatures,
        sam_input_ids: Tensor | None = None,
        sam_attention_mask: Tensor | None = None,
        concept_embeds: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode masks from the prompt [Z; E_text; geometry CLS] (eq. 4), differentiable with respect to Z.

        Args:
            features: Features of B images.
            sam_input_ids: (B, T) token ids of SAM 3's text, or None.
            sam_attention_mask: (B, T) attention mask of `sam_input_ids`.
            concept_embeds: (B, L2, D) concept tokens Z, or None.
            boxes: Box prompts, see `sam_prompt.decode`; None for no boxes, as in the paper.

        Returns:
            (B, 1, h, w) mask logits and (B, 1) presence logits.
        """
        text_embeds = text_mask = None
        with self._without_autocast():
            if sam_input_ids is not None and sam_attention_mask is not None:
                text_embeds, text_mask = self._phrase_embeddings.encode(
                    self.sam, sam_input_ids, sam_attention_mask, features.device
                )
            if concept_embeds is not None:
                concept_embeds = concept_embeds.to(features.device, self.sam.dtype)
                if not self.config.sam_geometry_cls_with_concepts:
                    features = ImageFeatures(features.vision, geometry_cls=None)
            if boxes is not None:
                boxes = boxes.to(features.device, self.sam.dtype)
            output = sam_adapter.decode(self.sam, features, text_embeds, text_mask, concept_embeds, boxes)
        masks, presence = output.semantic_seg, output.presence_logits
        assert masks is not None and presence is not None  # SAM 3 always returns both
        return masks, presence

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mm_token_type_ids: Tensor,
        pixel_values: Tensor,
        image_grid_thw: Tensor | None = None,
        completion_mask: Tensor | None = None,
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
        """Compute mask logits, and the loss if labels are given, from teacher-forced completions.

        Args:
            input_ids: (B, L) token ids of prompt and completion.
            attention_mask: (B, L) nonzero at tokens, zero at padding.
            mm_token_type_ids: (B, L) token types of the VLM's processor (1 at image tokens).
            pixel_values: (patches, d) image patches of all rows, or (images, 3, S, S) images of one size.
            image_grid_thw: (images, 3) patch grids of the images, for families of VLMs with patches.
            completion_mask: (B, L) true at completion tokens, required; the end-of-sequence token is excluded unless
                `config.end_of_turn_state` is set.
            sam_pixel_values: (B, 3, S, S) target images for SAM 3. If neither these nor `sam_features` are given, only
                the concept tokens are computed.
            sam_features: Features of the target images, already encoded by `encode_image`.
            sam_input_ids: (B, T) token ids of the answer for SAM 3, or None to prompt with Z alone.
            sam_attention_mask: (B, T) attention mask of `sam_input_ids`.
            mask_labels: (B, H, W) masks of 0 and 1. If given, the loss is computed at their resolution.
            detach_hidden_states: Stop the gradient at the CTM's input (as in the released code).
            output_logits: Also return the VLM's next-token logits.
            output_hidden_states: Also return the hidden states of all VLM layers; defaults to the config's value.
            output_attentions: Also return the VLM's attention weights, which are available only with the "eager"
                attention implementation; defaults to the config's value.
            use_cache: Also return the VLM's key-value cache.
            return_dict: Whether to return a `ConceptSegOutput` instead of a tuple; defaults to the config's value.

        Raises:
            ValueError: If arguments are incompatible.
        """
        completion_mask = check_forward_arguments(
            completion_mask, sam_pixel_values, sam_features, sam_input_ids, sam_attention_mask, mask_labels
        )
        config = self.config
        family = get_family(config.vlm_config)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": mm_token_type_ids,
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
        }
        vlm_output = family.full_pass(
            self.vlm,
            family.model_inputs(inputs),
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

    @property
    def reference_store(self) -> ReferenceStore:
        """Key-value pairs of references: those of the current `shared_references` context, or a new, empty store."""
        return ReferenceStore() if self._references is None else self._references

    @contextmanager
    def shared_references(self, max_bytes: int = DEFAULT_MAX_BYTES) -> Iterator[ReferenceStore]:
        """Read each set of references once for all calls of `segment` within the context.

        Without this context, the prompts of a batch share their references. The key-value pairs are dropped when the
        weights of the VLM change.

        Args:
            max_bytes: Maximum size of the key-value pairs; the least recently used ones are dropped.

        Example:
            >>> with model.shared_references():
            ...     for image in images:
            ...         model.segment(processor(image, prompt, references))
        """
        previous, self._references = self._references, ReferenceStore(max_bytes, across_batches=True)
        try:
            yield self._references
        finally:
            self._references = previous

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
        concept: ConceptPrompt | str | os.PathLike | None = ...,
        rule: str | None = ...,
        on_text: Callable[[str], None] | None = ...,
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
        concept: ConceptPrompt | str | os.PathLike | None = ...,
        rule: str | None = ...,
        on_text: Callable[[str], None] | None = ...,
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
        concept: ConceptPrompt | str | os.PathLike | None = None,
        rule: str | None = None,
        on_text: Callable[[str], None] | None = None,
        **tensors: Any,
    ) -> list[ConceptSegmentation] | SegmentationOutputs:
        """Segment a batch of prompts; the router chooses the route of each prompt.

        SAM 3 encodes each image once, and the VLM processes only the prompts that do not take the shortcut.

        Args:
            inputs: The processor's output for images, prompts and references: `segment(inputs)` or
                `segment(**inputs)`. Alternatively, a list of samples returned by the processor's `prepare`; samples
                with an error yield failed results.
            router: A mode of `ShortcutRouter` (combined with the config's `router_*` settings), or a router.
            generation_config: Generation settings of the VLM (see `generate_with_states`); greedy by default.
            processor: The processor. If given, it also post-processes the outputs. Otherwise the model decodes
                completions with its own `processor`.
            return_heatmap: Also return the mask probabilities.
            batch_size: Maximum number of samples per batch; None to process all samples at once.
            sam_prompt: Which parts of the VLM's output prompt SAM 3. `"concept+text"` is the method of the paper (eq.
                4). The other values are ablations (Table 4): `"concept"` (only the concept tokens Z), `"text"` (only
                the answer) and `"box"` (only the VLM's box; the mask is empty if there is none).
            return_logits: Also return SAM 3's mask logits at their original resolution.
            concept: A concept of `induction.induce`, or its file. SAM 3 applies it without the VLM and accepts masks
                whose presence reaches its threshold; other images use full reasoning. The router modes `"sam_only"`
                and `"full_reasoning"` force one of the two.
            rule: A visual rule, such as "the striped object". The VLM does not write its reasoning and its rule, but
                is given this rule and applies it to the image.
            on_text: Called with each piece of text that the VLM writes; samples are then processed one by one. An
                exception that it raises ends the generation. See `stream_segment` for an iterator.
            **tensors: The items of `ConceptSegInputs`, as an alternative to `inputs`.

        Returns:
            One result per prompt, in the order of the prompts. Without `processor`, a sequence of results that also
            holds the raw outputs for the processor's `post_process_concept_segmentation`.

        Raises:
            ValueError: If the inputs are incomplete, no processor is available, or the router or generation settings
                are invalid.
        """
        samples, image_index = given_samples(inputs, tensors)
        if isinstance(router, str):
            config = self.config
            router = ShortcutRouter(
                router, config.router_base, config.router_drop_parentheses, config.router_min_words
            )
        own_processor = self.processor if processor is None else processor
        segmenter = Segmenter(
            self,
            own_processor,
            SegmentSettings(router, generation_config, sam_prompt, self._checked(concept), rule),
            on_text,
        )
        with loaded(self):
            raw = segment_batches(segmenter, samples, image_index, batch_size)
        return to_results(
            raw,
            own_processor.post_process_concept_segmentation,
            processor is not None,
            return_heatmap=return_heatmap,
            return_logits=return_logits,
        )

    def _checked(self, concept: ConceptPrompt | str | os.PathLike | None) -> ConceptPrompt | None:
        """Load a concept and check that it was made with the weights of this model."""
        if concept is None:
            return None
        concept = as_concept(concept)
        checked = concept.model_hash, weights_counters(weights(self.sam, self.ctm))
        if checked != self._checked_concept:  # hashing the weights takes longer than decoding a small image
            concept.check_model(self)
            self._checked_concept = checked
        return concept


__all__ = ["ConceptSegForSegmentation", "evaluating"]
