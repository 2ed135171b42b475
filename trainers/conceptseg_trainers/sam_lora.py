"""A low-rank adapter (LoRA) of SAM 3, trained with concept tokens and then merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from conceptseg_hf import ConceptPrompt, ConceptSegForSegmentation, ConceptSegProcessor, Reference
from conceptseg_hf.concept_tuning import TuningOptions, finish_concept, tune_tokens
from conceptseg_hf.images import ImageInput

ADAPTED = ("detr_encoder", "detr_decoder", "mask_decoder")
"""Parts of SAM 3 whose linear and convolution layers are adapted; they depend on the prompt."""

ENCODER = "vision_encoder"
"""The image encoder of SAM 3, which is adapted on request."""


def tune_concept_with_lora(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    prompt: str,
    references: Sequence[Reference],
    negatives: Sequence[ImageInput] = (),
    phrase: str | None = None,
    options: TuningOptions | None = None,
    rank: int = 8,
    progress: bool = False,
    adapt_encoder: bool = False,
) -> ConceptPrompt:
    """Tune concept tokens and a LoRA adapter of SAM 3, and merge the adapter into the model's weights.

    The concept fits only the changed weights: save the model as well (`model.save_pretrained`).

    Args:
        model: The model; its SAM 3 is changed.
        processor: Its processor.
        prompt: The user's prompt.
        references: Images with masks; at least two.
        negatives: Images without the concept.
        phrase: Phrase after the tokens; the prompt by default.
        options: Settings of the tuning.
        rank: Rank of the adapter.
        progress: Whether to show a progress bar.
        adapt_encoder: Whether to adapt the image encoder, too, for concepts that its features do not show. Each step
            then encodes its images, with gradients.

    Returns:
        The concept; see `concept_tuning.tune_concept`.

    Raises:
        ValueError: See `concept_tuning.tune_concept`.
    """
    processor.check_prompt(prompt)
    options, phrase = options or TuningOptions(), phrase or prompt
    parts = (*ADAPTED, ENCODER) if adapt_encoder else ADAPTED
    with _adapter(model, parts, rank, options.seed) as parameters:
        tokens = tune_tokens(model, processor, phrase, references, negatives, options, parameters, progress)
    return finish_concept(model, processor, prompt, phrase, tokens, references, negatives)


@contextmanager
def _adapter(
    model: ConceptSegForSegmentation, parts: Sequence[str], rank: int, seed: int
) -> Iterator[list[nn.Parameter]]:
    """Context in which SAM 3 has an adapter, with its parameters; merged into the weights at the end."""
    required = {name: parameter.requires_grad for name, parameter in model.sam.named_parameters()}
    targets = [
        name
        for name, module in model.sam.named_modules()
        if name.split(".")[0] in parts and isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = LoraModel(model.sam, config, "default")
    try:
        yield [parameter for name, parameter in model.sam.named_parameters() if "lora_" in name]
        adapted.merge_and_unload()
    except BaseException:
        adapted.unload()
        raise
    finally:
        for name, parameter in model.sam.named_parameters():
            parameter.requires_grad_(required[name])


__all__ = ["ADAPTED", "ENCODER", "tune_concept_with_lora"]
