"""Stage "prior": train VLM, positional prior and mask decoder on examples with concentration tokens.

The VLM and the vision backbone of SAM 3 come from a ConceptSeg checkpoint. The backbone is frozen; of its feature
pyramid only the finest level is trained, which the checkpoint does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from conceptseg_hf import ConceptSegForSegmentation
from conceptseg_hf.coprs import CoPRSConfig, CoPRSForSegmentation, CoPRSProcessor
from conceptseg_hf.coprs.losses import prior_losses
from conceptseg_hf.coprs.positional_prior import resample_prior
from conceptseg_hf.coprs.sam_decoder import PriorFeatures, decode
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.presets import NANO_IMAGE_SIZE
from conceptseg_hf.vlm_families import Vlm

from ..from_scratch.precision import autocast, prepare_for_bfloat16
from ..from_scratch.sam_stage import images_to_pixels
from ..from_scratch.vlm_stage import VlmStage
from ..nano.examples import random_object
from ..nano.scenes import TaskMix, sheet_scene, simple_scene
from .examples import PriorExample, PriorExampleWriter, masks_of
from .measuring import measure, summarize

DICE_WEIGHT, FOCAL_WEIGHT = 1.5, 10.0
_FIRST_TASK = 2_000_000  # above the tasks of the stages of nano
_DECODED = 24  # number of masks that are decoded per step
_GUIDED = 0.25  # fraction of the steps over which masks are also decoded from ideal priors


@dataclass(frozen=True)
class PriorSettings:
    """What the stage trains; the defaults are those of the embedded checkpoint.

    Attributes:
        with_reasoning: Whether completions contain reasoning before the concentration token.
        prior_weight: Weight of the cross-entropy of the prior (eq. 8).
        random_choice_families: Families whose examples describe a random object of the scene; see
            `nano.vlm_data.RANDOM_CHOICE_FAMILIES`.
    """

    with_reasoning: bool = True
    prior_weight: float = 1.0
    random_choice_families: frozenset[str] = frozenset()


def build_model(
    start: ConceptSegForSegmentation,
    processor: CoPRSProcessor,
    seed: int = 0,
    backbone: nn.Module | None = None,
    **config: Any,
) -> CoPRSForSegmentation:
    """Return a model with the VLM and the vision backbone of a small checkpoint, and new other parts.

    Args:
        start: The checkpoint nano or mini.
        processor: The processor of the model.
        seed: Random seed of the new parts. Some of them are never trained, such as SAM's Fourier features of positions,
            and therefore not in the state of a run: with the same seed, a resumed run has the same ones.
        backbone: Vision encoder of another SAM 3, to use instead of that of `start`.
        **config: Further settings of `CoPRSConfig`.

    Raises:
        ValueError: If the vision backbone does not fit.
    """
    preset = "nano" if processor.canvas_size == NANO_IMAGE_SIZE else "mini"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CoPRSForSegmentation(
            CoPRSConfig.from_preset(
                preset,
                vlm_config=start.config.vlm_config.to_dict(),
                ref_pos_token_id=processor.ref_pos_token_id,
                **config,
            )
        )
    model.vlm.load_state_dict(start.vlm.state_dict())
    embeddings = model.vlm.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[processor.ref_pos_token_id] = embeddings[: processor.ref_pos_token_id].mean(dim=0)
    source: Mapping[str, Tensor] = (start.sam.vision_encoder if backbone is None else backbone).state_dict()
    levels = [4.0, 2.0, 1.0].index(start.config.sam_config.vision_config.scale_factors[0])
    weights: dict[str, Tensor] = {}
    for name, value in source.items():
        head, found, tail = name.partition("neck.fpn_layers.")
        level, _, rest = tail.partition(".")
        if not found:
            weights[name] = value
        elif int(level) + levels < len(model.config.sam_config.vision_config.scale_factors):
            weights[f"{head}{found}{int(level) + levels}.{rest}"] = value  # nano lacks the level of factor 4
    missing, unexpected = model.sam.vision_encoder.load_state_dict(weights, strict=False)
    if unexpected or any("fpn_layers.0." not in name for name in missing):
        raise ValueError(
            f"the vision backbone does not fit: missing {missing}, unexpected {unexpected}; start from the "
            f"checkpoint {preset}."
        )
    tokenizer, generation_config = processor.tokenizer, model.vlm.generation_config
    generation_config.eos_token_id = tokenizer.eos_token_id
    generation_config.pad_token_id = tokenizer.pad_token_id
    model.processor = processor
    return model


class PriorModule(nn.Module):
    """The model as the module of a `VlmStage`."""

    def __init__(self, model: CoPRSForSegmentation) -> None:
        super().__init__()
        self.model = model
        model.sam.vision_encoder.neck.fpn_layers[0].requires_grad_(True)

    @property
    def vlm(self) -> Vlm:
        """The VLM."""
        return self.model.vlm

    def train(self, mode: bool = True) -> PriorModule:
        """Set the mode; see `CoPRSForSegmentation.train`."""
        super().train(mode)
        self.model.train(mode)
        self.model.sam.vision_encoder.neck.fpn_layers[0].requires_grad_(True)
        return self


class PriorData:
    """Examples of the stage; the fraction of complete tasks increases.

    Args:
        steps: Number of steps.
        processor: The processor.
        held_out: Number of samples of the split "val" per evaluation.
        seed: Random seed.
        settings: Whether examples have reasoning, and which describe a random object.
        count: Number of task examples per step.
    """

    def __init__(
        self,
        steps: int,
        processor: CoPRSProcessor,
        held_out: int = 120,
        seed: int = 0,
        settings: PriorSettings | None = None,
        count: int = 24,
    ) -> None:
        self.steps, self.held_out, self.seed, self.count = steps, held_out, seed, count
        self.settings = settings or PriorSettings()
        self.writer = PriorExampleWriter(processor)
        self.tasks = TaskMix()

    def examples(self, step: int) -> list[PriorExample]:
        """Return the examples of a step: either perception examples or tasks."""
        progress = step / self.steps
        perception = 0.6 if progress < 0.15 else 0.3 if progress < 0.6 else 0.1
        rng = np.random.default_rng([31, self.seed, step])
        if rng.random() < perception:
            return [self._perception(rng, step * self.count + i) for i in range(self.count * 2 // 3)]
        # Tasks with references have two images: batches of similar length need less padding.
        with_references = rng.random() < 0.5
        examples: list[PriorExample] = []
        number = _FIRST_TASK + step * 8 * self.count
        while len(examples) < self.count * (2 if with_references else 3) // 2:
            task = self.tasks.task(number)
            if bool(task.references) == with_references:
                examples.append(
                    self.writer.reasoning(rng, task, self._chosen(number), self.settings.with_reasoning)
                )
            number += 1
        return examples

    def _chosen(self, number: int) -> int | None:
        """Return the object that the example of a task describes; None for the correct one."""
        if self.tasks.family(number) not in self.settings.random_choice_families:
            return None
        rng = np.random.default_rng([41, self.seed, number])
        return random_object(rng, self.tasks.task(number).scene)

    def _perception(self, rng: np.random.Generator, number: int) -> PriorExample:
        while True:
            kind = rng.random()
            if kind < 0.25:
                scene = sheet_scene(rng)
            elif kind < 0.5:
                scene = simple_scene(rng, int(rng.integers(1, 6)))
            else:
                scene = self.tasks.task(_FIRST_TASK + number).scene
            example = self.writer.positions(rng, scene, several=rng.random() < 0.5)
            if example.masks:
                return example
            number += 1

    def measure(self, model: CoPRSForSegmentation, processor: CoPRSProcessor) -> dict[str, float]:
        """Return the means of `measuring.summarize` on the split "val"."""
        rows = measure(model, processor, ConceptShapes("val", size=NANO_IMAGE_SIZE), self.held_out)
        which_one = ConceptShapes("val", size=NANO_IMAGE_SIZE, groups=["which one"])
        rows += measure(model, processor, which_one, self.held_out // 3)
        return {name: values["mean"] for name, values in summarize(rows, resamples=0).items()}


class PriorExamples(Protocol):
    """Data of the stage."""

    def examples(self, step: int) -> Sequence[PriorExample]:
        """Return the examples of a step."""

    def measure(self, model: CoPRSForSegmentation, processor: CoPRSProcessor) -> dict[str, float]:
        """Return metrics on held-out samples."""


class PriorStage:
    """Train all of the model but the frozen backbone: L_SEG (eq. 8) and the cross-entropy of the completions.

    Args:
        model: The model.
        processor: Its processor.
        data: The examples.
        steps: Number of steps.
        device: Device of the model.
        seed: Random seed.
        settings: What is trained.
        name: Name of the stage.
    """

    def __init__(
        self,
        model: CoPRSForSegmentation,
        processor: CoPRSProcessor,
        data: PriorExamples,
        steps: int,
        device: str = "cpu",
        seed: int = 0,
        settings: PriorSettings | None = None,
        name: str = "prior",
    ) -> None:
        self.name, self.settings, self.data = name, settings or PriorSettings(), data
        self.module = PriorModule(model)
        self.model, self.processor, self.steps = model, processor, steps
        self.device, self.seed = device, seed
        prepare_for_bfloat16(model.sam, device)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        # The stage initializes number embeddings, which the start has already trained.
        self._vlm_stage = VlmStage(_unused(self.module), _unused(), processor, 0, steps, self.name, device)
        model.load_state_dict(weights)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a step."""
        examples = self.data.examples(step)
        with autocast(self.device):
            run = self._vlm_stage.run(examples)
            loss, metrics = self._vlm_stage.language_loss(run)
        is_position = (run.batch["input_ids"] == self.processor.ref_pos_token_id) & run.batch["completion"]
        rows, columns = is_position.nonzero(as_tuple=True)
        masks = torch.from_numpy(masks_of(examples)).to(self.device)
        features = self._encode([example.images[-1] for example in examples]).select(rows)
        none = torch.zeros(len(rows), 1, 64, 64, dtype=torch.bool, device=self.device)
        states = run.states[rows, columns].float()
        prior = resample_prior(self.model.prior(states, features.keys), none, 0.0)
        ignore = torch.zeros_like(masks)
        # The prior of every token is trained; the masks of some of them.
        rng = np.random.default_rng([37, self.seed, step])
        chosen = torch.from_numpy(rng.permutation(len(rows))[:_DECODED]).to(self.device)
        prompts = prior[chosen]
        if rng.random() < 0.5 * max(0.0, 1 - step / (_GUIDED * self.steps)):
            prompts = ideal_prior(masks[chosen])
        decoded = decode(self.model.sam, features.select(chosen), prompts)
        losses = prior_losses(prior, prior, masks, ignore)
        mask_losses = prior_losses(prompts.detach(), decoded, masks[chosen], ignore[chosen])
        loss = (
            loss
            + self.settings.prior_weight * losses.prior
            + DICE_WEIGHT * mask_losses.dice
            + FOCAL_WEIGHT * mask_losses.focal
        )
        return loss, {
            **metrics,
            "prior": losses.prior.item(),
            "dice": mask_losses.dice.item(),
            "focal": mask_losses.focal.item(),
        }

    def _encode(self, images: list[np.ndarray]) -> PriorFeatures:
        """Encode images; only the finest level of the feature pyramid is differentiable."""
        encoder = self.model.sam.vision_encoder
        pixels = images_to_pixels(images, self.device)
        with torch.no_grad(), autocast(self.device):
            states = encoder.backbone(pixels).last_hidden_state.float()
        grid = pixels.shape[-1] // encoder.config.backbone_config.patch_size
        states = states.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        return PriorFeatures(tuple(layer(states) for layer in encoder.neck.fpn_layers))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the data on held-out samples."""
        self.module.eval()
        return self.data.measure(self.model, self.processor)


def ideal_prior(masks: Tensor) -> Tensor:
    """Return (N, 1, 64, 64) logits of a prior that knows the (N, S, S) masks at the resolution of the keys."""
    coverage = nn.functional.interpolate(masks[:, None].float(), size=(16, 16), mode="area")
    logits = coverage.clamp(0.02, 0.98).logit()
    return nn.functional.interpolate(logits, size=(64, 64), mode="bilinear")


def _unused(value: Any = None) -> Any:
    """Return a value whose type is not checked: the `VlmStage` only runs examples, without heads and data."""
    return value
