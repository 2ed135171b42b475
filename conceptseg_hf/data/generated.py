"""Base class of the generated benchmarks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

from .sample import ConceptSample


class GeneratedBenchmark(Sequence[ConceptSample]):
    """A sequence of samples that are generated when they are accessed.

    Attributes:
        length: Number of samples.
    """

    length: int

    @abstractmethod
    def generate(self, index: int) -> ConceptSample:
        """Generate the sample at an index of 0 or more."""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> ConceptSample:  # type: ignore[override]
        name = type(self).__name__
        if isinstance(index, slice):
            raise TypeError(f"{name}: slices are not supported; use `length=` or itertools.islice.")
        if not -self.length <= index < self.length:
            raise IndexError(f"{name}: index {index} is outside of 0..{self.length - 1}.")
        return self.generate(index % self.length)

    def __iter__(self) -> Iterator[ConceptSample]:
        for index in range(self.length):
            yield self[index]
