"""Stage "ctm": train the CTM to translate completions to concept tokens; all else is frozen (stage I of the paper).

If the CTM is always trained together with the text of the answer, the concept tokens Z stay uninformative, since the
text is sufficient. It is therefore trained in three phases:

1. reading: auxiliary heads predict the box and the look of the described object from Z, without SAM 3;
2. imitation: Z approximates the tokens of a prompt of SAM 3 without Z: of its text prompt (the answer, and the CLS
   token that means "no box") if the answer singles out the object, otherwise of its box prompt (box, CLS and words);
   at first, all imitate the box;
3. segmenting: dice + focal (eq. 5) with Z and the complete answer, with Z and the noun of the answer, or with Z alone;
   where the answer singles out the object, Z still imitates the text prompt.

There are three kinds of completions: those of the VLM ("own", generated once and cached in the run folder), the ground
truth ("true"), and ground-truth completions for another object of the same scene ("other"), so that one image has
several masks. The target is always the object that the completion describes, even if the VLM chose another one: by its
answer if that singles out an object, otherwise by its box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.image_transforms import corners_to_center_format

from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.losses import segmentation_loss
from conceptseg_hf.modeling_conceptseg import ConceptSegForSegmentation
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor
from conceptseg_hf.sam_prompt import BOX_TEXT, ImageFeatures, box_tokens, decode, encode_image, encode_text

from .command import scaled
from .ctm_completions import KINDS, TARGET, UNKNOWN, CompletionWriter, CtmTask
from .loop import Schedule, mean
from .masks import total
from .sam_stage import images_to_pixels, logits_to_masks, mask_logits

TEXTS = ("full", "noun", "none")
_BOXES_ONLY = 2 / 3
"""Fraction of the second phase in which all completions with a box imitate it, since places take longer to learn."""


@dataclass(frozen=True)
class CtmSteps:
    """Number of steps of each phase."""

    reading: int = 2000
    imitation: int = 4500
    segmenting: int = 4000

    @property
    def total(self) -> int:
        """Number of steps of all phases."""
        return self.reading + self.imitation + self.segmenting

    @classmethod
    def scaled(cls, scale: float) -> CtmSteps:
        """Return the default numbers of steps times a factor, but at least four of each phase."""
        return cls(*(scaled(count, scale, 4) for count in astuple(cls())))

    def schedule(self) -> Schedule:
        """Return the schedule of the stage."""
        return Schedule(self.total, learning_rate=5e-4, warmup=50, decay=0.4, evaluate_every=1000)


class CtmWithHeads(nn.Module):
    """The CTM with the auxiliary heads of the first phase.

    Args:
        ctm: The CTM.
        num_queries: Number of concept tokens.
        width: Number of channels of a concept token.
        class_sizes: Number of classes of each auxiliary classification.
    """

    def __init__(self, ctm: nn.Module, num_queries: int, width: int, class_sizes: Sequence[int]) -> None:
        super().__init__()
        self.ctm = ctm
        self.box = nn.Linear(num_queries * width, 4)
        self.look = nn.Linear(num_queries * width, sum(class_sizes))


class CtmData(Protocol):
    """Tasks of the stage."""

    class_sizes: tuple[int, ...]
    """Number of classes of each auxiliary classification of looks."""

    def noun(self, answer: str) -> str:
        """Return the noun of an answer."""
        ...

    def task(self, row: int) -> CtmTask:
        """Return a training task."""
        ...

    def held_out(self) -> dict[str, Callable[[int], CtmTask]]:
        """Return functions that return held-out tasks, by the name of their set."""
        ...


class CtmStage:
    """Train the CTM.

    Args:
        model: The model with the VLM and SAM 3 of the previous stages and a new CTM.
        processor: The processor.
        data: The tasks.
        run_dir: Folder of the cached completions.
        steps: Number of steps of each phase.
        tasks: Number of tasks of the training split.
        images: Number of images per step, with two completions each.
        name: Name of the stage.
        device: Device of the model.
        held_out: Number of samples of each held-out set per evaluation.
        seed: Random seed of weights and data.
    """

    def __init__(
        self,
        model: ConceptSegForSegmentation,
        processor: ConceptSegProcessor,
        data: CtmData,
        run_dir: Path,
        steps: CtmSteps | None = None,
        tasks: int = 9600,
        images: int = 16,
        name: str = "ctm",
        device: str = "cpu",
        held_out: int = 240,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        model.to(device)  # type: ignore[arg-type]  # the wrapper in Transformers has no signature
        self.model, self.processor = model.eval(), processor
        self.steps = steps or CtmSteps()
        self.images, self.name, self.device, self.seed = images, name, device, seed
        model.vlm.requires_grad_(False)
        config = model.config.ctm_config
        self.module = CtmWithHeads(
            model.ctm, config.num_queries, config.sam_hidden_size, data.class_sizes
        ).to(device)
        self.data = data
        folder = run_dir / "completions"
        writer = CompletionWriter(model, processor, data.noun, len(data.class_sizes), name, device, seed)
        self.table = writer.table(folder / "train", data.task, tasks)
        self.held_out = {
            set_name: (source, writer.table(folder / set_name, source, held_out))
            for set_name, source in data.held_out().items()
        }

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a step, which depends on its phase."""
        rng = np.random.default_rng([17, self.seed, step])
        if step < self.steps.reading:
            return self._reading_loss(rng)
        tasks = rng.integers(len(self.table["present"]), size=self.images)
        # Two completions of different kinds for each image.
        rows = np.repeat(tasks, 2)
        kinds = [
            self._usable(int(row), int(kind)) for row in tasks for kind in rng.permutation(len(KINDS))[:2]
        ]
        if step < self.steps.reading + self.steps.imitation:
            boxes_only = step < self.steps.reading + _BOXES_ONLY * self.steps.imitation
            features = self.encode([self.data.task(int(row)) for row in tasks])
            targets, is_known = self.imitated_tokens(rows, kinds, features, boxes_only)
            loss = _imitation_loss(self._concepts(self.table, rows, kinds), targets, is_known)
            return loss, {"imitation": loss.item()}
        texts = [TEXTS[int(rng.integers(len(TEXTS)))] for _ in rows]
        return self._segmentation_loss(rows, kinds, texts)

    def _reading_loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = rng.integers(len(self.table["present"]), size=8 * self.images)
        kinds = rng.integers(len(KINDS), size=len(rows))
        flat = self._concepts(self.table, rows, kinds).flatten(1)
        boxes, classes = (
            self._gather(self.table, "box", rows, kinds),
            self._gather(self.table, "look", rows, kinds),
        )
        has_box, has_look = boxes[:, 2] > boxes[:, 0], classes[:, 0] > 0
        box_loss = (self.module.box(flat)[has_box] - boxes[has_box]).abs().mean()
        parts = self.module.look(flat)[has_look].split(list(self.data.class_sizes), dim=1)
        look_loss = total(
            nn.functional.cross_entropy(part, classes[has_look, i].long()) for i, part in enumerate(parts)
        )
        return 5 * box_loss + 0.5 * look_loss, {"box": box_loss.item(), "look": look_loss.item()}

    @torch.no_grad()
    def imitated_tokens(
        self, rows: np.ndarray, kinds: list[int], features: ImageFeatures, boxes_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens that Z imitates: those of SAM 3's text prompt or of its box prompt.

        The text prompt is not affected by an inaccurate box, and is the only one for several objects. The first token
        is the most informative one, so that a single concept token suffices: the last word, which the others precede in
        SAM 3's text encoder, or the box. The second one is the geometry encoder's CLS token: without it, SAM 3 segments
        texts worse, and cannot tell identical objects apart by their boxes.

        Args:
            rows: (B,) rows of the table.
            kinds: Kinds of the completions.
            features: Features of the B images.
            boxes_only: Whether all are those of the box prompt.

        Returns:
            (B, L2, D) tokens, and (B,) whether there are any: completions without a box need an answer that singles
            out the object.
        """
        sam, count = self.model.sam, self.model.config.ctm_config.num_queries
        boxes = self._gather(self.table, "box", rows, kinds)
        named = self._gather(self.table, "named", rows, kinds) & (not boxes_only)
        tokens, _ = box_tokens(sam, features.vision, _centers(boxes))
        answers = self._gather(self.table, "text", rows, kinds)
        words = [
            embeds[mask].flip(0) for embeds, mask in zip(*encode_text(sam, answers[:, 0], answers[:, 1]))
        ]
        assert features.geometry_cls is not None
        targets = [
            _repeated(torch.cat([word[:1], no_box, word[1:]]), word, count)
            if is_named
            else _repeated(torch.cat([box, self._box_words]), self._box_words, count)
            for is_named, word, no_box, box in zip(named.tolist(), words, features.geometry_cls, tokens)
        ]
        return torch.stack(targets), named | (boxes[:, 2] > boxes[:, 0])

    @cached_property
    def _box_words(self) -> Tensor:
        """The (T, D) embeddings of the words of SAM 3's box prompt; SAM 3 is frozen."""
        with torch.no_grad():
            embeds, mask = encode_text(self.model.sam, *self.processor.sam_text([BOX_TEXT], self.device))
        return embeds[0, mask[0]]

    def _segmentation_loss(
        self, rows: np.ndarray, kinds: list[int], texts: list[str]
    ) -> tuple[Tensor, dict[str, float]]:
        tasks = [self.data.task(int(row)) for row in rows[::2]]
        features = self.encode(tasks)
        concepts = self._concepts(self.table, rows, kinds)
        without_cls = ImageFeatures(features.vision, None)
        logits, presence = self._decode(self.table, without_cls, rows, kinds, texts, concepts)
        objects = self._gather(self.table, "object", rows, kinds)
        masks = [
            tasks[i // 2].mask if index == TARGET else tasks[i // 2].objects[index].mask
            for i, index in enumerate(objects.tolist())
        ]
        ground_truth = torch.from_numpy(np.stack(masks)).to(self.device)
        _, dice, focal = segmentation_loss(logits, ground_truth)
        present = ground_truth.flatten(1).any(1).float()
        presence_loss = nn.functional.binary_cross_entropy_with_logits(presence[:, 0], present)
        # Otherwise Z would rely on the box even where the answer suffices: the boxes of the training are accurate.
        targets, _ = self.imitated_tokens(rows, kinds, features)
        named = self._gather(self.table, "named", rows, kinds)
        imitation = _imitation_loss(concepts, targets, named)
        loss = dice + 10 * focal + 0.25 * presence_loss + imitation
        return loss, {
            "dice": dice.item(),
            "focal": focal.item(),
            "presence": presence_loss.item(),
            "imitation": imitation.item(),
        }

    def _usable(self, row: int, kind: int) -> int:
        """Return the kind, or "true" if it is not known which object the completion describes."""
        return KINDS.index("true") if self.table[f"{KINDS[kind]}_object"][row] == UNKNOWN else kind

    @torch.no_grad()
    def encode(self, tasks: Sequence[CtmTask]) -> ImageFeatures:
        """Encode the images of tasks; each is repeated for its two completions."""
        pixels = images_to_pixels([task.pixels for task in tasks], self.device)
        return encode_image(self.model.sam, pixels).repeat(2)

    def _gather(
        self, table: dict[str, Tensor], name: str, rows: np.ndarray, kinds: list[int] | np.ndarray
    ) -> Tensor:
        """Return the values of a column for rows of the given kinds; see `CompletionWriter.table`."""
        values = [table[f"{KINDS[kind]}_{name}"][row] for kind, row in zip(kinds, rows, strict=True)]
        return torch.stack(values).to(self.device)

    def _concepts(self, table: dict[str, Tensor], rows: np.ndarray, kinds: list[int] | np.ndarray) -> Tensor:
        states, mask = self._gather(table, "states", rows, kinds), self._gather(table, "mask", rows, kinds)
        return self.model.encode_concepts(states.float(), mask.bool())

    def _decode(
        self,
        table: dict[str, Tensor],
        features: ImageFeatures,
        rows: np.ndarray,
        kinds: list[int],
        texts: list[str],
        concepts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return mask logits (B, 1, h, w) and presence logits (B, 1).

        Args:
            table: Table of completions; see `CompletionWriter.table`.
            features: Features of the B images.
            rows: (B,) rows of the table.
            kinds: Kinds of the completions.
            texts: Which part of the answer is the text of each prompt, one of `TEXTS`.
            concepts: Concept tokens, or None to prompt with the text alone.
        """
        sam = self.model.sam
        embeds = mask = None
        if concepts is None or set(texts) != {"none"}:
            full, noun = (self._gather(table, name, rows, kinds) for name in ("text", "noun"))
            uses_noun = torch.tensor([text == "noun" for text in texts], device=self.device)
            ids = torch.where(uses_noun[:, None, None], noun, full)
            embeds, mask = encode_text(sam, ids[:, 0], ids[:, 1])
            mask = mask & torch.tensor([text != "none" for text in texts], device=self.device)[:, None]
        output = decode(sam, features, embeds, mask, concepts)
        presence_logits = output.presence_logits
        assert presence_logits is not None  # SAM 3 always returns them
        return mask_logits(output), presence_logits

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Evaluate the completions of the VLM on the held-out sets.

        Metrics: foreground IoU, by label, for prompts of Z alone, with the noun, and with the answer; for comparison,
        for the noun, the answer and the box without Z.
        """
        metrics: dict[str, list[float]] = {}
        for source, table in self.held_out.values():
            for start in range(0, len(table["present"]), 48):
                rows = np.arange(start, min(start + 48, len(table["present"])))
                self._evaluate_rows(table, rows, [source(int(row)) for row in rows], metrics)
        return {key: mean(values) for key, values in sorted(metrics.items())}

    def _evaluate_rows(
        self,
        table: dict[str, Tensor],
        rows: np.ndarray,
        tasks: list[CtmTask],
        metrics: dict[str, list[float]],
    ) -> None:
        """Add the foreground IoUs of rows to the metrics."""
        own = [KINDS.index("own")] * len(rows)
        pixels = images_to_pixels([task.pixels for task in tasks], self.device)
        with_cls = encode_image(self.model.sam, pixels)
        without = ImageFeatures(with_cls.vision, None)
        concepts = self._concepts(table, rows, own)
        boxes = self._gather(table, "box", rows, own)
        box_text = encode_text(self.model.sam, *self.processor.sam_text([BOX_TEXT] * len(rows), self.device))
        logits = {"box": mask_logits(decode(self.model.sam, with_cls, *box_text, boxes=_centers(boxes)))}
        for name, text, features, z in (
            ("z", "none", without, concepts),
            ("z_noun", "noun", without, concepts),
            ("z_text", "full", without, concepts),
            ("noun", "noun", with_cls, None),
            ("text", "full", with_cls, None),
        ):
            logits[name], _ = self._decode(table, features, rows, own, [text] * len(rows), z)
        for name, values in logits.items():
            for mask, task in zip(logits_to_masks(values, tasks[0].mask.shape[0]), tasks, strict=True):
                if task.mask.any():
                    metrics.setdefault(f"{name}_{task.label}", []).append(foreground_iou(mask, task.mask))


def _centers(boxes: Tensor) -> Tensor:
    """Return (N, 4) corners as (N, 1, 4) boxes of SAM 3: one per image, center x, center y, width, height."""
    return cast(Tensor, corners_to_center_format(boxes))[:, None]  # type: ignore[arg-type]


def _imitation_loss(concepts: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error of (B, L2, D) tokens in the rows of a mask (B,), in units of the variance."""
    if not mask.any():
        return concepts.sum() * 0
    return (concepts - targets)[mask].square().mean() / targets.var()


def _repeated(tokens: Tensor, padding: Tensor, count: int) -> Tensor:
    """Return the first `count` of (T, D) tokens, followed by repetitions of the padding (P, D)."""
    missing = max(0, count - len(tokens))
    return torch.cat([tokens, *[padding] * math.ceil(missing / len(padding))])[:count]
