"""Stage "sam": train SAM 3 to segment what a noun phrase, a box, or both describe in an image.

Each image is combined with several prompts, including prompts for absent objects, so that SAM 3 must use the words to
distinguish them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Sam3Config, Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput

from conceptseg_hf.boxes import Box
from conceptseg_hf.losses import dice_loss
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor
from conceptseg_hf.sam_prompt import ImageFeatures, encode_image, encode_text

from .masks import mask_to_tokens
from .precision import autocast, prepare_for_bfloat16
from .sam_guidance import SamAttention

SceneT = TypeVar("SceneT")


@dataclass(frozen=True)
class SegmentationPrompt:
    """A prompt for SAM 3 with its ground truth.

    Attributes:
        phrase: The text.
        box: Box in pixels, or None.
        mask: Ground-truth mask, (S, S) bool; empty if the object is absent.
        segment: Whether the mask is trained; otherwise only presence is.
    """

    phrase: str
    box: Box | None
    mask: np.ndarray
    segment: bool = True


class SamData(Protocol[SceneT]):
    """Images and prompts of the stage. A scene is an image with all its objects, in a representation of the data."""

    def pretraining_scenes(self, step: int) -> list[SceneT]:
        """Return the scenes of a step of the pretraining."""
        ...

    def prompted_scenes(self, step: int) -> list[tuple[SceneT, list[SegmentationPrompt]]]:
        """Return the scenes of a step with the same number of prompts each."""
        ...

    def pixels(self, scene: SceneT) -> np.ndarray:
        """Return the image of a scene, (S, S, 3) uint8."""
        ...

    def dense_loss(self, heads: nn.Module, scenes: Sequence[SceneT], levels: Sequence[Tensor]) -> Tensor:
        """Compute the loss of the auxiliary heads.

        Args:
            heads: The heads.
            scenes: The B scenes.
            levels: (B, D, h, w) feature maps of SAM 3 that it uses, from fine to coarse.
        """
        ...

    def guidance(
        self, scene: SceneT, prompt: SegmentationPrompt, prompt_length: int, grid: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return attention targets of the heads of SAM 3's fusion, or none.

        Args:
            scene: The scene.
            prompt: The prompt.
            prompt_length: Number of tokens of the padded prompt, T: the begin token, the words, ..., the token of the
                box, and the CLS token of the geometry encoder.
            grid: Number of image tokens per side.

        Returns:
            (heads, grid * grid, T) bool: the correct prompt tokens of each head and image token.
            (heads,) bool: the heads that have targets.
        """
        ...

    def evaluate(self, stage: SamStage[SceneT]) -> dict[str, float]:
        """Return metrics of SAM 3 on held-out samples."""
        ...


class SamWithHeads(nn.Module):
    """SAM 3 with auxiliary heads that predict dense targets from its feature maps.

    Args:
        config: Config of SAM 3.
        make_heads: Function from the number of channels of the feature maps to the heads.
    """

    def __init__(self, config: Sam3Config, make_heads: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.sam = Sam3Model._from_config(config)
        self.dense = make_heads(config.vision_config.fpn_hidden_size)  # type: ignore[union-attr]


class SamStage(Generic[SceneT]):
    """Train all of SAM 3 on masks (dice + focal), presence (cross-entropy), dense targets and attention targets.

    The vision tower is first pretrained on the dense targets alone, as phrases cannot be learned before the objects
    that they describe can be seen. The geometry encoder's CLS token, the last token of each prompt of SAM 3, is omitted
    from half of the prompts without a box. Otherwise it would mean "no box", although concept tokens may contain a box.

    Args:
        module: SAM 3 with the heads of the data.
        data: Images and prompts.
        processor: The processor of the checkpoint.
        pretraining: Number of steps of the pretraining.
        device: Device of the module.
        seed: Random seed.
        mask_size: Side length at which masks are compared; by default that of SAM 3's logits. Objects that are thinner
            than half a pixel of the logits need a larger one: at the size of the logits, no pixel of them has a
            target above 0.5.
    """

    name = "sam"

    def __init__(
        self,
        module: SamWithHeads,
        data: SamData[SceneT],
        processor: ConceptSegProcessor,
        pretraining: int,
        device: str = "cpu",
        seed: int = 0,
        mask_size: int | None = None,
    ) -> None:
        self.module = module.to(device)
        self.sam, self.mask_size = module.sam, mask_size
        self.data, self.processor, self.pretraining = data, processor, pretraining
        self.device, self.seed, self.is_pretraining = device, seed, False
        prepare_for_bfloat16(self.sam, device)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a step."""
        self.is_pretraining = step < self.pretraining
        with autocast(self.device):
            return self._pretraining_loss(step) if self.is_pretraining else self._prompt_loss(step)

    def _pretraining_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        scenes = self.data.pretraining_scenes(step)
        levels = self.sam.get_vision_features(pixel_values=self.pixel_values(scenes)).fpn_hidden_states
        loss = self.data.dense_loss(self.module.dense, scenes, levels[:-1])
        return loss, {"dense": loss.item()}

    def _prompt_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        batch = self.data.prompted_scenes(step)
        scenes = [scene for scene, _ in batch]
        pairs = [(scene, prompt) for scene, prompts in batch for prompt in prompts]
        prompts = [prompt for _, prompt in pairs]
        encoded = encode_image(self.sam, self.pixel_values(scenes), geometry_cls=False)
        features = encoded.repeat(len(pairs) // len(scenes))
        embeds, mask = self._encode_prompts(np.random.default_rng([9, self.seed, step]), features, prompts)
        attention = SamAttention(self.sam)
        with attention.recorded():
            output = self.sam(
                vision_embeds=features.vision,
                text_embeds=BaseModelOutputWithPooling(pooler_output=embeds),
                attention_mask=mask,
            )
        grid = features.vision.fpn_hidden_states[-2].shape[-1]
        guidance = [self.data.guidance(*pair, embeds.shape[1], grid) for pair in pairs]
        focus = attention.prompt_loss(*(self._tensor(np.stack(arrays)) for arrays in zip(*guidance)))
        ground_truth = self._tensor(np.stack([prompt.mask for prompt in prompts])).float()
        present = ground_truth.flatten(1).any(1)
        object_tokens = np.stack([mask_to_tokens(prompt.mask, grid) for prompt in prompts])
        look = attention.presence_loss(self._tensor(object_tokens), present)
        segment = torch.tensor([prompt.segment for prompt in prompts], device=self.device)
        logits, soft_masks = at_same_size(mask_logits(output).float(), ground_truth, self.mask_size)
        dice = dice_loss(logits[present], soft_masks[present])
        focal = focal_loss(logits, soft_masks)[segment].mean()
        presence_logits = output.presence_logits
        assert presence_logits is not None  # SAM 3 always returns them
        presence = nn.functional.binary_cross_entropy_with_logits(
            presence_logits[:, 0].float(), present.float()
        )
        dense = self.data.dense_loss(self.module.dense, scenes, encoded.vision.fpn_hidden_states[:-1])
        loss = dice + 10 * focal + 0.5 * presence + 0.4 * dense + 0.3 * focus + 0.3 * look
        parts = {
            "dice": dice,
            "focal": focal,
            "presence": presence,
            "dense": dense,
            "focus": focus,
            "look": look,
        }
        return loss, {name: part.item() for name, part in parts.items()}

    def _encode_prompts(
        self, rng: np.random.Generator, features: ImageFeatures, prompts: Sequence[SegmentationPrompt]
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens of prompts (B, T + 2, D), namely text, box and geometry CLS, and their mask (B, T + 2)."""
        text, text_mask = encode_text(
            self.sam, *self.processor.sam_text([prompt.phrase for prompt in prompts], self.device)
        )
        size = prompts[0].mask.shape[0]
        boxes, has_box = sam_boxes([prompt.box for prompt in prompts], size, self.device)
        # The pooling of regions does not support autocast. The encoder uses the coarsest map only.
        with torch.autocast(torch.device(self.device).type, enabled=False):
            geometry = self.sam.geometry_encoder(
                box_embeddings=boxes,
                box_mask=has_box[:, None],
                box_labels=has_box[:, None].long(),
                img_feats=[features.vision.fpn_hidden_states[-2].float()],
                img_pos_embeds=[features.vision.fpn_position_encoding[-2].float()],
            )
        geometry_mask = geometry.attention_mask.bool().clone()
        keep_cls = torch.from_numpy(rng.random(len(prompts)) < 0.5).to(self.device)
        geometry_mask[:, -1] = has_box | keep_cls
        return (
            torch.cat([text, geometry.last_hidden_state], dim=1),
            torch.cat([text_mask, geometry_mask], dim=1),
        )

    def pixel_values(self, scenes: Sequence[SceneT]) -> Tensor:
        """Return the images of scenes as inputs of SAM 3, (B, 3, S, S)."""
        return images_to_pixels([self.data.pixels(scene) for scene in scenes], self.device)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the data on held-out samples."""
        self.module.eval()
        return self.data.evaluate(self)


def mask_logits(output: Sam3ImageSegmentationOutput) -> Tensor:
    """Return the (B, 1, h, w) mask logits of an output of SAM 3."""
    logits = output.semantic_seg
    assert logits is not None  # SAM 3 always returns them
    return logits


def at_same_size(logits: Tensor, masks: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return mask logits and masks at the same size, (B, s, s) each.

    Args:
        logits: (B, 1, h, w), interpolated to the given size.
        masks: (B, S, S), averaged over the pixels of the given size.
        size: The side length s; by default the size of the logits.
    """
    if size:
        logits = nn.functional.interpolate(logits, size=(size, size), mode="bilinear")
    soft_masks = nn.functional.adaptive_avg_pool2d(masks[:, None], (logits.shape[-2], logits.shape[-1]))
    return logits[:, 0], soft_masks[:, 0]


def logits_to_masks(logits: Tensor, size: int) -> np.ndarray:
    """Convert (B, 1, h, w) mask logits to (B, size, size) bool masks."""
    resized = nn.functional.interpolate(logits.float(), size=(size, size), mode="bilinear")
    return (resized[:, 0] > 0).cpu().numpy()


def images_to_pixels(images: Sequence[np.ndarray], device: str) -> Tensor:
    """Convert (S, S, 3) 8-bit images to (B, 3, S, S), normalized to -1..1 as by Sam3ImageProcessor."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def sam_boxes(boxes: Sequence[Box | None], size: int, device: str) -> tuple[Tensor, Tensor]:
    """Convert boxes in pixels to SAM 3's boxes.

    Returns:
        (B, 1, 4) boxes (center x, center y, width, height) in fractions of the image; 0 for None.
        (B,) bool: whether there is a box.
    """
    rows = []
    for box in boxes:
        x1, y1, x2, y2 = box or (0, 0, 0, 0)
        rows.append([[(x1 + x2) / 2 / size, (y1 + y2) / 2 / size, (x2 - x1) / size, (y2 - y1) / size]])
    has_box = torch.tensor([box is not None for box in boxes], device=device)
    return torch.tensor(rows, dtype=torch.float32, device=device), has_box


def jittered(rng: np.random.Generator, box: Sequence[float], size: int) -> Box:
    """Move each side of a box at random, since boxes predicted by the VLM are not exact; clip it to the image."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    jitter = (2 * rng.random(4) - 1) * 0.12
    x1, x2 = x1 + jitter[0] * w, x2 + jitter[1] * w
    y1, y2 = y1 + jitter[2] * h, y2 + jitter[3] * h
    return max(0.0, x1), max(0.0, y1), min(float(size), x2), min(float(size), y2)


def focal_loss(logits: Tensor, soft_masks: Tensor, gamma: float = 2.0) -> Tensor:
    """Compute the focal loss of each pixel, (B, h, w), for masks with values between 0 and 1."""
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, soft_masks, reduction="none")
    return cross_entropy * (logits.sigmoid() - soft_masks).abs() ** gamma
