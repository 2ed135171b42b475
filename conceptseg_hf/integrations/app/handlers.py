"""What the components of the page call. Handlers return new values by the names of the components."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...writing import image_bytes, write_file
from .examples import load_example
from .figures import draw_check, draw_layers, draw_reference
from .folders import ImageOutcome, segment_images, write_archive
from .marks import mark_reference
from .sessions import Demo, Session, caption_references, describe_route

Updates = dict[str, Any]

_MAX_REFERENCES = 9
_MAX_SHOWN = 24


class Download:
    """A new file of a download button; None disables the button."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path


class Handlers:
    """The handlers of a page.

    Args:
        demo: The model.
    """

    def __init__(self, demo: Demo) -> None:
        self.demo = demo

    def load_example(self, name: str | None, session: Session) -> Updates:
        """Show an example."""
        if name is None:
            return {}
        example = load_example(name)
        session.references = list(example.references)
        return {"image": example.image, "prompt": example.prompt, "added": _gallery(session)}

    def add_reference(self, marked: dict[str, Any] | None, kind: str, box: str, session: Session) -> Updates:
        """Add the image of the editor with its marks to the references."""
        if marked is None:
            raise ValueError("there is no reference image; drop one in the editor.")
        if len(session.references) == _MAX_REFERENCES:
            raise ValueError(f"there are {_MAX_REFERENCES} references already; remove some first.")
        session.references.append(mark_reference(marked["background"], marked["layers"], kind, box))
        return {"added": _gallery(session), "editor": None, "box": ""}

    def clear_references(self, session: Session) -> Updates:
        """Remove all references."""
        session.references = []
        return {"added": []}

    def run(
        self,
        image: Image.Image | None,
        prompt: str,
        router: str,
        layers: Sequence[str],
        session: Session,
        rule: str | None = None,
    ) -> Iterator[Updates]:
        """Segment the image, and show the text of the VLM while it is written."""
        image = _check_inputs(image, prompt)
        references = tuple(session.references)
        yield {"status": "Running…", "rationale": "", "mask_file": Download()}
        for item in self.demo.stream(session, image, prompt, router, rule):
            if isinstance(item, str):
                yield {"rationale": item}
                continue
            if item.error is not None or item.mask is None:
                raise ValueError(item.error)
            session.image, session.result = image, item
            path = self.demo.new_file("mask.png")
            write_file(path, image_bytes(item.mask))
            yield {
                "status": describe_route(item) + self._describe_unknown_words(prompt),
                "rationale": item.completion or "SAM 3 answered alone; there is no text.",
                "result": draw_layers(image, item, layers),
                "mask_file": Download(path),
                "rule": item.rule or "",
                "check": draw_check(references, item),
            }

    def _describe_unknown_words(self, prompt: str) -> str:
        """Return HTML that names the words of the prompt that the model does not know; empty if it knows all."""
        words = self.demo.processor.unknown_words(prompt)
        return f"<br>not in the model's vocabulary: {html.escape(', '.join(words))}" if words else ""

    def run_with_rule(
        self, image: Image.Image | None, prompt: str, layers: Sequence[str], rule: str, session: Session
    ) -> Iterator[Updates]:
        """Segment the image with a given rule."""
        if not rule.strip():
            raise ValueError('the rule is empty; type one, such as "the striped object".')
        yield from self.run(image, prompt, "adaptive", layers, session, rule)

    def show_layers(self, layers: Sequence[str], session: Session) -> Updates:
        """Draw the last result with other layers."""
        if session.image is None or session.result is None:
            return {}
        return {"result": draw_layers(session.image, session.result, layers)}

    def compare(
        self, image: Image.Image | None, prompt: str, layers: Sequence[str], session: Session
    ) -> Iterator[Updates]:
        """Segment the image on all routes."""
        image = _check_inputs(image, prompt)
        found: list[Any] = []
        yield {"status": "Running all routes…", "compared": []}
        for router, result in self.demo.compare(session, image, prompt):
            caption = f"{router}: {result.route}, score {result.score:.2f}"
            found.append((draw_layers(image, result, layers), caption))
            yield {"compared": list(found), "status": f"{len(found)} routes finished"}

    def induce(self, prompt: str, session: Session) -> Iterator[Updates]:
        """Induce a concept from the references."""
        _check_prompt(prompt)
        if not any(reference.is_marked for reference in session.references):
            raise ValueError("there is no marked reference; add one with a mask or a box.")
        yield {"status": "Inducing the concept…", "summary": "", "concept_file": Download()}
        path = self.demo.induce(session, prompt)
        assert session.concept is not None
        yield {
            "status": "The concept is ready.",
            "summary": session.concept.summary(),
            "concept_file": Download(path),
        }

    def apply(
        self, paths: Sequence[str] | None, layers: Sequence[str], session: Session
    ) -> Iterator[Updates]:
        """Apply the concept to uploaded files."""
        concept = session.concept
        if concept is None:
            raise ValueError("there is no concept; induce one first.")
        if not paths:
            raise ValueError("there are no images; upload some first.")
        outcomes: list[ImageOutcome] = []
        shown: list[Any] = []
        yield {"applied": [], "archive": Download()}
        for outcome in segment_images(
            paths, lambda image: self.demo.segment(session, image, concept.prompt, concept=concept)
        ):
            outcomes.append(outcome)
            if outcome.image is not None and len(shown) < _MAX_SHOWN:
                caption = f"{outcome.name}: {outcome.result.route}, {outcome.result.score:.2f}"
                shown.append((draw_layers(outcome.image, outcome.result, layers), caption))
            yield {"applied": list(shown), "status": f"{len(outcomes)} of {len(paths)} images"}
        failed = [outcome.result.error for outcome in outcomes if outcome.result.error is not None]
        status = f"{len(outcomes)} images, {len(failed)} failed." + (
            f" {html.escape(failed[0])}" if failed else ""
        )
        path = write_archive(self.demo.new_file("masks.zip"), outcomes)
        yield {"status": status, "archive": Download(path)}

    def start(self, session: Session) -> Updates:
        """Allow the next run."""
        session.canceled = False
        return {}

    def cancel(self, session: Session) -> Updates:
        """End the current run."""
        session.canceled = True
        return {}


def _gallery(session: Session) -> list[Any]:
    captions = caption_references(session.references)
    return [(draw_reference(item), caption) for item, caption in zip(session.references, captions)]


def _check_inputs(image: Image.Image | None, prompt: str) -> Image.Image:
    if image is None:
        raise ValueError("there is no image; drop one, or choose an example.")
    _check_prompt(prompt)
    return image


def _check_prompt(prompt: str) -> None:
    if not prompt or not prompt.strip():
        raise ValueError('the concept is empty; type one, such as "red circle".')
