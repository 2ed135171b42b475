"""What the scripts share: the recipe, the model, the data, and how a run ends."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch.utils.data import ConcatDataset, Dataset
from transformers import AutoImageProcessor, AutoTokenizer, Trainer, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor
from conceptseg_hf.cli.outputs import find_fault
from conceptseg_hf.data import SOURCES, BenchmarkGroup, ConceptSample, load_benchmarks
from conceptseg_hf.data.files import LOADERS
from conceptseg_hf.evaluation.distributed import let_gloo_end
from conceptseg_hf.loading import find_checkpoint, load_config
from conceptseg_hf.profiles import apply_profile, get_profile
from conceptseg_hf.progress import hide_bars_in_pipes, print_line

from ..callbacks import reported_to
from ..checkpoints import PROCESSOR, TRAINER_STATE, complete_checkpoints, is_complete, run_folder
from ..divergence import DivergedError
from ..samples import warn_of_shared_images

logger = logging.getLogger(__name__)

_SCHEDULER = "scheduler.pt"

# What Transformers reports to without counting it among what is available: it depends on more than a package.
_UNCOUNTED = {"azure_ml", "flyte", "kubeflow"}


@dataclass
class DataArguments:
    """The data.

    Attributes:
        benchmark: A name that `load_benchmark` knows, or several with commas between them.
        benchmark_root: Folder of the benchmarks' files, if they have any, or NAME=DIR of each with commas between them;
            `root` is the same.
        train_split: Split to train on.
        train_samples: Only the first samples of it, of each benchmark; all by default.
        eval_split: Split for evaluation.
        eval_samples: Only the first samples of it, of each benchmark.
        benchmark_loader: How references are drawn and read: "default", or "released" as the released code does; see
            `load_benchmark`.
    """

    benchmark: str = field(default="concept-shapes", metadata={"help": "Names of benchmarks, with commas."})
    benchmark_root: str | None = field(
        default=None,
        metadata={"help": "Folder of their files, or NAME=DIR,NAME=DIR.", "aliases": ["--root"]},
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    train_samples: int | None = field(default=None, metadata={"help": "Only its first samples."})
    eval_split: str = field(default="val", metadata={"help": "Split for evaluation."})
    eval_samples: int | None = field(default=None, metadata={"help": "Only its first samples."})
    benchmark_loader: str = field(
        default="default",
        metadata={"help": "How references are drawn: default or released.", "choices": list(LOADERS)},
    )

    def __post_init__(self) -> None:
        for name in ("train_samples", "eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1, or leave it out for all.")

    def load(self, training_args: TrainingArguments) -> tuple[Sequence[ConceptSample], Any]:
        """The samples to train on, and those for evaluation (None if the run does not evaluate).

        Raises:
            OSError: If files are missing.
            ValueError: If a name is unknown, or there is nothing to evaluate on.
        """
        train = self._load(self.train_split, self.train_samples)
        if training_args.eval_strategy == "no" and not training_args.eval_on_start:
            return train, None
        try:
            evaluation = self._load(self.eval_split, self.eval_samples)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{str(error).rstrip('.')} (for the evaluation while training: give another --eval_split, or train "
                "without one, by --eval_strategy no)."
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
        # torch joins all that can be indexed, whatever its types say
        members = cast(Iterable[Dataset[ConceptSample]], samples.members.values())
        return cast(Sequence[ConceptSample], ConcatDataset(members))


def _roots(given: str | None) -> str | dict[str, str] | None:
    """One folder, or, of several benchmarks, NAME=DIR,NAME=DIR."""
    parts = [part.strip().partition("=") for part in (given or "").split(",")]
    if not all(equals and name in SOURCES for name, equals, _ in parts):
        return given
    return {name: folder for name, _, folder in parts}


@dataclass
class ModelArguments:
    """The model: a checkpoint, or two backbones with a fresh CTM between them.

    Attributes:
        model_name_or_path: Folder or hub id of a ConceptSeg checkpoint; the embedded one by default.
        vlm_name_or_path: Folder or hub id of a Qwen2.5-VL, instead of a checkpoint.
        sam_name_or_path: Folder or hub id of a SAM 3, which goes with it.
        num_concept_tokens: L2, the number of concept tokens of the fresh CTM (Table 7: 8, as in the released code; 16
            in an early version of it).
        canvas_size: Side of mosaic and target, for backbones (Table 7: 600).
        coordinate_scale: What a canvas side measures in the text, for backbones: 1 for the paper's decimals,
            600 for the released code's pixels.
        dtype: Of the VLM; the checkpoint's by default.
        attn_implementation: Of the VLM.
        profile: Gives model and processor the settings of a profile, "paper" or "released", which the trained model
            keeps; by default they stay as they are.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "ConceptSeg checkpoint (default: the embedded nano checkpoint)."}
    )
    vlm_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "VLM to begin from instead.",
            "aliases": ["--mllm_name_or_path"],
        },  # its name before
    )
    sam_name_or_path: str | None = field(default=None, metadata={"help": "SAM 3 that goes with it."})
    num_concept_tokens: int = field(default=8, metadata={"help": "L2 of the fresh CTM."})
    canvas_size: int = field(default=600, metadata={"help": "Side of mosaic and target, for backbones."})
    coordinate_scale: float = field(default=1.0, metadata={"help": "Text units of a canvas side."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Of the VLM.", "choices": ["auto", "float32", "bfloat16", "float16"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of the VLM."})
    profile: str | None = field(
        default=None, metadata={"help": "Settings of model and processor: paper or released."}
    )

    def __post_init__(self) -> None:
        if self.profile is not None:
            get_profile(self.profile)
        for name in ("model_name_or_path", "vlm_name_or_path", "sam_name_or_path"):
            _check_source(name, getattr(self, name))
        if (self.vlm_name_or_path is None) != (self.sam_name_or_path is None):
            raise ValueError("vlm_name_or_path and sam_name_or_path belong together; give both or neither.")
        if self.vlm_name_or_path and self.model_name_or_path:
            raise ValueError(
                "both model_name_or_path and vlm_name_or_path are given; begin from a checkpoint or from "
                "backbones."
            )

    def load(
        self, options: Mapping[str, Any] | None = None
    ) -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
        """The model and its processor.

        Args:
            options: Further arguments of `from_pretrained`, for the checkpoint or the VLM; they go before the fields.

        Raises:
            OSError: If a checkpoint cannot be found.
            ValueError: If it cannot be used.
        """
        model, processor = self._load({"dtype": self.dtype, **self.load_kwargs(), **(options or {})})
        if self.profile is not None:
            apply_profile(model, processor, self.profile)
        return model, processor

    def _load(self, options: dict[str, Any]) -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
        if self.vlm_name_or_path is None or self.sam_name_or_path is None:  # both or neither are given
            checkpoint = find_checkpoint(self.model_name_or_path)
            load_config(checkpoint)  # refuses what is no ConceptSeg checkpoint
            model = ConceptSegForSegmentation.from_pretrained(checkpoint, **options)
            return model, ConceptSegProcessor.from_pretrained(checkpoint)
        model = ConceptSegForSegmentation.from_backbones(
            self.vlm_name_or_path,
            self.sam_name_or_path,
            ctm_config={"num_queries": self.num_concept_tokens},
            dtype=options.pop("dtype"),
            vlm_kwargs=options,
        )
        processor = ConceptSegProcessor(
            image_processor=AutoImageProcessor.from_pretrained(self.vlm_name_or_path),
            tokenizer=AutoTokenizer.from_pretrained(self.vlm_name_or_path),
            sam_image_processor=AutoImageProcessor.from_pretrained(self.sam_name_or_path),
            sam_tokenizer=AutoTokenizer.from_pretrained(self.sam_name_or_path),
            canvas_size=self.canvas_size,
            coordinate_scale=self.coordinate_scale,
        )
        return model, processor

    def load_kwargs(self) -> dict[str, Any]:
        """Further arguments of `from_pretrained`, for the checkpoint or the VLM."""
        return {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}


def _check_source(field_name: str, source: str | None) -> None:
    if source is None or Path(source).is_dir():
        return
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise ValueError(
            f"{field_name} is {source!r}, which is neither a folder nor a hub id; give one of the two."
        ) from error


def run(trainer: Trainer) -> None:
    """Trains, from a checkpoint if the settings say so, and saves the complete model to `output_dir`.

    Says whether it resumes, where results lie, and, when it is stopped by Ctrl-C, how to go on. A run that has all its
    steps behind it is left as it is; if it was killed before its model was saved, that is made up for.

    Raises:
        DivergedError: If the loss or weights are not finite.
        OSError: If a checkpoint or the model cannot be written.
        KeyboardInterrupt: With a sentence that says how to go on.
    """
    try:
        _run(trainer)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(trainer)) from None
    trainer.end()
    if trainer.accelerator.num_processes > 1:
        let_gloo_end()


def _run(trainer: Trainer) -> None:
    checkpoint = find_resume_checkpoint(trainer.args)
    if checkpoint is None or not _is_finished(trainer.args, checkpoint):
        _warn_of_another_rate(trainer, checkpoint)
        if checkpoint is not None:
            _notify(
                trainer, f"resuming from {checkpoint!r}, after step {_state_of(checkpoint)['global_step']}."
            )
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    else:
        if not _is_saved(trainer.args, checkpoint):
            with _no_steps(trainer.args):
                trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
        _warn(
            trainer,
            f"the run of {checkpoint!r} is finished, so nothing was trained; give another --output_dir for a new one, "
            "or a larger --max_steps or --num_train_epochs to go on.",
        )
    _report_results(trainer)


def _report_results(trainer: Trainer) -> None:
    folder = Path(run_folder(trainer.args))
    what = "the adapters are" if is_peft_model(trainer.model) else "the trained model is"
    _notify(
        trainer,
        f"{what} in {str(folder)!r}, checkpoints of the run in its folders {PREFIX_CHECKPOINT_DIR}-*.",
    )
    if (folder / "examples").is_dir():
        _notify(trainer, f"example pictures are in {str(folder / 'examples')!r}.")
    if not is_peft_model(trainer.model):
        _notify(
            trainer, f"try it with: conceptseg segment IMAGE --prompt TEXT --model {shlex.quote(str(folder))}"
        )


def _how_to_go_on(trainer: Trainer) -> str:
    step, args = trainer.state.global_step, trainer.args
    last = next(reversed(complete_checkpoints(run_folder(args))), None)
    if last is None:
        return f"stopped after step {step}; no checkpoint was saved yet, so the same command begins anew."
    auto = (
        "the same command goes"
        if args.resume_from_checkpoint == "auto"
        else "with --resume_from_checkpoint auto it goes"
    )
    return f"stopped after step {step}; {auto} on from {str(last)!r}."


def _notify(trainer: Trainer, message: str) -> None:
    if trainer.is_world_process_zero():
        print_line(message, sys.stdout)


def _state_of(checkpoint: str) -> dict[str, Any]:
    return json.loads((Path(checkpoint) / TRAINER_STATE).read_text(encoding="utf-8"))


def _is_finished(args: TrainingArguments, checkpoint: str) -> bool:
    """Whether a checkpoint has all steps of the run behind it; the Trainer would take one more."""
    state = _state_of(checkpoint)
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["epoch"] >= args.num_train_epochs


def _is_saved(args: TrainingArguments, checkpoint: str) -> bool:
    """Whether the complete model was saved after a checkpoint."""
    saved = Path(run_folder(args)) / PROCESSOR
    return saved.is_file() and saved.stat().st_mtime >= (Path(checkpoint) / TRAINER_STATE).stat().st_mtime


@contextmanager
def _no_steps(args: TrainingArguments) -> Iterator[None]:
    """Lets `train` read a checkpoint and take no step."""
    wanted = args.max_steps, args.num_train_epochs
    args.max_steps, args.num_train_epochs = -1, 0
    try:
        yield
    finally:
        args.max_steps, args.num_train_epochs = wanted


def _warn_of_another_rate(trainer: Trainer, checkpoint: str | None) -> None:
    """Warns where the learning rate asked for gives way to the checkpoint's (the Trainer warns of batch sizes)."""
    path = Path(checkpoint or "") / _SCHEDULER
    if checkpoint is None or not path.is_file():
        return
    rates = torch.load(path, map_location="cpu", weights_only=True).get("base_lrs", [])
    if rates and trainer.args.learning_rate not in rates:
        _warn(
            trainer,
            f"learning_rate is {trainer.args.learning_rate}, but {checkpoint!r} goes on with its own, {rates[0]}; "
            "another one needs a new run, in another --output_dir.",
        )


def _warn(trainer: Trainer, message: str) -> None:
    if trainer.is_world_process_zero():
        logger.warning(message)


def check_run(args: TrainingArguments) -> None:
    """Finds what the Trainer would find only when the model is loaded.

    Raises:
        ValueError: If the run's folder cannot be written, there is no checkpoint to resume from, or Transformers does
            not know where to report to.
        ImportError: If a package to report to is missing.
    """
    _check_output_dir(args)
    find_resume_checkpoint(args)
    _check_report_to(args)


def _check_output_dir(args: TrainingArguments) -> None:
    fault = find_fault(Path(run_folder(args)))
    if fault is not None:
        raise ValueError(f"output_dir {args.output_dir!r} cannot be written: {fault}; give another folder.")


def _check_report_to(args: TrainingArguments) -> None:
    available = {*get_available_reporting_integrations(), *_UNCOUNTED}
    for name in reported_to(args):
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to is {name!r}; use one of {', '.join(INTEGRATION_TO_CALLBACK)}, or all of them that are "
                "installed (all), or none."
            )
        if name not in available:
            raise ImportError(
                f"report_to is {name!r}, a package that is not installed; install it with: pip install {name}"
            )


def find_resume_checkpoint(args: TrainingArguments) -> str | None:
    """The folder to resume from.

    Args:
        args: With `resume_from_checkpoint`: a folder, or "auto" for the last complete checkpoint of
            `output_dir`, which may not be there yet.

    Raises:
        ValueError: If the folder is no complete checkpoint.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted != "auto":
        if not is_complete(wanted):
            raise ValueError(
                f"resume_from_checkpoint is {wanted!r}, which is no complete checkpoint; give the folder of one, "
                'or "auto" for the last of output_dir.'
            )
        return wanted
    last = next(reversed(complete_checkpoints(run_folder(args))), None)
    return None if last is None else str(last)


def main(prepare: Callable[[Sequence[str]], Trainer]) -> int:
    """Runs a script on the words of its command line.

    Returns:
        The exit code: 0; 2 after bad input, or a training that diverged or could not be saved, which is explained in
        one sentence on standard error; 130 after Ctrl-C.
    """
    try:
        hide_bars_in_pipes()
        run(prepare(sys.argv[1:]))
    except (ValueError, ImportError, OSError, DivergedError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 2
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{str(error) or 'stopped.'}\n")
        return 130
    return 0
