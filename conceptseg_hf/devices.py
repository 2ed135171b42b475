"""Where models compute, also where Accelerate keeps their weights on the CPU or on disk, or has split them.

The hooks of Accelerate (`device_map`, `cpu_offload`, `disk_offload`, `dispatch_model`) bring the weights of a module to
its execution device when its `forward` is called, and take them away afterwards. In between the parameters are on the
"meta" device: the device of a parameter does not say where the module computes.
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
"""What a device map names beside the devices that compute; where there is no other, the CPU computes."""


def default_device() -> torch.device:
    """The first accelerator, else the CPU."""
    accelerator = (
        torch.accelerator.current_accelerator(check_available=True) if hasattr(torch, "accelerator") else None
    )
    return accelerator or torch.device("cpu")


def execution_device(module: nn.Module) -> torch.device:
    """The device on which a module computes: where its inputs belong.

    For a module that is split over several devices, this is the device of its first part; the hooks of the others
    move their inputs themselves.
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
    """Inputs on the execution device of a module that has hooks; others are left where they are.

    For methods that are called past the `forward` of the outermost hook, which would have moved them.
    """
    if not any(_hooks(part) for part in module.modules()):
        return dict(inputs)
    device = execution_device(module)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


@contextmanager
def loaded(*modules: nn.Module) -> Iterator[None]:
    """Runs the hooks of modules around a block, as around their `forward`; modules without hooks are left alone.

    For weights that are read, and methods that are called, past the `forward` that the hooks wrap.
    """
    with ExitStack() as stack:
        for module in modules:
            hook = getattr(module, "_hf_hook", None)
            if hook is not None:
                stack.callback(hook.post_forward, module, None)
                hook.pre_forward(module)
        yield


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate keeps weights of a module elsewhere than in its parameters."""
    return any(getattr(hook, "offload", False) for part in module.modules() for hook in _hooks(part))


def stored_value(module: nn.Module, name: str) -> Tensor:
    """The values of a parameter or buffer, wherever they are kept.

    Raises:
        ValueError: If they are kept nowhere.
    """
    path = name.split(".")
    tensor = getattr(module.get_submodule(".".join(path[:-1])), path[-1])
    if not tensor.is_meta:
        return tensor
    for depth in range(len(path) - 1, -1, -1):  # the innermost hook first
        for hook in _hooks(module.get_submodule(".".join(path[:depth]))):
            weights = getattr(hook, "weights_map", None)
            if weights is not None:
                with suppress(KeyError):
                    return weights[".".join(path[depth:])]
    raise ValueError(f"the weight {name!r} is offloaded, but stored nowhere.")


def complete_device_map(device_map: Any, parts: tuple[str, ...]) -> Any:
    """A device map for all parts of a model.

    Args:
        device_map: What `from_pretrained` takes. A dictionary need not name all parts.
        parts: The names of the model's children.

    Returns:
        The device map; parts that it does not name are on the device that computes.
    """
    if not isinstance(device_map, Mapping) or "" in device_map:
        return device_map
    unnamed = [part for part in parts if not any(name.split(".")[0] == part for name in device_map)]
    if not unnamed:
        return device_map
    computing = (device for device in device_map.values() if str(device) not in OFFLOADED)
    device = next(computing, str(default_device()))
    return {**device_map, **dict.fromkeys(unnamed, device)}


def dispatch_part(
    part: nn.Module,
    name: str,
    device_map: Mapping[str, Any],
    main_device: torch.device,
    offload_folder: str | os.PathLike | None,
) -> None:
    """Dispatches a child of a model as the device map of the model says.

    Args:
        part: The child, with its weights; all of them belong to children of its own.
        name: Its name in the model.
        device_map: The device map of the whole model.
        main_device: Where offloaded weights are computed with.
        offload_folder: Where weights may be written to.

    Raises:
        ValueError: If weights go to the disk, and there is no folder for them.
    """
    own = {
        key.removeprefix(name).removeprefix("."): device
        for key, device in device_map.items()
        if key == name or key.startswith(f"{name}.")
    } or {"": device_map[""]}
    if "" in own:  # dispatch_model finds no weights to offload under this name
        own = dict.fromkeys((child for child, _ in part.named_children()), own[""])
    folder = None
    if "disk" in own.values():
        if offload_folder is None:
            raise ValueError(
                f"device_map sends weights of {name!r} to the disk which the checkpoint does not hold; pass "
                "offload_folder=..., the folder to write them to."
            )
        Path(offload_folder).mkdir(parents=True, exist_ok=True)
        # A new folder: an index that an earlier model left behind would be taken for this one's.
        folder = tempfile.mkdtemp(prefix=f"{name}-", dir=offload_folder)
    dispatch_model(part, own, main_device=str(main_device), offload_dir=folder, force_hooks=True)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """The hooks of Accelerate on a module, one by one."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
