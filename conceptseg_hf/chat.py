"""Build the VLM's instruction, chat and tensors from a prompt, and validate prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import ProcessorMixin

from .completion import find_markup, format_box, format_box_list, format_start
from .coordinates import CoordinateFrame
from .inputs import PreparedSample, known
from .prompt_template import PromptTemplate
from .vlm_families import VlmFamily, get_family

# Templates of thinking models open the reasoning in the generation prompt. Completions start with `<think>`, which
# would then occur twice. Newlines are escaped in string literals of a template.
_OPEN_THOUGHT = re.compile(r"(assistant(?:\\n|\n))<think>(?:\\n|\n)*")


class ChatMixin(ProcessorMixin):
    """Chat-related methods of processors."""

    image_processor: Any
    tokenizer: Any
    image_token: str
    image_token_id: int
    canvas_size: int
    coordinate_scale: float
    prompt_template: dict[str, Any]
    vlm_family: str
    _reserved_tokens: Sequence[str]

    @property
    def family(self) -> VlmFamily:
        """The family of the VLM."""
        return get_family(self.vlm_family)

    @property
    def _pixel_limits(self) -> tuple[int, int] | None:
        """Minimum and maximum number of pixels of the VLM's images, or None if they have the size of the canvas."""
        return None

    def _find_image_token(self) -> None:
        self.image_token = self.family.image_token(self.tokenizer)
        self.image_token_id = self.tokenizer.get_vocab().get(self.image_token)
        if self.image_token_id is None:
            raise ValueError(
                f"{type(self).__name__}: the tokenizer has no image token {self.image_token!r}; "
                "add it as a special token."
            )

    def check_family(self, config: Any) -> None:
        """Raise a ValueError if the processor does not belong to the family of the model's VLM."""
        if config.vlm_config.model_type != self.vlm_family:
            raise ValueError(
                f"the processor is for VLMs of the family {self.vlm_family!r}, but the model's is "
                f"{config.vlm_config.model_type!r}; use the processor saved with the model, or set its vlm_family."
            )

    @property
    def template(self) -> PromptTemplate:
        """The prompt template."""
        return PromptTemplate.from_dict(self.prompt_template)

    def instruction(self, prompt: str, frame: CoordinateFrame) -> str:
        """Fill the prompt template with the user's prompt and the support boxes."""
        if frame.layout is None:
            variant = "no_reference"
        elif frame.proxy is not None:
            variant = "with_proxy"
        elif len(frame.reference_sizes) > 1 and frame.support_boxes:
            variant = "support_only"
        else:
            variant = "single_reference"
        boxes = ", ".join(format_box(box, self.coordinate_scale) for box in frame.support_boxes)
        box_list = format_box_list(frame.support_boxes, self.coordinate_scale)
        return self.template.fill(variant, prompt.strip(), boxes or "none", box_list)

    def chat_text(self, instruction: str, num_images: int) -> str:
        """Apply the chat template to the system message, the images (one image token each) and the instruction."""
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
                f"{type(self).__name__}: the chat template wrote {chat.count(self.image_token)} image tokens "
                f"for {num_images} images; use a template that writes one {self.image_token} per image."
            )
        if chat.rstrip().endswith("<think>"):
            raise ValueError(
                f"{type(self).__name__}: the chat template opens <think> in the generation prompt, but completions "
                "start with it; use a template whose generation prompt ends with the role."
            )
        return chat

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[Any],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Convert a conversation to a string or to the VLM's inputs.

        Args:
            conversation: Messages, or a list of conversations; see the base class.
            chat_template: Chat template to use instead of the VLM's.
            tokenize: Return token ids, or with `return_dict=True` all inputs of `model.generate`.
            **kwargs: See the base class.
        """
        chat_template = chat_template or self._chat_template
        if (
            tokenize
        ):  # the base class would call this processor, which expects images and prompts instead of chats
            vlm_processor = self.vlm_processor()
            return vlm_processor.apply_chat_template(
                conversation, chat_template=chat_template, tokenize=True, **kwargs
            )
        return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)

    def prepare_vlm(self, sample: PreparedSample) -> PreparedSample:
        """Compute the VLM's tensors of a sample in place, unless already present, and return the sample."""
        if sample.input_ids is not None or sample.error is not None:
            return sample
        encoded, counts = self.family.read_images(
            self.image_processor, sample.vlm_images, self.canvas_size, self._pixel_limits
        )
        text, *pieces = sample.vlm_text.split(self.image_token)
        for piece, count in zip(pieces, counts, strict=True):
            text += self.family.image_text(self.image_token, count) + piece
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        sample.input_ids = torch.tensor(ids, dtype=torch.long)
        sample.mm_token_type_ids = (sample.input_ids == self.image_token_id).long()
        for name, tensor in encoded.items():
            setattr(sample, name, tensor)
        return sample

    def vlm_processor(self) -> ProcessorMixin:
        """Return a standard processor of the VLM, for trainers and inference engines that do not use SAM 3.

        Applied to the same chat and the images of `draw_images`, it returns the same token ids and patches as
        `prepare_vlm`.
        """
        return self.family.make_processor(
            self.image_processor, self.tokenizer, self._chat_template, self.canvas_size, self._pixel_limits
        )

    @property
    def _chat_template(self) -> str:
        own_template: Any = self.chat_template  # a single template, hence a string
        template = own_template or self.tokenizer.chat_template or self.family.chat_template(self.image_token)
        return _OPEN_THOUGHT.sub(r"\1", template)

    def check_rule(self, rule: str) -> None:
        """Raise a ValueError if a rule cannot be part of a completion; the message is one sentence."""
        if not isinstance(rule, str) or not rule.strip():
            raise ValueError(f"rule is {rule!r}; give the rule of the concept in a non-empty string.")
        self.check_text(rule, "rule")
        if (markup := find_markup(rule)) is not None:
            raise ValueError(f"rule contains the tag {markup!r}; remove it.")

    def start_completion(self, sample: PreparedSample, rule: str) -> tuple[PreparedSample, int]:
        """Return a copy of a sample whose prompt ends with the start of a completion, and the number of its tokens.

        Args:
            sample: Sample with the VLM's tensors.
            rule: The rule, which is written as the reasoning, too.
        """
        rule = rule.strip()
        text = format_start(rule, rule, sample.coordinates.proxy is not None)
        start = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        ids = known(sample.input_ids, "input_ids")
        types = known(sample.mm_token_type_ids, "mm_token_type_ids")
        started = replace(
            sample,
            input_ids=torch.cat([ids, start.to(ids.device)]),
            mm_token_type_ids=torch.cat([types, torch.zeros_like(start).to(types.device)]),
        )
        return started, len(start)

    def check_prompt(self, prompt: str) -> None:
        """Raise a ValueError if a prompt is invalid; the message is one sentence."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt is {prompt!r}; describe the concept in a non-empty string.")
        self.check_text(prompt, "prompt")

    def check_text(self, text: str, what: str) -> None:
        """Raise a ValueError if a text contains unpaired surrogates or reserved tokens.

        Args:
            text: The text to check.
            what: Name of the text in the error message.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{what} {text!r} contains an unpaired surrogate; fix its encoding.")
        for token in self._reserved_tokens:
            # A reserved token in the prompt could end the turn or stand for an image.
            if token in text:
                raise ValueError(f"{what} contains the reserved token {token!r}; remove it.")
