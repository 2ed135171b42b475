"""Tests for the training of coprs-nano: examples, features, resuming, and the checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conceptseg_hf import (
    ConceptSegConfig,
    ConceptSegForSegmentation,
    CoPRSForSegmentation,
    Reference,
    nano_checkpoint,
)
from conceptseg_hf.data import ConceptShapes

pytest.importorskip("trl", "1.16")
from conceptseg_trainers.coprs_nano import report
from conceptseg_trainers.coprs_nano.__main__ import main
from conceptseg_trainers.coprs_nano.measuring import measure, summarize
from conceptseg_trainers.coprs_nano.photographs import PhotosPriorData
from conceptseg_trainers.coprs_nano.stage import (
    PriorData,
    PriorSettings,
    PriorStage,
    build_model,
    ideal_prior,
)
from conceptseg_trainers.coprs_nano.tokenizers import build_photos_processor, build_processor
from conceptseg_trainers.from_scratch import precision
from conceptseg_trainers.from_scratch.loop import Schedule, TrainingState, train
from conceptseg_trainers.from_scratch.vlm_examples import patches
from conceptseg_trainers.mini.tokenizers import mini_processor
from conceptseg_trainers.nano.vlm_data import RANDOM_CHOICE_FAMILIES

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from trees import write_photos


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture
def make_stage(processor):
    def make(steps: int = 40, **settings) -> PriorStage:
        torch.seed()  # a resumed run is another process: only the seed of the stage determines the new weights
        start = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
        model = build_model(start, processor)
        prior_settings = PriorSettings(**settings)
        data = PriorData(steps, processor, held_out=3, settings=prior_settings, count=3)
        return PriorStage(model, processor, data, steps, settings=prior_settings)

    return make


def test_examples_equal_the_inputs_of_the_processor(make_stage, processor) -> None:
    data = make_stage().data
    unknown = processor.tokenizer.unk_token_id
    for number in range(12):
        task = data.tasks.task(number)
        example = data.writer.reasoning(np.random.default_rng(0), task)
        references = [Reference(Image.fromarray(scene.pixels), box=box) for scene, box in task.references]
        sample = processor.prepare(Image.fromarray(task.scene.pixels), task.prompt, references)
        assert sample.input_ids.tolist() == example.prompt
        torch.testing.assert_close(patches(example.images, 8, "cpu"), sample.pixel_values, atol=1e-5, rtol=0)
        assert unknown not in example.completion
        assert example.completion[-2:] == [processor.ref_pos_token_id, processor.tokenizer.eos_token_id]
        completion = processor.decode_completion(example.completion)
        assert completion.is_valid and completion.think.split() == task.think.split()


def test_perception_examples_have_a_mask_per_token(make_stage, processor) -> None:
    data = make_stage().data
    rng = np.random.default_rng(0)
    for several in (False, True):
        scene = data.tasks.task(7).scene
        example = data.writer.positions(rng, scene, several)
        assert example.completion.count(processor.ref_pos_token_id) == len(example.masks) > 0
        assert all(mask.any() for mask in example.masks)


def test_examples_of_random_choices_and_without_reasoning(make_stage, processor) -> None:
    """Only the chosen families describe another object; its mask belongs to its description."""
    plain, random, silent = (
        make_stage().data,
        make_stage(random_choice_families=RANDOM_CHOICE_FAMILIES).data,
        make_stage(with_reasoning=False).data,
    )
    differing = 0
    for number in range(60):
        task = plain.tasks.task(number)
        chosen = random._chosen(number)
        assert plain._chosen(number) is None and random._chosen(number) == chosen
        assert (chosen is not None) == (plain.tasks.family(number) in RANDOM_CHOICE_FAMILIES)
        if chosen is None:
            continue
        example = random.writer.reasoning(np.random.default_rng(0), task, chosen)
        item = task.scene.objects[chosen]
        assert np.array_equal(example.masks[0], item.mask) and item.mask.any()
        think = processor.decode_completion(example.completion).think
        assert think.split()[-1] in item.look.phrase.split()
        differing += not np.array_equal(item.mask, task.mask)
    assert differing > 5
    task = plain.tasks.task(3)
    example = silent.writer.reasoning(np.random.default_rng(0), task, None, False)
    completion = processor.decode_completion(example.completion)
    assert completion.is_valid and completion.think == "" and np.array_equal(example.masks[0], task.mask)
    assert [target.position for target in example.attention_targets] == [len(example.completion) - 1]


def test_the_prior_loss_can_be_left_out(make_stage) -> None:
    whole, without = make_stage(), make_stage(prior_weight=0.0)
    (loss, metrics), (other, _) = whole.loss(3), without.loss(3)
    assert metrics["prior"] > 0.1
    assert loss.item() - other.item() == pytest.approx(metrics["prior"], abs=1e-4)


def test_features_equal_those_of_the_model(make_stage, processor, monkeypatch) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: False)
    stage = make_stage()
    image = stage.data.tasks.task(0).scene.pixels
    expected = stage.model.encode_image(processor.sam_pixels(Image.fromarray(image))[None])
    for level, other in zip(stage._encode([image]).levels, expected.levels, strict=True):
        torch.testing.assert_close(level, other, atol=1e-4, rtol=1e-4)


def test_resume_is_exact_and_the_backbone_is_frozen(make_stage, tmp_path) -> None:
    schedule = Schedule(2, learning_rate=1e-3, warmup=1, evaluate_every=100, save_every=1)
    whole = make_stage()
    backbone = {
        name: value.clone() for name, value in whole.model.sam.vision_encoder.backbone.state_dict().items()
    }
    level = whole.model.sam.vision_encoder.neck.fpn_layers[0].proj1.weight.clone()
    train(whole, schedule, tmp_path / "whole", report=lambda line: None)
    first = make_stage()
    state = TrainingState(first.module, schedule, tmp_path / "parts" / "prior" / "state.safetensors")
    state.path.parent.mkdir(parents=True)
    first.module.train()
    state.update(first.loss(0)[0])
    state.save()
    second = make_stage()
    train(second, schedule, tmp_path / "parts", report=lambda line: None)
    weights = second.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in whole.model.state_dict().items())
    after = whole.model.sam.vision_encoder
    assert all(torch.equal(value, backbone[name]) for name, value in after.backbone.state_dict().items())
    assert not torch.equal(after.neck.fpn_layers[0].proj1.weight, level)


def test_checkpoint_is_small_and_loads_in_float32(make_stage, tmp_path) -> None:
    stage = make_stage()
    report.write_checkpoint(stage.model, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 8_000_000
    model = CoPRSForSegmentation.from_pretrained(tmp_path)
    weight = stage.model.prior.query_head.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.prior.query_head.weight, weight.half().float())
    rows = measure(model, model.processor, ConceptShapes("test", size=128), 3)
    summary = summarize(rows, resamples=10)
    table = report.markdown(summary, {})
    assert [row.sample_id for row in rows] == [f"test-{i:06d}" for i in range(3)]
    assert "| CI | 1 | - |" in table and "Correlation of prior IoU and mask IoU" in table


def test_report_measures_the_embedded_checkpoint(tmp_path, capsys) -> None:
    report.main(["--samples", "2", "--output-dir", str(tmp_path)])
    table = capsys.readouterr().out
    assert table == (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| CI | 2 | 0." in table  # 2 of 8 samples
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--samples", "2"])
    assert "is not a checkpoint; train one with `make coprs-nano`" in capsys.readouterr().err


def test_ideal_prior_is_the_mask_at_the_resolution_of_the_keys() -> None:
    masks = torch.zeros(1, 128, 128, dtype=torch.bool)
    masks[0, 32:64, 64:96] = True
    prior = ideal_prior(masks)
    assert prior.shape == (1, 1, 64, 64)
    inside = prior[0, 0, 18:30, 34:46]
    assert (inside > 3).all() and (prior[0, 0, :12] < -3).all()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    datasets = (
        ("coco128", "CI", ("bus", "clock") * 6),
        ("ecssd", "CD", ("salient object segmentation",) * 10),
        ("kvasir-seg", "CD", ("polyp colon segmentation",) * 10),
    )
    return write_photos(tmp_path_factory.mktemp("photos"), datasets)


def test_examples_of_photographs_equal_the_inputs_of_the_processor(photos) -> None:
    processor = build_photos_processor()
    data = PhotosPriorData(photos, 40, processor)
    unknown, references = processor.tokenizer.unk_token_id, 0
    for number in range(12):
        task = data.tasks.task(number)
        example = data.writer.task(task)
        sample = processor.prepare(Image.fromarray(task.pixels), task.prompt, task.references)
        assert sample.input_ids.tolist() == example.prompt
        torch.testing.assert_close(patches(example.images, 14, "cpu"), sample.pixel_values, atol=1e-5, rtol=0)
        assert unknown not in example.completion and np.array_equal(example.masks[0], task.mask)
        assert example.completion[-2:] == [processor.ref_pos_token_id, processor.tokenizer.eos_token_id]
        completion = processor.decode_completion(example.completion)
        assert completion.is_valid and completion.think.endswith(task.answer)
        references += bool(task.references)
    assert references
    for step in range(2):  # perception
        for example in data.examples(step):
            assert example.completion.count(processor.ref_pos_token_id) == len(example.masks)
            assert all(mask.any() for mask in example.masks)


@pytest.mark.slow
@pytest.mark.heavy
def test_command_trains_on_photographs_from_mini(photos, tmp_path, monkeypatch) -> None:
    start = ConceptSegForSegmentation(ConceptSegConfig.from_preset("mini"))
    start.save_pretrained(tmp_path / "start")
    mini_processor().save_pretrained(tmp_path / "start")
    options = [
        "--photos",
        str(photos),
        "--start",
        str(tmp_path / "start"),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    monkeypatch.setattr(sys, "argv", ["coprs_nano", "--scale", "0.001", "--threads", "1", *options])
    main()
    model = CoPRSForSegmentation.from_pretrained(tmp_path / "run" / "checkpoint")
    trained, before = (each.sam.vision_encoder.state_dict() for each in (model, start))
    name = "neck.fpn_layers.1.proj1.weight"  # the level of factor 2, which is frozen
    torch.testing.assert_close(trained[name], before[name], atol=1e-3, rtol=1e-2)
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text(encoding="utf-8")
    assert "coprs-mini - mini, reasoning" in card and "non-commercial" in card and "AUROC" in card
