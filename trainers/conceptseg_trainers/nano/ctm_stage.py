"""Stage "ctm": the CTM learns to turn completions into concept tokens; the rest is frozen (stage I of the paper).

Half of the completions are the policy's own (generated once, kept in the run folder), half are the ground
truth: the module must make the best of what the policy writes, and still trust a right box where it finds
one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from conceptseg_hf.completion import format_completion
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.data.concept_shapes.benchmark import family_at
from conceptseg_hf.data.sample import ConceptSample
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.losses import segmentation_loss
from conceptseg_hf.modeling_conceptseg import ConceptSegForSegmentation
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor, PreparedSample
from conceptseg_hf.progress import progress_bar
from conceptseg_hf.vlm_backbone import last_hidden_states, model_inputs

from .loop import mean, write_tensors
from .sam_stage import scenes_to_pixels, to_masks

_FIRST_TRAIN_INDEX = 900_000  # the other stages stay below
_GENERATION_BATCH = 48
_MAX_TOKENS = 64


class CtmStage:
    """Trains the CTM on dice + focal (eq. 5), and a little on presence: the final decode may say "not there".

    Args:
        model: The VLM and SAM 3 of the earlier stages with a fresh CTM.
        processor: The nano processor.
        run_dir: Where the policy's completions are kept.
        completions: How many tasks of the training split are used, over and over.
        batch_size: Samples per step.
        device: Where to train.
        held_out: Samples of the split "val" that an evaluation takes.
    """

    name = "ctm"

    def __init__(
        self,
        model: ConceptSegForSegmentation,
        processor: ConceptSegProcessor,
        run_dir: Path,
        completions: int = 4800,
        batch_size: int = 32,
        device: str = "cpu",
        held_out: int = 240,
    ) -> None:
        torch.manual_seed(0)
        self.model, self.processor, self.batch_size, self.device = (
            model.to(device).eval(),
            processor,
            batch_size,
            device,
        )
        model.vlm.requires_grad_(False)
        self.module: nn.Module = model.ctm
        self.train_split = ConceptShapes("train", size=SIDE)
        self.table = _completion_table(
            self, run_dir / self.name / "completions.safetensors", "train", _FIRST_TRAIN_INDEX, completions
        )
        self.held_out = _completion_table(
            self, run_dir / self.name / "completions_val.safetensors", "val", 0, held_out
        )

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss on a random batch of completions."""
        rng = np.random.default_rng([17, step])
        rows = rng.integers(len(self.table["own_mask"]), size=self.batch_size)
        kinds = ["own" if rng.random() < 0.6 else "true" for _ in rows]
        tasks = [self.train_split.task(_FIRST_TRAIN_INDEX + int(row)) for row in rows]
        logits, presence = self._decode(self.table, rows, kinds, [task.scene.pixels for task in tasks])
        ground_truth = torch.from_numpy(np.stack([task.mask for task in tasks])).to(self.device)
        _, dice, focal = segmentation_loss(logits, ground_truth)
        present = ground_truth.flatten(1).any(1).float()
        presence_loss = nn.functional.binary_cross_entropy_with_logits(presence[:, 0], present)
        total = dice + 10 * focal + 0.25 * presence_loss
        return total, {"dice": dice.item(), "focal": focal.item(), "presence": presence_loss.item()}

    def _decode(
        self, table: dict, rows: np.ndarray, kinds: list[str], images: list[np.ndarray], use_z: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Mask logits (B, 1, h, w) and presence logits (B, 1) of some rows of a table of completions."""

        def gather(name: str) -> Tensor:
            values = [table[f"{kind}_{name}"][row] for kind, row in zip(kinds, rows, strict=True)]
            return torch.stack(values).to(self.device)

        states, masks, texts = gather("states").float(), gather("mask").bool(), gather("text")
        concepts = self.model.encode_concepts(states, masks) if use_z else None
        features = self.model.encode_image(scenes_to_pixels(images, self.device))
        return self.model.decode_masks(features, texts[:, 0], texts[:, 1], concepts)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Foreground IoU on "val" by level: own completions, true ones, and own answers as text without Z."""
        split = ConceptShapes("val", size=SIDE)
        numbers: dict[str, list[float]] = {}
        for start in range(0, len(self.held_out["own_mask"]), 60):
            rows = np.arange(start, min(start + 60, len(self.held_out["own_mask"])))
            tasks = [split.task(int(row)) for row in rows]
            for name, kind, use_z in (
                ("own", "own", True),
                ("true", "true", True),
                ("own_text_only", "own", False),
            ):
                images = [task.scene.pixels for task in tasks]
                logits, _ = self._decode(self.held_out, rows, [kind] * len(rows), images, use_z)
                for row, task, mask in zip(rows, tasks, to_masks(logits), strict=True):
                    if task.mask.any():
                        level, *_ = family_at(int(row))
                        numbers.setdefault(f"{name}_{level}", []).append(foreground_iou(mask, task.mask))
        return {key: mean(values) for key, values in sorted(numbers.items())}


def _completion_table(stage: CtmStage, path: Path, split: str, first: int, count: int) -> dict[str, Tensor]:
    """States, masks and answer tokens of own and of true completions; made in parts that are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Tensor]] = {}
    progress = progress_bar(count, "samples", f"{stage.name}: completions of {split}", mininterval=5)
    for start in range(0, count, 480):
        part = path.with_name(f"{path.stem}-{start:06d}.safetensors")
        stop = min(start + 480, count)
        if not part.exists():
            tensors = _complete(stage, ConceptShapes(split, size=SIDE), range(first + start, first + stop))
            write_tensors(part, tensors)
        with safe_open(part, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                parts.setdefault(name, []).append(file.get_tensor(name))
        progress.update(stop - start)
    progress.close()
    return {name: torch.cat(values) for name, values in parts.items()}


def _complete(stage: CtmStage, split: ConceptShapes, indices: range) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {}
    for start in range(0, len(indices), _GENERATION_BATCH):
        samples = [split[i] for i in indices[start : start + _GENERATION_BATCH]]
        prepared = [
            stage.processor.prepare(sample.image, sample.prompt, sample.references) for sample in samples
        ]
        generated = generate_with_states(
            stage.model.vlm,
            stage.processor.collate(prepared, device=stage.device),
            {"max_new_tokens": _MAX_TOKENS},
        )
        own_answers = []
        for ids, mask, item, sample in zip(
            generated.token_ids, generated.mask, prepared, samples, strict=True
        ):
            own_answers.append(stage.processor.decode_completion(ids[mask], item).answer or sample.prompt)
        _append(rows, "own", generated.hidden_states, generated.mask, stage.processor, own_answers)
        true = [
            true_completion(sample, item, stage.processor)
            for sample, item in zip(samples, prepared, strict=True)
        ]
        states, mask = _teacher_forced(stage, prepared, true)
        _append(rows, "true", states, mask, stage.processor, [sample.answer for sample in samples])
    return {name: torch.cat(values).contiguous() for name, values in rows.items()}


def true_completion(sample: ConceptSample, item: PreparedSample, processor: ConceptSegProcessor) -> str:
    """The ground-truth completion of a ConceptShapes sample."""
    box = None if sample.box is None else item.coordinates.image_box_to_text(sample.box)
    check = item.coordinates.check_box
    return format_completion(sample.think, sample.rule, check, box, sample.answer, processor.coordinate_scale)


def _teacher_forced(
    stage: CtmStage, prepared: list[PreparedSample], completions: list[str]
) -> tuple[Tensor, Tensor]:
    """AT-token states of given completions, completion tokens first, (B, T, C), and their mask."""
    batch = stage.processor.collate(prepared, completions, device=stage.device)
    with torch.no_grad():
        states = last_hidden_states(stage.model.vlm, model_inputs(batch))
    # Prompts end in one column, so completions begin in one column.
    first = int(batch["completion_mask"].any(0).nonzero()[0])
    return states[:, first:], batch["completion_mask"][:, first:]


def _append(
    rows: dict, kind: str, states: Tensor, mask: Tensor, processor: ConceptSegProcessor, answers: list[str]
) -> None:
    states, mask = states[:, :_MAX_TOKENS], mask[:, :_MAX_TOKENS]
    padding = _MAX_TOKENS - states.shape[1]
    states = nn.functional.pad(states.masked_fill(~mask[..., None], 0), (0, 0, 0, padding))
    rows.setdefault(f"{kind}_states", []).append(states.half().cpu())
    rows.setdefault(f"{kind}_mask", []).append(nn.functional.pad(mask, (0, padding)).to(torch.uint8).cpu())
    rows.setdefault(f"{kind}_text", []).append(torch.stack(processor.sam_text(answers), dim=1).cpu())
