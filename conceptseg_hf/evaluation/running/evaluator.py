"""Runs a model over benchmarks.

Every record is on disk as soon as it is made, so a killed run goes on where it stopped. Batches are the same however
many processes share them and wherever a run was stopped (one that was cut in two is run again), and so are results.
Samples that failed are tried again, as their files may have been mended.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch.utils.data import ConcatDataset, Subset

import conceptseg_hf

from ...data import BenchmarkGroup, ConceptSample, UnreadableSampleError, load_benchmarks
from ...data.groups import Root
from ...loading import configuration_hash, fingerprint, load_model_and_processor, profile_of
from ...modeling_conceptseg import ConceptSegForSegmentation
from ...outputs import ConceptSegmentation
from ...processing_conceptseg import ConceptSegProcessor
from ...profiles import describe_profile, get_profile, using_profile
from ...prompt_template import released_template
from ...router import ShortcutRouter
from ..distributed import Processes, join_processes
from ..metrics import METRICS, MaskMetrics, get_protocol
from ..records import (
    RECORD_FORMAT,
    make_error_record,
    make_record,
    segment_other_routes,
    segment_samples,
)
from ..records.samples import describe_samples, identify_sample, read_sample
from ..records.store import Record, RecordStore
from ..reporting.decomposition import CORRECT_IOU, Judge, check_judge, judge_records, resolve_judge
from ..reporting.report import EvaluationReport
from .progress import Progress


def evaluate(
    model_or_path: ConceptSegForSegmentation | str | os.PathLike | None,
    benchmark: str | Sequence[ConceptSample] | BenchmarkGroup,
    protocol: str | None = None,
    metrics: Sequence[str] = METRICS,
    router: str | ShortcutRouter = "adaptive",
    batch_size: int = 8,
    limit: int | None = None,
    output_dir: str | os.PathLike | None = None,
    split: str = "test",
    processor: ConceptSegProcessor | None = None,
    generation_config: Any = None,
    progress: bool = False,
    root: Root | Mapping[str, Root] = None,
    seed: int = 42,
    sam_prompt: str = "concept+text",
    max_references: int | None = None,
    routing_regret: bool = False,
    judgements: str | os.PathLike | Judge | None = None,
    profile: str | None = None,
    groups: Sequence[str] | None = None,
) -> EvaluationReport:
    """Scores a model on a benchmark, or on several.

    A sample that cannot be read ends with an error in its record and in the report, and the evaluation goes on.

    Processes that `accelerate launch` or torchrun started share the samples, if all of them call this; each returns the
    whole report, and the main one writes it. A program of theirs ends with `processes.join_processes().leave()`.

    Args:
        model_or_path: A checkpoint's folder or hub id, None for the embedded one, or a model, which needs
            `processor`.
        benchmark: A name that `load_benchmarks` knows: a benchmark, a group of the suite ("table1", "ci", "cd", "cr",
            "all") or several with commas between them; or what it returns; or samples that can be indexed.
        protocol: `"standard"`: masks are compared at the size of the images; `"paper"`, `"released"`: see `protocols`.
            None: the profile's, which is "standard" unless it says otherwise.
        metrics: Metrics of masks; those of `LIBRARY_METRICS` need `pip install conceptseg-hf[eval]`.
        router: `"adaptive"`, `"sam_only"`, `"full_reasoning"` or a `ShortcutRouter`.
        batch_size: Samples at a time.
        limit: Only the first samples, of each benchmark. A larger limit than before goes on in the same folder, a
            smaller one is refused there.
        output_dir: Folder for records.jsonl and the report; several benchmarks have a folder each in it. Records found
            there are kept, if they are of the same model, samples and settings, and only missing samples and those that
            failed are run. Needed where there are several processes.
        split: Split of benchmarks given by their own names.
        processor: The processor of a model given as such.
        generation_config: How the VLM writes; see `ConceptSegForSegmentation.segment`.
        progress: Show a progress bar (in the main process).
        root: Folder of the files of benchmarks given by name; see `load_benchmarks`.
        seed: Seed of their references; see `load_benchmark`.
        sam_prompt: What of the reasoning reaches SAM 3; see `ConceptSegForSegmentation.segment`.
        max_references: See `records.shown_references`.
        routing_regret: Run the route that was not taken as well, and record what it would have given.
        judgements: Whether each sample's think and rule are right: a file, a `Judge`, or the name of one; see
            `decomposition`. They enter the report, not the records on disk.
        profile: `"paper"` or `"released"` (see `profiles`): settings of model and processor, for this evaluation alone,
            the protocol, and the loader of benchmarks given by name. None: the profile that the model's config names,
            if it does, with the settings that model and processor have.
        groups: Groups of the samples of a benchmark given by name; see `load_benchmark`.

    Returns:
        The report over the first `limit` samples.

    Raises:
        ValueError: If an argument is invalid, or the folder holds the records of another run or of more samples.
        MissingFilesError: If files of a benchmark are missing: of all benchmarks at once, before any work. (Samples of
            one's own data fail one by one; see `load_benchmark`.)
    """
    # Wrong names are found before any work.
    if profile is not None:
        get_profile(profile)
    if protocol is not None:
        get_protocol(protocol)
    MaskMetrics(metrics=metrics)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"evaluate: batch_size is {batch_size} and limit {limit}; use at least 1.")
    if isinstance(model_or_path, ConceptSegForSegmentation) and processor is None:
        raise ValueError("evaluate: a model was given without its processor; pass processor=... as well.")
    if judgements is not None:
        check_judge(judgements)
    if isinstance(model_or_path, ConceptSegForSegmentation):
        named = profile or model_or_path.config.profile
    else:
        named = profile or profile_of(model_or_path)
    followed = get_profile(named or "paper")
    samples = (
        load_benchmarks(
            benchmark, root=root, split=split, limit=limit, seed=seed, loader=followed.loader, groups=groups
        )
        if isinstance(benchmark, str)
        else benchmark
    )
    processes = join_processes()
    if isinstance(model_or_path, ConceptSegForSegmentation):
        model = model_or_path
    else:
        model, processor = load_model_and_processor(model_or_path)
    assert processor is not None  # a model alone was refused above
    group = samples if isinstance(samples, BenchmarkGroup) else BenchmarkGroup("", {"": samples})
    totals = {name: _length(name, member, limit) for name, member in group.members.items()}
    with using_profile(model, processor, profile) as processor:
        run = _Run(
            model,
            processor,
            processes,
            batch_size=batch_size,
            protocol=protocol or followed.protocol,
            metrics=tuple(metrics),
            router=router,
            generation_config=generation_config,
            sam_prompt=sam_prompt,
            max_references=max_references,
            routing_regret=routing_regret,
            profile=named,
        )
        return _evaluate_group(
            run,
            group,
            samples,
            totals,
            None if output_dir is None else Path(output_dir),
            progress,
            judgements,
        )


def _evaluate_group(
    run: _Run,
    group: BenchmarkGroup,
    samples: Any,
    totals: Mapping[str, int],
    folder: Path | None,
    progress: bool,
    judgements: str | os.PathLike | Judge | None,
) -> EvaluationReport:
    """Evaluates the members of a group, or the one that stands for `samples`, and writes the report."""
    processes = run.processes
    reports = {}
    with Progress(sum(totals.values()), progress and processes.is_main) as bar:
        for name, member in group.members.items():
            bar.describe(name)
            where = None if folder is None else folder / name
            reports[name] = run.evaluate(member, totals[name], where, bar)
            if group is samples and where is not None and processes.is_main:
                reports[name].write(where, member)
    report = _combine(group.name, reports) if group is samples else reports[""]
    if judgements is not None:
        report = _judge(report, judgements)
    if folder is not None and processes.is_main:
        # PyTorch's data sets accept any indexed collection and are one, which their annotations do not say.
        parts: list[Subset[ConceptSample]] = [
            Subset(member, range(totals[name]))  # type: ignore[arg-type]
            for name, member in group.members.items()
        ]
        report.write(folder, cast(Sequence[ConceptSample], ConcatDataset(parts)))
    return report


@dataclass(frozen=True)
class _Run:
    """A model and how it is evaluated; see `evaluate`."""

    model: ConceptSegForSegmentation
    processor: ConceptSegProcessor
    processes: Processes
    batch_size: int
    protocol: str
    metrics: tuple[str, ...]
    router: str | ShortcutRouter
    generation_config: Any
    sam_prompt: str
    max_references: int | None
    routing_regret: bool
    profile: str | None

    def evaluate(
        self, samples: Sequence[ConceptSample], total: int, folder: Path | None, bar: Progress
    ) -> EvaluationReport:
        """Evaluates the first samples of one benchmark."""
        settings = {**describe_samples(samples), **self.settings(samples)}
        known = partial(identify_sample, samples)
        with RecordStore(folder, settings, self.processes, total, known) as records:
            batches = [
                range(start, min(start + self.batch_size, total))
                for start in range(0, total, self.batch_size)
            ]
            waiting = [rest for batch in batches if (rest := _rest_of(batch, records))]
            bar.skip(total - sum(map(len, waiting)))
            left = sum(map(len, waiting))
            for batch in waiting[self.processes.rank :: self.processes.world_size]:
                found = self._evaluate_batch(
                    {index: read_sample(samples, index, self.protocol) for index in batch}
                )
                records.add((index, record | known(index)) for index, record in found)
                done = len(batch) + (records.count_of_others() if bar.shown else 0)
                bar.advance(done)
                left -= done
            records.finish()
            bar.advance(left)
            absent = [index for index in range(total) if index not in records]
            if absent:
                raise ValueError(
                    f"evaluate: {len(absent)} of {total} records that other processes made are not in {str(folder)!r}; "
                    "give an output_dir that all processes reach, and run again for what is missing."
                )
            return EvaluationReport([records[index] for index in range(total)], settings)

    def _evaluate_batch(
        self, read: Mapping[int, ConceptSample | UnreadableSampleError]
    ) -> list[tuple[int, Record]]:
        samples = {i: sample for i, sample in read.items() if isinstance(sample, ConceptSample)}
        results: dict[int, ConceptSegmentation] = {}
        others: dict[int, ConceptSegmentation | None] = {}
        if samples:
            batch = (self.model, self.processor, list(samples.values()))
            options: tuple[Any, ...] = (
                self.generation_config,
                self.sam_prompt,
                self.max_references,
                self.protocol,
            )
            found = segment_samples(*batch, self.router, *options)
            results = dict(zip(samples, found, strict=True))
            if self.routing_regret:
                others = dict(zip(samples, segment_other_routes(*batch, found, *options), strict=True))
        compared = (self.protocol, self.metrics)
        return [
            (
                index,
                make_record(sample, results[index], *compared, others.get(index))
                if isinstance(sample, ConceptSample)
                else make_error_record(sample, *compared),
            )
            for index, sample in read.items()
        ]

    def settings(self, samples: Sequence[ConceptSample]) -> dict[str, Any]:
        """What a record depends on, and where it was made."""
        settings = {
            **self._profile_settings(samples),
            "protocol": self.protocol,
            "metrics": list(self.metrics),
            "router": self.router if isinstance(self.router, str) else repr(self.router),
            "generation": None if self.generation_config is None else repr(self.generation_config),
            "sam_prompt": self.sam_prompt,
            "max_references": self.max_references,
            **({"routing_regret": True} if self.routing_regret else {}),
            **fingerprint(self.model),
            "configuration": configuration_hash(self.model, self.processor),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "record_format": RECORD_FORMAT,
        }
        if self.processor.mosaic is not None:
            settings["mosaic"] = self.processor.mosaic
        versions = {module.__name__: module.__version__ for module in (conceptseg_hf, torch, transformers)}
        place = {"device": self.model.device.type, "python": platform.python_version(), **versions}
        return settings | {"environment": place}

    def _profile_settings(self, samples: Sequence[ConceptSample]) -> dict[str, Any]:
        """The profile, what of it is not followed, and whose words the prompt has; nothing without a profile."""
        if self.profile is None:
            return {}
        loader = getattr(samples, "loader", None)
        notified = describe_profile(self.profile, self.model.config, self.processor, self.protocol, loader)
        own_words = self.processor.template == released_template()
        return {"profile": notified, **({"prompt_words": "paper"} if own_words else {})}


def _length(name: str, samples: Sequence[ConceptSample], limit: int | None) -> int:
    total = len(samples) if limit is None else min(limit, len(samples))
    if not total:
        raise ValueError(f"evaluate: the benchmark{name and f' {name!r}'} has no samples; give one that has.")
    return total


def _rest_of(batch: Sequence[int], records: RecordStore) -> Sequence[int]:
    """What of a batch is to be run: all of it where records are missing, else those that failed."""
    if not all(index in records for index in batch):
        return batch
    return [index for index in batch if records[index]["error"] is not None]


def _combine(name: str, reports: Mapping[str, EvaluationReport]) -> EvaluationReport:
    """One report of several benchmarks; its settings are those that they share."""
    first, *others = (report.settings for report in reports.values())
    shared = {
        key: value
        for key, value in first.items()
        if all(key in settings and settings[key] == value for settings in others)
    }
    members = [
        {
            "benchmark": report.settings["benchmark"],
            "split": report.settings["split"],
            "samples": len(report.records),
        }
        for report in reports.values()
    ]
    records = [record for report in reports.values() for record in report.records]
    return EvaluationReport(records, {**shared, "benchmark": name, "benchmarks": members})


def _judge(report: EvaluationReport, judgements: str | os.PathLike | Judge) -> EvaluationReport:
    name, judge = resolve_judge(judgements, report.records)
    settings = {**report.settings, "judgements": name, "prediction_threshold": CORRECT_IOU}
    return EvaluationReport(judge_records(report.records, judge), settings)
