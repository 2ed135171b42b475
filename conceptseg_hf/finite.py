"""Weights that are NaN or infinite, as a training that diverged leaves them: found before they are used or saved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .devices import stored_value

# Others are quantized: none of their values stands for a number that is not finite.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; True of integers, of quantized weights, and of weights that are on no device."""
    tensor = tensor.detach()
    if tensor.dtype not in _DTYPES or tensor.is_meta or not tensor.numel():
        return True
    # The extremes are NaN if any value is. This reads once and needs no memory, unlike isfinite() of each value.
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def find_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those tensors that hold a value which is not finite."""
    return [name for name, tensor in tensors if not is_finite(tensor)]


def check_finite(model: nn.Module, where: str) -> None:
    """Refuses a model with weights that are not finite.

    Args:
        model: The model.
        where: Names its source; begins the message.

    Raises:
        ValueError: If there are such weights.
    """
    names = [name for name, _ in model.named_parameters()]
    wrong = find_nonfinite((name, stored_value(model, name)) for name in names)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        reason = "as a training that diverged leaves them; use an earlier checkpoint of it"
        if stored_value(model, wrong[0]).dtype == torch.float16:
            reason = (
                "as a training that diverged leaves them, or float16 makes of large ones; load it in bfloat16"
            )
        raise ValueError(f"{where} has weights that are not finite numbers ({wrong[0]}{more}), {reason}.")
