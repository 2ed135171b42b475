from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import all_families
from transformers import CompileConfig, GenerationConfig

from conceptseg_hf import Reference
from conceptseg_hf.generation import generate_with_states, prepare_generation_config
from conceptseg_hf.teacher_forcing import completion_states
from conceptseg_hf.vlm_families import get_family

VISION_TOKENS = [3, 4, 5, 6]


@pytest.fixture(scope="module")
def vlm(model):
    return model.vlm


@pytest.fixture()
def samples(processor, picture):
    """Samples with prompts of different lengths, with one or two images."""
    references = [Reference(picture(10), box=(2, 2, 20, 20)), Reference(picture(11), box=(5, 5, 40, 30))]
    return [
        processor.prepare(picture(0), "red circle"),
        processor.prepare(picture(1), "the odd one out in the large red square", references),
        processor.prepare(picture(2), "find the same object", references[:1]),
    ]


def generate(vlm, batch, **settings):
    torch.manual_seed(3)
    at = settings.pop("hidden_states_at", "token")
    return generate_with_states(vlm, batch, {"max_new_tokens": 8, "do_sample": True, **settings}, at)


def teacher_forced(vlm, processor, samples, generated, hidden_states_at="token"):
    completions = [ids[mask].tolist() for ids, mask in zip(generated.token_ids, generated.mask, strict=True)]
    batch = processor.collate(samples, completions=completions)
    with torch.no_grad():
        states = get_family(vlm.config).last_hidden_states(vlm, get_family(vlm.config).model_inputs(batch))
    return completion_states(states, batch["completion_mask"], hidden_states_at)


@all_families
@pytest.mark.parametrize("hidden_states_at", ["token", "predict"])
def test_states_equal_a_teacher_forced_pass_for_rows_of_different_lengths(
    vlm, processor, samples, hidden_states_at
):
    batch = processor.collate(samples)
    free = generate(vlm, batch, eos_token_id=[], hidden_states_at=hidden_states_at)
    assert free.mask.all() and free.mask.shape == (3, 8)

    # Using tokens of two rows as end-of-sequence tokens makes these rows stop early, at different positions.
    ends = [int(free.token_ids[0, 2]), int(free.token_ids[1, 5])]
    generated = generate(vlm, batch, eos_token_id=ends, hidden_states_at=hidden_states_at)
    lengths = generated.mask.sum(1).tolist()
    assert len(set(lengths)) > 1 and lengths[0] <= 2 and lengths[1] <= 5
    for row, length in enumerate(lengths):
        assert generated.mask[row, :length].all()
        assert torch.equal(generated.token_ids[row, :length], free.token_ids[row, :length])
    assert not generated.hidden_states[~generated.mask].any()

    for result in (free, generated):
        states, mask = teacher_forced(vlm, processor, samples, result, hidden_states_at)
        assert torch.equal(mask, result.mask)
        assert (states - result.hidden_states)[mask].abs().max() < 1e-4
        assert states[mask].abs().max() > 0.1


@all_families
def test_batch_equals_single(vlm, processor, samples):
    settings = {"do_sample": False, "max_new_tokens": 6}
    together = generate(vlm, processor.collate(samples), **settings)
    for row, sample in enumerate(samples):
        alone = generate(vlm, processor.collate([sample]), **settings)
        mask = together.mask[row]
        assert torch.equal(together.token_ids[row][mask], alone.token_ids[0][alone.mask[0]])
        assert torch.allclose(
            together.hidden_states[row][mask], alone.hidden_states[0][alone.mask[0]], atol=1e-4
        )


def test_rows_that_end_with_their_first_token(vlm, processor, samples):
    generated = generate(
        vlm, processor.collate(samples), eos_token_id=list(range(vlm.config.get_text_config().vocab_size))
    )
    assert generated.mask.shape == (3, 1) and not generated.mask.any()
    assert generated.hidden_states.shape == (3, 1, 128) and not generated.hidden_states.any()


def test_vision_tokens_are_never_generated(vlm, processor, samples):
    def prefer_vision_tokens(module, args, output):
        output[..., VISION_TOKENS] += 1e4
        return output

    handle = vlm.lm_head.register_forward_hook(prefer_vision_tokens)
    try:
        batch = processor.collate(samples[:1])
        unguarded = vlm.generate(**batch, max_new_tokens=3, do_sample=False)[:, -3:]
        guarded = [
            generate(vlm, batch, max_new_tokens=3, do_sample=do_sample, suppress_tokens=[9, 10])
            for do_sample in (False, True)
        ]
    finally:
        handle.remove()
        vlm.model.rope_deltas = None
    assert torch.isin(unguarded, torch.tensor(VISION_TOKENS)).all()
    for result in guarded:
        assert not torch.isin(result.token_ids, torch.tensor([*VISION_TOKENS, 9, 10])).any()


def test_generation_runs_one_step_beyond_the_limit(vlm, processor, samples):
    steps = []
    handle = vlm.model.language_model.register_forward_hook(
        lambda module, args, output: steps.append(output[0].shape[1])
    )
    try:
        batch = processor.collate(samples)
        generate(vlm, batch, eos_token_id=[], max_new_tokens=5)
    finally:
        handle.remove()
    assert steps == [batch["input_ids"].shape[1], 1, 1, 1, 1, 1]


@all_families
def test_calls_are_independent_of_each_other(vlm, processor, samples):
    first = generate(vlm, processor.collate(samples[:1]))
    assert getattr(vlm.model, "rope_deltas", None) is None and not vlm.lm_head._forward_pre_hooks
    generate(vlm, processor.collate(samples[1:]))
    again = generate(vlm, processor.collate(samples[:1]))
    assert torch.equal(first.token_ids, again.token_ids) and torch.equal(
        first.hidden_states, again.hidden_states
    )


def test_greedy_by_default_and_config_is_not_modified(vlm, processor, samples, monkeypatch):
    monkeypatch.setattr(vlm.generation_config, "do_sample", True)
    batch = processor.collate(samples[:1])
    config = GenerationConfig(max_new_tokens=4)
    before = config.to_dict()
    a, b = (generate_with_states(vlm, batch, config) for _ in range(2))
    assert torch.equal(a.token_ids, b.token_ids)
    assert config.to_dict() == before
    total = GenerationConfig(max_length=batch["input_ids"].shape[1] + 4)
    assert torch.equal(generate_with_states(vlm, batch, total).token_ids, a.token_ids)


@all_families
@pytest.mark.parametrize("hidden_states_at", ["token", "predict"])
def test_chunked_prefill_gives_the_same_result(vlm, processor, samples, hidden_states_at):
    lengths = []
    handle = vlm.model.language_model.register_forward_hook(
        lambda module, args, output: lengths.append(output[0].shape[1])
    )
    batch = processor.collate(samples)
    whole, chunked = (
        generate(vlm, batch, prefill_chunk_size=size, hidden_states_at=hidden_states_at)
        for size in (None, 16)
    )
    handle.remove()
    assert lengths.count(16) > 2
    assert torch.equal(whole.token_ids, chunked.token_ids)
    assert torch.allclose(whole.hidden_states, chunked.hidden_states, atol=1e-4)


@pytest.fixture()
def compiled():
    """Compile a module and return the list of its graphs."""
    graphs, modules = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile(module):
        module.compile(backend=backend)
        modules.append(module)
        return graphs

    torch.compiler.reset()
    yield compile
    for module in modules:
        module._compiled_call_impl = None
    torch.compiler.reset()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("used_before", [False, True])
def test_compiled_language_model(vlm, processor, samples, compiled, used_before, cache):
    batch = processor.collate(samples)
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": []}
    expected = generate(vlm, batch, **settings)
    settings["cache_implementation"] = cache
    graphs = compiled(vlm.model.language_model)
    if used_before:
        vlm.generate(**batch, max_new_tokens=12)
        vlm.model.rope_deltas = None
    for _ in range(2):
        generated = generate(vlm, batch, **settings)
        assert torch.equal(generated.token_ids, expected.token_ids)
        assert torch.allclose(generated.hidden_states, expected.hidden_states, atol=1e-4)
    assert len(graphs) < 6  # not one per token


def test_static_cache_does_not_compile_the_vlm_as_a_whole(vlm, processor, samples):
    """On a GPU, `generate` compiles the model if the cache is static, unless this is disabled."""
    batch = processor.collate(samples)
    config, _ = prepare_generation_config(vlm, {"cache_implementation": "static"}, batch, None)
    assert config.disable_compile
    kept, _ = prepare_generation_config(vlm, {"compile_config": CompileConfig()}, batch, None)
    assert not kept.disable_compile


def test_rejects_a_vlm_compiled_as_a_whole(vlm, processor, samples, compiled):
    batch = processor.collate(samples[:1])
    settings = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": []}
    expected = generate(vlm, batch, **settings)
    compiled(vlm)
    with torch.inference_mode():  # as in `generate_with_states`, which therefore uses the same graph
        vlm.generate(**batch, max_new_tokens=4)
    vlm.model.rope_deltas = None
    with pytest.raises(RuntimeError, match="compiled as a whole"):
        generate(vlm, batch, **settings)
    torch.compiler.reset()
    assert torch.allclose(generate(vlm, batch, **settings).hidden_states, expected.hidden_states, atol=1e-4)


@all_families
def test_several_completions_per_prompt(vlm, processor, samples):
    generated = generate(vlm, processor.collate(samples[:2]), num_return_sequences=2, eos_token_id=[])
    repeated = [samples[0]] * 2 + [samples[1]] * 2
    states, mask = teacher_forced(vlm, processor, repeated, generated)
    assert generated.mask.shape[0] == 4
    assert (states - generated.hidden_states)[mask].abs().max() < 1e-4


def test_generation_from_several_threads(vlm, processor, samples):
    batches = [processor.collate([sample]) for sample in samples] * 3
    settings = {"max_new_tokens": 8}
    alone = [generate_with_states(vlm, batch, settings) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda batch: generate_with_states(vlm, batch, settings), batches))
    for first, second in zip(alone, together, strict=True):
        assert torch.equal(first.token_ids, second.token_ids)
        assert torch.equal(first.hidden_states, second.hidden_states)


def test_rejects_invalid_settings(vlm, processor, samples):
    batch = processor.collate(samples[:1])
    with pytest.raises(ValueError, match="unknown field 'max_new_tokns'"):
        generate_with_states(vlm, batch, {"max_new_tokns": 3})
    with pytest.raises(ValueError, match="beam search"):
        generate_with_states(vlm, batch, {"num_beams": 2})
    with pytest.raises(ValueError, match="max_length is 3"):
        generate_with_states(vlm, batch, {"max_length": 3})
    for limit in (0, -3, "5", 2.5):
        with pytest.raises(ValueError, match=f"max_new_tokens is {limit!r}; use an integer"):
            generate_with_states(vlm, batch, {"max_new_tokens": limit})
    with pytest.raises(ValueError, match=r"guidance_scale is 1[.]5"):
        generate_with_states(vlm, batch, {"guidance_scale": 1.5})
    with pytest.raises(ValueError, match=r"stop_strings is .* eos_token_id"):
        generate_with_states(vlm, batch, {"stop_strings": ["</answer>"]})
    incomplete = {name: value for name, value in batch.items() if name != "mm_token_type_ids"}
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        generate_with_states(vlm, incomplete)


@pytest.mark.parametrize("hidden_states_at", ["token", "predict"])
def test_state_of_the_end_of_turn_token_is_recorded_if_requested(vlm, processor, samples, hidden_states_at):
    """The released code uses all states after the prompt, including that of the end-of-turn token."""
    batch = processor.collate(samples)
    settings = {"max_new_tokens": 8, "do_sample": False}
    free = generate_with_states(vlm, batch, {**settings, "eos_token_id": []}, hidden_states_at)
    ends = [int(free.token_ids[0, 2]), int(free.token_ids[1, 5])]
    without = generate_with_states(vlm, batch, {**settings, "eos_token_id": ends}, hidden_states_at)
    with_end = generate_with_states(vlm, batch, {**settings, "eos_token_id": ends}, hidden_states_at, True)
    assert torch.equal(without.state_mask, without.mask)

    lengths = without.mask.sum(1).tolist()
    ended = [length < 8 for length in lengths]
    assert any(ended) and with_end.mask.sum(1).tolist() == lengths
    assert with_end.state_mask.sum(1).tolist() == [
        length + end for length, end in zip(lengths, ended, strict=True)
    ]
    for row, length in enumerate(lengths):
        assert torch.equal(with_end.token_ids[row, :length], without.token_ids[row, :length])
        assert torch.allclose(
            with_end.hidden_states[row, :length], without.hidden_states[row, :length], atol=1e-4
        )
        if ended[row]:
            assert int(with_end.token_ids[row, length]) in ends

    completions = [
        ids[mask].tolist() for ids, mask in zip(with_end.token_ids, with_end.state_mask, strict=True)
    ]
    forced = processor.collate(samples, completions=completions)  # includes the end-of-turn tokens
    with torch.no_grad():
        states = get_family(vlm.config).last_hidden_states(vlm, get_family(vlm.config).model_inputs(forced))
    states, mask = completion_states(states, forced["completion_mask"], hidden_states_at)
    assert torch.equal(mask, with_end.state_mask)
    assert (states - with_end.hidden_states)[mask].abs().max() < 1e-4
    assert not with_end.hidden_states[~mask].any()


def test_end_of_turn_token_beyond_the_limit_has_no_state(vlm, processor, samples):
    batch = processor.collate(samples[:1])
    free = generate_with_states(vlm, batch, {"max_new_tokens": 4, "eos_token_id": []})
    end = int(free.token_ids[0, 3])
    if end in free.token_ids[0, :3].tolist():
        pytest.skip("the token occurs earlier")
    generated = generate_with_states(
        vlm, batch, {"max_new_tokens": 3, "eos_token_id": end}, end_of_turn_state=True
    )
    assert generated.mask.sum() == generated.state_mask.sum() == 3


def test_max_total_length_limits_prompt_and_completion(vlm, processor, samples):
    """The released code limits prompt and completion together to 2,816 tokens."""
    batch = processor.collate(samples)
    prompts = batch["attention_mask"].sum(1).tolist()
    assert len(set(prompts)) > 1
    total = max(prompts) + 4
    generated = generate_with_states(vlm, batch, {"eos_token_id": []}, max_total_length=total)
    assert generated.mask.sum(1).tolist() == [total - prompt for prompt in prompts]
    for row, sample in enumerate(samples):  # the limit of a row does not depend on the other rows
        alone = generate_with_states(
            vlm, processor.collate([sample]), {"eos_token_id": []}, max_total_length=total
        )
        assert torch.equal(alone.token_ids[0], generated.token_ids[row][generated.mask[row]])
    with_max_new_tokens = generate_with_states(
        vlm, batch, {"eos_token_id": [], "max_new_tokens": 2}, max_total_length=total
    )
    assert with_max_new_tokens.mask.sum(1).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match=f"max_total_length is {max(prompts)}, but a prompt has"):
        generate_with_states(vlm, batch, max_total_length=max(prompts))


@all_families
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("hidden_states_at", ["token", "predict"])
def test_given_starts_of_completions_have_the_states_of_a_teacher_forced_pass(
    make_model, processor, samples, hidden_states_at, chunk
):
    vlm = make_model().double().vlm
    texts = ["the red circle", "star", "find the large red square in the image"]
    starts = [processor.start_completion(sample, text) for sample, text in zip(samples, texts, strict=True)]
    counts = [count for _, count in starts]
    assert len(set(counts)) == 3
    torch.manual_seed(3)
    settings = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": [], "prefill_chunk_size": chunk}
    batch = processor.collate([sample for sample, _ in starts])
    generated = generate_with_states(vlm, batch, settings, hidden_states_at, num_given=counts)
    assert generated.mask.sum(1).tolist() == [count + 6 for count in counts]
    for row, (text, sample) in enumerate(zip(texts, samples, strict=True)):
        tag = "check" if sample.frame.proxy is not None else "bbox"
        start = f"<think>{text}</think><rule>{text}</rule><{tag}>["
        assert (
            processor.tokenizer.decode(generated.token_ids[row][generated.mask[row]])
            .replace(" ", "")
            .startswith(start.replace(" ", ""))
        )
    expected, expected_mask = teacher_forced(vlm, processor, samples, generated, hidden_states_at)
    for row in range(3):
        found = generated.hidden_states[row][generated.mask[row]]
        assert torch.allclose(found, expected[row][expected_mask[row]], atol=1e-5)
    assert not generated.hidden_states[~generated.state_mask].any()


def test_given_starts_with_several_completions_per_prompt(make_model, processor, samples):
    vlm = make_model().double().vlm
    started, count = processor.start_completion(samples[0], "the star")
    settings = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2, "eos_token_id": []}
    generated = generate_with_states(vlm, processor.collate([started]), settings, num_given=[count])
    assert generated.mask.shape == (2, count + 4) and generated.mask.all()
    assert torch.equal(generated.token_ids[0, :count], generated.token_ids[1, :count])
    expected, mask = teacher_forced(vlm, processor, [samples[0]] * 2, generated)
    assert torch.allclose(generated.hidden_states[generated.mask], expected[mask], atol=1e-5)


@all_families
def test_the_vlm_can_be_trained_after_generation(make_model, processor, samples):
    vlm = make_model().vlm  # a new model, so that generation is the first to fill its caches
    starts = [processor.start_completion(sample, "the star") for sample in samples]
    batch = processor.collate([sample for sample, _ in starts])
    generated = generate_with_states(
        vlm, batch, {"max_new_tokens": 4, "eos_token_id": []}, num_given=[count for _, count in starts]
    )
    tensors = (generated.token_ids, generated.mask, generated.hidden_states, generated.state_mask)
    assert not any(tensor.is_inference() for tensor in tensors)
    assert not any(tensor.is_inference() for tensor in (*vlm.parameters(), *vlm.buffers()))
    family = get_family(vlm.config)
    family.last_hidden_states(vlm, family.model_inputs(batch)).square().mean().backward()
    gradients = [parameter.grad for parameter in vlm.base_model.parameters() if parameter.grad is not None]
    assert len(gradients) > 20 and all(gradient.isfinite().all() for gradient in gradients)
    generated.hidden_states.requires_grad_().sum().backward()
