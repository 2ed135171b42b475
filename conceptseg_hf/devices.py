"""Execution devices of models, including models that Accelerate offloads or splits over several devices.

The hooks of Accelerate (`device_map`, `cpu_offload`, `disk_offload`, `dispatch_model`) move the weights of a module to
its execution device when its `forward` is called, and offload them again afterwards. Between calls the parameters are
on the "meta" device, so the device of a parameter is not the device on which the module computes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn

OFFLOADED = ("cpu", "disk")
"""Offload targets in a device map. If a map names no other device, the CPU is the execution device."""


def default_device() -> torch.device:
    """Return the first accelerator, or the CPU if there is none."""
    accelerator = (
        torch.accelerator.current_accelerator(check_available=True) if hasattr(torch, "accelerator") else None
    )
    return accelerator or torch.device("cpu")


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module computes and to which its inputs must be moved.

    For a module that is split over several devices, this is the device of its first part; the hooks of the remaining
    parts move their own inputs.
    """
    for part in module.modules():
        for hook in _hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
        for tensor in chain(part.parameters(recurse=False), part.buffers(recurse=False)):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("meta")


def move_to_hooks(inputs: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Move inputs to the execution device of a module that has hooks; without hooks, return them unchanged.

    Needed for methods that bypass the `forward` that the outermost hook wraps, which would have moved the inputs.
    """
    if not has_hooks(module):
        return dict(inputs)
    device = execution_device(module)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


@contextmanager
def loaded(*modules: nn.Module) -> Iterator[None]:
    """Context manager that runs the hooks of modules as their `forward` does; modules without hooks are ignored.

    Needed where weights are read, or methods are called, outside the `forward` that the hooks wrap.
    """
    with ExitStack() as stack:
        for module in modules:
            hook = getattr(module, "_hf_hook", None)
            if hook is not None:
                stack.callback(hook.post_forward, module, None)
                hook.pre_forward(module)
        yield


def has_hooks(module: nn.Module) -> bool:
    """Whether Accelerate has added hooks to any part of a module."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate offloads any weights of a module."""
    return any(getattr(hook, "offload", False) for part in module.modules() for hook in _hooks(part))


def stored_value(module: nn.Module, name: str) -> Tensor:
    """Return the values of a parameter or buffer, which may be offloaded.

    Raises:
        ValueError: If the weight is on the meta device and no hook stores its values.
    """
    path = name.split(".")
    tensor = getattr(module.get_submodule(".".join(path[:-1])), path[-1])
    if not tensor.is_meta:
        return tensor
    for depth in range(len(path) - 1, -1, -1):  # innermost hook first
        for hook in _hooks(module.get_submodule(".".join(path[:depth]))):
            weights = getattr(hook, "weights_map", None)
            if weights is not None:
                with suppress(KeyError):
                    return weights[".".join(path[depth:])]
    raise ValueError(f"the weight {name!r} is on the meta device and no offload hook stores its values.")


def complete_device_map(device_map: Any, parts: tuple[str, ...]) -> Any:
    """Complete a device map so that it covers all parts of a model.

    Args:
        device_map: The `device_map` argument of `from_pretrained`. A dictionary may omit parts.
        parts: Names of the model's children.

    Returns:
        The device map, in which omitted parts are assigned to the execution device.
    """
    if not isinstance(device_map, Mapping) or "" in device_map:
        return device_map
    unnamed = [part for part in parts if not any(name.split(".")[0] == part for name in device_map)]
    if not unnamed:
        return device_map
    execution_devices = (device for device in device_map.values() if str(device) not in OFFLOADED)
    device = next(execution_devices, str(default_device()))
    return {**device_map, **dict.fromkeys(unnamed, device)}


def dispatch_part(
    part: nn.Module,
    name: str,
    device_map: Mapping[str, Any],
    main_device: torch.device,
    offload_folder: str | os.PathLike | None,
) -> None:
    """Dispatch a child of a model according to the device map of the model.

    Args:
        part: The child with its weights, all of which belong to submodules of the child.
        name: Name of the child in the model.
        device_map: Device map of the whole model.
        main_device: Execution device of offloaded weights.
        offload_folder: Folder for weights that are offloaded to disk.

    Raises:
        ValueError: If weights are offloaded to disk and `offload_folder` is None.
    """
    part_map = {
        key.removeprefix(name).removeprefix("."): device
        for key, device in device_map.items()
        if key == name or key.startswith(f"{name}.")
    } or {"": device_map[""]}
    if "" in part_map:  # dispatch_model finds no weights to offload under the empty name
        part_map = dict.fromkeys((child for child, _ in part.named_children()), part_map[""])
    folder = None
    if "disk" in part_map.values():
        if offload_folder is None:
            raise ValueError(
                f"device_map offloads weights of {name!r} to disk that the checkpoint does not contain; pass "
                "offload_folder=... to set the folder that they are written to."
            )
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
        # A new folder, because Accelerate would reuse the index that an earlier model has left in the folder.
        folder = tempfile.mkdtemp(prefix=f"{name}-", dir=offload_folder)
    dispatch_model(part, part_map, main_device=str(main_device), offload_dir=folder, force_hooks=True)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return the Accelerate hooks of a module; a sequential hook is split into its parts."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
