from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from families import all_families
from PIL import Image
from transformers import CLIPConfig, Qwen2VLImageProcessor

from conceptseg_hf import ConceptSegProcessor, Reference, parse_completion
from conceptseg_hf.completion import format_completion
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.vlm_families import FAMILIES, get_family
from conceptseg_hf.vlm_families.internvl import InternVlFamily


def test_vision_token_ids_of_the_nano_preset(model):
    config = model.config.vlm_config
    assert {3, 4, 5, 6} <= set(get_family(config).vision_token_ids(config))


def test_unknown_family_is_refused_with_the_list_and_the_guide():
    with pytest.raises(ValueError, match=r"'clip'.*'qwen2_5_vl'.*docs/families\.md"):
        get_family(CLIPConfig())


def test_error_lists_missing_model_inputs():
    with pytest.raises(ValueError, match="mm_token_type_ids, pixel_values, image_grid_thw"):
        FAMILIES["qwen2_5_vl"].model_inputs({"input_ids": 1, "attention_mask": 1, "mm_token_type_ids": None})


def test_last_hidden_states_are_post_norm_and_reset_rope_deltas(model, processor, picture):
    family = get_family(model.config.vlm_config)
    batch = processor.collate([processor.prepare(picture(0), "red circle")])
    with torch.no_grad():
        states = family.last_hidden_states(model.vlm, family.model_inputs(batch))
        assert model.vlm.model.rope_deltas is None
        reference = model.vlm(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(states, reference)


# -- all families --


@pytest.fixture()
def samples(processor, picture):
    references = [Reference(picture(10), box=(2, 2, 20, 20)), Reference(picture(11), box=(5, 5, 40, 30))]
    return [processor.prepare(picture(0), "red circle"), processor.prepare(picture(1), "star", references)]


@all_families
def test_images_of_rows_and_their_tokens(model, processor, samples):
    family, config = processor.family, model.vlm.config
    batch = family.model_inputs(processor.collate(samples))
    rows = family.images_of_rows(config, batch)
    assert [row.images for row in rows] == [slice(0, 1), slice(1, 3)]
    assert rows[-1].pixels.stop == len(batch["pixel_values"]) == sum(family.pixels_per_image(batch))
    counts = (batch["input_ids"] == config.image_token_id).sum(dim=1).tolist()
    assert sum(family.tokens_per_image(config, batch)) == sum(counts) and counts[1] == 2 * counts[0] > 0
    (only,) = family.images_of_rows(config, family.select_rows(config, batch, [1]))
    assert only.images == slice(0, 2)
    assert torch.equal(family.select_images(batch, [2])["pixel_values"], samples[1].pixel_values.chunk(2)[1])


@all_families
def test_encoded_images_replace_pixels(make_model, processor, samples):
    model = make_model().double()
    family = processor.family
    inputs = family.model_inputs(processor.collate(samples))
    with torch.no_grad():
        expected = family.last_hidden_states(model.vlm, inputs)
        tokens = family.encode_images(model.vlm, family.select_images(inputs, [0, 1, 2]))
        del inputs["pixel_values"]
        states = family.full_pass(model.vlm, inputs, **family.encoded_images(model.vlm, tokens))
        first, second = (
            family.full_pass(model.vlm, inputs, **family.encoded_images(model.vlm, changed))
            for changed in ([tokens[1], *tokens[1:]], [_without_deepstack(model, each) for each in tokens])
        )
    assert [len(each) for each in tokens] == family.tokens_per_image(
        model.vlm.config, processor.collate(samples)
    )
    torch.testing.assert_close(states.last_hidden_state, expected, rtol=0, atol=1e-9)
    assert (first.last_hidden_state - expected)[0, -1].abs().max() > 1e-2
    has_deepstack = model.vlm.config.model_type == "qwen3_vl"
    assert ((second.last_hidden_state - expected).abs().max() > 1e-2) == has_deepstack


def _without_deepstack(model, tokens):
    width = model.config.hidden_size
    return torch.cat([tokens[:, :width], 0 * tokens[:, width:]], dim=1)


@all_families
def test_vlm_processor_returns_the_inputs_of_the_processor(processor, samples, tmp_path):
    plain = processor.vlm_processor()
    for sample in samples:
        encoded = plain(images=list(sample.vlm_images), text=[sample.vlm_text], return_tensors="pt")
        assert encoded["input_ids"][0].tolist() == sample.input_ids.tolist()
        torch.testing.assert_close(encoded["pixel_values"], sample.pixel_values)


@all_families
def test_lora_targets_are_the_attention_projections_of_the_language_model(model, processor):
    pattern = processor.family.lora_target_modules
    found = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    assert len(found) == 4 * model.vlm.config.get_text_config().num_hidden_layers
    assert all("language_model" in name for name in found)


@all_families
def test_layers_that_devices_must_not_split_exist(model):
    classes = {type(module).__name__ for module in model.vlm.modules()}
    decoder_layer = type(model.vlm.model.language_model.layers[0]).__name__
    assert decoder_layer in set(model._no_split_modules) & classes


@all_families
def test_vision_tokens_are_suppressed(model, processor, samples):
    settings = {"max_new_tokens": 4, "eos_token_id": []}
    handle = model.vlm.lm_head.register_forward_hook(_favor(model.vlm.config.image_token_id))
    try:
        generated = generate_with_states(model.vlm, processor.collate(samples), settings)
    finally:
        handle.remove()
    assert not (generated.token_ids == model.vlm.config.image_token_id).any()


def _favor(token):
    def hook(module, inputs, logits):
        logits[..., token] += 1000
        return logits

    return hook


@pytest.mark.parametrize(
    ("vlm_family", "canvas_size", "coordinate_scale"),
    [("qwen2_5_vl", 600, 1.0), ("qwen3_vl", 608, 1000.0), ("internvl", 448, 1000.0)],
    indirect=["vlm_family"],
    scope="session",
)
def test_defaults_of_the_processor(processor, vlm_family, canvas_size, coordinate_scale, tmp_path):
    family = vlm_family
    parts = (
        processor.image_processor,
        processor.tokenizer,
        processor.sam_image_processor,
        processor.sam_tokenizer,
    )
    made = ConceptSegProcessor(*parts, vlm_family=family)
    assert (made.canvas_size, made.coordinate_scale) == (canvas_size, coordinate_scale)
    made.save_pretrained(tmp_path)
    loaded = ConceptSegProcessor.from_pretrained(tmp_path)
    assert (loaded.vlm_family, loaded.canvas_size, loaded.coordinate_scale) == (
        family,
        canvas_size,
        coordinate_scale,
    )
    assert ("vlm_family" in made.to_dict()) == (family != "qwen2_5_vl")


def test_canvas_of_qwen3_is_not_resized(processor):
    """608 pixels are 19 image tokens of 16 * 2 pixels."""
    image_processor = Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2)
    family = get_family("qwen3_vl")
    image = Image.new("RGB", (family.canvas_size, family.canvas_size))
    inputs, counts = family.read_images(image_processor, [image], family.canvas_size)
    assert inputs["image_grid_thw"].tolist() == [[1, 38, 38]] and counts == [19**2]


def test_processor_of_another_family_is_refused(model, processor, picture):
    other = processor.with_settings(vlm_family="qwen3_vl")
    with pytest.raises(ValueError, match="'qwen3_vl', but the model's is 'qwen2_5_vl'"):
        model.segment([processor.prepare(picture(0), "star")], processor=other)


def test_families_that_do_not_run_with_vllm_are_refused():
    class Other(InternVlFamily):
        model_type = "other"
        supports_vllm = False

    with pytest.raises(ValueError, match="'other' do not run with vLLM"):
        Other().check_vllm()
    for family in FAMILIES.values():
        family.check_vllm()


def test_vllm_gets_one_token_for_each_image():
    config = SimpleNamespace(image_token_id=7)
    assert get_family("qwen2_5_vl").vllm_prompt(config, [7, 7, 1, 7, 7, 7, 2, 2]) == [7, 1, 7, 2, 2]
    # Without the tokens for the borders of images (8 and 9), also of adjacent images.
    prompt = [1, 8, 7, 7, 9, 8, 7, 7, 9, 2, 8, 7, 9]
    assert get_family("internvl").vllm_prompt(config, prompt) == [1, 7, 7, 2, 7]
    assert get_family("internvl").vllm_prompt(config, [1, 8, 9, 2]) == [1, 8, 9, 2]


def test_vllm_gets_the_deepstack_features_of_qwen3():
    data = get_family("qwen3_vl").vllm_image_data(
        [torch.ones(4, 6), torch.zeros(2, 6)], {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 2]])}
    )
    assert data["image_embeds"].shape == (6, 6) and data["image_grid_thw"].shape == (2, 3)


# -- thinking models --

# The end of the chat template of Qwen3-VL's thinking models.
_THINKING = r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"


def test_open_thought_of_a_thinking_model_is_removed(processor, picture):
    """Prompts end with the role, and completions start with the only `<think>`, as in training."""
    plain = processor.family.chat_template(processor.image_token)
    end = r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    thinking = copy.copy(processor)
    thinking.chat_template = plain.replace(end, _THINKING)
    assert thinking.chat_template != plain
    sample, expected = (each.prepare(picture(0), "red circle") for each in (thinking, processor))
    assert sample.vlm_text == expected.vlm_text and sample.vlm_text.endswith("assistant\n")
    encoded = thinking.vlm_processor()(
        images=list(sample.vlm_images),
        text=[thinking.chat_text(thinking.instruction("red circle", sample.frame), 1)],
    )
    assert list(encoded["input_ids"][0]) == expected.input_ids.tolist()
    chat = thinking.vlm_processor().apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "star"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat.endswith("assistant\n")


def test_other_ways_to_open_a_thought_are_refused(processor, picture):
    thinking = copy.copy(processor)
    thinking.chat_template = processor.family.chat_template(processor.image_token) + "{{ '<think>' }}"
    with pytest.raises(ValueError, match="opens <think> in the generation prompt"):
        thinking.prepare(picture(0), "red circle")


@pytest.mark.parametrize("own", ["the model's own thought</think>\n\n", "<think>own</think>\n\n"])
def test_thought_before_the_template_does_not_hide_the_answer(own):
    text = own + format_completion("ours", "find red", None, (10, 20, 60, 70), "red circle", 100)
    completion = parse_completion(text, 100)
    assert completion.answer == "red circle" and completion.bbox == (10, 20, 60, 70)
    assert completion.rule == "find red" and not completion.is_valid
