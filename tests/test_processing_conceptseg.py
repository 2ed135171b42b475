"""Tests of the processor: prompts, tensors, batches, coordinate transforms, and saving."""

from __future__ import annotations

import inspect
import json
import pathlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    BatchFeature,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Sam3ImageProcessor,
)
from vocabulary import QWEN_SPECIAL_TOKENS, sam_frame

from conceptseg_hf import ConceptSegProcessor, Reference
from conceptseg_hf.mosaic import MosaicLayout, compose_mosaic
from conceptseg_hf.processing_conceptseg import CoordinateFrame, PreparedSample
from conceptseg_hf.prompt_template import OFFICIAL_TEMPLATE, PromptTemplate

SPECIAL = ["<|endoftext|>", *QWEN_SPECIAL_TOKENS]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = (90, 60)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer, which encodes any text without loss, with Qwen's special tokens."""
    vocabulary = {
        token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[SPECIAL[1], *SPECIAL[3:]],
    )


def sam_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.WordLevel(
            {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, "red": 4, "circle": 5}, unk_token="<unk>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = sam_frame()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def build(patch_size: int = 8, **arguments) -> ConceptSegProcessor:
    arguments = {
        "canvas_size": 64,
        "coordinate_scale": 100,
        "sam_text_length": 6,
        "chat_template": CHAT_TEMPLATE,
        **arguments,
    }
    return ConceptSegProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=patch_size, temporal_patch_size=1),
        tokenizer=byte_tokenizer(),
        sam_image_processor=Sam3ImageProcessor(size={"height": 56, "width": 56}),
        sam_tokenizer=sam_tokenizer(),
        **arguments,
    )


@pytest.fixture(scope="module")
def processor() -> ConceptSegProcessor:
    return build()


def noise_image(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


def boxed(seed: int, role: str = "auto", size: tuple[int, int] = SIZE) -> Reference:
    return Reference(noise_image(seed, size), box=(9, 6, 45, 30), role=role)


def references_of(kind: str) -> list[Reference]:
    return {
        "no_reference": [],
        "single_reference": [boxed(1)],
        "support_only": [boxed(1, "support"), boxed(2, "support", (30, 80))],
        "with_proxy": [boxed(1), boxed(2), boxed(3)],
    }[kind]


KINDS = ["no_reference", "single_reference", "support_only", "with_proxy"]


# The prompt


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_contains_mosaic_target_and_instruction(processor: ConceptSegProcessor, kind: str) -> None:
    sample = processor.prepare(noise_image(), "red circle", references_of(kind))
    # The second support reference is 30 x 80: its box is clipped to the image and scaled differently.
    boxes = {"support_only": "[5,5,25,25], [65,4,100,19]", "with_proxy": "[55,5,75,25], [5,55,25,75]"}.get(
        kind, ""
    )
    instruction = OFFICIAL_TEMPLATE.fill(kind, "red circle", boxes)
    images = 1 if kind == "no_reference" else 2
    tokens_per_image = (64 // 8 // 2) ** 2
    text = processor.tokenizer.decode(sample.input_ids, clean_up_tokenization_spaces=False)
    image_text = f"<|vision_start|>{'<|image_pad|>' * tokens_per_image}<|vision_end|>"
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{image_text * images}{instruction}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert sample.image_grid_thw.tolist() == [[1, 8, 8]] * images
    assert sample.mm_token_type_ids.sum() == tokens_per_image * images
    np.testing.assert_array_equal(sample.mm_token_type_ids, sample.input_ids == processor.image_token_id)
    assert sample.frame.proxy == (0 if kind == "with_proxy" else None)


def test_box_of_a_single_reference_is_drawn_but_not_listed(processor: ConceptSegProcessor) -> None:
    sample = processor.prepare(
        noise_image(), "red circle", [Reference(Image.new("RGB", SIZE, "blue"), box=(9, 6, 45, 30))]
    )
    assert ((np.asarray(sample.vlm_images[0]) == (255, 0, 0)).all(-1)).any()
    assert "[10,10,50,50]" not in sample.vlm_text
    assert sample.frame.layout.grid == 1 and sample.frame.support_boxes == ((10, 10, 50, 50),)


def test_instruction_for_references_without_boxes(processor: ConceptSegProcessor) -> None:
    sample = processor.prepare(
        noise_image(), "what changed", [Reference(noise_image(1)), Reference(noise_image(2))]
    )
    assert sample.vlm_text.endswith(
        OFFICIAL_TEMPLATE.fill("single_reference", "what changed") + "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert sample.frame.support_boxes == () and sample.frame.proxy is None


def test_proxy_without_box_has_no_ground_truth(processor: ConceptSegProcessor) -> None:
    sample = processor.prepare(
        noise_image(), "x", [Reference(noise_image(1)), Reference(noise_image(2), role="proxy")]
    )
    assert "<check>" in sample.vlm_text and "provided at none." in sample.vlm_text
    assert sample.frame.proxy == 1 and sample.frame.cell_of_reference == (1, 0)
    assert sample.frame.check_box is None
    assert sample.frame.check_iou((0, 0, 1, 1)) is None


def test_default_chat_template_equals_qwens(processor: ConceptSegProcessor) -> None:
    plain = build(chat_template=None)
    for kind in KINDS:
        inputs = (noise_image(), "red circle", references_of(kind))
        assert plain.prepare(*inputs).vlm_text == processor.prepare(*inputs).vlm_text


def test_chat_template_of_the_tokenizer_is_used() -> None:
    processor = build(chat_template=None)
    processor.tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n", "assistant: ")
    assert processor.prepare(noise_image(), "red").vlm_text.endswith("<|im_start|>assistant: ")


def test_rejects_a_chat_template_without_images() -> None:
    processor = build(chat_template="{{ messages[1]['content'][-1]['text'] }}")
    with pytest.raises(ValueError, match="wrote 0 image tokens for 1 images"):
        processor.prepare(noise_image(), "red")


def chat(processor: ConceptSegProcessor, sample) -> list[dict]:
    """Messages of a prepared sample, including its images."""
    instruction = sample.vlm_text.split("<|vision_end|>")[-1].split("<|im_end|>")[0]
    images = [{"type": "image", "image": image} for image in sample.vlm_images]
    return [
        {"role": "system", "content": [{"type": "text", "text": processor.template.system}]},
        {"role": "user", "content": [*images, {"type": "text", "text": instruction}]},
    ]


@pytest.mark.parametrize("custom_template", [True, False])
def test_apply_chat_template_returns_the_vlms_inputs(custom_template: bool) -> None:
    processor = build() if custom_template else build(chat_template=None)
    samples = [
        processor.prepare(noise_image(), "red circle", references_of(kind))
        for kind in ("no_reference", "with_proxy")
    ]
    chats = [chat(processor, sample) for sample in samples]
    options = {"add_generation_prompt": True, "tokenize": True}
    encoded = processor.apply_chat_template(
        chats,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"text_kwargs": {"padding": True}},
        **options,
    )
    expected = processor.collate(samples)
    assert set(encoded) == set(expected) <= set(processor.model_input_names)
    assert all(torch.equal(encoded[name], expected[name]) for name in expected if name != "pixel_values")
    torch.testing.assert_close(encoded["pixel_values"], expected["pixel_values"])
    (ids,) = processor.apply_chat_template(chats[:1], **options)
    assert ids == samples[0].input_ids.tolist()
    text = processor.apply_chat_template(chats[1], add_generation_prompt=True)
    assert (
        text
        == samples[1].vlm_text
        == processor.apply_chat_template(chats[1], CHAT_TEMPLATE, add_generation_prompt=True, tokenize=False)
    )


def test_model_input_names_are_arguments_of_forward(processor: ConceptSegProcessor) -> None:
    from conceptseg_hf import ConceptSegForSegmentation

    names = processor.model_input_names
    assert len(names) == len(set(names)) and names[0] == ConceptSegForSegmentation.main_input_name
    parameters = inspect.signature(ConceptSegForSegmentation.forward).parameters
    assert set(names) < set(parameters)


def test_custom_prompt_template() -> None:
    template = PromptTemplate(
        "sys", "p {problem} {reference_boxes}", "s {problem}", "1 {problem}", "0 {problem}"
    )
    for argument in (template, template.to_dict()):
        processor = build(prompt_template=argument)
        assert processor.template == template
        assert (
            "p red [55,5,75,25], [5,55,25,75]<|im_end|>"
            in processor.prepare(noise_image(), "red", references_of("with_proxy")).vlm_text
        )


@pytest.mark.parametrize("prompt", ["", "  ", None, 3])
def test_prompt_must_be_a_non_empty_string(processor: ConceptSegProcessor, prompt: object) -> None:
    with pytest.raises(ValueError, match=r"prompt is .*; describe the concept in a non-empty string\."):
        processor.prepare(noise_image(), prompt)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>"])
def test_prompt_must_not_contain_reserved_tokens(processor: ConceptSegProcessor, token: str) -> None:
    with pytest.raises(ValueError, match="reserved token"):
        processor.prepare(noise_image(), f"a {token} b")


def test_error_of_a_missing_image_is_one_sentence(processor: ConceptSegProcessor) -> None:
    with pytest.raises(FileNotFoundError, match=r"^image 'nowhere.png' is not a file; [^.]*\.$"):
        processor.prepare("nowhere.png", "red")


# Pixels


@pytest.mark.parametrize(
    ("canvas_size", "patch_size", "grid"),
    [(600, 14, 42), (64, 8, 8), (16, 8, 2), (70, 8, 8), (1400, 14, 100)],
)
def test_patch_grid_depends_only_on_the_canvas_size(canvas_size: int, patch_size: int, grid: int) -> None:
    processor = build(patch_size, canvas_size=canvas_size)
    sample = processor.prepare(noise_image(size=(300, 20)), "red", [boxed(1)])
    assert sample.image_grid_thw.tolist() == [[1, grid, grid]] * 2
    assert [image.size for image in sample.vlm_images] == [(canvas_size, canvas_size)] * 2


def test_vlm_images_are_the_mosaic_and_the_target_resized_to_the_canvas(
    processor: ConceptSegProcessor,
) -> None:
    target, references = noise_image(), references_of("with_proxy")
    sample = processor.prepare(target, "red", references)
    mosaic = compose_mosaic(
        [r.image for r in references], [r.box for r in references], MosaicLayout(2, 64), 0
    )
    np.testing.assert_array_equal(np.asarray(sample.vlm_images[0]), np.asarray(mosaic))
    stretched = target.resize((64, 64), Image.Resampling.BICUBIC)
    expected = Qwen2VLImageProcessor(patch_size=8, temporal_patch_size=1)(
        [mosaic, stretched], return_tensors="pt"
    )
    torch.testing.assert_close(sample.pixel_values, expected["pixel_values"])


def test_sam_pixel_values_are_those_of_the_original_image(processor: ConceptSegProcessor) -> None:
    sample = processor.prepare(noise_image(), "red")
    expected = processor.sam_image_processor(noise_image(), return_tensors="pt")["pixel_values"][0]
    assert sample.sam_pixel_values.shape == (3, 56, 56)
    torch.testing.assert_close(sample.sam_pixel_values, expected)


def test_exif_rotation_is_applied_to_the_frame(processor: ConceptSegProcessor) -> None:
    image = noise_image()
    image.getexif()[0x0112] = 6
    assert processor.prepare(image, "red").frame.image_size == SIZE[::-1]


def test_lazy_and_eager_preparation_are_equal(processor: ConceptSegProcessor) -> None:
    inputs = (noise_image(), "red circle", references_of("with_proxy"))
    eager, lazy = processor.prepare(*inputs), processor.prepare(*inputs, lazy=True)
    assert lazy.input_ids is None and lazy.pixel_values is None
    assert processor.prepare_vlm(lazy) is lazy
    for name in ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw", "sam_pixel_values"):
        assert torch.equal(getattr(eager, name), getattr(lazy, name))


# Batches


def test_collate_pads_prompts_left_and_completions_right(processor: ConceptSegProcessor) -> None:
    samples = [
        processor.prepare(noise_image(), "red circle", references_of("with_proxy")),
        processor.prepare(noise_image(1), "red"),
    ]
    completions = ["<answer>a</answer>", "<answer>longer</answer>"]
    batch = processor.collate(samples, completions)
    length = len(samples[0].input_ids)
    tokenizer = processor.tokenizer
    for row, (sample, completion) in enumerate(zip(samples, completions, strict=True)):
        padding = length - len(sample.input_ids)
        assert (batch["input_ids"][row, :padding] == tokenizer.pad_token_id).all()
        assert torch.equal(batch["input_ids"][row, padding:length], sample.input_ids)
        assert torch.equal(batch["mm_token_type_ids"][row, padding:length], sample.mm_token_type_ids)
        mask = batch["completion_mask"][row]
        assert tokenizer.decode(batch["input_ids"][row][mask]) == completion
        end = length + len(completion)
        assert not mask[:length].any() and mask[length:end].all() and not mask[end:].any()
        assert batch["input_ids"][row, end] == tokenizer.eos_token_id
        assert torch.equal(
            batch["attention_mask"][row].bool(),
            (torch.arange(mask.numel()) >= padding) & (torch.arange(mask.numel()) <= end),
        )
    assert batch["mm_token_type_ids"].sum() == 48
    assert batch["image_grid_thw"].shape == (3, 3) and batch["pixel_values"].shape[0] == 3 * 64


def test_collate_without_completions_pads_left(processor: ConceptSegProcessor) -> None:
    samples = [processor.prepare(noise_image(), prompt, lazy=True) for prompt in ("red", "red circle")]
    batch = processor.collate(samples)
    assert "completion_mask" not in batch
    assert (batch["attention_mask"][:, -1] == 1).all()
    assert batch["attention_mask"].sum(-1).tolist() == [len(sample.input_ids) for sample in samples]


def test_collate_accepts_token_ids(processor: ConceptSegProcessor) -> None:
    sample = processor.prepare(noise_image(), "red")
    ids = processor.tokenizer("<answer>a</answer>", add_special_tokens=False)["input_ids"]
    expected = processor.collate([sample], ["<answer>a</answer>"])
    for completion in (ids, torch.tensor(ids)):
        assert torch.equal(processor.collate([sample], [completion])["input_ids"], expected["input_ids"])


def test_empty_completion_has_no_completion_tokens(processor: ConceptSegProcessor) -> None:
    batch = processor.collate([processor.prepare(noise_image(), "red")] * 2, ["", "ab"])
    assert batch["completion_mask"].sum(-1).tolist() == [0, 2]


def test_collate_moves_to_a_device(processor: ConceptSegProcessor) -> None:
    batch = processor.collate([processor.prepare(noise_image(), "red")], ["a"], device="meta")
    assert all(tensor.device.type == "meta" for tensor in batch.values())


def test_collate_rejects_invalid_arguments(processor: ConceptSegProcessor) -> None:
    sample = processor.prepare(noise_image(), "red")
    with pytest.raises(ValueError, match="samples is empty"):
        processor.collate([])
    with pytest.raises(ValueError, match="2 completions for 1 samples"):
        processor.collate([sample], ["a", "b"])
    with pytest.raises(ValueError, match=r"sample 1 could not be prepared \(broken\.\)"):
        processor.collate([sample, PreparedSample.failed("red", "broken.")])
    with pytest.raises(ValueError, match="contains an image token"):
        processor.collate([sample], ["<|image_pad|>"])


def assert_same_sample(one: PreparedSample, other: PreparedSample) -> None:
    assert (one.prompt, one.frame) == (other.prompt, other.frame)
    for name in ("sam_pixel_values", "input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_samples_inverts_batching(processor: ConceptSegProcessor) -> None:
    """`samples` returns the individual samples without padding and with their images."""
    images, prompts = (
        [noise_image(0, (90, 40)), noise_image(1)],
        ["red", "the object that is not like the others"],
    )
    references = [references_of("with_proxy"), []]
    inputs = processor(images, prompts, references)
    assert isinstance(inputs, BatchFeature) and inputs["input_ids"].shape == inputs.attention_mask.shape
    assert inputs["pixel_values"].shape[0] == inputs["image_grid_thw"].prod(-1).sum()
    for sample, *arguments in zip(inputs.samples, images, prompts, references, strict=True):
        assert_same_sample(sample, processor.prepare(*arguments))
    assert "processor" not in inputs and pickle.loads(pickle.dumps(inputs))["frames"] == inputs["frames"]
    assert inputs.to("meta")["sam_pixel_values"].device.type == "meta"


def test_call_accepts_one_or_several_images(processor: ConceptSegProcessor) -> None:
    image = noise_image()
    assert processor(image, "red")["prompts"] == ["red"]
    inputs = processor([image, noise_image(1)], ["red", "red circle"], [[boxed(1)], []])
    assert [frame.layout is None for frame in inputs["frames"]] == [False, True]
    shared = processor([image, noise_image(1)], "red", references_of("with_proxy"))
    assert [frame.proxy for frame in shared["frames"]] == [0, 0]
    with pytest.raises(ValueError, match="images is empty"):
        processor([], "red")
    with pytest.raises(ValueError, match="got 2 images, 3 prompts and 2 lists of references"):
        processor([image, image], ["a", "b", "c"])


def test_call_accepts_arrays_and_series(processor: ConceptSegProcessor, tmp_path: pathlib.Path) -> None:
    pd = pytest.importorskip("pandas")
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for number, path in enumerate(paths):
        noise_image(number).save(path)
    expected = processor([noise_image(0), noise_image(1)], ["red", "blue"], [[boxed(1)], []])
    frame = pd.DataFrame({"image": paths, "prompt": ["red", "blue"]}, index=[4, 2])
    references = pd.Series([[boxed(1)], []], index=[4, 2])
    for images, prompts in ((frame["image"], frame["prompt"]), (np.array(paths), np.array(["red", "blue"]))):
        inputs = processor(images, prompts, references)
        for one, other in zip(inputs.samples, expected.samples, strict=True):
            assert_same_sample(one, other)
    shared = processor(paths, "red", np.array([boxed(1)], dtype=object))
    assert [frame.reference_sizes for frame in shared["frames"]] == [
        expected["frames"][0].reference_sizes
    ] * 2
    frames = processor(paths, "red", [None, [boxed(1)]])["frames"]
    assert [len(frame.reference_sizes) for frame in frames] == [0, 1]


def test_samples_and_processor_can_be_pickled(processor: ConceptSegProcessor) -> None:
    for lazy in (True, False):
        sample = processor.prepare(noise_image(), "red", references_of("with_proxy"), lazy=lazy)
        again = pickle.loads(pickle.dumps(processor)).prepare_vlm(pickle.loads(pickle.dumps(sample)))
        assert again.frame == sample.frame
        assert torch.equal(again.pixel_values, processor.prepare_vlm(sample).pixel_values)


def test_sam_text_is_padded_or_truncated(processor: ConceptSegProcessor) -> None:
    ids, mask = processor.sam_text(["red circle", "", "red " * 50])
    assert ids.tolist() == [[1, 4, 5, 2, 0, 0], [1, 2, 0, 0, 0, 0], [1, 4, 4, 4, 4, 2]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]
    assert processor.sam_text(["red"], device="meta")[0].device.type == "meta"


# Post-processing


def test_ground_truth_of_the_check_is_the_withheld_box(processor: ConceptSegProcessor) -> None:
    references = [boxed(1), boxed(2), Reference(noise_image(3, (40, 80)), box=(10, 20, 30, 60), role="proxy")]
    frame = processor.prepare(noise_image(), "red", references).frame
    assert (frame.proxy, frame.cell_of_reference, frame.proxy_box) == (2, (1, 2, 0), (10, 20, 30, 60))
    assert frame.check_box == (12.5, 12.5, 37.5, 37.5)
    assert frame.text_box_to_reference((12.5, 12.5, 37.5, 37.5)) == (2, (10, 20, 30, 60))
    assert frame.check_iou((12.5, 12.5, 37.5, 37.5)) == 1
    assert frame.check_iou((62.5, 12.5, 87.5, 37.5)) == 0
    assert frame.check_iou(None) == 0


def test_check_boxes_outside_of_references(processor: ConceptSegProcessor) -> None:
    frame = processor.prepare(noise_image(), "red", references_of("with_proxy")).frame
    assert frame.text_box_to_reference((80, 80, 90, 90)) == (None, None)  # the fourth cell is empty
    assert CoordinateFrame(SIZE).text_box_to_reference((0, 0, 1, 1)) == (None, None)
    assert CoordinateFrame(SIZE).check_box is None
    # A box across two cells is clipped to the reference that contains its center.
    assert frame.text_box_to_reference((0, 0, 60, 50)) == (0, (0, 0, 90, 60))
    with pytest.raises(ValueError, match="has no references"):
        CoordinateFrame(SIZE).reference_box_to_text((0, 0, 1, 1), 0)


def test_decode_completion(processor: ConceptSegProcessor) -> None:
    text = (
        "<think> so, it's red . </think><rule>é</rule><check>[1,2,3,4]</check>"
        "<bbox>[10,20,30,140]</bbox><answer>a</answer>"
    )
    ids = processor.tokenizer(text + "<|im_end|><|endoftext|>", add_special_tokens=False)["input_ids"]
    with_proxy = processor.prepare(noise_image(), "red", references_of("with_proxy"), lazy=True)
    for token_ids in (ids, torch.tensor(ids)):
        completion = processor.decode_completion(token_ids, with_proxy)
        assert completion.text == text and completion.is_valid
        assert completion.bbox == (10, 20, 30, 100)
    assert processor.decode_completion(ids).is_valid
    assert processor.decode_completion(ids, processor.prepare(noise_image(), "red", lazy=True)).missing == (
        "<check> was not asked for",
    )
    assert processor.decode_completion([]).answer is None


def test_post_process_mask(processor: ConceptSegProcessor) -> None:
    logits = torch.full((8, 8), -4.0)
    logits[:, 4:] = 4.0
    mask, probability = processor.post_process_mask(
        logits.to(torch.bfloat16).requires_grad_(), CoordinateFrame((90, 60))
    )
    assert mask.mode == "L" and mask.size == (90, 60)
    values = np.asarray(mask)
    assert set(np.unique(values)) == {0, 255}
    assert (values[:, :45] == 0).all() and (values[:, 45:] == 255).all()
    assert probability.shape == (60, 90) and probability.dtype == np.float32
    np.testing.assert_array_equal(values > 0, probability > 0.5)


def test_zero_logits_are_background(processor: ConceptSegProcessor) -> None:
    mask, _ = processor.post_process_mask(torch.zeros(4, 4), CoordinateFrame((5, 7)))
    assert not np.asarray(mask).any()


# Saving and loading


def test_auto_processor_round_trip(tmp_path: pathlib.Path) -> None:
    template = PromptTemplate(
        "sys", "p {problem} {reference_boxes}", "s {problem}", "1 {problem}", "0 {problem}"
    )
    processor = build(canvas_size=48, coordinate_scale=48, sam_text_length=5, prompt_template=template)
    processor.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "processor_config.json").read_text())["prompt_template"] == template.to_dict()
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "conceptseg"}))
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, ConceptSegProcessor)
    assert (again.canvas_size, again.coordinate_scale, again.sam_text_length) == (48, 48, 5)
    assert again.template == template and again.chat_template == CHAT_TEMPLATE
    assert again.tokenizer.padding_side == "left" and again.sam_tokenizer.padding_side == "right"
    assert again.sam_tokenizer.get_vocab() == processor.sam_tokenizer.get_vocab()
    inputs = (noise_image(), "red circle", references_of("with_proxy"))
    before, after = processor.prepare(*inputs), again.prepare(*inputs)
    for name in ("input_ids", "pixel_values", "image_grid_thw", "sam_pixel_values"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert before.frame == after.frame
    # Saving again gives the same file.
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "processor_config.json").read_text() == (
        tmp_path / "processor_config.json"
    ).read_text()


def test_settings_can_be_overridden_when_loading(tmp_path: pathlib.Path) -> None:
    build().save_pretrained(tmp_path)
    again = ConceptSegProcessor.from_pretrained(
        tmp_path, canvas_size=32, coordinate_scale=1, padding_side="right"
    )
    assert (again.canvas_size, again.coordinate_scale) == (32, 1)
    assert again.tokenizer.padding_side == "left"
    assert again.template == OFFICIAL_TEMPLATE


@pytest.mark.parametrize("argument", ["canvas_size", "coordinate_scale", "sam_text_length"])
def test_sizes_must_be_positive(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} is 0"):
        build(**{argument: 0})


def test_tokenizer_must_have_an_image_token() -> None:
    with pytest.raises(ValueError, match="no image token"):
        ConceptSegProcessor(Qwen2VLImageProcessor(), sam_tokenizer(), Sam3ImageProcessor(), sam_tokenizer())


@pytest.mark.parametrize("shortcut_size", [None, 48])
def test_an_image_with_several_prompts_is_preprocessed_once(processor, monkeypatch, shortcut_size) -> None:
    processor = processor.with_settings(shortcut_size=shortcut_size)
    sizes = []
    sam_pixels = ConceptSegProcessor.sam_pixels
    monkeypatch.setattr(
        ConceptSegProcessor,
        "sam_pixels",
        lambda self, image: sizes.append(image.size) or sam_pixels(self, image),
    )
    image, other = noise_image(1), noise_image(2)
    prompts = ["red", "blue", "green"]
    inputs = processor(image, prompts)
    paired = processor([image, other, image], prompts)
    count = 1 if shortcut_size is None else 2
    assert len(sizes) == 3 * count  # one unique image in the first call, two in the second
    assert inputs["image_index"].tolist() == [0, 0, 0] and paired["image_index"].tolist() == [0, 1, 0]
    for sample, prompt in zip(inputs.samples, prompts, strict=True):
        assert_same_sample(sample, processor.prepare(image, prompt))
