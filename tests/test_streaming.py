"""Tests of streamed results: the text adds up to the completion, and results equal those of `segment`."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import transformers

from conceptseg_hf import ConceptSegmentation, Reference, nano_checkpoint
from conceptseg_hf.data import load_benchmark
from conceptseg_hf.generation import GeneratedCompletions
from conceptseg_hf.streaming import TextPieces, stream_call

REASONING = {"router": "full_reasoning", "generation_config": {"max_new_tokens": 12}}


@pytest.fixture(scope="module")
def nano():
    path = nano_checkpoint()
    return transformers.AutoModel.from_pretrained(path), transformers.AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def pipe(nano):
    model, processor = nano
    return transformers.pipeline("concept-segmentation", model=model, processor=processor, device="cpu")


@pytest.fixture()
def samples(processor, picture):
    references = [Reference(picture(10), box=(2, 2, 20, 20)), Reference(picture(11), box=(5, 5, 40, 30))]
    return lambda: [
        processor.prepare(picture(0), "red circle", lazy=True),
        processor.prepare(picture(1), "the odd one out", references, lazy=True),
    ]


def split(items) -> list[tuple[list[str], object]]:
    """Group a stream to (pieces, result) of each prompt."""
    groups, pieces = [], []
    for item in items:
        if isinstance(item, str):
            pieces.append(item)
        else:
            groups.append((pieces, item))
            pieces = []
    assert not pieces
    return groups


def assert_equal(result, expected) -> None:
    result, expected = ({**value} for value in (result, expected))
    assert np.array_equal(result.pop("mask"), expected.pop("mask"))
    assert result == expected


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 0.8}], ids=["greedy", "sampled"])
def test_tokens_and_masks_equal_those_of_segment(model, processor, samples, settings):
    arguments = {**REASONING, "generation_config": {"max_new_tokens": 12, **settings}}
    torch.manual_seed(5)
    expected = model.segment(samples(), processor=processor, batch_size=1, **arguments)
    torch.manual_seed(5)
    groups = split(model.stream_segment(samples(), processor, **arguments))
    assert len(groups) == 2
    for (pieces, result), other in zip(groups, expected, strict=True):
        assert "".join(pieces) == other.completion and len(pieces) > 2
        assert isinstance(result, ConceptSegmentation)
        assert_equal(result.to_dict(), other.to_dict())


def test_complete_completions_of_the_embedded_checkpoint(nano):
    """They end with an end-of-sequence token, which is no text."""
    model, processor = nano
    sample = next(s for s in load_benchmark("concept-shapes", split="val") if s.references)
    inputs = processor(images=[sample.image], prompts=[sample.prompt], references=[list(sample.references)])
    (expected,) = model.segment(inputs, processor=processor, router="full_reasoning")
    assert expected.completion.endswith("</answer>")
    for items in (
        model.stream_segment(inputs, router="full_reasoning"),
        model.stream_segment(**inputs, processor=processor, router="full_reasoning"),
    ):
        ((pieces, result),) = split(items)
        assert "".join(pieces) == expected.completion and len(pieces) > 10
        assert_equal(result.to_dict(), expected.to_dict())


def test_a_given_rule_is_part_of_the_text(model, processor, samples):
    ((pieces, result), _) = split(
        model.stream_segment(samples(), processor, rule="the red circle", **REASONING)
    )
    assert result.route == "rule" and "the red circle" in pieces[0].replace("  ", " ")
    assert "".join(pieces) == result.completion


def test_the_shortcut_gives_no_text(model, processor, samples):
    assert [
        (pieces, result.route)
        for pieces, result in split(model.stream_segment(samples(), processor, router="sam_only"))
    ] == [([], "shortcut"), ([], "shortcut")]


def test_pipeline(pipe, picture):
    arguments = {"prompt": "the odd one out", **REASONING}
    items = [picture(seed, (96, 96)) for seed in (0, 1)]
    expected = pipe(items, **arguments)
    ((pieces, result),) = split(pipe(items[0], stream=True, **arguments))
    assert "".join(pieces) == expected[0]["completion"]
    assert_equal(result, expected[0])
    groups = split(pipe(iter(items), stream=True, batch_size=8, **arguments))
    assert [result["completion"] for _, result in groups] == [other["completion"] for other in expected]
    assert split(pipe([], stream=True, **arguments)) == []


def test_pipeline_continues_after_an_item_with_an_error(pipe, picture):
    groups = split(pipe(["missing.png", picture(0)], prompt="red circle", **REASONING, stream=True))
    assert [(bool(pieces), result["error"] is None) for pieces, result in groups] == [
        (False, False),
        (True, True),
    ]


@pytest.mark.parametrize("close", ["close", "error"])
def test_generation_ends_when_the_stream_is_closed(model, processor, samples, close):
    """Also if the consumer fails, and the model is usable afterwards."""
    steps = []
    handle = model.vlm.lm_head.register_forward_hook(lambda *_: steps.append(1))
    try:
        items = model.stream_segment(
            samples(), processor, router="full_reasoning", generation_config={"max_new_tokens": 700}
        )
        assert isinstance(next(items), str)
        if close == "close":
            items.close()
        else:
            with pytest.raises(RuntimeError, match="mine"):
                items.throw(RuntimeError("mine"))
        count = len(steps)
        assert count < 700
        assert not [thread for thread in threading.enumerate() if thread.name == "conceptseg-stream"]
        assert len(steps) == count
    finally:
        handle.remove()
    assert len(split(model.stream_segment(samples(), processor, **REASONING))) == 2


def test_an_error_of_the_model_reaches_the_consumer(model, processor, samples):
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the head failed")

    handle = model.vlm.lm_head.register_forward_hook(fail)
    items = model.stream_segment(samples(), processor, **REASONING)
    received = []
    try:
        with pytest.raises(RuntimeError, match="the head failed"):
            received.extend(items)
    finally:
        handle.remove()
    assert len(calls) == 5
    assert not [thread for thread in threading.enumerate() if thread.name == "conceptseg-stream"]
    assert model.vlm.model.rope_deltas is None
    assert len(split(model.stream_segment(samples(), processor, **REASONING))) == 2


def test_another_engine_gives_one_piece(model, processor, samples):
    class OwnEngine:
        name = "own"

        def generate(self, model, processor, samples, generation_config=None):
            ids = processor.tokenizer("<answer> star </answer>", return_tensors="pt")["input_ids"]
            states = torch.ones(*ids.shape, model.config.hidden_size)
            return GeneratedCompletions(ids, torch.ones_like(ids, dtype=torch.bool), states)

    model.set_vlm_engine(OwnEngine())
    try:
        groups = split(model.stream_segment(samples(), processor, router="full_reasoning"))
    finally:
        model.set_vlm_engine("transformers")
    assert [pieces for pieces, _ in groups] == [["<answer> star </answer>"]] * 2


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"router": "both"}, "unknown mode 'both'"),
        ({"batch_size": 2}, "batch_size and on_text do not apply"),
        ({"sam_prompt": "x"}, "sam_prompt is 'x'"),
    ],
)
def test_invalid_arguments_are_reported_at_once(model, processor, samples, arguments, fault):
    with pytest.raises(ValueError, match=fault):
        model.stream_segment(samples(), processor, **arguments)


def test_invalid_inputs_and_arguments_of_the_pipeline(model, pipe, picture):
    with pytest.raises(ValueError, match="pass the processor's output"):
        model.stream_segment()
    with pytest.raises(ValueError, match="unknown mode 'both'"):
        pipe(picture(0), prompt="x", router="both", stream=True)
    with pytest.raises(TypeError, match="unknown argument 'promt'"):
        pipe(picture(0), promt="x", stream=True)


def test_incomplete_characters_are_held_back():
    parts = {1: b"caf", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"!", 9: b""}
    received = []
    pieces = TextPieces(
        lambda ids: b"".join(parts[int(i)] for i in ids).decode(errors="replace"), received.append
    )
    ids, mask = torch.tensor([[1, 2, 3, 4, 9]]), torch.tensor([[True, True, True, True, False]])
    for length in range(1, 6):
        pieces.update(ids[:, :length], mask[:, :length])
    pieces.finish("café!")
    assert received == ["caf", "é", "!"]


def test_autocast_of_the_caller_applies():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        *_, dtype = stream_call(lambda on_text: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
    assert dtype == torch.bfloat16
    *_, dtype = stream_call(lambda on_text: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
    assert dtype == torch.float32
