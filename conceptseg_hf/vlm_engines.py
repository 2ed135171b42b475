"""Selection of the engine that writes the completions of the VLM: Transformers (the default) or vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from .generation import GeneratedCompletions
    from .inputs import PreparedSample
    from .modeling_conceptseg import ConceptSegForSegmentation
    from .processing_conceptseg import ConceptSegProcessor

VLM_ENGINES = ("transformers", "vllm")


class VlmEngine(Protocol):
    """An engine other than Transformers."""

    name: str

    def generate(
        self,
        model: ConceptSegForSegmentation,
        processor: ConceptSegProcessor,
        samples: Sequence[PreparedSample],
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    ) -> GeneratedCompletions:
        """Return what `generate_with_states` returns for the same samples and settings."""
        ...


class VlmEngineMixin:
    """Methods of a model that select the engine of its VLM."""

    _engine_name: str = "transformers"
    _engine: VlmEngine | None = None

    @property
    def vlm_engine(self) -> VlmEngine | None:
        """The selected engine; None for Transformers."""
        return None if self._engine_name == "transformers" else self._engine

    def set_vlm_engine(
        self: Any, engine: str | VlmEngine, processor: ConceptSegProcessor | None = None, **options: Any
    ) -> None:
        """Select the engine that writes the completions of the VLM in `segment`.

        Args:
            engine: `"transformers"`, which also releases another engine; `"vllm"`, see `VllmEngine`; or an engine.
            processor: The processor from which the engine is built; by default the model's own.
            **options: Options of the engine.

        Raises:
            ImportError: If the engine is not installed.
            ValueError: If the engine is unknown, or cannot run this model.
        """
        if not isinstance(engine, str):
            self._engine, self._engine_name = engine, engine.name
            return
        check_vlm_engine(engine)
        if engine == "transformers":
            self._engine = None
        elif self._engine is None or self._engine.name != engine or options:
            from .vllm_engine import VllmEngine

            self._engine = None  # frees its memory before the next one is built
            self._engine = VllmEngine(self, self.processor if processor is None else processor, **options)
        self._engine_name = engine

    @contextmanager
    def using_vlm_engine(
        self: Any, engine: str | None, processor: ConceptSegProcessor | None = None
    ) -> Iterator[None]:
        """Select an engine within the context; None keeps the current one.

        The engine is kept for the next context, because building one takes seconds.

        Args:
            engine: `"transformers"` or `"vllm"`.
            processor: See `set_vlm_engine`.
        """
        if engine is None:
            yield
            return
        check_vlm_engine(engine)
        previous = self._engine_name
        if engine == "transformers":
            self._engine_name = engine
        else:
            self.set_vlm_engine(engine, processor)
        try:
            yield
        finally:
            self._engine_name = previous


def check_vlm_engine(name: str) -> None:
    """Raise a ValueError if the name of an engine is unknown."""
    if name not in VLM_ENGINES:
        raise ValueError(f"vlm_engine is {name!r}; use one of {', '.join(map(repr, VLM_ENGINES))}.")
