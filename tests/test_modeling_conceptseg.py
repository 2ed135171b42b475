from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import all_families
from PIL import Image
from transformers import AutoModel

from conceptseg_hf import (
    ConceptSegConfig,
    ConceptSegForSegmentation,
    ConceptSegProcessor,
    Reference,
    ShortcutRouter,
    inference,
    nano_checkpoint,
)
from conceptseg_hf.completion import format_completion
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.generation import GeneratedCompletions
from conceptseg_hf.outputs import SegmentationOutputs
from conceptseg_hf.processing_conceptseg import PreparedSample

SAMPLED = {"max_new_tokens": 6, "do_sample": True}
GREEDY = {"max_new_tokens": 6}
NEVER = ShortcutRouter("full_reasoning")


# -- helpers --


@pytest.fixture(scope="module")
def fresh(make_model) -> ConceptSegForSegmentation:
    """A second model, for tests that compute gradients."""
    return make_model(seed=1)


@pytest.fixture()
def references(picture):
    return [
        Reference(picture(10), box=(2, 2, 20, 20)),
        Reference(picture(11), box=(5, 5, 40, 30)),
        Reference(picture(12)),
    ]


@pytest.fixture()
def inputs(processor, picture, references):
    """Samples with different prompts, image sizes and numbers of references."""
    images = [picture(0), picture(1, (70, 30)), picture(2), picture(3, (33, 90))]
    prompts = ["circle", "the odd one out in the image", "large red square left", "find the same object"]
    references_of = [[], references[:2], references, references[:1]]
    return [processor.prepare(*item, lazy=True) for item in zip(images, prompts, references_of)]


@pytest.fixture()
def training_batch(processor, inputs):
    """Arguments of `forward` without labels, for three samples."""
    samples = list(inputs)[:3]
    text = format_completion("a red circle is large", "find red", None, (10, 20, 60, 70), "red circle", 100)
    batch = processor.collate(samples, completions=[text, "<answer> star </answer>", text])
    sam_input_ids, sam_attention_mask = processor.sam_text(["red circle", "star", "red circle"])
    pixels = torch.stack([sample.sam_pixel_values for sample in samples])
    return dict(
        batch, sam_pixel_values=pixels, sam_input_ids=sam_input_ids, sam_attention_mask=sam_attention_mask
    )


@pytest.fixture()
def labels():
    return torch.rand(3, 50, 60) > 0.5


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for first, second in (
        (a.state_dict(), b.state_dict()),
        (dict(a.named_buffers()), dict(b.named_buffers())),
    ):
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def assert_same_result(a, b, atol: float = 1e-4) -> None:
    """Check that two results are equal up to numerical error."""
    a, b = a.to_dict(), b.to_dict()
    heatmaps, masks = (a.pop("heatmap"), b.pop("heatmap")), (a.pop("mask"), b.pop("mask"))
    assert np.allclose(*heatmaps, atol=atol)
    ambiguous = np.abs(heatmaps[0] - 0.5) < atol
    assert ((np.asarray(masks[0]) == np.asarray(masks[1])) | ambiguous).all()
    assert {
        key: a[key] if not isinstance(a[key], float) else pytest.approx(a[key], abs=atol) for key in a
    } == b


class Calls:
    """Record the batch size of each call of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.rows: list[int] = []
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs) -> None:
        self.rows.append(len(args[0] if args else kwargs["input_ids"]))


@pytest.fixture()
def calls(model):
    """Batch sizes of the calls of SAM 3's image encoder and of the VLM."""
    encoder, language_model = Calls(model.sam.vision_encoder), Calls(model.vlm.model)
    yield encoder.rows, language_model.rows
    encoder.handle.remove()
    language_model.handle.remove()


def script(monkeypatch, model, processor, texts):
    """Replace the completions of the VLM."""
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = max(map(len, ids))

    def generate(vlm, batch, *settings):
        assert len(batch["input_ids"]) == len(texts)
        token_ids = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in ids])
        return GeneratedCompletions(token_ids, mask, torch.randn(len(ids), length, model.config.hidden_size))

    monkeypatch.setattr(inference, "generate_with_states", generate)


# -- structure --


@pytest.mark.parametrize(
    ("preset", "width", "heads", "vlm", "tied"),
    [
        ("3b", 2048, 16, 3_754_622_976, True),
        ("7b", 3584, 16, 8_292_166_656, False),
        ("qwen3-2b", 2048, 16, 2_127_532_032, True),
        ("qwen3-4b", 2560, 16, 4_437_815_808, True),
        ("qwen3-8b", 4096, 16, 8_767_123_696, False),
    ],
)
def test_presets_have_the_published_sizes(preset, width, heads, vlm, tied):
    with torch.device("meta"):
        model = ConceptSegForSegmentation(ConceptSegConfig.from_preset(preset))

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(model.vlm) == vlm
    assert count(model.sam) == 840_376_374
    assert bool(model.all_tied_weights_keys) == tied
    block = {
        "norm_queries": width,
        "norm_states": width,
        "norm_mlp": width,
        "attn.q": (width, width),
        "attn.kv": (2 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }
    expected = {"queries": (8, width), "position_embedding": (1, 8, width)}
    linear = {f"blocks.{i}.{name}": shape for i in range(4) for name, shape in block.items()}
    linear |= {"proj_to_sam.0": (width, width), "proj_to_sam.2": (256, width)}
    for name, shape in linear.items():
        shape = shape if isinstance(shape, tuple) else (shape,)
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {name: tuple(tensor.shape) for name, tensor in model.ctm.state_dict().items()} == expected
    assert model.config.ctm_config.num_attention_heads == heads


def test_new_ctm_is_initialized_with_its_initializer_range():
    torch.manual_seed(0)
    ctm = ConceptSegForSegmentation(ConceptSegConfig.from_preset("nano")).ctm
    for weight in (
        ctm.queries,
        ctm.position_embedding,
        ctm.blocks[0].attn.kv.weight,
        ctm.proj_to_sam[2].weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not ctm.blocks[1].mlp.fc1.bias.any() and (ctm.blocks[1].norm_states.weight == 1).all()


def test_rejects_an_unsupported_vlm():
    with pytest.raises(ValueError, match="qwen2_5_vl"):
        ConceptSegForSegmentation(ConceptSegConfig.from_preset("nano", vlm_config=_small_qwen2_vl()))


def _small_qwen2_vl() -> dict:
    text = {
        "model_type": "qwen2_vl_text",
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return {
        "model_type": "qwen2_vl",
        "text_config": {**text, "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 64},
    }


def test_language_model_methods_are_delegated_to_the_vlm(model):
    assert model.base_model is model.vlm.model
    assert model.get_input_embeddings() is model.vlm.get_input_embeddings()
    assert model.get_output_embeddings() is model.vlm.lm_head
    assert model.generation_config is model.vlm.generation_config and model.can_generate()
    assert model.config.get_text_config() is model.vlm.config.text_config
    assert model.config.hidden_size == 128
    assert {
        "ConceptTranslationModule",
        "Sam3ViTLayer",
        "Qwen2_5_VLDecoderLayer",
        "Qwen2_5_VLVisionBlock",
    } <= set(model._no_split_modules)


def test_generate_equals_generate_of_the_vlm(model, processor, inputs):
    batch = processor.collate(list(inputs)[:2])
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**batch, **settings), model.vlm.generate(**batch, **settings))
    model.vlm.model.rope_deltas = None


def test_train_keeps_sam_frozen_and_in_eval_mode(make_model):
    model = make_model()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert model.train() is model
    assert model.vlm.training and model.ctm.training and model.ctm.blocks[0].training
    assert not any(module.training for module in model.sam.modules())
    assert not any(parameter.requires_grad for parameter in model.sam.parameters())
    assert all(parameter.requires_grad for part in (model.vlm, model.ctm) for parameter in part.parameters())
    model.eval()
    assert not model.ctm.training


def test_detach_sam_removes_it_from_the_module_tree(make_model, tmp_path, training_batch):
    model = make_model()
    with torch.no_grad():
        expected = model(**training_batch).mask_logits
    sam = model.detach_sam()
    assert model.detach_sam() is sam is model.sam
    model.train()
    assert not sam.training
    assert not any(name.startswith("sam.") for name in (*model.state_dict(), *dict(model.named_parameters())))
    with torch.no_grad():
        assert torch.equal(model(**training_batch).mask_logits, expected)  # SAM 3 is still used
    sam.save_pretrained(tmp_path / "sam")
    model.config.sam_name_or_path = str(tmp_path / "sam")
    model.save_pretrained(tmp_path / "without")
    model.sam = sam
    assert_same_weights(AutoModel.from_pretrained(tmp_path / "without"), model)


def test_sam_is_not_affected_by_autocast(model, training_batch):
    pixels = training_batch["sam_pixel_values"]
    text = (training_batch["sam_input_ids"], training_batch["sam_attention_mask"])
    concepts = torch.randn(len(pixels), 8, 64)
    with torch.no_grad():
        expected, _ = model.decode_masks(model.encode_image(pixels), *text, concepts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, _ = model.decode_masks(model.encode_image(pixels), *text, concepts)
    assert torch.equal(logits, expected)


# -- forward --


@all_families
def test_forward_shapes_with_and_without_labels(model, training_batch, labels):
    with torch.no_grad():
        plain = model(**training_batch, output_logits=True)
        labeled = model(**training_batch, mask_labels=labels)
    assert plain.mask_logits.shape == (3, 1, 32, 32) and plain.presence_logits.shape == (3, 1)
    assert plain.concept_embeds.shape == (3, 8, 64)
    assert plain.logits.shape == (*training_batch["input_ids"].shape, 384)
    assert plain.loss is None and labeled.logits is None
    assert torch.equal(labeled.mask_logits, plain.mask_logits)
    assert torch.allclose(labeled.loss, labeled.dice_loss + labeled.focal_loss)


@all_families
def test_logits_equal_those_of_the_vlm(model, processor, training_batch):
    family = processor.family
    positions = family.prompt_positions(training_batch["attention_mask"])
    with torch.no_grad():
        logits = model(**training_batch, output_logits=True).logits
        reference = model.vlm(**family.model_inputs(training_batch), **positions).logits
    assert torch.equal(logits, reference)


def test_forward_accepts_encoded_features_and_omitted_text(model, training_batch):
    features = model.encode_image(training_batch.pop("sam_pixel_values"))
    with torch.no_grad():
        full = model(**training_batch, sam_features=features)
        without_image = model(**training_batch)
        del training_batch["sam_input_ids"], training_batch["sam_attention_mask"]
        without_text = model(**training_batch, sam_features=features)
    assert without_image.mask_logits is None and torch.equal(
        without_image.concept_embeds, full.concept_embeds
    )
    assert not torch.allclose(full.mask_logits, without_text.mask_logits, atol=1e-3)


@all_families
def test_padding_does_not_change_the_output(model, processor, inputs, training_batch):
    text = "<answer> star </answer>"
    single = processor.collate([inputs[1]], completions=[text])
    sam_input_ids, sam_attention_mask = processor.sam_text(["star"])
    with torch.no_grad():
        together = model(**training_batch)
        alone = model(
            **single,
            sam_pixel_values=inputs[1].sam_pixel_values[None],
            sam_input_ids=sam_input_ids,
            sam_attention_mask=sam_attention_mask,
        )
    assert torch.allclose(together.concept_embeds[1], alone.concept_embeds[0], atol=1e-4)
    assert torch.allclose(together.mask_logits[1], alone.mask_logits[0], atol=1e-3)


def test_output_of_empty_completions_is_finite_and_independent_of_padding(model, training_batch):
    training_batch["completion_mask"][1] = False
    states = torch.randn(1, 3, 128)
    with torch.no_grad():
        batched = model(**training_batch)
        alone = model.encode_concepts(states, torch.zeros(1, 3))
        training_batch["completion_mask"][:] = False
        none = model(**training_batch)
    assert torch.allclose(batched.concept_embeds[1], alone[0], atol=1e-5)
    assert none.mask_logits.isfinite().all()


@all_families
def test_all_parameters_except_sam_have_gradients(fresh, training_batch, labels):
    fresh.train().zero_grad()
    fresh(**training_batch, mask_labels=labels).loss.backward()
    for name, parameter in fresh.named_parameters():
        if name.startswith("sam."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.any() and parameter.grad.isfinite().all(), (
                name
            )


def test_detached_hidden_states_stop_the_gradient_at_the_ctm(fresh, training_batch, labels):
    fresh.train().zero_grad()
    fresh(**training_batch, mask_labels=labels, detach_hidden_states=True).loss.backward()
    assert all(parameter.grad is not None for parameter in fresh.ctm.parameters())
    assert all(parameter.grad is None for part in (fresh.vlm, fresh.sam) for parameter in part.parameters())


@all_families
def test_gradient_checkpointing_gives_the_same_gradients(fresh, training_batch, labels):
    def gradients():
        fresh.train().zero_grad()
        fresh(**training_batch, mask_labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in fresh.named_parameters() if p.grad is not None}

    plain = gradients()
    fresh.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        assert fresh.is_gradient_checkpointing
        checkpointed = gradients()
    finally:
        fresh.gradient_checkpointing_disable()
    assert plain.keys() == checkpointed.keys()
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6, rtol=1e-4) for name in plain)


def test_an_optimizer_step_updates_vlm_and_ctm_but_not_sam(make_model, training_batch, labels):
    model = make_model(seed=2)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**training_batch, mask_labels=labels).loss.backward()
    optimizer.step()
    changed = {
        name.split(".")[0]
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {"vlm", "ctm"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sam_features": object()}, "pass only one of them"),
        ({"sam_pixel_values": None, "mask_labels": torch.zeros(3, 4, 4)}, "require an image"),
        ({"sam_attention_mask": None}, "only one of sam_input_ids and sam_attention_mask"),
    ],
)
def test_forward_rejects_incompatible_arguments(model, training_batch, change, match):
    with pytest.raises(ValueError, match=match):
        model(**{**training_batch, **change})


# -- segment --


@all_families
@pytest.mark.parametrize("rule", [None, "the red star"])
@pytest.mark.parametrize("hidden_states_at", ["token", "predict"])
def test_segment_equals_the_teacher_forced_forward(
    model, processor, inputs, monkeypatch, hidden_states_at, rule
):
    monkeypatch.setattr(model.config, "hidden_states_at", hidden_states_at)
    generated = []
    generate = inference.generate_with_states
    monkeypatch.setattr(
        inference,
        "generate_with_states",
        lambda *args: generated.append(generate(*args)) or generated[0],
    )
    torch.manual_seed(5)
    results = model.segment(inputs, NEVER, SAMPLED, return_heatmap=True, rule=rule)

    completions = [
        ids[mask].tolist() for ids, mask in zip(generated[0].token_ids, generated[0].mask, strict=True)
    ]
    batch = processor.collate(list(inputs), completions=completions)
    sam_input_ids, sam_attention_mask = processor.sam_text([result.label for result in results])
    with torch.no_grad():
        output = model(
            **batch,
            sam_pixel_values=torch.stack([sample.sam_pixel_values for sample in inputs]),
            sam_input_ids=sam_input_ids,
            sam_attention_mask=sam_attention_mask,
        )
    for sample, result, logits, presence in zip(
        inputs, results, output.mask_logits, output.presence_logits, strict=True
    ):
        mask, probability = processor.post_process_mask(logits[0], sample.frame)
        assert result.route == ("reasoning" if rule is None else "rule")
        assert rule is None or result.rule == result.think == rule
        assert result.mask.size == sample.frame.image_size == mask.size
        assert np.allclose(result.heatmap, probability, atol=1e-4)
        assert result.decode_presence == pytest.approx(presence.sigmoid().item(), abs=1e-4)


@all_families
@pytest.mark.parametrize("router", ["adaptive", "sam_only", "full_reasoning"])
def test_batch_equals_single(model, inputs, router):
    together = model.segment(inputs, router, GREEDY, return_heatmap=True)
    chunked = model.segment(inputs, router, GREEDY, return_heatmap=True, batch_size=3)
    assert len({result.score for result in together}) == len(
        together
    )  # the test is meaningful only if the results differ
    for i, result in enumerate(together):
        assert_same_result(result, model.segment(inputs[i : i + 1], router, GREEDY, return_heatmap=True)[0])
        assert_same_result(result, chunked[i])


def test_samples_of_a_batch_take_different_routes(model, inputs, calls):
    encoded, read = calls
    results = model.segment(inputs, "adaptive", GREEDY)
    # The threshold of "circle" is 0.1. The second prompt is too long for the shortcut. The third and fourth have a
    # threshold of 0.8, which random weights do not reach.
    assert [result.route for result in results] == ["shortcut", "reasoning", "reasoning", "reasoning"]
    assert [result.threshold for result in results] == pytest.approx([0.1, 1.0, 0.8, 0.8])
    assert [result.presence is None for result in results] == [False, True, False, False]
    assert (
        results[0].presence == results[0].decode_presence
        and results[0].completion is None
        and results[0].label == "circle"
    )
    assert results[2].presence != results[2].decode_presence and isinstance(results[2].completion, str)
    assert all(
        0 <= result.score <= 1 and result.heatmap is None and result.error is None for result in results
    )
    assert encoded == [4]  # each image once, for both routes
    assert set(read) == {3}  # the VLM did not process the shortcut sample


def test_vlm_does_not_process_shortcut_samples(model, inputs, calls):
    encoded, read = calls
    results = model.segment(inputs, "sam_only")
    assert {result.route for result in results} == {"shortcut"}
    assert (encoded, read) == ([4], [])
    assert all(sample.input_ids is None for sample in inputs)  # its inputs were not prepared either


def test_full_reasoning_skips_the_first_pass(model, inputs):
    decodes = Calls(model.sam.mask_decoder.pixel_decoder)
    try:
        results = model.segment(inputs, "full_reasoning", GREEDY)
    finally:
        decodes.handle.remove()
    assert len(decodes.rows) == 1
    assert all(result.presence is None and result.threshold == 1.0 for result in results)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_an_image_with_several_prompts_is_encoded_once(model, processor, picture, inputs, calls, batch_size):
    encoded, _ = calls
    first = picture(0)
    batch = processor([first, picture(1, (70, 30)), first], ["circle", "star", "star"])
    assert batch["image_index"].tolist() == [0, 1, 0] and len(batch["sam_pixel_values"]) == 2
    results = list(model.segment(batch, "sam_only", return_heatmap=True, batch_size=batch_size))
    assert encoded == ([2] if batch_size is None else [2, 1])
    assert results[0].presence != results[2].presence
    assert_same_result(results[0], model.segment(inputs[:1], "sam_only", return_heatmap=True)[0])


@all_families
@pytest.mark.parametrize("router", ["sam_only", "full_reasoning"])
def test_ways_to_call_segment_are_equivalent(model, processor, picture, references, router):
    """`segment(**inputs)` with post-processing, `segment(inputs)`, and `segment` with a processor."""
    images, references_of = [picture(0), picture(1, (70, 30))], [[], references]
    inputs = processor(images=images, prompts=["circle", "the odd one out"], references=references_of)
    outputs = model.segment(**inputs, router=router, generation_config=GREEDY)
    assert isinstance(outputs, SegmentationOutputs) and len(outputs) == 2 and len(outputs[1:]) == 1
    options = {"router": router, "generation_config": GREEDY}
    prepared = [processor.prepare(*item) for item in zip(images, inputs["prompts"], references_of)]
    expected = model.segment(prepared, processor=processor, **options, return_heatmap=True)
    assert isinstance(expected, list)
    results = processor.post_process_concept_segmentation(outputs, return_heatmap=True)
    for result, expected_result in zip(results, expected, strict=True):
        assert_same_result(result, expected_result)
    for batch in (inputs, dict(inputs), inputs.to("cpu")):
        results = model.segment(batch, **options, return_heatmap=True)
        assert_same_result(results[1], expected[1])
    assert outputs[0].heatmap is None and outputs[0].mask.tobytes() == expected[0].mask.tobytes()
    strict = processor.post_process_concept_segmentation(outputs, threshold=0.9)
    for result, heatmap in zip(strict, (each.heatmap for each in expected)):
        assert np.array_equal(np.asarray(result.mask) > 0, heatmap > 0.9)


@all_families
def test_a_model_loads_the_processor_of_its_checkpoint(tmp_path, processor, picture, make_model):
    inputs = processor([picture(0)], "the odd one out")
    make_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = ConceptSegForSegmentation.from_pretrained(tmp_path)
    assert loaded.segment(**inputs, generation_config=GREEDY)[0].error is None
    bare = make_model()
    bare.processor = None
    with pytest.raises(ValueError, match="not loaded from a checkpoint with a processor"):
        bare.segment(**inputs)
    bare.config.name_or_path = "/nowhere"
    with pytest.raises(ValueError, match="cannot load a processor from '/nowhere'"):
        bare.segment(**inputs)


def test_failed_samples_do_not_affect_other_samples(model, processor, inputs):
    samples = [
        PreparedSample.failed("star", "The image is broken."),
        *inputs,
        PreparedSample.failed("", "No prompt."),
    ]
    results = model.segment(samples, "adaptive", GREEDY, processor=processor)
    assert [result.error for result in results] == [
        "The image is broken.",
        None,
        None,
        None,
        None,
        "No prompt.",
    ]
    assert results[0].mask is None and results[0].label == "star"
    assert all(result.mask is not None for result in results[1:-1])
    assert model.segment(samples[:1], processor=processor)[0].error == "The image is broken."
    assert model.segment([], processor=processor) == []


def test_boxes_of_a_completion_are_mapped_to_pixels(model, processor, inputs, references, monkeypatch):
    sample = inputs[1]  # two references with boxes: the first is the proxy query
    check = sample.frame.check_box
    text = format_completion("a star", "find red", check, (10, 20, 50, 80), "red circle", 100)
    script(monkeypatch, model, processor, [text, "the object is red", "<answer> star </answer>"])
    samples = [sample, inputs[2], inputs[0]]
    whole, broken, bare = model.segment(samples, NEVER, processor=processor)

    assert (whole.think, whole.rule, whole.answer, whole.label) == (
        "a star",
        "find red",
        "red circle",
        "red circle",
    )
    assert whole.box == pytest.approx((7.0, 6.0, 35.0, 24.0))  # of an image of 70 x 30 pixels
    assert whole.check_reference == 0 and whole.check == pytest.approx(references[0].box, abs=0.6)
    assert whole.check_iou > 0.9
    assert broken.completion == "the object is red" and broken.label == samples[1].prompt
    assert broken.answer is broken.box is broken.check is broken.check_reference is None
    assert broken.check_iou == 0.0
    assert bare.label == "star" and bare.check_iou is None


def test_sam_is_prompted_with_the_answer(model, processor, inputs, monkeypatch):
    sam_texts = []
    sam_text = type(processor).sam_text
    monkeypatch.setattr(
        type(processor),
        "sam_text",
        lambda self, texts, *args, **kwargs: (
            sam_texts.append(texts) or sam_text(self, texts, *args, **kwargs)
        ),
    )
    script(monkeypatch, model, processor, ["<answer> star </answer>", "nothing"])
    model.segment(inputs[:2], NEVER)
    assert sam_texts == [["star", inputs[1].prompt]]


ANSWER = "<bbox> [10,20,50,80] </bbox> <answer> star </answer>"


def decoded_with(monkeypatch, model):
    """Record the text ids, concept tokens and boxes of each call of `decode_masks`."""
    calls = []
    original = model.decode_masks

    def decode_masks(features, ids, mask, concepts=None, boxes=None):
        calls.append((ids, concepts, boxes))
        return original(features, ids, mask, concepts, boxes)

    monkeypatch.setattr(model, "decode_masks", decode_masks)
    return calls


@pytest.mark.parametrize(
    ("sam_prompt", "has_text", "has_concepts"),
    [("concept+text", True, True), ("concept", False, True), ("text", True, False)],
)
def test_sam_prompt_selects_text_and_concept_tokens(
    model, processor, inputs, monkeypatch, sam_prompt, has_text, has_concepts
):
    script(monkeypatch, model, processor, [ANSWER, ANSWER])
    calls = decoded_with(monkeypatch, model)
    model.segment(inputs[:2], NEVER, sam_prompt=sam_prompt)
    ((ids, concepts, boxes),) = calls
    assert (ids is not None, concepts is not None, boxes) == (has_text, has_concepts, None)
    if has_text:
        assert torch.equal(ids, processor.sam_text(["star", "star"])[0])


def test_sam_prompt_box_prompts_sam_with_the_box_only(model, processor, inputs, monkeypatch):
    script(monkeypatch, model, processor, [ANSWER, "<answer> star </answer>", "<bbox> [50,20,50,80] </bbox>"])
    calls = decoded_with(monkeypatch, model)
    results = model.segment(inputs[:3], NEVER, sam_prompt="box", return_heatmap=True)
    ((ids, concepts, boxes),) = calls
    assert torch.equal(ids, processor.sam_text(["visual"])[0]) and concepts is None
    torch.testing.assert_close(boxes, torch.tensor([[[0.3, 0.5, 0.4, 0.6]]]))
    for result in results[1:]:  # no box, and an empty box: the mask is empty
        assert (result.score, result.decode_presence, result.error) == (0.0, 0.0, None)
        assert not np.asarray(result.mask).any() and result.heatmap.max() < 1e-6
        assert result.mask.size == result.heatmap.shape[::-1]
    assert results[0].decode_presence > 0 and results[1].answer == "star"


@pytest.mark.parametrize("sam_prompt", ["concept", "text"])
def test_batch_equals_single_for_each_sam_prompt(model, inputs, sam_prompt):
    options = {"generation_config": GREEDY, "sam_prompt": sam_prompt, "return_heatmap": True}
    for i, result in enumerate(model.segment(inputs, NEVER, **options)):
        assert_same_result(result, model.segment(inputs[i : i + 1], NEVER, **options)[0])


def test_batch_equals_single_with_boxes(model, processor, inputs, monkeypatch):
    texts = [ANSWER, "<bbox> [0,0,30,90] </bbox> <answer> red circle </answer>", ANSWER, "nothing"]
    options = {"sam_prompt": "box", "return_heatmap": True}
    script(monkeypatch, model, processor, texts)
    together = model.segment(inputs, NEVER, **options)
    assert len({result.score for result in together}) == 4
    for i, text in enumerate(texts):
        script(monkeypatch, model, processor, [text])
        assert_same_result(together[i], model.segment(inputs[i : i + 1], NEVER, **options)[0])


def test_score_of_an_empty_mask_is_zero(model, inputs, monkeypatch):
    decode = model.decode_masks
    monkeypatch.setattr(model, "decode_masks", lambda *args: (decode(*args)[0] - 100, decode(*args)[1]))
    result = model.segment(inputs[:1], "sam_only")[0]
    assert result.score == 0.0 and result.decode_presence > 0 and not np.asarray(result.mask).any()


def test_the_adaptive_router_does_not_accept_an_empty_mask(model, inputs, monkeypatch):
    bias = model.sam.mask_decoder.semantic_projection.bias
    monkeypatch.setattr(bias, "data", bias.data - 100)
    router = ShortcutRouter(base=0.05)
    result = model.segment(inputs[:1], router, GREEDY)[0]
    assert result.presence >= result.threshold and result.route == "reasoning"
    assert result.route_reason == (
        f"presence {result.presence:.2f} reaches the threshold 0.05, but the mask is empty"
    )
    assert model.segment(inputs[:1], "sam_only")[0].route == "shortcut"


def test_router_base_is_read_from_the_config(model, inputs, monkeypatch):
    monkeypatch.setattr(model.config, "router_base", 0.9)
    assert model.segment(inputs[:1], generation_config=GREEDY)[0].route == "reasoning"
    assert model.segment(inputs[:1], ShortcutRouter(base=0.05))[0].route == "shortcut"


def test_segment_restores_the_training_mode_and_builds_no_graph(make_model, inputs):
    model = make_model()
    model.train()
    model.segment(inputs[:1], NEVER, GREEDY)
    assert model.training and model.ctm.training and not model.sam.training
    assert model.vlm.model.rope_deltas is None
    assert all(parameter.requires_grad for parameter in model.ctm.parameters())


def test_segment_restores_the_mode_of_each_part(make_model, inputs):
    model = make_model().eval()
    model.ctm.train()
    model.vlm.lm_head.train()
    before = {name: module.training for name, module in model.named_modules()}
    model.segment(inputs[:1], NEVER, GREEDY)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_segment_rejects_invalid_arguments(model, processor, picture, inputs):
    batch = processor([picture(0)], "circle")
    with pytest.raises(ValueError, match="either the processor's output"):
        model.segment()
    with pytest.raises(ValueError, match="either the processor's output"):
        model.segment(inputs, **batch)
    with pytest.raises(ValueError, match="the inputs lack prompts, frames"):
        model.segment(**{name: batch[name] for name in batch if name not in ("prompts", "frames")})
    with pytest.raises(ValueError, match="unknown argument 'routre'"):
        model.segment(**batch, routre="sam_only")
    with pytest.raises(ValueError, match="'sometimes'"):
        model.segment(inputs, router="sometimes")
    with pytest.raises(ValueError, match="batch_size is 0"):
        model.segment(inputs, batch_size=0)
    with pytest.raises(ValueError, match="sam_prompt is 'words'"):
        model.segment(inputs, sam_prompt="words")
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.segment(inputs[:1], NEVER, {**SAMPLED, "num_return_sequences": 2})


def test_a_given_rule_starts_the_completion_of_samples_that_reason(model, inputs):
    first, second = (
        model.segment(inputs, "adaptive", GREEDY, return_heatmap=True, rule=rule)
        for rule in ("the red star", " the blue circle ")
    )
    # The first sample takes the shortcut; the last one has a proxy query, so its completion has a check.
    assert [result.route for result in first] == ["shortcut", "rule", "rule", "rule"]
    assert [result.rule for result in second] == [None, *["the blue circle"] * 3]
    starts = [result.completion.replace(" ", "") for result in first[1:]]
    tags = ["check" if sample.frame.proxy is not None else "bbox" for sample in inputs[1:]]
    assert set(tags) == {"check", "bbox"}
    for start, tag in zip(starts, tags, strict=True):
        assert start.startswith(f"<think>theredstar</think><rule>theredstar</rule><{tag}>[")
    assert first[0].heatmap.tobytes() == second[0].heatmap.tobytes()
    for one, other in zip(first[1:], second[1:], strict=True):
        assert not np.allclose(one.heatmap, other.heatmap, atol=1e-3)
    for i, result in enumerate(first):
        single = model.segment(
            inputs[i : i + 1], "adaptive", GREEDY, return_heatmap=True, rule="the red star"
        )
        assert_same_result(result, single[0])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (" ", "rule is ' '"),
        (3, "rule is 3"),
        ("a</rule>", "contains the tag '</rule>'"),
        ("a<|im_end|>", "reserved token"),
    ],
)
def test_segment_rejects_invalid_rules(model, inputs, rule, message):
    with pytest.raises(ValueError, match=message):
        model.segment(inputs, rule=rule)


def test_geometry_cls_can_be_omitted_with_concepts(model, training_batch, switch):
    """`sam_geometry_cls_with_concepts` only affects prompts that contain concept tokens."""
    features = model.encode_image(training_batch["sam_pixel_values"])
    text = training_batch["sam_input_ids"], training_batch["sam_attention_mask"]
    concepts = torch.randn(3, 8, model.config.ctm_config.sam_hidden_size)
    with_cls = [model.decode_masks(features, *text)[0], model.decode_masks(features, *text, concepts)[0]]
    bare = type(features)(features.vision, None)
    expected = model.decode_masks(bare, *text, concepts)[0]
    switch(sam_geometry_cls_with_concepts=False)
    assert torch.equal(model.decode_masks(features, *text)[0], with_cls[0])
    assert torch.equal(model.decode_masks(features, *text, concepts)[0], expected)
    assert not torch.allclose(expected, with_cls[1], atol=1e-3)
    assert model.config.non_default_fields == {"sam_geometry_cls_with_concepts": False}


# -- saving and loading --


@all_families
@pytest.mark.parametrize("max_shard_size", ["50GB", "4MB"])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_are_bit_exact(make_model, tmp_path, training_batch, tied, max_shard_size):
    model = make_model(tied)
    model.generation_config.eos_token_id = [2, 9]
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "4MB")
    loaded, info = ConceptSegForSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not loaded.training
    assert_same_weights(model, loaded)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.generation_config.eos_token_id == [2, 9]
    assert not any(p.requires_grad for p in loaded.sam.parameters()) and all(
        p.requires_grad for p in loaded.ctm.parameters()
    )
    with torch.no_grad():
        assert torch.equal(model(**training_batch).mask_logits, loaded(**training_batch).mask_logits)


def test_checkpoint_keys_equal_those_of_the_state_dict(make_model, tmp_path):
    """Trainers resume with `load_state_dict(strict=False)`, which would silently skip other keys."""
    from safetensors import safe_open

    model = make_model(tied=False)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    model.save_pretrained(tmp_path / "original", save_original_format=True)
    assert_same_weights(model, AutoModel.from_pretrained(tmp_path / "original"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    """Checkpoints of the shared model and its backbones, and incomplete checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model.save_pretrained(folder / "full")
    model.vlm.save_pretrained(folder / "vlm")
    model.sam.save_pretrained(folder / "sam")
    for part in ("vlm", "ctm", "sam"):
        state = {
            name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{part}.")
        }
        model.save_pretrained(folder / f"without_{part}", state_dict=state)
    return folder


def test_missing_ctm_raises_unless_init_ctm(checkpoint):
    with pytest.raises(ValueError, match="init_ctm=True"):
        AutoModel.from_pretrained(checkpoint / "without_ctm")
    model = AutoModel.from_pretrained(checkpoint / "without_ctm", init_ctm=True)
    assert model.ctm.queries.std().item() == pytest.approx(0.02, rel=0.15)


def test_missing_vlm_raises(checkpoint):
    with pytest.raises(ValueError, match="from_backbones"):
        AutoModel.from_pretrained(checkpoint / "without_vlm")


def test_missing_sam_is_loaded_from_its_source_or_raises(make_model, checkpoint, model):
    folder = checkpoint / "without_sam"
    config = json.loads((folder / "config.json").read_text())

    def load(source, **kwargs):
        (folder / "config.json").write_text(json.dumps({**config, "sam_name_or_path": source}))
        return AutoModel.from_pretrained(folder, **kwargs)

    with pytest.raises(ValueError, match="sam_name_or_path is not set"):
        load(None)
    with pytest.raises(ValueError, match="could not be loaded from"):
        load(str(checkpoint / "nowhere"))
    refilled, info = load(str(checkpoint / "sam"), output_loading_info=True)
    assert_same_weights(refilled, model)
    assert not info["missing_keys"] and not any(p.requires_grad for p in refilled.sam.parameters())
    # The source has a different architecture.
    other = make_model(sam_config=_other_sam(model))
    other.sam.save_pretrained(checkpoint / "other_sam")
    with pytest.raises(ValueError, match="other_sam"):
        load(str(checkpoint / "other_sam"))


def _other_sam(model) -> dict:
    config = model.config.sam_config.to_dict()
    config["detr_encoder_config"]["intermediate_size"] = 96
    return config


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_dtypes_are_preserved_by_save_and_load(checkpoint, tmp_path, inputs, dtype, processor):
    def dtypes(model):
        return {
            name.split(".")[0]: {p.dtype for n, p in model.named_parameters() if n.startswith(name)}
            for name in ("vlm.", "ctm.", "sam.")
        }

    expected = {"vlm": {getattr(torch, dtype)}, "ctm": {torch.float32}, "sam": {torch.float32}}
    model = AutoModel.from_pretrained(checkpoint / "full", dtype=dtype)
    assert dtypes(model) == expected
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert dtypes(again) == expected
    assert_same_weights(model, again)
    assert again.segment(inputs[:2], NEVER, GREEDY, processor)[1].error is None


def test_sam_and_ctm_in_bfloat16_give_nearly_the_same_masks(processor):
    path = nano_checkpoint()
    nano_processor = ConceptSegProcessor.from_pretrained(path)
    shapes = ConceptShapes("test")
    samples = [nano_processor.prepare(s.image, s.prompt, s.references) for s in (shapes[i] for i in range(6))]
    masks, sizes = [], []
    for dtype in (None, torch.bfloat16):
        model = ConceptSegForSegmentation.from_pretrained(path, sam_dtype=dtype)
        assert model.vlm.dtype == torch.float32 and model.sam.dtype == (dtype or torch.float32)
        sizes.append(sum(p.nbytes for part in (model.sam, model.ctm) for p in part.parameters()))
        results = model.segment(samples, NEVER, {"max_new_tokens": 48}, nano_processor)
        masks.append([np.asarray(result.mask) > 0 for result in results])
    assert sizes[1] == sizes[0] / 2
    ious = [(a & b).sum() / (a | b).sum() for a, b in zip(*masks, strict=True) if a.any()]
    assert len(ious) >= 4 and min(ious) > 0.95


@all_families
@pytest.mark.parametrize("tied", [True, False])
def test_from_backbones_accepts_folders_and_models(make_model, tmp_path, tied):
    source = make_model(tied)
    source.vlm.save_pretrained(tmp_path / "vlm")
    source.sam.save_pretrained(tmp_path / "sam")
    torch.manual_seed(0)
    loaded = ConceptSegForSegmentation.from_backbones(
        tmp_path / "vlm",
        str(tmp_path / "sam"),
        ctm_config={"num_queries": 4, "num_attention_heads": 8},
        attn_implementation="eager",
    )
    assert loaded.config.sam_name_or_path == str(tmp_path / "sam")
    assert loaded.ctm.queries.shape == (4, 128) and loaded.config.tie_word_embeddings == tied
    assert {loaded.vlm.config._attn_implementation, loaded.sam.config._attn_implementation} == {"eager"}

    joined = ConceptSegForSegmentation.from_backbones(
        source.vlm, source.sam, hidden_states_at="predict", ctm_config={"num_attention_heads": 4}
    )
    assert (
        joined.vlm is source.vlm and joined.sam is source.sam and joined.config.hidden_states_at == "predict"
    )
    assert joined.config.vlm_config is source.vlm.config and joined.vlm.config._attn_implementation == "sdpa"
    for model in (loaded, joined):
        assert_same_weights(model.vlm, source.vlm)
        assert_same_weights(model.sam, source.sam)
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        assert model.ctm.queries.std().item() == pytest.approx(0.02, rel=0.15)
        assert not model.training and not any(p.requires_grad for p in model.sam.parameters())
        assert bool(model.all_tied_weights_keys) == tied
        model.save_pretrained(tmp_path / "joined")
        assert_same_weights(AutoModel.from_pretrained(tmp_path / "joined"), model)


def test_model_from_backbones_segments(model, processor, inputs):
    joined = ConceptSegForSegmentation.from_backbones(
        model.vlm, model.sam, ctm_config={"num_attention_heads": 4}
    )
    assert all(result.error is None for result in joined.segment(inputs, "adaptive", GREEDY, processor))


# -- settings of the released code --


@pytest.fixture()
def switch(model, monkeypatch):
    """Set fields of the shared model's config for one test."""

    def set_fields(**fields):
        for name, value in fields.items():
            monkeypatch.setattr(model.config, name, value)

    return set_fields


def test_end_of_turn_state_is_passed_to_the_ctm_if_configured(model, inputs, monkeypatch, switch):
    states = torch.randn(1, 4, model.config.hidden_size)
    mask, mask_with_end = (torch.tensor([[True, True, end, False]]) for end in (False, True))
    generate_arguments, encode_arguments = [], []

    def generate(vlm, batch, generation, at, end_of_turn, limit, *given):
        generate_arguments.append((at, end_of_turn, limit))
        return GeneratedCompletions(
            torch.tensor([[8, 9, 2, 0]]), mask, states, mask_with_end if end_of_turn else None
        )

    encode = model.encode_concepts
    monkeypatch.setattr(inference, "generate_with_states", generate)
    monkeypatch.setattr(
        model, "encode_concepts", lambda *args: encode_arguments.append(args) or encode(*args)
    )
    first = model.segment(inputs[:1], NEVER, return_heatmap=True)[0]
    switch(end_of_turn_state=True, max_total_length=2816)
    second = model.segment(inputs[:1], NEVER, return_heatmap=True)[0]
    assert generate_arguments == [("token", False, None), ("token", True, 2816)]
    assert [state_mask.sum().item() for _, state_mask in encode_arguments] == [2, 3]
    assert first.completion == second.completion, "the text does not include the end-of-turn token"
    assert not np.array_equal(first.heatmap, second.heatmap)


def test_shortcut_size_applies_only_to_the_shortcut(model, processor, picture, monkeypatch):
    image = picture(5, (90, 50))
    encoded = []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels: encoded.append(pixels) or encode(pixels))
    released = processor.with_settings(shortcut_size=600)

    def pixels(target):
        return processor.sam_image_processor(images=target, return_tensors="pt")["pixel_values"]

    resized = pixels(image.resize((600, 600), Image.Resampling.BICUBIC))
    assert not torch.equal(resized, pixels(image))
    inputs = released([image], ["star"])
    shortcut = model.segment(inputs, "sam_only")[0]
    assert [torch.equal(actual, resized) for actual in encoded] == [True]
    encoded.clear()
    options = {"generation_config": {"max_new_tokens": 2}, "return_heatmap": True}
    reasoned = model.segment(inputs, "full_reasoning", **options)[0]
    assert [torch.equal(actual, pixels(image)) for actual in encoded] == [True]
    encoded.clear()
    both = model.segment(inputs, ShortcutRouter(base=0.999), **options)[0]
    assert [torch.equal(*pair) for pair in zip(encoded, (resized, pixels(image)), strict=True)] == [
        True,
        True,
    ]
    assert (shortcut.route, reasoned.route, both.route) == ("shortcut", "reasoning", "reasoning")
    assert shortcut.mask.size == reasoned.mask.size == image.size
    assert np.allclose(both.heatmap, reasoned.heatmap, atol=1e-5)


def test_router_drop_parentheses_removes_them_from_sams_text(model, processor, picture, monkeypatch, switch):
    sam_texts = []
    sam_text = type(processor).sam_text
    monkeypatch.setattr(
        type(processor), "sam_text", lambda self, texts: sam_texts.append(texts) or sam_text(self, texts)
    )
    prompts = ["red circle (left)", "(left)"]
    inputs = processor([picture(1), picture(2)], prompts)
    default = model.segment(inputs, "sam_only")
    switch(router_drop_parentheses=True, router_min_words=0)
    results = model.segment(inputs, "sam_only")
    assert sam_texts == [prompts, ["red circle", ""]]
    assert [result.label for result in results] == [result.label for result in default] == prompts


def test_missing_answer_empty_gives_sam_an_empty_text(model, processor, inputs, monkeypatch, switch):
    sam_texts = []
    sam_text = type(processor).sam_text
    monkeypatch.setattr(
        type(processor), "sam_text", lambda self, texts: sam_texts.append(texts) or sam_text(self, texts)
    )
    script(monkeypatch, model, processor, ["<answer> star </answer>", "nothing"])
    switch(missing_answer="empty")
    results = model.segment(inputs[:2], NEVER)
    assert sam_texts == [["star", ""]] and results[1].error is None and results[1].mask is not None
