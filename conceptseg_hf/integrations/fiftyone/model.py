"""The model for `dataset.apply_model`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fiftyone as fo
import fiftyone.core.models as fom
import numpy as np

from ...outputs import ConceptSegmentation
from ...references import Reference
from .checkpoints import NANO, get_pipeline
from .labels import attributes_of, to_labels
from .reference_samples import reference_label_fields, references_from
from .schema import output_fields


class ConceptSegFiftyOneModel(fom.SamplesMixin, fom.Model):
    """A ConceptSeg model as FiftyOne's `apply_model` takes it.

    A sample that cannot be segmented gets a label with `error` and an empty mask; the others of its batch go on.
    Attributes show in the App once `declare_prediction_fields(dataset, label_field)` was called.

    Args:
        checkpoint: `"nano"`, a folder or a hub id.
        prompt: The concept in words, for samples without `prompt_field`.
        references: References that all samples share.
        router: `"adaptive"`, `"sam_only"` or `"full_reasoning"`.
        output: `"segmentation"` or `"detections"`.
        heatmap: Also return mask probabilities; `apply_model` then writes the fields `<label_field>_<output>` and
            `<label_field>_heatmap`.
        reference_label_field: The field that marks the concept in references given by their ids.
        proxy: Withhold the box of the first of those references, so that the rule is checked.
        device: Such as `"cuda"`; the first accelerator by default.

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
        reference_label_field: str | None = None,
        proxy: bool = True,
        device: str | None = None,
    ) -> None:
        super().__init__()
        output_fields("output", [output])
        self.checkpoint, self.prompt, self.references, self.router = (
            checkpoint,
            prompt,
            tuple(references),
            router,
        )
        self.outputs = [output, "heatmap"] if heatmap else [output]
        self.reference_label_field, self.proxy = reference_label_field, proxy
        self.pipeline = get_pipeline(checkpoint, device)
        self.config = None
        self._preprocess = False

    @property
    def media_type(self) -> str:
        """Images."""
        return "image"

    @property
    def ragged_batches(self) -> bool:
        """False: images of any size go together, so `batch_size` counts."""
        return False

    @property
    def transforms(self) -> None:
        """None: the processor reads images itself."""
        return

    @property
    def preprocess(self) -> bool:
        """Whether `transforms` apply; there are none."""
        return self._preprocess

    @preprocess.setter
    def preprocess(self, value: bool) -> None:
        self._preprocess = value

    def predict(self, arg: np.ndarray, sample: fo.Sample | None = None) -> Any:
        """Segments one image; see `predict_all`."""
        return self.predict_all([arg], None if sample is None else [sample])[0]

    def predict_all(
        self, args: Sequence[np.ndarray], samples: Sequence[fo.Sample] | None = None
    ) -> list[Any]:
        """Segments images.

        Args:
            args: RGB images (H, W, 3) uint8. Where a sample names its file, the file is read instead: rotated as its
                EXIF data says, and decoded as everywhere else in this package.
            samples: Their samples, for `prompt_field` and `reference_field`.

        Returns:
            A label each, or with `heatmap` a dict of labels.
        """
        samples = [None] * len(args) if samples is None else samples
        results: list[ConceptSegmentation | None] = [None] * len(samples)
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
        settings = {"router": self.router, "return_heatmap": "heatmap" in self.outputs}
        found = self.pipeline(list(items.values()), batch_size=max(1, len(items)), **settings)
        for index, result in zip(items, found, strict=True):
            results[index] = ConceptSegmentation(**result)
        return [self._label(*item) for item in zip(results, prompts, args, strict=True)]

    def _label(self, result: ConceptSegmentation, prompt: str, image: np.ndarray) -> Any:
        attributes = attributes_of(result, prompt, checkpoint=self.checkpoint, router=self.router)
        labels = to_labels(result, attributes, self.outputs)
        if result.mask is None and "segmentation" in labels:
            # `apply_model` with output_dir drops a whole batch if one label has no mask to write.
            labels["segmentation"].mask = np.zeros(image.shape[:2], dtype=np.uint8)
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
        dataset = sample.dataset
        label_field = self.reference_label_field or next(iter(reference_label_fields(dataset)), None)
        if not ids:
            return []
        return references_from(dataset.select(ids, ordered=True), label_field, self.proxy, unmarked=True)
