"""Tests that unreadable samples are replaced deterministically, and for the checks of models and data."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
from PIL import Image
from torch.utils.data import ConcatDataset

pytest.importorskip("datasets")

from conceptseg_trainers.samples import ReadableSamples, spread_indices, warn_of_shared_images

from conceptseg_hf import ConceptSegForSegmentation, Reference, nano_checkpoint
from conceptseg_hf.data import ConceptShapes, UnreadableSampleError, load_benchmark


class Broken:
    """ConceptShapes with some unreadable samples."""

    def __init__(self, length: int, broken: set[int]) -> None:
        self.samples = ConceptShapes("train", length=length, size=48)
        self.broken = broken
        self.reads = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        self.reads += 1
        if index in self.broken:
            raise UnreadableSampleError(f"sample {index}: its image is cut off; replace the file.")
        return self.samples[index]


def test_broken_sample_is_replaced_by_the_next_readable_one(caplog):
    samples = ReadableSamples(Broken(6, {1, 2, 5}))
    with caplog.at_level(logging.WARNING):
        sample_ids = [samples[index].sample_id for index in range(len(samples))]
    names = [sample.sample_id for sample in samples.samples.samples]
    assert sample_ids == [names[index] for index in (0, 3, 3, 3, 4, 0)]
    assert "sample 5: its image is cut off" in caplog.text
    assert samples[-1].sample_id == names[0]


def test_broken_sample_is_read_and_logged_once(caplog):
    samples = ReadableSamples(Broken(4, {2}))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            samples[2]
    assert len(caplog.records) == 1
    assert samples.samples.reads == 4


def test_replacement_does_not_depend_on_the_reading_order():
    one, other = (ReadableSamples(Broken(8, {0, 3, 4})) for _ in range(2))
    forwards = [one[index].sample_id for index in range(8)]
    backwards = [other[index].sample_id for index in reversed(range(8))]
    assert forwards == backwards[::-1]


def test_missing_file_is_a_broken_sample(tmp_path, caplog):
    ConceptShapes("train", length=3, size=48).export(tmp_path)
    missing = sorted((tmp_path / "images").iterdir())[1]
    missing.unlink()
    with pytest.warns(UserWarning, match="1 of 3 samples lack files"):
        samples = ReadableSamples(load_benchmark("plain", tmp_path, split="train"))
    assert samples[1].sample_id == samples[2].sample_id
    assert f"sample {missing.stem!r}: image" in caplog.text


@pytest.fixture()
def class_of_images(tmp_path):
    """A class with 8 images in the authors' layout; the mask of one of them is a photo of another size."""
    items = []
    for number, sample in enumerate(ConceptShapes("train", length=8, size=48)):
        item = {"img_path": [f"image/{number}.png"], "mask_path": f"mask/{number}.png", "cls_name": "shape"}
        items.append(item | {"dataset_name": "fewshot1000"})
        for folder in ("image", "mask"):
            (tmp_path / folder).mkdir(exist_ok=True)
        sample.image.save(tmp_path / item["img_path"][0])
        mask = Image.new("L", (48, 48))
        mask.paste(255, (4, 4, 20 + number, 30))
        mask.save(tmp_path / item["mask_path"])
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "mask/5.png")
    (tmp_path / "all_meta.json").write_text(json.dumps({"train": {"shape": items}, "test": {}}))
    return tmp_path


def test_bad_reference_does_not_stop_the_training(class_of_images, make_meta_grpo, nano_processor, tmp_path):
    pytest.importorskip("trl")
    from conceptseg_trainers import ConceptSFTConfig, ConceptSFTTrainer, split_reference_dataset

    samples = load_benchmark("fewshot1000", class_of_images, split="train")
    reference_names = [file.image.name for item in samples.items for file in samples.references_of(item)]
    assert "5.png" in reference_names
    with pytest.warns(
        UserWarning, match=r"fewshot1000: a reference cannot be used.*5\.png' is a photo, not a mask"
    ):
        dataset = split_reference_dataset(samples)
        trainer = make_meta_grpo(train_dataset=dataset, max_steps=2)
    rows = [dataset[index] for index in range(8)]
    assert all(row["gt_check_box"] is not None and len(row["images"]) == 2 for row in rows)
    assert [row["sample_id"] for row in rows[4:7]] == ["000004-4", "000006-6", "000006-6"], (
        "the target is replaced"
    )
    trainer.train()
    assert trainer.state.global_step == 2

    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    settings |= {"completion_source": "template", "report_to": [], "save_strategy": "no"}
    args = ConceptSFTConfig(str(tmp_path / "sft"), **settings)
    model = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    trainer = ConceptSFTTrainer(model, args, samples, processing_class=nano_processor)
    trainer.train()
    assert trainer.state.global_step == 2


def test_bad_references_of_own_samples_are_dropped(tmp_path, caplog):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    sample = next(
        sample for sample in ConceptShapes("train", length=8, size=48) if len(sample.references) > 1
    )
    bad = [
        Reference(tmp_path / "broken.png"),
        {"image": sample.image, "mask": str(tmp_path / "empty.png")},
        Reference(sample.image, box=(90, 90, 99, 99)),
    ]
    samples = ReadableSamples([replace(sample, references=[bad[0], *sample.references, *bad[1:]])])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert samples[0].references == sample.references and samples[0].references_lost == 3
    assert len(caplog.records) == 3, "each is logged once"
    assert "lies outside its image of 48 x 48 pixels" in caplog.text
    assert f"sample {sample.sample_id!r} is used without a reference: image" in caplog.text
    assert "broken.png' cannot be read" in caplog.text and "empty.png' is empty" in caplog.text


def test_warns_if_evaluation_images_are_training_images(tmp_path, caplog):
    ConceptShapes("train", length=3, size=48).export(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    listed = [
        (rows[0], "train"),
        (rows[1], "train"),
        (rows[1] | {"sample_id": "again"}, "val"),
        (rows[2], "val"),
    ]
    text = "".join(json.dumps(row | {"split": split}) + "\n" for row, split in listed)
    (tmp_path / "samples.jsonl").write_text(text)
    train, evaluation = (load_benchmark("plain", tmp_path, split=split) for split in ("train", "val"))
    with caplog.at_level(logging.WARNING):
        warn_of_shared_images(train, ConcatDataset([evaluation, ConceptShapes("val", length=1)]))
    image = str(train.items[1].image)
    assert f"1 of the 2 evaluation images, such as {image!r}, are also training images" in caplog.text
    caplog.clear()
    warn_of_shared_images(ConceptShapes("train", length=2), evaluation)
    assert not caplog.records


def test_error_if_no_sample_can_be_read():
    with pytest.raises(ValueError, match="none of the 3 samples can be read; the last error: sample"):
        ReadableSamples(Broken(3, {0, 1, 2}))[0]
    with pytest.raises(IndexError):
        ReadableSamples(Broken(3, set()))[3]


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 5000])
def test_spread_indices(length):
    indices = spread_indices(length)
    assert indices[0] == 0 and indices[-1] == length - 1
    assert len(indices) == len(set(indices)) == min(length, 32)


def test_training_skips_unreadable_samples(make_meta_grpo):
    pytest.importorskip("trl")
    from conceptseg_trainers import split_reference_dataset

    samples = Broken(4, {1})
    samples.samples = ConceptShapes("train", length=4)
    trainer = make_meta_grpo(train_dataset=split_reference_dataset(samples), max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4


def test_offloaded_model_is_refused(make_meta_grpo):
    model = ConceptSegForSegmentation.from_pretrained(nano_checkpoint(), device_map={"ctm": "disk"})
    with pytest.raises(ValueError, match=r"MetaGRPOTrainer: weights of the model are offloaded.*DeepSpeed"):
        make_meta_grpo(model=model)
