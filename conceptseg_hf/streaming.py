"""Streaming of completions: the text of the VLM while it is written, then the result."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .inputs import ConceptSegInputs, PreparedSample
from .outputs import ConceptSegmentation

if TYPE_CHECKING:
    from .processing_conceptseg import ConceptSegProcessor

_T = TypeVar("_T")
_INCOMPLETE = "\ufffd"  # decoders write it for the first bytes of a character


class TextPieces:
    """Convert the growing token ids of one completion to pieces of text that add up to the completion.

    Args:
        decode: Decodes token ids, (T,).
        on_text: Called with each piece.
        given: Token ids that the completion starts with.
    """

    def __init__(
        self, decode: Callable[[Tensor], str], on_text: Callable[[str], None], given: Tensor | None = None
    ) -> None:
        self._decode, self._on_text, self._given = decode, on_text, given
        self._sent = ""

    def update(self, token_ids: Tensor, mask: Tensor) -> None:
        """Send the text that the newest tokens add; see `on_tokens` of `generate_with_states`.

        Text that ends within a character is held back until the character is complete.
        """
        ids = token_ids[0][mask[0]]
        text = self._decode(ids if self._given is None else torch.cat([self._given.to(ids.device), ids]))
        if text.startswith(self._sent) and not text.endswith(_INCOMPLETE):
            self._send(text)

    def finish(self, text: str) -> None:
        """Send the rest of the completion; all of it if the engine reported no tokens."""
        self._send(text)

    def _send(self, text: str) -> None:
        piece = text[len(self._sent) :]
        self._sent = text
        if piece:
            self._on_text(piece)


class _ClosedError(Exception):
    """The consumer of a stream has closed it."""


def stream_call(
    function: Callable[[Callable[[str], None]], _T], device_type: str = "cpu"
) -> Iterator[str | _T]:
    """Yield the pieces of text that a function sends, then its result.

    The function runs in a thread, with the caller's context variables and autocast settings. If the iterator is closed,
    the function's next call of `on_text` raises an exception that ends it, and `close` returns after it has ended.

    Args:
        function: Called with `on_text`.
        device_type: Device type of the autocast settings.

    Raises:
        Exception: If the function raises an exception.
    """
    messages: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    closed = threading.Event()
    autocast = (
        torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type))
        if torch.is_autocast_enabled(device_type)
        else nullcontext()
    )

    def on_text(piece: str) -> None:
        if closed.is_set():
            raise _ClosedError
        messages.put(("text", piece))

    def run() -> None:
        try:
            with autocast:
                messages.put(("result", function(on_text)))
        except BaseException as error:  # raised in the thread of the consumer
            messages.put(("error", error))

    thread = threading.Thread(
        target=contextvars.copy_context().run, args=(run,), name="conceptseg-stream", daemon=True
    )
    thread.start()
    try:
        while True:
            kind, value = messages.get()
            if kind == "error":
                raise value
            yield value
            if kind == "result":
                return
    finally:
        closed.set()
        thread.join()


class StreamingMixin:
    """The method of a model that streams its results."""

    def stream_segment(
        self: Any,
        inputs: ConceptSegInputs | Sequence[PreparedSample] | None = None,
        processor: ConceptSegProcessor | None = None,
        **arguments: Any,
    ) -> Iterator[str | ConceptSegmentation]:
        """Segment prompts one after the other, and yield the text of the VLM while it is written.

        For each prompt, the iterator yields the pieces of its completion as strings and then its result. The pieces add
        up to `result.completion`; there are none if SAM 3 alone answers. Tokens and results equal those of
        `segment(..., batch_size=1)`. With another engine than Transformers, the completion is a single piece. Closing
        the iterator ends the generation.

        Args:
            inputs: See `segment`.
            processor: The processor that post-processes the results; by default the model's own.
            **arguments: Further arguments of `segment`, except `batch_size`.

        Returns:
            An iterator of strings and `ConceptSegmentation`s.

        Raises:
            ValueError: If the inputs are incomplete, or a setting is invalid.

        Example:
            >>> for item in model.stream_segment(processor(image, "the odd one out", references)):
            ...     print(item, end="") if isinstance(item, str) else item.mask.save("mask.png")
        """
        names = (*ConceptSegInputs.REQUIRED, *ConceptSegInputs.OPTIONAL)
        tensors = {name: arguments.pop(name) for name in names if name in arguments}
        if "batch_size" in arguments or "on_text" in arguments:
            raise ValueError(
                "stream_segment: batch_size and on_text do not apply to a stream; omit them, or call segment."
            )
        if (inputs is None) == (not tensors):
            raise ValueError(
                "stream_segment: pass the processor's output, as inputs or as keyword arguments."
            )
        given = tensors if inputs is None else inputs
        samples = ConceptSegInputs(dict(given)).samples if isinstance(given, Mapping) else list(given)
        own = self.processor if processor is None else processor
        self.segment([], processor=own, **arguments)  # reports invalid arguments before the iterator is used

        def results() -> Iterator[str | ConceptSegmentation]:
            for sample in samples:

                def segment(
                    on_text: Callable[[str], None], sample: PreparedSample = sample
                ) -> ConceptSegmentation:
                    return self.segment([sample], processor=own, on_text=on_text, **arguments)[0]

                yield from stream_call(segment, self.device.type)

        return results()


__all__ = ["StreamingMixin", "TextPieces", "stream_call"]
