"""Hashes that identify weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

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
