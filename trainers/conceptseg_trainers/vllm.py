"""Rollouts with vLLM: the engine runs only the VLM; the CTM and SAM 3 stay in the trainer.

Tested with TRL 1.16.0 and vLLM 0.32.0 on a CPU, where the engine gets its weights differently than on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from conceptseg_hf import ConceptSegForSegmentation
from conceptseg_hf.vllm_runtime import (
    MAX_SEQUENCES,
    MIN_LOGIT_BIAS,
    cache_bytes,
    engine_environment,
    keep_process_group,
    reload_weights,
    reset_caches,
)
from conceptseg_hf.vlm_families import get_family

from .trl_adapter import GRPOTrainerAdapter, VLLMGenerationAdapter, steps_per_generation

if TYPE_CHECKING:
    from peft import PeftModel

_VLM = "vlm."


class ConceptVLLMGeneration(VLLMGenerationAdapter):
    """TRL's vLLM backend for the VLM inside a `ConceptSegForSegmentation`.

    Unlike in `VLLMGeneration`, the engine is built from the folder or id of the VLM, receives only the weights of the
    VLM, and never samples the suppressed tokens.

    Args:
        model: Model of the trainer: a composite, or a PEFT model that wraps one.
        accelerator: As for `VLLMGeneration`.
        processing_class: As for `VLLMGeneration`.
        vlm_name_or_path: Folder or id of a VLM of the same architecture, with its processor, from which a
            colocated engine is built. A server must be started with it manually.
        suppressed_tokens: Ids of image tokens, which a completion must not contain.
        generation_kwargs: Additional sampling parameters of vLLM.
        **kwargs: As for `VLLMGeneration`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        accelerator: Accelerator,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        *,
        vlm_name_or_path: str,
        suppressed_tokens: Sequence[int],
        generation_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vlm_name_or_path = vlm_name_or_path
        super().__init__(
            model,
            accelerator,
            processing_class,
            generation_kwargs=suppress_tokens(generation_kwargs, suppressed_tokens),
            **kwargs,
        )

    @classmethod
    def from_trainer(
        cls, trainer: GRPOTrainerAdapter, vlm_name_or_path: str, suppressed_tokens: Sequence[int]
    ) -> ConceptVLLMGeneration:
        """Create the backend from the settings of a trainer; see `ConceptVLLMGeneration` for the other arguments."""
        args = trainer.args
        return cls(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            vlm_name_or_path=vlm_name_or_path,
            suppressed_tokens=suppressed_tokens,
            mode=args.vllm_mode,
            structured_outputs_regex=args.vllm_structured_outputs_regex,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=args.per_device_train_batch_size
            * args.vllm_tensor_parallel_size
            * steps_per_generation(args),
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            repetition_penalty=args.repetition_penalty,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            max_completion_length=args.max_completion_length,
            # GRPOConfig has parsed a value that was given as a string.
            generation_kwargs=cast(dict[str, Any] | None, args.generation_kwargs),
        )

    @property
    def _composite(self) -> ConceptSegForSegmentation:
        return next(
            module for module in self.model.modules() if isinstance(module, ConceptSegForSegmentation)
        )

    @contextmanager
    def engine_context(self) -> Iterator[None]:
        """Temporarily set `model.name_or_path`, from which TRL builds the engine, to that of the VLM."""
        composite = self._composite
        original = composite.name_or_path
        composite.name_or_path = self.vlm_name_or_path
        try:
            with engine_environment():
                yield
            if self.mode == "colocate" and hasattr(self, "llm"):
                keep_process_group(self.llm)
        finally:
            composite.name_or_path = original

    def engine_options(self) -> dict[str, Any]:
        """Return the options of an engine that computes as the trainer does: prompts have up to two images."""
        precision = {"bf16": "bfloat16", "fp16": "float16"}.get(self.accelerator.mixed_precision)
        options: dict[str, Any] = {
            "dtype": precision or str(self._composite.vlm.dtype).removeprefix("torch."),
            "limit_mm_per_prompt": {"image": 2, "video": 0},
        }
        if settings := get_family(self._composite.config.vlm_config).vllm_image_options:
            options["mm_processor_kwargs"] = dict(settings)
        if self.accelerator.num_processes == 1:
            options["distributed_executor_backend"] = "uni"  # needs no port
        if self._on_cpu:
            # Memory is not profiled on a CPU, and the profiling images of Qwen need two frames per patch.
            options |= {"skip_mm_profiling": True, "enforce_eager": True, "enable_sleep_mode": False}
            # Instead of `gpu_memory_utilization`, which is a fraction of all memory of the machine on a CPU.
            text_config = self._composite.vlm.config.get_text_config()
            length = self.max_model_length or text_config.max_position_embeddings
            options["kv_cache_memory_bytes"] = cache_bytes(
                text_config, getattr(torch, options["dtype"]), length * (self.max_num_seqs or MAX_SEQUENCES)
            )
        return options

    @property
    def _on_cpu(self) -> bool:
        return self.accelerator.device.type == "cpu"

    def load_engine_weights(self, weights: Iterator[tuple[str, Tensor]]) -> bool:
        """On a CPU, replace the weights as vLLM's worker does; see `reload_weights`."""
        if not self._on_cpu:
            return False
        # Copies, as vLLM keeps some tensors beyond the iteration, when adapters are no longer merged.
        reload_weights(self.llm, ((name, value.clone()) for name, value in weights))
        return True

    def engine_prompt(self, token_ids: list[int]) -> list[int]:
        """Collapse the image tokens of a prompt, which TRL has expanded and vLLM would expand once more."""
        config = self._composite.config.vlm_config
        return get_family(config).vllm_prompt(config, token_ids)

    def after_synchronization(self) -> None:
        """Clear the encoded images, which TRL leaves in the engine, besides the prefixes."""
        reset_caches(self.llm)

    def engine_name(self, name: str) -> str | None:
        """Return the VLM's name of a parameter, or None for parameters of the CTM and SAM 3."""
        return name.removeprefix(_VLM) if name.startswith(_VLM) else None


def suppress_tokens(generation_kwargs: Mapping[str, Any] | None, tokens: Sequence[int]) -> dict[str, Any]:
    """Return sampling parameters of vLLM with which some tokens are never sampled; other biases are kept."""
    kwargs = dict(generation_kwargs or {})
    kwargs["logit_bias"] = {
        **(kwargs.get("logit_bias") or {}),
        **dict.fromkeys(map(int, tokens), MIN_LOGIT_BIAS),
    }
    return kwargs
