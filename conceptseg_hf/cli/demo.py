"""`conceptseg demo`: segmentation of drawings and photographs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_model_options, add_output_option, as_bad_input, load_model, positive_int
from .outputs import check_output_dir

if TYPE_CHECKING:
    from conceptseg_hf import ConceptSegForSegmentation, ConceptSegmentation, ConceptSegProcessor
    from conceptseg_hf.data import ConceptSample

# The benchmark cycles through its ten groups, so that these samples cover all of them and are not hand-picked.
_SAMPLES = 12
_BATCH = 4
_PHOTOS = "CONCEPTSEG_PHOTOS"


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "demo",
        help="segment the first ConceptShapes test samples, and photographs",
        description="Segments the first test samples of ConceptShapes, which cover all of its groups, with nano, and "
        "photographs with mini, and writes visualizations and results.json.",
    )
    parser.add_argument(
        "--samples",
        type=positive_int,
        default=_SAMPLES,
        metavar="N",
        help="number of samples of each kind (default: %(default)s)",
    )
    parser.add_argument(
        "--photos",
        metavar="DIR",
        default=os.environ.get(_PHOTOS),
        help="folder of the benchmark photos, of which the first test sample of each group is shown as well (default: "
        f"the environment variable {_PHOTOS}, if it is set)",
    )
    add_model_options(parser)
    add_output_option(parser, "demo_output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    folder = check_output_dir(arguments.output_dir, "results.json")
    drawings, photographs = _drawings(arguments), _photographs(arguments)

    from conceptseg_hf.writing import write_json

    records: list[dict[str, Any]] = []
    loaded = None
    for title, default, samples in (
        ("ConceptShapes", "nano", drawings),
        ("Photographs", "mini", photographs),
    ):
        name = arguments.model or default
        if loaded is None or arguments.model is None:
            loaded = load_model(argparse.Namespace(**{**vars(arguments), "model": name}))
        shown = _segment(*loaded, arguments.router, samples, folder, len(records))
        print(f"{title}, {name}:\n{_table(shown)}")
        present = [record["foreground_iou"] for record in shown if record["present"]]
        if present:
            print(
                f"mean foreground IoU over the {len(present)} samples that contain their concept: "
                f"{sum(present) / len(present):.2f}\n"
            )
        records += shown
    as_bad_input(write_json, folder / "results.json", records)
    print(f"wrote {len(records)} visualizations and results.json to {folder}")
    return 0


def _drawings(arguments: argparse.Namespace) -> list[ConceptSample]:
    from conceptseg_hf.data import load_benchmark

    return list(load_benchmark("concept-shapes", split="test", limit=arguments.samples))


def _photographs(arguments: argparse.Namespace) -> list[ConceptSample]:
    """Return the first photographs of the smoke set, and the first test sample of each group of `--photos`."""
    from conceptseg_hf.data import SMOKE_PHOTOS, load_benchmark

    samples = list(load_benchmark("plain", root=SMOKE_PHOTOS, split="test", limit=arguments.samples))
    if arguments.photos is None:
        return samples
    benchmark = as_bad_input(load_benchmark, "photos", root=arguments.photos, split="test")
    firsts: dict[tuple[str, str], int] = {}
    for index, item in enumerate(benchmark.items):
        firsts.setdefault((item.level, item.group), index)
    return samples + [as_bad_input(benchmark.__getitem__, index) for index in firsts.values()]


def _segment(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    router: str,
    samples: list[ConceptSample],
    folder: Path,
    number: int,
) -> list[dict[str, Any]]:
    """Segment samples, write their visualizations and return their records."""
    from conceptseg_hf.evaluation.records import segment_samples
    from conceptseg_hf.progress import progress_bar

    records: list[dict[str, Any]] = []
    with progress_bar(len(samples), "images", leave=False) as bar:
        for start in range(0, len(samples), _BATCH):
            batch = samples[start : start + _BATCH]
            results = segment_samples(model, processor, batch, router=router)
            for sample, result in zip(batch, results, strict=True):
                records.append(_save(sample, result, folder, number + len(records) + 1))
            bar.update(len(batch))
    return records


def _save(sample: ConceptSample, result: ConceptSegmentation, folder: Path, number: int) -> dict[str, Any]:
    """Write the visualization of one sample and return its record."""
    from conceptseg_hf.evaluation.records import make_record
    from conceptseg_hf.visualization import caption_of, panel
    from conceptseg_hf.writing import image_bytes, write_file

    name = f"{number:02d}_{sample.level}_{sample.group.replace(' ', '-')}.png"
    # Only CoPRS returns heatmaps by default.
    record = {"picture": name} | make_record(sample, result, has_prior=result.heatmap is not None)
    check_box, index = result.check, result.check_reference
    check = None if check_box is None or index is None else (index, check_box)
    figure = panel(
        sample.image,
        result.mask,
        references=sample.references,
        box=result.box,
        check=check,
        ground_truth=sample.mask,
        heatmap=result.heatmap,
        caption=caption_of(result, sample.prompt, f"foreground IoU {record['foreground_iou']:.2f}"),
    )
    as_bad_input(write_file, folder / name, image_bytes(figure))
    return record


def _table(records: list[dict[str, Any]]) -> str:
    columns = ("level", "group", "prompt", "route", "answer", "IoU")
    rows: list[tuple[str, ...]] = [columns]
    for record in records:
        iou = (
            f"{record['foreground_iou']:.2f}"
            if record["present"]
            else ("rejected" if record["rejected"] else "not rejected")
        )
        rows.append(
            (
                record["level"],
                record["group"],
                record["prompt"],
                record["route"] or "failed",
                record["label"],
                iou,
            )
        )
    rows = [tuple(cell if len(cell) <= 38 else cell[:37] + "…" for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )
