"""Build and load `ConceptSegForSegmentation`; see `model_folder` for saving."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, Sam3Model

from .concept_translation import ConceptTranslationModule
from .configuration_conceptseg import ConceptSegConfig, ConceptTranslationConfig
from .devices import complete_device_map, dispatch_part, execution_device, is_offloaded, stored_value
from .errors import first_line
from .finite import check_finite
from .model_folder import ModelFolderMixin
from .processing_conceptseg import ConceptSegProcessor
from .quantization import exclude_sam_and_ctm
from .vlm_families import Vlm

if TYPE_CHECKING:
    from typing_extensions import Self

# Arguments of `from_pretrained` that control file access; they also apply when SAM 3 is loaded separately.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "use_safetensors")

_PARTS = ("vlm", "ctm", "sam")


class CheckpointMixin(ModelFolderMixin):
    """Build the model from backbones and load it."""

    config: ConceptSegConfig
    vlm: Vlm
    ctm: ConceptTranslationModule
    sam: Sam3Model
    hf_device_map: Mapping[str, Any]
    processor_class = ConceptSegProcessor
    _processor: ConceptSegProcessor | None = None

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
    ) -> Self:
        """Combine a pretrained VLM and a pretrained SAM 3 with a newly initialized CTM, for training in stage I.

        Args:
            vlm: Model id or folder of the VLM, or a model instance, which is used without a copy.
            sam: Model id or folder of SAM 3, or a model instance, which is used without a copy.
            ctm_config: Fields of `ConceptTranslationConfig` to override; `hidden_size` and `sam_hidden_size` are set
                from the backbones.
            dtype: Dtype of a VLM loaded by name; SAM 3 and the CTM are float32.
            attn_implementation: Attention implementation of backbones loaded by name.
            vlm_kwargs: Additional arguments of the VLM's `from_pretrained`.
            sam_kwargs: Additional arguments of SAM 3's `from_pretrained`.
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
        # ConceptSegConfig resets the attention implementation of its sub-configs, so it receives copies until the
        # model is assembled.
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
        for part, backbone in (("VLM", vlm), ("SAM 3", sam)):
            check_finite(backbone, f"The {part} {backbone.config.name_or_path!r}")
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
        sam_dtype: torch.dtype | None = ...,
        **kwargs: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        init_ctm: bool = ...,
        output_loading_info: Literal[True],
        sam_dtype: torch.dtype | None = ...,
        **kwargs: Any,
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        init_ctm: bool = False,
        output_loading_info: bool = False,
        sam_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Load a checkpoint like any Transformers model, but raise an error if weights are missing.

        Args:
            pretrained_model_name_or_path: Model id or folder.
            *model_args: See `PreTrainedModel.from_pretrained`.
            init_ctm: Randomly initialize missing CTM weights instead of raising an error.
            output_loading_info: Also return the dictionary of missing and unexpected keys.
            sam_dtype: Dtype of SAM 3 and the CTM, such as `torch.bfloat16`; float32 by default, whatever `dtype` is.
            **kwargs: See `PreTrainedModel.from_pretrained`. A `quantization_config` applies only to the VLM. A
                `device_map` may omit some of `vlm`, `ctm` and `sam`; the omitted parts are placed on the execution
                device.

        Raises:
            ValueError: If weights of the VLM, of the CTM (unless `init_ctm`) or of SAM 3 (unless
                `config.sam_name_or_path` provides them) are missing, weights are not finite, or `device_map` offloads
                weights to disk that the checkpoint does not contain.
        """
        if kwargs.get("device_map") is not None:
            kwargs["device_map"] = complete_device_map(kwargs["device_map"], _PARTS)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = exclude_sam_and_ctm(
                kwargs["quantization_config"], kwargs.get("device_map")
            )
        model_and_info: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = model_and_info
        model.keep_processor_arguments(kwargs)
        missing = {
            part: sorted(key for key in info["missing_keys"] if key.startswith(f"{part}.")) for part in _PARTS
        }
        checkpoint = f"The checkpoint {str(pretrained_model_name_or_path)!r}"
        if missing["vlm"]:
            raise ValueError(
                f"{checkpoint} lacks {len(missing['vlm'])} VLM weights ({missing['vlm'][0]}, ...); "
                "load a complete checkpoint, or combine backbones with ConceptSegForSegmentation.from_backbones."
            )
        if missing["ctm"] and not init_ctm:
            raise ValueError(
                f"{checkpoint} lacks {len(missing['ctm'])} weights of the Concept Translation Module "
                f"({missing['ctm'][0]}, ...); pass init_ctm=True to initialize them randomly."
            )
        for name in missing["ctm"]:
            try:
                stored_value(model, name)
            except ValueError as error:
                raise ValueError(
                    f"{checkpoint} lacks the weight {name}, which device_map offloads to disk, where it cannot be "
                    "initialized; place 'ctm' on another device."
                ) from error
        if missing["sam"]:
            hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            fault = f"{checkpoint} lacks {len(missing['sam'])} SAM 3 weights"
            model._refill_sam(fault, hub_arguments, kwargs.get("offload_folder"))
            info["missing_keys"] = type(info["missing_keys"])(set(info["missing_keys"]) - set(missing["sam"]))
        check_finite(model, checkpoint)
        model._freeze_sam()
        if sam_dtype is not None:
            if is_offloaded(model):
                raise ValueError(
                    f"{checkpoint}: sam_dtype is {sam_dtype}, but weights are offloaded; omit one of sam_dtype and "
                    "device_map."
                )
            model.sam.to(sam_dtype)
            model.ctm.to(sam_dtype)
        return (model, info) if output_loading_info else model

    def _refill_sam(
        self, fault: str, hub_arguments: Mapping[str, Any], offload_folder: str | os.PathLike | None
    ) -> None:
        source = self.config.sam_name_or_path
        if source is None:
            raise ValueError(
                f"{fault}, and sam_name_or_path is not set in its config.json; set it to a SAM 3 model id or folder."
            )
        try:
            sam = Sam3Model.from_pretrained(source, dtype=torch.float32, **hub_arguments)
            if not is_offloaded(self.sam):
                self.sam.load_state_dict(sam.state_dict())
        except (OSError, RuntimeError) as error:
            reason = first_line(error)
            raise ValueError(
                f"{fault}, and they could not be loaded from its sam_name_or_path {source!r}: {reason}"
            ) from error
        if is_offloaded(self.sam):  # its hooks have no weights: replace SAM 3 and add new hooks
            device = execution_device(self.sam)
            self.sam = sam
            dispatch_part(sam, "sam", self.hf_device_map, device, offload_folder)

    def _freeze_sam(self) -> None:
        if "sam" in self._modules:  # otherwise SAM 3 has been detached
            self.sam.eval().requires_grad_(False)
