"""Compare variants of coprs-nano: `python -m conceptseg_trainers.coprs_nano.ablations`.

Each variant is trained like the embedded checkpoint, from the same start and with the same data and steps, and compared
with it on the same held-out samples. Trainings resume where they were interrupted; finished variants are not repeated.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from conceptseg_hf import ConceptSegForSegmentation, nano_checkpoint
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.progress import print_line
from conceptseg_hf.writing import write_file

from ..experiments.measuring import DECODING, Values, measured_values
from ..experiments.run_folder import check_run_settings, complete_folder, digest_of
from ..experiments.tables import comparison_table
from ..from_scratch.command import make_parser, run_command, scaled
from ..from_scratch.loop import train
from .report import write_checkpoint
from .settings import STEPS, held_out_count, schedule_of
from .stage import PriorData, PriorSettings, PriorStage, build_model
from .tokenizers import build_processor
from .values import COMPARED, MEASURES, values_of

FULL = "full"


@dataclass(frozen=True)
class Variant:
    """A variant of the training.

    Attributes:
        title: Name of its row in the table.
        config: Settings of `CoPRSConfig` that differ.
        settings: Settings of the stage.
        backbone: Vision backbone: "start", that of the start; "random", without training; or the folder of another
            checkpoint of nano. It is frozen in all variants.
    """

    title: str
    config: dict[str, Any] = field(default_factory=dict)
    settings: PriorSettings = field(default_factory=PriorSettings)
    backbone: str = "start"


VARIANTS = {
    FULL: Variant("coprs-nano: 4 heads"),
    "heads-1": Variant("1 head", {"num_heads": 1}),
    "heads-2": Variant("2 heads", {"num_heads": 2}),
    "heads-8": Variant("8 heads", {"num_heads": 8}),
    "no-prior-loss": Variant("without prior loss", settings=PriorSettings(prior_weight=0.0)),
    "no-reasoning": Variant("without chain of thought", settings=PriorSettings(with_reasoning=False)),
    "random-backbone": Variant("random vision backbone", backbone="random"),
}
"""The variants by name; heads of equal width, as in the paper."""


def main() -> None:
    """Run the ablations."""
    description = __doc__.splitlines()[0].partition(":")[0] + "."
    parser = make_parser(f"{__package__}.ablations", description, Path("runs/coprs-nano/ablations"))
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        default=list(VARIANTS),
        help="variants to run, beside the full one (default: all)",
    )
    parser.add_argument(
        "--start",
        type=Path,
        default=nano_checkpoint(),
        help="nano checkpoint that all variants start from (default: the embedded one)",
    )
    parser.add_argument(
        "--backbones",
        type=Path,
        nargs="*",
        default=[],
        metavar="FOLDER",
        help="further variants with the vision backbones of these nano checkpoints",
    )
    parser.add_argument(
        "--samples", type=int, default=300, help="held-out samples per set (default: %(default)s)"
    )
    run_command(parser, run)


def run(arguments: argparse.Namespace) -> None:
    """Train and measure the selected variants, and write the table.

    Raises:
        ValueError: If the run folder contains results with other settings.
    """
    # The full variant is the baseline of the table.
    variants = {name: VARIANTS[name] for name in dict.fromkeys((FULL, *arguments.variants))}
    for folder in arguments.backbones:
        variants[f"backbone-{folder.name}"] = Variant(
            f"vision backbone of {folder.name}", backbone=str(folder)
        )
    check_run_settings(
        arguments.run_dir,
        {
            "steps": scaled(STEPS, arguments.scale),
            "seed": arguments.seed,
            "samples": arguments.samples,
            "start": digest_of(arguments.start),
        },
    )
    samples = held_out_samples(arguments.samples)
    results: dict[str, list[dict[str, Values]]] = {}
    for name, variant in variants.items():
        checkpoint = train_variant(name, variant, arguments)
        results[name] = [
            measured_values(
                checkpoint,
                samples,
                values_of,
                arguments.run_dir / name / "values.json",
                {"greedy": DECODING["greedy"]},
            )
        ]
    titles = {name: variant.title for name, variant in variants.items()}
    print_line(write_table(results, titles, arguments.run_dir / "ablations.md"))


def held_out_samples(count: int) -> dict[str, list[ConceptSample]]:
    """Return the first samples of the split "test" whose concept is present, by set."""
    sources = {"Table 1": ConceptShapes("test", size=SIDE)}
    sources["which one"] = ConceptShapes("test", size=SIDE, groups=["which one"])
    samples: dict[str, list[ConceptSample]] = {}
    for name, source in sources.items():
        present = (sample for i in range(len(source)) if (sample := source[i]).present)
        samples[name] = [sample for _, sample in zip(range(count), present)]
    return samples


def train_variant(name: str, variant: Variant, arguments: argparse.Namespace) -> Path:
    """Train a variant, resuming from its saved state, and return the folder of its checkpoint."""
    folder = arguments.run_dir / name
    checkpoint = folder / "checkpoint"
    if checkpoint.is_dir():
        return checkpoint
    processor = build_processor()
    start = ConceptSegForSegmentation.from_pretrained(arguments.start)
    model = build_model(
        start, processor, arguments.seed, backbone_of(variant, start, arguments.seed), **variant.config
    )
    steps = scaled(STEPS, arguments.scale)
    data = PriorData(steps, processor, held_out_count(arguments.scale), arguments.seed, variant.settings)
    stage = PriorStage(model, processor, data, steps, arguments.device, arguments.seed, variant.settings)
    train(stage, schedule_of(steps), folder)
    with complete_folder(checkpoint) as temporary:
        write_checkpoint(model, temporary)
    return checkpoint


def backbone_of(variant: Variant, start: ConceptSegForSegmentation, seed: int) -> Any:
    """Return the vision encoder of a variant; None for that of the start."""
    if variant.backbone == "start":
        return None
    if variant.backbone == "random":
        torch.manual_seed(seed)  # it is frozen, and therefore not part of the saved state
        return ConceptSegForSegmentation(start.config).sam.vision_encoder
    return ConceptSegForSegmentation.from_pretrained(variant.backbone).sam.vision_encoder


def write_table(results: dict[str, list[dict[str, Values]]], titles: dict[str, str], path: Path) -> str:
    """Write the tables of all sets as Markdown, and return them."""
    parts = [
        "# Ablations of coprs-nano",
        "Differences are paired by sample, with 95 % bootstrap intervals over samples; one seed per variant.",
    ]
    for source in results[FULL][0]:
        parts += [f"## {source}", comparison_table(results, FULL, titles, source, MEASURES, COMPARED)]
    text = "\n\n".join(parts) + "\n"
    write_file(path, text)
    return text


if __name__ == "__main__":
    main()
