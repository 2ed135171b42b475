"""Concept tokens tuned on many marked images: tokens in SAM 3's prompt space that precede a phrase, with SAM 3 frozen.

`induction.induce(refine=True)` tunes tokens on a few references in full batches, as one candidate among the phrases of
the VLM. `tune_concept` is for tens to hundreds of images: it trains in mini-batches, withholds a part of the images to
choose the best step, and needs no VLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .boxes import foreground_iou
from .concept_prompt import ConceptPrompt
from .devices import execution_device, loaded
from .images import ImageInput, load_image, load_mask
from .induction import verify
from .losses import segmentation_loss
from .modeling_conceptseg import ConceptSegForSegmentation, evaluating
from .postprocessing import post_process_mask
from .processing_conceptseg import ConceptSegProcessor
from .progress import progress_bar
from .references import Reference
from .sam_prompt import ImageFeatures, encode_image

WITHHELD = 5
"""One of this many references is withheld from tuning, to choose the best step and for the concept's score."""

_MAX_WITHHELD = 40
_MAX_VERIFIED = 9  # `verify` accepts as many references as fit a mosaic
_MAX_CACHE = 4 * 2**30  # bytes of image features that are kept; more are computed again for each batch
_CHECKS = 10  # times the withheld references are decoded during tuning
_PRESENCE_WEIGHT = 0.1
_INITIAL_SCALE = 0.02


@dataclass(frozen=True)
class TuningOptions:
    """How tokens are tuned.

    Attributes:
        num_tokens: Number of tokens.
        steps: Number of steps.
        batch_size: Number of images in a step.
        learning_rate: Peak learning rate of the tokens (Adam, linear decay).
        adapter_learning_rate: Peak learning rate of additional parameters.
        seed: Random seed of the initial tokens and of the batches.

    Raises:
        ValueError: If a value is not positive.
    """

    num_tokens: int = 8
    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 0.1
    adapter_learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_tokens", "steps", "batch_size", "learning_rate", "adapter_learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"TuningOptions: {name} is {getattr(self, name)}; use a positive number.")


def tune_concept(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    prompt: str,
    references: Sequence[Reference],
    negatives: Sequence[ImageInput] = (),
    phrase: str | None = None,
    options: TuningOptions | None = None,
    progress: bool = False,
) -> ConceptPrompt:
    """Tune concept tokens on images with masks, to be applied to other images by SAM 3 alone.

    Args:
        model: The model; its weights are not changed.
        processor: Its processor.
        prompt: The user's prompt.
        references: Images with masks; at least two.
        negatives: Images without the concept.
        phrase: Phrase after the tokens, such as one that `induce` selected; the prompt by default.
        options: Settings of the tuning.
        progress: Whether to show a progress bar.

    Returns:
        The concept, with score and threshold on at most nine withheld references.

    Raises:
        ValueError: If a reference has no mask or cannot be used, there are fewer than two, or the prompt is invalid.
    """
    processor.check_prompt(prompt)
    phrase = phrase or prompt
    tokens = tune_tokens(
        model, processor, phrase, references, negatives, options or TuningOptions(), progress=progress
    )
    return finish_concept(model, processor, prompt, phrase, tokens, references, negatives)


def finish_concept(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    prompt: str,
    phrase: str,
    tokens: Tensor,
    references: Sequence[Reference],
    negatives: Sequence[ImageInput] = (),
) -> ConceptPrompt:
    """Return a concept of tokens and a phrase, scored on withheld references; see `tune_concept`."""
    concept = ConceptPrompt(prompt, (phrase,), concept_embeds=tokens.detach().float().cpu())
    _, withheld = split(references)
    return verify(concept, model, processor, withheld[:_MAX_VERIFIED], negatives[:_MAX_VERIFIED])


def split(references: Sequence[Reference]) -> tuple[list[Reference], list[Reference]]:
    """Split references into those that tokens are tuned on, and withheld ones: every fifth, at most 40."""
    if len(references) < 2:
        raise ValueError(
            f"tune_concept: there are {len(references)} references; give at least two, one of which is withheld."
        )
    count = min(_MAX_WITHHELD, max(1, len(references) // WITHHELD))
    chosen = set(np.linspace(0, len(references) - 1, count + 2).round().astype(int)[1:-1].tolist()) or {0}
    tuned = [reference for i, reference in enumerate(references) if i not in chosen]
    return tuned, [references[i] for i in sorted(chosen)]


def tune_tokens(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    phrase: str,
    references: Sequence[Reference],
    negatives: Sequence[ImageInput],
    options: TuningOptions,
    adapters: Sequence[nn.Parameter] = (),
    progress: bool = False,
) -> Tensor:
    """Tune tokens, and additional parameters of SAM 3 if given, which end with the values of the best step.

    Args:
        model: The model.
        processor: Its processor.
        phrase: Phrase after the tokens.
        references: Images with masks.
        negatives: Images without the concept.
        options: Settings of the tuning.
        adapters: Additional parameters of SAM 3, such as those of a LoRA adapter. If any belongs to the image encoder,
            features of images are computed in each step instead of kept.
        progress: Whether to show a progress bar.

    Returns:
        (L, D) tokens.

    Raises:
        ValueError: If a reference has no mask or cannot be used, or there are fewer than two.
    """
    tuned, withheld = split(references)
    device = execution_device(model.sam)
    generator = torch.Generator().manual_seed(options.seed)
    width = model.config.ctm_config.sam_hidden_size
    tokens = (_INITIAL_SCALE * torch.randn(options.num_tokens, width, generator=generator)).to(device)
    with evaluating(model), loaded(model), _trainable(model, adapters):
        # `_trainable` leaves only the adapters with gradients.
        keep = not any(parameter.requires_grad for parameter in model.sam.vision_encoder.parameters())
        examples = _Examples(model, processor, tuned, negatives, keep)
        checks = _Examples(model, processor, withheld, (), keep)
        tokens.requires_grad_()
        trained = [tokens, *adapters]
        optimizer = torch.optim.Adam(
            [
                {"params": [tokens], "lr": options.learning_rate},
                *([{"params": list(adapters), "lr": options.adapter_learning_rate}] if adapters else []),
            ]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.steps)
        best = (-1.0, [value.detach().clone() for value in trained])
        bar = progress_bar(options.steps, "steps", "tune") if progress else None
        for step, rows in enumerate(_batches(len(examples), options, generator), start=1):
            optimizer.zero_grad()
            _loss(model, processor, phrase, tokens, examples, rows).backward()
            optimizer.step()
            schedule.step()
            if bar is not None:
                bar.update()
            if step % max(1, options.steps // _CHECKS) == 0 or step == options.steps:
                score = float(np.mean(_ious(model, processor, phrase, tokens, checks, options.batch_size)))
                if score > best[0]:
                    best = (score, [value.detach().clone() for value in trained])
        if bar is not None:
            bar.close()
        with torch.no_grad():
            for value, kept in zip(trained, best[1], strict=True):
                value.copy_(kept)
    return tokens.detach()


class _Examples:
    """Images with their masks; an image without the concept has the mask None.

    Features are kept if they fit. Without `keep`, each call computes them, with gradients where these are enabled.
    """

    def __init__(
        self,
        model: ConceptSegForSegmentation,
        processor: ConceptSegProcessor,
        references: Sequence[Reference],
        negatives: Sequence[ImageInput],
        keep: bool,
    ) -> None:
        self._model, self._processor, self._keep = model, processor, keep
        self._images: list[ImageInput] = [*(reference.image for reference in references), *negatives]
        self.masks: list[np.ndarray | None] = []
        for number, reference in enumerate(references):
            if reference.mask is None:
                raise ValueError(f"tune_concept: reference {number} has no mask; give one.")
            self.masks.append(load_mask(reference.mask, load_image(reference.image).size))
        self.masks += [None] * len(negatives)
        self._cache: dict[int, ImageFeatures] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._images)

    def features(self, rows: Sequence[int]) -> ImageFeatures:
        """Return the features of some images, on the execution device."""
        model = self._model
        if not self._keep:
            pixels = torch.stack([self._pixels(row) for row in rows]).to(model.sam.dtype)
            return encode_image(model.sam, pixels, model.config.sam_geometry_cls)
        device = execution_device(model.sam)
        parts = [self._cache[row] if row in self._cache else self._encode(row) for row in rows]
        return ImageFeatures.concatenate([_moved(part, device) for part in parts])

    def _pixels(self, row: int) -> Tensor:
        return self._processor.sam_pixels(load_image(self._images[row]))

    def _encode(self, row: int) -> ImageFeatures:
        features = self._model.encode_image(self._pixels(row)[None])
        size = sum(level.nbytes for level in _tensors(features))
        if self._bytes + size <= _MAX_CACHE:
            self._cache[row] = _moved(features, torch.device("cpu"))
            self._bytes += size
        return features


def _tensors(features: ImageFeatures) -> list[Tensor]:
    own = [] if features.geometry_cls is None else [features.geometry_cls]
    return [*features.vision.fpn_hidden_states, *features.vision.fpn_position_encoding, *own]


def _moved(features: ImageFeatures, device: torch.device) -> ImageFeatures:
    vision = type(features.vision)(
        fpn_hidden_states=tuple(level.to(device) for level in features.vision.fpn_hidden_states),
        fpn_position_encoding=tuple(level.to(device) for level in features.vision.fpn_position_encoding),
    )
    cls = features.geometry_cls
    return ImageFeatures(vision, None if cls is None else cls.to(device))


def _batches(count: int, options: TuningOptions, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield the rows of each step; every image is used once before any is used again."""
    order: list[int] = []
    for _ in range(options.steps):
        while len(order) < min(options.batch_size, count):
            order += torch.randperm(count, generator=generator).tolist()
        rows, order = order[: options.batch_size], order[options.batch_size :]
        yield rows


def _decode(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    phrase: str,
    tokens: Tensor,
    features: ImageFeatures,
) -> tuple[Tensor, Tensor]:
    count = len(features)
    ids, mask = processor.sam_text([phrase] * count)
    return model.decode_masks(features, ids, mask, tokens[None].expand(count, -1, -1))


def _loss(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    phrase: str,
    tokens: Tensor,
    examples: _Examples,
    rows: Sequence[int],
) -> Tensor:
    """L_seg on the images with the concept, and cross-entropy of the presence on all."""
    with torch.enable_grad():
        logits, presence = _decode(model, processor, phrase, tokens, examples.features(rows))
        losses = []
        for row, index in enumerate(rows):
            mask = examples.masks[index]
            if mask is not None:
                target = torch.from_numpy(mask)[None].to(logits.device)
                losses.append(segmentation_loss(logits[row : row + 1], target)[0])
        present = presence.new_tensor([[float(examples.masks[index] is not None)] for index in rows])
        missed = nn.functional.binary_cross_entropy_with_logits(presence.float(), present.float())
        return sum(losses, missed.new_zeros(())) / max(1, len(losses)) + _PRESENCE_WEIGHT * missed


@torch.no_grad()
def _ious(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    phrase: str,
    tokens: Tensor,
    examples: _Examples,
    batch_size: int,
) -> list[float]:
    ious = []
    for start in range(0, len(examples), batch_size):
        rows = range(start, min(start + batch_size, len(examples)))
        logits, _ = _decode(model, processor, phrase, tokens, examples.features(rows))
        for row, index in enumerate(rows):
            mask = examples.masks[index]
            assert mask is not None  # withheld references have masks
            image, _ = post_process_mask(logits[row, 0], mask.shape[::-1], processor.mask_resampling)
            ious.append(foreground_iou(np.asarray(image) > 0, mask))
    return ious


@contextmanager
def _trainable(model: ConceptSegForSegmentation, adapters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Context in which only the adapters among the weights have gradients."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in adapters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None


__all__ = ["TuningOptions", "finish_concept", "split", "tune_concept", "tune_tokens"]
