"""Samples that cannot be read give way to others, the same ones in every process."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("datasets")

from conceptseg_trainers.samples import ReadableSamples, spread_indices

from conceptseg_hf import ConceptSegForSegmentation, nano_checkpoint
from conceptseg_hf.data import ConceptShapes, UnreadableSampleError, load_benchmark


class Broken:
    """ConceptShapes of which some samples cannot be read."""

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


def test_the_next_readable_sample_takes_the_place(caplog):
    samples = ReadableSamples(Broken(6, {1, 2, 5}))
    with caplog.at_level(logging.WARNING):
        found = [samples[index].sample_id for index in range(len(samples))]
    names = [sample.sample_id for sample in samples.samples.samples]
    assert found == [names[index] for index in (0, 3, 3, 3, 4, 0)]
    assert "sample 5: its image is cut off" in caplog.text
    assert samples[-1].sample_id == names[0]


def test_a_broken_sample_is_tried_and_named_once(caplog):
    samples = ReadableSamples(Broken(4, {2}))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            samples[2]
    assert len(caplog.records) == 1
    assert samples.samples.reads == 4


def test_the_order_of_reading_does_not_matter():
    one, other = (ReadableSamples(Broken(8, {0, 3, 4})) for _ in range(2))
    forwards = [one[index].sample_id for index in range(8)]
    backwards = [other[index].sample_id for index in reversed(range(8))]
    assert forwards == backwards[::-1]


def test_a_missing_file_of_ones_own_data_is_a_broken_sample(tmp_path, caplog):
    ConceptShapes("train", length=3, size=48).export(tmp_path)
    missing = sorted((tmp_path / "images").iterdir())[1]
    missing.unlink()
    with pytest.warns(UserWarning, match="1 of 3 samples lack files"):
        samples = ReadableSamples(load_benchmark("plain", tmp_path, split="train"))
    assert samples[1].sample_id == samples[2].sample_id
    assert f"sample {missing.stem!r}: image" in caplog.text


def test_nothing_to_read_is_an_error():
    with pytest.raises(ValueError, match="none of the 3 samples can be read; the last says: sample"):
        ReadableSamples(Broken(3, {0, 1, 2}))[0]
    with pytest.raises(IndexError):
        ReadableSamples(Broken(3, set()))[3]


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 5000])
def test_indices_are_spread_over_the_data(length):
    indices = spread_indices(length)
    assert indices[0] == 0 and indices[-1] == length - 1
    assert len(indices) == len(set(indices)) == min(length, 32)


def test_training_passes_over_what_cannot_be_read(make_meta_grpo):
    pytest.importorskip("trl")
    from conceptseg_trainers import split_reference_dataset

    samples = Broken(4, {1})
    samples.samples = ConceptShapes("train", length=4)
    trainer = make_meta_grpo(train_dataset=split_reference_dataset(samples), max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4


def test_an_offloaded_model_is_refused(make_meta_grpo):
    model = ConceptSegForSegmentation.from_pretrained(nano_checkpoint(), device_map={"ctm": "disk"})
    with pytest.raises(ValueError, match=r"MetaGRPOTrainer: weights of the model are offloaded.*DeepSpeed"):
        make_meta_grpo(model=model)
