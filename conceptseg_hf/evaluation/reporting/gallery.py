"""Galleries: cases of a run on a self-contained HTML page with embedded images and without scripts."""

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
from ...visualization import draw_box, draw_mosaic, heatmap_overlay, resize_to_height, scaled_overlay
from ...writing import write_file
from ..records import shown_references
from ..records.prior import decode_heatmap
from ..records.rle import decode_mask
from ..records.samples import sample_to_show
from ..records.store import Record
from .tables import fraction, provenance_line

CASES = 12
"""Default number of cases per section."""

_HEIGHT = 224
_MAX_BYTES = 4_500_000

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #202020; background: #fff; margin: 2rem auto; max-width: 60rem;
  padding: 0 1rem; }
article { border-top: 1px solid #ddd; padding: 1rem 0; }
.images { display: flex; flex-wrap: wrap; gap: 0.75rem; }
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
    """A section of a page.

    Attributes:
        heading: The heading.
        note: A sentence below the heading that describes the cases.
        cases: HTML `article` elements, one per case.
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
    """Write a page of the worst cases of a run and of the cases around its median.

    Args:
        path: The HTML file.
        records: The records of the run.
        settings: The settings of the run.
        samples: The samples of the records, in the same order; only those on the page are read.
        count: Maximum number of cases per section.
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
            ("Median cases", "The samples around the median foreground IoU.", median),
        )
    ]
    write_page(path, "Worst and median cases", provenance_line(settings, len(records)), sections)


def write_prior_gallery(
    path: str | Path,
    records: Sequence[Record],
    settings: Mapping[str, Any],
    samples: Sequence[ConceptSample],
    count: int = CASES,
) -> None:
    """Write a page of heatmap overlays of CoPRS beside masks and ground truths.

    Args:
        path: The HTML file.
        records: The records of the run; those without a prior are not shown.
        settings: The settings of the run.
        samples: The samples of the records, in the same order; only those on the page are read.
        count: Maximum number of cases per section.
    """
    with_prior = [index for index, record in enumerate(records) if record.get("prior") is not None]
    positions = range(min(count, len(with_prior)))
    evenly = [with_prior[position * len(with_prior) // len(positions)] for position in positions]
    scored = [
        (abs(records[index]["prior"]["iou"] - records[index]["foreground_iou"]), -index)
        for index in with_prior
        if records[index]["prior"].get("iou") is not None and records[index]["foreground_iou"] is not None
    ]
    differing = [-index for _, index in sorted(scored, reverse=True)[:count]]
    sections = [
        Section(heading, note, (_case(records[index], samples, index, settings) for index in indices))
        for heading, note, indices in (
            ("A sample of the run", "Samples at equal distances, whatever their results.", evenly),
            (
                "Prior and mask differ",
                "The samples with the largest differences of prior IoU (threshold 0.5) and foreground IoU.",
                differing,
            ),
        )
    ]
    write_page(path, "Positional priors", provenance_line(settings, len(records)), sections)


def write_page(path: str | Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write a page of cases; cases beyond a size of 4.5 MB are omitted and counted in the note of their section."""
    size = 0
    section_parts = []
    for section in sections:
        shown, omitted = [], 0
        for case in section.cases:
            if size + len(case) > _MAX_BYTES:
                omitted += 1
                continue
            size += len(case)
            shown.append(case)
        note = section.note + (f" {omitted} are omitted to keep the page small." if omitted else "")
        body = "".join(shown) or "<p>None.</p>"
        section_parts.append(
            f"<section><h2>{html.escape(section.heading)}</h2><p>{html.escape(note)}</p>{body}</section>\n"
        )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(subtitle)}</p>\n{''.join(section_parts)}</body>\n</html>\n"
    )
    write_file(path, page)


def case_html(title: str, images: Sequence[tuple[str, Image.Image]], facts: Mapping[str, Any]) -> str:
    """Return the HTML of a case.

    Args:
        title: The heading.
        images: Captions and images.
        facts: Values by name that are shown below the images; None values are omitted.
    """
    figures = "".join(
        f'<figure><img src="{_data_url(image)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, image in images
    )
    lines = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in facts.items()
        if value is not None
    )
    return (
        f"<article><h3>{html.escape(title)}</h3>"
        f'<div class="images">{figures}</div><dl>{lines}</dl></article>\n'
    )


def ground_truth_images(
    sample: ConceptSample,
    limit: int | None = None,
    record: Record | None = None,
    mosaic: Mapping[str, Any] | None = None,
) -> list[tuple[str, Image.Image]]:
    """Return the references as in the VLM's input, and the target with its ground truth mask, each with a caption.

    Args:
        sample: The sample.
        limit: `max_references` of the run.
        record: The record of the sample, for the check box.
        mosaic: The `MosaicSettings` of the run, if they are not the defaults.
    """
    images = []
    references = shown_references(sample, limit)
    if references:
        check = None
        if record is not None and record["check"] is not None and record["check_reference"] is not None:
            check = (record["check_reference"], record["check"])
        caption = "references" if check is None else "references and the check box"
        with suppress(OSError, ValueError):  # invalid references are not drawn; the record has the error
            drawn = draw_mosaic(references, _HEIGHT, check, MosaicSettings.from_dict(mosaic or {}))
            images.append((caption, drawn))
    caption = "ground truth" if sample.present else "target; the concept is absent"
    images.append((caption, _target_with_mask(sample)))
    return images


def prediction_image(sample: ConceptSample, record: Record) -> Image.Image:
    """Return the target with the mask and the box of a record."""
    mask = record.get("mask")
    target = load_image(sample.image)
    image = scaled_overlay(target, None if mask is None else decode_mask(mask), _HEIGHT)
    if record["box"] is not None:
        scale_x, scale_y = image.width / target.width, image.height / target.height
        x1, y1, x2, y2 = record["box"]
        image = draw_box(image, (x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y))
    return image


def prior_image(sample: ConceptSample, record: Record) -> Image.Image | None:
    """Return the target with the positional prior of a record; None if it has none."""
    if record.get("prior") is None:
        return None
    target = load_image(sample.image)
    heatmap = decode_heatmap(record["prior"]["heatmap"])
    return resize_to_height(heatmap_overlay(target, heatmap), _HEIGHT)


def result_facts(record: Record) -> dict[str, Any]:
    """Return the facts of a record that explain its result."""
    if record["error"] is not None:
        return {"failed": record["error"]}
    route = record["route"]
    if record["presence"] is not None:
        route += (
            f"; presence in SAM 3's first pass {record['presence']:.2f}, threshold {record['threshold']:.2f}"
        )
    if (prior := record.get("prior")) is not None:
        return {
            "foreground IoU": fraction(record["foreground_iou"]),
            "prior IoU": None if prior.get("iou") is None else fraction(prior["iou"]),
            "AUROC of the prior": None if prior.get("auroc") is None else fraction(prior["auroc"]),
            "reasoning": record["think"] or "none given",
        }
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
    """Return the heading of a case: level, group, dataset and sample id."""
    names = (record["level"], record["group"], record.get("dataset"), record["sample_id"])
    return " · ".join(str(name) for name in names if name)


def _case(record: Record, samples: Sequence[ConceptSample], index: int, settings: Mapping[str, Any]) -> str:
    sample = sample_to_show(samples, index)
    images = []
    if isinstance(sample, ConceptSample):
        images = ground_truth_images(sample, settings.get("max_references"), record, settings.get("mosaic"))
        if (prior := prior_image(sample, record)) is not None:
            images.append(("positional prior", prior))
        if record["error"] is None:
            caption = "prediction" if record["box"] is None else "prediction and the VLM's box"
            images.append((caption, prediction_image(sample, record)))
    facts = {"prompt": record["prompt"], "ground truth answer": record.get("gt_answer")} | result_facts(
        record
    )
    return case_html(case_title(record), images, facts)


def _target_with_mask(sample: ConceptSample) -> Image.Image:
    return scaled_overlay(load_image(sample.image), sample.mask if sample.present else None, _HEIGHT)


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
