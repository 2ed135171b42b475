"""Preparation of prompts for a VLM and SAM: what `ConceptSegProcessor` and `CoPRSProcessor` have in common."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import BatchFeature

from . import hub
from .chat import ChatMixin
from .collation import pad_batch
from .completion import Completion
from .coordinates import CoordinateFrame, make_frame
from .images import ImageInput, as_list, load_image
from .inputs import ConceptSegInputs, PreparedSample, PreparedTarget, index_images, known
from .mosaic import MosaicSettings, compose_mosaic
from .processor_settings import OPTIONAL_SETTINGS, checked_settings
from .references import Reference, ResolvedReferences, resolve_references
from .vlm_families import get_family
from .vocabulary import unknown_words

if TYPE_CHECKING:
    from typing_extensions import Self


class PromptProcessor(ChatMixin):
    """Base class of processors: chats, mosaics of references, batches, saving.

    Subclasses define `sam_pixels`, and their `__init__` calls `_read_tokens`.
    """

    tokenizer: Any
    sam_image_processor: Any
    mosaic: dict[str, Any] | None
    shortcut_size: int | None = None

    @staticmethod
    def _family_settings(
        vlm_family: str, canvas_size: int | None, coordinate_scale: float | None
    ) -> dict[str, Any]:
        """Return the settings that depend on the VLM's family; None selects its default."""
        family = get_family(vlm_family)
        return {
            "vlm_family": vlm_family,
            "canvas_size": family.canvas_size if canvas_size is None else canvas_size,
            "coordinate_scale": family.coordinate_scale if coordinate_scale is None else coordinate_scale,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the processor's attributes as a dictionary, without the `OPTIONAL_SETTINGS` at their default."""
        values = super().to_dict()
        return {
            name: value
            for name, value in values.items()
            if name not in OPTIONAL_SETTINGS or getattr(self, name) != OPTIONAL_SETTINGS[name]
        }

    def _read_tokens(self) -> None:
        """Read the image token and the special tokens of the tokenizer."""
        self._find_image_token()
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self._reserved_tokens = sorted({self.image_token, *special, *self.tokenizer.all_special_tokens})

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

    def with_settings(self, **changes: Any) -> Self:
        """Return a shallow copy of the processor with different settings.

        Args:
            **changes: Settings of the class, such as `prompt_template`.

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

        Warns:
            UserWarning: If the VLM's tokenizer does not know a word of a prompt.
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
                f"{type(self).__name__}: got {len(images)} images, {len(prompts)} prompts and "
                f"{len(references)} lists of references; pass one prompt and one list per image."
            )
        if not images:
            raise ValueError(f"{type(self).__name__}: images is empty; pass at least one image.")
        for prompt in prompts:
            self.check_prompt(prompt)
        for prompt in dict.fromkeys(prompts):
            self.warn_of_unknown_words(prompt)
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

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that the VLM's tokenizer does not know; see `vocabulary.unknown_words`."""
        return unknown_words(self.tokenizer, prompt)

    def warn_of_unknown_words(self, prompt: str) -> None:
        """Warn if the VLM's tokenizer does not know a word of a prompt."""
        if words := self.unknown_words(prompt):
            warnings.warn(
                f"prompt {prompt!r}: the model's vocabulary does not contain {', '.join(map(repr, words))}, which it "
                "cannot tell from any other unknown word; use other words, or a model with a larger vocabulary.",
                stacklevel=3,
            )

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
        """Return SAM's input for an RGB image, (3, S, S)."""
        raise NotImplementedError

    def decode_text(self, token_ids: torch.Tensor | Sequence[int]) -> str:
        """Return the text of completion tokens, (T,), without special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_completion(
        self, token_ids: torch.Tensor | Sequence[int], sample: PreparedSample | None = None
    ) -> Completion:
        """Decode and parse one completion.

        Args:
            token_ids: Completion tokens, (T,).
            sample: The sample of the completion.
        """
        raise NotImplementedError

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
