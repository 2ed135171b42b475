"""pipeline("concept-segmentation"): images and words in, readable results out.

The base class collates tensors of one shape; our samples are ragged. So this pipeline batches lists of
`PreparedSample` and leaves padding to the processor, which knows how; only `get_iterator` and `run_single`
differ from the base class.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import AutoModel, GenerationConfig, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from . import hub
from .devices import is_offloaded
from .images import as_list
from .inputs import PreparedSample
from .modeling_conceptseg import ConceptSegForSegmentation
from .outputs import ConceptSegmentation
from .processing_conceptseg import ConceptSegProcessor
from .references import Reference
from .router import ShortcutRouter

TASK = "concept-segmentation"

_PREPROCESS_PARAMETERS = ("prompt", "references")
_FORWARD_PARAMETERS = ("router", "generation_config", "return_heatmap")
_LOADER_PARAMETERS = ("batch_size", "num_workers")


class ConceptSegmentationPipeline(Pipeline):
    """Segments what a prompt means, in one image or in many.

    An input is an image (PIL image, array, path, URL or bytes) together with `prompt=` and, if need be,
    `references=`; or a mapping, or any object, with `image`, `prompt` and `references`, which then go before
    the keywords. Many inputs are a list, an array or pandas Series of paths, a DataFrame with these columns, a
    generator, a torch dataset or any other sequence; the first three give a list, everything else an iterator.

    Each result is a dict with the fields of `ConceptSegmentation`. An input that cannot be read gives a
    result whose `error` is one sentence and whose `mask` is None; the others go on.

    Example:
        >>> pipe = pipeline("concept-segmentation")
        >>> pipe(image, prompt="red circle")["mask"]
        >>> pipe([{"image": a, "prompt": "red circle"}, {"image": b, "prompt": "odd one out"}], batch_size=2)
    """

    model: ConceptSegForSegmentation
    processor: ConceptSegProcessor
    # The base class declares None, and documents these values.
    _load_processor = True  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]

    def __init__(self, model: Any, *args: Any, device: Any = None, **kwargs: Any) -> None:
        with _placed(model) if device is None else nullcontext(device) as device:
            super().__init__(model, *args, device=device, **kwargs)  # type: ignore[misc]
        if not isinstance(self.processor, ConceptSegProcessor):
            raise ValueError(
                f"ConceptSegmentationPipeline: processor is a {type(self.processor).__name__}; "
                "pass the model's ConceptSegProcessor."
            )

    def __call__(  # type: ignore[override]
        self, inputs: Any, **kwargs: Any
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterable[dict[str, Any]]:
        """Segments one input or many.

        Args:
            inputs: See the class.
            **kwargs: Of these:
                `prompt`: The concept in words, for inputs that bring none.
                `references`: A list of `Reference`, for inputs that bring none.
                `router`: `"adaptive"`, `"sam_only"`, `"full_reasoning"` or a `ShortcutRouter`.
                `generation_config`: How the VLM writes: a `GenerationConfig` or a dict of its fields.
                `return_heatmap`: Adds the mask probabilities to each result.
                `batch_size`: Inputs per call of the model; 1 by default.
                `num_workers`: Processes that prepare inputs; 0 by default. A stream gets at most one.

        Raises:
            TypeError: If a keyword is unknown.
            ValueError: If the router is unknown.
        """
        many = _as_many(inputs)
        if isinstance(many, list) and not many:
            self._sanitize_parameters(
                **{name: value for name, value in kwargs.items() if name not in _LOADER_PARAMETERS}
            )
            return []
        return super().__call__(inputs if many is None else many, **kwargs)

    def _sanitize_parameters(
        self, **parameters: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = (*_PREPROCESS_PARAMETERS, *_FORWARD_PARAMETERS)
        for name in parameters:
            if name not in known:
                raise TypeError(
                    f"ConceptSegmentationPipeline: there is no parameter {name!r}; "
                    f"use {', '.join((*known, *_LOADER_PARAMETERS))}."
                )
        preprocess = {name: parameters[name] for name in _PREPROCESS_PARAMETERS if name in parameters}
        forward = {name: parameters[name] for name in _FORWARD_PARAMETERS if name in parameters}
        return preprocess, forward, {}

    def preprocess(  # type: ignore[override]
        self, inputs: Any, prompt: str | None = None, references: Sequence[Reference] | None = None
    ) -> PreparedSample:
        """Prepares one input; never fails on a bad one, the sample says what was wrong."""
        return _Preparation(self.processor, prompt, references)(inputs)

    def _forward(  # type: ignore[override]
        self,
        samples: list[PreparedSample],
        router: str | ShortcutRouter = "adaptive",
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        return_heatmap: bool = False,
    ) -> list[ConceptSegmentation]:
        return self.model.segment(
            samples,
            processor=self.processor,
            router=router,
            generation_config=generation_config,
            return_heatmap=return_heatmap,
        )

    def postprocess(  # type: ignore[override]
        self, result: ConceptSegmentation
    ) -> dict[str, Any]:
        """One result as a dict."""
        return result.to_dict()

    def run_single(
        self,
        inputs: Any,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> dict[str, Any]:
        """Segments one input."""
        sample = self.preprocess(inputs, **preprocess_params)
        return self.postprocess(self.forward([sample], **forward_params)[0], **postprocess_params)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> _Results:
        """Segments many inputs, `batch_size` at a time, as they are asked for."""
        prepare = _Preparation(self.processor, **preprocess_params)
        if isinstance(inputs, Sized) and hasattr(inputs, "__getitem__"):
            dataset: Dataset = _PreparedSequence(inputs, prepare)
        else:
            dataset = _PreparedStream(inputs, prepare)
            # A stream cannot be divided, and only a forked process can inherit it.
            num_workers = min(num_workers, int(torch.multiprocessing.get_start_method() == "fork"))
        if num_workers:
            os.environ.setdefault(
                "TOKENIZERS_PARALLELISM", "false"
            )  # tokenizers would warn in every forked process
        batches = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_as_is)

        def segment(samples: list[PreparedSample]) -> list[dict[str, Any]]:
            return [
                self.postprocess(result, **postprocess_params)
                for result in self.forward(samples, **forward_params)
            ]

        return _Results(batches, segment)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Saves model and processor, so that the folder loads again without remote code.

        Args:
            save_directory: The folder.
            push_to_hub: Upload the folder as well.
            **kwargs: As in the model's `save_pretrained`; with `push_to_hub` also `repo_id` (by default the folder's
                name) and the arguments of `hub.upload`.
        """
        if push_to_hub:
            upload, kwargs = hub.split_upload_arguments(save_directory, kwargs)
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if push_to_hub:
            hub.upload(save_directory, **upload)

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, max_shard_size: int | str = "5GB", **kwargs: Any
    ) -> Any:
        """Uploads model, processor and card; see the model's `push_to_hub`.

        Args:
            repo_id: The repository, made if it does not exist.
            max_shard_size: Size of the weight files.
            **kwargs: Further arguments of `hub.upload`.

        Returns:
            What the Hub says of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return hub.upload(folder, repo_id, **kwargs)


@contextmanager
def _placed(model: Any) -> Iterator[torch.device | None]:
    """Yields the device of a model that Accelerate has dispatched or offloaded, which must not be moved; else None.

    The base class would take the first device of the model's map, which may be the disk, and does not see a model that
    was offloaded without a map.
    """
    device_map = vars(model).pop("hf_device_map", None)
    try:
        yield None if device_map is None and not is_offloaded(model) else model.device
    finally:
        if device_map is not None:
            model.hf_device_map = device_map


def register_pipeline(default_model: str | os.PathLike) -> None:
    """Makes `transformers.pipeline("concept-segmentation")` known; may be called any number of times.

    Args:
        default_model: The checkpoint folder used when no model is named.
    """
    if PIPELINE_REGISTRY.supported_tasks.get(TASK, {}).get("impl") is ConceptSegmentationPipeline:
        return
    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        pipeline_class=ConceptSegmentationPipeline,
        pt_model=AutoModel,
        default={"model": (os.fspath(default_model), "main")},
        type="multimodal",
    )


@dataclass(frozen=True)
class _Preparation:
    """Input -> PreparedSample. Holds the processor only: worker processes get no copy of the model."""

    processor: ConceptSegProcessor
    prompt: str | None = None
    references: Sequence[Reference] | None = None

    def __call__(self, item: Any) -> PreparedSample:
        get: Callable[[str], Any] = (
            item.get if isinstance(item, Mapping) else lambda name: getattr(item, name, None)
        )
        composed = isinstance(item, Mapping) or _has_parts(item)
        prompt: Any = self.prompt if not composed or get("prompt") is None else get("prompt")
        references = self.references if not composed or get("references") is None else get("references")
        try:
            if composed and get("image") is None:
                raise ValueError(
                    "the input has no 'image'; give a path, URL, array or PIL image under that name."
                )
            return self.processor.prepare(
                get("image") if composed else item, prompt, references or (), lazy=True
            )
        except (ValueError, TypeError, OSError) as error:
            return self.failed(error, prompt)

    def failed(self, error: Exception, prompt: Any = None) -> PreparedSample:
        return PreparedSample.failed(
            prompt if isinstance(prompt, str) else "", str(error) or type(error).__name__
        )


class _PreparedSequence(Dataset):
    """Prepares the items of anything with a length."""

    def __init__(self, items: Any, prepare: _Preparation) -> None:
        self.items, self.prepare = items, prepare

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> PreparedSample:
        try:
            item = self.items[index]
        except (ValueError, OSError) as error:  # a dataset that reads its own files
            return self.prepare.failed(error, self.prepare.prompt)
        return self.prepare(item)


class _PreparedStream(IterableDataset):
    """Prepares the items of anything that can only be iterated."""

    def __init__(self, items: Iterable[Any], prepare: _Preparation) -> None:
        self.items, self.prepare = items, prepare

    def __iter__(self) -> Iterator[PreparedSample]:
        return map(self.prepare, self.items)


class _Results:
    """The results one by one; as long as its inputs, if they have a length."""

    def __init__(
        self, batches: DataLoader, segment: Callable[[list[PreparedSample]], list[dict[str, Any]]]
    ) -> None:
        self._batches, self._segment = batches, segment
        self._iterator: Iterator[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self._batches.dataset)  # type: ignore[arg-type]  # only asked of those that have a length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for samples in self._batches:
            yield from self._segment(samples)

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator = iter(self)
        return next(self._iterator)


def _as_many(inputs: Any) -> Any | None:
    """Inputs as the base class takes many (a list, generator or torch dataset); None for a single input."""
    if isinstance(inputs, (list, tuple)):
        return list(inputs)
    if hasattr(inputs, "columns") and hasattr(inputs, "to_dict"):  # a pandas DataFrame: an input a row
        return inputs.to_dict("records")
    if isinstance(
        inputs, (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, Mapping)
    ) or _has_parts(inputs):
        return None
    if hasattr(inputs, "__array__") and (listed := as_list(inputs)) is not None:
        return listed
    if hasattr(inputs, "__array__") or hasattr(inputs, "read"):
        return None
    if isinstance(inputs, Dataset):
        return inputs
    if isinstance(inputs, Sized) and hasattr(inputs, "__getitem__"):  # for example a datasets.Dataset
        return _Items(inputs)
    return (item for item in inputs) if isinstance(inputs, Iterable) else None


class _Items(Dataset):
    """A sequence that the base class recognises as a dataset."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def _has_parts(item: Any) -> bool:
    return hasattr(item, "image") and hasattr(item, "prompt")


def _as_is(samples: list[PreparedSample]) -> list[PreparedSample]:
    return samples


__all__ = ["ConceptSegmentationPipeline", "register_pipeline"]
