"""The precision of trainings from scratch: bfloat16 where the device has instructions for it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def has_fast_bfloat16(device: str) -> bool:
    """Whether a device computes faster in bfloat16 than in float32; a CPU needs AVX-512 BF16 or AMX."""
    if torch.device(device).type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: str) -> torch.autocast:
    """Return the context of computations in bfloat16; without effect if the device is not faster in it."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_fast_bfloat16(device))


def prepare_for_bfloat16(model: PreTrainedModel, device: str) -> None:
    """Select eager attention on a CPU with bfloat16, where it is a third faster than PyTorch's fused attention."""
    if torch.device(device).type == "cpu" and has_fast_bfloat16(device):
        model.set_attn_implementation("eager")
