"""Helpers for sharded training (DeepSpeed ZeRO-3, FSDP2) with model parts that must not be sharded."""

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
    """Gather the parameters of a module that ZeRO-3 has sharded, in place and in every process."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if is_sharded(parameter):
                with gathered([parameter]):
                    whole = nn.Parameter(parameter.data.clone(), requires_grad=parameter.requires_grad)
                setattr(owner, name, whole)
    return module


def clone_unsharded(model: PreTrainedModel) -> PreTrainedModel:
    """Return a frozen copy in eval mode with unsharded parameters, even if ZeRO-3 has sharded the original."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return copy.deepcopy(model).requires_grad_(False).eval()
    with without_zero_init():
        clone = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    with torch.no_grad():
        # One parameter at a time, as the full original may not fit into memory.
        for copied, parameter in zip(clone.parameters(), model.parameters(), strict=True):
            with gathered([parameter]):
                copied.data = parameter.data.to(copied.device, copy=True)
        for copied_buffer, buffer in zip(clone.buffers(), model.buffers(), strict=True):
            copied_buffer.data = buffer.data.to(copied_buffer.device, copy=True)
    return clone.requires_grad_(False).eval()


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether a parameter is sharded by ZeRO-3, so that it is empty outside of `gathered`."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gather parameters temporarily: a collective operation with ZeRO-3, a no-op without it."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if sharded:
        import deepspeed
    with deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext():
        yield


@contextmanager
def without_zero_init() -> Iterator[None]:
    """Temporarily prevent Transformers from sharding new models because of a ZeRO-3 configuration."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def make_generate_gather(model: nn.Module) -> None:
    """Make `model.generate` gather the shards of FSDP2, as `forward` does; other models are not changed.

    Generation calls the vision tower outside of the forward pass of the root module.
    """
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "generate")
