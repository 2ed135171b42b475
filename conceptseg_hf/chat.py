"""The words around a prompt: the instruction, the chat with the VLM, and what a prompt must not contain."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import ProcessorMixin

from . import vlm_backbone
from .completion import format_box, format_box_list
from .coordinates import CoordinateFrame
from .prompt_template import PromptTemplate


class ChatMixin(ProcessorMixin):
    """How a `ConceptSegProcessor` writes to the VLM."""

    image_processor: Any
    tokenizer: Any
    image_token: str
    canvas_size: int
    coordinate_scale: float
    prompt_template: dict[str, Any]
    _reserved_tokens: Sequence[str]

    @property
    def template(self) -> PromptTemplate:
        """The prompt template."""
        return PromptTemplate.from_dict(self.prompt_template)

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
