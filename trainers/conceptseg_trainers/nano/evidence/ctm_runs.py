"""Train the CTM of nano with several seeds and numbers of concept tokens (L2, Figure 7 of the paper), and compare them.

`python -m conceptseg_trainers.nano.evidence.ctm_runs` uses the VLM and SAM 3 of the embedded checkpoint. All runs have
the same completions; only the CTM differs. If the command is run again, finished runs are not repeated and an
interrupted one resumes.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from conceptseg_hf import ConceptSegForSegmentation, nano_checkpoint
from conceptseg_hf.evaluation.reporting.tables import interval_text
from conceptseg_hf.progress import print_line
from conceptseg_hf.writing import json_text, write_file

from ...experiments.run_folder import check_run_settings, complete_folder, digest_of
from ...experiments.tables import format_mean, mean_over_seeds, paired, plain_table
from ...from_scratch.assemble import write_checkpoint
from ...from_scratch.command import make_parser, run_command, scaled
from ...from_scratch.ctm_stage import CtmStage, CtmSteps
from ...from_scratch.loop import train
from ..ctm_data import ShapesCtmData
from ..tokenizers import build_processor
from . import concept_tokens
from .concept_tokens import Values

DEFAULT_TOKENS = 8
_TOKENS = (1, 2, 4, 16)
_SEEDS = (0, 1, 2)
_PROMPTS = ("Z", "Z + text")


def main() -> None:
    """Train and measure all runs, and write the tables."""
    description = "Train the CTM of nano with several seeds and numbers of concept tokens."
    parser = make_parser(f"{__package__}.ctm_runs", description, Path("runs/nano-ctm"))
    parser.add_argument(
        "--start",
        type=Path,
        default=nano_checkpoint(),
        help="checkpoint with the VLM and SAM 3 (default: the embedded nano)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=list(_SEEDS), help="with 8 concept tokens (default: 0 1 2)"
    )
    parser.add_argument(
        "--tokens",
        nargs="*",
        type=int,
        default=list(_TOKENS),
        help="further numbers of concept tokens, with the first seed (default: 1 2 4 16)",
    )
    parser.add_argument("--samples", type=int, default=300, help="samples per set (default: %(default)s)")
    run_command(parser, run)


def run(arguments: argparse.Namespace) -> None:
    """Train and measure the runs, and write the tables.

    Raises:
        ValueError: If the run folder contains results with other settings.
    """
    folder, scale = arguments.run_dir, min(1.0, arguments.scale)
    check_run_settings(
        folder, {"scale": scale, "samples": arguments.samples, "start": digest_of(arguments.start)}
    )
    runs = {DEFAULT_TOKENS: arguments.seeds} | dict.fromkeys(arguments.tokens, arguments.seeds[:1])
    results = {
        count: [
            measured(
                train_ctm(arguments.start, folder, count, seed, scale, arguments.device), arguments.samples
            )
            for seed in seeds
        ]
        for count, seeds in sorted(runs.items())
    }
    print_line(write_tables(results, folder / "ctm_runs.md"), sys.stdout)


def train_ctm(
    start: Path, run_dir: Path, num_concept_tokens: int, seed: int, scale: float = 1.0, device: str = "cpu"
) -> Path:
    """Train a CTM and write its checkpoint; does nothing if the checkpoint exists.

    Args:
        start: Checkpoint with the VLM and SAM 3.
        run_dir: Folder of the runs.
        num_concept_tokens: Number of concept tokens.
        seed: Random seed of weights and batches.
        scale: Factor of the number of steps, tasks and held-out samples.
        device: Device of the model.

    Returns:
        The folder of the checkpoint.
    """
    name = f"ctm-{num_concept_tokens}-tokens-seed-{seed}"
    checkpoint = run_dir / name / "checkpoint"
    if checkpoint.is_dir():
        return checkpoint
    steps = CtmSteps.scaled(scale)
    model, processor = with_new_ctm(start, num_concept_tokens, seed), build_processor()
    stage = CtmStage(
        model,
        processor,
        ShapesCtmData(),
        run_dir,
        steps,
        tasks=scaled(9600, scale, 48),
        name=name,
        device=device,
        held_out=scaled(240, scale, 24),
        seed=seed,
    )
    train(stage, steps.schedule(), run_dir)
    with complete_folder(checkpoint) as temporary:
        write_checkpoint(model.cpu(), processor, temporary)
    return checkpoint


def with_new_ctm(start: Path, num_concept_tokens: int, seed: int) -> ConceptSegForSegmentation:
    """Return the model of a checkpoint with a new CTM that has the given number of concept tokens."""
    model = ConceptSegForSegmentation.from_pretrained(start)
    config = copy.deepcopy(model.config)
    config.ctm_config.num_queries = num_concept_tokens
    torch.manual_seed(seed)
    model.ctm, model.config = ConceptSegForSegmentation(config).ctm, config
    return model


def measured(checkpoint: Path, samples: int) -> Values:
    """Return the values of `concept_tokens.measure`, read from the folder of the run if they are known."""
    path = checkpoint.with_name("values.json")
    if not path.is_file():
        write_file(path, json_text(concept_tokens.measure(checkpoint, samples)) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def write_tables(results: Mapping[int, Sequence[Values]], path: Path) -> str:
    """Write an overview of all numbers of concept tokens, and the prompts with each of them; return the text."""
    titles = [*_PROMPTS, *(f"{prompt} - {prompt} of {DEFAULT_TOKENS} tokens" for prompt in _PROMPTS)]
    rows = []
    for label in results[DEFAULT_TOKENS][0]:
        means = {
            count: {prompt: mean_over_seeds([seed[label][prompt] for seed in seeds]) for prompt in _PROMPTS}
            for count, seeds in results.items()
        }
        for count, values in means.items():
            cells = [format_mean(values[prompt]) for prompt in _PROMPTS]
            for prompt in _PROMPTS:
                base = means[DEFAULT_TOKENS][prompt]
                is_base = count == DEFAULT_TOKENS
                interval = None if is_base else paired(values[prompt], base, f"{count}/{label}/{prompt}")
                cells.append(interval_text(interval, 3, signed=True))
            rows.append([label, str(count), str(len(results[count])), *cells])
    parts = [plain_table(["samples", "tokens", "seeds", *titles], rows) + "\n"]
    parts += [
        f"## {count} concept tokens, {len(seeds)} seeds\n\n{concept_tokens.table(seeds)}"
        for count, seeds in results.items()
    ]
    text = "\n".join(parts)
    write_file(path, text)
    return text


if __name__ == "__main__":
    main()
