"""ConceptSegProcessor: from images, words and references to tensors, and back to pixels of the input images.

Coordinates are the business of `coordinates.CoordinateFrame`, of which each sample has one.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from . import hub, vlm_backbone
from .chat import ChatMixin
from .collation import pad_batch
from .completion import Completion, parse_completion
from .configuration_conceptseg import conversion_hint, is_original_config
from .coordinates import CoordinateFrame, make_frame
from .images import ImageInput, as_list, load_image
from .inputs import ConceptSegInputs, PreparedSample, index_images, known
from .mosaic import RESAMPLING, MosaicSettings, compose_mosaic
from .outputs import ConceptSegmentation, RawSegmentation, SegmentationOutputs
from .postprocessing import post_process, post_process_mask
from .processor_settings import SWITCHES, checked_settings
from .prompt_template import PromptTemplate
from .references import Reference, ResolvedReferences, resolve_references

# SAM 3's share of the arguments of the model's `forward`; `vlm_backbone.INPUT_NAMES` are the VLM's.
_SAM_INPUT_NAMES = ("sam_pixel_values", "sam_input_ids", "sam_attention_mask")


@dataclass(frozen=True)
class _Target:
    """What the prompts about one image share: its size, and what the VLM and SAM 3 see of it."""

    size: tuple[int, int]
    canvas: Image.Image
    sam_pixels: torch.Tensor
    shortcut_pixels: torch.Tensor | None


class ConceptSegProcessor(ChatMixin):
    """Two tokenizers, two image processors, one prompt template, and every coordinate transform.

    Args:
        image_processor: The VLM's image processor (Qwen2-VL's or one with its interface).
        tokenizer: The VLM's tokenizer; its padding side is set to left, as generation in batches needs.
        sam_image_processor: SAM 3's image processor.
        sam_tokenizer: SAM 3's tokenizer; padded right.
        chat_template: Jinja chat template; the tokenizer's own by default, and Qwen's form if that has none
            either.
        canvas_size: Side of the square that the mosaic and the target are resized to before the VLM's image
            processor sees them (paper: 600). That processor then only rounds it to a multiple of its patch
            and merge size (600 -> 588 for Qwen2.5-VL).
        coordinate_scale: What one canvas side measures in the text: 1 for decimals, `canvas_size` for whole
            canvas pixels.
        sam_text_length: Tokens of SAM 3's text input; longer texts are cut.
        prompt_template: `PromptTemplate.to_dict()` of another instruction; the official one by default. Saved
            in processor_config.json.
        mosaic: How references are laid out, and how their boxes are found and written: `MosaicSettings`, or some of
            its fields by name.
        shortcut_size: Side of the square that the target is resized to (bicubic) before SAM 3's image processor sees
            it on the shortcut; None: both paths see the target itself.
        sam_resampling: Pillow's filter, `"bicubic"` or `"bilinear"`, by which the target is resized to SAM 3's square;
            None leaves that to SAM 3's image processor.
        mask_resampling: How SAM 3's mask logits are resized to the target: `"bilinear"` or `"bicubic"`.

    The last four are saved only where they are set.
    """

    return_mm_token_type_ids = True

    image_processor: Any
    tokenizer: Any
    sam_image_processor: Any
    sam_tokenizer: Any
    canvas_size: int
    coordinate_scale: float
    sam_text_length: int
    prompt_template: dict[str, Any]
    mosaic: dict[str, Any] | None
    shortcut_size: int | None
    sam_resampling: str | None
    mask_resampling: str

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        sam_image_processor: Any = None,
        sam_tokenizer: Any = None,
        chat_template: str | None = None,
        canvas_size: int = 600,
        coordinate_scale: float = 1.0,
        sam_text_length: int = 32,
        prompt_template: Mapping[str, str] | PromptTemplate | None = None,
        mosaic: Mapping[str, Any] | MosaicSettings | None = None,
        shortcut_size: int | None = None,
        sam_resampling: str | None = None,
        mask_resampling: str = "bilinear",
    ) -> None:
        settings = {
            "canvas_size": canvas_size,
            "coordinate_scale": coordinate_scale,
            "sam_text_length": sam_text_length,
            "prompt_template": prompt_template,
            "mosaic": mosaic,
            "shortcut_size": shortcut_size,
            "sam_resampling": sam_resampling,
            "mask_resampling": mask_resampling,
        }
        settings = checked_settings(settings)
        super().__init__(
            image_processor, tokenizer, sam_image_processor, sam_tokenizer, chat_template=chat_template
        )
        # A tokenizer does not save its padding side; given to `from_pretrained`, one side would reach both.
        tokenizer.padding_side = "left"
        sam_tokenizer.padding_side = "right"
        for name, value in settings.items():
            setattr(self, name, value)
        self.image_token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
        self.image_token_id = tokenizer.get_vocab().get(self.image_token)
        if self.image_token_id is None:
            raise ValueError(
                f"ConceptSegProcessor: the tokenizer has no image token {self.image_token!r}; "
                "add it as a special token."
            )
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._reserved_tokens = sorted({self.image_token, *special, *tokenizer.all_special_tokens})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> ConceptSegProcessor:
        """As in the base class; of a checkpoint in the authors' layout it says how to convert it."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (ValueError, OSError):
            config = Path(pretrained_model_name_or_path, "config.json")
            if config.is_file() and is_original_config(json.loads(config.read_text(encoding="utf-8"))):
                raise ValueError(conversion_hint(pretrained_model_name_or_path)) from None
            raise

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """As in the base class; with `push_to_hub`, `kwargs` may hold `repo_id` and the arguments of `hub.upload`."""
        if push_to_hub:
            upload, kwargs = hub.split_upload_arguments(save_directory, kwargs)
        files = super().save_pretrained(save_directory, **kwargs)
        hub.keep_remote_stub(save_directory)
        if push_to_hub:
            hub.upload(save_directory, **upload)
        return files

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str | None = None, **kwargs: Any) -> Any:
        """Uploads the processor, without a card: that is the model's to bring.

        Args:
            repo_id: The repository, made if it does not exist.
            max_shard_size: Not used; models take it.
            **kwargs: Further arguments of `hub.upload`.

        Returns:
            What the Hub says of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload(folder, repo_id, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in the base class, without those of `SWITCHES` that are as usual."""
        usual = [name for name, value in SWITCHES.items() if getattr(self, name) == value]
        return {name: value for name, value in super().to_dict().items() if name not in usual}

    def with_settings(self, **changes: Any) -> ConceptSegProcessor:
        """A processor with other settings that shares all else with this one.

        Args:
            **changes: Those arguments of the class that are plain data, from `canvas_size` on.

        Raises:
            ValueError: If there is no such setting, or a value cannot be used.
        """
        changed = copy.copy(self)
        for name, value in checked_settings(changes).items():
            setattr(changed, name, value)
        return changed

    @property
    def mosaic_settings(self) -> MosaicSettings:
        """How references are laid out, and how their boxes are found and written."""
        return MosaicSettings.from_dict(self.mosaic or {})

    @property
    def model_input_names(self) -> list[str]:
        """The names under which the model's `forward` takes what this processor makes."""
        return [*vlm_backbone.INPUT_NAMES, *_SAM_INPUT_NAMES]

    # From inputs to tensors

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        prompts: str | Sequence[str],
        references: Sequence[Reference] | Sequence[Sequence[Reference]] | None = None,
    ) -> ConceptSegInputs:
        """Prepares one prompt or a batch of prompts for `model.segment(**inputs)`.

        Args:
            images: One image (see `images.ImageInput`) or a list of them; also an array or a pandas Series of
                paths or images. Several prompts for one image encode it once.
            prompts: One prompt for all images, or one per image; several may go with a single image.
            references: One list of references for all images, or one list per image.

        Raises:
            FileNotFoundError: If a path names no file.
            ValueError: If an input cannot be used, or the lists differ in length.
        """
        listed = as_list(images)
        images = [images] if listed is None else listed
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        images = images * len(prompts) if len(images) == 1 else images
        references = [] if references is None else as_list(references) or []
        if not any(as_list(item) is not None for item in references):
            references = [references] * len(images)
        if not len(images) == len(prompts) == len(references):
            raise ValueError(
                f"ConceptSegProcessor: got {len(images)} images, {len(prompts)} prompts and "
                f"{len(references)} lists of references; give one prompt and one list per image."
            )
        if not images:
            raise ValueError("ConceptSegProcessor: there are no images; give at least one.")
        for prompt in prompts:
            self.check_prompt(prompt)
        different, image_index = index_images(images)
        targets = [self._read_target(image) for image in different]
        samples = [
            self._prepare(targets[index], prompt, shown)
            for index, prompt, shown in zip(image_index, prompts, references, strict=True)
        ]
        inputs = ConceptSegInputs(dict(self.collate(samples)))
        inputs["prompts"] = prompts
        inputs["frames"] = [sample.coordinates for sample in samples]
        inputs["sam_pixel_values"] = torch.stack([target.sam_pixels for target in targets])
        inputs["image_index"] = torch.tensor(image_index)
        if self.shortcut_size is not None:
            inputs["shortcut_pixel_values"] = torch.stack(
                [known(target.shortcut_pixels, "shortcut_pixel_values") for target in targets]
            )
        return inputs

    def prepare(
        self,
        image: ImageInput,
        prompt: str,
        references: Sequence[Reference | Mapping[str, Any]] = (),
        lazy: bool = False,
    ) -> PreparedSample:
        """Prepares one prompt.

        Args:
            image: The target image; see `images.ImageInput`.
            prompt: The user's words.
            references: Up to nine references; see `Reference` for boxes, masks and roles.
            lazy: Leaves the VLM's tensors to `prepare_vlm`, which `collate` calls: a sample that takes the
                shortcut never pays for them.

        Raises:
            FileNotFoundError: If a path names no file.
            ValueError: If an input cannot be used; the message is one sentence.
        """
        self.check_prompt(prompt)
        sample = self._prepare(self._read_target(image), prompt, references)
        return sample if lazy else self.prepare_vlm(sample)

    def _read_target(self, image: ImageInput) -> _Target:
        picture = load_image(image)
        shortcut = None
        if self.shortcut_size is not None:
            size = (self.shortcut_size, self.shortcut_size)
            shortcut = self.sam_pixels(picture.resize(size, Image.Resampling.BICUBIC))
        return _Target(picture.size, self._on_canvas(picture), self.sam_pixels(picture), shortcut)

    def _prepare(
        self, target: _Target, prompt: str, references: Sequence[Reference | Mapping[str, Any]] | None
    ) -> PreparedSample:
        frame, mosaic = self._draw_references(target.size, references)
        pictures = (target.canvas,) if mosaic is None else (mosaic, target.canvas)
        return PreparedSample(
            prompt=prompt,
            frame=frame,
            sam_pixel_values=target.sam_pixels,
            vlm_images=pictures,
            vlm_text=self.chat_text(self.instruction(prompt, frame), len(pictures)),
            shortcut_pixel_values=target.shortcut_pixels,
        )

    def sam_pixels(self, picture: Image.Image) -> torch.Tensor:
        """SAM 3's input for an RGB image, (3, S, S)."""
        if self.sam_resampling is not None:
            size = self.sam_image_processor.size
            picture = picture.resize((size["width"], size["height"]), RESAMPLING[self.sam_resampling])
        return self.sam_image_processor(images=picture, return_tensors="pt")["pixel_values"][0]

    def draw_images(
        self, picture: Image.Image, references: Sequence[Reference | Mapping[str, Any]] | None
    ) -> tuple[CoordinateFrame, tuple[Image.Image, ...]]:
        """Draws what the VLM sees of a prompt.

        Args:
            picture: The target image, RGB.
            references: As in `prepare`.

        Returns:
            The sample's frame, and `PreparedSample.vlm_images`.
        """
        frame, mosaic = self._draw_references(picture.size, references)
        target = self._on_canvas(picture)
        return frame, ((target,) if mosaic is None else (mosaic, target))

    def _draw_references(
        self, image_size: tuple[int, int], references: Sequence[Reference | Mapping[str, Any]] | None
    ) -> tuple[CoordinateFrame, Image.Image | None]:
        settings = self.mosaic_settings
        resolved = resolve_references(
            references if references is not None else (), self.canvas_size, settings
        )
        frame = self.make_frame(image_size, resolved)
        if frame.layout is None:
            return frame, None
        return frame, compose_mosaic(
            resolved.images, resolved.all_boxes, frame.layout, resolved.proxy, settings
        )

    def _on_canvas(self, picture: Image.Image) -> Image.Image:
        return picture.resize((self.canvas_size, self.canvas_size), Image.Resampling.BICUBIC)

    def prepare_vlm(self, sample: PreparedSample) -> PreparedSample:
        """Fills the VLM's tensors of a sample in place, once, and returns it."""
        if sample.input_ids is not None or sample.error is not None:
            return sample
        encoded = self.image_processor(
            images=list(sample.vlm_images), size=self._vlm_image_limits, return_tensors="pt"
        )
        counts = (encoded["image_grid_thw"].prod(dim=-1) // self.image_processor.merge_size**2).tolist()
        pieces = sample.vlm_text.split(self.image_token)
        text = "".join(
            piece + self.image_token * count for piece, count in zip(pieces, [*counts, 0], strict=True)
        )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        sample.input_ids = torch.tensor(ids, dtype=torch.long)
        sample.mm_token_type_ids = (sample.input_ids == self.image_token_id).long()
        sample.pixel_values = encoded["pixel_values"]
        sample.image_grid_thw = encoded["image_grid_thw"]
        return sample

    def collate(
        self,
        samples: Sequence[PreparedSample],
        completions: Sequence[str | Sequence[int]] | None = None,
        device: torch.device | str | None = None,
        end_of_turn: bool | Sequence[bool] = False,
    ) -> BatchFeature:
        """Batches the VLM's inputs, prompts padded on the left.

        Args:
            samples: Samples without errors.
            completions: A completion per sample for teacher forcing, as text or as token ids (without the
                end-of-turn token). They follow the prompts, each ended by the end-of-turn token and padded on
                the right.
            device: Where the tensors go.
            end_of_turn: Whether the completions' end-of-turn tokens are among those whose states the CTM reads
                (`ConceptSegConfig.end_of_turn_state`), for all or for each.

        Returns:
            input_ids, attention_mask, mm_token_type_ids (B, L), pixel_values (patches, d), image_grid_thw
            (pictures, 3); with completions also completion_mask (B, L) bool, True at the completion tokens
            without the end-of-turn token (unless `end_of_turn`): the positions `generate_with_states` keeps.

        Raises:
            ValueError: If there are no samples, one has an error, or the numbers differ.
        """
        samples = [self.prepare_vlm(sample) for sample in samples]
        endings = None if completions is None else [self._completion_ids(each) for each in completions]
        batch = pad_batch(samples, endings, self._pad_token_id, end_of_turn)
        return BatchFeature(
            batch if device is None else {name: tensor.to(device) for name, tensor in batch.items()}
        )

    @property
    def _pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def sam_text(
        self, texts: Sequence[str], device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SAM 3's text input: (input_ids, attention_mask), each padded or cut to (B, sam_text_length)."""
        encoded = self.sam_tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.sam_text_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)

    # From outputs to the input images

    def decode_completion(
        self, token_ids: torch.Tensor | Sequence[int], sample: PreparedSample | None = None
    ) -> Completion:
        """Decodes and parses one completion.

        Args:
            token_ids: Completion tokens, (T,).
            sample: The sample they belong to; says whether a `<check>` was asked for.
        """
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        expect_check = None if sample is None or sample.frame is None else sample.frame.proxy is not None
        return parse_completion(text, self.coordinate_scale, expect_check)

    def post_process_mask(
        self, logits: torch.Tensor, frame: CoordinateFrame
    ) -> tuple[Image.Image, np.ndarray]:
        """Brings SAM 3's mask logits to the pixels of the target image.

        Args:
            logits: Semantic mask logits, (h, w).
            frame: The sample's frame.

        Returns:
            The mask, an "L" image of 0 and 255 (logits > 0 after resizing, see `mask_resampling`), and the
            probabilities, float32 (H, W).
        """
        return post_process_mask(logits, frame.image_size, self.mask_resampling)

    def post_process_concept_segmentation(
        self,
        outputs: SegmentationOutputs | Sequence[RawSegmentation],
        threshold: float = 0.5,
        return_heatmap: bool = False,
        return_logits: bool = False,
    ) -> list[ConceptSegmentation]:
        """Turns the model's outputs into results in pixels of the input images.

        Args:
            outputs: What `model.segment(**inputs)` returns without a processor.
            threshold: The probability, above 0 and below 1, that a pixel of the mask exceeds.
            return_heatmap: Also return the mask probabilities.
            return_logits: Also return SAM 3's mask logits, at their own size.

        Returns:
            One result per output, in their order.

        Raises:
            ValueError: If the threshold is not between 0 and 1.
        """
        if not 0 < threshold < 1:
            raise ValueError(
                f"post_process_concept_segmentation: threshold is {threshold}; give a probability between 0 and 1."
            )
        raw = outputs.raw if isinstance(outputs, SegmentationOutputs) else outputs
        return [
            post_process(each, self.mask_resampling, threshold, return_heatmap, return_logits) for each in raw
        ]

    # Parts

    def make_frame(
        self, image_size: tuple[int, int], references: ResolvedReferences | None = None
    ) -> CoordinateFrame:
        """The coordinate frame of a target image of (width, height), with its references laid out on the mosaic."""
        return make_frame(
            image_size, references, self.mosaic_settings, self.canvas_size, self.coordinate_scale
        )

    def _completion_ids(self, completion: str | Sequence[int]) -> list[int]:
        if isinstance(completion, str):
            ids = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        else:
            ids = [int(token) for token in completion]
        if self.image_token_id in ids:
            raise ValueError(
                "collate: a completion contains an image token, which only prompts may; leave it out."
            )
        return [*ids, self.tokenizer.eos_token_id]


Frame = CoordinateFrame  # its name before

__all__ = ["ConceptSegInputs", "ConceptSegProcessor", "CoordinateFrame", "Frame", "PreparedSample"]
