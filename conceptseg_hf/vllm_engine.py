"""Completions of the VLM from vLLM: continuous batching and prefix caching inside of this process.

The engine holds a second copy of the language model; images are encoded by the VLM of the model, once per batch. vLLM
returns no hidden states, so they come from one teacher-forced forward pass over prompts and completions.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .devices import execution_device, loaded, stored_value
from .generation import GeneratedCompletions, prepare_generation_config
from .hashing import weights_hash
from .vllm_runtime import (
    MAX_SEQUENCES,
    MIN_LOGIT_BIAS,
    cache_bytes,
    reload_weights,
    start_engine,
)
from .vlm_families import Vlm, get_family

if TYPE_CHECKING:
    from .inputs import PreparedSample
    from .modeling_conceptseg import ConceptSegForSegmentation
    from .processing_conceptseg import ConceptSegProcessor

MAX_MODEL_LENGTH = 4096  # prompts of 2048 tokens and completions of 768 (Table 7)
# Fields of a GenerationConfig that are passed to vLLM, with the values of `generate` for unset fields.
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0, "repetition_penalty": 1.0}
# Fields that do not change the completions, or are handled by `prepare_generation_config`.
_HANDLED = {
    *_SAMPLING,
    *"do_sample eos_token_id bos_token_id pad_token_id max_new_tokens max_length suppress_tokens".split(),
    *"use_cache cache_implementation cache_config compile_config disable_compile prefill_chunk_size".split(),
    *"output_attentions output_hidden_states output_logits output_scores return_dict_in_generate".split(),
    *"num_beams guidance_scale stop_strings prompt_lookup_num_tokens assistant_early_exit".split(),
    *"remove_invalid_values transformers_version".split(),
}
_NEUTRAL = {
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "typical_p": 1.0,
    "num_beam_groups": 1,
}


class VllmEngine:
    """A vLLM engine for the VLM of a model, in this process.

    The engine receives the weights of the model before the first completion, and again whenever they have changed. It
    starts no server. Threads that share an engine are serialized by a lock.

    Args:
        model: The model; only the architecture of its VLM is read, no reference is kept.
        processor: Its processor.
        max_model_len: Maximum number of tokens of a prompt and its completion together; by default the smaller of 4096
            and what the VLM allows.
        max_num_seqs: Maximum number of completions that are written at the same time.
        **options: Further arguments of `vllm.LLM`, such as `gpu_memory_utilization` or `kv_cache_memory_bytes` (by
            default, memory for `max_num_seqs` sequences of `max_model_len` tokens).

    Raises:
        ImportError: If vLLM is not installed.
        ValueError: If the VLM cannot run in the engine.
    """

    name = "vllm"

    def __init__(
        self,
        model: ConceptSegForSegmentation,
        processor: ConceptSegProcessor,
        max_model_len: int | None = None,
        max_num_seqs: int = MAX_SEQUENCES,
        **options: Any,
    ) -> None:
        family = get_family(model.vlm.config)
        family.check_vllm()
        options = {**family.vllm_options, **options}
        self._lock = threading.Lock()
        self._parameters = _describe_parameters(model.vlm)
        self._weights: tuple[Any, ...] | None = None  # of the weights in the engine; see `_fingerprint`
        text_config = model.vlm.config.get_text_config()
        self.max_model_len = max_model_len or min(text_config.max_position_embeddings, MAX_MODEL_LENGTH)
        options.setdefault(
            "kv_cache_memory_bytes",
            cache_bytes(text_config, model.vlm.dtype, self.max_model_len * max_num_seqs),
        )
        with tempfile.TemporaryDirectory() as folder:
            config = deepcopy(model.vlm.config)
            config.architectures = [type(model.vlm).__name__]
            config.save_pretrained(folder)
            processor.vlm_processor().save_pretrained(folder)
            self._llm = start_engine(
                model=folder,
                dtype=str(model.vlm.dtype).removeprefix("torch."),
                max_model_len=self.max_model_len,
                max_num_seqs=max_num_seqs,
                **options,
            )

    def __deepcopy__(self, memo: Any) -> VllmEngine:
        return self  # a copied model shares the engine, which then receives the weights of the copy

    @torch.no_grad()
    def generate(
        self,
        model: ConceptSegForSegmentation,
        processor: ConceptSegProcessor,
        samples: Sequence[PreparedSample],
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    ) -> GeneratedCompletions:
        """Write completions and compute their hidden states.

        Args:
            model: The model, or another one of the same architecture.
            processor: Its processor.
            samples: Samples without errors.
            generation_config: See `generate_with_states`. Sampling is reproducible with `torch.manual_seed`, but draws
                other tokens than `generate` does.

        Returns:
            What `generate_with_states` returns for the same samples.

        Raises:
            ValueError: If a setting is not supported, or prompt and completion exceed `max_model_len`.
        """
        vlm, config = model.vlm, model.config
        family = get_family(vlm.config)
        batch = family.model_inputs(processor.collate(samples, device=execution_device(vlm)))
        settings, limits = prepare_generation_config(vlm, generation_config, batch, config.max_total_length)
        _check_supported(settings, vlm.generation_config)
        max_tokens = [settings.max_new_tokens] * len(samples) if limits is None else limits.tolist()
        with self._lock, loaded(vlm):
            self.synchronize(vlm)
            images, keys = _encode_images(vlm, batch)
            prompts = _prompts(vlm, samples, images, keys)
            completions = self._write(vlm, samples, prompts, settings, max_tokens)
            ends = set(_as_list(settings.eos_token_id))
            texts = [_without_end(ids, ends) for ids in completions]
            stated = completions if config.end_of_turn_state else texts
            states = _teacher_forced_states(model, processor, samples, images, stated)
        length = max(1, *map(len, stated))
        return GeneratedCompletions(
            _pad(stated, length, settings.pad_token_id, batch["input_ids"].device),
            _mask(texts, length, states.device),
            states[:, :length].masked_fill(~_mask(stated, length, states.device)[..., None], 0),
            _mask(stated, length, states.device),
        )

    def synchronize(self, vlm: Vlm) -> None:
        """Load the weights of a VLM into the engine, unless it has them already.

        Raises:
            ValueError: If the VLM has another architecture than the one that the engine was built for.
        """
        if _describe_parameters(vlm) != self._parameters:
            raise ValueError(
                "the VLM differs from the one that the vLLM engine was built for; call model.set_vlm_engine again."
            )
        fingerprint = _fingerprint(vlm)
        if fingerprint != self._weights:
            self._weights = None  # if loading fails halfway
            reload_weights(self._llm, ((name, stored_value(vlm, name).detach()) for name in self._parameters))
            self._weights = fingerprint

    def _write(
        self,
        vlm: Vlm,
        samples: Sequence[PreparedSample],
        prompts: list[dict[str, Any]],
        settings: GenerationConfig,
        max_tokens: Sequence[int],
    ) -> list[list[int]]:
        """Return the tokens of the completions, up to and including the end-of-sequence token."""
        from vllm import SamplingParams

        for sample in samples:
            length = len(_known(sample.input_ids))
            if length >= self.max_model_len:
                raise ValueError(
                    f"a prompt has {length} tokens, but the vLLM engine was built for {self.max_model_len}; raise "
                    "max_model_len in model.set_vlm_engine."
                )
        parameters = [
            SamplingParams(
                **_sampling_arguments(settings, vlm.generation_config),
                # Greedy decoding needs no seed. vLLM's own generator would not follow `torch.manual_seed`.
                seed=int(torch.randint(2**31, ())) if settings.do_sample else None,
                max_tokens=limit,
                stop_token_ids=_as_list(settings.eos_token_id),
                ignore_eos=True,  # only the tokens above end a completion, as in `generate`
                logit_bias=dict.fromkeys(settings.suppress_tokens, MIN_LOGIT_BIAS),
                detokenize=False,
            )
            for limit in max_tokens
        ]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        completions = []
        for output, sample, limit in zip(outputs, samples, max_tokens, strict=True):
            ids = list(output.outputs[0].token_ids)
            if list(output.prompt_token_ids) != _known(sample.input_ids).tolist():
                raise RuntimeError(
                    "vLLM expanded the image tokens of a prompt differently; please report this error."
                )
            if output.outputs[0].finish_reason == "length" and len(ids) < limit:
                raise ValueError(
                    f"a completion of {limit} tokens does not fit into the {self.max_model_len} tokens of the vLLM "
                    "engine; raise max_model_len in model.set_vlm_engine, or set max_new_tokens."
                )
            completions.append(ids)
        return completions


# -- weights --


def _describe_parameters(vlm: Vlm) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters, by name.

    Raises:
        ValueError: If the VLM has adapters or is quantized.
    """
    if getattr(vlm.config, "quantization_config", None) is not None:
        raise ValueError(
            "the VLM is quantized, but the vLLM engine needs its full weights; load the model without quantization, "
            'or use vlm_engine="transformers".'
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in vlm.named_parameters()}
    if any(".base_layer." in name for name in shapes):
        raise ValueError(
            "the VLM has adapters, but the vLLM engine needs plain weights; merge them with PEFT's "
            'merge_and_unload(), or use vlm_engine="transformers".'
        )
    return shapes


def _fingerprint(vlm: Vlm) -> tuple[Any, ...]:
    """Return a value that changes with the weights.

    Version counters count operations in place, which change any value; the hash also changes with operations on
    `parameter.data`, which are not counted.
    """
    versions = tuple(
        (id(parameter), 0 if parameter.is_inference() else parameter._version)
        for parameter in vlm.parameters()
    )
    return weights_hash({"": vlm}), versions


# -- settings --


def _check_supported(settings: GenerationConfig, defaults: GenerationConfig) -> None:
    for config in (settings, defaults):
        for name, value in vars(config).items():
            if name.startswith("_") or name in _HANDLED or value in (None, False, _NEUTRAL.get(name)):
                continue
            raise ValueError(
                f"generation_config: {name} is {value!r}, which the vLLM engine does not support; omit it, or use "
                'vlm_engine="transformers".'
            )


def _sampling_arguments(settings: GenerationConfig, defaults: GenerationConfig) -> dict[str, Any]:
    """Return the sampling arguments of vLLM; unset fields have the values that `generate` would use."""

    def setting(name: str) -> Any:
        values = (getattr(settings, name), getattr(defaults, name), _SAMPLING[name])
        return next(value for value in values if value is not None)

    penalty = {"repetition_penalty": setting("repetition_penalty")}
    if not settings.do_sample:
        return {"temperature": 0.0, **penalty}
    return {name: setting(name) for name in _SAMPLING}


# -- prompts and states --


def _encode_images(vlm: Vlm, batch: Mapping[str, Tensor]) -> tuple[list[list[Tensor]], list[list[str]]]:
    """Encode each distinct image of a batch once.

    Returns:
        The image tokens (tokens, C) of the images of each row, and a key of the content of each image, by which the
        prefix cache finds it (its image tokens have numerical noise that depends on the batch).
    """
    family = get_family(vlm.config)
    keys = [
        _key(family.select_images(batch, [image])) for image in range(len(family.pixels_per_image(batch)))
    ]
    first = {key: image for image, key in reversed(list(enumerate(keys)))}
    distinct = sorted(first.values())
    encoded = family.encode_images(vlm, family.select_images(batch, distinct))
    by_key = dict(zip((keys[image] for image in distinct), encoded, strict=True))
    rows = [row.images for row in family.images_of_rows(vlm.config, batch)]
    return [[by_key[key] for key in keys[row]] for row in rows], [keys[row] for row in rows]


def _key(image: Mapping[str, Tensor]) -> str:
    """Return a hash of the inputs of an image."""
    digest = hashlib.sha256()
    for tensor in image.values():
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _prompts(
    vlm: Vlm,
    samples: Sequence[PreparedSample],
    images: Sequence[Sequence[Tensor]],
    keys: Sequence[Sequence[str]],
) -> list[dict[str, Any]]:
    """Return the prompts of `vllm.LLM.generate`."""
    family = get_family(vlm.config)
    prompts = []
    for sample, tokens, image_keys in zip(samples, images, keys, strict=True):
        prompts.append(
            {
                "prompt_token_ids": family.vllm_prompt(vlm.config, _known(sample.input_ids).tolist()),
                "multi_modal_data": {"image": family.vllm_image_data(tokens, vars(sample))},
                "multi_modal_uuids": {"image": list(image_keys)},
            }
        )
    return prompts


def _teacher_forced_states(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    samples: Sequence[PreparedSample],
    images: Sequence[Sequence[Tensor]],
    completions: Sequence[Sequence[int]],
) -> Tensor:
    """Return the (B, T', C) hidden states of completions, from one forward pass over prompts and completions."""
    vlm = model.vlm
    batch = processor.collate(samples, list(completions), device=execution_device(vlm))
    family = get_family(vlm.config)
    inputs = family.model_inputs(batch)
    del inputs["pixel_values"]
    tokens = family.encoded_images(vlm, [image for row in images for image in row])
    start = max(len(_known(sample.input_ids)) for sample in samples)  # prompts are padded on the left
    if model.config.hidden_states_at == "predict":
        start -= 1
    return family.full_pass(vlm, inputs, use_cache=False, **tokens).last_hidden_state[:, start:]


def _as_list(token_ids: int | list[int] | None) -> list[int]:
    return [] if token_ids is None else [token_ids] if isinstance(token_ids, int) else list(token_ids)


def _without_end(ids: list[int], ends: set[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in ends else ids


def _pad(rows: Sequence[list[int]], length: int, pad: int, device: torch.device) -> Tensor:
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], device=device)


def _mask(rows: Sequence[list[int]], length: int, device: torch.device) -> Tensor:
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return torch.arange(length, device=device) < lengths[:, None]


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # set by `prepare_vlm`, which `collate` has called
    return tensor
