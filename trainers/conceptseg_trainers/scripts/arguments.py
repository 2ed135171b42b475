"""Arguments of the scripts for data and model; the settings of the trainers are in their config classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch.utils.data import ConcatDataset, Dataset
from transformers import TrainingArguments

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor
from conceptseg_hf.data import SOURCES, BenchmarkGroup, ConceptSample, load_benchmarks
from conceptseg_hf.data.files import LOADERS
from conceptseg_hf.loading import find_checkpoint, load_config
from conceptseg_hf.profiles import apply_profile, get_profile

from ..samples import warn_of_shared_images


@dataclass
class DataArguments:
    """Arguments for the data.

    Attributes:
        benchmark: Benchmark names of `load_benchmark`, separated by commas.
        benchmark_root: Folder of the benchmark files, or comma-separated NAME=DIR pairs. `root` is an alias.
        train_split: Split to train on.
        train_samples: Number of samples of each benchmark to train on; all by default.
        eval_split: Split for evaluation.
        eval_samples: Number of samples of each benchmark for evaluation; all by default.
        benchmark_loader: How references are sampled and read: "default", or "released" as in the released code; see
            `load_benchmark`.
    """

    benchmark: str = field(
        default="concept-shapes", metadata={"help": "Benchmark names, separated by commas."}
    )
    benchmark_root: str | None = field(
        default=None,
        metadata={"help": "Folder of the benchmark files, or NAME=DIR,NAME=DIR.", "aliases": ["--root"]},
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    train_samples: int | None = field(default=None, metadata={"help": "Number of training samples."})
    eval_split: str = field(default="val", metadata={"help": "Split for evaluation."})
    eval_samples: int | None = field(default=None, metadata={"help": "Number of evaluation samples."})
    benchmark_loader: str = field(
        default="default",
        metadata={"help": "How references are sampled: default or released.", "choices": list(LOADERS)},
    )

    def __post_init__(self) -> None:
        for name in ("train_samples", "eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1, or omit it to use all.")

    def load(self, training_args: TrainingArguments) -> tuple[Sequence[ConceptSample], Any]:
        """Return the training samples and the evaluation samples (None if the run does not evaluate).

        Raises:
            OSError: If files are missing.
            ValueError: If a name is unknown, or there are no evaluation samples.
        """
        train = self._load(self.train_split, self.train_samples)
        if training_args.eval_strategy == "no" and not training_args.eval_on_start:
            return train, None
        try:
            evaluation = self._load(self.eval_split, self.eval_samples)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{str(error).rstrip('.')} (for the evaluation during training: use another --eval_split, or disable "
                "it with --eval_strategy no)."
            ) from error
        warn_of_shared_images(train, evaluation)
        return train, evaluation

    def _load(self, split: str, limit: int | None) -> Sequence[ConceptSample]:
        root = _roots(self.benchmark_root)
        samples = load_benchmarks(
            self.benchmark, root=root, split=split, limit=limit, loader=self.benchmark_loader
        )
        if not isinstance(samples, BenchmarkGroup):
            return samples
        # ConcatDataset accepts any sequence, despite its annotation.
        members = cast(Iterable[Dataset[ConceptSample]], samples.members.values())
        return cast(Sequence[ConceptSample], ConcatDataset(members))


def _roots(given: str | None) -> str | dict[str, str] | None:
    """Parse NAME=DIR,NAME=DIR into a dictionary; return any other string unchanged."""
    parts = [part.strip().partition("=") for part in (given or "").split(",")]
    if not all(equals and name in SOURCES for name, equals, _ in parts):
        return given
    return {name: folder for name, _, folder in parts}


@dataclass
class ModelArguments:
    """Arguments for the model: a checkpoint, or two backbones with a newly initialized CTM.

    Attributes:
        model_name_or_path: Folder or hub id of a ConceptSeg checkpoint; the embedded one by default.
        vlm_name_or_path: Folder or hub id of a VLM of a supported family to use as a backbone, instead of a checkpoint.
        sam_name_or_path: Folder or hub id of a SAM 3 to use as a backbone.
        num_concept_tokens: L2, the number of concept tokens of the new CTM (Table 7: 8, as in the released code; 16 in
            an early version of it). Only for backbones.
        canvas_size: Side of the mosaic and the target, in pixels; by default that of the VLM's family (Qwen2.5-VL: 600,
            as in Table 7). Only for backbones.
        coordinate_scale: Length of a canvas side in text units: 1 for the paper's decimals, 600 for the pixels of the
            released code; by default that of the VLM's family. Only for backbones.
        dtype: Dtype of the VLM; the checkpoint's by default.
        attn_implementation: Attention implementation of the VLM.
        profile: Profile to apply to model and processor, "paper" or "released", which is saved with the trained model;
            by default the settings of the checkpoint are kept.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "ConceptSeg checkpoint (default: the embedded nano checkpoint)."}
    )
    vlm_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "VLM backbone, instead of a checkpoint.",
            "aliases": ["--mllm_name_or_path"],
        },  # previous name
    )
    sam_name_or_path: str | None = field(default=None, metadata={"help": "SAM 3 backbone."})
    num_concept_tokens: int = field(default=8, metadata={"help": "L2, for backbones."})
    canvas_size: int | None = field(
        default=None, metadata={"help": "Side of mosaic and target, for backbones."}
    )
    coordinate_scale: float | None = field(
        default=None, metadata={"help": "Text units of a canvas side, for backbones."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Dtype of the VLM.", "choices": ["auto", "float32", "bfloat16", "float16"]},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation of the VLM."}
    )
    profile: str | None = field(
        default=None, metadata={"help": "Profile of model and processor: paper or released."}
    )

    def __post_init__(self) -> None:
        if self.profile is not None:
            get_profile(self.profile)
        for name in ("model_name_or_path", "vlm_name_or_path", "sam_name_or_path"):
            _check_source(name, getattr(self, name))
        if (self.vlm_name_or_path is None) != (self.sam_name_or_path is None):
            raise ValueError(
                "only one of vlm_name_or_path and sam_name_or_path is given; use both or neither."
            )
        if self.vlm_name_or_path and self.model_name_or_path:
            raise ValueError(
                "both model_name_or_path and vlm_name_or_path are given; use either a checkpoint or "
                "backbones."
            )

    def load(
        self, options: Mapping[str, Any] | None = None
    ) -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
        """Load the model and its processor.

        Args:
            options: Further arguments of `from_pretrained` for the checkpoint or the VLM, which override the fields.

        Raises:
            OSError: If a checkpoint cannot be found.
            ValueError: If a checkpoint cannot be used.
        """
        model, processor = self._load({"dtype": self.dtype, **self.load_kwargs(), **(options or {})})
        if self.profile is not None:
            apply_profile(model, processor, self.profile)
        return model, processor

    def _load(self, options: dict[str, Any]) -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
        if self.vlm_name_or_path is None or self.sam_name_or_path is None:  # both or neither is given
            checkpoint = find_checkpoint(self.model_name_or_path)
            load_config(checkpoint)  # raises an error if it is not a ConceptSeg checkpoint
            model = ConceptSegForSegmentation.from_pretrained(checkpoint, **options)
            return model, ConceptSegProcessor.from_pretrained(checkpoint)
        model = ConceptSegForSegmentation.from_backbones(
            self.vlm_name_or_path,
            self.sam_name_or_path,
            ctm_config={"num_queries": self.num_concept_tokens},
            dtype=options.pop("dtype"),
            vlm_kwargs=options,
        )
        processor = ConceptSegProcessor.from_backbones(
            self.vlm_name_or_path,
            self.sam_name_or_path,
            canvas_size=self.canvas_size,
            coordinate_scale=self.coordinate_scale,
        )
        return model, processor

    def load_kwargs(self) -> dict[str, Any]:
        """Return further arguments of `from_pretrained` for the checkpoint or the VLM."""
        return {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}


def _check_source(field_name: str, source: str | None) -> None:
    if source is None or Path(source).is_dir():
        return
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise ValueError(
            f"{field_name} is {source!r}, which is neither a folder nor a hub id; use one of the two."
        ) from error
