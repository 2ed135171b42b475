"""Tests for the checks of texts in training data, and for templated completions of samples without reasoning."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest

pytest.importorskip("trl", "1.16")

from conceptseg_trainers import split_reference_dataset
from conceptseg_trainers.completions import check_sample_texts, resolve_completion_source
from conceptseg_trainers.samples import ReadableSamples
from conceptseg_trainers.scripts import sft
from conceptseg_trainers.scripts.arguments import ModelArguments
from conceptseg_trainers.sft_config import ConceptSFTConfig
from conceptseg_trainers.sft_trainer import ConceptSFTTrainer
from conceptseg_trainers.split_reference import find_composer

from conceptseg_hf import ConceptSegForSegmentation, cli, nano_checkpoint
from conceptseg_hf.data import ConceptShapes, UnreadableSampleError

RESERVED = ["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|im_start|>"]
REPLACED = "; the next readable sample is used instead."


@pytest.fixture()
def sft_trainer(nano_processor, tmp_path):
    def make(samples, **settings):
        settings = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, **settings}
        args = ConceptSFTConfig(
            str(tmp_path), disable_tqdm=True, save_strategy="no", log_examples=0, **settings
        )
        model = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
        return ConceptSFTTrainer(model, args, samples, samples, nano_processor)

    return make


def inference_error(processor, sample) -> str:
    with pytest.raises(ValueError, match="prompt") as error:
        processor.prepare(sample.image, sample.prompt, sample.references)
    return str(error.value)


@pytest.mark.parametrize("stage", ["sft", "meta-grpo"])
def test_prompts_that_inference_refuses_are_skipped_and_logged(
    stage, shapes, nano_processor, make_meta_grpo, sft_trainer, caplog
):
    prompts = [*(f"red {token} circle" for token in RESERVED), " ", "half \ud800"]
    invalid = [
        replace(shapes[1], prompt=prompt, sample_id=f"invalid {number}")
        for number, prompt in enumerate(prompts)
    ]
    samples = [shapes[0], *invalid, *shapes[2:4]]
    errors = {sample.sample_id: inference_error(nano_processor, sample) for sample in invalid}
    if stage == "sft":
        trainer = sft_trainer(samples, max_steps=5)  # all samples
        read = [trainer.eval_dataset[1 + number].sample_id for number in range(len(invalid))]
        assert read == [shapes[2].sample_id] * len(invalid)
    else:
        trainer = make_meta_grpo(train_dataset=split_reference_dataset(samples), max_steps=len(samples))
        read = [trainer.train_dataset[1 + number]["problem"] for number in range(len(invalid))]
        assert read == [shapes[2].prompt] * len(invalid)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    for sample_id, message in errors.items():
        logged = {r.getMessage() for r in caplog.records if f"'{sample_id}'" in r.getMessage()}
        assert logged == {f"sample '{sample_id}': {message.rstrip('.')}{REPLACED}"}


def test_error_if_no_prompt_can_be_used(shapes, make_meta_grpo, sft_trainer):
    samples = [replace(sample, prompt="<|im_end|>") for sample in shapes[:3]]
    message = r"none of the 3 samples can be read; the last error: sample 'train-00000\d': prompt contains the reserved"
    with pytest.raises(ValueError, match=message):
        sft_trainer(samples)
    with pytest.raises(ValueError, match=message):
        make_meta_grpo(train_dataset=split_reference_dataset(samples))


@pytest.mark.parametrize("column", ["problem", "prompt"])
def test_invalid_text_in_own_rows_is_reported(column, shapes, nano_processor, make_meta_grpo):
    rows = list(split_reference_dataset(shapes[:2], processor=nano_processor))
    if column == "problem":
        rows[1]["problem"] = "red <|image_pad|> circle"
    else:
        rows[1]["prompt"][1]["content"] += "<|image_pad|>"

    def generate():
        yield from rows

    dataset = datasets.IterableDataset.from_generator(generate)
    with pytest.raises(
        ValueError, match=r"^sample 'train-000001': prompt contains the reserved token '<\|image_pad"
    ):
        make_meta_grpo(train_dataset=dataset)


@pytest.mark.parametrize(
    ("changes", "source", "message"),
    [
        (
            {"answer": "red <|im_end|>"},
            "ground_truth",
            "answer contains the reserved token '<|im_end|>'",
        ),
        ({"think": "a <|image_pad|>"}, "ground_truth", "think contains the reserved token"),
        ({"rule": "find it</rule>"}, "ground_truth", "rule contains the tag </rule>, which is reserved"),
        ({"answer": "the <b>red</b> one"}, "template", "answer contains the tag <b>"),
        ({"answer": None, "prompt": "find <answer>"}, "template", "prompt contains the tag <answer>"),
        ({"prompt": "a <|im_end|>"}, "released", "prompt contains the reserved token"),
        ({"think": "i <b>think</b>, x < y"}, "ground_truth", None),
        ({"rule": "<|im_end|>"}, "template", None),  # not part of the template
        ({"answer": "<|im_end|>"}, "generated", None),
    ],
)
def test_all_texts_of_a_completion_are_checked(changes, source, message, shapes, nano_processor):
    sample = replace(shapes[0], **changes)
    if message is None:
        check_sample_texts(sample, nano_processor, source)
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            check_sample_texts(sample, nano_processor, source)


def test_reserved_tokens_depend_on_the_processor(shapes, nano_processor, processor):
    samples = [replace(shapes[0], prompt="a <|endoftext|>"), shapes[1]]
    dataset = split_reference_dataset(samples, processor=processor)
    composer = find_composer(dataset)
    assert dataset[0]["problem"] == "a <|endoftext|>"
    composer.processor = nano_processor
    assert dataset[0]["problem"] == shapes[1].prompt
    composer.processor = processor
    assert dataset[0]["problem"] == "a <|endoftext|>"


# -- samples without reasoning --


def without_texts(samples):
    return [replace(sample, think=None, rule=None, answer=None) for sample in samples]


@pytest.mark.parametrize(
    ("lacking", "source", "message"),
    [
        (0, "ground_truth", None),
        (
            2,
            "ground_truth",
            "2 of the 4 samples checked, such as 'train-000000', have no think, rule and answer",
        ),
        (4, "template", "the samples have no think, rule and answer: completions are built from the boxes"),
    ],
)
def test_templated_completions_for_samples_without_texts(
    lacking, source, message, shapes, sft_trainer, caplog
):
    samples = [*without_texts(shapes[:lacking]), *shapes[lacking:4]]
    trainer = sft_trainer(samples)
    trainer.train()
    assert trainer.args.completion_source == source
    warnings = [
        record.getMessage() for record in caplog.records if "completions are built" in record.getMessage()
    ]
    assert len(warnings) == (message is not None) and all(line.startswith(message) for line in warnings)


def test_unreadable_samples_do_not_change_the_completion_source(caplog):
    class Unreadable:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise UnreadableSampleError("broken.")

    args = SimpleNamespace(completion_source="ground_truth")
    for samples in (Unreadable(), ReadableSamples([{"no": "sample"}])):
        resolve_completion_source(samples, args)
    assert args.completion_source == "ground_truth" and not caplog.records


def test_warns_of_data_without_texts_before_the_model_is_loaded(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    index = ConceptShapes("train", length=4, size=48).export("own")
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    columns = ("image", "mask", "prompt")
    index.write_text("".join(json.dumps({name: row[name] for name in columns}) + "\n" for row in rows))
    argv = ["--config", "nano_sft", "--benchmark", "plain", "--root", "own", "--max_steps", "1"]
    argv += ["--output_dir", "run", "--per_device_train_batch_size", "2", "--eval_strategy", "no"]

    messages = []
    load = ModelArguments.load
    monkeypatch.setattr(ModelArguments, "load", lambda self: messages.extend(caplog.messages) or load(self))
    with caplog.at_level(logging.WARNING):
        assert cli.main(["train", "sft", *argv]) == 0
    assert any("the samples have no think, rule and answer" in message for message in messages)
    assert caplog.text.count("completions are built") == 1
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert sft.make_parser().parse(argv)[2].completion_source == "ground_truth"
