"""Commands, Python snippets and files of the guides, with few samples and steps; `NOT_RUN` lists the others.

The snippets of a guide run one after the other in one folder, as a reader runs them.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import yaml
from documents import ROOT, blocks, command_lines, words_of, write_files
from PIL import Image
from trees import write_photos

import conceptseg_hf
from conceptseg_hf.cli import main
from conceptseg_hf.data import load_benchmark
from conceptseg_hf.loading import load_model_and_processor

GUIDES = tuple(
    f"docs/{name}.md" for name in ("ablations", "finetune", "own_data", "photos", "vllm", "weights")
)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:photos")]

# Snippets that are not run here, by their beginning, with the reason.
NOT_RUN = {
    "pip install conceptseg-hf": "installs packages; see test_installation.py",
    "hf auth login": "asks for a token",
    "python benchmarks/magnetic_tile.py": "needs the files of a dataset; see tests/benchmarks",
    "python benchmarks/photos_table.py": "needs three evaluations; see tests/benchmarks",
    "conceptseg compare baselines/otsu": "needs two evaluations; test_documents.py runs `compare`",
    "conceptseg evaluate --vlm-engine vllm": "needs vLLM; see tests/with_vllm",
    'pipe(inputs, vlm_engine="vllm"': "needs vLLM; see tests/with_vllm",
    'model.vlm.save_pretrained("vlm")': "needs vLLM; see tests/with_vllm",
    'model = AutoModel.from_pretrained(\n    "conceptseg-r1-7b",\n    device_map="auto",\n    max_memory': (
        "sets the memory of a GPU; see test_devices.py"
    ),
}

# Parts of snippets, and what takes their places: existing files, the CPU, fewer steps and datasets.
REPLACED = {
    "--benchmark table1 --root DIR": "--benchmark DUTS --root suite",
    "PATH_OR_ID": "my-checkpoint",
    "$config": "references",
    "../shared/data/photos": "my_datasets",
    'device_map={"": 0}': 'device_map={"": "cpu"}',
    "device=0": 'device="cpu"',
    "steps=300": "steps=2",
    "--benchmark table1 --root suite --metrics all": "--benchmark DUTS --root suite --metrics all",
}
FEWER_STEPS = {
    "sft": ["--log_examples", "0"],
    "meta-grpo": [
        "--num_generations",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--max_completion_length",
        "8",
    ],
}


def is_run(snippet: str) -> bool:
    return not snippet.startswith(tuple(NOT_RUN))


def snippets(document: str) -> list[tuple[str, str]]:
    """Return language and text of what a document shows; commands one by one, without the lines of shell loops."""
    found: list[tuple[str, str]] = []
    for language, text in blocks(document):
        if language in ("", "bash"):
            lines = command_lines(text)
            found += [("", line) for line in lines if not line.startswith("for ") and line != "done"]
        else:
            found.append((language, text))
    return found


CASES = [
    pytest.param(document, language, text, id=f"{Path(document).stem}-{number}")
    for document in GUIDES
    for number, (language, text) in enumerate(snippets(document))
    if is_run(text)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_files(tmp_path_factory.mktemp("guides"))
    nano = conceptseg_hf.nano_checkpoint()
    for name in ("my-checkpoint", "conceptseg-r1-3b", "conceptseg-r1-7b"):
        (folder / name).symlink_to(nano)
    (folder / "image.jpg").symlink_to(folder / "photo.jpg")
    write_photos(folder / "my_datasets")
    shadows = [s for s in load_benchmark("concept-shapes", split="test", limit=400) if s.family == "shadow"]
    for name in ("my_data", "tiles"):
        write_plain(folder / name, shadows[:11], ["train"] * 8 + ["val"] + ["test"] * 2)
    return folder


def write_plain(folder: Path, samples, splits) -> None:
    """Write samples with one prompt, each with the first two as references."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number, (sample, split) in enumerate(zip(samples, splits)):
        sample.image.save(folder / f"{number}.png")
        sample.mask.save(folder / f"{number}_mask.png")
        references = [{"image": f"{n}.png", "mask": f"{n}_mask.png"} for n in range(3) if n != number]
        rows.append({"image": f"{number}.png", "mask": f"{number}_mask.png", "prompt": "the scratch"})
        rows[-1] |= {"split": split, "references": references[:2]}
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def namespaces() -> dict[str, dict[str, object]]:
    """Return the namespaces of the documents, with what their snippets expect to exist."""
    model, processor = load_model_and_processor(None, "cpu")
    samples = list(load_benchmark("concept-shapes", split="test", limit=6))
    given = {
        "model": model,
        "processor": processor,
        "pairs": [(sample.image, sample.mask) for sample in samples[:4]],
        "clean_images": [sample.image for sample in samples[4:]],
    }
    return {document: dict(given) for document in GUIDES}


@pytest.fixture(autouse=True)
def here(request, monkeypatch):
    if "folder" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("folder"))


def test_each_exception_is_a_snippet():
    texts = [text for document in GUIDES for _, text in snippets(document)]
    assert [start for start in NOT_RUN if not any(text.startswith(start) for text in texts)] == []
    assert len(CASES) >= 30
    assert all(
        language in ("", "python", "yaml", "json", "csv")
        for _, language, _ in (case.values for case in CASES)
    )


@pytest.mark.parametrize(("document", "language", "text"), CASES)
def test_snippets_run(document, language, text, folder, namespaces, monkeypatch, capsys):
    for part, replacement in REPLACED.items():
        text = text.replace(part, replacement)
    if language == "python":
        run_python(document, text, namespaces[document], monkeypatch)
    elif language == "yaml":
        Path("mine.yaml").write_text(text)
        assert set(yaml.safe_load(text)["variants"]) == {"short", "long"}
        assert main(["ablate", "--config", "mine.yaml", "--limit", "1"]) == 0
    elif language in ("json", "csv"):
        load_rows(Path(f"in_{language}"), f"samples.{'jsonl' if language == 'json' else 'csv'}", text)
    elif text.startswith("python "):
        run_script(shlex.split(text)[1:])
    else:
        run_command(text, capsys)


def run_python(document: str, text: str, namespace: dict[str, object], monkeypatch) -> None:
    if "BitsAndBytesConfig" in text:
        pytest.importorskip("bitsandbytes")
    if "open_r1" in text:  # the authors' repository
        constants = types.ModuleType("open_r1.constants")
        question = "Find {question}. References{ref_bboxes} {check_prompt} {check_answer}"
        constants.question_template_registry = {"cot": question, "reasonseg_cot": "Find {question}."}
        constants.system_prompt_registry = {"default": "You are a helpful assistant."}
        monkeypatch.setitem(sys.modules, "open_r1", types.ModuleType("open_r1"))
        monkeypatch.setitem(sys.modules, "open_r1.constants", constants)
    exec(compile(text, document, "exec"), namespace)
    if "results" in namespace:
        (result,) = namespace.pop("results")
        assert result.error is None and result.mask.size == (320, 240)


def load_rows(folder: Path, name: str, text: str) -> None:
    """Write the rows of the example and the files that they name, and load them."""
    folder.mkdir()
    (folder / name).write_text(text)
    for path in set(re.findall(r"(?:images|masks)/\d+\.\w+", text)):
        (folder / path).parent.mkdir(exist_ok=True)
        Image.new("RGB" if path.startswith("images") else "L", (300, 240), "white").save(folder / path)
    samples = load_benchmark("plain", root=str(folder), split="test")
    assert [sample.prompt for sample in samples] == ["the scratch"] * len(samples)
    masked, *boxed, bare = samples[-1].references
    assert masked.mask is not None and [item.box for item in boxed] == [(40, 30, 200, 180)] * len(boxed)
    assert bare.mask is None and bare.box is None and len(samples) == 1 + len(boxed)


def run_script(words: list[str]) -> None:
    """Run examples/finetune_on_your_data.py, and give its results the names of more images."""
    pytest.importorskip("trl", "1.16")
    pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location(Path(words[0]).stem, ROOT / words[0])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    output = "finetuned_3b" if "--device" in words else "finetuned"
    fewer = ["--images", "2", "--steps", "2", "--ctm-steps", "1", "--test-limit", "2", "--dtype", "auto"]
    module.main([*words[1:], *fewer, "--device", "cpu", "--output-dir", output])
    for method in ("tokens", "lora", "ctm"):
        if not Path(f"finetuned/{method}-100").exists():
            Path(f"finetuned/{method}-100").symlink_to(f"{method}-2")


def run_command(text: str, capsys) -> None:
    words = words_of(text)
    if words[0] == "train":
        pytest.importorskip("trl", "1.16")
        words += FEWER_STEPS[words[1]]
    if words[0] == "evaluate" and "--output-dir" not in words:
        words += ["--output-dir", f"out/{abs(hash(text))}"]
    if words[0] == "convert":
        words += ["--out", f"converted/{abs(hash(text))}"]
    assert main(words) == 0, capsys.readouterr().err
