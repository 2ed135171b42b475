"""Tests for the completion sources of stage I, and for the cache of generated completions."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from conceptseg_trainers.completions import (
    CompletionCache,
    ground_truth_completion,
    released_completion,
    template_completion,
)

from conceptseg_hf import nano_checkpoint, parse_completion
from conceptseg_hf.data import ConceptShapes, UnreadableSampleError
from conceptseg_hf.loading import load_model_and_processor

LENGTH = 12  # tokens


@pytest.fixture(scope="module")
def nano():
    return load_model_and_processor(nano_checkpoint(), "cpu")


@pytest.fixture(scope="module")
def samples():
    return list(ConceptShapes("train", length=5))


@pytest.fixture()
def prepared(processor):
    def prepare(sample):
        return processor.prepare(sample.image, sample.prompt, sample.references)

    return prepare


def test_ground_truth_completion_contains_the_fields_of_the_sample(samples, processor, prepared):
    for sample in samples:
        item = prepared(sample)
        completion = ground_truth_completion(sample, item.frame, processor)
        parsed = parse_completion(completion.text, processor.coordinate_scale, item.frame.proxy is not None)
        assert parsed.is_valid
        assert (parsed.think, parsed.rule, parsed.answer) == (sample.think, sample.rule, sample.answer)
        assert parsed.bbox == pytest.approx(item.frame.image_box_to_text(sample.box), abs=0.51)
        assert (completion.sam_text, completion.rule) == (sample.answer, sample.rule)


def test_template_completion_needs_no_texts(samples, processor, prepared):
    sample = replace(samples[0], think=None, rule=None, answer=None)
    frame = prepared(sample).frame
    completion = template_completion(sample, frame, processor)
    for name in ("think", "rule", "answer"):  # a single missing text is enough
        lacking = replace(samples[0], **{name: None})
        fallback = ground_truth_completion(lacking, frame, processor)
        assert fallback == template_completion(lacking, frame, processor)
        assert fallback.sam_text == (samples[0].prompt if name == "answer" else samples[0].answer)
    parsed = parse_completion(completion.text, processor.coordinate_scale)
    assert (parsed.think, parsed.answer, completion.sam_text) == ("", sample.prompt, sample.prompt)


def test_released_completion_is_a_box_between_blank_tags(samples, processor, prepared):
    """Blank think, color and answer tags around the ground-truth box, a Python list; the SAM 3 text is "visual"."""
    for sample in samples:
        frame = prepared(sample).frame
        box = (0, 0, 0, 0) if sample.box is None else frame.image_box_to_text(sample.box)
        numbers = [math.floor(value + 0.5) for value in box]
        completion = released_completion(sample, frame, processor)
        assert (
            completion.text == f" <think> </think> <color> </color><bbox>{numbers}</bbox> <answer> </answer>"
        )
        assert completion.sam_text == "visual"
    assert (
        released_completion(replace(samples[0], box=None), frame, processor).text.count("[0, 0, 0, 0]") == 1
    )


def test_generated_completion_without_answer_has_the_sam_text_of_inference(
    nano, samples, tmp_path, monkeypatch
):
    model, processor = nano
    cache = CompletionCache(tmp_path, model, processor, max_new_tokens=2)
    cache.generate(model, samples[:1])
    completion = cache.completion(samples[0])
    assert (completion.sam_text, completion.is_truncated) == (samples[0].prompt, True)
    monkeypatch.setattr(model.config, "missing_answer", "empty")
    assert cache.completion(samples[0]).sam_text == ""


def test_cache_distinguishes_boxes_and_mosaic_settings(nano, samples, tmp_path):
    model, processor = nano
    cache = CompletionCache(tmp_path, model, processor, max_new_tokens=2)
    sample = next(sample for sample in samples if sample.references)
    cache.generate(model, [sample])
    first, *remaining = sample.references
    x1, y1, x2, y2 = first.box
    middle = (x1 + x2) / 2
    halves = [(x1, y1, middle, y2), (middle, y1, x2, y2)]  # with the same enclosing box
    several = replace(sample, references=[replace(first, box=None, boxes=halves), *remaining])
    assert sample in cache and several not in cache
    bilinear = processor.with_settings(mosaic={"resampling": "bilinear"})
    assert len(CompletionCache(tmp_path, model, processor, 2)) == 1
    assert len(CompletionCache(tmp_path, model, bilinear, 2)) == 0


def test_absent_concept_has_an_empty_box(samples, processor, prepared):
    sample = replace(samples[0], box=None)
    completion = template_completion(sample, prepared(sample).frame, processor)
    assert "<bbox>[0,0,0,0]</bbox>" in completion.text


def test_generated_completions_match_inference(nano, samples, tmp_path):
    model, processor = nano
    cache = CompletionCache(tmp_path, model, processor, max_new_tokens=64)
    cache.generate(model, samples[:3], batch_size=2)
    results = model.segment(
        processor(
            [sample.image for sample in samples[:3]],
            [sample.prompt for sample in samples[:3]],
            [sample.references for sample in samples[:3]],
        ),
        router="full_reasoning",
        generation_config={"max_new_tokens": 64},
    )
    for sample, result in zip(samples, results):
        completion = cache.completion(sample)
        assert processor.tokenizer.decode(completion.text, skip_special_tokens=True) == result.completion
        assert (completion.sam_text, completion.rule) == (result.answer, result.rule)


def test_generation_resumes_after_a_kill(nano, samples, tmp_path, monkeypatch):
    model, processor = nano
    whole = CompletionCache(tmp_path / "whole", model, processor, LENGTH)
    whole.generate(model, samples, batch_size=2)

    folder = tmp_path / "killed"
    first = CompletionCache(folder, model, processor, LENGTH)
    first.generate(model, samples[:3], batch_size=2)
    path = folder / "completions-00000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20])  # interrupted within a line

    written = []
    complete = CompletionCache._complete
    monkeypatch.setattr(
        CompletionCache,
        "_complete",
        lambda self, model, batch: written.extend(batch.values()) or complete(self, model, batch),
    )
    second = CompletionCache(folder, model, processor, LENGTH)
    assert len(second) == 2
    second.generate(model, samples, batch_size=2)
    assert written == samples[2:]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["sample"] for row in rows] == [
        f"concept-shapes/train/{sample.sample_id}" for sample in samples
    ]
    assert [second.completion(sample) for sample in samples] == [
        whole.completion(sample) for sample in samples
    ]

    third = CompletionCache(folder, model, processor, LENGTH)
    third.generate(model, samples, batch_size=2)
    assert written == samples[2:]


def test_processes_share_the_samples(nano, samples, tmp_path):
    model, processor = nano
    caches = [CompletionCache(tmp_path, model, processor, LENGTH) for _ in range(2)]
    for process, cache in enumerate(caches):
        cache.generate(model, samples, process=process, processes=2)
    assert [len(cache) for cache in caches] == [3, 2]
    for cache in caches:
        cache.reload()
        assert all(sample in cache for sample in samples)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_another_policy_does_not_use_cached_completions(nano, samples, tmp_path):
    model, processor = nano
    CompletionCache(tmp_path, model, processor, LENGTH).generate(model, samples[:1])
    assert samples[0] in CompletionCache(tmp_path, model, processor, LENGTH)
    assert not len(CompletionCache(tmp_path, model, processor, LENGTH + 1))
    with torch.no_grad():
        model.vlm.get_input_embeddings().weight[0, 0] += 1
    try:
        assert not len(CompletionCache(tmp_path, model, processor, LENGTH))
    finally:
        with torch.no_grad():
            model.vlm.get_input_embeddings().weight[0, 0] -= 1


def changed_inputs(sample, other):
    """Return copies of a sample with the same name, each with one different input of the VLM."""
    reference = sample.references[-1]
    shifted = replace(reference, box=tuple(value + 1 for value in reference.box))
    return {
        "image": replace(sample, image=other.image),
        "prompt": replace(sample, prompt="another thing"),
        "no references": replace(sample, references=[]),
        "reference images": replace(sample, references=other.references),
        "order": replace(sample, references=sample.references[::-1]),
        "box": replace(sample, references=[*sample.references[:-1], shifted]),
        "proxy": replace(sample, references=[*sample.references[:-1], replace(reference, role="proxy")]),
    }


def test_completion_is_identified_by_the_inputs_of_the_vlm(nano, samples, tmp_path):
    """Two datasets with the same sample names may share a folder."""
    sample, other = (sample for sample in samples if len(sample.references) > 2)
    cache = CompletionCache(tmp_path, *nano, LENGTH)
    cache.generate(nano[0], [sample])
    for name, changed in changed_inputs(sample, other).items():
        assert changed not in cache, name
    assert replace(sample, dataset="another", think="not read by the VLM") in cache

    cache.generate(nano[0], [replace(other, sample_id=sample.sample_id)])
    alone = CompletionCache(tmp_path / "alone", *nano, LENGTH)
    alone.generate(nano[0], [other])
    assert cache.completion(other) == alone.completion(other)


def test_equal_samples_are_generated_once(nano, samples, tmp_path):
    cache = CompletionCache(tmp_path, *nano, LENGTH)
    cache.generate(nano[0], [samples[0], replace(samples[0], dataset="another")], batch_size=2)
    assert len((tmp_path / "completions-00000.jsonl").read_text().splitlines()) == 1


def test_lines_of_early_versions_are_ignored(nano, samples, tmp_path):
    cache = CompletionCache(tmp_path, *nano, LENGTH)
    row = {"sample": f"concept-shapes/train/{samples[0].sample_id}", "policy": cache.policy, "token_ids": [1]}
    (tmp_path / "completions-00000.jsonl").write_text(json.dumps(row) + "\n")
    cache.reload()
    assert not len(cache)
    cache.generate(nano[0], samples[:1])
    assert samples[0] in CompletionCache(tmp_path, *nano, LENGTH)


def test_broken_samples_are_skipped(nano, samples, tmp_path):
    """The replacement of a broken sample is generated once, at its own index."""

    class Broken(list):
        def __getitem__(self, index):
            if index == 0:
                raise UnreadableSampleError("the image is cut off")
            return super().__getitem__(index)

    cache = CompletionCache(tmp_path, *nano, LENGTH)
    cache.generate(nano[0], Broken(samples), batch_size=2)
    assert len(cache) == len(samples) - 1
    assert samples[0] not in cache and samples[1] in cache
