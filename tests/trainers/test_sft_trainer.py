"""Tests for stage I: trained parameters, losses, saving, and resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import all_families
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conceptseg_hf import ConceptSegForSegmentation
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.evaluation import foreground_iou

pytest.importorskip("datasets")

from conceptseg_trainers.completions import TrainingCompletion
from conceptseg_trainers.sft_config import ConceptSFTConfig
from conceptseg_trainers.sft_trainer import ConceptSFTCollator, ConceptSFTTrainer

STEPS = 4


@pytest.fixture(scope="module")
def samples():
    return list(ConceptShapes("train", length=8, size=48))


@pytest.fixture()
def make_trainer(make_model, processor, samples, tmp_path):
    def make(folder="run", train=samples, evaluation=None, **settings):
        settings = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_steps": 2,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "disable_tqdm": True,
            "max_prompt_length": 400,
            **settings,
        }
        return ConceptSFTTrainer(
            make_model(),
            ConceptSFTConfig(output_dir=str(tmp_path / folder), **settings),
            train,
            evaluation,
            processor,
        )

    return make


def weights(trainer: ConceptSFTTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.concept_model.state_dict().items()}


@pytest.fixture()
def digest(weight_hash):
    return lambda trainer: weight_hash(trainer.concept_model.ctm)


@all_families
def test_only_the_ctm_is_trained(make_trainer):
    trainer = make_trainer()
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("ctm.")}
    assert not trainer.concept_model.vlm.training and not trainer.concept_model.sam.training
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["loss/dice"] + log["loss/focal"], abs=1e-4)
    assert 0 <= log["mask_iou"] <= 1


@all_families
def test_loss_matches_the_loss_of_the_model(make_trainer, samples):
    trainer = make_trainer()
    batch = trainer.data_collator(samples[:3])
    loss = trainer.compute_loss(trainer.model, dict(batch))
    examples, labels, ignored = (batch.pop(name) for name in ("shown", "mask_labels", "ignored"))
    output = trainer.concept_model(**batch, mask_labels=torch.stack(labels))
    assert [example.target for example in examples] == [sample.image for sample in samples[:3]]
    assert ignored == [None] * 3
    assert loss.item() == pytest.approx(output.loss.item(), abs=1e-5)


def test_released_loss_is_a_binary_cross_entropy(make_trainer, samples):
    trainer = make_trainer(dice_weight=0.0, focal_alpha=-1.0, focal_gamma=0.0)
    batch = trainer.data_collator(samples[:2])
    loss, masks = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    logits = trainer.concept_model(
        **{key: batch[key] for key in batch if key not in ("shown", "mask_labels", "ignored")}
    )
    full = torch.nn.functional.interpolate(logits.mask_logits, size=(48, 48), mode="bilinear")[:, 0]
    ground_truth = torch.stack(batch["mask_labels"]).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(full, ground_truth)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert all(np.array_equal(mask, row.detach().numpy() > 0) for mask, row in zip(masks, full))


def test_ctm_reads_the_end_of_turn_token_if_configured(make_trainer, samples, processor, monkeypatch):
    """As in the released code: all states after the prompt, in training and in inference."""
    plain = make_trainer(completion_source="template")
    assert not plain.data_collator.end_of_turn
    model = plain.concept_model
    model.config.end_of_turn_state = True
    trainer = ConceptSFTTrainer(model, plain.args, samples, None, processor)
    before, after = (each.data_collator(samples[:2]) for each in (plain, trainer))
    assert torch.equal(before["input_ids"], after["input_ids"])
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    added = after["completion_mask"] & ~before["completion_mask"]
    assert added.sum(1).tolist() == [1, 1] and (after["input_ids"][added] == end).all()
    assert not torch.equal(*(model(**_model_inputs(each)).concept_embeds for each in (before, after)))

    cut = TrainingCompletion(processor.tokenizer("a star")["input_ids"], "star", is_truncated=True)
    monkeypatch.setattr(trainer.data_collator, "row", lambda sample: (_prepared(processor, sample), cut))
    assert trainer.data_collator(samples[:1])["completion_mask"].sum() == 2, (
        "a truncated completion has no end-of-turn token"
    )


def test_max_completion_length_does_not_count_the_end_of_turn_token(make_trainer, samples, processor):
    trainer = make_trainer(completion_source="template")
    longest = int(trainer.data_collator(samples[:1])["completion_mask"].sum())
    trainer.data_collator.args.max_completion_length = longest
    trainer.data_collator.end_of_turn = True
    assert int(trainer.data_collator(samples[:1])["completion_mask"].sum()) == longest + 1
    trainer.data_collator.args.max_completion_length = longest - 1
    with pytest.raises(ValueError, match=f"a completion of {longest} tokens"):
        trainer.data_collator(samples[:1])


def _model_inputs(batch):
    return {key: batch[key] for key in batch if key not in ("shown", "mask_labels", "ignored")}


def _prepared(processor, sample):
    return processor.prepare(sample.image, sample.prompt, sample.references)


def test_batch_with_images_of_several_sizes(make_trainer, samples):
    mixed = [samples[0], next(iter(ConceptShapes("train", size=64)))]
    trainer = make_trainer()
    both = trainer.compute_loss(trainer.model, trainer.data_collator(mixed))
    alone = [trainer.compute_loss(trainer.model, trainer.data_collator([sample])) for sample in mixed]
    assert both.item() == pytest.approx(torch.stack(alone).mean().item(), abs=1e-4)


def test_checkpoints_contain_the_ctm_and_the_final_model_everything(make_trainer):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    with safe_open(folder / f"checkpoint-{STEPS}" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == {f"ctm.{name}" for name in trainer.concept_model.ctm.state_dict()}
    loaded = ConceptSegForSegmentation.from_pretrained(folder)
    for name, value in weights(trainer).items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    config = json.loads((folder / "config.json").read_text())
    assert "use_cache" not in config and (folder / "processor_config.json").is_file()


def test_model_card_names_the_license_of_sam(make_trainer, monkeypatch):
    monkeypatch.setattr("conceptseg_hf.cards._holds_released_sam", lambda *_: True)
    trainer = make_trainer()
    trainer.save_model()
    path = Path(trainer.args.output_dir) / "README.md"
    saved = path.read_text()
    # As in `push_to_hub`; the card of the Trainer would replace ours.
    trainer.create_model_card(model_name="run", license="mit", tags="mine", dataset="me/data", tasks="x")
    card = ModelCard.load(path)
    assert (card.data.license, card.data.license_name) == ("other", "sam-license")
    assert "Stage I:" in card.text and card.text == ModelCard(saved).text and "mine" in card.data.tags


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_is_exact(make_trainer, digest, accumulation):
    # With 8 samples and accumulation, step 2 ends an epoch, and the resumed run starts with the next one.
    settings = {"gradient_accumulation_steps": accumulation}
    whole = make_trainer("whole", **settings)
    whole.train()
    resumed = make_trainer("resumed", **settings)
    assert digest(resumed) != digest(whole)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert digest(resumed) == digest(whole)


def test_dataloader_workers_do_not_change_the_result(make_trainer, digest):
    without, with_workers = make_trainer("without"), make_trainer("with", dataloader_num_workers=2)
    for trainer in (without, with_workers):
        trainer.train()
    assert digest(without) == digest(with_workers)


def test_generated_completions_are_used_and_cached(make_trainer, samples, digest):
    settings = {"completion_source": "generated", "max_completion_length": 6, "generation_batch_size": 4}
    trainer = make_trainer(evaluation=samples[:2], **settings)
    folder = Path(trainer.args.output_dir) / "completions"
    cached = (folder / "completions-00000.jsonl").read_bytes()
    assert len(cached.splitlines()) == len(samples)  # including the two evaluation samples
    _, completion = trainer.data_collator.row(samples[0])
    assert completion.text == json.loads(cached.splitlines()[0])["token_ids"]
    with pytest.raises(ValueError, match="completion_source is generated, but cache is None"):
        replace(trainer.data_collator, cache=None).row(samples[0])
    trainer.train()
    # Only the CTM has changed and not the VLM, so nothing is generated again.
    resumed = make_trainer(evaluation=samples[:2], **settings)
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    assert digest(resumed) == digest(trainer)
    assert (folder / "completions-00000.jsonl").read_bytes() == cached


def test_checkpoint_of_another_ctm_is_refused(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    path = Path(trainer.args.output_dir) / "checkpoint-2" / "model.safetensors"
    state = load_file(path)
    state.pop("ctm.queries")
    save_file(state, path)
    with pytest.raises(ValueError, match=r"ctm\.queries"):
        make_trainer().train(resume_from_checkpoint=str(path.parent))


def test_references_are_composed_in_each_epoch(make_trainer, samples):
    sample = next(sample for sample in samples if len(sample.references) > 2)
    collator = make_trainer().data_collator

    def mosaic(epoch):
        collator.set_epoch(epoch)
        prepared, _ = collator.row(sample)
        return prepared.vlm_images[0].tobytes()

    mosaics = [mosaic(epoch) for epoch in range(8)]
    assert len(set(mosaics)) > 1
    assert mosaics == [mosaic(epoch) for epoch in range(8)]
    collator.set_epoch(3)
    prepared, completion = collator.row(sample)
    # The completion matches the mosaic: the check box is the box of the proxy query in this epoch.
    parsed = collator.processor.decode_completion(
        collator.processor.tokenizer(completion.text)["input_ids"], prepared
    )
    assert prepared.frame.check_iou(parsed.check) > 0.5


def test_collator_gets_the_epoch_after_resuming(make_trainer):
    epochs = []

    class RecordingCollator(ConceptSFTCollator):
        def __call__(self, batch):
            epochs.append(self.epoch)
            return super().__call__(batch)

    trainer = make_trainer(max_steps=6, save_steps=5)
    trainer.data_collator.__class__ = RecordingCollator
    trainer.train()
    assert epochs[:4] == [0] * 4 and set(epochs[4:]) == {1}  # batches are prefetched
    epochs.clear()
    resumed = make_trainer(max_steps=6)
    resumed.data_collator.__class__ = RecordingCollator
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-5"))
    assert set(epochs) == {1}


def test_evaluation_logs_mask_iou_and_example_images(make_trainer, samples):
    trainer = make_trainer(evaluation=samples[:3], per_device_eval_batch_size=2, log_examples=2)
    shuffle = trainer.data_collator.shuffle
    metrics = trainer.evaluate()
    masks = [
        mask
        for index in range(3)
        for mask in trainer.compute_loss(
            trainer.model.eval(), trainer.get_eval_dataloader().collate_fn([samples[index]]), True
        )[1]
    ]
    ground_truths = [np.asarray(sample.mask) >= 128 for sample in samples]
    expected = np.mean(
        [foreground_iou(mask, ground_truth) for mask, ground_truth in zip(masks, ground_truths)]
    )
    assert metrics["eval_mask_iou"] == pytest.approx(expected, abs=1e-6)
    assert trainer.data_collator.shuffle is shuffle
    assert len(list((Path(trainer.args.output_dir) / "examples").glob("*.png"))) == 2


def test_ignored_pixels_have_no_effect(make_trainer, samples):
    """The ground truth at ignored pixels has no effect."""
    left, other = Image.new("L", (48, 48)), samples[0].mask.copy()
    for mask in (left, other):
        mask.paste(255, (0, 0, 24, 48))
    losses, ious = [], []
    for mask, ignore in ((samples[0].mask, left), (other, left), (other, None)):
        trainer = make_trainer(train=[replace(samples[0], mask=mask, ignore=ignore)], max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        ious.append(trainer.state.log_history[0]["mask_iou"])
    assert losses[0] == losses[1] != losses[2]
    assert ious[0] == ious[1]


BROKEN = {
    "mask": (
        lambda sample: {"mask": sample.mask.resize((24, 24))},
        r"its mask has 24 x 24 pixels, but its image has 48 x 48",
    ),
    "ignore mask": (
        lambda sample: {"ignore": sample.mask.resize((24, 24))},
        r"its ignore mask has 24 x 24 pixels",
    ),
    "box": (lambda sample: {"box_only": True}, "has a box and no mask"),
    "prompt": (lambda sample: {"prompt": "the red circle " * 200}, "more than max_prompt_length = 400"),
    "think": (lambda sample: {"think": "the red circle " * 300}, "more than max_completion_length = 768"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_bad_samples_are_reported_before_training(make_trainer, samples, fault):
    change, message = BROKEN[fault]
    with pytest.raises(ValueError, match=message):
        make_trainer(train=[samples[0], replace(samples[1], **change(samples[1]))])


def test_bad_arguments_are_reported(make_trainer, make_model, processor, samples, tmp_path):
    with pytest.raises(ValueError, match="no samples"):
        make_trainer(train=[])
    with pytest.raises(ValueError, match="sample 0 is a dict; pass ConceptSamples"):
        make_trainer(train=[{"image": None}])
    with pytest.raises(ValueError, match="completion_source is 'true'"):
        ConceptSFTConfig(output_dir=str(tmp_path), completion_source="true")
    with pytest.raises(ValueError, match="ConceptSegProcessor"):
        ConceptSFTTrainer(make_model(), ConceptSFTConfig(output_dir=str(tmp_path)), samples)
    with pytest.raises(ValueError, match="ConceptSegForSegmentation"):
        ConceptSFTTrainer(make_model().vlm, ConceptSFTConfig(output_dir=str(tmp_path)), samples)
    several = ConceptSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    several._n_gpu = 2
    with pytest.raises(ValueError, match="one process sees 2 GPUs"):
        ConceptSFTTrainer(make_model(), several, samples, processing_class=processor)
