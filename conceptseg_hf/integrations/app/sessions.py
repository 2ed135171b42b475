"""Runs of the page on one model: streamed segmentation, induction and batches, which can be canceled."""

from __future__ import annotations

import html
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...concept_prompt import ConceptPrompt
from ...coprs import CoPRSForSegmentation
from ...induction import induce
from ...modeling_conceptseg import ConceptSegForSegmentation
from ...outputs import ConceptSegmentation
from ...processing_conceptseg import ConceptSegProcessor
from ...references import Reference
from ...router import ROUTER_MODES

_SECONDS_BETWEEN_TEXTS = 0.05  # the page is not updated more often


class Canceled(Exception):  # noqa: N818 (not an error)
    """The user has canceled the run."""


class Session:
    """State of one browser tab; not a dataclass, because Gradio sends those to the page.

    Attributes:
        references: The references that the user has added.
        image: Image of the result that the page shows.
        result: The result that the page shows.
        concept: The induced concept.
        canceled: Whether the current run is to end.
    """

    def __init__(self) -> None:
        self.references: list[Reference] = []
        self.image: Image.Image | None = None
        self.result: ConceptSegmentation | None = None
        self.concept: ConceptPrompt | None = None
        self.canceled = False

    def check(self, *_: Any) -> None:
        """Raise `Canceled` if the user has canceled the run; also a progress function."""
        if self.canceled:
            raise Canceled


class Demo:
    """A model with its processor, and the folder of the files that users download.

    Args:
        model: The model.
        processor: Its processor.

    Attributes:
        has_prior: Whether it is a CoPRS model, whose heatmaps are positional priors.
        routers: The router modes that it supports.
    """

    def __init__(self, model: ConceptSegForSegmentation, processor: ConceptSegProcessor) -> None:
        self.model, self.processor = model, processor
        # CoPRS always reasons, to a heatmap: it has no routes, rules, boxes and concepts.
        self.has_prior = isinstance(model, CoPRSForSegmentation)
        self.routers = ("full_reasoning",) if self.has_prior else ROUTER_MODES
        self._folder = tempfile.TemporaryDirectory(prefix="conceptseg-app-")

    def new_file(self, name: str) -> Path:
        """Return the path of a new file, in a folder of its own."""
        folder = Path(self._folder.name) / uuid.uuid4().hex
        folder.mkdir()
        return folder / name

    def stream(
        self,
        session: Session,
        image: Image.Image,
        prompt: str,
        router: str = "adaptive",
        rule: str | None = None,
        concept: ConceptPrompt | None = None,
    ) -> Iterator[str | ConceptSegmentation]:
        """Segment an image; yield the text of the VLM so far while it is written, then the result.

        Args:
            session: The session.
            image: The image.
            prompt: The concept.
            router: The router mode.
            rule: A rule that the VLM applies; see `ConceptSegForSegmentation.segment`.
            concept: A concept that SAM 3 applies.

        Raises:
            Canceled: If the user has canceled the run; the generation ends with the current token.
            ValueError: If an input is invalid.
        """
        session.check()
        sample = self.processor.prepare(image, prompt, tuple(session.references), lazy=True)
        items = self.model.stream_segment(
            [sample], self.processor, router=router, rule=rule, concept=concept, return_heatmap=True
        )
        text, shown = "", 0.0
        try:
            for item in items:
                session.check()
                if not isinstance(item, str):
                    yield item
                    continue
                text += item
                if time.monotonic() - shown >= _SECONDS_BETWEEN_TEXTS:
                    shown = time.monotonic()
                    yield text
        finally:
            items.close()  # type: ignore[attr-defined]  # a generator

    def segment(
        self, session: Session, image: Image.Image, prompt: str, **arguments: Any
    ) -> ConceptSegmentation:
        """Return the result of `stream`."""
        *_, result = self.stream(session, image, prompt, **arguments)
        assert isinstance(result, ConceptSegmentation)
        return result

    def compare(
        self, session: Session, image: Image.Image, prompt: str
    ) -> Iterator[tuple[str, ConceptSegmentation]]:
        """Yield the result of each router mode."""
        for router in self.routers:
            yield router, self.segment(session, image, prompt, router=router)

    def induce(self, session: Session, prompt: str) -> Path:
        """Induce a concept from the references of a session, and return its file.

        Raises:
            Canceled: If the user has canceled the run.
            ValueError: If the prompt or the references cannot be used.
        """
        session.check()
        session.concept = induce(
            self.model, self.processor, prompt, session.references, progress=session.check
        )
        return session.concept.save(self.new_file("concept.safetensors"))


def describe_route(result: ConceptSegmentation) -> str:
    """Return HTML with the route and its reason, and SAM 3's presence and the threshold as a bar."""
    route = {
        "shortcut": "SAM 3 alone (shortcut)",
        "concept": "SAM 3 with the concept",
        "rule": "reasoning with your rule",
        "reasoning": "reasoning",
    }.get(result.route or "", "failed")
    lines = [f"<strong>Route: {route}</strong>"]
    if result.route_reason:
        lines.append(html.escape(result.route_reason))
    if result.presence is not None and result.threshold is not None:
        text = f"presence {result.presence:.2f}, threshold {result.threshold:.2f}"
        lines.append(
            f'<span class="bar" role="img" aria-label="{text}"><span class="value" '
            f'style="width:{result.presence:.1%}"></span><span class="threshold" '
            f'style="left:{min(result.threshold, 0.995):.1%}"></span></span> {text}'
        )
    lines.append(f"score {result.score:.2f}, answer: {html.escape(result.label)}")
    if result.check_iou is not None:
        lines.append(f"IoU of the check with the withheld box: {result.check_iou:.2f}")
    return "<br>".join(lines)


def status_html(content: str) -> str:
    """Return HTML for the status line, which screen readers announce."""
    return f'<div role="status" aria-live="polite">{content}</div>'


def caption_references(references: Sequence[Reference]) -> list[str]:
    """Return a caption for each reference."""
    kinds = [
        "mask" if item.mask is not None else "box" if item.box is not None else "image" for item in references
    ]
    return [f"{number}: {kind}" for number, kind in enumerate(kinds, start=1)]
