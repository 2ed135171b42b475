"""Cases of a run as one HTML page that needs nothing else: pictures are embedded, there are no scripts."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...data import ConceptSample
from ...images import load_image
from ...mosaic import MosaicSettings
from ...visualization import draw_box, draw_mosaic, scaled_overlay
from ...writing import write_file
from ..records import shown_references
from ..records.rle import decode_mask
from ..records.samples import sample_to_show
from ..records.store import Record
from .tables import fraction, provenance_line

CASES = 12
"""Cases of each kind on a page."""

_HEIGHT = 224
_MOST_BYTES = 4_500_000

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #202020; background: #fff; margin: 2rem auto; max-width: 60rem;
  padding: 0 1rem; }
article { border-top: 1px solid #ddd; padding: 1rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 0.75rem; }
figure { margin: 0; }
figcaption { color: #595959; font-size: 13px; }
img { display: block; height: 224px; max-width: 100%; object-fit: contain; object-position: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; margin: 0.75rem 0 0; }
dt { color: #595959; }
dd { margin: 0; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0 0 0.5rem; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #161616; }
  article { border-color: #3a3a3a; }
  figcaption, dt { color: #a8a8a8; }
}
"""


@dataclass(frozen=True)
class Section:
    """A heading, a sentence below it, and cases.

    Attributes:
        heading: The heading.
        note: What the cases are.
        cases: Each the HTML of an `article`.
    """

    heading: str
    note: str
    cases: Iterable[str]


def write_gallery(
    path: str | Path,
    records: Sequence[Record],
    settings: Mapping[str, Any],
    samples: Sequence[ConceptSample],
    count: int = CASES,
) -> None:
    """Writes the page of the worst cases of a run and of those around its median.

    Args:
        path: The HTML file.
        records: The records of the run.
        settings: Its settings.
        samples: The samples of the records, in their order; only those on the page are read.
        count: Cases of each kind.
    """
    scored = [index for index, record in enumerate(records) if record["foreground_iou"] is not None]
    by_iou = sorted(scored, key=lambda index: records[index]["foreground_iou"])
    worst = by_iou[:count]
    start = max(len(worst), (len(by_iou) - count) // 2)
    median = by_iou[start : start + count]
    sections = [
        Section(heading, note, (_case(records[index], samples, index, settings) for index in indices))
        for heading, note, indices in (
            ("Worst cases", "The samples with the lowest foreground IoU.", worst),
            ("Median cases", "The samples in the middle of all, ordered by foreground IoU.", median),
        )
    ]
    write_page(path, "Worst and median cases", provenance_line(settings, len(records)), sections)


def write_page(path: str | Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Writes a page of cases; what would make it larger than 4.5 MB is left out and said so."""
    size = 0
    parts = []
    for section in sections:
        shown, left_out = [], 0
        for case in section.cases:
            if size + len(case) > _MOST_BYTES:
                left_out += 1
                continue
            size += len(case)
            shown.append(case)
        note = section.note + (f" {left_out} are left out to keep the page small." if left_out else "")
        body = "".join(shown) or "<p>None.</p>"
        parts.append(
            f"<section><h2>{html.escape(section.heading)}</h2><p>{html.escape(note)}</p>{body}</section>\n"
        )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(subtitle)}</p>\n{''.join(parts)}</body>\n</html>\n"
    )
    write_file(path, page)


def case_html(title: str, pictures: Sequence[tuple[str, Image.Image]], facts: Mapping[str, Any]) -> str:
    """One case.

    Args:
        title: Its heading.
        pictures: Captions and pictures.
        facts: What is written below; None is left out.
    """
    figures = "".join(
        f'<figure><img src="{_data_url(picture)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, picture in pictures
    )
    lines = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in facts.items()
        if value is not None
    )
    return (
        f"<article><h3>{html.escape(title)}</h3>"
        f'<div class="pictures">{figures}</div><dl>{lines}</dl></article>\n'
    )


def ground_truth_images(
    sample: ConceptSample,
    limit: int | None = None,
    record: Record | None = None,
    mosaic: Mapping[str, Any] | None = None,
) -> list[tuple[str, Image.Image]]:
    """The references, as the VLM sees them, and the target with its true mask.

    Args:
        sample: The sample.
        limit: `max_references` of the run.
        record: What the run made of it, for the check box.
        mosaic: The run's `MosaicSettings`, where they are not the usual ones.
    """
    pictures = []
    references = shown_references(sample, limit)
    if references:
        check = None
        if record is not None and record["check"] is not None and record["check_reference"] is not None:
            check = (record["check_reference"], record["check"])
        caption = "references" if check is None else "references and the check box"
        with suppress(OSError, ValueError):  # a reference that cannot be drawn: the record says what is wrong
            drawn = draw_mosaic(references, _HEIGHT, check, MosaicSettings.from_dict(mosaic or {}))
            pictures.append((caption, drawn))
    ground_truth = "truth" if sample.present else "target; the concept is absent"
    pictures.append((ground_truth, _overlaid(sample, sample.mask)))
    return pictures


def prediction_image(sample: ConceptSample, record: Record) -> Image.Image:
    """The target with the mask and the box of a record."""
    mask = record.get("mask")
    target = load_image(sample.image)
    picture = scaled_overlay(target, None if mask is None else decode_mask(mask), _HEIGHT)
    if record["box"] is not None:
        across, down = picture.width / target.width, picture.height / target.height
        x1, y1, x2, y2 = record["box"]
        picture = draw_box(picture, (x1 * across, y1 * down, x2 * across, y2 * down))
    return picture


def result_facts(record: Record) -> dict[str, Any]:
    """What a record says of how its mask came about."""
    if record["error"] is not None:
        return {"failed": record["error"]}
    route = record["route"]
    if record["presence"] is not None:
        route += f"; SAM 3's first look {record['presence']:.2f}, threshold {record['threshold']:.2f}"
    reasoned = record["route"] == "reasoning"
    return {
        "foreground IoU": fraction(record["foreground_iou"]),
        "route": route,
        "rule": (record["rule"] or "none given") if reasoned else None,
        "answer": (record["answer"] or "none given") if reasoned else None,
        "presence": fraction(record["decode_presence"]),
        "box IoU": None if record["box_iou"] is None else fraction(record["box_iou"]),
        "check IoU": None if record["check_iou"] is None else fraction(record["check_iou"]),
    }


def case_title(record: Record) -> str:
    """Where a case comes from."""
    names = (record["level"], record["group"], record.get("dataset"), record["sample_id"])
    return " · ".join(str(name) for name in names if name)


def _case(record: Record, samples: Sequence[ConceptSample], index: int, settings: Mapping[str, Any]) -> str:
    sample = sample_to_show(samples, index)
    pictures = []
    if isinstance(sample, ConceptSample):
        pictures = ground_truth_images(sample, settings.get("max_references"), record, settings.get("mosaic"))
        if record["error"] is None:
            caption = "prediction" if record["box"] is None else "prediction and the VLM's box"
            pictures.append((caption, prediction_image(sample, record)))
    facts = {"prompt": record["prompt"], "true answer": record.get("gt_answer")} | result_facts(record)
    return case_html(case_title(record), pictures, facts)


def _overlaid(sample: ConceptSample, mask: Image.Image) -> Image.Image:
    target = load_image(sample.image)
    return scaled_overlay(target, mask if sample.present else None, _HEIGHT)


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
