"""Completions of vLLM against those of `generate`, with the embedded checkpoint; vLLM runs for real, on the CPU."""

from __future__ import annotations

import copy
import gc
import os
import random
import threading
import weakref

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM needs an environment of its own: run `make test-vllm`")

import psutil
import torch
from transformers import pipeline

from conceptseg_hf.data import load_benchmarks
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.vlm_families import get_family
from conceptseg_hf.vlm_families.qwen2_5_vl import Qwen2_5VlFamily

STATE_NOISE = 2e-3  # float32 hidden states of two implementations


@pytest.fixture(scope="module")
def samples():
    """Thirteen test samples of nine groups; four of them have no references."""
    benchmark = load_benchmarks("concept-shapes", split="test")
    return [benchmark[index] for index in range(0, len(benchmark), 97)]


@pytest.fixture
def prepared(loaded, samples):
    _, processor = loaded
    return [processor.prepare(sample.image, sample.prompt, sample.references) for sample in samples]


@pytest.fixture
def restored(loaded):
    """The model, whose weights are restored afterwards."""
    model, _ = loaded
    weights = {name: value.clone() for name, value in model.vlm.state_dict().items()}
    yield model
    model.vlm.load_state_dict(weights)


def expected_of(model, processor, prepared, settings=None):
    config = model.config
    return generate_with_states(
        model.vlm,
        processor.collate(prepared),
        settings,
        config.hidden_states_at,
        config.end_of_turn_state,
        config.max_total_length,
    )


def assert_equal(actual, expected) -> None:
    assert actual.token_ids.shape == expected.token_ids.shape
    assert torch.equal(actual.mask, expected.mask) and torch.equal(actual.state_mask, expected.state_mask)
    assert torch.equal(actual.token_ids[actual.state_mask], expected.token_ids[expected.state_mask])
    assert (actual.hidden_states - expected.hidden_states).abs().max() < STATE_NOISE
    assert (actual.hidden_states[~actual.state_mask] == 0).all()


def rows(generated) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(generated.token_ids, generated.mask)]


# -- the same completions and states --


@pytest.mark.parametrize("batch_size", [13, 4, 1])
def test_tokens_and_states_equal_generate(loaded, engine, prepared, samples, batch_size) -> None:
    assert {len(sample.references) for sample in samples} >= {0, 1, 4}
    for start in range(0, len(prepared), batch_size):
        batch = prepared[start : start + batch_size]
        assert_equal(engine.generate(*loaded, batch), expected_of(*loaded, batch))


@pytest.mark.parametrize(
    ("hidden_states_at", "end_of_turn"), [("predict", False), ("token", True), ("predict", True)]
)
def test_states_follow_the_config(
    loaded, engine, prepared, monkeypatch, hidden_states_at, end_of_turn
) -> None:
    model, _ = loaded
    monkeypatch.setattr(model.config, "hidden_states_at", hidden_states_at)
    monkeypatch.setattr(model.config, "end_of_turn_state", end_of_turn)
    assert_equal(engine.generate(*loaded, prepared), expected_of(*loaded, prepared))


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 5}, {"max_new_tokens": 1}, {"repetition_penalty": 1.3}, {"eos_token_id": [9, 2]}],
    ids=str,
)
def test_settings_have_the_same_effect(loaded, engine, prepared, settings) -> None:
    expected = expected_of(*loaded, prepared, settings)
    assert_equal(engine.generate(*loaded, prepared, settings), expected)
    assert rows(expected) != rows(expected_of(*loaded, prepared))


def test_each_row_ends_at_its_own_length_limit(loaded, engine, prepared, monkeypatch) -> None:
    model, _ = loaded
    monkeypatch.setattr(model.config, "max_total_length", 190)
    expected = expected_of(*loaded, prepared)
    assert len({len(row) for row in rows(expected)}) > 1
    assert rows(engine.generate(*loaded, prepared)) == rows(expected)


def test_suppressed_tokens_are_never_written(restored, loaded, engine, prepared) -> None:
    """Neither the user's tokens nor image tokens, even if the image token is always the most probable one."""
    first = rows(expected_of(*loaded, prepared))[0][0]
    expected = expected_of(*loaded, prepared, {"suppress_tokens": [first]})
    assert_equal(engine.generate(*loaded, prepared, {"suppress_tokens": [first]}), expected)

    image_token = restored.config.vlm_config.image_token_id
    with torch.no_grad():
        embeddings = restored.vlm.get_output_embeddings().weight
        embeddings[image_token] = 3 * embeddings[first]
    batch = processor_batch(loaded, prepared)
    logits = restored.vlm(**batch).logits[:, -1]
    assert (logits.argmax(dim=1) == image_token).any()
    actual = engine.generate(*loaded, prepared)
    assert rows(actual) == rows(expected_of(*loaded, prepared))
    assert not set(get_family(restored.vlm.config).vision_token_ids(restored.vlm.config)) & {
        t for row in rows(actual) for t in row
    }


def processor_batch(loaded, prepared):
    return get_family(loaded[0].vlm.config).model_inputs(loaded[1].collate(prepared))


def test_sampling_follows_the_seed_of_torch(loaded, engine, prepared) -> None:
    settings = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 20}

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return rows(engine.generate(*loaded, prepared, settings))

    first = sample(0)
    assert sample(0) == first and sample(1) != first


# -- weights --


def test_changed_weights_reach_the_engine(restored, loaded, engine, prepared) -> None:
    before = rows(engine.generate(*loaded, prepared))
    with torch.no_grad():  # as an optimizer does
        for parameter in restored.vlm.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
    changed = rows(expected_of(*loaded, prepared))
    assert rows(engine.generate(*loaded, prepared)) == changed and changed != before
    for parameter in restored.vlm.parameters():  # not counted by the version counters
        parameter.data.mul_(0.9)
    assert rows(engine.generate(*loaded, prepared)) == rows(expected_of(*loaded, prepared))


def test_change_of_the_head_alone_reaches_the_engine(restored, loaded, engine, prepared) -> None:
    """The head is tied to the embeddings, and vLLM packs it separately."""
    before = rows(engine.generate(*loaded, prepared))
    with torch.no_grad():
        weight = restored.vlm.get_output_embeddings().weight
        weight *= 1 + 0.3 * torch.randn(len(weight), 1, generator=torch.Generator().manual_seed(0))
    expected = rows(expected_of(*loaded, prepared))
    assert rows(engine.generate(*loaded, prepared)) == expected and expected != before


def test_unchanged_weights_are_not_sent_again(loaded, engine, prepared, monkeypatch) -> None:
    engine.generate(*loaded, prepared[:1])
    monkeypatch.setattr("conceptseg_hf.vllm_engine.reload_weights", None)  # a call would fail
    engine.generate(*loaded, prepared[:1])


def test_copy_of_a_model_shares_the_engine(loaded, engine, prepared) -> None:
    model, processor = loaded
    model.set_vlm_engine(engine)
    try:
        duplicate = copy.deepcopy(model)
        assert duplicate.vlm_engine is engine
        with torch.no_grad():
            for parameter in duplicate.vlm.parameters():
                parameter.mul_(1.05)
        for each in (duplicate, model):
            actual = engine.generate(each, processor, prepared)
            assert rows(actual) == rows(expected_of(each, processor, prepared))
    finally:
        model.set_vlm_engine("transformers")
    assert model.vlm_engine is None


# -- what is shared --


def test_mosaic_of_a_batch_is_encoded_once_and_its_prompt_is_cached(
    loaded, engine, samples, monkeypatch
) -> None:
    _, processor = loaded
    sample = next(sample for sample in samples if len(sample.references) == 4)
    targets = [each.image for each in samples[:3]]
    batch = [processor.prepare(target, sample.prompt, sample.references) for target in targets]
    counts = []
    encode = Qwen2_5VlFamily.encode_images
    monkeypatch.setattr(
        Qwen2_5VlFamily,
        "encode_images",
        lambda family, vlm, images: (
            counts.append(len(images["image_grid_thw"])) or encode(family, vlm, images)
        ),
    )
    expected = rows(expected_of(*loaded, batch))
    assert rows(engine.generate(*loaded, batch[:1])) == expected[:1]
    assert rows(engine.generate(*loaded, batch)) == expected
    assert counts == [2, 4]  # mosaic and target; mosaic and three targets
    cached = []
    generate = engine._llm.generate

    def record(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        cached.extend(output.num_cached_tokens for output in outputs)
        return outputs

    monkeypatch.setattr(engine._llm, "generate", record)
    assert rows(engine.generate(*loaded, batch)) == expected
    assert all(count >= 64 for count in cached)  # the mosaic alone has 64 tokens


# -- side effects --


def test_building_an_engine_leaves_the_process_as_it_was(engine) -> None:
    """And the engine listens on loopback only, in this process."""
    from conceptseg_hf.vllm_runtime import engine_environment

    assert (
        torch.set_num_threads.__module__ == "torch._C" or torch.set_num_threads.__name__ == "set_num_threads"
    )
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    threads = torch.set_num_threads
    with engine_environment():
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        os.environ["LD_PRELOAD"] = "libgomp.so"
        os.environ.pop("PATH")
        torch.set_num_threads = None
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")} == environment
    assert torch.set_num_threads is threads
    assert not {"LD_PRELOAD", "LOCAL_WORLD_SIZE"} & {name for name in os.environ if name not in environment}
    process = psutil.Process()
    listening = [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    assert set(listening) <= {"127.0.0.1", "::1"}
    assert not process.children()


def test_threads_share_an_engine(loaded, engine, prepared) -> None:
    expected = rows(expected_of(*loaded, prepared))
    results: dict[int, list[list[int]]] = {}

    def run(index: int) -> None:
        results[index] = rows(engine.generate(*loaded, prepared[index : index + 3]))

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 3, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: expected[index : index + 3] for index in (0, 3, 6)}


def test_released_engine_frees_its_memory_and_leaves_others_intact(loaded, engine, prepared) -> None:
    """vLLM would destroy the process group, without which the other engine fails."""
    expected = rows(expected_of(*loaded, prepared[:2]))
    model, _ = loaded
    model.set_vlm_engine("vllm", max_model_len=256, max_num_seqs=2)
    second = model.vlm_engine
    assert second is not engine and second.max_model_len == 256
    assert rows(second.generate(*loaded, prepared[:2])) == expected
    client = weakref.ref(second._llm.llm_engine.engine_core)
    del second
    model.set_vlm_engine("transformers")
    gc.collect()
    assert client() is None
    assert torch.distributed.is_initialized()
    assert rows(engine.generate(*loaded, prepared[:2])) == expected


# -- errors --


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size is 2, which the vLLM engine does not support"),
        ({"num_return_sequences": 3}, "num_return_sequences is 3, which the vLLM engine does not support"),
        ({"max_new_tokens": 5000}, None),  # ends before
    ],
    ids=str,
)
def test_unsupported_settings(loaded, engine, prepared, settings, message) -> None:
    if message is None:
        engine.generate(*loaded, prepared[:1], settings)
        return
    with pytest.raises(ValueError, match=message):
        engine.generate(*loaded, prepared[:1], settings)


def test_prompt_or_completion_that_does_not_fit(loaded, engine, prepared, monkeypatch) -> None:
    length = len(prepared[0].input_ids)
    monkeypatch.setattr(engine, "max_model_len", length)
    with pytest.raises(
        ValueError, match=rf"a prompt has {length} tokens, but the vLLM engine was built for {length}"
    ):
        engine.generate(*loaded, prepared[:1])


def test_other_architectures_and_adapters_are_refused(loaded, engine) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    vlm = copy.deepcopy(loaded[0].vlm)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), vlm)
    with pytest.raises(ValueError, match="the VLM has adapters"):
        engine.synchronize(vlm)
    smaller = copy.deepcopy(loaded[0].vlm)
    smaller.model.language_model.layers = smaller.model.language_model.layers[:1]
    with pytest.raises(ValueError, match="differs from the one"):
        engine.synchronize(smaller)


# -- segment, pipeline --


def test_segment_gives_the_same_results(loaded, engine, prepared, samples) -> None:
    model, processor = loaded
    inputs = lambda: [processor.prepare(s.image, s.prompt, s.references, lazy=True) for s in samples]  # noqa: E731
    options = {"processor": processor, "router": "full_reasoning", "return_logits": True, "batch_size": 5}
    expected = model.segment(inputs(), **options)
    model.set_vlm_engine(engine)
    try:
        actual = model.segment(inputs(), **options)
    finally:
        model.set_vlm_engine("transformers")
    assert [result.completion for result in actual] == [result.completion for result in expected]
    for one, other in zip(actual, expected):
        assert np.abs(np.asarray(one.mask_logits) - np.asarray(other.mask_logits)).max() < 0.02
        assert one.score == pytest.approx(other.score, abs=1e-3)


def test_pipeline_selects_the_engine_per_call(loaded, engine, samples, monkeypatch) -> None:
    model, processor = loaded
    pipe = pipeline("concept-segmentation", model=model, processor=processor, device="cpu")
    items = [{"image": s.image, "prompt": s.prompt, "references": s.references} for s in samples[:4]]
    model.set_vlm_engine(engine)
    calls = []
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *args: calls.append(len(args[2])) or generate(*args))
    try:
        options = {"router": "full_reasoning", "batch_size": 2}
        expected = pipe(items, vlm_engine="transformers", **options)
        assert calls == []
        actual = pipe(items, vlm_engine="vllm", **options)
        assert calls == [2, 2]
        assert [each["answer"] for each in actual] == [each["answer"] for each in expected]
        assert model.vlm_engine is engine
        with pytest.raises(ValueError, match="vlm_engine is 'other'; use one of 'transformers', 'vllm'"):
            pipe(items, vlm_engine="other")
    finally:
        model.set_vlm_engine("transformers")
