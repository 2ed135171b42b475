"""FiftyOne model for `dataset.apply_model`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import fiftyone as fo
import fiftyone.core.models as fom
import numpy as np

from ...concept_prompt import ConceptPrompt, as_concept
from ...outputs import ConceptSegmentation
from ...references import Reference
from ...router import ROUTER_MODES
from .checkpoints import NANO, check_pipeline, get_pipeline, segment_batch
from .labels import attributes_of, to_labels
from .reference_samples import (
    AUTO,
    check_references,
    references_from,
    resolve_label_field,
    samples_by_id,
)
from .schema import output_fields


class ConceptSegFiftyOneModel(fom.SamplesMixin, fom.SupportsGetItem, fom.TorchModelMixin, fom.Model):
    """ConceptSeg model for FiftyOne's `apply_model`.

    A sample that cannot be segmented gets a label with `error` and an empty mask, without affecting the other samples
    of its batch. Call `declare_prediction_fields(dataset, label_field)` to show the label attributes in the App.

    `prompt_field` and `reference_field` can be set here or passed to `apply_model`, which takes precedence.

    Args:
        checkpoint: `"nano"`, a folder or a hub id.
        prompt: Prompt for samples without a value in `prompt_field`.
        references: References for all samples.
        router: `"adaptive"`, `"sam_only"` or `"full_reasoning"`.
        output: `"segmentation"` or `"detections"`.
        heatmap: Whether to also return mask probabilities, or for CoPRS the positional prior; `apply_model` then writes
            the fields `<label_field>_<output>` and `<label_field>_heatmap`.
        reference_label_field: Field with the boxes or masks that mark the concept in reference samples. `"auto"`
            selects a field in each dataset; None passes the references without marks.
        proxy: Withhold the box of the first reference sample, so that the predicted rule is checked against it.
        device: Device such as `"cuda"`; the first accelerator by default.
        prompt_field: Sample field with a prompt per sample.
        reference_field: Sample field that lists the ids of each sample's own references.
        label: Class of the detections; each sample's prompt by default.
        boxes_together: Create one reference for a sample with several boxes, instead of one reference per box.
        concept: Concept that SAM 3 applies, or its file; its prompt is the default of `prompt`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the router, output or checkpoint is unknown, a reference cannot be used, or the model does not
            support the router or the concept.

    Example:
        >>> declare_prediction_fields(dataset, "concept")
        >>> model = ConceptSegFiftyOneModel()
        >>> dataset.apply_model(
        ...     model, "concept", prompt_field="prompt", reference_field="reference_ids", output_dir="masks"
        ... )
    """

    def __init__(
        self,
        checkpoint: str = NANO,
        prompt: str | None = None,
        references: Sequence[Reference] = (),
        router: str = "adaptive",
        output: str = "segmentation",
        heatmap: bool = False,
        reference_label_field: str | None = AUTO,
        proxy: bool = True,
        device: str | None = None,
        prompt_field: str | None = None,
        reference_field: str | None = None,
        label: str | None = None,
        boxes_together: bool = False,
        concept: ConceptPrompt | str | os.PathLike | None = None,
    ) -> None:
        super().__init__()
        output_fields("output", [output])
        check_references(references)
        if router not in ROUTER_MODES:
            raise ValueError(f"router is {router!r}; use one of {', '.join(ROUTER_MODES)}.")
        fields = {"prompt_field": prompt_field, "reference_field": reference_field}
        self._default_fields = {key: name for key, name in fields.items() if name is not None}
        self.checkpoint, self.prompt, self.references, self.router = (
            checkpoint,
            prompt,
            tuple(references),
            router,
        )
        self.outputs, self.label = [output, "heatmap"] if heatmap else [output], label
        self.reference_label_field, self.proxy = reference_label_field, proxy
        self.boxes_together = boxes_together
        self.concept = None if concept is None else as_concept(concept)
        self.pipeline = get_pipeline(checkpoint, device)
        check_pipeline(self.pipeline, router, self.concept)
        if self.concept is not None:
            self.prompt = prompt or self.concept.prompt
        self.config = None
        self._preprocess = False

    @property
    def media_type(self) -> str:
        """Media type of the samples: `"image"`."""
        return "image"

    @property
    def ragged_batches(self) -> bool:
        """False, as images of different sizes can be batched; FiftyOne then uses `batch_size`."""
        return False

    @property
    def transforms(self) -> None:
        """None, as the processor reads the images."""
        return

    @property
    def preprocess(self) -> bool:
        """Whether `transforms` are applied; has no effect, as there are none."""
        return self._preprocess

    @preprocess.setter
    def preprocess(self, value: bool) -> None:
        self._preprocess = value

    @property
    def needs_fields(self) -> dict[str, str]:
        """Sample fields to read; the fields that `apply_model` sets for one call take precedence over the model's."""
        return self._default_fields | self._fields

    @needs_fields.setter
    def needs_fields(self, value: dict[str, str]) -> None:
        self._fields = value

    @property
    def has_collate_fn(self) -> bool:
        """True, as batches are plain lists."""
        return True

    def build_get_item(self, field_mapping: dict[str, str] | None = None) -> Any:
        """Return the `GetItem` of the data loader, which returns only the path of each sample.

        If FiftyOne read the images, a damaged file would make the whole batch fail.
        """
        from .get_item import GetFilepath

        return GetFilepath(field_mapping)

    def predict(self, arg: np.ndarray | str, sample: fo.Sample | None = None) -> Any:
        """Segment one image; see `predict_all`."""
        return self.predict_all([arg], None if sample is None else [sample])[0]

    def predict_all(
        self, args: Sequence[np.ndarray | str], samples: Sequence[fo.Sample] | None = None
    ) -> list[Any]:
        """Segment images.

        Args:
            args: RGB images (H, W, 3) uint8, or paths. If a sample has a file path, the file is read instead, with the
                decoding and EXIF rotation of this package.
            samples: The corresponding samples, for `prompt_field` and `reference_field`.

        Returns:
            A label per image, or a dict of labels per image if `heatmap` is set.
        """
        samples = [None] * len(args) if samples is None else samples
        results: dict[int, ConceptSegmentation] = {}
        prompts, items = [], {}
        for index, (image, sample) in enumerate(zip(args, samples, strict=True)):
            prompts.append(self._prompt_of(sample))
            try:
                references = self._references_of(sample)
            except (ValueError, OSError) as error:
                results[index] = ConceptSegmentation.failed(str(error), prompts[-1])
                continue
            path = getattr(sample, "filepath", None)
            items[index] = {
                "image": image if path is None else path,
                "prompt": prompts[-1],
                "references": references,
            }
        settings: dict[str, Any] = {"router": self.router, "return_heatmap": "heatmap" in self.outputs}
        settings |= {} if self.concept is None else {"concept": self.concept}
        segmented = segment_batch(self.pipeline, list(items.values()), settings)
        for index, result in zip(items, segmented, strict=True):
            results[index] = result
        return [
            self._label(results[index], prompt, image)
            for index, (prompt, image) in enumerate(zip(prompts, args, strict=True))
        ]

    def _label(self, result: ConceptSegmentation, prompt: str, image: np.ndarray | str) -> Any:
        attributes = attributes_of(result, prompt, checkpoint=self.checkpoint, router=self.router)
        labels = to_labels(result, attributes, self.outputs, image=image, label=self.label)
        return labels if len(self.outputs) > 1 else labels[self.outputs[0]]

    def _prompt_of(self, sample: fo.Sample | None) -> str:
        name = self.needs_fields.get("prompt_field")
        value = None if name is None or sample is None else sample[name]
        return str(value if value is not None else self.prompt or "")

    def _references_of(self, sample: fo.Sample | None) -> Sequence[Reference]:
        name = self.needs_fields.get("reference_field")
        if name is None or sample is None:
            return self.references
        ids = sample[name] or ()
        if not ids:
            return []
        label_field = resolve_label_field(sample.dataset, self.reference_label_field)
        return references_from(
            samples_by_id(sample.dataset, ids),
            label_field,
            self.proxy,
            unmarked=True,
            boxes_together=self.boxes_together,
        )
