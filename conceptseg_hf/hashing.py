"""Hashes that identify weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import nn

from .devices import stored_value


def weights_hash(modules: Mapping[str, nn.Module]) -> str:
    """Return a hash of the first values of each weight of some modules, which are identified by their names."""
    digest = hashlib.sha256()
    for prefix, module in modules.items():
        tied = getattr(module, "all_tied_weights_keys", ())
        for name, parameter in module.named_parameters():
            if name in tied:  # an offloaded tied weight is listed as a separate parameter
                continue
            digest.update(f"{prefix}.{name}".lstrip(".").encode())
            value = stored_value(module, name) if parameter.is_meta else parameter
            first = value.detach().flatten()[:64]
            digest.update(first.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
