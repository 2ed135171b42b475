"""ConceptSeg: a VLM reasons, the Concept Translation Module translates, and a frozen SAM 3 segments."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    Sam3Model,
)
from transformers import initialization as init
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import can_return_tuple

from . import hub, vlm_backbone, sam_prompt
from .concept_translation import ConceptTranslationModule
from .configuration_conceptseg import ConceptSegConfig, ConceptTranslationConfig
from .devices import (
    complete_device_map,
    dispatch_part,
    execution_device,
    is_offloaded,
    loaded,
    stored_value,
)
from .finite import check_finite
from .inference import Segmenter, SegmentSettings
from .losses import segmentation_loss
from .outputs import ConceptSegmentation, ConceptSegOutput
from .quantization import exclude_sam_and_ctm
from .router import ShortcutRouter
from .sam_prompt import ImageFeatures

if TYPE_CHECKING:
    from .processing_conceptseg import ConceptSegInputs, ConceptSegProcessor, PreparedSample

# Arguments of `from_pretrained` that say where files come from; they serve every part of a model alike.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "use_safetensors")

_PARTS = ("vlm", "ctm", "sam")


class ConceptSegForSegmentation(PreTrainedModel, GenerationMixin):
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
    _no_split_modules = ["ConceptTranslationModule", *sam_prompt.UNITS]  # noqa: RUF012 (the VLM adds its own)
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

    # -- building, loading, saving --

    @classmethod
    def from_backbones(
        cls,
        vlm: str | os.PathLike | PreTrainedModel,
        sam: str | os.PathLike | Sam3Model,
        *,
        ctm_config: Mapping[str, Any] | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        vlm_kwargs: Mapping[str, Any] | None = None,
        sam_kwargs: Mapping[str, Any] | None = None,
        **config_kwargs: Any,
    ) -> ConceptSegForSegmentation:
        """Joins a pretrained VLM and a pretrained SAM 3 with a freshly initialised CTM, ready for stage I.

        Args:
            vlm: Model id, folder, or the VLM itself (used as it is).
            sam: Model id, folder, or SAM 3 itself (used as it is).
            ctm_config: Fields of `ConceptTranslationConfig` to replace; the two widths follow from the
                backbones.
            dtype: Dtype of a VLM given by name; SAM 3 and the CTM are float32.
            attn_implementation: Attention implementation of backbones given by name.
            vlm_kwargs: Further arguments of the VLM's `from_pretrained`.
            sam_kwargs: Further arguments of SAM 3's `from_pretrained`.
            **config_kwargs: Fields of `ConceptSegConfig`.
        """
        sam_name = config_kwargs.pop("sam_name_or_path", None)
        attention: dict[str, Any] = (
            {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        )
        if not isinstance(vlm, PreTrainedModel):
            vlm = AutoModelForImageTextToText.from_pretrained(
                vlm, dtype=dtype, **attention, **(vlm_kwargs or {})
            )
        if not isinstance(sam, PreTrainedModel):
            sam_name = sam_name or os.fspath(sam)
            sam = Sam3Model.from_pretrained(sam, dtype=torch.float32, **attention, **(sam_kwargs or {}))
        sam_width = cast("Any", sam.config).detr_encoder_config.hidden_size
        # A new config resets the attention implementation of the configs it is given: it gets copies until
        # the model stands.
        options: dict[str, Any] = {"attn_implementation": vlm.config._attn_implementation, **config_kwargs}
        config = ConceptSegConfig(
            vlm_config=copy.deepcopy(vlm.config),
            sam_config=copy.deepcopy(sam.config),
            ctm_config=ConceptTranslationConfig(
                **{
                    **(ctm_config or {}),
                    "hidden_size": vlm.config.get_text_config().hidden_size,
                    "sam_hidden_size": sam_width,
                }
            ),
            sam_name_or_path=sam_name or sam.config.name_or_path or None,
            **options,
        )
        with torch.device("meta"):
            model = cls(config)
        model.vlm, model.sam = vlm, sam
        config.vlm_config, config.sam_config = vlm.config, sam.config
        model.ctm = ConceptTranslationModule(config.ctm_config).to(execution_device(sam))
        model.ctm.apply(model._init_weights)
        for part, given in (("VLM", vlm), ("SAM 3", sam)):
            check_finite(given, f"The {part} {given.config.name_or_path!r}")
        model._freeze_sam()
        return model.eval()

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        init_ctm: bool = ...,
        output_loading_info: Literal[False] = ...,
        **kwargs: Any,
    ) -> ConceptSegForSegmentation: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        init_ctm: bool = ...,
        output_loading_info: Literal[True],
        **kwargs: Any,
    ) -> tuple[ConceptSegForSegmentation, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        init_ctm: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> ConceptSegForSegmentation | tuple[ConceptSegForSegmentation, dict[str, Any]]:
        """Loads a checkpoint like any Transformers model, and refuses to go on with random weights.

        Args:
            pretrained_model_name_or_path: Model id or folder.
            *model_args: As in `PreTrainedModel.from_pretrained`.
            init_ctm: Accept a checkpoint without (some) CTM weights and initialise them afresh.
            output_loading_info: Also return the dictionary of missing and unexpected keys.
            **kwargs: As in `PreTrainedModel.from_pretrained`. A `quantization_config` is for the VLM alone. A
                `device_map` may name some of `vlm`, `ctm` and `sam`; the others are on the device that computes.

        Raises:
            ValueError: If weights of the CTM (without `init_ctm`), of the VLM, or of SAM 3 (and
                `config.sam_name_or_path` names no source for them) are missing, weights are not finite, or `device_map`
                sends weights to the disk that are not in the checkpoint.
        """
        if kwargs.get("device_map") is not None:
            kwargs["device_map"] = complete_device_map(kwargs["device_map"], _PARTS)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = exclude_sam_and_ctm(
                kwargs["quantization_config"], kwargs.get("device_map")
            )
        loaded_pair: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded_pair
        missing = {
            part: sorted(key for key in info["missing_keys"] if key.startswith(f"{part}.")) for part in _PARTS
        }
        checkpoint = f"The checkpoint {str(pretrained_model_name_or_path)!r}"
        if missing["vlm"]:
            raise ValueError(
                f"{checkpoint} lacks {len(missing['vlm'])} VLM weights ({missing['vlm'][0]}, ...); "
                "load a complete checkpoint, or join backbones with ConceptSegForSegmentation.from_backbones."
            )
        if missing["ctm"] and not init_ctm:
            raise ValueError(
                f"{checkpoint} lacks {len(missing['ctm'])} weights of the Concept Translation Module "
                f"({missing['ctm'][0]}, ...), which would be random; pass init_ctm=True to train a fresh one."
            )
        for name in missing["ctm"]:
            try:
                stored_value(model, name)
            except ValueError as error:
                raise ValueError(
                    f"{checkpoint} lacks the weight {name}, which device_map sends to the disk, where no new one is "
                    "written; send 'ctm' elsewhere."
                ) from error
        if missing["sam"]:
            hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            fault = f"{checkpoint} lacks {len(missing['sam'])} SAM 3 weights"
            model._refill_sam(fault, hub_arguments, kwargs.get("offload_folder"))
            info["missing_keys"] = type(info["missing_keys"])(set(info["missing_keys"]) - set(missing["sam"]))
        check_finite(model, checkpoint)
        model._freeze_sam()
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        save_original_format: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the model, by default under the names of `state_dict()`: the ones a trainer resumes from.

        A model card is written beside it where there is none (see `cards.save_model_card`).

        Args:
            save_directory: The folder.
            *args: As in the base class.
            save_original_format: Use the names of the backbones' own files.
            push_to_hub: Upload the folder as well.
            **kwargs: As in the base class; with `push_to_hub` also `repo_id` (by default the folder's name) and the
                arguments of `hub.upload`.
        """
        if push_to_hub:
            upload, kwargs = hub.split_upload_arguments(save_directory, kwargs)
        if is_offloaded(self) and not hasattr(self, "hf_device_map") and len(args) < 2:
            kwargs.setdefault("state_dict", self._stored_state_dict())  # the base class saves others itself
        kwargs["save_original_format"] = save_original_format
        super().save_pretrained(save_directory, *args, **kwargs)
        if Path(save_directory).is_dir():  # other processes than the main one may have no folder
            hub.keep_remote_stub(save_directory)
            hub.save_model_card(save_directory, self.config, tags=self.model_tags or ())
        if push_to_hub:
            hub.upload(save_directory, **upload)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        report: Any = None,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> Any:
        """Uploads the model with its card.

        A card that somebody has written in the repository is kept, unless there is a report; see `cards.merge_cards`.

        Args:
            repo_id: The repository, made if it does not exist.
            report: An evaluation for the card; see `cards.save_model_card`.
            max_shard_size: Size of the weight files.
            **kwargs: Further arguments of `hub.upload`.

        Returns:
            What the Hub says of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            if report is not None:
                hub.save_model_card(
                    folder, self.config, report=report, overwrite=True, tags=self.model_tags or ()
                )
            return hub.upload(folder, repo_id, keep_card=report is None, **kwargs)

    def _stored_state_dict(self) -> dict[str, Tensor]:
        """The state dict with the values of what is offloaded; tied weights are in it once."""
        return {
            name: stored_value(self, name) if value.is_meta else value
            for name, value in self.state_dict().items()
            if name not in self.all_tied_weights_keys
        }

    def _refill_sam(
        self, fault: str, hub_arguments: Mapping[str, Any], offload_folder: str | os.PathLike | None
    ) -> None:
        source = self.config.sam_name_or_path
        if source is None:
            raise ValueError(
                f"{fault}, and its config names no source for them; set sam_name_or_path in config.json to a "
                "SAM 3 model id or folder."
            )
        try:
            sam = Sam3Model.from_pretrained(source, dtype=torch.float32, **hub_arguments)
            if not is_offloaded(self.sam):
                self.sam.load_state_dict(sam.state_dict())
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{fault}, and they could not be taken from {source!r} (its sam_name_or_path): {reason}"
            ) from error
        if is_offloaded(self.sam):  # its hooks know no weights: SAM 3 gets new ones
            device = execution_device(self.sam)
            self.sam = sam
            dispatch_part(sam, "sam", self.hf_device_map, device, offload_folder)

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

    def _freeze_sam(self) -> None:
        if "sam" in self._modules:  # else it is detached, and as it was
            self.sam.eval().requires_grad_(False)

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
        with torch.no_grad(), self._own_precision():
            return sam_prompt.encode_image(
                self.sam, sam_pixel_values.to(self.sam.dtype), self.config.sam_geometry_cls
            )

    def _own_precision(self) -> torch.autocast:
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
        with self._own_precision():
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

    @torch.no_grad()
    def segment(
        self,
        inputs: ConceptSegInputs | Sequence[PreparedSample],
        router: str | ShortcutRouter = "adaptive",
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        processor: ConceptSegProcessor | None = None,
        return_heatmap: bool = False,
        batch_size: int | None = None,
        sam_prompt: str = "concept+text",
        return_logits: bool = False,
    ) -> list[ConceptSegmentation]:
        """Segments a batch of prepared samples; each takes its own route.

        Every image is encoded once by SAM 3, and only samples that do not take the shortcut reach the VLM.

        Args:
            inputs: What the processor returns for images, prompts and references. Samples that carry an error
                become failed results.
            router: A mode of `ShortcutRouter` (with the config's `router_base` and so on), or a router.
            generation_config: How the VLM writes (see `generate_with_states`); greedy by default.
            processor: The processor; by default the one that `inputs` carries.
            return_heatmap: Also return the mask probabilities.
            batch_size: At most so many samples at a time; None: all at once.
            sam_prompt: What of the reasoning SAM 3 is prompted with: `"concept+text"` is the method (eq. 4); the
                others are for ablations (paper, Table 4): `"concept"` (the concept tokens Z alone), `"text"` (the
                answer alone) and `"box"` (the VLM's box alone; without one the mask is empty).
            return_logits: Also return SAM 3's mask logits, at their own size.

        Returns:
            One result per sample, in their order.

        Raises:
            ValueError: If there is no processor, or the router or generation settings are invalid.
        """
        processor = processor if processor is not None else getattr(inputs, "processor", None)
        if processor is None:
            raise ValueError(
                "segment: there is no processor; pass processor=..., or the inputs that a processor returned."
            )
        if isinstance(router, str):
            config = self.config
            router = ShortcutRouter(
                router, config.router_base, config.router_drop_parentheses, config.router_min_words
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(
                f"segment: batch_size is {batch_size}; use at least 1, or None for all samples at once."
            )
        settings = SegmentSettings(router, generation_config, sam_prompt, return_heatmap, return_logits)
        segmenter = Segmenter(self, processor, settings)
        samples = list(inputs)
        size = batch_size or max(len(samples), 1)
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with loaded(self):
                return [
                    result
                    for start in range(0, len(samples), size)
                    for result in segmenter.segment(samples[start : start + size])
                ]
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
