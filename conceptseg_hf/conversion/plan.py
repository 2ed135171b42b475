"""Which tensor becomes which, settled from names and shapes before a byte is read."""

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

_SHOWN = 3  # names of a kind in a message

Rename = Callable[[str], "Sequence[Piece] | None"]


@dataclass(frozen=True)
class Step:
    """One tensor to write.

    Attributes:
        source: Where it is read.
        name: Its name there.
        piece: What is taken of it.
        target: Its name in what is written.
        shape: Its shape there.
        dtype: Its number format there.
    """

    source: WeightSource
    name: str
    piece: Piece
    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of what is written."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor to write.

        Raises:
            ConversionError: If it holds values that are no numbers.
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
                f"tensor {self.name!r} of {str(self.source.tensors[self.name].file)!r} holds NaN or infinite "
                "values; download the file again, or take another checkpoint."
            )
        return tensor.to(self.dtype).contiguous()


@dataclass
class Plan:
    """All that a conversion will do, and what does not fit.

    Attributes:
        steps: The tensors to write, in the order in which their files are read.
        missing: Tensors of the model that no source has.
        unexpected: Tensors of the sources that the model does not have.
        misshapen: (name in the source, shape there, shape in the model).
        ignored: Tensors left behind on purpose, such as those of SAM 3's tracker.
        tied: Tensors that must equal another: (source, name, name of the other).
    """

    steps: list[Step] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    tied: list[tuple[WeightSource, str, str]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Size of what will be written."""
        return sum(step.nbytes for step in self.steps)

    @property
    def fits(self) -> bool:
        """Whether the sources are exactly what the model needs."""
        return not (self.missing or self.unexpected or self.misshapen)

    def mismatches(self) -> str:
        """What does not fit, in words."""
        shapes = [f"{name}: {got} instead of {wanted}" for name, got, wanted in self.misshapen]
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes))
        return ", ".join(
            f"{len(names)} {kind} ({'; '.join(names[:_SHOWN])}{'; ...' if len(names) > _SHOWN else ''})"
            for kind, names in kinds
            if names
        )


def expected_tensors(config: ConceptSegConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of all that a checkpoint of ours holds, and the tensors tied to one of them, which it omits."""
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
    """Settles which tensor becomes which.

    Args:
        parts: Sources, each with what its names become (see `sam3.Piece`) under names of our model: `()` for
            what is left behind, None for what is unknown.
        expected: Names and shapes of our model.
        dtype_of: The number format to write, by our name and the format found.
        rename_target: What our names become in the file that is written.
        tied: Tensors of our model that share another's values, which a source may hold all the same.

    Raises:
        ConversionError: If a tensor holds no real numbers, or two claim one place.
    """
    plan, tied = Plan(), tied or {}
    origin: dict[str, tuple[WeightSource, str]] = {}  # of each tensor of our model
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
                shape, wanted = _shape_after(info.shape, piece), expected.get(piece.target)
                if wanted is None:
                    plan.unexpected.append(name)
                elif shape != wanted:
                    plan.misshapen.append((name, info.shape if shape is None else shape, wanted))
                else:
                    dtype = dtype_of(piece.target, _checked_dtype(name, info))
                    plan.steps.append(Step(source, name, piece, rename_target(piece.target), shape, dtype))
    plan.missing = [name for name in expected if name not in origin]
    plan.tied = [
        (*origin[name], origin[other][1])
        for name, other in tied.items()
        if name in origin and other in origin
    ]
    return plan


def _checked_dtype(name: str, info: TensorInfo) -> torch.dtype:
    if info.dtype is None or not info.dtype.is_floating_point:
        raise ConversionError(
            f"tensor {name!r} of {str(info.file)!r} holds no plain floating-point numbers; give a checkpoint that is "
            "not quantised."
        )
    return info.dtype


def _shape_after(shape: tuple[int, ...], piece: Piece) -> tuple[int, ...] | None:
    """The shape that is left of a tensor, or None if the piece cannot be taken."""
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
