"""Tests of prefix sharing between prompts with the same references."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import all_families, num_encoded_images

from conceptseg_hf import Reference, ShortcutRouter
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.shared_references import ReferenceStore
from conceptseg_hf.vlm_families import get_family

SETTINGS = {"max_new_tokens": 8, "eos_token_id": []}


@pytest.fixture()
def samples(processor, picture):
    """Prompts of different lengths: two sets of references, twice and once, and none."""
    first = [Reference(picture(10), box=(2, 2, 20, 20)), Reference(picture(11), box=(5, 5, 40, 30))]
    second = [Reference(picture(12), box=(3, 2, 20, 20))]
    items = [
        (picture(0), "red circle", first),
        (picture(1), "circle", []),
        (picture(2), "find the same object in the large image", first),
        (picture(3), "star", second),
    ]
    return [processor.prepare(*item) for item in items]


class Images:
    """Count the images that the VLM encodes."""

    def __init__(self, vlm):
        self.counts: list[int] = []
        tower = get_family(vlm.config).vision_tower(vlm)
        self.handle = tower.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.counts.append(num_encoded_images(args, kwargs))


@pytest.fixture()
def images(model):
    images = Images(model.vlm)
    yield images
    images.handle.remove()


def assert_same_completions(one, other):
    for row in range(len(one.mask)):
        assert torch.equal(one.token_ids[row][one.mask[row]], other.token_ids[row][other.mask[row]])
        states = [each.hidden_states[row][each.state_mask[row]] for each in (one, other)]
        assert torch.allclose(*states, atol=1e-4)


@all_families
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("hidden_states_at", ["token", "predict"])
def test_completions_equal_those_of_separate_prompts(
    model, processor, samples, images, hidden_states_at, do_sample
):
    batch = processor.collate(samples)
    settings = {**SETTINGS, "do_sample": do_sample}
    results = []
    for store in (None, ReferenceStore()):
        torch.manual_seed(3)
        results.append(generate_with_states(model.vlm, batch, settings, hidden_states_at, references=store))
    assert len(set(map(tuple, results[0].token_ids.tolist()))) == 4
    assert_same_completions(*results)
    assert images.counts == [7, 2, 4], "two mosaics once, then four targets"


@all_families
@pytest.mark.parametrize("hidden_states_at", ["token", "predict"])
def test_given_starts_equal_those_of_separate_prompts(model, processor, samples, hidden_states_at):
    texts = ["the red circle", "star", "find the large red square", "star"]
    starts = [processor.start_completion(sample, text) for sample, text in zip(samples, texts, strict=True)]
    batch, counts = processor.collate([sample for sample, _ in starts]), [count for _, count in starts]
    one, other = (
        generate_with_states(model.vlm, batch, SETTINGS, hidden_states_at, num_given=counts, references=store)
        for store in (None, ReferenceStore())
    )
    assert_same_completions(one, other)
    assert one.mask.sum(1).tolist() == [count + 8 for count in counts]


def test_unshared_references_are_not_read_separately(model, processor, samples, images):
    different = [samples[0], samples[1], samples[3]]
    generate_with_states(model.vlm, processor.collate(different), SETTINGS, references=ReferenceStore())
    assert images.counts == [5], "in one pass"


@all_families
def test_a_store_keeps_references_across_batches(model, processor, samples, images):
    store = ReferenceStore(across_batches=True)
    for rows, expected in (([3], [1, 1]), ([0, 1], [1, 2]), ([2, 3], [2]), ([0], [1])):
        batch = processor.collate([samples[row] for row in rows])
        images.counts.clear()
        shared = generate_with_states(model.vlm, batch, SETTINGS, references=store)
        assert images.counts == expected
        assert_same_completions(shared, generate_with_states(model.vlm, batch, SETTINGS))
    assert len(store) == 2
    text, layers = model.vlm.config.get_text_config(), len(model.vlm.model.language_model.layers)
    width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    mosaic = int((samples[0].input_ids == processor.image_token_id).sum()) // 2
    first = (samples[0].input_ids == processor.image_token_id).int().argmax()
    assert store.num_bytes == 2 * 2 * layers * width * 4 * (int(first) + mosaic)  # in float32


def test_least_recently_used_references_are_dropped(model, processor, samples, images):
    store = ReferenceStore(across_batches=True)
    batches = {row: processor.collate([samples[row]]) for row in (0, 3)}
    generate_with_states(model.vlm, batches[0], SETTINGS, references=store)
    store.max_bytes = store.num_bytes
    for row, expected in ((0, [1]), (3, [1, 1]), (3, [1]), (0, [1, 1])):
        images.counts.clear()
        generate_with_states(model.vlm, batches[row], SETTINGS, references=store)
        assert images.counts == expected and len(store) == 1
    none = ReferenceStore(0, across_batches=True)
    generate_with_states(model.vlm, batches[0], SETTINGS, references=none)
    assert len(none) == 0 and none.num_bytes == 0
    with pytest.raises(ValueError, match="max_bytes is -1"):
        ReferenceStore(-1)


def training_step(vlm):
    optimizer = torch.optim.SGD(vlm.parameters(), lr=1.0)
    for parameter in vlm.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    optimizer.zero_grad()


def write_data(vlm):
    """As engines do that keep the weights in buffers of their own."""
    for parameter in vlm.parameters():
        parameter.data.add_(0.01)


def load_weights(vlm):
    vlm.load_state_dict({name: value + 0.01 for name, value in vlm.state_dict().items()})


def assign_weights(vlm):
    state = {name: value + 0.01 for name, value in vlm.state_dict().items()}
    vlm.load_state_dict(state, assign=True)


def add_adapter(vlm):
    peft = pytest.importorskip("peft")
    vlm.add_adapter(peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False), "one")


def change_dtype(vlm):
    vlm.to(torch.bfloat16)


CHANGES = [training_step, write_data, load_weights, assign_weights, add_adapter, change_dtype]


@pytest.mark.parametrize("change", CHANGES)
def test_references_are_read_again_when_the_weights_change(make_model, processor, samples, change):
    vlm = make_model().vlm
    batch, store = processor.collate(samples), ReferenceStore(across_batches=True)
    images = Images(vlm)
    before = generate_with_states(vlm, batch, SETTINGS, references=store)
    vlm.train()
    vlm.eval()
    generate_with_states(vlm, batch, SETTINGS, references=store)
    assert images.counts == [2, 4, 4], "the mode does not change the weights"
    change(vlm)
    images.counts.clear()
    after = generate_with_states(vlm, batch, SETTINGS, references=store)
    assert images.counts == [2, 4] and len(store) == 2
    plain = generate_with_states(vlm, batch, SETTINGS)
    if change is change_dtype:
        assert after.hidden_states.dtype == torch.bfloat16
        return
    assert_same_completions(after, plain)
    width = min(before.hidden_states.shape[1], after.hidden_states.shape[1])
    assert not torch.allclose(before.hidden_states[:, :width], after.hidden_states[:, :width], atol=1e-3)


def test_references_are_read_again_when_adapters_are_loaded_disabled_or_merged(
    make_model, processor, samples, tmp_path
):
    vlm = make_model().vlm
    batch, store = processor.collate(samples), ReferenceStore(across_batches=True)
    other = copy.deepcopy(vlm)
    add_adapter(other)
    other.save_pretrained(tmp_path)
    generate_with_states(vlm, batch, SETTINGS, references=store)
    vlm.load_adapter(str(tmp_path), "one")
    changes = [
        lambda: None,
        vlm.disable_adapters,
        vlm.enable_adapters,
        lambda: [part.merge() for part in vlm.modules() if hasattr(part, "merged_adapters")],
        lambda: [part.set_scale("one", 3.0) for part in vlm.modules() if hasattr(part, "merged_adapters")],
    ]
    states = []
    for change in changes:
        change()
        shared = generate_with_states(vlm, batch, SETTINGS, references=store)
        plain = generate_with_states(vlm, batch, SETTINGS)
        assert_same_completions(shared, plain)
        states.append(plain.hidden_states[0, 0])
    assert not torch.allclose(states[0], states[1], atol=1e-3)


def test_segment_shares_references_within_a_batch_and_a_context(model, processor, picture, images):
    references = [Reference(picture(10), box=(2, 2, 20, 20)), Reference(picture(11))]
    pictures = [picture(0), picture(1, (70, 30)), picture(2)]
    prompts = ["circle", "the odd one out in the image", "star"]
    inputs = processor(pictures, prompts, [references, [], references])
    options = {"generation_config": {"max_new_tokens": 6}, "processor": processor, "return_heatmap": True}
    router = ShortcutRouter("full_reasoning")
    single = [
        model.segment([sample], router, **options)[0]
        for sample in (
            processor.prepare(*item) for item in zip(pictures, prompts, [references, [], references])
        )
    ]
    assert images.counts == [2, 1, 2]
    images.counts.clear()
    together = model.segment(inputs, router, **options)
    assert images.counts == [1, 3]
    images.counts.clear()
    with model.shared_references() as store:
        with model.shared_references() as inner:
            pass
        kept = model.segment(inputs, router, batch_size=1, **options)
        again = model.segment(inputs, router, **options)
        assert len(store) == 1 and len(inner) == 0
    assert images.counts == [1, 1, 1, 1, 3]
    assert model._references is None
    for results in (together, kept, again):
        for result, expected in zip(results, single, strict=True):
            assert result.completion == expected.completion
            assert np.allclose(result.heatmap, expected.heatmap, atol=1e-4)


@all_families
@pytest.mark.parametrize(
    "settings",
    [{"num_return_sequences": 2, "do_sample": True}, {"prefill_chunk_size": 16}, {"use_cache": False}],
)
def test_settings_that_cannot_share_give_the_same_result(model, processor, samples, settings):
    batch, results = processor.collate(samples), []
    for store in (None, ReferenceStore()):
        torch.manual_seed(0)
        results.append(generate_with_states(model.vlm, batch, {**SETTINGS, **settings}, references=store))
    assert_same_completions(*results)
