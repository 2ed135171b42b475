"""Hashes that identify weights."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .devices import stored_value

HASHED_VALUES = 64
"""Number of values of each weight that are hashed."""


def weights_hash(modules: Mapping[str, nn.Module], stored: Mapping[str, Tensor] | None = None) -> str:
    """Return a hash of the first values of each weight of some modules, which are identified by their names.

    Args:
        modules: The modules by name.
        stored: Values of the weights by full name, to hash instead of those in the modules.
    """
    digest = hashlib.sha256()
    for prefix, module in modules.items():
        tied = getattr(module, "all_tied_weights_keys", ())
        for name, parameter in module.named_parameters():
            if name in tied:  # an offloaded tied weight is listed as a separate parameter
                continue
            full_name = f"{prefix}.{name}".lstrip(".")
            digest.update(full_name.encode())
            if stored is not None:
                value = stored[full_name]
            else:
                value = stored_value(module, name) if parameter.is_meta else parameter
            first = value.detach().flatten()[:HASHED_VALUES]
            digest.update(first.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def weights(*modules: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers of modules in one traversal, which is faster than `parameters` and `buffers`."""
    for module in modules:
        for part in module.modules():
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None:
                    yield tensor


def weights_counters(tensors: Iterable[Tensor]) -> Hashable:
    """Return a value that differs if any of some weights was replaced, moved, or written in place."""
    return tuple(
        (tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device)
        for tensor in tensors
        if not tensor.is_meta
    )


def weights_state(module: nn.Module) -> Hashable:
    """Return a value that differs if the weights, adapters, dtype or device of a module may have changed.

    It is compared only within a process. Version counters of the tensors count writes in place; a few values of each
    tensor reveal writes through `.data`, which have no counter.
    """
    tensors = list(weights(module))
    adapters = tuple(
        (
            name,
            str(part._active_adapter),
            part._disable_adapters,
            str(part.merged_adapters),
            str(part.scaling),
        )
        for name, part in module.named_modules()
        if hasattr(part, "_disable_adapters") and hasattr(part, "scaling")
    )
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().flatten()
            by_device.setdefault(tensor.device, []).append(flat[:: -(-len(flat) // 4)].double())
    values = tuple(torch.cat(parts).cpu().numpy().tobytes() for parts in by_device.values())
    return weights_counters(tensors), adapters, values
