"""Detection of NaN and infinite weights, for example of a diverged training run, before they are used or saved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .devices import stored_value

# Weights of other dtypes are quantized, and quantized values are always finite.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; True for integers, quantized weights and tensors on the meta device."""
    tensor = tensor.detach()
    if tensor.dtype not in _DTYPES or tensor.is_meta or not tensor.numel():
        return True
    # The extremes are NaN if any value is. Unlike isfinite() on every value, this allocates no memory.
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def find_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that contain NaN or infinite values."""
    return [name for name, tensor in tensors if not is_finite(tensor)]


def check_finite(model: nn.Module, where: str) -> None:
    """Raise an error if weights of a model are NaN or infinite.

    Args:
        model: The model.
        where: Description of the model's source, with which the error message starts.

    Raises:
        ValueError: If any weight is not finite.
    """
    names = [name for name, _ in model.named_parameters()]
    nonfinite = find_nonfinite((name, stored_value(model, name)) for name in names)
    if nonfinite:
        more = f" and {len(nonfinite) - 1} more" if len(nonfinite) > 1 else ""
        reason = "probably from a diverged training run; use an earlier checkpoint"
        if stored_value(model, nonfinite[0]).dtype == torch.float16:
            reason = "from a diverged training run or an overflow in float16; load the model in bfloat16"
        raise ValueError(f"{where} has NaN or infinite weights ({nonfinite[0]}{more}), {reason}.")
