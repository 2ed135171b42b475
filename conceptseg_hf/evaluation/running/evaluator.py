"""Evaluation of a model on benchmarks.

Every record is written to disk as soon as it is made, so an interrupted run can be resumed. Batches, and with them the
results, do not depend on the number of processes or on where a run was interrupted (a batch with missing records is run
again as a whole). Failed samples are retried, as their files may have been fixed.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedModel

import conceptseg_hf

from ...concept_prompt import ConceptPrompt, as_concept
from ...coprs import CoPRSForSegmentation
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
    exclude: Collection[str] = (),
    concept: ConceptPrompt | str | os.PathLike | None = None,
) -> EvaluationReport:
    """Evaluate a model on one or several benchmarks.

    A sample that cannot be read gets an error in its record and in the report, and the evaluation continues.

    Processes started by `accelerate launch` or torchrun share the samples if all of them call this function; each
    returns the complete report, and the main process writes it. Such a program must end with
    `distributed.join_processes().leave()`.

    Args:
        model_or_path: The folder or hub id of a checkpoint, None for the embedded checkpoint, or a model, which
            requires `processor`.
        benchmark: A name for `load_benchmarks`: a benchmark, a group of the suite ("table1", "ci", "cd", "cr", "all"),
            or several of these separated by commas; or the result of `load_benchmarks`; or an indexable collection of
            samples.
        protocol: `"standard"`: compare masks at the size of the images; `"paper"`, `"released"`: see `protocols`.
            None: the protocol of the profile, which is "standard" without a profile.
        metrics: Metrics of masks; those of `LIBRARY_METRICS` need `pip install conceptseg-hf[eval]`.
        router: `"adaptive"`, `"sam_only"`, `"full_reasoning"` or a `ShortcutRouter`.
        batch_size: Number of samples per batch.
        limit: Maximum number of samples per benchmark, which keeps the first ones. A run in the same folder can be
            resumed with a larger limit, but not with a smaller one.
        output_dir: Folder for records.jsonl and the report; several benchmarks have a subfolder each. Existing records
            of the same model, samples and settings are kept, and only missing and failed samples are run. Required for
            several processes.
        split: Split of benchmarks given by their own names.
        processor: The processor; required if `model_or_path` is a model.
        generation_config: Generation settings of the VLM; see `ConceptSegForSegmentation.segment`.
        progress: Show a progress bar (in the main process).
        root: Folder of the files of benchmarks given by name; see `load_benchmarks`.
        seed: Random seed of their references; see `load_benchmark`.
        sam_prompt: The outputs of reasoning that prompt SAM 3; see `ConceptSegForSegmentation.segment`.
        max_references: See `records.shown_references`.
        routing_regret: Also run the route that was not taken, and record its foreground IoU.
        judgements: Whether each sample's think and rule are right: a file, a `Judge`, or the name of a judge; see
            `decomposition`. They are added to the report, not to the records on disk.
        profile: `"paper"` or `"released"` (see `profiles`): settings of model and processor for this evaluation, the
            protocol, and the loader of benchmarks given by name. None: the profile in the model's config, if any, with
            the current settings of model and processor.
        groups: Groups of the samples of a benchmark given by name; see `load_benchmark`.
        exclude: Ids of samples that the report leaves out, such as duplicates of training images. Their records are
            made and kept all the same.
        concept: A concept of `induction.induce`, or its file, that is applied to all samples. The report has the share
            and the foreground IoU of each tier.

    Returns:
        The report over the first `limit` samples.

    Raises:
        ValueError: If an argument is invalid, or the folder holds the records of another run or of more samples.
        MissingFilesError: If files of a benchmark are missing; all benchmarks are checked before the first sample is
            run. (In a user's own data, samples with missing files fail individually; see `load_benchmark`.)
    """
    # Validate names before any model or data is loaded.
    if profile is not None:
        get_profile(profile)
    if protocol is not None:
        get_protocol(protocol)
    MaskMetrics(metrics=metrics)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"evaluate: batch_size is {batch_size} and limit {limit}; use at least 1.")
    if isinstance(model_or_path, PreTrainedModel) and processor is None:
        raise ValueError("evaluate: a model was given without a processor; pass processor=... as well.")
    if judgements is not None:
        check_judge(judgements)
    if isinstance(model_or_path, PreTrainedModel):
        profile_name = profile or model_or_path.config.profile
    else:
        profile_name = profile or profile_of(model_or_path)
    active_profile = get_profile(profile_name or "paper")
    samples = (
        load_benchmarks(
            benchmark,
            root=root,
            split=split,
            limit=limit,
            seed=seed,
            loader=active_profile.loader,
            groups=groups,
        )
        if isinstance(benchmark, str)
        else benchmark
    )
    concept = None if concept is None else as_concept(concept)
    processes = join_processes()
    if isinstance(model_or_path, PreTrainedModel):
        model = model_or_path
    else:
        model, processor = load_model_and_processor(model_or_path)
    assert processor is not None  # a model without a processor was rejected above
    group = samples if isinstance(samples, BenchmarkGroup) else BenchmarkGroup("", {"": samples})
    totals = {name: _length(name, member, limit) for name, member in group.members.items()}
    with using_profile(model, processor, profile) as processor:
        run = _Run(
            model,
            processor,
            processes,
            batch_size=batch_size,
            protocol=protocol or active_profile.protocol,
            metrics=tuple(metrics),
            router=router,
            generation_config=generation_config,
            sam_prompt=sam_prompt,
            max_references=max_references,
            routing_regret=routing_regret,
            profile=profile_name,
            concept=concept,
        )
        return _evaluate_group(
            run,
            group,
            samples,
            totals,
            None if output_dir is None else Path(output_dir),
            progress,
            judgements,
            frozenset(exclude),
        )


def _evaluate_group(
    run: _Run,
    group: BenchmarkGroup,
    samples: Any,
    totals: Mapping[str, int],
    folder: Path | None,
    progress: bool,
    judgements: str | os.PathLike | Judge | None,
    exclude: frozenset[str],
) -> EvaluationReport:
    """Evaluate the members of a group, or its only member if it wraps `samples`, and write the report."""
    processes = run.processes
    reports, kept = {}, {}
    with Progress(sum(totals.values()), progress and processes.is_main) as bar:
        for name, member in group.members.items():
            bar.describe(name)
            member_folder = None if folder is None else folder / name
            reports[name], kept[name] = _without(
                run.evaluate(member, totals[name], member_folder, bar), exclude
            )
            if group is samples and member_folder is not None and processes.is_main:
                reports[name].write(member_folder, _subset(member, kept[name]))
    report = _combine(group.name, reports) if group is samples else reports[""]
    if judgements is not None:
        report = _judge(report, judgements)
    if folder is not None and processes.is_main:
        parts = [_subset(member, kept[name]) for name, member in group.members.items()]
        report.write(folder, cast(Sequence[ConceptSample], ConcatDataset(parts)))  # type: ignore[arg-type]
    return report


@dataclass(frozen=True)
class _Run:
    """A model and the settings of its evaluation; see `evaluate`."""

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
    concept: ConceptPrompt | None

    def evaluate(
        self, samples: Sequence[ConceptSample], total: int, folder: Path | None, bar: Progress
    ) -> EvaluationReport:
        """Evaluate the first samples of one benchmark."""
        settings = {**describe_samples(samples), **self.settings(samples)}
        identify = partial(identify_sample, samples)
        with RecordStore(folder, settings, self.processes, total, identify) as records:
            batches = [
                range(start, min(start + self.batch_size, total))
                for start in range(0, total, self.batch_size)
            ]
            pending = [indices for batch in batches if (indices := _pending_of(batch, records))]
            bar.skip(total - sum(map(len, pending)))
            remaining = sum(map(len, pending))
            for batch in pending[self.processes.rank :: self.processes.world_size]:
                batch_records = self._evaluate_batch(
                    {index: read_sample(samples, index, self.protocol) for index in batch}
                )
                records.add((index, record | identify(index)) for index, record in batch_records)
                done = len(batch) + (records.count_of_others() if bar.shown else 0)
                bar.advance(done)
                remaining -= done
            records.finish()
            bar.advance(remaining)
            missing = [index for index in range(total) if index not in records]
            if missing:
                raise ValueError(
                    f"evaluate: {len(missing)} of {total} records, made by other processes, are missing from "
                    f"{str(folder)!r}; give an output_dir that all processes can access, and run again."
                )
            return EvaluationReport([records[index] for index in range(total)], settings)

    def _evaluate_batch(
        self, inputs: Mapping[int, ConceptSample | UnreadableSampleError]
    ) -> list[tuple[int, Record]]:
        samples = {i: sample for i, sample in inputs.items() if isinstance(sample, ConceptSample)}
        results: dict[int, ConceptSegmentation] = {}
        other_results: dict[int, ConceptSegmentation | None] = {}
        if samples:
            batch = (self.model, self.processor, list(samples.values()))
            options: tuple[Any, ...] = (
                self.generation_config,
                self.sam_prompt,
                self.max_references,
                self.protocol,
            )
            own_route: tuple[Any, ...] = (self.router, *options, self.concept)
            batch_results = segment_samples(*batch, *own_route)
            results = dict(zip(samples, batch_results, strict=True))
            if self.routing_regret:
                other_results = dict(
                    zip(samples, segment_other_routes(*batch, batch_results, *options), strict=True)
                )
        comparison = (self.protocol, self.metrics)
        return [
            (
                index,
                make_record(sample, results[index], *comparison, other_results.get(index), self.has_prior)
                if isinstance(sample, ConceptSample)
                else make_error_record(sample, *comparison),
            )
            for index, sample in inputs.items()
        ]

    @property
    def has_prior(self) -> bool:
        """Whether the model is CoPRS, whose heatmaps are evaluated, too."""
        return isinstance(self.model, CoPRSForSegmentation)

    def settings(self, samples: Sequence[ConceptSample]) -> dict[str, Any]:
        """Return the settings that the records depend on, and the environment."""
        settings = {
            **self._profile_settings(samples),
            "protocol": self.protocol,
            "metrics": list(self.metrics),
            "router": self.router if isinstance(self.router, str) else repr(self.router),
            "generation": None if self.generation_config is None else repr(self.generation_config),
            "sam_prompt": self.sam_prompt,
            "max_references": self.max_references,
            **({"routing_regret": True} if self.routing_regret else {}),
            **({"vlm_engine": engine.name} if (engine := self.model.vlm_engine) is not None else {}),
            **({} if self.concept is None else {"concept": _describe(self.concept)}),
            **({"prior": True} if self.has_prior else {}),
            **fingerprint(self.model),
            "configuration": configuration_hash(self.model, self.processor),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "record_format": RECORD_FORMAT,
        }
        if self.processor.mosaic is not None:
            settings["mosaic"] = self.processor.mosaic
        versions = {module.__name__: module.__version__ for module in (conceptseg_hf, torch, transformers)}
        environment = {"device": self.model.device.type, "python": platform.python_version(), **versions}
        return settings | {"environment": environment}

    def _profile_settings(self, samples: Sequence[ConceptSample]) -> dict[str, Any]:
        """Return the profile with its deviations, and the wording of the prompt; empty without a profile."""
        if self.profile is None:
            return {}
        loader = getattr(samples, "loader", None)
        description = describe_profile(self.profile, self.model.config, self.processor, self.protocol, loader)
        has_paper_wording = self.processor.template == released_template()
        return {"profile": description, **({"prompt_words": "paper"} if has_paper_wording else {})}


def _describe(concept: ConceptPrompt) -> dict[str, Any]:
    """Return what results depend on; equal concepts have equal descriptions."""
    tokens = concept.concept_embeds
    return {
        "prompt": concept.prompt,
        "phrases": list(concept.phrases),
        "rule": concept.rule if concept.rule_is_reliable else None,
        "threshold": concept.threshold,
        "reliable": concept.is_reliable,
        "tokens": None
        if tokens is None
        else hashlib.blake2b(tokens.float().numpy().tobytes(), digest_size=8).hexdigest(),
    }


def _length(name: str, samples: Sequence[ConceptSample], limit: int | None) -> int:
    total = len(samples) if limit is None else min(limit, len(samples))
    if not total:
        raise ValueError(
            f"evaluate: the benchmark{name and f' {name!r}'} has no samples; give one with samples."
        )
    return total


def _pending_of(batch: Sequence[int], records: RecordStore) -> Sequence[int]:
    """Return the samples of a batch to run: all of them if any record is missing, otherwise the failed ones."""
    if not all(index in records for index in batch):
        return batch
    return [index for index in batch if records[index]["error"] is not None]


def _without(report: EvaluationReport, exclude: frozenset[str]) -> tuple[EvaluationReport, Sequence[int]]:
    """Return the report without excluded samples, and the indices of the others."""
    kept = [i for i, record in enumerate(report.records) if record["sample_id"] not in exclude]
    if not exclude:
        return report, kept
    if not kept:
        raise ValueError("evaluate: exclude lists all samples; leave some of them out of the list.")
    settings = {**report.settings, "excluded": len(report.records) - len(kept)}
    return EvaluationReport([report.records[i] for i in kept], settings), kept


def _subset(samples: Sequence[ConceptSample], indices: Sequence[int]) -> Sequence[ConceptSample]:
    """Return some samples. PyTorch's datasets are indexable collections, but their annotations do not say so."""
    return cast(Sequence[ConceptSample], Subset(samples, indices))  # type: ignore[arg-type]


def _combine(name: str, reports: Mapping[str, EvaluationReport]) -> EvaluationReport:
    """Combine the reports of several benchmarks, with the settings that they share."""
    first, *other_settings = (report.settings for report in reports.values())
    shared = {
        key: value
        for key, value in first.items()
        if all(key in settings and settings[key] == value for settings in other_settings)
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
