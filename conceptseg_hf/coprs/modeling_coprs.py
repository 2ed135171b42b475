"""CoPRS model: a VLM, the modules of the positional prior, and SAM with a frozen image encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationConfig, GenerationMixin
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import can_return_tuple

from ..devices import execution_device, loaded
from ..inference import segment_batches, to_results
from ..inputs import ConceptSegInputs, PreparedSample, given_samples
from ..outputs import ConceptSegmentation, SegmentationOutputs
from ..shared_references import ReferenceStore
from ..streaming import StreamingMixin
from ..vlm_engines import VlmEngineMixin
from ..vlm_families import Vlm, get_family
from ..vlm_methods import VlmMethodsMixin
from . import sam_decoder
from .checkpointing import CoPRSCheckpointMixin
from .configuration_coprs import CoPRSConfig
from .inference import PriorSegmenter, check_options
from .losses import DICE_WEIGHT, FOCAL_WEIGHT, prior_losses
from .outputs import CoPRSOutput
from .positional_prior import PositionalPrior, padding_mask, resample_prior
from .processing_coprs import CoPRSProcessor
from .sam_decoder import PriorFeatures


class CoPRSForSegmentation(
    VlmMethodsMixin, CoPRSCheckpointMixin, VlmEngineMixin, StreamingMixin, GenerationMixin
):
    """Segment what a prompt asks for: the reasoning ends with a token that looks for the target in the image.

    The model consists of `vlm` (the VLM), `prior` (query head, key projection and fusion of eq. 2) and `sam`, of which
    prompt encoder and mask decoder are trained; the image encoder is frozen and always in eval mode. `forward` is the
    differentiable path used for training, `segment` runs inference.
    """

    config: CoPRSConfig
    vlm: Vlm
    prior: PositionalPrior
    sam: sam_decoder.Sam
    hf_device_map: Mapping[str, Any]

    config_class = CoPRSConfig
    processor_class = CoPRSProcessor
    base_model_prefix = "coprs"
    _no_split_modules = ["PositionalPrior", *sam_decoder.NO_SPLIT_MODULES]  # noqa: RUF012 (the VLM adds its own modules)
    _keep_in_fp32_modules_strict = ["sam", "prior"]  # noqa: RUF012 (type expected by the base class)

    def __init__(self, config: CoPRSConfig) -> None:
        super().__init__(config)
        get_family(config.vlm_config)  # raises an error for families that are not supported
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        with local_torch_dtype(torch.float32):
            self.prior = PositionalPrior(config)
        self.sam = sam_decoder.make_sam(config.sam_config)
        sam_decoder.set_single_mask(self.sam)
        self.post_init()
        self.freeze_encoder()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the prior; the VLM and SAM initialize their own weights."""
        if isinstance(module, PositionalPrior):
            module.initialize(self.config)

    def train(self, mode: bool = True) -> CoPRSForSegmentation:
        """Set the mode; SAM's image encoder stays frozen and in eval mode."""
        super().train(mode)
        self.freeze_encoder()
        return self

    def freeze_encoder(self) -> None:
        """Freeze SAM's image encoder."""
        if "sam" in self._modules:
            sam_decoder.freeze_encoder(self.sam)

    def detach_encoder(self) -> nn.Module:
        """Remove SAM's image encoder from the module tree, as `ConceptSegForSegmentation.detach_sam` removes SAM 3."""
        return sam_decoder.detach_encoder(self.sam)

    def set_vlm_engine(self, engine: Any, processor: Any = None, **options: Any) -> None:
        """Select the engine of the VLM: only Transformers returns the hidden state of the concentration token.

        Raises:
            ValueError: If another engine is selected.
        """
        if engine != "transformers":
            raise ValueError(f"vlm_engine is {engine!r}, but CoPRS supports only 'transformers'.")

    # -- the parts of the computation --

    def encode_image(self, sam_pixel_values: Tensor) -> PriorFeatures:
        """Encode (B, 3, S, S) images with SAM's image encoder."""
        dtype = next(self.sam.vision_encoder.parameters()).dtype
        with self._without_autocast(), loaded(self.sam):
            return sam_decoder.encode_image(self.sam, sam_pixel_values.to(dtype))

    def _without_autocast(self) -> torch.autocast:
        return torch.autocast(execution_device(self.sam).type, enabled=False)

    def concentration_states(
        self, hidden_states: Tensor, input_ids: Tensor, completion_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the (B, C) hidden states of the first `<REF_POS>` of each completion, and (B,) whether there is one.

        Args:
            hidden_states: (B, L, C) last-layer, post-norm hidden states.
            input_ids: (B, L) token ids.
            completion_mask: (B, L) true at completion tokens; prompts also mention the token.
        """
        is_position = (input_ids == self.config.ref_pos_token_id) & completion_mask.bool()
        has_position = is_position.any(dim=1)
        columns = is_position.int().argmax(dim=1)
        states = hidden_states[torch.arange(len(input_ids), device=input_ids.device), columns]
        return states.masked_fill(~has_position[:, None], 0), has_position

    def compute_prior(self, states: Tensor, features: PriorFeatures, valid_sizes: Tensor) -> Tensor:
        """Compute the (B, 1, H, W) positional prior (eq. 2) at the resolution of SAM's mask prompt.

        Args:
            states: (B, C) hidden states of the concentration tokens.
            features: SAM's features of B images.
            valid_sizes: (B, 2) height and width of the images within SAM's input.
        """
        device, config = features.device, self.config
        padding = padding_mask(valid_sizes.to(device), config.sam_image_size, 4 * config.grid_size)
        with self._without_autocast():
            logits = self.prior(states.to(device), features.keys)
            return resample_prior(logits, padding, config.padding_logit)

    def decode_masks(self, features: PriorFeatures, prior_logits: Tensor) -> Tensor:
        """Decode (B, 1, H, W) mask logits from positional priors (eq. 3)."""
        with self._without_autocast(), loaded(self.sam):
            return sam_decoder.decode(self.sam, features, prior_logits)

    # -- training --

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
        sam_features: PriorFeatures | None = None,
        valid_sizes: Tensor | None = None,
        mask_labels: Tensor | None = None,
        ignore_mask: Tensor | None = None,
        dice_weight: float = DICE_WEIGHT,
        focal_weight: float = FOCAL_WEIGHT,
        output_logits: bool = False,
        return_dict: bool | None = None,
    ) -> CoPRSOutput | tuple[Any, ...]:
        """Compute prior and masks, and the loss if labels are given, from teacher-forced completions.

        Args:
            input_ids: (B, L) token ids of prompt and completion.
            attention_mask: (B, L) nonzero at tokens, zero at padding.
            mm_token_type_ids: (B, L) token types of the VLM's processor (1 at image tokens).
            pixel_values: (patches, d) image patches of all rows, or (images, 3, S, S) images of one size.
            image_grid_thw: (images, 3) patch grids of the images, for families of VLMs with patches.
            completion_mask: (B, L) true at completion tokens, required.
            sam_pixel_values: (B, 3, S, S) target images for SAM.
            sam_features: Features of the target images, already encoded by `encode_image`.
            valid_sizes: (B, 2) height and width of the images within SAM's input; all of the input by default.
            mask_labels: (B, S, S) masks of 0 and 1 in the frame of SAM's input; see the processor's `mask_to_sam`.
            ignore_mask: (B, S, S) bool, true at pixels to ignore; padding is always ignored.
            dice_weight: Weight of the dice loss (lambda_d in eq. 8).
            focal_weight: Weight of the focal loss (lambda_f in eq. 8).
            output_logits: Also return the VLM's next-token logits.
            return_dict: Whether to return a `CoPRSOutput` instead of a tuple; defaults to the config's value.

        Raises:
            ValueError: If `completion_mask` is missing, or neither or both of `sam_pixel_values` and `sam_features` are
                given.
        """
        if completion_mask is None:
            raise ValueError(
                "forward: completion_mask is missing; pass the output of the processor's `collate`."
            )
        if (sam_pixel_values is None) == (sam_features is None):
            raise ValueError("forward: pass either sam_pixel_values or sam_features.")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": mm_token_type_ids,
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
        }
        family = get_family(self.config.vlm_config)
        hidden_states = family.last_hidden_states(self.vlm, family.model_inputs(inputs))
        states, has_position = self.concentration_states(hidden_states, input_ids, completion_mask)
        if sam_pixel_values is not None:
            sam_features = self.encode_image(sam_pixel_values)
        assert sam_features is not None
        size = self.config.sam_image_size
        if valid_sizes is None:
            valid_sizes = torch.full((len(input_ids), 2), size)
        prior_logits = self.compute_prior(states, sam_features, valid_sizes)
        mask_logits = self.decode_masks(sam_features, prior_logits)
        loss = prior_loss = dice = focal = None
        if mask_labels is not None:
            ignore = padding_mask(valid_sizes, size, mask_labels.shape[-1])[:, 0].to(mask_labels.device)
            if ignore_mask is not None:
                ignore = ignore | ignore_mask.bool()
            losses = prior_losses(prior_logits, mask_logits, mask_labels, ignore, has_position)
            loss = losses.total(dice_weight, focal_weight)
            prior_loss, dice, focal = losses.prior, losses.dice, losses.focal
        return CoPRSOutput(
            loss=loss,
            prior_logits=prior_logits,
            mask_logits=mask_logits,
            has_position=has_position,
            concentration_states=states,
            logits=self.get_output_embeddings()(hidden_states) if output_logits else None,
            prior_loss=prior_loss,
            dice_loss=dice,
            focal_loss=focal,
        )

    # -- inference --

    @overload
    def segment(
        self,
        inputs: ConceptSegInputs | Sequence[PreparedSample] | None = ...,
        router: Any = ...,
        generation_config: GenerationConfig | Mapping[str, Any] | None = ...,
        processor: None = ...,
        return_heatmap: bool = ...,
        batch_size: int | None = ...,
        return_logits: bool = ...,
        on_text: Callable[[str], None] | None = ...,
        **tensors: Any,
    ) -> SegmentationOutputs: ...

    @overload
    def segment(
        self,
        inputs: ConceptSegInputs | Sequence[PreparedSample] | None = ...,
        router: Any = ...,
        generation_config: GenerationConfig | Mapping[str, Any] | None = ...,
        *,
        processor: CoPRSProcessor,
        return_heatmap: bool = ...,
        batch_size: int | None = ...,
        return_logits: bool = ...,
        on_text: Callable[[str], None] | None = ...,
        **tensors: Any,
    ) -> list[ConceptSegmentation]: ...

    @torch.no_grad()
    def segment(
        self,
        inputs: ConceptSegInputs | Sequence[PreparedSample] | None = None,
        router: Any = "full_reasoning",
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        processor: CoPRSProcessor | None = None,
        return_heatmap: bool = True,
        batch_size: int | None = None,
        return_logits: bool = False,
        on_text: Callable[[str], None] | None = None,
        **tensors: Any,
    ) -> list[ConceptSegmentation] | SegmentationOutputs:
        """Segment a batch of prompts; the VLM reasons about each of them.

        Args:
            inputs: As for `ConceptSegForSegmentation.segment`: the processor's output, or samples of `prepare`.
            router: Ignored unless it excludes reasoning, for compatibility with ConceptSeg: there is no shortcut.
            generation_config: Generation settings of the VLM (see `generate_with_states`); greedy by default.
            processor: The processor. If given, it also post-processes the outputs. Otherwise the model's own.
            return_heatmap: Whether results contain the positional prior as probabilities.
            batch_size: Maximum number of samples per batch; None to process all samples at once.
            return_logits: Also return the mask logits, without padding.
            on_text: Called with each piece of text that the VLM writes; samples are then processed one by one.
            **tensors: The items of `ConceptSegInputs`, as an alternative to `inputs`.

        Returns:
            One result per prompt, with the route "reasoning". A completion without `<REF_POS>` has an empty mask.

        Raises:
            ValueError: If the inputs are incomplete, no processor is available, or a setting is not supported.
        """
        tensors = check_options(router, tensors)
        samples, image_index = given_samples(inputs, tensors)
        own_processor = self.processor if processor is None else processor
        segmenter = PriorSegmenter(self, own_processor, generation_config, ReferenceStore(), on_text)
        with loaded(self):
            raw = segment_batches(segmenter, samples, image_index, batch_size)
        return to_results(
            raw,
            own_processor.post_process_concept_segmentation,
            processor is not None,
            return_heatmap=return_heatmap,
            return_logits=return_logits,
        )
