"""Runs a model over a benchmark.

Every record is on disk as soon as it is made, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data import ConceptSample, FileBenchmark, UnreadableSampleError, load_benchmark
from ..modeling_conceptseg import ConceptSegForSegmentation
from ..processing_conceptseg import ConceptSegProcessor
from ..router import ShortcutRouter
from .loading import fingerprint, load_model_and_processor
from .metrics import METRICS, MaskMetrics
from .records import make_error_record, make_record, segment_samples
from .report import EvaluationReport, Record


def evaluate(
    model_or_path: ConceptSegForSegmentation | str | os.PathLike | None,
    benchmark: str | Sequence[ConceptSample],
    protocol: str = "standard",
    metrics: Sequence[str] = METRICS,
    router: str | ShortcutRouter = "adaptive",
    batch_size: int = 8,
    limit: int | None = None,
    output_dir: str | os.PathLike | None = None,
    split: str = "test",
    processor: ConceptSegProcessor | None = None,
    generation_config: Any = None,
    progress: bool = False,
    root: str | os.PathLike | None = None,
    seed: int = 42,
) -> EvaluationReport:
    """Scores a model on a benchmark.

    A sample that cannot be read ends with an error in its record and in the report, and the evaluation goes on.

    Args:
        model_or_path: A checkpoint's folder or hub id, None for the embedded one, or a model, which needs
            `processor`.
        benchmark: A name that `load_benchmark` knows, or samples that can be indexed.
        protocol: `"standard"`: masks are compared at the size of the images; `"paper"`: see `protocols`.
        metrics: Metrics of masks; those of `LIBRARY_METRICS` need `pip install conceptseg-hf[eval]`.
        router: `"adaptive"`, `"sam_only"`, `"full_reasoning"` or a `ShortcutRouter`.
        batch_size: Samples at a time.
        limit: Only the first samples.
        output_dir: Folder for records.jsonl, report.md and report.json. Records found there are kept, if they
            are of the same model, benchmark and settings, and only missing samples are run.
        split: Split of a benchmark given by name.
        processor: The processor of a model given as such.
        generation_config: How the MLLM writes; see `ConceptSegForSegmentation.segment`.
        progress: Show a progress bar.
        root: Folder of the files of a benchmark given by name.
        seed: Seed of its references; see `load_benchmark`.

    Returns:
        The report over the first `limit` samples.

    Raises:
        ValueError: If an argument is invalid, or the folder holds the records of another run.
    """
    MaskMetrics(protocol, metrics=metrics)  # a wrong name is found before any work
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"evaluate: batch_size is {batch_size} and limit {limit}; use at least 1.")
    if isinstance(model_or_path, ConceptSegForSegmentation):
        model = model_or_path
        if processor is None:
            raise ValueError("evaluate: a model was given without its processor; pass processor=... as well.")
    else:
        model, processor = load_model_and_processor(model_or_path)
    samples = benchmark
    if isinstance(benchmark, str):
        files = {} if root is None else {"root": root, "limit": limit, "seed": seed}
        samples = load_benchmark(benchmark, split=split, **files)
    total = len(samples) if limit is None else min(limit, len(samples))
    if not total:
        raise ValueError("evaluate: the benchmark has no samples; give one that has.")
    settings = {
        **_source(samples),
        "protocol": protocol,
        "metrics": list(metrics),
        "router": router if isinstance(router, str) else repr(router),
        "generation": None if generation_config is None else repr(generation_config),
        **fingerprint(model),
    }

    with _Records(output_dir, settings) as records:
        missing = [index for index in range(total) if index not in records]
        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        bar = tqdm(total=total, initial=total - len(missing), unit="sample", disable=not progress)
        for batch in batches:
            read = {index: _read(samples, index) for index in batch}
            chosen = {
                index: sample
                for index, sample in read.items()
                if not isinstance(sample, UnreadableSampleError)
            }
            results = {}
            if chosen:
                found = segment_samples(model, processor, list(chosen.values()), router, generation_config)
                results = dict(zip(chosen, found, strict=True))
            records.add(
                (
                    index,
                    make_record(sample, results[index], protocol, metrics)
                    if index in results
                    else make_error_record(sample, protocol, metrics),
                )
                for index, sample in read.items()
            )
            bar.update(len(batch))
        bar.close()
        report = EvaluationReport([records[index] for index in range(total)], settings)
    if output_dir is not None:
        _write_report(Path(output_dir), report)
    return report


def _source(samples: Sequence[ConceptSample]) -> dict[str, Any]:
    """Where samples come from: what they say of themselves, or else what the first one says."""
    if isinstance(samples, FileBenchmark):
        return {"benchmark": samples.name, "split": samples.split, "seed": samples.seed}
    first = _read(samples, 0)
    fields = first.fields if isinstance(first, UnreadableSampleError) else vars(first)
    return {"benchmark": fields.get("dataset", ""), "split": fields.get("split", "")}


def _read(samples: Sequence[ConceptSample], index: int) -> ConceptSample | UnreadableSampleError:
    """A sample, or why there is none."""
    try:
        return samples[index]
    except UnreadableSampleError as error:
        return error
    except (OSError, ValueError) as error:  # of samples of one's own
        return UnreadableSampleError(f"sample {index}: {error}", {"sample_id": str(index)})


class _Records:
    """The records by index of their sample; mirrored in a folder, if there is one."""

    def __init__(self, folder: str | os.PathLike | None, settings: dict[str, Any]) -> None:
        self._records: dict[int, Record] = {}
        self._file = None
        if folder is None:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path, settings_path = folder / "records.jsonl", folder / "settings.json"
        if path.exists() and settings_path.exists():
            _check_same(json.loads(settings_path.read_text(encoding="utf-8")), settings, folder)
            self._records = dict(_read_records(path))
        # Written anew, so that a line that was cut off when a run was killed is gone.
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_line(index, record) for index, record in self._records.items())
        settings_path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> _Records:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, index: int) -> bool:
        return index in self._records

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def add(self, records: Iterable[tuple[int, Record]]) -> None:
        for index, record in records:
            self._records[index] = record
            if self._file is not None:
                self._file.write(_line(index, record))
        if self._file is not None:
            self._file.flush()


def _line(index: int, record: Record) -> str:
    return json.dumps({"index": index, **record}) + "\n"


def _read_records(path: Path) -> Iterator[tuple[int, Record]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                record = json.loads(line)
                yield record.pop("index"), record


def _check_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    wanted = json.loads(json.dumps(wanted))
    differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if differing:
        raise ValueError(
            f"evaluate: {str(folder)!r} holds the records of another run (other {', '.join(differing)}); "
            "give another output folder, or remove this one."
        )


def _write_report(folder: Path, report: EvaluationReport) -> None:
    (folder / "report.md").write_text(
        report.to_markdown() + "\n\n" + report.summary() + "\n", encoding="utf-8"
    )
    content = {
        "settings": report.settings,
        "samples": len(report.records),
        "table": report.table,
        "errors": [{"sample_id": record["sample_id"], "error": record["error"]} for record in report.failed],
    }
    (folder / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
