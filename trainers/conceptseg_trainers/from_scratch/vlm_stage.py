"""Stage "vlm": train Qwen2.5-VL or Qwen3-VL on examples of images, a prompt and a completion.

Without the following, a small language model does not learn to use image tokens for tens of thousands of steps:
- pretraining of the vision tower on dense targets;
- a curriculum from short examples with many boxes to complete tasks (in the data of the stage);
- auxiliary heads that predict dense targets from image tokens, and are not part of the model;
- guided attention: two heads of one layer are trained to attend to the object whose name or box is predicted;
- soft targets for numbers, and Fourier features as initial number embeddings, so that nearby numbers are similar;
- on photographs, the expected distance of the predicted numbers. Many boxes touch the border, so cross-entropy alone
  gives an uncertain VLM boxes of the whole image: 0 and 100 are the most probable numbers, but far from most others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb  # Qwen3-VL has a copy

from conceptseg_hf.prompt_processing import PromptProcessor
from conceptseg_hf.vlm_families import Vlm, get_family

from .precision import autocast, prepare_for_bfloat16
from .tokenizers import COORDINATE_SCALE
from .vlm_examples import MERGE, TrainingExample, pad_examples, patches

_GUIDED_LAYER, _GUIDED_HEADS = 3, 2
_NUMBER_SIGMA, _LAST_NUMBER_SIGMA = 1.2, 0.6
_EXACT = 0.85  # fraction of the steps after which the soft targets of numbers are narrow


class VlmData(Protocol):
    """Examples of the stage."""

    def pretraining_images(self, step: int) -> tuple[list[np.ndarray], list[Any]]:
        """Return the images of a step of the pretraining and their dense targets."""
        ...

    def examples(self, step: int) -> Sequence[TrainingExample]:
        """Return the examples of a step after the pretraining."""
        ...

    def dense_loss(self, heads: nn.Module, targets: Sequence[Any], features: Tensor) -> Tensor:
        """Compute the loss of the auxiliary heads.

        Args:
            heads: The heads.
            targets: The targets of N images.
            features: (N * grid * grid, D) their image tokens.
        """
        ...

    def evaluate(self, stage: VlmStage) -> dict[str, float]:
        """Return metrics of the VLM on held-out samples."""
        ...


class VlmWithHeads(nn.Module):
    """The VLM with auxiliary heads that predict dense targets from image tokens.

    Args:
        config: Config of the VLM.
        make_heads: Function from the number of channels of image tokens to the heads.
    """

    def __init__(self, config: PreTrainedConfig, make_heads: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.vlm: Vlm = AutoModelForImageTextToText.from_config(config)
        self.dense = make_heads(config.get_text_config().hidden_size)


@dataclass(frozen=True)
class ExampleStates:
    """The VLM's states of examples.

    Attributes:
        batch: The tensors of `pad_examples`.
        states: (B, L, C) last-layer, post-norm hidden states.
        features: (N * grid * grid, C) embeddings of the image tokens of all images.
        attention: The self-attention of the guided layer.
        attention_inputs: Its inputs; see `guided_attention_loss`.
    """

    batch: dict[str, Any]
    states: Tensor
    features: Tensor
    attention: Any
    attention_inputs: dict[str, Any]


class VlmStage:
    """Train all of the VLM.

    Args:
        module: The VLM with the heads of the data.
        data: The examples.
        processor: The processor of the checkpoint.
        pretraining: Number of steps in which only the vision tower is trained, on dense targets.
        steps: Number of steps after the pretraining.
        name: Name of the stage.
        device: Device of the module.
        distance_weight: Weight of the expected distance of the predicted numbers from the correct ones, as a fraction
            of the coordinate scale.
    """

    def __init__(
        self,
        module: VlmWithHeads,
        data: VlmData,
        processor: PromptProcessor,
        pretraining: int,
        steps: int,
        name: str = "vlm",
        device: str = "cpu",
        distance_weight: float = 0.0,
    ) -> None:
        self.module, self.data, self.processor, self.name = module.to(device), data, processor, name
        self.distance_weight = distance_weight
        self.pretraining, self.steps, self.device = pretraining, steps, device
        prepare_for_bfloat16(module.vlm, device)
        self.is_pretraining = False
        self.patch_size = processor.image_processor.patch_size
        self.grid = processor.canvas_size // self.patch_size // MERGE
        vocabulary = processor.tokenizer.get_vocab()
        self.numbers = torch.tensor([vocabulary[str(number)] for number in range(COORDINATE_SCALE + 1)])
        self.first_number = int(self.numbers[0])
        _number_embeddings(module.vlm.get_input_embeddings().weight, self.numbers)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a step."""
        self.is_pretraining = step < self.pretraining
        with autocast(self.device):
            if self.is_pretraining:
                images, targets = self.data.pretraining_images(step)
                loss = self.data.dense_loss(self.module.dense, targets, self.encode_images(images))
                return loss, {"dense": loss.item()}
            step -= self.pretraining
            sigma = _NUMBER_SIGMA if step < _EXACT * self.steps else _LAST_NUMBER_SIGMA
            return self.example_loss(self.data.examples(step), sigma)

    def encode_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return the embeddings of the image tokens of N images, (N * grid * grid, D)."""
        return self._embeddings(self._image_tokens(images))

    def _embeddings(self, tokens: Sequence[Tensor]) -> Tensor:
        # The tokens of Qwen3-VL also contain the features for its first layers.
        return torch.cat(list(tokens))[:, : self.module.vlm.config.get_text_config().hidden_size]

    def _image_tokens(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        rows = images[0].shape[0] // self.patch_size
        grid = torch.tensor([[1, rows, rows]], device=self.device).repeat(len(images), 1)
        vlm = self.module.vlm
        inputs = {"pixel_values": patches(images, self.patch_size, self.device), "image_grid_thw": grid}
        return get_family(vlm.config).encode_images(vlm, inputs)

    def example_loss(
        self, examples: Sequence[TrainingExample], number_sigma: float = _NUMBER_SIGMA
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of examples: cross-entropy of words and numbers, attention targets and dense targets.

        Args:
            examples: The examples.
            number_sigma: Standard deviation of the soft targets of numbers, Gaussians around the correct number.
        """
        run = self.run(examples)
        loss, metrics = self.language_loss(run, number_sigma)
        targets_of_images = [target for example in examples for target in example.dense]
        dense = self.data.dense_loss(self.module.dense, targets_of_images, run.features)
        return loss + dense, {**metrics, "dense": dense.item()}

    def run(self, examples: Sequence[TrainingExample]) -> ExampleStates:
        """Run the VLM on examples."""
        batch = pad_examples(
            examples,
            self.processor.image_token_id,
            self.processor.tokenizer.pad_token_id,
            self.grid,
            self.device,
        )
        vlm = self.module.vlm
        tokens = self._image_tokens([image for example in examples for image in example.images])
        attention_inputs: dict[str, Any] = {}
        attention = vlm.model.language_model.layers[_GUIDED_LAYER].self_attn
        hook = attention.register_forward_pre_hook(
            lambda _, __, kwargs: attention_inputs.update(
                states=kwargs["hidden_states"], rotary=kwargs["position_embeddings"]
            ),
            with_kwargs=True,
        )
        states = vlm.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
            **get_family(vlm.config).encoded_images(vlm, tokens),
        ).last_hidden_state
        hook.remove()
        return ExampleStates(batch, states, self._embeddings(tokens), attention, attention_inputs)

    def language_loss(
        self, run: ExampleStates, number_sigma: float = _NUMBER_SIGMA
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of words, numbers and attention targets; see `example_loss`."""
        vlm, batch, states = self.module.vlm, run.batch, run.states
        # A completion token is predicted from the state of the previous token.
        rows, columns = batch["completion"].nonzero(as_tuple=True)
        logits = vlm.lm_head(states[rows, columns - 1])
        targets = batch["labels"][rows, columns]
        log_probabilities = logits.float().log_softmax(-1)
        is_number = (targets >= self.first_number) & (targets <= self.first_number + COORDINATE_SCALE)
        words_loss = -log_probabilities[~is_number].gather(1, targets[~is_number, None]).mean()
        focus = guided_attention_loss(run.attention, run.attention_inputs, batch["attention_targets"])
        loss = words_loss + 0.4 * focus
        metrics = {"words": words_loss.item(), "focus": focus.item()}
        if is_number.any():
            numbers = targets[is_number] - self.first_number
            number_log_probabilities = log_probabilities[is_number][:, self.numbers.to(self.device)]
            soft_targets = (-0.5 * (_differences(numbers) / number_sigma) ** 2).softmax(1)
            numbers_loss = -(soft_targets * number_log_probabilities).sum(1).mean()
            distance_loss = number_distance(number_log_probabilities, numbers)
            loss = loss + numbers_loss + self.distance_weight * distance_loss
            metrics |= {"numbers": numbers_loss.item(), "distance": distance_loss.item()}
        return loss, metrics

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the data on held-out samples."""
        self.module.eval()
        return self.data.evaluate(self)


def number_distance(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean expected distance of numbers that are sampled by the VLM from the correct ones.

    Its minimum is a distribution on the median of the correct numbers, while that of the cross-entropy is their
    distribution.

    Args:
        log_probabilities: (N, S + 1) log-probabilities of the numbers 0 to the coordinate scale S.
        targets: (N,) correct numbers.

    Returns:
        Scalar, as a fraction of the coordinate scale.
    """
    distance = _differences(targets).abs() / COORDINATE_SCALE
    # Probabilities of all tokens, not of numbers only, would reward words in place of numbers.
    return (log_probabilities.softmax(1) * distance).sum(1).mean()


def _differences(numbers: Tensor) -> Tensor:
    """Return the differences of numbers (N,) and each number from 0 to the coordinate scale S, (N, S + 1)."""
    return numbers[:, None] - torch.arange(COORDINATE_SCALE + 1, device=numbers.device)[None]


def _number_embeddings(weight: Tensor, numbers: Tensor) -> None:
    """Add Fourier features of the value to the initial embeddings of 0..100, at the scale of the other embeddings.

    Args:
        weight: (V, D) embeddings, which are modified.
        numbers: Token ids of the numbers.
    """
    value = torch.linspace(0, 1, len(numbers))[:, None]
    frequencies = 0.5 * torch.pi * torch.arange(1, weight.shape[1] // 8 + 1)[None]
    features = (
        torch.cat([torch.sin(value * frequencies), torch.cos(value * frequencies)], dim=1)
        / torch.arange(1, weight.shape[1] // 8 + 1).repeat(2) ** 0.5
    )
    with torch.no_grad():
        weight[numbers] *= 0.5
        weight[numbers, : features.shape[1]] += 2.0 * weight.std() * features.to(weight)


def guided_attention_loss(
    attention: Any,
    inputs: dict[str, Any],
    attention_targets: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Compute -log of the attention of the guided heads to the target image tokens.

    Args:
        attention: The self-attention of the guided layer.
        inputs: Its input `states` (B, L, D), and cosines and sines of the `rotary` position embeddings.
        attention_targets: See `pad_examples`.
    """
    rows, columns, targets = attention_targets
    states, (cosine, sine) = inputs["states"], inputs["rotary"]
    heads, width = _GUIDED_HEADS, attention.head_dim
    query = attention.q_proj(states)[..., : heads * width].unflatten(-1, (heads, width))
    key = attention.k_proj(states)[..., :width].unflatten(-1, (1, width))
    if hasattr(attention, "q_norm"):  # Qwen3-VL
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, cosine, sine)
    scores = torch.einsum("nhd,nld->nhl", query[rows, :, columns], key[rows, 0]) * attention.scaling
    future = torch.arange(states.shape[1], device=states.device)[None] > columns[:, None]
    log_attention = scores.float().masked_fill(future[:, None], float("-inf")).log_softmax(-1)
    return -log_attention.masked_fill(~targets[:, None], float("-inf")).logsumexp(-1).mean()
