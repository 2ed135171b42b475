"""ConceptSegProcessor: from images, words and references to tensors, and back to pixels of the input images.

Coordinates are the business of `coordinates.CoordinateFrame`, of which each sample has one.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from . import hub, vlm_backbone
from .completion import Completion, format_box, format_box_list, parse_completion
from .configuration_conceptseg import how_to_convert, is_authors_config
from .coordinates import CoordinateFrame
from .images import ImageInput, as_list, load_image
from .inputs import ConceptSegInputs, PreparedSample, known
from .mosaic import RESAMPLING, MosaicSettings, make_layout
from .prompt_template import OFFICIAL_TEMPLATE, PromptTemplate
from .references import (
    Reference,
    ResolvedReferences,
    assign_cells,
    compose_mosaic,
    resolve_references,
)

# SAM 3's share of the arguments of the model's `forward`; `vlm_backbone.INPUT_NAMES` are the VLM's.
_SAM_INPUT_NAMES = ("sam_pixel_values", "sam_input_ids", "sam_attention_mask")

SWITCHES = {"mosaic": None, "shortcut_size": None, "sam_resampling": None, "mask_resampling": "bilinear"}
"""Settings of `ConceptSegProcessor` that are saved only where they are set, and their usual values."""


@dataclass(frozen=True)
class _Target:
    """What the prompts about one image share: its size, and what the VLM and SAM 3 see of it."""

    size: tuple[int, int]
    canvas: Image.Image
    sam_pixels: torch.Tensor
    shortcut_pixels: torch.Tensor | None


class ConceptSegProcessor(ProcessorMixin):
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
        settings = _checked_settings(settings)
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
            if config.is_file() and is_authors_config(json.loads(config.read_text(encoding="utf-8"))):
                raise ValueError(how_to_convert(pretrained_model_name_or_path)) from None
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
        for name, value in _checked_settings(changes).items():
            setattr(changed, name, value)
        return changed

    @property
    def template(self) -> PromptTemplate:
        """The prompt template."""
        return PromptTemplate.from_dict(self.prompt_template)

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
        """Prepares one prompt or a batch of prompts.

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
        targets: dict[int, _Target] = {}  # an image that several prompts are about is read once
        samples = []
        for image, prompt, shown in zip(images, prompts, references, strict=True):
            self.check_prompt(prompt)
            if id(image) not in targets:
                targets[id(image)] = self._read_target(image)
            samples.append(self._prepare(targets[id(image)], prompt, shown))
        return ConceptSegInputs(samples, self)

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
        if not samples:
            raise ValueError("collate: there are no samples; give at least one.")
        for index, sample in enumerate(samples):
            if sample.error is not None:
                raise ValueError(
                    f"collate: sample {index} could not be prepared ({sample.error}); leave it out."
                )
        if completions is not None and len(completions) != len(samples):
            raise ValueError(
                f"collate: got {len(completions)} completions for {len(samples)} samples; give one each."
            )
        endings = (
            [self._completion_ids(completion) for completion in completions]
            if completions is not None
            else [[]] * len(samples)
        )
        ends_count = [end_of_turn] * len(samples) if isinstance(end_of_turn, bool) else list(end_of_turn)
        prompts = [known(sample.input_ids, "input_ids") for sample in samples]
        prompt_length = max(map(len, prompts))
        length = prompt_length + max(map(len, endings))
        pad = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else self.tokenizer.eos_token_id
        )
        input_ids = torch.full((len(samples), length), pad, dtype=torch.long)
        attention_mask, token_types = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        completion_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (sample, ids, ending, end_counts) in enumerate(
            zip(samples, prompts, endings, ends_count, strict=True)
        ):
            prompt, end = slice(prompt_length - len(ids), prompt_length), prompt_length + len(ending)
            input_ids[row, prompt] = ids.cpu()
            token_types[row, prompt] = known(sample.mm_token_type_ids, "mm_token_type_ids").cpu()
            input_ids[row, prompt_length:end] = torch.tensor(ending, dtype=torch.long)
            attention_mask[row, prompt.start : end] = 1
            completion_mask[row, prompt_length : max(end - (not end_counts), prompt_length)] = True
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": token_types,
            "pixel_values": torch.cat([known(sample.pixel_values, "pixel_values") for sample in samples]),
            "image_grid_thw": torch.cat(
                [known(sample.image_grid_thw, "image_grid_thw") for sample in samples]
            ),
        }
        if completions is not None:
            batch["completion_mask"] = completion_mask
        return BatchFeature(
            batch if device is None else {name: tensor.to(device) for name, tensor in batch.items()}
        )

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
        width, height = frame.image_size
        logits = logits.detach().float()[None, None]
        logits = torch.nn.functional.interpolate(
            logits, size=(height, width), mode=self.mask_resampling, align_corners=False
        )[0, 0]
        mask = (logits > 0).to(torch.uint8).mul_(255).cpu().numpy()
        return Image.fromarray(mask), logits.sigmoid().cpu().numpy()

    # Parts

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[Any],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Writes a chat with the VLM, as text or as the VLM's inputs.

        Args:
            conversation: Messages, or a list of conversations; see the base class.
            chat_template: Another template than the VLM's.
            tokenize: Return token ids, or with `return_dict=True` all that `model.generate` takes.
            **kwargs: As in the base class.
        """
        chat_template = chat_template or self._chat_template
        if tokenize:  # this processor's own call is for images and prompts, not for chats
            plain = self.vlm_processor()
            return plain.apply_chat_template(
                conversation, chat_template=chat_template, tokenize=True, **kwargs
            )
        return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)

    def vlm_processor(self) -> ProcessorMixin:
        """The VLM's plain processor, for trainers and engines that know nothing of SAM 3.

        Chats through it, with the pictures of `draw_images`, give the token ids and patches of
        `prepare_vlm`.
        """
        image_processor = copy.deepcopy(self.image_processor)
        image_processor.size = self._vlm_image_limits
        return vlm_backbone.make_processor(image_processor, self.tokenizer, self._chat_template)

    @property
    def _vlm_image_limits(self) -> dict[str, int]:
        """Limits in pixels under which the canvas alone decides the size: only rounding to patches is left."""
        factor = self.image_processor.patch_size * self.image_processor.merge_size
        return {"shortest_edge": factor**2, "longest_edge": (self.canvas_size + factor) ** 2}

    @property
    def _chat_template(self) -> str:
        own: Any = self.chat_template  # of one name here, and so one text
        return own or self.tokenizer.chat_template or vlm_backbone.chat_template(self.image_token)

    def check_prompt(self, prompt: str) -> None:
        """Raises a ValueError if a prompt cannot be used; the message is one sentence."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt is {prompt!r}; give the concept in words.")
        self.check_text(prompt, "prompt")

    def check_text(self, text: str, what: str) -> None:
        """Raises a ValueError if a text, called `what` in the message, would not be read as words by the VLM."""
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{what} {text!r} has half a character in it; mend its encoding.")
        for token in self._reserved_tokens:
            # Else the user's words could end the turn or claim to be an image.
            if token in text:
                raise ValueError(f"{what} contains the reserved token {token!r}; leave it out.")

    def make_frame(
        self, image_size: tuple[int, int], references: ResolvedReferences | None = None
    ) -> CoordinateFrame:
        """The coordinate frame of a target image of (width, height), with its references laid out on the mosaic."""
        settings = self.mosaic_settings
        frame = CoordinateFrame(
            image_size=image_size,
            canvas_size=self.canvas_size,
            coordinate_scale=self.coordinate_scale,
            inclusive_corners=settings.corners == "inclusive",
            encloses_boxes=settings.several_boxes == "enclosing",
        )
        if references is None or not references.images:
            return frame
        count, proxy = len(references.images), references.proxy
        layout = make_layout(count, self.canvas_size, settings)
        frame = replace(
            frame,
            reference_sizes=tuple(image.size for image in references.images),
            layout=layout,
            cell_of_reference=assign_cells(count, proxy),
            proxy=proxy,
            proxy_boxes=() if proxy is None else references.all_boxes[proxy],
        )
        shown = [
            frame.reference_box_to_text(box, index)
            for index, boxes in enumerate(references.all_boxes)
            for box in boxes
            if index != proxy and frame.cell_of_reference[index] in layout
        ]
        return replace(frame, support_boxes=tuple(shown))

    def instruction(self, prompt: str, frame: CoordinateFrame) -> str:
        """The template's text for the user's words and the boxes that are shown."""
        if frame.layout is None:
            variant = "no_reference"
        elif frame.proxy is not None:
            variant = "with_proxy"
        elif len(frame.reference_sizes) > 1 and frame.support_boxes:
            variant = "support_only"
        else:
            variant = "single_reference"
        boxes = ", ".join(format_box(box, self.coordinate_scale) for box in frame.support_boxes)
        listed = format_box_list(frame.support_boxes, self.coordinate_scale)
        return self.template.fill(variant, prompt.strip(), boxes or "none", listed)

    def chat_text(self, instruction: str, num_images: int) -> str:
        """The chat up to where the VLM goes on: system message, pictures (one image token each), words."""
        messages = [
            {"role": "system", "content": [{"type": "text", "text": self.template.system}]},
            {
                "role": "user",
                "content": [{"type": "image"}] * num_images + [{"type": "text", "text": instruction}],
            },
        ]
        chat = self.apply_chat_template(messages, add_generation_prompt=True)
        if chat.count(self.image_token) != num_images:
            raise ValueError(
                f"ConceptSegProcessor: the chat template wrote {chat.count(self.image_token)} image tokens "
                f"for {num_images} images; give a template that writes one {self.image_token} per image."
            )
        return chat

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


def _checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `ConceptSegProcessor` as they are kept: plain data, so that they are saved.

    Raises:
        ValueError: If a name or value cannot be used.
    """
    checked = dict(settings)
    for name, value in settings.items():
        if name in ("canvas_size", "coordinate_scale", "sam_text_length", "shortcut_size"):
            if not (name == "shortcut_size" and value is None) and not value > 0:
                raise ValueError(f"ConceptSegProcessor: {name} is {value}; give a positive number.")
            if value is not None:
                checked[name] = float(value) if name == "coordinate_scale" else int(value)
        elif name == "prompt_template":
            template = OFFICIAL_TEMPLATE if value is None else value
            if not isinstance(template, PromptTemplate):
                template = PromptTemplate.from_dict(template)
            checked[name] = template.to_dict()
        elif name == "mosaic":
            mosaic = value if isinstance(value, MosaicSettings) else MosaicSettings.from_dict(value or {})
            checked[name] = None if mosaic == MosaicSettings() else mosaic.to_dict()
        elif name in ("sam_resampling", "mask_resampling"):
            if value not in RESAMPLING and not (name == "sam_resampling" and value is None):
                raise ValueError(
                    f"ConceptSegProcessor: {name} is {value!r}; use {' or '.join(map(repr, RESAMPLING))}."
                )
        else:
            raise ValueError(f"ConceptSegProcessor: there is no setting {name!r} that is plain data.")
    return checked


Frame = CoordinateFrame  # its name before

__all__ = ["ConceptSegInputs", "ConceptSegProcessor", "CoordinateFrame", "Frame", "PreparedSample"]
