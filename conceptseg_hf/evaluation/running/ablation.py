"""Ablations: the same evaluation under settings that differ in one respect, defined in a YAML file.

A file has `title`, `note`, `baseline` (the name of a variant), `variants` (name -> settings), and `deviation: true` to
report mean and standard deviation over the variants. A variant sets any of `SETTINGS`; all other settings are shared.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ...data import load_benchmarks
from ...errors import one_line
from ...loading import load_model_and_processor
from ...modeling_conceptseg import ConceptSegForSegmentation
from ...processing_conceptseg import ConceptSegProcessor
from ...profiles import get_profile
from ...suggestions import did_you_mean
from ...writing import json_text, write_files
from ..distributed import join_processes
from ..metrics import METRICS
from ..reporting.bootstrap import RESAMPLES, Interval
from ..reporting.comparison import TIE, Comparison, compare
from ..reporting.report import EvaluationReport
from ..reporting.tables import (
    checkpoint_name,
    csv_text,
    fraction,
    heading_of,
    interval_text,
    interval_values,
    markdown_table,
    percent,
    provenance,
    provenance_line,
)
from .evaluator import evaluate

_MAX_NAME_BYTES = 255  # limit of most file systems
FOLDER = Path(__file__).with_name("ablations")

SETTINGS = {
    "router": str,
    "sam_prompt": str,
    "max_references": int,
    "seed": int,
    "generation": dict,
    "num_queries": int,
    "concept": str,
}
"""The settings of a variant and their types. `num_queries` is not set, but required of the variant's checkpoint."""

_TYPE_NAMES = {str: "a string", int: "an integer", dict: "a mapping"}
_COUNTS = ("better", "ties", "worse")


@dataclass(frozen=True)
class Ablation:
    """The definition of an ablation.

    Attributes:
        name: Name of the file, without its suffix.
        title: Title of the report.
        note: Explanation of the variants.
        baseline: The variant that all others are compared with.
        variants: Settings by the name of the variant.
        deviation: Whether to report mean and standard deviation over the variants.
    """

    name: str
    title: str
    note: str
    baseline: str
    variants: dict[str, dict[str, Any]]
    deviation: bool = False


def ablation_names() -> list[str]:
    """Return the names of the ablations in the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_ablation(name: str | os.PathLike) -> Ablation:
    """Read an ablation.

    Args:
        name: One of `ablation_names()`, or a YAML file.

    Raises:
        FileNotFoundError: If there is no such ablation.
        ValueError: If the file is invalid.
    """
    path = FOLDER / f"{name}.yaml" if str(name) in ablation_names() else Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"ablation {str(name)!r} is neither a file nor one of {', '.join(ablation_names())}"
            f"{did_you_mean(str(name), ablation_names())}."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"ablation {str(path)!r} is not YAML: {one_line(error)}.") from error
    where = f"ablation {path.name!r}"
    if not isinstance(content, dict) or not isinstance(content.get("variants"), dict):
        raise ValueError(f"{where}: it has no variants; list them by name, each with its settings.")
    known = {"title", "note", "baseline", "variants", "deviation"}
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; use some of {', '.join(sorted(known))}.")
    variants = {str(name): settings or {} for name, settings in content["variants"].items()}
    for variant, settings in variants.items():
        _check_variant(f"{where}, variant {variant!r}", settings)
    if len(variants) < 2:
        raise ValueError(f"{where}: it has {len(variants)} variants; give at least two.")
    baseline = str(content.get("baseline", next(iter(variants))))
    if baseline not in variants:
        raise ValueError(
            f"{where}: the baseline {baseline!r} is not a variant; use one of {', '.join(variants)}."
        )
    folders = [_folder_name(variant) for variant in variants]
    if too_long := [folder for folder in folders if len(folder.encode()) > _MAX_NAME_BYTES]:
        raise ValueError(
            f"{where}: the variant name {too_long[0][:40]!r}... is too long for a folder name; shorten it."
        )
    if len(set(folders)) < len(folders):
        raise ValueError(
            f"{where}: two variants would share a folder name; rename one of {', '.join(folders)}."
        )
    return Ablation(
        name=path.stem,
        title=str(content.get("title", path.stem)),
        note=str(content.get("note", "")),
        baseline=baseline,
        variants=variants,
        deviation=bool(content.get("deviation", False)),
    )


@dataclass(frozen=True)
class VariantRow:
    """One variant in the table.

    Attributes:
        variant: Name of the variant.
        stated: Provenance of the numbers; see `tables.provenance`.
        foreground_iou: Mean foreground IoU by level, over the samples that show their concept.
        total: Mean foreground IoU over these samples of all levels.
        mean_miou: Mean mIoU of the ten groups, in percent; None unless all ten are present.
        shortcut_share: Percentage of the samples that SAM 3 answered alone.
        difference: Difference of the foreground IoU to the baseline, paired by sample; None for the baseline.
        counts: Numbers of samples that are better than, tied with and worse than the baseline.
        mean_miou_difference: Difference of the mean mIoU to the baseline; None for the baseline.
    """

    variant: str
    stated: dict[str, Any]
    foreground_iou: dict[str, float | None]
    total: Interval | None
    mean_miou: Interval | None
    shortcut_share: float | None
    difference: Interval | None = None
    counts: tuple[int, int, int] | None = None
    mean_miou_difference: Interval | None = None

    @classmethod
    def of(cls, variant: str, report: EvaluationReport, comparison: Comparison | None) -> VariantRow:
        """Build the row of a report and of its comparison with the baseline."""
        by_level = {row["level"]: row for row in report.table if row["group"] == "all"}
        overall = by_level.pop("all")
        bounds = overall["foreground_iou_interval"]
        shortcut_share = overall["shortcut_share"]
        row = cls(
            variant,
            provenance(report.settings, len(report.records)),
            {level: level_row["foreground_iou"] for level, level_row in by_level.items()},
            None
            if bounds is None
            else Interval(overall["foreground_iou"], bounds[0], bounds[1], overall["samples"]),
            next((mean.intervals.get("miou") for mean in report.rows if mean.kind == "mean"), None),
            None if shortcut_share is None else 100 * shortcut_share,
        )
        if comparison is None:
            return row
        mean_of_groups = comparison.mean_of_groups
        totals = [
            compared for compared in comparison.table if (compared.level, compared.group) == ("all", "all")
        ]
        return replace(
            row,
            difference=totals[0].difference if totals else None,
            counts=(totals[0].wins, totals[0].ties, totals[0].losses) if totals else None,
            mean_miou_difference=mean_of_groups and mean_of_groups[1],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        intervals = {
            name: interval_values(value) if isinstance(value, Interval) else value
            for name, value in vars(self).items()
        }
        return intervals | {"counts": self.counts and dict(zip(_COUNTS, self.counts, strict=True))}

    def to_flat(self) -> dict[str, Any]:
        """Return the row as one line of a CSV file."""
        line: dict[str, Any] = {"variant": self.variant, **self.stated}
        line |= {f"fg IoU {level}": value for level, value in self.foreground_iou.items()}
        for name in ("total", "mean_miou", "difference", "mean_miou_difference"):
            line |= {
                f"{name} {end}": getattr(getattr(self, name), end, None) for end in ("mean", "low", "high")
            }
        line["shortcut_share"] = self.shortcut_share
        return line | dict(zip(_COUNTS, self.counts or (None, None, None), strict=True))


@dataclass(frozen=True)
class AblationReport:
    """The result of `ablate`.

    Attributes:
        ablation: The definition of the ablation.
        reports: The report of each variant.
        comparisons: The comparison of each variant with the baseline, except for the baseline.
    """

    ablation: Ablation
    reports: dict[str, EvaluationReport]
    comparisons: dict[str, Comparison]

    @cached_property
    def table(self) -> list[VariantRow]:
        """A row per variant."""
        return [
            VariantRow.of(name, report, self.comparisons.get(name)) for name, report in self.reports.items()
        ]

    @property
    def deviations(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Mean and standard deviation (n - 1) over the variants, in percent: level -> metric -> (mean, deviation)."""
        values_by_level: dict[str, dict[str, list[float]]] = {}
        for report in self.reports.values():
            for row in report.rows:
                if row.kind in ("level", "mean"):
                    values_by_metric = values_by_level.setdefault(row.level or "mean of the ten groups", {})
                    for metric, value in row.values.items():
                        values_by_metric.setdefault(metric, []).extend([] if value is None else [value])
        return {
            level: {
                metric: (statistics.fmean(values), statistics.stdev(values))
                for metric, values in metrics.items()
                if len(values) > 1
            }
            for level, metrics in values_by_level.items()
        }

    def to_markdown(self) -> str:
        """Return the table in Markdown, with the settings above and the meaning of the columns below."""
        first = self.reports[self.ablation.baseline]
        lines = [f"# {self.ablation.title}", "", self.ablation.note, ""]
        lines += [f"Baseline: {provenance_line(first.settings, len(first.records))}", ""]
        heading = ["variant", "n", *(f"fg IoU {level}" for level in first.levels), "fg IoU [95 % interval]"]
        heading += ["mean mIoU [95 % interval]", "to SAM 3 (%)", "fg IoU - baseline", "better/tie/worse"]
        heading += ["mean mIoU - baseline"]
        rows = [
            [
                row.variant,
                str(row.stated["samples"]),
                *(fraction(row.foreground_iou.get(level)) for level in first.levels),
                interval_text(row.total, 3),
                interval_text(row.mean_miou),
                percent(row.shortcut_share),
                interval_text(row.difference, 3, signed=True),
                "/".join(map(str, row.counts)) if row.counts else "-",
                interval_text(row.mean_miou_difference, signed=True),
            ]
            for row in self.table
        ]
        lines += [*markdown_table(heading, rows), ""]
        lines += [
            "- fg IoU: mean foreground IoU of the samples that show their concept.",
            "- mean mIoU: mean over the ten groups of Table 1, with all samples, in percent.",
            f"- baseline: {self.ablation.baseline}; differences are paired by sample.",
            f"- better/tie/worse: numbers of samples; foreground IoUs that differ by at most {TIE} are a tie.",
            f"- 95 % intervals: bootstrap over samples ({RESAMPLES:,} resamples), without variation between trainings.",
        ]
        lines += ["", "Foreground IoU minus the baseline's, by level:", "", *self._by_level()]
        if self.ablation.deviation:
            metrics = first.settings["metrics"]
            cells = [
                [level, *(_deviation(values.get(metric)) for metric in metrics)]
                for level, values in self.deviations.items()
            ]
            lines += [
                "",
                f"Mean ± standard deviation over the {len(self.reports)} variants, as Table 11:",
                "",
            ]
            lines += markdown_table(["level", *map(heading_of, metrics)], cells)
        return "\n".join(lines)

    def _by_level(self) -> list[str]:
        compared = {
            name: {
                row.group if row.group == "absent" else row.level: row.difference
                for row in comparison.table
                if row.group in ("all", "absent")
            }
            for name, comparison in self.comparisons.items()
        }
        columns = list(dict.fromkeys(column for row in compared.values() for column in row))
        rows = [
            [name, *(interval_text(row.get(column), 3, signed=True) for column in columns)]
            for name, row in compared.items()
        ]
        lines = markdown_table(["variant", *columns], rows)
        if "absent" in columns:
            lines += ["", "absent: samples without their concept; an empty mask counts as 1, any other as 0."]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers and their provenance as JSON values."""
        return {
            "ablation": vars(self.ablation),
            "table": [row.to_dict() for row in self.table],
            "comparisons": {name: comparison.to_dict() for name, comparison in self.comparisons.items()},
            "deviations": self.deviations if self.ablation.deviation else None,
        }

    def write(self, folder: str | os.PathLike) -> None:
        """Write ablation.md, ablation.json and ablation.csv."""
        folder = Path(folder)
        write_files(
            {
                folder / "ablation.md": self.to_markdown() + "\n",
                folder / "ablation.json": json_text(self.to_dict(), indent=2) + "\n",
                folder / "ablation.csv": csv_text([row.to_flat() for row in self.table]),
            }
        )


def ablate(
    ablation: Ablation,
    model_or_path: ConceptSegForSegmentation | str | os.PathLike | None,
    output_dir: str | os.PathLike,
    benchmark: str = "concept-shapes",
    processor: ConceptSegProcessor | None = None,
    models: Mapping[str, str | os.PathLike] | None = None,
    root: Any = None,
    split: str = "test",
    limit: int | None = None,
    protocol: str | None = None,
    metrics: Sequence[str] = METRICS,
    batch_size: int = 8,
    progress: bool = False,
    profile: str | None = None,
) -> AblationReport:
    """Evaluate every variant, each in a separate folder, and compare all variants with the baseline.

    An interrupted run is resumed; variants that are complete are not run again.

    Args:
        ablation: The definition of the ablation; see `load_ablation`.
        model_or_path: As in `evaluate`; the checkpoint of all variants that are not in `models`.
        output_dir: Folder of the results.
        benchmark: As in `evaluate`, by name.
        processor: The processor; required if `model_or_path` is a model.
        models: Checkpoints by variant name.
        root: As in `evaluate`.
        split: As in `evaluate`.
        limit: As in `evaluate`.
        protocol: As in `evaluate`.
        metrics: As in `evaluate`; miou is required and added if missing.
        batch_size: As in `evaluate`.
        progress: Show progress bars.
        profile: As in `evaluate`, for all variants.

    Raises:
        ValueError: If an argument is invalid, or the required checkpoint of a variant was not given.
    """
    models = models or {}
    if profile is not None:
        get_profile(profile)  # fails before a model is loaded
    if unknown := [name for name in models if name not in ablation.variants]:
        raise ValueError(
            f"ablate: {ablation.name!r} has no variant {unknown[0]!r}; use one of {', '.join(ablation.variants)}."
        )
    if not isinstance(model_or_path, ConceptSegForSegmentation):
        model_or_path, processor = load_model_and_processor(model_or_path)
    # Load and check all checkpoints before the first variant is run.
    loaded = {
        name: load_model_and_processor(models[name]) if name in models else (model_or_path, processor)
        for name in ablation.variants
    }
    for name, (model, _) in loaded.items():
        _check_queries(name, ablation.variants[name].get("num_queries"), model)
    metrics = tuple(metrics) if "miou" in metrics else ("miou", *metrics)
    folder = Path(output_dir)
    reports = {}
    for name, settings in ablation.variants.items():
        model, variant_processor = loaded[name]
        seed = settings.get("seed", 42)
        active_profile = get_profile(profile or model.config.profile or "paper")
        reports[name] = evaluate(
            model,
            load_benchmarks(
                benchmark, root=root, split=split, limit=limit, seed=seed, loader=active_profile.loader
            ),
            protocol=protocol,
            profile=profile,
            metrics=metrics,
            batch_size=batch_size,
            limit=limit,
            output_dir=folder / _folder_name(name),
            processor=variant_processor,
            progress=progress,
            router=settings.get("router", "adaptive"),
            sam_prompt=settings.get("sam_prompt", "concept+text"),
            max_references=settings.get("max_references"),
            generation_config=settings.get("generation"),
            concept=settings.get("concept"),
        )
    processes = join_processes()
    processes.barrier()  # wait until the main process has merged the last records
    baseline = folder / _folder_name(ablation.baseline)
    comparisons = {
        name: compare(baseline, folder / _folder_name(name), (ablation.baseline, name))
        for name in ablation.variants
        if name != ablation.baseline
    }
    report = AblationReport(ablation, reports, comparisons)
    if processes.is_main:
        report.write(folder)
    return report


def _check_variant(where: str, settings: Any) -> None:
    if not isinstance(settings, dict):
        raise ValueError(
            f"{where}: the settings are {settings!r}; give a mapping with some of {', '.join(SETTINGS)}."
        )
    for key, value in settings.items():
        if key not in SETTINGS:
            raise ValueError(f"{where}: unknown setting {key!r}; use some of {', '.join(SETTINGS)}.")
        if not isinstance(value, SETTINGS[key]) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} is {value!r}; give {_TYPE_NAMES[SETTINGS[key]]}.")


def _check_queries(variant: str, required: int | None, model: ConceptSegForSegmentation) -> None:
    num_queries = model.config.ctm_config.num_queries
    if required is not None and required != num_queries:
        name = checkpoint_name({"model": model.config.name_or_path})
        raise ValueError(
            f"ablate: variant {variant!r} needs a checkpoint with {required} concept queries, but {name!r} has "
            f"{num_queries}; train one (conceptseg train sft --num_concept_tokens {required}) and pass it with "
            f"--variant-model {variant + '=PATH'!r}."
        )


def _deviation(mean_and_deviation: tuple[float, float] | None) -> str:
    if mean_and_deviation is None:
        return "-"
    return f"{mean_and_deviation[0]:.2f} ± {mean_and_deviation[1]:.2f}"


def _folder_name(variant: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", variant).strip("-.") or "variant"
