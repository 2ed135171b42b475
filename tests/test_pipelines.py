"""Tests of pipeline("concept-segmentation"): input formats, batching, errors in results, and saving."""

from __future__ import annotations

import json
import pathlib
import pickle
import resource
import socket
import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers.pipelines import PIPELINE_REGISTRY

from conceptseg_hf import ConceptSegmentation, ConceptSegmentationPipeline, Reference, nano_checkpoint
from conceptseg_hf.pipelines import _Preparation, register_pipeline

RESULT_FIELDS = {
    "mask", "label", "score", "route", "presence", "threshold", "think", "rule", "answer", "completion",
    "box", "check", "check_reference", "check_iou", "heatmap", "error", "decode_presence",
    "route_reason",
}  # fmt: skip
SHORT = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def pipe(model, processor) -> ConceptSegmentationPipeline:
    return transformers.pipeline("concept-segmentation", model=model, processor=processor, device="cpu")


@pytest.fixture()
def calls(pipe, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace `segment` by a stub that records the number of samples of each call."""
    sizes: list[int] = []

    def segment(inputs, **keywords) -> list[ConceptSegmentation]:
        sizes.append(len(inputs))
        return [
            ConceptSegmentation.failed(sample.error, sample.prompt)
            if sample.error
            else ConceptSegmentation(
                mask=Image.new("L", sample.frame.image_size), label=sample.prompt, score=0.5, route="shortcut"
            )
            for sample in inputs
        ]

    monkeypatch.setattr(pipe.model, "segment", segment)
    return sizes


def assert_result(result: dict, size: tuple[int, int]) -> None:
    assert set(result) == RESULT_FIELDS
    assert result["error"] is None
    assert result["mask"].mode == "L" and result["mask"].size == size
    assert set(np.unique(result["mask"])) <= {0, 255}
    assert 0 <= result["score"] <= 1 and 0 <= result["decode_presence"] <= 1


@pytest.mark.parametrize("mode", ["sam_only", "full_reasoning"])
def test_one_image(pipe, picture, mode: str) -> None:
    result = pipe(picture(0), prompt="red circle", router=mode, generation_config=SHORT)
    assert_result(result, (48, 40))
    assert result["route"] == {"sam_only": "shortcut", "full_reasoning": "reasoning"}[mode]
    assert (result["completion"] is None) == (mode == "sam_only")
    assert result["heatmap"] is None


def test_references_and_heatmap(pipe, picture) -> None:
    references = [Reference(picture(seed), box=(2, 2, 20, 30)) for seed in (1, 2, 3)]
    result = pipe(
        picture(0),
        prompt="odd one out",
        references=references,
        router="full_reasoning",
        generation_config=SHORT,
        return_heatmap=True,
    )
    assert_result(result, (48, 40))
    assert result["heatmap"].shape == (40, 48) and result["heatmap"].dtype == np.float32
    assert result["check_iou"] is not None


@pytest.mark.parametrize("kind", ["path", "string", "bytes", "array"])
def test_image_formats(pipe, calls, picture, tmp_path: pathlib.Path, kind: str) -> None:
    path = tmp_path / "image.png"
    picture(0).save(path)
    image = {"path": path, "string": str(path), "bytes": path.read_bytes(), "array": np.asarray(picture(0))}[
        kind
    ]
    assert pipe(image, prompt="red")["mask"].size == (48, 40)
    assert [
        result["label"] for result in pipe([image, {"image": image, "prompt": "blue"}], prompt="red")
    ] == ["red", "blue"]


def test_numpy_strings_and_bytes_are_single_inputs(pipe, calls, picture, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "image.png"
    picture(0).save(path)
    for image in (
        np.str_(path),
        np.array(str(path)),
        np.array(path, dtype=object),
        np.bytes_(path.read_bytes()),
    ):
        assert pipe(image, prompt=np.str_("red"))["mask"].size == (48, 40)
    missing = pipe(np.str_(tmp_path / "nowhere.png"), prompt="red")
    assert missing["error"].startswith(f"image {str(tmp_path / 'nowhere.png')!r} is not a file; ")


@pytest.mark.parametrize(
    "form", ["array", "object array", "series", "index", "categories", "images", "frame"]
)
def test_arrays_and_series_are_several_inputs(
    pipe, calls, picture, tmp_path: pathlib.Path, form: str
) -> None:
    pd = pytest.importorskip("pandas")
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.png"))
        picture(number, (30 + number, 20)).save(paths[-1])
    inputs = {
        "array": lambda: np.array(paths),
        "object array": lambda: np.array(list(map(pathlib.Path, paths)), dtype=object),
        "series": lambda: pd.Series(paths, index=[7, 5, 3]),  # read by position, not by label
        "index": lambda: pd.Index(paths),
        "categories": lambda: pd.Series(paths, dtype="category"),
        "images": lambda: pd.Series([picture(number, (30 + number, 20)) for number in range(3)]),
        "frame": lambda: pd.DataFrame({"image": paths, "prompt": ["red", "blue", "red"]}, index=[7, 5, 3]),
    }[form]()
    results = pipe(inputs, prompt="red", batch_size=2)
    assert isinstance(results, list) and calls == [2, 1]
    assert [result["mask"].size for result in results] == [(30, 20), (31, 20), (32, 20)]
    assert [result["label"] for result in results] == ["red", "blue" if form == "frame" else "red", "red"]


def test_rows_of_a_data_frame_are_inputs_and_missing_values_give_errors(
    pipe, calls, picture, tmp_path
) -> None:
    pd = pytest.importorskip("pandas")
    path = str(tmp_path / "image.png")
    picture(0).save(path)
    frame = pd.DataFrame({"image": [path, None], "prompt": ["red", "blue"]})
    assert pipe(frame.iloc[0])["label"] == "red"
    first, second = pipe(frame)
    assert first["error"] is None and "image" in second["error"]
    assert pipe(pd.Series([], dtype=object), prompt="red") == []


class Items(Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


class Stream(IterableDataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __iter__(self) -> Iterator:
        return iter(self.items)


class Benchmark:
    """A sequence that is neither a list nor a torch dataset."""

    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


FORMS = {
    "list": list,
    "tuple": tuple,
    "generator": lambda items: (item for item in items),
    "iterator": iter,
    "dataset": Items,
    "iterable dataset": Stream,
    "sequence": Benchmark,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_containers_of_several_inputs(pipe, calls, picture, form: str, batch_size: int) -> None:
    items = [{"image": picture(i, (30 + i, 20)), "prompt": f"circle {i}"} for i in range(5)]
    results = pipe(FORMS[form](items), batch_size=batch_size)
    assert isinstance(results, list) == (form in ("list", "tuple"))
    if form in ("dataset", "sequence"):
        assert len(results) == 5
    if not isinstance(results, list):
        assert calls == []  # results are computed lazily
    results = list(results)
    assert [(result["label"], result["mask"].size) for result in results] == [
        (f"circle {i}", (30 + i, 20)) for i in range(5)
    ]
    assert calls == {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2]}[batch_size]


def test_results_support_next(pipe, calls, picture) -> None:
    results = pipe(({"image": picture(i), "prompt": str(i)} for i in range(2)), batch_size=2)
    assert [next(results)["label"], next(results)["label"]] == ["0", "1"]
    with pytest.raises(StopIteration):
        next(results)


def test_datasets_of_the_datasets_library(pipe, calls, picture) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(
        [{"image": picture(i), "prompt": f"circle {i}", "other": 1} for i in range(3)]
    )
    assert [result["label"] for result in pipe(dataset, batch_size=2)] == ["circle 0", "circle 1", "circle 2"]


def test_objects_with_attributes(pipe, calls, picture) -> None:
    sample = types.SimpleNamespace(image=picture(0), prompt="red", references=[Reference(picture(1))])
    assert pipe(sample)["label"] == "red"
    assert [result["label"] for result in pipe([sample, sample], batch_size=2)] == ["red", "red"]


def test_empty_list(pipe) -> None:
    assert pipe([]) == []


@pytest.mark.parametrize("form", ["list", "dataset", "generator"])
def test_worker_processes(pipe, calls, picture, form: str) -> None:
    items = [
        {
            "image": picture(i),
            "prompt": f"circle {i}",
            "references": [Reference(picture(i + 9), box=(1, 2, 9, 9))],
        }
        for i in range(5)
    ]
    results = list(pipe(FORMS[form](items), batch_size=2, num_workers=2))
    assert [result["label"] for result in results] == [f"circle {i}" for i in range(5)]
    assert calls == [2, 2, 1]


def test_workers_do_not_receive_the_model(pipe) -> None:
    assert len(pickle.dumps(_Preparation(pipe.processor))) < 200_000


def test_batch_equals_single(pipe, picture) -> None:
    items = [
        {"image": picture(0), "prompt": "red circle"},
        {
            "image": picture(1, (64, 30)),
            "prompt": "odd one out",
            "references": [Reference(picture(2), box=(2, 3, 20, 20))],
        },
        {
            "image": picture(3, (33, 70)),
            "prompt": "the small blue square",
            "references": [Reference(picture(4)), Reference(picture(5))],
        },
    ]
    keywords = {"router": "full_reasoning", "generation_config": SHORT, "return_heatmap": True}
    together = pipe(items, batch_size=3, **keywords)
    for item, result in zip(items, together, strict=True):
        alone = pipe(item, **keywords)
        assert alone["completion"] == result["completion"]
        np.testing.assert_allclose(alone["heatmap"], result["heatmap"], atol=1e-4)


def test_invalid_inputs_give_errors_without_affecting_other_inputs(
    pipe, picture, tmp_path: pathlib.Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    bad = [
        {"image": broken, "prompt": "red"},
        {"image": tmp_path / "nowhere.png", "prompt": "red"},
        {"prompt": "red"},
        {"image": picture(0)},
        {"image": picture(0), "prompt": "red", "references": [Reference(picture(1), box=(5, 5, 5, 5))]},
        {"image": picture(0), "prompt": "red", "references": 7},
        {"image": picture(0), "prompt": "an unpaired \ud83d surrogate"},
        object(),
    ]
    good = {"image": picture(0), "prompt": "red"}
    results = pipe([good, *bad, good], batch_size=4, router="sam_only")
    assert_result(results[0], (48, 40))
    assert_result(results[-1], (48, 40))
    for result in results[1:-1]:
        assert set(result) == RESULT_FIELDS
        assert result["mask"] is None and result["score"] == 0
        assert result["error"].endswith(".") and "\n" not in result["error"]
    assert (
        str(broken) in results[1]["error"]
        and "is not a file" in results[2]["error"]
        and "no 'image'" in results[3]["error"]
    )
    assert results[1]["label"] == "red"
    assert pipe(str(broken), prompt="red")["error"] is not None


def test_dataset_that_cannot_read_an_item(pipe, calls, picture) -> None:
    good = {"image": picture(0), "prompt": "red"}
    results = list(pipe(Items([good, OSError("file 1 is gone."), good]), batch_size=3))
    assert [result["error"] for result in results] == [None, "file 1 is gone.", None]


@pytest.mark.parametrize("single", [True, False])
def test_rejects_an_unknown_argument(pipe, picture, single: bool) -> None:
    with pytest.raises(
        TypeError, match=r"unknown argument 'promt'; use one of prompt, references, router, .*num_workers\."
    ):
        pipe(picture(0) if single else [], promt="red")
    with pytest.raises(TypeError, match="unknown argument 'color'"):
        transformers.pipeline(
            "concept-segmentation", model=pipe.model, processor=pipe.processor, device="cpu", color="red"
        )


def test_arguments_of_the_pipeline_apply_to_each_call(pipe, picture) -> None:
    other = ConceptSegmentationPipeline(
        pipe.model, processor=pipe.processor, device="cpu", prompt="red", router="sam_only", batch_size=2
    )
    assert other(picture(0))["label"] == "red"
    assert [result["route"] for result in other([picture(0), picture(1)])] == ["shortcut"] * 2


def test_a_rule_is_given_to_the_vlm(pipe, picture) -> None:
    references = [Reference(picture(1), box=(2, 2, 20, 20))]
    result = pipe(picture(0), prompt="odd", references=references, rule="the red star", router="full_reasoning",
                  generation_config={"max_new_tokens": 4})  # fmt: skip
    assert result["route"] == "rule" and result["rule"] == "the red star"
    with pytest.raises(ValueError, match="rule is ''"):
        pipe([picture(0)], prompt="odd", rule="")


def test_rejects_an_unknown_router(pipe, picture) -> None:
    with pytest.raises(ValueError, match="fast"):
        pipe(picture(0), prompt="red", router="fast")


def test_pipeline_requires_the_processor(model) -> None:
    with pytest.raises(ValueError, match="pass the model's ConceptSegProcessor"):
        ConceptSegmentationPipeline(model, device="cpu")


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint folder written by `save_pretrained`."""
    path = tmp_path_factory.mktemp("checkpoint")
    pipe.save_pretrained(path)
    return path


@pytest.fixture()
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_save_and_load(pipe, folder: pathlib.Path, picture, no_network) -> None:
    names = {path.name for path in folder.iterdir()}
    assert "processor_config.json" in names and "preprocessor_config.json" not in names
    assert not [name for name in names if name.endswith(".py")]
    assert "custom_pipelines" not in json.loads((folder / "config.json").read_text())
    again = transformers.pipeline("concept-segmentation", model=str(folder), device="cpu")
    assert isinstance(again, ConceptSegmentationPipeline) and not again.model.training
    keywords = {"prompt": "red circle", "router": "sam_only", "return_heatmap": True}
    np.testing.assert_allclose(
        again(picture(0), **keywords)["heatmap"], pipe(picture(0), **keywords)["heatmap"], atol=1e-5
    )


def test_default_model_is_a_local_folder(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, no_network, picture
) -> None:
    entry = PIPELINE_REGISTRY.supported_tasks["concept-segmentation"]
    assert entry["default"]["model"][0] == str(nano_checkpoint())
    monkeypatch.setitem(
        PIPELINE_REGISTRY.supported_tasks,
        "concept-segmentation",
        {**entry, "default": {"model": (str(folder), "main")}},
    )
    default = transformers.pipeline("concept-segmentation", device="cpu")
    assert_result(default(picture(0), prompt="red", router="sam_only"), (48, 40))


def test_registering_again_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    entry = PIPELINE_REGISTRY.supported_tasks["concept-segmentation"]
    register_pipeline("elsewhere")
    assert PIPELINE_REGISTRY.supported_tasks["concept-segmentation"] is entry


def test_memory_does_not_grow_over_a_long_generator(pipe, calls, picture) -> None:
    source = picture(0, (640, 480))

    def stream() -> Iterator[dict]:
        for number in range(1000):
            yield {"image": source.copy(), "prompt": f"circle {number}"}  # 0.9 MB each

    results = iter(pipe(stream(), batch_size=8))
    for _ in range(100):
        next(results)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in results) == 900
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert growth < 100, f"memory grew by {growth:.0f} MB"


def test_generation_computes_no_gradients(pipe, picture) -> None:
    result = pipe(
        picture(0), prompt="red", router="full_reasoning", generation_config=SHORT, return_heatmap=True
    )
    assert isinstance(result["heatmap"], np.ndarray)
    assert all(parameter.grad is None for parameter in pipe.model.parameters())
    assert not torch.is_inference_mode_enabled()
