"""Build and load `CoPRSForSegmentation`; see `model_folder` for saving."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from ..devices import complete_device_map, execution_device
from ..finite import check_finite
from ..model_folder import ModelFolderMixin
from ..quantization import exclude_modules
from . import sam_decoder
from .configuration_coprs import CoPRSConfig
from .positional_prior import PositionalPrior
from .processing_coprs import CoPRSProcessor

if TYPE_CHECKING:
    from typing_extensions import Self

_PARTS = ("vlm", "prior", "sam")
_UNQUANTIZED = ("sam", "prior", "lm_head")


class CoPRSCheckpointMixin(ModelFolderMixin):
    """Build the model from backbones and load it."""

    config: CoPRSConfig
    vlm: Any
    prior: PositionalPrior
    sam: Any

    @classmethod
    def from_backbones(
        cls,
        vlm: str | os.PathLike | PreTrainedModel,
        sam: str | os.PathLike | PreTrainedModel,
        processor: CoPRSProcessor | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        **config_kwargs: Any,
    ) -> Self:
        """Combine a pretrained VLM and a pretrained SAM with a new prior, for training.

        The embeddings of the VLM are enlarged if they have no row for `<REF_POS>`; its embedding is initialized with
        the mean of all embeddings.

        Args:
            vlm: Model id or folder of the VLM, or a model instance, which is used without a copy.
            sam: Model id or folder of a `SamModel` or a `Sam3TrackerModel`, or a model instance.
            processor: The processor, whose tokenizer has the token; by default that of `CoPRSProcessor.from_backbones`,
                which needs names of backbones.
            dtype: Dtype of a VLM loaded by name; SAM and the prior are float32.
            attn_implementation: Attention implementation of a VLM loaded by name.
            **config_kwargs: Fields of `CoPRSConfig`.

        Raises:
            ValueError: If a model instance is given without a processor, or SAM is of another type.
        """
        if processor is None:
            if isinstance(vlm, PreTrainedModel) or isinstance(sam, PreTrainedModel):
                raise ValueError(
                    "from_backbones: a model is given without a processor, whose tokenizer has <REF_POS>; also pass "
                    "processor=..., or the names of both backbones."
                )
            processor = CoPRSProcessor.from_backbones(vlm, sam)
        attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        if not isinstance(vlm, PreTrainedModel):
            vlm = AutoModelForImageTextToText.from_pretrained(vlm, dtype=dtype, **attention)
        if not isinstance(sam, PreTrainedModel):
            sam = _load_sam(sam)
        _add_embedding(vlm, processor.ref_pos_token_id)
        config = CoPRSConfig(
            vlm_config=copy.deepcopy(vlm.config),
            sam_config=copy.deepcopy(sam.config),
            ref_pos_token_id=processor.ref_pos_token_id,
            **{"attn_implementation": vlm.config._attn_implementation, **config_kwargs},
        )
        with torch.device("meta"):
            model = cls(config)
        sam_decoder.set_single_mask(sam)
        model.vlm, model.sam = vlm, sam
        config.vlm_config, config.sam_config = vlm.config, sam.config
        model.prior = PositionalPrior(config).to(execution_device(sam))
        model.prior.initialize(config)
        for part, backbone in (("VLM", vlm), ("SAM", sam)):
            check_finite(backbone, f"The {part} {backbone.config.name_or_path!r}")
        model.processor = processor
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint like any Transformers model, but raise an error if weights are missing.

        Args:
            pretrained_model_name_or_path: Model id or folder.
            *model_args: See `PreTrainedModel.from_pretrained`.
            output_loading_info: Also return the dictionary of missing and unexpected keys.
            **kwargs: See `PreTrainedModel.from_pretrained`. `dtype` and a `quantization_config` apply only to the VLM.
                A `device_map` may omit some of `vlm`, `prior` and `sam`.

        Raises:
            ValueError: If weights are missing or not finite.
        """
        if kwargs.get("device_map") is not None:
            kwargs["device_map"] = complete_device_map(kwargs["device_map"], _PARTS)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = exclude_modules(
                kwargs["quantization_config"], kwargs.get("device_map"), _UNQUANTIZED
            )
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        model.keep_processor_arguments(kwargs)
        checkpoint = f"The checkpoint {str(pretrained_model_name_or_path)!r}"
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{checkpoint} lacks {len(missing)} weights ({missing[0]}, ...); load a complete checkpoint, or "
                "combine backbones with CoPRSForSegmentation.from_backbones."
            )
        check_finite(model, checkpoint)
        model.freeze_encoder()
        return (model, info) if output_loading_info else model


def _load_sam(name: str | os.PathLike) -> PreTrainedModel:
    model_type = AutoConfig.from_pretrained(name).model_type
    classes = sam_decoder.sam_classes()
    # SAM 3's repository contains the config of its video model, which holds the tracker.
    classes["sam3_video"] = classes["sam3_tracker"]
    if model_type not in classes:
        raise ValueError(
            f"from_backbones: {os.fspath(name)!r} has model_type {model_type!r}; use a SamModel or a Sam3TrackerModel."
        )
    return classes[model_type].from_pretrained(name, dtype=torch.float32)


@torch.no_grad()
def _add_embedding(vlm: PreTrainedModel, token_id: int) -> None:
    """Give a token an embedding, and enlarge the embeddings if there is no row for it."""
    embeddings: Any = vlm.get_input_embeddings()
    if token_id >= embeddings.num_embeddings:
        vlm.resize_token_embeddings(token_id + 1, mean_resizing=False)
    for layer in {
        id(part): part for part in (vlm.get_input_embeddings(), vlm.get_output_embeddings())
    }.values():
        if layer is not None:
            weight = cast("Tensor", layer.weight)
            weight[token_id] = weight[:token_id].float().mean(dim=0).to(weight.dtype)
