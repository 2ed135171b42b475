"""Building and updating a `vllm.LLM` inside of this process, for inference and training.

Written for vLLM 0.32, parts of which are used that are not documented: `start_engine`, `keep_process_group`,
`reload_weights` and `reset_caches`.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_SEQUENCES = 16
# vLLM has no option to suppress tokens; with the smallest bias that it accepts, a token is practically never sampled.
MIN_LOGIT_BIAS = -100.0
NOT_INSTALLED = (
    'vlm_engine is "vllm", but vLLM is not installed; install a version that works with the installed torch (see '
    'docs/vllm.md), or use "transformers".'
)


def start_engine(**options: Any) -> Any:
    """Build a `vllm.LLM` in this process for prompts with encoded images, with arbitrary weights.

    vLLM reseeds the random generators, replaces `torch.set_num_threads` and changes the environment (such as
    LD_PRELOAD); these are restored.

    Args:
        **options: Arguments of `vllm.LLM`, which take precedence over the defaults below.

    Raises:
        ImportError: If vLLM is not installed.
    """
    with engine_environment():
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(NOT_INSTALLED) from error
        is_distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        defaults: dict[str, Any] = {
            "load_format": "dummy",  # `reload_weights` follows
            "generation_config": "vllm",  # ignore the settings of the folder
            "enforce_eager": not torch.cuda.is_available(),
            # Images are given as embeddings: the engine needs no vision tower.
            "enable_mm_embeds": True,
            "limit_mm_per_prompt": {"image": 0, "video": 0},
            "mm_processor_cache_gb": 0,  # would keep gigabytes of encoded images
            "enable_prefix_caching": True,
            # With several processes, each has an engine of its own.
            "distributed_executor_backend": "external_launcher" if is_distributed else "uni",
        }
        llm = LLM(**defaults | options)
        from vllm.model_executor.layers import rotary_embedding
    # vLLM caches position embeddings by their settings. Those of the omitted vision tower have no values, and would be
    # used by the next engine with a vision tower, such as that of a trainer.
    rotary_embedding._ROPE_DICT.clear()
    keep_process_group(llm)
    return llm


def keep_process_group(llm: Any) -> None:
    """Let an engine free its memory when it is released, but not destroy the process group.

    vLLM destroys the default process group with the first engine that is garbage collected, even if it belongs to
    accelerate or another engine, and fails at exit if the group is gone by then.
    """
    client = llm.llm_engine.engine_core
    client._finalizer.detach()
    weakref.finalize(client, _release, client.engine_core).atexit = False


def _release(core: Any) -> None:
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()  # objects that vLLM has excluded from garbage collection


@contextmanager
def engine_environment() -> Iterator[None]:
    """Context manager in which vLLM is imported and an engine is built; see `start_engine`."""
    environment = dict(os.environ)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights can only be passed within a process
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # would change the threads of this process
        "VLLM_NO_USAGE_STATS": "1",  # sends nothing
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # The process group of the engine listens on this interface.
        **({"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").is_dir() else {}),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for name in [name for name in os.environ if not name.startswith("VLLM_") and name not in environment]:
            del os.environ[name]
        os.environ.update(
            {name: value for name, value in environment.items() if not name.startswith("VLLM_")}
        )


def reload_weights(llm: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Replace the weights of an engine in this process, and clear its caches.

    `load_weights` of vLLM's models cannot be called a second time on a CPU: its linear layers pack their weights after
    loading and drop the original parameters. The worker's `reload_weights` restores and packs them again, except for a
    head that is tied to the embeddings, for which no weights arrive and which would keep the old packed weights.

    Args:
        llm: A `vllm.LLM`.
        weights: Names of Transformers and values.
    """
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    level = logger.level
    logger.setLevel(logging.ERROR)  # warns of tied weights and of buffers, which are not in the checkpoint
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    finally:
        logger.setLevel(level)
    llm.apply_model(_repack_embeddings)
    reset_caches(llm)


def reset_caches(llm: Any) -> None:
    """Clear everything that an engine has computed with earlier weights: prefixes and encoded images."""
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


def _repack_embeddings(model: nn.Module) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for module in model.modules():
            if isinstance(module, VocabParallelEmbedding):
                module.quant_method.process_weights_after_loading(module)


def cache_bytes(text_config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Return the size of the key-value cache for a number of tokens, with a margin for partly filled blocks."""
    head_size = (
        getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    )
    per_token = (
        2 * text_config.num_hidden_layers * text_config.num_key_value_heads * head_size * dtype.itemsize
    )
    return int(1.1 * tokens * per_token) + 2**24
