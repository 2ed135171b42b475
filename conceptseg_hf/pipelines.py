"""The `pipeline("concept-segmentation")` task.

The base class collates tensors of equal shape, whereas samples of this pipeline have different shapes. The pipeline
therefore batches lists of `PreparedSample` and leaves padding to the processor, which requires overriding
`get_iterator` and `run_single`.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from . import hub
from .concept_prompt import as_concept
from .coprs import CoPRSForSegmentation, CoPRSProcessor
from .devices import is_offloaded
from .images import as_list
from .inputs import PreparedSample
from .outputs import ConceptSegmentation
from .processing_conceptseg import ConceptSegProcessor
from .references import Reference
from .shipped import find_embedded_checkpoint
from .streaming import stream_call
from .vlm_engines import check_vlm_engine

TASK = "concept-segmentation"

_PREPROCESS_PARAMETERS = ("prompt", "references")
_FORWARD_PARAMETERS = ("router", "generation_config", "return_heatmap", "concept", "rule", "vlm_engine")
_LOADER_PARAMETERS = ("batch_size", "num_workers")


class ConceptSegmentationPipeline(Pipeline):
    """Segment the concept described by a prompt in one or more images.

    An input is either an image (PIL image, array, path, URL or bytes), combined with the arguments `prompt` and
    optionally `references`, or a mapping or object with `image`, `prompt` and `references`, which take precedence over
    the arguments. Several inputs can be passed as a list, an array or pandas Series of paths, a DataFrame with these
    columns, a generator, a torch dataset or any other sequence. The first four return a list, all others an iterator.

    Each result is a dict with the fields of `ConceptSegmentation`. An invalid input yields a result with `mask=None`
    and a one-sentence `error`, without affecting the other inputs.

    Example:
        >>> pipe = pipeline("concept-segmentation")
        >>> pipe(image, prompt="red circle")["mask"]
        >>> pipe([{"image": a, "prompt": "red circle"}, {"image": b, "prompt": "odd one out"}], batch_size=2)
    """

    model: Any  # a ConceptSegForSegmentation or a CoPRSForSegmentation
    processor: Any  # a ConceptSegProcessor or a CoPRSProcessor
    # The base class declares None, but documents these values.
    _load_processor = True  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]

    def __init__(self, model: Any, *args: Any, device: Any = None, **kwargs: Any) -> None:
        with _placed(model) if device is None else nullcontext(device) as device:
            super().__init__(model, *args, device=device, **kwargs)  # type: ignore[misc]
        expected = CoPRSProcessor if isinstance(self.model, CoPRSForSegmentation) else ConceptSegProcessor
        if not isinstance(self.processor, expected):
            raise ValueError(
                f"ConceptSegmentationPipeline: processor is a {type(self.processor).__name__}; "
                f"pass the model's {expected.__name__}."
            )

    def __call__(  # type: ignore[override]
        self, inputs: Any, stream: bool = False, **kwargs: Any
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterable[dict[str, Any]] | Iterator[str | dict[str, Any]]:
        """Segment one or more inputs.

        Args:
            inputs: One or more inputs; see the class.
            stream: Return an iterator that yields, for each input in turn, the text of the VLM in pieces while it is
                written, and then the result. Inputs are processed one by one, so `batch_size` and `num_workers` do not
                apply. See `ConceptSegForSegmentation.stream_segment`.
            **kwargs: Optional arguments:
                `prompt`: Description of the concept, for inputs without a prompt.
                `references`: A list of `Reference`, for inputs without references.
                `router`: `"adaptive"`, `"sam_only"`, `"full_reasoning"` or a `ShortcutRouter`.
                `generation_config`: Generation settings of the VLM, a `GenerationConfig` or a dict of its fields.
                `return_heatmap`: Whether to add the heatmap to each result: the mask probabilities (not by default), or
                    with CoPRS the positional prior (by default).
                `concept`: A `ConceptPrompt` or its file; see `ConceptSegForSegmentation.segment`. Its prompt is the
                    default for inputs without one.
                `rule`: A visual rule that the VLM is given and applies; see `ConceptSegForSegmentation.segment`.
                `vlm_engine`: `"transformers"` or `"vllm"`, which writes the completions; by default the engine that
                    the model's `set_vlm_engine` selected.
                `batch_size`: Number of inputs per model call; defaults to 1.
                `num_workers`: Number of processes that prepare inputs; defaults to 0. Streams use at most one.

        Raises:
            TypeError: If an argument is unknown.
            ValueError: If the router is unknown.
        """
        many = _as_many(inputs)
        if stream:
            return self._stream([inputs] if many is None else many, kwargs)
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
                    f"ConceptSegmentationPipeline: unknown argument {name!r}; "
                    f"use one of {', '.join((*known, *_LOADER_PARAMETERS))}."
                )
        preprocess = {name: parameters[name] for name in _PREPROCESS_PARAMETERS if name in parameters}
        forward = {name: parameters[name] for name in _FORWARD_PARAMETERS if name in parameters}
        if forward.get("vlm_engine") is not None:
            check_vlm_engine(forward["vlm_engine"])
        if forward.get("concept") is not None:
            forward["concept"] = as_concept(forward["concept"])
            preprocess.setdefault("prompt", forward["concept"].prompt)
        if forward.get("rule") is not None:
            self.processor.check_rule(forward["rule"])
        return preprocess, forward, {}

    def _stream(self, inputs: Any, arguments: Mapping[str, Any]) -> Iterator[str | dict[str, Any]]:
        """Return the iterator of a streamed call."""
        preprocess, forward, postprocess = self._sanitize_parameters(
            **{name: value for name, value in arguments.items() if name not in _LOADER_PARAMETERS}
        )
        prepare = _Preparation(self.processor, **(self._preprocess_params | preprocess))
        forward = self._forward_params | forward
        self.forward([], **forward)  # reports invalid arguments before the iterator is used
        samples: Iterable[PreparedSample]
        if isinstance(inputs, Sized) and hasattr(inputs, "__getitem__"):
            sequence = _PreparedSequence(inputs, prepare)
            samples = (sequence[index] for index in range(len(sequence)))
        else:
            samples = map(prepare, inputs)

        def results() -> Iterator[str | dict[str, Any]]:
            for sample in samples:

                def segment(
                    on_text: Callable[[str], None], sample: PreparedSample = sample
                ) -> dict[str, Any]:
                    return self.postprocess(
                        self.forward([sample], on_text=on_text, **forward)[0], **postprocess
                    )

                yield from stream_call(segment, self.device.type)

        return results()

    def preprocess(  # type: ignore[override]
        self, inputs: Any, prompt: str | None = None, references: Sequence[Reference] | None = None
    ) -> PreparedSample:
        """Prepare one input; an invalid input yields a sample with an error."""
        return _Preparation(self.processor, prompt, references)(inputs)

    def _forward(  # type: ignore[override]
        self, samples: list[PreparedSample], vlm_engine: str | None = None, **options: Any
    ) -> list[ConceptSegmentation]:
        with self.model.using_vlm_engine(vlm_engine, self.processor):
            return self.model.segment(samples, processor=self.processor, **options)

    def postprocess(  # type: ignore[override]
        self, result: ConceptSegmentation
    ) -> dict[str, Any]:
        """Convert a result to a dict."""
        return result.to_dict()

    def run_single(
        self,
        inputs: Any,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> dict[str, Any]:
        """Segment one input."""
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
        """Segment several inputs lazily, in batches of `batch_size`."""
        prepare = _Preparation(self.processor, **preprocess_params)
        if isinstance(inputs, Sized) and hasattr(inputs, "__getitem__"):
            dataset: Dataset = _PreparedSequence(inputs, prepare)
        else:
            dataset = _PreparedStream(inputs, prepare)
            # A stream cannot be split between workers, and only a forked process can inherit it.
            num_workers = min(num_workers, int(torch.multiprocessing.get_start_method() == "fork"))
        if num_workers:
            # Avoids a warning of tokenizers in each forked process.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        batches = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_identity)

        def segment(samples: list[PreparedSample]) -> list[dict[str, Any]]:
            return [
                self.postprocess(result, **postprocess_params)
                for result in self.forward(samples, **forward_params)
            ]

        return _Results(batches, segment)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save model and processor, such that the folder can be loaded without remote code.

        Args:
            save_directory: Output folder.
            push_to_hub: Also upload the folder.
            **kwargs: See the model's `save_pretrained`; with `push_to_hub` also `repo_id` (defaults to the folder's
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
        """Upload model, processor and card; see the model's `push_to_hub`.

        Args:
            repo_id: Repository id; the repository is created if it does not exist.
            max_shard_size: Maximum size of each weight file.
            **kwargs: Additional arguments of `hub.upload`.

        Returns:
            The commit information returned by the Hub.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return hub.upload(folder, repo_id, **kwargs)


@contextmanager
def _placed(model: Any) -> Iterator[torch.device | None]:
    """Yield the device of a model dispatched or offloaded by Accelerate, which must not be moved, otherwise None.

    The base class would use the first device of `hf_device_map`, which may be the disk, and does not detect a model
    that was offloaded without a device map.
    """
    device_map = vars(model).pop("hf_device_map", None)
    try:
        yield None if device_map is None and not is_offloaded(model) else model.device
    finally:
        if device_map is not None:
            model.hf_device_map = device_map


def register_pipeline(default_model: str | os.PathLike) -> None:
    """Register the task of `transformers.pipeline("concept-segmentation")`; repeated calls have no effect.

    Args:
        default_model: Checkpoint folder used if no model is specified.
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
    # `pipeline` reads the config of the model before it calls any class of the task, so it is wrapped.
    wrapped = _with_embedded_checkpoints(transformers.pipelines.pipeline)
    for module in (transformers.pipelines, transformers):
        module.pipeline = wrapped  # type: ignore[attr-defined]


def _with_embedded_checkpoints(pipeline: Callable[..., Pipeline]) -> Callable[..., Pipeline]:
    """Return `transformers.pipeline` such that this task also finds embedded checkpoints by name, e.g. "mini"."""

    @functools.wraps(pipeline)
    def wrapped(task: Any = None, model: Any = None, *args: Any, **kwargs: Any) -> Pipeline:
        if task == TASK and isinstance(model, str):
            model = os.fspath(find_embedded_checkpoint(model) or model)
        return pipeline(task, model, *args, **kwargs)

    return wrapped


@dataclass(frozen=True)
class _Preparation:
    """Convert inputs to `PreparedSample`; contains only the processor, so that workers receive no copy of the model."""

    processor: ConceptSegProcessor | CoPRSProcessor
    prompt: str | None = None
    references: Sequence[Reference] | None = None

    def __call__(self, item: Any) -> PreparedSample:
        get_field: Callable[[str], Any] = (
            item.get if isinstance(item, Mapping) else lambda name: getattr(item, name, None)
        )
        has_fields = isinstance(item, Mapping) or _has_fields(item)
        prompt: Any = self.prompt if not has_fields or get_field("prompt") is None else get_field("prompt")
        references = self.references
        if has_fields and get_field("references") is not None:
            references = get_field("references")
        try:
            if has_fields and get_field("image") is None:
                raise ValueError("the input has no 'image'; set it to a path, URL, array or PIL image.")
            image = get_field("image") if has_fields else item
            sample = self.processor.prepare(image, prompt, references or (), lazy=True)
        except (ValueError, TypeError, OSError) as error:
            return self.failed(error, prompt)
        self.processor.warn_of_unknown_words(sample.prompt)
        return sample

    def failed(self, error: Exception, prompt: Any = None) -> PreparedSample:
        return PreparedSample.failed(
            prompt if isinstance(prompt, str) else "", str(error) or type(error).__name__
        )


class _PreparedSequence(Dataset):
    """Dataset that prepares the items of a sequence."""

    def __init__(self, items: Any, prepare: _Preparation) -> None:
        self.items, self.prepare = items, prepare

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> PreparedSample:
        try:
            item = self.items[index]
        except (ValueError, OSError) as error:  # the dataset may read files
            return self.prepare.failed(error, self.prepare.prompt)
        return self.prepare(item)


class _PreparedStream(IterableDataset):
    """Dataset that prepares the items of an iterable."""

    def __init__(self, items: Iterable[Any], prepare: _Preparation) -> None:
        self.items, self.prepare = items, prepare

    def __iter__(self) -> Iterator[PreparedSample]:
        return map(self.prepare, self.items)


class _Results:
    """Iterable of results, with the length of the inputs if they have one."""

    def __init__(
        self, batches: DataLoader, segment: Callable[[list[PreparedSample]], list[dict[str, Any]]]
    ) -> None:
        self._batches, self._segment = batches, segment
        self._iterator: Iterator[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self._batches.dataset)  # type: ignore[arg-type]  # fails for inputs without a length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for samples in self._batches:
            yield from self._segment(samples)

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator = iter(self)
        return next(self._iterator)


def _as_many(inputs: Any) -> Any | None:
    """Convert several inputs to a list, generator or torch dataset, as the base class expects; None for one input."""
    if isinstance(inputs, (list, tuple)):
        return list(inputs)
    if hasattr(inputs, "columns") and hasattr(inputs, "to_dict"):  # a pandas DataFrame: one input per row
        return inputs.to_dict("records")
    if isinstance(
        inputs, (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, Mapping)
    ) or _has_fields(inputs):
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
    """Wrap a sequence in a torch dataset, which the base class recognizes."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def _has_fields(item: Any) -> bool:
    return hasattr(item, "image") and hasattr(item, "prompt")


def _identity(samples: list[PreparedSample]) -> list[PreparedSample]:
    return samples


__all__ = ["ConceptSegmentationPipeline", "register_pipeline"]
