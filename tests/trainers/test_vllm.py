"""Tests for rollouts with vLLM, without the engine (see tests/with_vllm): its weights and its arguments."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("trl", "1.16")
from accelerate import Accelerator
from conceptseg_trainers.vllm import ConceptVLLMGeneration, suppress_tokens
from peft import LoraConfig, get_peft_model
from trl.generation.vllm_generation import VLLMGeneration


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Return a function that builds the backend, and records the name from which TRL would build the engine."""

    def make(model, **kwargs):
        started_from = []
        monkeypatch.setattr(
            VLLMGeneration, "_init_vllm", lambda self: started_from.append(self.model.name_or_path)
        )
        backend = ConceptVLLMGeneration(
            model,
            Accelerator(cpu=True),
            None,
            vlm_name_or_path="an/vlm",
            suppressed_tokens=[7, 9],
            **kwargs,
        )
        return backend, started_from

    return make


def test_engine_gets_only_the_weights_of_the_vlm(build, model) -> None:
    backend, started_from = build(model)
    sent = dict(backend._iter_named_params())
    expected = dict(model.vlm.named_parameters())
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[name], expected[name]) for name in expected)
    assert started_from == ["an/vlm"] and model.name_or_path != "an/vlm"


def test_engine_gets_merged_adapters(build, make_model) -> None:
    model = make_model()
    expected = {name: parameter.clone() for name, parameter in model.vlm.named_parameters()}
    adapted = get_peft_model(
        model,
        LoraConfig(target_modules=r"vlm\.model\.language_model\..*\.q_proj", modules_to_save=["ctm"]),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    backend, started_from = build(adapted)
    # Weights are only merged while they are sent.
    sent = {name: parameter.clone() for name, parameter in backend._iter_named_params()}
    assert sent.keys() == expected.keys()
    changed = {name for name in sent if not torch.equal(sent[name], expected[name])}
    assert changed == {
        name for name in expected if "language_model" in name and name.endswith("q_proj.weight")
    }
    assert started_from == ["an/vlm"]


def test_image_tokens_are_suppressed_and_other_biases_kept(build, model) -> None:
    backend, _ = build(model, generation_kwargs={"seed": 1, "logit_bias": {3: 2.0}})
    assert backend.generation_kwargs == {"seed": 1, "logit_bias": {3: 2.0, 7: -100.0, 9: -100.0}}
    assert suppress_tokens(None, []) == {"logit_bias": {}}


def test_engine_computes_as_the_trainer_does(build, model) -> None:
    backend, _ = build(model, max_model_length=256, max_num_seqs=4)
    options = backend.engine_options()
    text_config = model.config.vlm_config.get_text_config()
    head_size = text_config.hidden_size // text_config.num_attention_heads
    cache = 2 * text_config.num_hidden_layers * text_config.num_key_value_heads * head_size * 4 * 256 * 4
    assert cache <= options.pop("kv_cache_memory_bytes") < 1.2 * cache + 2**25
    assert options == {
        "dtype": "float32",
        "limit_mm_per_prompt": {"image": 2, "video": 0},
        "distributed_executor_backend": "uni",
        "skip_mm_profiling": True,
        "enforce_eager": True,
        "enable_sleep_mode": False,
    }


def test_expanded_image_tokens_are_collapsed_for_a_colocated_engine(build, model, monkeypatch) -> None:
    image = model.config.vlm_config.image_token_id
    received, expanded = [], []

    def generate(self, prompts, *args, **kwargs):
        received.append(prompts)
        return expanded, [[2]] * len(prompts), None, None

    monkeypatch.setattr(VLLMGeneration, "generate", generate)
    prompts = [[1, image, image, image, 8, image, image, 9], [1, 8]]
    expanded[:] = prompts
    for mode in ("colocate", "server"):  # a server receives the positions of the image tokens
        backend, _ = build(model, mode=mode)
        assert backend.generate(prompts, None, 1)[1] == [[2], [2]]
    assert received == [[[1, image, 8, image, 9], [1, 8]], prompts]

    # An engine whose processor reads images in another size would write meaningless completions.
    backend, _ = build(model)
    expanded[0] = [1, image, image, 8, image, 9]
    with pytest.raises(ValueError, match=r"reads a prompt of 8 tokens as 6 tokens; save the processor"):
        backend.generate(prompts, None, 1)


@pytest.mark.parametrize("vlm_family", ["internvl"], indirect=True, scope="session")
def test_engine_reads_images_of_internvl_as_the_processor_does(build, model, processor, picture) -> None:
    """Without tiles, and without the tokens for the borders of images, which vLLM adds."""
    backend, _ = build(model)
    assert backend.engine_options()["mm_processor_kwargs"] == {"crop_to_patches": False}
    sample = processor.prepare(picture(0), "star")
    image = model.config.vlm_config.image_token_id
    prompt = sample.input_ids.tolist()
    position = prompt.index(image)
    assert prompt.count(image) == 4
    assert backend.engine_prompt(prompt) == [*prompt[: position - 1], image, *prompt[position + 5 :]]


def test_options_reach_the_engine_that_trl_builds(monkeypatch) -> None:
    from conceptseg_trainers.trl_adapter import _llm_options
    from trl.generation import vllm_generation

    assert "from vllm import LLM" in inspect.getsource(vllm_generation)
    built = []
    monkeypatch.setattr(vllm_generation, "LLM", lambda **arguments: built.append(arguments), raising=False)
    original = vllm_generation.LLM
    with _llm_options({"dtype": "float32", "seed": 1}):
        vllm_generation.LLM(model="a", seed=0)
    assert built == [{"model": "a", "seed": 1, "dtype": "float32"}] and vllm_generation.LLM is original


def test_error_if_vllm_is_not_installed(model) -> None:
    with pytest.raises(ImportError, match="vLLM"):
        ConceptVLLMGeneration(
            model, Accelerator(cpu=True), None, vlm_name_or_path="an/vlm", suppressed_tokens=[]
        )
