"""Stage "sam": train SAM 3 to segment the objects of a scene that a noun phrase, a box, or both describe.

Each image is combined with several prompts, including prompts for absent objects, so that SAM 3 must use the words to
distinguish them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import Sam3Attention, Sam3ImageSegmentationOutput

from conceptseg_hf.boxes import Box
from conceptseg_hf.configuration_conceptseg import ConceptSegConfig
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.data.concept_shapes.rendering import COLORS, GREY, SHAPES, TEXTURES
from conceptseg_hf.data.concept_shapes.scenes import Scene, SceneObject
from conceptseg_hf.evaluation import foreground_iou, presence_auc
from conceptseg_hf.losses import dice_loss
from conceptseg_hf.presets import NANO_IMAGE_SIZE
from conceptseg_hf.sam_prompt import BOX_TEXT, ImageFeatures, decode, encode_image, encode_text

from .dense import (
    DENSE_CLASSES,
    GRID,
    bounding_box,
    class_map,
    dense_class_loss,
    mask_to_tokens,
    shape_accuracy,
    token_objects,
    total,
)
from .loop import mean
from .scenes import TaskMix, pretraining_scene, sheet_scene
from .tokenizers import build_processor

_SPECIAL_NOUNS = (
    "shadow",
    "transparent",
    "lesion",
    "scratch",
    "stain",
    "hole",
    "glass circle",
    "hidden square",
)
# Prompts of CD tasks, which do not name an object. SAM 3 is trained to predict that they are absent, so that the router
# uses the VLM.
_CONCEPT_PROMPTS = (
    "camouflaged object segmentation",
    "salient object segmentation",
    "industrial defect segmentation",
    "tissue lesion segmentation",
)


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


def positive_prompt(rng: np.random.Generator, scene: Scene) -> SegmentationPrompt:
    """Draw a prompt for an object of the scene.

    Boxes are more frequent if the words describe several objects, so that only the box determines which one is meant.
    """
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    words = _draw_words(rng, item)
    text_prompt = SegmentationPrompt(" ".join(words), None, scene.mask_of(words))
    is_ambiguous = sum(other.look.matches(item.look.phrase.split()) for other in scene.objects) > 1
    kind = rng.random()
    if kind < (0.4 if is_ambiguous else 0.7) or not item.mask.any():
        return text_prompt
    phrase = BOX_TEXT if rng.random() < 0.5 else item.look.shape if not item.look.kind else " ".join(words)
    box = _jittered(rng, bounding_box(item.mask), scene.pixels.shape[0])
    return SegmentationPrompt(phrase, box, item.mask)


def _draw_words(rng: np.random.Generator, item: SceneObject) -> list[str]:
    """Draw words that describe an object."""
    look = item.look
    full = look.phrase.split()
    if look.kind:
        return ["transparent"] if look.kind == "glass" and rng.random() < 0.5 else full
    choice = rng.random()
    if choice < 0.4:
        return full
    if choice < 0.65:
        return [look.color, look.shape]
    if choice < 0.85:
        return [look.shape]
    return [look.color, "object"] if choice < 0.95 or look.texture == "plain" else [look.texture, look.shape]


def negative_prompt(rng: np.random.Generator, scene: Scene) -> SegmentationPrompt:
    """Draw a prompt for an object that is not in the scene; some of its words often describe another object."""
    empty = np.zeros(scene.pixels.shape[:2], dtype=bool)
    if rng.random() < 0.15:
        return SegmentationPrompt(
            _CONCEPT_PROMPTS[int(rng.integers(len(_CONCEPT_PROMPTS)))], None, empty, segment=False
        )
    colors, shapes = list(COLORS), list(SHAPES)
    while True:
        look = scene.objects[int(rng.integers(len(scene.objects)))].look
        choice = rng.random()
        if choice < 0.12:
            words = _SPECIAL_NOUNS[int(rng.integers(len(_SPECIAL_NOUNS)))].split()
        elif choice < 0.6 and not look.kind:
            words = look.phrase.split()
            position = int(rng.integers(len(words)))
            replacements = (
                colors
                if words[position] in COLORS
                else shapes
                if words[position] in SHAPES
                else list(TEXTURES[1:])
            )
            words[position] = replacements[int(rng.integers(len(replacements)))]
        else:
            words = [shapes[int(rng.integers(len(shapes)))]]
            if rng.random() < 0.7:
                words.insert(0, colors[int(rng.integers(len(colors)))])
        if not any(other.look.matches(words) for other in scene.objects):
            return SegmentationPrompt(" ".join(words), None, empty)


def _jittered(rng: np.random.Generator, box: Sequence[float], size: int) -> Box:
    """Move each side of a box at random, since boxes predicted by the VLM are not exact; clip it to the image."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    jitter = (2 * rng.random(4) - 1) * 0.12
    x1, x2 = x1 + jitter[0] * w, x2 + jitter[1] * w
    y1, y2 = y1 + jitter[2] * h, y2 + jitter[3] * h
    return max(0.0, x1), max(0.0, y1), min(float(size), x2), min(float(size), y2)


_HEAD_WORDS = (
    (*COLORS, GREY),
    SHAPES,
    TEXTURES,
    ("glass", "transparent", "hidden", "shadow", "core", "scratch", "stain", "hole", "lesion"),
)


def guidance_targets(
    scene: Scene, prompt: SegmentationPrompt, prompt_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention targets for the four heads of SAM 3's fusion, so that it learns to compare words with features.

    Each head is assigned one kind of word: colors, shapes, textures, or names of special objects. Image tokens of
    objects that the word describes should attend to the word, all others to the rest of the prompt. If the prompt has a
    box, heads without a word are assigned the box: image tokens of its object should attend to the token of the box.

    Args:
        scene: The scene.
        prompt: The prompt.
        prompt_length: Number of tokens of the padded prompt: the begin token, the words, ..., the token of the box, and
            the CLS token of the geometry encoder.

    Returns:
        (4, GRID * GRID, prompt_length) bool: the correct prompt tokens of each head and image token.
        (4,) bool: the heads that have targets.
    """
    targets = np.zeros((len(_HEAD_WORDS), GRID * GRID, prompt_length), dtype=bool)
    guided = np.zeros(len(_HEAD_WORDS), dtype=bool)
    object_indices = token_objects([item.mask for item in scene.objects])
    for position, word in enumerate(prompt.phrase.split(), start=1):
        for head, words in enumerate(_HEAD_WORDS):
            if word not in words:
                continue
            # The last entry, with index -1, is the background.
            matches = np.asarray([*(item.look.matches([word]) for item in scene.objects), False])
            is_described = matches[object_indices]
            guided[head] = True
            targets[head] = True
            targets[head, :, position] = False
            targets[head, is_described] = False
            targets[head, is_described, position] = True
    if prompt.box is not None:
        inside, free = mask_to_tokens(prompt.mask), ~guided
        box_token = np.zeros(prompt_length, dtype=bool)
        box_token[-2] = True
        targets[free] = np.where(inside[:, None], box_token, ~box_token)
        guided[free] = True
    return targets, guided


class SamWithHeads(nn.Module):
    """SAM 3 with auxiliary heads that predict dense targets from its feature maps."""

    def __init__(self) -> None:
        super().__init__()
        config = ConceptSegConfig.from_preset("nano").sam_config
        self.sam = Sam3Model._from_config(config)
        width = config.vision_config.fpn_hidden_size
        self.dense = nn.ModuleList(nn.Conv2d(width, sum(DENSE_CLASSES.values()), 1) for _ in range(3))


class SamStage:
    """Train all of SAM 3 on masks (dice + focal), presence (cross-entropy), dense targets and attention targets.

    The vision tower is first pretrained on the dense targets alone, as it learns shapes slowly and phrases with shapes
    cannot be learned before. The geometry encoder's CLS token, the last token of each prompt of SAM 3, is omitted from
    half of the prompts without a box. Otherwise it would mean "no box", although concept tokens may contain a box.

    Args:
        pretraining: Number of steps of the pretraining.
        images: Number of images per step.
        prompts: Number of prompts per image.
        device: Device of the module.
        held_out: Number of samples of the split "val" per evaluation.
        seed: Random seed of weights and data.
    """

    name = "sam"

    def __init__(
        self,
        pretraining: int,
        images: int = 16,
        prompts: int = 4,
        device: str = "cpu",
        held_out: int = 180,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.module = SamWithHeads().to(device)
        self.sam = self.module.sam
        self.pretraining, self.images, self.prompts = pretraining, images, prompts
        self.device, self.held_out, self.seed, self.is_pretraining = device, held_out, seed, False
        self.processor = build_processor()
        self.tasks = TaskMix()

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a step."""
        self.is_pretraining = step < self.pretraining
        if self.is_pretraining:
            return self._pretraining_loss(step)
        scenes: list[Scene] = []
        prompts_of_scenes: list[list[SegmentationPrompt]] = []
        for i in range(self.images):
            index = step * self.images + i
            rng = np.random.default_rng([7, self.seed, index])
            scene = sheet_scene(rng) if rng.random() < 0.2 else self.tasks.task(index).scene
            scenes.append(scene)
            negatives = 1 + int(rng.random() < 0.35)
            prompts_of_scenes.append(
                [positive_prompt(rng, scene) for _ in range(self.prompts - negatives)]
                + [negative_prompt(rng, scene) for _ in range(negatives)]
            )
        prompts = [prompt for scene_prompts in prompts_of_scenes for prompt in scene_prompts]
        rows = torch.arange(self.images, device=self.device).repeat_interleave(self.prompts)
        encoded = encode_image(
            self.sam, scenes_to_pixels([scene.pixels for scene in scenes], self.device), geometry_cls=False
        )
        features = encoded.select(rows)
        prompt_embeds, prompt_mask = self._encode_prompts(
            np.random.default_rng([9, self.seed, step]), features, prompts
        )
        fusion_attentions = [layer.cross_attn for layer in self.sam.detr_encoder.layers]
        decoder_attentions = [layer.vision_cross_attn for layer in self.sam.detr_decoder.layers]
        attention_inputs: list[dict[str, Tensor]] = []
        hooks = [
            attention.register_forward_pre_hook(
                lambda _, __, kwargs: attention_inputs.append(kwargs), with_kwargs=True
            )
            for attention in (*fusion_attentions, *decoder_attentions)
        ]
        output = self.sam(
            vision_embeds=features.vision,
            text_embeds=BaseModelOutputWithPooling(pooler_output=prompt_embeds),
            attention_mask=prompt_mask,
        )
        for hook in hooks:
            hook.remove()
        guidance = [
            guidance_targets(scene, prompt, prompt_embeds.shape[1])
            for scene, scene_prompts in zip(scenes, prompts_of_scenes)
            for prompt in scene_prompts
        ]
        targets, guided = (torch.from_numpy(np.stack(arrays)).to(self.device) for arrays in zip(*guidance))
        focus = total(
            _guided_attention_loss(*pair, targets, guided)
            for pair in zip(fusion_attentions, attention_inputs)
        ) / len(fusion_attentions)
        ground_truth = torch.from_numpy(np.stack([prompt.mask for prompt in prompts])).to(self.device).float()
        present = ground_truth.flatten(1).any(1)
        object_tokens = torch.from_numpy(np.stack([mask_to_tokens(prompt.mask) for prompt in prompts])).to(
            self.device
        )
        look = total(
            _presence_attention_loss(*pair, object_tokens, present)
            for pair in zip(decoder_attentions, attention_inputs[len(fusion_attentions) :])
        ) / len(decoder_attentions)
        segment = torch.tensor([prompt.segment for prompt in prompts], device=self.device)
        logits = output.semantic_seg[:, 0]
        soft_masks = nn.functional.adaptive_avg_pool2d(ground_truth[:, None], logits.shape[-2:])[:, 0]
        pixel_focal = _focal_loss(logits, soft_masks)
        dice = dice_loss(logits[present], soft_masks[present])
        focal = pixel_focal[segment].mean()
        presence = nn.functional.binary_cross_entropy_with_logits(
            output.presence_logits[:, 0], present.float()
        )
        dense = self._dense_loss(scenes, encoded.vision.fpn_hidden_states)
        loss = dice + 10 * focal + 0.5 * presence + 0.4 * dense + 0.3 * focus + 0.3 * look
        return loss, {
            "dice": dice.item(),
            "focal": focal.item(),
            "presence": presence.item(),
            "dense": dense.item(),
            "focus": focus.item(),
            "look": look.item(),
        }

    def _encode_prompts(
        self, rng: np.random.Generator, features: ImageFeatures, prompts: Sequence[SegmentationPrompt]
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens of prompts (B, T + 2, D), namely text, box and geometry CLS, and their mask (B, T + 2)."""
        text, text_mask = encode_text(
            self.sam, *self.processor.sam_text([prompt.phrase for prompt in prompts], self.device)
        )
        boxes, has_box = _sam_boxes([prompt.box for prompt in prompts], NANO_IMAGE_SIZE, self.device)
        geometry = self.sam.geometry_encoder(
            box_embeddings=boxes,
            box_mask=has_box[:, None],
            box_labels=has_box[:, None].long(),
            img_feats=features.vision.fpn_hidden_states[:-1],
            img_pos_embeds=features.vision.fpn_position_encoding[:-1],
        )
        geometry_mask = geometry.attention_mask.bool().clone()
        keep_cls = torch.from_numpy(rng.random(len(prompts)) < 0.5).to(self.device)
        geometry_mask[:, -1] = has_box | keep_cls
        return (
            torch.cat([text, geometry.last_hidden_state], dim=1),
            torch.cat([text_mask, geometry_mask], dim=1),
        )

    def _pretraining_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([5, self.seed, step])
        scenes = [pretraining_scene(rng, self.tasks, step * self.images + i) for i in range(self.images)]
        vision = self.sam.get_vision_features(
            pixel_values=scenes_to_pixels([scene.pixels for scene in scenes], self.device)
        )
        loss = self._dense_loss(scenes, vision.fpn_hidden_states)
        return loss, {"dense": loss.item()}

    def _dense_loss(self, scenes: Sequence[Scene], levels: Sequence[Tensor]) -> Tensor:
        """Compute the cross-entropy of the dense heads, averaged over the feature maps; see `_dense_predictions`."""
        predictions = self._dense_predictions(scenes, levels)
        return total(dense_class_loss(*prediction) for prediction in predictions) / len(predictions)

    def _dense_predictions(
        self, scenes: Sequence[Scene], levels: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the logits (N, C) and classes (N, 5) of all positions of each feature map.

        Args:
            scenes: The B scenes.
            levels: (B, D, h, w) feature maps of SAM 3; the last one is not used by SAM 3 and is ignored.
        """
        maps = torch.from_numpy(np.stack([class_map(scene) for scene in scenes])).to(self.device)
        predictions = []
        for head, level in zip(self.module.dense, levels[:-1], strict=True):
            stride = maps.shape[1] // level.shape[-1]
            classes = maps[:, stride // 2 :: stride, stride // 2 :: stride]
            predictions.append((head(level).permute(0, 2, 3, 1).flatten(0, 2), classes.flatten(0, 2)))
        return predictions

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Evaluate on the split "val".

        Metrics: accuracy of the shape; foreground IoU with the answer as the text and with the ground-truth box, by
        level (and by stratum in the group "which one"); AUC of presence on CI.
        """
        self.module.eval()
        split = ConceptShapes("val", size=NANO_IMAGE_SIZE)
        scenes = [split.task(i).scene for i in range(min(96, self.held_out))]
        pixels = scenes_to_pixels([scene.pixels for scene in scenes], self.device)
        levels = self.sam.get_vision_features(pixel_values=pixels).fpn_hidden_states
        *_, coarsest = self._dense_predictions(scenes, levels)
        metrics = {"shape": shape_accuracy(*coarsest)}
        if self.is_pretraining:
            return metrics
        ious: dict[str, list[float]] = {}
        scores: list[float] = []
        present: list[bool] = []
        which_one = ConceptShapes("val", size=NANO_IMAGE_SIZE, groups=["which one"])
        for source in (split, which_one):
            for start in range(0, self.held_out, 60):
                samples = [source[i] for i in range(start, min(start + 60, self.held_out))]
                features = encode_image(
                    self.sam, scenes_to_pixels([np.asarray(sample.image) for sample in samples], self.device)
                )
                answers = self.processor.sam_text([sample.answer or "" for sample in samples], self.device)
                by_text = decode(self.sam, features, *encode_text(self.sam, *answers))
                box_text = self.processor.sam_text([BOX_TEXT] * len(samples), self.device)
                boxes, _ = _sam_boxes([sample.box for sample in samples], NANO_IMAGE_SIZE, self.device)
                by_box = decode(self.sam, features, *encode_text(self.sam, *box_text), boxes=boxes)
                presence_logits = by_text.presence_logits
                assert presence_logits is not None  # SAM 3 always returns them
                for sample, text_mask, box_mask, score in zip(
                    samples,
                    to_masks(mask_logits(by_text)),
                    to_masks(mask_logits(by_box)),
                    presence_logits[:, 0].tolist(),
                    strict=True,
                ):
                    if sample.level == "CI":
                        scores.append(score)
                        present.append(sample.present)
                    if sample.present:
                        name, ground_truth = sample.stratum or sample.level, np.asarray(sample.mask) > 0
                        ious.setdefault(f"text_{name}", []).append(foreground_iou(text_mask, ground_truth))
                        ious.setdefault(f"box_{name}", []).append(foreground_iou(box_mask, ground_truth))
        metrics |= {name: mean(values) for name, values in sorted(ious.items())}
        return metrics | {"presence_auc": presence_auc(scores, present) or 0.0}


def mask_logits(output: Sam3ImageSegmentationOutput) -> Tensor:
    """Return the (B, 1, h, w) mask logits of an output of SAM 3."""
    logits = output.semantic_seg
    assert logits is not None  # SAM 3 always returns them
    return logits


def to_masks(logits: Tensor) -> np.ndarray:
    """Convert (B, 1, h, w) mask logits to (B, S, S) bool masks of the size of the scenes."""
    size = (NANO_IMAGE_SIZE, NANO_IMAGE_SIZE)
    return (nn.functional.interpolate(logits, size=size, mode="bilinear")[:, 0] > 0).cpu().numpy()


def scenes_to_pixels(images: Sequence[np.ndarray], device: str) -> Tensor:
    """Convert (S, S, 3) 8-bit images to (B, 3, S, S), normalized to -1..1 as by Sam3ImageProcessor."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _sam_boxes(boxes: Sequence[Box | None], size: int, device: str) -> tuple[Tensor, Tensor]:
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


def _focal_loss(logits: Tensor, soft_masks: Tensor, gamma: float = 2.0) -> Tensor:
    """Compute the focal loss of each pixel, (B, h, w), for masks with values between 0 and 1."""
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, soft_masks, reduction="none")
    return cross_entropy * (logits.sigmoid() - soft_masks).abs() ** gamma


def _attention_scores(attention: Sam3Attention, query: Tensor, key: Tensor) -> Tensor:
    """Return the attention logits without a mask, (B, heads, queries, keys)."""

    def split_heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_attention_heads, attention.head_dim)).transpose(1, 2)

    scores = split_heads(attention.q_proj(query)) @ split_heads(attention.k_proj(key)).transpose(2, 3)
    return (scores * attention.scaling).float()


def _guided_attention_loss(
    attention: Sam3Attention, inputs: dict[str, Tensor], targets: Tensor, guided: Tensor
) -> Tensor:
    """Compute -log of the attention of the guided heads to the target tokens, averaged over image tokens.

    Args:
        attention: The cross-attention of one fusion layer.
        inputs: Arguments that it was called with.
        targets: (B, heads, GRID * GRID, T) bool; see `guidance_targets`.
        guided: (B, heads) bool.
    """
    scores = _attention_scores(attention, inputs["query"], inputs["key"])
    mask = inputs["attention_mask"]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    log_attention = scores.log_softmax(-1).masked_fill(~targets, float("-inf"))
    loss = -log_attention.logsumexp(-1)[guided]
    # Image tokens with a single target are few; they have the same total weight as all others.
    single = (targets.sum(-1) == 1)[guided]
    return 0.5 * (loss[single].mean() + loss[~single].mean())


def _presence_attention_loss(
    attention: Sam3Attention, inputs: dict[str, Tensor], object_tokens: Tensor, present: Tensor
) -> Tensor:
    """Compute -log of the attention of the presence token, the first query, to the object, for half of the heads.

    Args:
        attention: The cross-attention to image tokens of one decoder layer.
        inputs: Arguments that it was called with.
        object_tokens: (B, GRID * GRID) bool, the image tokens of the object.
        present: (B,) bool, the rows that contribute to the loss.
    """
    heads = attention.num_attention_heads // 2
    scores = _attention_scores(attention, inputs["query"][:, :1], inputs["key"])[:, :heads, 0]
    if inputs["attention_mask"] is not None:
        scores = scores + inputs["attention_mask"][:, :heads, 0]
    log_attention = scores.log_softmax(-1).masked_fill(~object_tokens[:, None], float("-inf"))
    return -log_attention[present].logsumexp(-1).mean()
