"""Conversion plans: mapping of source tensors to target tensors from names and shapes, before weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from ..configuration_conceptseg import ConceptSegConfig
from ..finite import is_finite
from ..modeling_conceptseg import ConceptSegForSegmentation
from .errors import ConversionError
from .sam3 import Piece
from .sources import TensorInfo, WeightSource

_SHOWN = 3  # maximum number of names per kind of mismatch in a message

Rename = Callable[[str], "Sequence[Piece] | None"]


@dataclass(frozen=True)
class Step:
    """One tensor to write.

    Attributes:
        source: Source that the tensor is read from.
        name: Name of the source tensor.
        piece: Part of the source tensor that is used, and the operation on it.
        target: Name of the written tensor.
        shape: Shape of the written tensor.
        dtype: Dtype of the written tensor.
    """

    source: WeightSource
    name: str
    piece: Piece
    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the written tensor in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Read and transform the tensor to write.

        Raises:
            ConversionError: If the tensor contains NaN or infinite values.
        """
        tensor = self.source.read(self.name)
        index, count = self.piece.part
        tensor = tensor.chunk(count, dim=0)[index]
        if self.piece.operation == "transpose":
            tensor = tensor.T
        elif self.piece.operation == "drop_first":
            tensor = tensor[:, 1:]
        if not is_finite(tensor):
            raise ConversionError(
                f"tensor {self.name!r} of {str(self.source.tensors[self.name].file)!r} contains NaN or infinite "
                "values; download the file again, or use another checkpoint."
            )
        return tensor.to(self.dtype).contiguous()


@dataclass
class Plan:
    """Steps of a conversion, and tensors that do not match.

    Attributes:
        steps: The tensors to write, in the order in which their files are read.
        missing: Tensors of the model that no source contains.
        unexpected: Tensors of the sources that the model does not have.
        misshapen: Tensors of different shape: (name in the source, shape in the source, shape in the model).
        ignored: Tensors that are skipped on purpose, such as those of SAM 3's tracker.
        tied: Tensors that must be equal: (source, name, name of the tensor it is tied to).
    """

    steps: list[Step] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    tied: list[tuple[WeightSource, str, str]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Total size of the written tensors in bytes."""
        return sum(step.nbytes for step in self.steps)

    @property
    def fits(self) -> bool:
        """Whether the sources contain exactly the tensors of the model."""
        return not (self.missing or self.unexpected or self.misshapen)

    def mismatches(self) -> str:
        """Describe the mismatched tensors for a message."""
        shapes = [f"{name}: {shape} instead of {expected}" for name, shape, expected in self.misshapen]
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes))
        return ", ".join(
            f"{len(names)} {kind} ({'; '.join(names[:_SHOWN])}{'; ...' if len(names) > _SHOWN else ''})"
            for kind, names in kinds
            if names
        )


def expected_tensors(config: ConceptSegConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes of all tensors of a converted checkpoint, and the tied tensors, which the checkpoint omits."""
    with torch.device("meta"):
        model = ConceptSegForSegmentation(config)
    tied = dict(model.all_tied_weights_keys)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: shape for name, shape in shapes.items() if name not in tied}, tied


def make_plan(
    parts: Iterable[tuple[WeightSource, Rename]],
    expected: Mapping[str, tuple[int, ...]],
    dtype_of: Callable[[str, torch.dtype], torch.dtype],
    rename_target: Callable[[str], str] = str,
    tied: Mapping[str, str] | None = None,
) -> Plan:
    """Plan which source tensor becomes which target tensor.

    Args:
        parts: Sources, each with a function that maps its tensor names to pieces (see `sam3.Piece`) with names of our
            model: `()` for ignored tensors, None for unknown tensors.
        expected: Names and shapes of the tensors of our model.
        dtype_of: Returns the target dtype for a name of our model and the source dtype.
        rename_target: Maps names of our model to names in the output file.
        tied: Tied tensors of our model, mapped to the tensors they are tied to. A source may contain both.

    Raises:
        ConversionError: If a tensor does not have a floating-point dtype, or two tensors have the same target.
    """
    plan, tied = Plan(), tied or {}
    origin: dict[str, tuple[WeightSource, str]] = {}  # source and name of each tensor of our model
    for source, rename in parts:
        for name, info in source.tensors.items():
            pieces = rename(name)
            if pieces is None:
                plan.unexpected.append(name)
            elif not pieces:
                plan.ignored.append(name)
            for piece in pieces or ():
                if piece.target in origin:
                    raise ConversionError(
                        f"tensors {origin[piece.target][1]!r} and {name!r} of {str(info.file)!r} would both become "
                        f"{piece.target!r}; keep one of them."
                    )
                origin[piece.target] = (source, name)
                if piece.target in tied:
                    continue
                shape, expected_shape = _shape_after(info.shape, piece), expected.get(piece.target)
                if expected_shape is None:
                    plan.unexpected.append(name)
                elif shape != expected_shape:
                    plan.misshapen.append((name, info.shape if shape is None else shape, expected_shape))
                else:
                    dtype = dtype_of(piece.target, _check_dtype(name, info))
                    plan.steps.append(Step(source, name, piece, rename_target(piece.target), shape, dtype))
    plan.missing = [name for name in expected if name not in origin]
    plan.tied = [
        (*origin[name], origin[other][1])
        for name, other in tied.items()
        if name in origin and other in origin
    ]
    return plan


def _check_dtype(name: str, info: TensorInfo) -> torch.dtype:
    if info.dtype is None or not info.dtype.is_floating_point:
        raise ConversionError(
            f"tensor {name!r} of {str(info.file)!r} does not have a floating-point dtype; give a checkpoint that is "
            "not quantized."
        )
    return info.dtype


def _shape_after(shape: tuple[int, ...], piece: Piece) -> tuple[int, ...] | None:
    """Return the shape of a piece of a tensor, or None if the shape does not permit the piece."""
    _, count = piece.part
    if count > 1:
        if not shape or shape[0] % count:
            return None
        shape = (shape[0] // count, *shape[1:])
    if piece.operation == "transpose":
        return shape[::-1] if len(shape) == 2 else None
    if piece.operation == "drop_first":
        return (shape[0], shape[1] - 1, *shape[2:]) if len(shape) > 1 else None
    return shape
