"""What Transformers' common tests require of a model, for each family of VLMs."""

from __future__ import annotations

import copy
import inspect
import json
import logging

import pytest
import torch
from families import all_families
from safetensors import safe_open
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, Reference
from conceptseg_hf.outputs import ConceptSegOutput


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> str:
    """A checkpoint of the shared model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def eager(checkpoint) -> ConceptSegForSegmentation:
    return AutoModel.from_pretrained(checkpoint, attn_implementation="eager")


@pytest.fixture()
def samples(processor, picture) -> list:
    """Samples without, with one and with two references."""
    references = [Reference(picture(10), box=(2, 2, 20, 20)), Reference(picture(11), box=(5, 5, 40, 30))]
    prompts = ["circle", "the odd one out in the image", "large red square left"]
    return [
        processor.prepare(picture(index), prompt, references[:index]) for index, prompt in enumerate(prompts)
    ]


@pytest.fixture()
def make_batch(processor):
    """Return a function that creates the arguments of `forward` without labels."""

    def make(samples: list) -> dict:
        sam_input_ids, sam_attention_mask = processor.sam_text(["star"] * len(samples))
        return dict(
            processor.collate(samples, completions=["<answer> star </answer>"] * len(samples)),
            sam_pixel_values=torch.stack([sample.sam_pixel_values for sample in samples]),
            sam_input_ids=sam_input_ids,
            sam_attention_mask=sam_attention_mask,
        )

    return make


@pytest.fixture()
def batch(make_batch, samples) -> dict:
    return make_batch(samples)


@pytest.fixture()
def transformers_log(caplog):
    """Record the warnings of Transformers, whose loggers do not propagate."""
    transformers_logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield caplog
    transformers_logging.disable_propagation()


# -- interface --


@all_families
def test_forward_takes_the_inputs_of_the_family(model, processor):
    names = list(inspect.signature(ConceptSegForSegmentation.forward).parameters)[1:]
    assert names[0] == model.main_input_name == "input_ids"
    assert set(processor.family.input_names) <= set(names)


@all_families
def test_generation_is_configured_by_the_vlm(make_model, tmp_path):
    model = make_model()
    assert model.can_generate() and model.generation_config is model.vlm.generation_config
    model.generation_config.update(eos_token_id=[2, 9], max_length=77)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert (saved["eos_token_id"], saved["max_length"]) == ([2, 9], 77)
    loaded = ConceptSegForSegmentation.from_pretrained(tmp_path).generation_config
    assert (loaded.eos_token_id, loaded.max_length) == ([2, 9], 77)


@all_families
def test_config_survives_json_and_copies(model, tmp_path):
    config = model.config
    config.save_pretrained(tmp_path)
    for other in (ConceptSegConfig.from_pretrained(tmp_path), copy.deepcopy(config)):
        assert other.to_dict() == config.to_dict()
        assert type(other.vlm_config) is type(config.vlm_config)
    assert config.get_text_config() is config.vlm_config.get_text_config()
    assert config.hidden_size == config.vlm_config.get_text_config().hidden_size


# -- initialization --


@all_families
def test_all_weights_are_initialized_from_the_config(model):
    """With a tiny standard deviation, all values of a weight are the same."""
    config = ConceptSegConfig.from_dict(_with_tiny_deviation(model.config.to_dict()))
    weights = dict(ConceptSegForSegmentation(config).named_parameters())
    assert {name for name, weight in weights.items() if weight.max() - weight.min() > 1e-6} == set()


def _with_tiny_deviation(config: dict) -> dict:
    changed = {}
    for name, value in config.items():
        if isinstance(value, dict):
            value = _with_tiny_deviation(value)
        changed[name] = 1e-10 if name in ("initializer_range", "initializer_factor") else value
    return changed


@all_families
def test_initialization_depends_on_the_seed_only(vlm_family, make_model):
    config = make_model().config
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(ConceptSegForSegmentation(copy.deepcopy(config)).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["ctm.queries"], models[2]["ctm.queries"])


@all_families
def test_model_on_the_meta_device_has_no_data(model):
    with torch.device("meta"):
        empty = ConceptSegForSegmentation(copy.deepcopy(model.config))
    assert all(parameter.is_meta for parameter in empty.parameters())
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


# -- saving and loading --


@all_families
@pytest.mark.parametrize("tied", [True, False])
def test_loading_is_silent_and_shared_weights_are_saved_once(make_model, tmp_path, transformers_log, tied):
    model = make_model(tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("vlm.lm_head.weight" in file.keys()) != tied  # noqa: SIM118 (not a dictionary)
    loaded, info = ConceptSegForSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not transformers_log.records
    heads, embeddings = (loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)
    assert (heads.data_ptr() == embeddings.data_ptr()) == tied


@all_families
def test_unknown_weights_of_a_checkpoint_are_reported(make_model, tmp_path):
    model = make_model()
    extra = {**model.state_dict(), "vlm.value_head.weight": torch.zeros(2)}
    model.save_pretrained(tmp_path, state_dict=extra)
    loaded, info = ConceptSegForSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"vlm.value_head.weight"} and not info["missing_keys"]
    assert torch.equal(loaded.ctm.queries, model.ctm.queries)


@all_families
@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "auto"}, torch.float32),
        ({}, torch.float32),
    ],
    ids=str,
)
def test_dtype_applies_to_the_vlm(checkpoint, batch, arguments, dtype):
    model = ConceptSegForSegmentation.from_pretrained(checkpoint, **arguments)
    assert {parameter.dtype for parameter in model.vlm.parameters()} == {dtype}
    assert {parameter.dtype for part in (model.ctm, model.sam) for parameter in part.parameters()} == {
        torch.float32
    }
    assert model.config.dtype == model.vlm.dtype == dtype
    with torch.no_grad():
        assert model(**batch).mask_logits.isfinite().all()


@all_families
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"vlm": "cpu", "ctm": "cpu", "sam": "cpu"}], ids=str)
def test_device_map(checkpoint, model, device_map):
    loaded = AutoModel.from_pretrained(checkpoint, device_map=device_map)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


@all_families
def test_weights_offloaded_to_disk_give_the_same_masks(checkpoint, model, batch, tmp_path):
    device_map = {"vlm": "disk", "ctm": "cpu", "sam": "cpu"}
    loaded = AutoModel.from_pretrained(checkpoint, device_map=device_map, offload_folder=tmp_path)
    assert all(parameter.is_meta for parameter in loaded.vlm.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).mask_logits, model(**batch).mask_logits)


# -- embeddings --


@all_families
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", [10, -10])
@torch.no_grad()
def test_token_embeddings_can_be_resized(make_model, batch, tmp_path, tied, change):
    model = make_model(tied)
    expected = model(**batch, output_logits=True)
    old = model.get_input_embeddings().weight.clone()
    size = len(old) + change
    kept = min(size, len(old))
    resized = model.resize_token_embeddings(size)
    assert resized is model.get_input_embeddings() and resized.num_embeddings == size
    assert torch.equal(resized.weight[:kept], old[:kept])
    assert model.get_output_embeddings().weight.shape == resized.weight.shape
    assert model.config.get_text_config().vocab_size == model.vlm.config.get_text_config().vocab_size == size
    shared = model.get_output_embeddings().weight.data_ptr() == resized.weight.data_ptr()
    assert shared == tied
    output = model(**batch, output_logits=True)
    torch.testing.assert_close(output.logits[..., :kept], expected.logits[..., :kept])
    torch.testing.assert_close(output.mask_logits, expected.mask_logits)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch, output_logits=True).logits, output.logits)


@all_families
def test_embeddings_can_be_replaced(make_model):
    model = make_model(tied=False)
    width = model.config.hidden_size
    embeddings, head = torch.nn.Embedding(400, width), torch.nn.Linear(width, 400, bias=False)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is model.vlm.get_input_embeddings() is embeddings
    assert model.get_output_embeddings() is model.vlm.lm_head is head


# -- forward --


@all_families
@torch.no_grad()
def test_forward_is_deterministic(make_model, batch):
    model = make_model()
    first, second = model(**batch), model(**batch)
    trained = model.train()(**batch)  # no dropout in the configurations
    for other in (second, trained):
        assert torch.equal(first.mask_logits, other.mask_logits)
        assert torch.equal(first.concept_embeds, other.concept_embeds)


@all_families
@torch.no_grad()
def test_rows_of_a_batch_equal_single_rows(make_model, make_batch, samples):
    model = make_model().double()
    model.sam.double()
    together = _double(make_batch(samples))
    output = model(**together, output_logits=True, output_hidden_states=True)
    for row, sample in enumerate(samples):
        alone = _double(make_batch([sample]))
        single = model(**alone, output_logits=True, output_hidden_states=True)
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(output.logits[row, -length:], single.logits[0], rtol=0, atol=1e-8)
        for state, expected in zip(output.hidden_states, single.hidden_states, strict=True):
            torch.testing.assert_close(state[row, -length:], expected[0], rtol=0, atol=1e-8)
        torch.testing.assert_close(output.mask_logits[row], single.mask_logits[0], rtol=0, atol=1e-8)


def _double(batch: dict) -> dict:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


@all_families
@torch.no_grad()
def test_images_that_do_not_match_the_image_tokens_are_refused(model, processor, samples, make_batch):
    family = processor.family
    batch = make_batch(samples)
    fewer = family.select_images(batch, range(len(family.pixels_per_image(batch)) - 1))
    with pytest.raises((ValueError, IndexError, RuntimeError, StopIteration)):
        model(**{**batch, **fewer})


# -- attention --


@all_families
@pytest.mark.parametrize(
    "attention", ["eager", "sdpa", {"vlm_config": "eager", "sam_config": "sdpa"}], ids=str
)
def test_attention_implementation_is_applied_to_vlm_and_sam(checkpoint, processor, attention):
    model = AutoModel.from_pretrained(checkpoint, attn_implementation=attention)
    vlm, sam = attention.values() if isinstance(attention, dict) else (attention, attention)
    tower = processor.family.vision_tower(model.vlm)
    text, vision = model.vlm.model.language_model.config, tower.config
    assert (text._attn_implementation, vision._attn_implementation) == (vlm, vlm)
    assert model.sam.config._attn_implementation == model.sam.detr_encoder.config._attn_implementation == sam


@all_families
@torch.no_grad()
def test_eager_equals_sdpa(eager, model, batch):
    expected = model(**batch, output_logits=True)
    actual = eager(**batch, output_logits=True)
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(actual.logits[kept], expected.logits[kept], rtol=0, atol=1e-3)
    torch.testing.assert_close(actual.mask_logits, expected.mask_logits, rtol=0, atol=1e-3)


# -- outputs --


def flat(value) -> list:
    """Collect the tensors of a nested output."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)] if isinstance(value, (tuple, list)) else []


@all_families
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_hidden_states": True, "output_attentions": True, "output_logits": True},
        {"use_cache": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_tuple_output_equals_model_output(eager, batch, options):
    labels = torch.rand(len(batch["input_ids"]), 50, 60) > 0.5
    output = eager(**batch, mask_labels=labels, return_dict=True, **options)
    as_tuple = eager(**batch, mask_labels=labels, return_dict=False, **options)
    assert isinstance(output, ConceptSegOutput) and isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(output.keys()) and torch.equal(as_tuple[0], output.loss)
    expected = flat(output.to_tuple())
    assert len(flat(as_tuple)) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(flat(as_tuple), expected))


@all_families
@torch.no_grad()
def test_return_dict_can_be_set_in_the_config(eager, batch, monkeypatch):
    monkeypatch.setattr(eager.config, "return_dict", False)
    assert isinstance(eager(**batch), tuple)
    assert isinstance(eager(**batch, return_dict=True), ConceptSegOutput)
    # `return_dict=False` in the configs of VLM and SAM 3 must not affect the model.
    for config in (eager.vlm.config, eager.sam.config):
        monkeypatch.setattr(config, "return_dict", False)
    assert isinstance(eager(**batch, return_dict=True), ConceptSegOutput)


@all_families
@pytest.mark.parametrize("by", ["argument", "config"])
@torch.no_grad()
def test_hidden_states_and_attentions_of_the_vlm(eager, batch, monkeypatch, by):
    plain = eager(**batch)
    assert plain.hidden_states is plain.attentions is plain.past_key_values is None
    names = ("output_hidden_states", "output_attentions")
    if by == "config":
        for name in names:
            monkeypatch.setattr(eager.config, name, True)
    output = eager(**batch, **(dict.fromkeys(names, True) if by == "argument" else {}))
    text_config, (rows, length) = eager.config.get_text_config(), batch["input_ids"].shape
    layers, heads = text_config.num_hidden_layers, text_config.num_attention_heads
    assert [state.shape for state in output.hidden_states] == [(rows, length, 128)] * (layers + 1)
    assert [weights.shape for weights in output.attentions] == [(rows, heads, length, length)] * layers
    assert torch.equal(output.mask_logits, plain.mask_logits)
    # The last hidden states are the inputs of the language-model head.
    logits = eager.get_output_embeddings()(output.hidden_states[-1])
    assert torch.equal(logits, eager(**batch, output_logits=True).logits)
    tokens = batch["attention_mask"].bool()
    torch.testing.assert_close(output.attentions[0].sum(-1)[:, 0][tokens], torch.ones(int(tokens.sum())))
    if by == "config":
        output = eager(**batch, **dict.fromkeys(names, False))
        assert output.hidden_states is output.attentions is None


@all_families
def test_gradients_reach_hidden_states_and_attentions(eager, batch):
    output = eager(**batch, output_hidden_states=True, output_attentions=True)
    for tensor in (output.hidden_states[0], output.attentions[0]):
        tensor.retain_grad()
    output[0].flatten()[0].backward()
    assert output.hidden_states[0].grad.any() and output.attentions[0].grad.any()
    eager.zero_grad()


@all_families
@torch.no_grad()
def test_cache_has_the_length_of_the_batch(model, batch):
    output = model(**batch, use_cache=True)
    assert output.past_key_values.get_seq_length() == batch["input_ids"].shape[1]
    assert model(**batch, use_cache=False).past_key_values is None
    assert getattr(model.vlm.model, "rope_deltas", None) is None


# -- training --


@all_families
def test_gradient_checkpointing_can_be_switched(make_model, processor):
    model = make_model()
    checkpointed = [model.vlm.model.language_model, processor.family.vision_tower(model.vlm)]
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    for part in checkpointed:
        assert any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@all_families
def test_input_gradients_can_be_required_without_trained_embeddings(make_model, batch):
    """As PEFT does for gradient checkpointing with a frozen VLM."""
    model = make_model().train()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    states = []
    handle = model.vlm.model.language_model.layers[-1].register_forward_hook(
        lambda module, inputs, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    model(**batch)
    handle.remove()
    assert states[0].requires_grad
    model.disable_input_require_grads()
