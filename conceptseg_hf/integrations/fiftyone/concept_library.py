"""Concept library of a dataset: concepts that were induced from its samples or imported from files.

A concept is stored as a custom run of the dataset, with the content of its `.safetensors` file as base64 text. It is
therefore part of clones and of exports in FiftyOne's own format, and needs no file on any machine.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fiftyone as fo
from bson import ObjectId

from ...concept_prompt import NUM_EXAMPLES, ConceptPrompt, best_indices
from .checkpoints import NANO, fault_of, fault_of_concept
from .runs import catch_up, stored_settings
from .schema import whole_dataset

METHOD = "induce_concept"
"""Method of the custom runs that store concepts."""

_MAX_BYTES = 1_000_000  # of a concept's file; a document of the database holds at most 16 MB
_MAX_NAME = 100  # characters


@dataclass(frozen=True)
class StoredConcept:
    """A concept in the library of a dataset.

    Attributes:
        name: Name in the library.
        concept: The concept.
        checkpoint: Checkpoint that it was induced with: `"nano"`, a folder or a hub id.
        reference_ids: Ids of the samples that it was induced from or verified on, in the order of its scores.
        reference_label_field: Field with the boxes or masks that mark the concept in these samples.
        negative_ids: Ids of the samples without the concept.
    """

    name: str
    concept: ConceptPrompt
    checkpoint: str = NANO
    reference_ids: Sequence[str] = ()
    reference_label_field: str | None = None
    negative_ids: Sequence[str] = ()

    def present_references(self, samples: fo.core.collections.SampleCollection) -> list[str]:
        """Return the ids of the references that are still in the dataset."""
        return _present(samples, self.reference_ids)

    def shown_references(self, samples: fo.core.collections.SampleCollection) -> list[str]:
        """Return the ids of the references that the VLM is shown: at most four, which the concept explains best.

        References that are no longer in the dataset are left out.
        """
        present = self.present_references(samples)
        if len(present) <= NUM_EXAMPLES:
            return present
        values = self.concept.reference_ious
        if len(values) != len(self.reference_ids):  # the concept was edited, or verified on other references
            return present[:NUM_EXAMPLES]
        present_values = [
            value for sample_id, value in zip(self.reference_ids, values) if sample_id in present
        ]
        return [present[i] for i in best_indices(present_values)]

    def present_negatives(self, samples: fo.core.collections.SampleCollection) -> list[str]:
        """Return the ids of the samples without the concept that are still in the dataset."""
        return _present(samples, self.negative_ids)


def concept_names(samples: fo.core.collections.SampleCollection) -> list[str]:
    """Return the names of the concepts in the library of a dataset, in alphabetical order."""
    return sorted(_keys_by_name(samples), key=str.casefold)


def load_concept(samples: fo.core.collections.SampleCollection, name: str) -> StoredConcept:
    """Load a concept from the library of a dataset.

    Raises:
        ValueError: If the library has no such concept, or the concept is damaged.
    """
    settings = _library(samples)[_key_of(samples, name)]
    return StoredConcept(
        name=name,
        concept=decoded(settings.get("file"), name),
        checkpoint=settings.get("checkpoint") or NANO,
        reference_ids=tuple(settings.get("reference_ids") or ()),
        reference_label_field=settings.get("reference_label_field"),
        negative_ids=tuple(settings.get("negative_ids") or ()),
    )


def save_concept(
    samples: fo.core.collections.SampleCollection, stored: StoredConcept, replace_existing: bool = False
) -> None:
    """Store a concept in the library of a dataset.

    Raises:
        ValueError: If the name is invalid or, unless `replace_existing` is set, already used.
    """
    check_name(samples, stored.name, replace_existing)
    _write(samples, stored, _keys_by_name(samples).get(stored.name))


def rename_concept(samples: fo.core.collections.SampleCollection, name: str, new_name: str) -> None:
    """Rename a concept; predictions keep the name that they were made with.

    Raises:
        ValueError: If the library has no such concept, or the new name is invalid or already used.
    """
    key = _key_of(samples, name)
    if new_name != name:
        check_name(samples, new_name)
        _write(samples, replace(load_concept(samples, name), name=new_name), key)


def delete_concept(samples: fo.core.collections.SampleCollection, name: str) -> None:
    """Delete a concept from the library; predictions and the settings of runs that applied it are kept.

    Raises:
        ValueError: If the library has no such concept.
    """
    key = _key_of(samples, name)
    catch_up(samples)
    samples._dataset.delete_run(key)


def export_concept(samples: fo.core.collections.SampleCollection, name: str, path: str | os.PathLike) -> Path:
    """Write a concept of the library to a `.safetensors` file; an existing file of a concept is replaced.

    Raises:
        ValueError: If the library has no such concept, or the path is not that of a concept file.
        OSError: If the file cannot be written.
    """
    concept = load_concept(samples, name).concept
    return concept.save(check_export_path(path))


def import_concept(
    samples: fo.core.collections.SampleCollection,
    path: str | os.PathLike,
    name: str | None = None,
    checkpoint: str = NANO,
) -> StoredConcept:
    """Add the concept in a file to the library of a dataset, without references.

    Args:
        samples: Dataset or view.
        path: File of `export_concept`, `ConceptPrompt.save` or `conceptseg induce`.
        name: Name in the library; the prompt of the concept by default.
        checkpoint: Checkpoint that the concept was induced with.

    Returns:
        The stored concept.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: See `check_import`.
    """
    stored = check_import(samples, path, name, checkpoint)
    save_concept(samples, stored)
    return stored


def check_import(
    samples: fo.core.collections.SampleCollection,
    path: str | os.PathLike,
    name: str | None = None,
    checkpoint: str = NANO,
) -> StoredConcept:
    """Return the concept that `import_concept` would store.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a concept, was made with other weights than those of the checkpoint, or the name is
            invalid or already used.
    """
    concept = ConceptPrompt.load(Path(path).expanduser())
    stored = StoredConcept(name or default_name(concept.prompt), concept, checkpoint)
    check_name(samples, stored.name)
    if fault := fault_of(checkpoint) or fault_of_concept(concept, checkpoint):
        raise ValueError(fault)
    return stored


def check_name(
    samples: fo.core.collections.SampleCollection, name: str, replace_existing: bool = False
) -> None:
    """Check a name for a new concept.

    Raises:
        ValueError: If it is empty, too long or, unless `replace_existing` is set, already used.
    """
    if not name.strip() or name != name.strip() or len(name) > _MAX_NAME or not name.isprintable():
        raise ValueError(
            f"concept name {name[:_MAX_NAME]!r} is invalid; use 1 to {_MAX_NAME} characters without spaces at the ends."
        )
    if not replace_existing and name in _keys_by_name(samples):
        raise ValueError(
            f"a concept {name!r} is already in the library of this dataset; use another name, or replace or delete it."
        )


def check_export_path(path: str | os.PathLike) -> Path:
    """Return the path to which a concept is exported.

    Raises:
        ValueError: If it does not end in `.safetensors`, its folder is missing, or it is a file of something else.
    """
    target = Path(path).expanduser()
    if target.suffix != ".safetensors":
        raise ValueError(
            f"file {str(path)!r} does not end in .safetensors; use a name such as scratch.safetensors."
        )
    if not target.parent.is_dir():
        raise ValueError(f"folder {str(target.parent)!r} does not exist; create it, or use another folder.")
    if target.exists():
        try:
            ConceptPrompt.load(target)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"file {str(target)!r} already exists and is not a concept; use another name."
            ) from error
    return target


def default_name(prompt: str) -> str:
    """Return a name in the library for a prompt."""
    return " ".join("".join(filter(str.isprintable, " ".join(prompt.split()))).split())[:_MAX_NAME].strip()


def default_field(name: str) -> str:
    """Return a field for the predictions of a concept: its name in letters, digits and underscores."""
    field = re.sub(r"\W+", "_", name).strip("_").lower()
    return field if field.isidentifier() else f"concept_{field}".rstrip("_")


def encoded(concept: ConceptPrompt) -> str:
    """Return the content of a concept's file as text for the database.

    Raises:
        ValueError: If it is too large.
    """
    content = concept.to_bytes()
    if len(content) > _MAX_BYTES:
        raise ValueError(
            f"the concept {concept.prompt!r} has {len(content)} bytes, but a dataset stores at most {_MAX_BYTES}; "
            "use fewer concept tokens or shorter texts."
        )
    return base64.b64encode(content).decode()


def decoded(text: Any, name: str) -> ConceptPrompt:
    """Return the concept in a text of `encoded`; `name` is its name in messages.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, binascii.Error, ValueError) as error:
        raise ValueError(f"concept {name!r} is damaged; delete it, and induce or import it again.") from error
    return ConceptPrompt.from_bytes(content, name)


def _present(samples: fo.core.collections.SampleCollection, ids: Sequence[str]) -> list[str]:
    valid = [sample_id for sample_id in ids if ObjectId.is_valid(sample_id)]
    return whole_dataset(samples).select(valid, ordered=True).values("id") if valid else []


def _library(samples: fo.core.collections.SampleCollection) -> dict[str, dict[str, Any]]:
    return stored_settings(samples._dataset, METHOD)


def _keys_by_name(samples: fo.core.collections.SampleCollection) -> dict[str, str]:
    return {str(settings.get("name")): key for key, settings in _library(samples).items()}


def _key_of(samples: fo.core.collections.SampleCollection, name: str) -> str:
    keys = _keys_by_name(samples)
    if name not in keys:
        known = (
            f"use one of {', '.join(map(repr, concept_names(samples)))}"
            if keys
            else "induce or import one first"
        )
        raise ValueError(f"concept {name!r} is not in the library of this dataset; {known}.")
    return keys[name]


def _write(samples: fo.core.collections.SampleCollection, stored: StoredConcept, key: str | None) -> None:
    """Write a concept to the run with a key, or to a new run."""
    dataset = samples._dataset
    catch_up(samples)
    config = dataset.init_run(
        name=stored.name,
        file=encoded(stored.concept),
        checkpoint=stored.checkpoint,
        reference_ids=list(stored.reference_ids),
        reference_label_field=stored.reference_label_field,
        negative_ids=list(stored.negative_ids),
    )
    config.method = METHOD
    if key is None:
        dataset.register_run(f"concept_library_{uuid.uuid4().hex[:12]}", config)
    else:
        dataset.update_run_config(key, config)
