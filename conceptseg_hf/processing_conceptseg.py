"""ConceptSegProcessor: converts images, prompts and references to tensors, and model outputs to masks and boxes.

Coordinate transforms are implemented by `coordinates.CoordinateFrame`; each sample has one.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchFeature

from . import hub
from .chat import ChatMixin
from .collation import pad_batch
from .completion import Completion, parse_completion
from .configuration_conceptseg import conversion_hint, is_original_config
from .coordinates import CoordinateFrame, make_frame
from .images import ImageInput, as_list, load_image
from .inputs import ConceptSegInputs, PreparedSample, PreparedTarget, index_images, known
from .mosaic import RESAMPLING, MosaicSettings, compose_mosaic
from .outputs import ConceptSegmentation, RawSegmentation, SegmentationOutputs
from .postprocessing import post_process, post_process_mask
from .processor_settings import OPTIONAL_SETTINGS, checked_settings
from .prompt_template import PromptTemplate
from .references import Reference, ResolvedReferences, resolve_references
from .vlm_families import DEFAULT_FAMILY, get_family

# Arguments of the model's `forward` for SAM 3; `VlmFamily.input_names` are those for the VLM.
_SAM_INPUT_NAMES = ("sam_pixel_values", "sam_input_ids", "sam_attention_mask")


class ConceptSegProcessor(ChatMixin):
    """Processor that combines the tokenizers and image processors of the VLM and SAM 3 with a prompt template.

    Args:
        image_processor: The VLM's image processor.
        tokenizer: The VLM's tokenizer; its padding side is set to left, as required for batched generation.
        sam_image_processor: SAM 3's image processor.
        sam_tokenizer: SAM 3's tokenizer; its padding side is set to right.
        chat_template: Jinja chat template. Defaults to the tokenizer's template, or to the family's if the tokenizer
            has none.
        canvas_size: Side of the square canvas to which the mosaic and the target are resized before the VLM's image
            processor, by default that of the family (600 for Qwen2.5-VL, as in the paper). The image processor then
            only rounds it to a multiple of its patch and merge size (600 -> 588 for Qwen2.5-VL).
        coordinate_scale: Length of a canvas side in text coordinates: 1 for decimals, `canvas_size` for integer canvas
            pixels. By default that of the family (1 for Qwen2.5-VL, as in the paper).
        sam_text_length: Number of tokens of SAM 3's text input; longer texts are truncated.
        prompt_template: Instruction template, as `PromptTemplate` or `PromptTemplate.to_dict()`; defaults to the
            official one. Saved in processor_config.json.
        mosaic: Layout of the references and handling of their boxes: `MosaicSettings`, or a mapping of its fields.
        shortcut_size: Side of the square to which the target is resized (bicubic) before SAM 3's image processor on
            the shortcut; None to use the original target on both routes.
        sam_resampling: Pillow filter for resizing the target to SAM 3's input size: `"bicubic"` or `"bilinear"`; None
            to leave resizing to SAM 3's image processor.
        mask_resampling: Interpolation of SAM 3's mask logits to the target's size: `"bilinear"` or `"bicubic"`.
        vlm_family: Family of the VLM, the `model_type` of its configuration; see `vlm_families`.

    The last five settings are saved only if they differ from their defaults.
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
    vlm_family: str

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        sam_image_processor: Any = None,
        sam_tokenizer: Any = None,
        chat_template: str | None = None,
        canvas_size: int | None = None,
        coordinate_scale: float | None = None,
        sam_text_length: int = 32,
        prompt_template: Mapping[str, str] | PromptTemplate | None = None,
        mosaic: Mapping[str, Any] | MosaicSettings | None = None,
        shortcut_size: int | None = None,
        sam_resampling: str | None = None,
        mask_resampling: str = "bilinear",
        vlm_family: str = DEFAULT_FAMILY,
    ) -> None:
        family = get_family(vlm_family)
        settings = {
            "canvas_size": family.canvas_size if canvas_size is None else canvas_size,
            "coordinate_scale": family.coordinate_scale if coordinate_scale is None else coordinate_scale,
            "sam_text_length": sam_text_length,
            "prompt_template": prompt_template,
            "mosaic": mosaic,
            "shortcut_size": shortcut_size,
            "sam_resampling": sam_resampling,
            "mask_resampling": mask_resampling,
            "vlm_family": vlm_family,
        }
        settings = checked_settings(settings)
        super().__init__(
            image_processor, tokenizer, sam_image_processor, sam_tokenizer, chat_template=chat_template
        )
        # Tokenizers do not save their padding side, and `from_pretrained(padding_side=...)` would set it for both.
        tokenizer.padding_side = "left"
        sam_tokenizer.padding_side = "right"
        for name, value in settings.items():
            setattr(self, name, value)
        self._find_image_token()
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._reserved_tokens = sorted({self.image_token, *special, *tokenizer.all_special_tokens})

    @classmethod
    def from_backbones(
        cls, vlm: str | os.PathLike, sam: str | os.PathLike, **settings: Any
    ) -> ConceptSegProcessor:
        """Combine the tokenizers and image processors of a VLM and SAM 3, for training in stage I.

        Args:
            vlm: Model id or folder of the VLM, whose configuration determines `vlm_family`.
            sam: Model id or folder of SAM 3.
            **settings: Arguments of the class from `chat_template` on.
        """
        return cls(
            image_processor=AutoImageProcessor.from_pretrained(vlm),
            tokenizer=AutoTokenizer.from_pretrained(vlm),
            sam_image_processor=AutoImageProcessor.from_pretrained(sam),
            sam_tokenizer=AutoTokenizer.from_pretrained(sam),
            **{"vlm_family": AutoConfig.from_pretrained(vlm).model_type, **settings},
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> ConceptSegProcessor:
        """Load a processor; raise an error with the conversion command for a checkpoint in the authors' layout."""
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
        """Save the processor; with `push_to_hub`, `kwargs` may include `repo_id` and the arguments of `hub.upload`."""
        if push_to_hub:
            upload, kwargs = hub.split_upload_arguments(save_directory, kwargs)
        files = super().save_pretrained(save_directory, **kwargs)
        hub.keep_remote_stub(save_directory)
        if push_to_hub:
            hub.upload(save_directory, **upload)
        return files

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str | None = None, **kwargs: Any) -> Any:
        """Upload the processor, without a model card.

        Args:
            repo_id: Repository id; the repository is created if it does not exist.
            max_shard_size: Ignored; accepted for compatibility with models.
            **kwargs: Additional arguments of `hub.upload`.

        Returns:
            The commit information returned by the Hub.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload(folder, repo_id, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the processor's attributes as a dictionary, without the `OPTIONAL_SETTINGS` at their default."""
        defaults = [name for name, value in OPTIONAL_SETTINGS.items() if getattr(self, name) == value]
        return {name: value for name, value in super().to_dict().items() if name not in defaults}

    def with_settings(self, **changes: Any) -> ConceptSegProcessor:
        """Return a shallow copy of the processor with different settings.

        Args:
            **changes: Arguments of the class from `canvas_size` on.

        Raises:
            ValueError: If a setting is unknown or its value is invalid.
        """
        changed = copy.copy(self)
        for name, value in checked_settings(changes).items():
            setattr(changed, name, value)
        changed._find_image_token()
        return changed

    @property
    def mosaic_settings(self) -> MosaicSettings:
        """Layout of the references and handling of their boxes."""
        return MosaicSettings.from_dict(self.mosaic or {})

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's `forward` arguments that the processor creates."""
        return [*self.family.input_names, *_SAM_INPUT_NAMES]

    # Preprocessing

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        prompts: str | Sequence[str],
        references: Sequence[Reference] | Sequence[Sequence[Reference]] | None = None,
    ) -> ConceptSegInputs:
        """Prepare one prompt or a batch of prompts for `model.segment(**inputs)`.

        Args:
            images: One image (see `images.ImageInput`), a list of images, or an array or pandas Series of paths or
                images. An image that occurs several times is encoded once.
            prompts: One prompt for all images, or one per image. A single image may have several prompts.
            references: One list of references for all images, or one list per image.

        Raises:
            FileNotFoundError: If a path does not exist.
            ValueError: If an input is invalid, or the lists differ in length.
        """
        image_list = as_list(images)
        images = [images] if image_list is None else image_list
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        images = images * len(prompts) if len(images) == 1 else images
        references = [] if references is None else as_list(references) or []
        if not any(as_list(item) is not None for item in references):
            references = [references] * len(images)
        if not len(images) == len(prompts) == len(references):
            raise ValueError(
                f"ConceptSegProcessor: got {len(images)} images, {len(prompts)} prompts and "
                f"{len(references)} lists of references; pass one prompt and one list per image."
            )
        if not images:
            raise ValueError("ConceptSegProcessor: images is empty; pass at least one image.")
        for prompt in prompts:
            self.check_prompt(prompt)
        unique_images, image_index = index_images(images)
        targets = [self._read_target(image) for image in unique_images]
        samples = [
            self._prepare(targets[index], prompt, prompt_references)
            for index, prompt, prompt_references in zip(image_index, prompts, references, strict=True)
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
        """Prepare one prompt.

        Args:
            image: Target image; see `images.ImageInput`.
            prompt: The user's prompt.
            references: Up to nine references; see `Reference` for boxes, masks and roles.
            lazy: Defer the computation of the VLM's tensors to `prepare_vlm`, which `collate` calls. Samples that take
                the shortcut do not need them.

        Raises:
            FileNotFoundError: If a path does not exist.
            ValueError: If an input is invalid; the message is one sentence.
        """
        self.check_prompt(prompt)
        sample = self._prepare(self._read_target(image), prompt, references)
        return sample if lazy else self.prepare_vlm(sample)

    def _read_target(self, image: ImageInput) -> PreparedTarget:
        target = load_image(image)
        shortcut = None
        if self.shortcut_size is not None:
            size = (self.shortcut_size, self.shortcut_size)
            shortcut = self.sam_pixels(target.resize(size, Image.Resampling.BICUBIC))
        return PreparedTarget(target.size, self._on_canvas(target), self.sam_pixels(target), shortcut)

    def _prepare(
        self, target: PreparedTarget, prompt: str, references: Sequence[Reference | Mapping[str, Any]] | None
    ) -> PreparedSample:
        frame, mosaic = self._draw_references(target.size, references)
        images = (target.canvas,) if mosaic is None else (mosaic, target.canvas)
        return PreparedSample(
            prompt=prompt,
            frame=frame,
            sam_pixel_values=target.sam_pixels,
            vlm_images=images,
            vlm_text=self.chat_text(self.instruction(prompt, frame), len(images)),
            shortcut_pixel_values=target.shortcut_pixels,
        )

    def sam_pixels(self, image: Image.Image) -> torch.Tensor:
        """Return SAM 3's input for an RGB image, (3, S, S)."""
        if self.sam_resampling is not None:
            size = self.sam_image_processor.size
            image = image.resize((size["width"], size["height"]), RESAMPLING[self.sam_resampling])
        return self.sam_image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    def draw_images(
        self, image: Image.Image, references: Sequence[Reference | Mapping[str, Any]] | None
    ) -> tuple[CoordinateFrame, tuple[Image.Image, ...]]:
        """Create the VLM's images of a prompt.

        Args:
            image: RGB target image.
            references: References, see `prepare`.

        Returns:
            The sample's coordinate frame, and its `PreparedSample.vlm_images`.
        """
        frame, mosaic = self._draw_references(image.size, references)
        target = self._on_canvas(image)
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

    def _on_canvas(self, image: Image.Image) -> Image.Image:
        return image.resize((self.canvas_size, self.canvas_size), Image.Resampling.BICUBIC)

    def collate(
        self,
        samples: Sequence[PreparedSample],
        completions: Sequence[str | Sequence[int]] | None = None,
        device: torch.device | str | None = None,
        end_of_turn: bool | Sequence[bool] = False,
    ) -> BatchFeature:
        """Collate the VLM's inputs into a batch, with left-padded prompts.

        Args:
            samples: Samples without errors.
            completions: One completion per sample for teacher forcing, as a string or as token ids (without the
                end-of-turn token). Completions follow the prompts; each is terminated by the end-of-turn token and
                padded on the right.
            device: Device of the returned tensors.
            end_of_turn: Whether `completion_mask` includes the end-of-turn token
                (`ConceptSegConfig.end_of_turn_state`), for all completions or for each.

        Returns:
            input_ids, attention_mask, mm_token_type_ids (B, L), pixel_values (patches, d) and image_grid_thw
            (images, 3), or pixel_values (images, 3, S, S) for families with images of one size; with completions also
            completion_mask (B, L) bool, true at completion tokens, excluding the end-of-turn token unless
            `end_of_turn` is set. These are the positions of `generate_with_states`.

        Raises:
            ValueError: If there are no samples, a sample has an error, or the numbers of samples and completions
                differ.
        """
        samples = [self.prepare_vlm(sample) for sample in samples]
        completion_ids = None if completions is None else [self._completion_ids(each) for each in completions]
        batch = pad_batch(samples, completion_ids, self._pad_token_id, end_of_turn)
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
        """Return SAM 3's text input: (input_ids, attention_mask), padded or truncated to (B, sam_text_length)."""
        encoded = self.sam_tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.sam_text_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)

    # Post-processing

    def decode_completion(
        self, token_ids: torch.Tensor | Sequence[int], sample: PreparedSample | None = None
    ) -> Completion:
        """Decode and parse one completion.

        Args:
            token_ids: Completion tokens, (T,).
            sample: The sample of the completion, which determines whether `<check>` is expected.
        """
        text = self.decode_text(token_ids)
        expect_check = None if sample is None or sample.frame is None else sample.frame.proxy is not None
        return parse_completion(text, self.coordinate_scale, expect_check)

    def decode_text(self, token_ids: torch.Tensor | Sequence[int]) -> str:
        """Return the text of completion tokens, (T,), without special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def post_process_mask(
        self, logits: torch.Tensor, frame: CoordinateFrame
    ) -> tuple[Image.Image, np.ndarray]:
        """Resize SAM 3's mask logits to the target image and threshold them.

        Args:
            logits: Semantic mask logits, (h, w).
            frame: The sample's coordinate frame.

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
        """Convert the model's outputs to results in pixels of the input images.

        Args:
            outputs: Output of `model.segment(**inputs)` without a processor.
            threshold: Probability threshold of the mask, between 0 and 1 (exclusive).
            return_heatmap: Also return the mask probabilities.
            return_logits: Also return SAM 3's mask logits at their original resolution.

        Returns:
            One result per output, in the order of the outputs.

        Raises:
            ValueError: If the threshold is not between 0 and 1.
        """
        if not 0 < threshold < 1:
            raise ValueError(
                f"post_process_concept_segmentation: threshold is {threshold}; use a probability between 0 and 1."
            )
        raw = outputs.raw if isinstance(outputs, SegmentationOutputs) else outputs
        return [
            post_process(each, self.mask_resampling, threshold, return_heatmap, return_logits) for each in raw
        ]

    # Helpers

    def make_frame(
        self, image_size: tuple[int, int], references: ResolvedReferences | None = None
    ) -> CoordinateFrame:
        """Create the coordinate frame of a target image of size (width, height) and its references."""
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
                "collate: a completion contains an image token, which is allowed only in prompts; remove it."
            )
        return [*ids, self.tokenizer.eos_token_id]


Frame = CoordinateFrame  # former name, kept for compatibility

__all__ = ["ConceptSegInputs", "ConceptSegProcessor", "CoordinateFrame", "Frame", "PreparedSample"]
