"""Test of offloading from a simulated accelerator; run as a program.

The simulated device "simulated:0" computes on the CPU and, like a real one, rejects operations on tensors of different
devices. It uses PyTorch's experimental support for backends written in Python.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.utils import _pytree as pytree

try:
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
except ImportError:
    sys.exit("no simulated accelerator")

DEVICE = "simulated:0"
# Operations that accept tensors of different devices on every backend.
MIXED = ("copy_", "_copy_from", "index", "index_put_", "_index_put_impl_")


class Backend(_DummyBackendModule):
    """The device module that PyTorch requires."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1


class Tensor(torch.Tensor):
    """A tensor on the simulated device; the CPU tensor `inner` contains its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Tensor:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=torch.device(DEVICE), **layout)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} on {DEVICE}"

    def tolist(self) -> list:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


def compute(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run a PyTorch operation on the inner tensors."""
    leaves = pytree.tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Tensor)]
    name = operation._schema.name.removeprefix("aten::")
    if ours and name not in MIXED and any(other.ndim for other in others):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if name == "index" and not isinstance(args[0], Tensor):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor")
    inner_args, inner_kwargs = pytree.tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, Tensor) else leaf, (args, kwargs)
    )
    if name in ("copy_", "_copy_from"):
        target, source = (0, 1) if name == "copy_" else (1, 0)
        inner_args[target].copy_(inner_args[source])
        return args[target]
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "meta":
        return operation(*inner_args, **inner_kwargs)
    if device is not None:
        inner_kwargs["device"] = "cpu"
    inner_kwargs.pop("pin_memory", None)
    known = {id(tensor.inner): tensor for tensor in ours}
    to_cpu = device is not None and torch.device(device).type == "cpu"

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or to_cpu:
            return leaf
        return known[id(leaf)] if id(leaf) in known else Tensor(leaf)

    return pytree.tree_map(wrap, operation(*inner_args, **inner_kwargs))


_kept: list[Any] = []  # libraries and functions that PyTorch does not keep alive


def register() -> None:
    """Register the device and its operations."""
    _setup_privateuseone_for_python_backend("simulated", backend_module=Backend())
    rest, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(lambda operation, *args, **kwargs: compute(operation, args, kwargs), "PrivateUse1")
    for overload in (
        "default",
        "start",
        "start_step",
    ):  # the default implementation resizes an empty tensor in place

        def arange(*args: Any, _overload: str = overload, dtype: Any = None, **_: Any) -> Tensor:
            return Tensor(getattr(torch.ops.aten.arange, _overload)(*args, dtype=dtype))

        aten.impl("arange" if overload == "default" else f"arange.{overload}", arange, "PrivateUse1")
    _kept.extend((rest, aten))


def place(module: torch.nn.Module, name: str, device: Any, value: Any = None, **_: Any) -> None:
    """Replacement of Accelerate's `set_module_tensor_to_device` without special cases for real devices."""
    *path, leaf = name.split(".")
    owner = module.get_submodule(".".join(path))
    moved = (getattr(owner, leaf) if value is None else value).detach().to(device)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(moved, requires_grad=False)
    else:
        owner._buffers[leaf] = moved


@contextmanager
def operations_without_kernels() -> Iterator[None]:
    """Replace operations that `compute` does not support: tensors created from lists, and RoI pooling."""
    import torchvision

    real_tensor, real_pool = torch.tensor, torchvision.ops.roi_align

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if isinstance(data, (list, tuple)):
            data = [part.item() if isinstance(part, torch.Tensor) else part for part in data]
        created = real_tensor(data, **kwargs)
        return created if device is None else created.to(device)

    def pool(features: torch.Tensor, boxes: Any, *args: Any) -> torch.Tensor:
        return real_pool(features.cpu(), [box.cpu() for box in boxes], *args).to(features.device)

    torch.tensor, torchvision.ops.roi_align = tensor, pool
    try:
        yield
    finally:
        torch.tensor, torchvision.ops.roi_align = real_tensor, real_pool


def main() -> None:
    """Compare a model on the simulated device with offloaded models."""
    import accelerate.hooks
    import accelerate.utils.offload
    from transformers import AutoModel, AutoProcessor

    import conceptseg_hf
    from conceptseg_hf.data import load_benchmark

    register()
    accelerate.hooks.set_module_tensor_to_device = place
    read = accelerate.utils.offload.safe_open  # supports real devices only
    accelerate.utils.offload.safe_open = lambda file, framework, device: read(file, framework, device="cpu")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    folder = conceptseg_hf.nano_checkpoint()
    processor = AutoProcessor.from_pretrained(folder)
    samples = load_benchmark("concept-shapes", split="test")
    sample = next(samples[i] for i in range(100, len(samples)) if samples[i].references)
    inputs = processor([sample.image], [sample.prompt], [sample.references])
    batch = processor.collate(inputs.samples, ["<answer> star </answer>"])
    sam_input_ids, sam_attention_mask = processor.sam_text(["star"])

    def run(model: Any) -> list[Any]:
        with operations_without_kernels():
            results = []
            for router in ("sam_only", "full_reasoning"):
                (result,) = model.segment(inputs, router, {"max_new_tokens": 8}, return_logits=True)
                results += [result.completion, torch.from_numpy(result.mask_logits)]
            output = model(
                **batch,
                sam_pixel_values=inputs.sam_pixel_values,
                sam_input_ids=sam_input_ids,
                sam_attention_mask=sam_attention_mask,
            )
        return [*results, output.mask_logits.to("cpu"), output.concept_embeds.to("cpu")]

    def load(*parts: str, **options: Any) -> Any:
        model = AutoModel.from_pretrained(folder, **options)
        for part in parts:
            getattr(model, part).to(DEVICE)
        return model

    def offloaded(function: Any, part: str, *parts_on_device: str) -> Any:
        model = load(*parts_on_device)
        function(model.get_submodule(part), DEVICE)
        return model

    on_cpu = run(load())
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    expected = run(load("vlm", "ctm", "sam"))
    for a, b in zip(expected, on_cpu, strict=True):
        assert a == b if a is None or isinstance(a, str) else torch.allclose(a, b, atol=1e-3)
    ways = {
        "cpu_offload": lambda: offloaded(accelerate.cpu_offload, ""),
        "cpu_offload of SAM 3": lambda: offloaded(accelerate.cpu_offload, "sam", "vlm", "ctm"),
        "cpu_offload of the VLM": lambda: offloaded(accelerate.cpu_offload, "vlm", "ctm", "sam"),
        "cpu_offload_with_hook": lambda: offloaded(accelerate.cpu_offload_with_hook, ""),
        "cpu_offload_with_hook of SAM 3": lambda: offloaded(
            accelerate.cpu_offload_with_hook, "sam", "vlm", "ctm"
        ),
        "cpu_offload_with_hook of the VLM": lambda: offloaded(
            accelerate.cpu_offload_with_hook, "vlm", "ctm", "sam"
        ),
        "sam on the CPU": lambda: load(device_map={"vlm": DEVICE, "ctm": DEVICE, "sam": "cpu"}),
        "sam on the disk": lambda: load(device_map={"vlm": DEVICE, "ctm": DEVICE, "sam": "disk"}),
        "vlm on the CPU": lambda: load(device_map={"vlm": "cpu", "ctm": "disk", "sam": DEVICE}),
    }
    for name, make in ways.items():
        for a, b in zip(run(make()), expected, strict=True):
            assert a == b if a is None or isinstance(a, str) else torch.equal(a, b), name
    sys.stdout.write(f"all equal: {', '.join(ways)}\n")


if __name__ == "__main__":
    main()
