"""What sharded training needs for the parts of a model that must stay whole (DeepSpeed ZeRO-3, FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

Module = TypeVar("Module", bound=nn.Module)


def materialize(module: Module) -> Module:
    """Makes the parameters of a module whole again, in every process and in place, where ZeRO-3 has sharded them."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if is_sharded(parameter):
                with gathered([parameter]):
                    whole = nn.Parameter(parameter.data.clone(), requires_grad=parameter.requires_grad)
                setattr(owner, name, whole)
    return module


def clone_unsharded(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy in eval mode with whole parameters, whether or not ZeRO-3 has sharded the original."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return copy.deepcopy(model).requires_grad_(False).eval()
    with without_zero_init():
        clone = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    with torch.no_grad():
        # Parameter by parameter: the whole original need not fit.
        for ours, theirs in zip(clone.parameters(), model.parameters(), strict=True):
            with gathered([theirs]):
                ours.data = theirs.data.to(ours.device, copy=True)
        for our_buffer, their_buffer in zip(clone.buffers(), model.buffers(), strict=True):
            our_buffer.data = their_buffer.data.to(our_buffer.device, copy=True)
    return clone.requires_grad_(False).eval()


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 manages this parameter, which is then empty outside of `gathered`."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters are whole inside; a collective operation under ZeRO-3, nothing without it."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if sharded:
        import deepspeed
    with deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext():
        yield


@contextmanager
def without_zero_init() -> Iterator[None]:
    """Models made inside are whole, although a ZeRO-3 configuration would have Transformers shard them."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def make_generate_gather(model: nn.Module) -> None:
    """Lets `model.generate` gather FSDP2's shards as `forward` does; other models stay as they are.

    Generation calls the vision tower outside of the root's forward.
    """
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "generate")
