"""Tests of the concept library, which is stored with the dataset."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from conceptseg_hf import ConceptPrompt
from conceptseg_hf.concept_prompt import CandidateScore

SCORES = (CandidateScore("scratch", 0.8, (0.8,)),)
CONCEPT = ConceptPrompt("the scratch", ("scratch",), "find scratches", score=0.8, scores=SCORES)

RENAME = """
import sys
import fiftyone as fo
from conceptseg_hf.integrations.fiftyone import delete_concept, rename_concept
dataset = fo.load_dataset(sys.argv[1])
rename_concept(dataset, "scratch", "deep scratch")
delete_concept(dataset, "dent")
"""


@pytest.fixture()
def dataset(fo, request):
    dataset = fo.Dataset(f"library-{request.node.name[:60]}")
    dataset.add_sample(fo.Sample(filepath="/nowhere/image.png"))
    yield dataset
    dataset.delete()


def stored(name: str, **changes):
    from conceptseg_hf.integrations.fiftyone import StoredConcept

    return replace(StoredConcept(name, CONCEPT, "nano"), **changes)


def test_concepts_are_stored_renamed_and_deleted(dataset):
    from conceptseg_hf.integrations.fiftyone import (
        concept_names,
        delete_concept,
        load_concept,
        rename_concept,
        save_concept,
    )

    assert concept_names(dataset) == []
    with pytest.raises(
        ValueError, match="'scratch' is not in the library of this dataset; induce or import one first"
    ):
        load_concept(dataset, "scratch")
    save_concept(
        dataset, stored("scratch", reference_ids=("a",), reference_label_field="boxes", negative_ids=("b",))
    )
    save_concept(dataset, stored("dent"))
    assert concept_names(dataset) == ["dent", "scratch"]
    found = load_concept(dataset, "scratch")
    assert found == stored(
        "scratch", reference_ids=("a",), reference_label_field="boxes", negative_ids=("b",)
    )
    with pytest.raises(ValueError, match="a concept 'dent' is already in the library"):
        rename_concept(dataset, "scratch", "dent")
    rename_concept(dataset, "scratch", "Kratzer, tief")
    assert load_concept(dataset, "Kratzer, tief") == replace(found, name="Kratzer, tief")
    with pytest.raises(
        ValueError, match="is not in the library of this dataset; use one of 'dent', 'Kratzer"
    ):
        delete_concept(dataset, "scratch")
    delete_concept(dataset, "dent")
    assert concept_names(dataset) == ["Kratzer, tief"] and len(dataset.list_runs()) == 1


@pytest.mark.parametrize("name", ["", " ", " x", "a\nb", "x" * 101])
def test_invalid_names(dataset, name):
    from conceptseg_hf.integrations.fiftyone import concept_names, save_concept

    with pytest.raises(ValueError, match="is invalid; use 1 to 100 characters"):
        save_concept(dataset, stored(name))
    assert concept_names(dataset) == []


def test_the_library_is_part_of_clones_and_exports(fo, dataset, tmp_path):
    from conceptseg_hf.integrations.fiftyone import delete_concept, load_concept, save_concept

    expected = stored("scratch", reference_ids=tuple(dataset.values("id")))
    save_concept(dataset, expected)
    clone = dataset.clone()
    dataset.export(str(tmp_path), dataset_type=fo.types.FiftyOneDataset, export_media=False)
    delete_concept(dataset, "scratch")
    read = fo.Dataset.from_dir(dataset_dir=str(tmp_path), dataset_type=fo.types.FiftyOneDataset)
    try:
        assert load_concept(clone, "scratch") == expected and load_concept(read, "scratch") == expected
        assert expected.present_references(read) == read.values("id")
    finally:
        clone.delete()
        read.delete()


def test_files_are_exported_and_imported(dataset, tmp_path):
    from conceptseg_hf.integrations.fiftyone import (
        concept_names,
        export_concept,
        import_concept,
        load_concept,
        save_concept,
    )

    save_concept(dataset, stored("scratch"))
    path = export_concept(dataset, "scratch", tmp_path / "s.safetensors")
    assert ConceptPrompt.load(path) == CONCEPT
    assert export_concept(dataset, "scratch", path) == path  # replaces a concept
    assert import_concept(dataset, path).name == "the scratch"  # its prompt
    assert import_concept(dataset, path, "again") == load_concept(dataset, "again") == stored("again")
    with pytest.raises(ValueError, match="a concept 'again' is already in the library"):
        import_concept(dataset, path, "again")
    (tmp_path / "other.safetensors").write_bytes(b"weights of someone")
    (tmp_path / "text.safetensors").write_bytes(path.read_bytes()[:60])
    CONCEPT.with_phrase("dent").save(tmp_path / "dent.safetensors")
    replace(CONCEPT, model_hash="0" * 16).save(tmp_path / "foreign.safetensors")
    for name, message in (
        ("none.safetensors", "is not a file"),
        ("other.safetensors", "is not a concept"),
        ("text.safetensors", "not a concept"),
        ("foreign.safetensors", "was made with other weights of SAM 3 or the CTM"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            import_concept(dataset, tmp_path / name, "new")
    for name, message in (
        ("other.safetensors", "already exists and is not a concept"),
        ("s.pt", r"does not end in \.safetensors"),
        ("no/s.safetensors", "folder '.*/no' does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            export_concept(dataset, "scratch", tmp_path / name)
    assert (tmp_path / "other.safetensors").read_bytes() == b"weights of someone"
    assert concept_names(dataset) == ["again", "scratch", "the scratch"]


def test_changes_of_other_processes_are_visible(dataset):
    """Also if the dataset was loaded before; a run that is stored afterwards keeps them."""
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, concept_names, load_concept, save_concept
    from conceptseg_hf.integrations.fiftyone.runs import catch_up, written_fields

    save_concept(dataset, stored("scratch"))
    save_concept(dataset, stored("dent"))
    subprocess.run([sys.executable, "-c", RENAME, dataset.name], check=True, timeout=600)
    assert (
        concept_names(dataset) == ["deep scratch"]
        and load_concept(dataset, "deep scratch").concept == CONCEPT
    )
    save_concept(dataset, stored("rust"))
    catch_up(dataset)
    SegmentationJob(prompt="x").keep(dataset)
    assert concept_names(dataset) == ["deep scratch", "rust"] and len(dataset.list_runs()) == 3
    assert written_fields(dataset, "concept") == {"concept"}


def test_damaged_and_large_concepts(dataset):
    import torch

    from conceptseg_hf.integrations.fiftyone import concept_names, delete_concept, load_concept, save_concept

    save_concept(dataset, stored("scratch"))
    [key] = dataset.list_runs()
    for file in (None, "no base64!", "AAAA"):
        config = dataset.get_run_info(key).config
        config.file = file
        dataset.update_run_config(key, config)
        with pytest.raises(ValueError, match=r"'scratch' is (damaged|not a concept)"):
            load_concept(dataset, "scratch")
    delete_concept(dataset, "scratch")
    large = replace(CONCEPT, concept_embeds=torch.zeros(300_000, 1))
    with pytest.raises(ValueError, match=r"has 12\d+ bytes, but a dataset stores at most 1000000"):
        save_concept(dataset, stored("large", concept=large))
    assert concept_names(dataset) == []


def test_default_fields_are_valid(fo):
    from conceptseg_hf.integrations.fiftyone.concept_library import default_field, default_name

    names = {"Deep scratch": "deep_scratch", "3 dots": "concept_3_dots", "!?": "concept", "Größe": "größe"}
    assert {name: default_field(name) for name in names} == names
    assert default_name(" the \n scratch\x00 ") == "the scratch" and default_name("x" * 200) == "x" * 100


def test_shown_references_are_the_most_useful_ones_that_are_present(fo, dataset):
    dataset.add_samples([fo.Sample(filepath=f"{number}.png") for number in range(7)])
    ids = dataset.values("id")[-7:]
    scores = (CandidateScore("scratch", 0.5, (0.9, 0.1, 0.7, 0.8, 0.2, 0.8, 0.6)),)
    concept = stored("scratch", concept=replace(CONCEPT, scores=scores), reference_ids=ids)
    assert concept.shown_references(dataset) == [ids[i] for i in (0, 2, 3, 5)]
    dataset.delete_samples([ids[0]])
    assert concept.shown_references(dataset) == [ids[i] for i in (2, 3, 5, 6)]
    edited = stored("scratch", concept=CONCEPT, reference_ids=ids)
    assert edited.shown_references(dataset) == ids[1:5]
    dataset.delete_samples(ids[2:5])
    assert concept.shown_references(dataset) == [ids[i] for i in (1, 5, 6)]
