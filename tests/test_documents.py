"""Commands and Python snippets of the documents run as they are written, in a folder that has the files they name."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from random_coprs import save_random_coprs
from transformers import AutoModel, AutoProcessor

import conceptseg_hf
from conceptseg_hf.cli import main
from conceptseg_hf.data import GROUPS, load_benchmark

sys.path.insert(0, str(pathlib.Path(__file__).parent / "data"))
from trees import AuthorsTree

ROOT = pathlib.Path(conceptseg_hf.__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("quickstart", "cli", "concepts", "how_it_works", "app", "scale", "families")
    ),
)
# Documents whose commands another test runs, with tiny random models.
RUN_BY = {"docs/qwen3.md": "tests/trainers/test_qwen3_guide.py"}
# Documents with snippets that need a GPU, vLLM, large weights or long training. Other tests check parts of them.
NOT_RUN = {
    *(
        f"docs/{name}.md"
        for name in (
            "ablations",
            "coprs",
            "finetune",
            "own_data",
            "photos",
            "vllm",
            "weights",
        )
    ),
}


def blocks(document: str) -> list[tuple[str, str]]:
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


def commands(document: str) -> list[str]:
    return [
        line.partition("  #")[0].strip()
        for language, text in blocks(document)
        if not language
        for line in text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]


COMMANDS = list(dict.fromkeys(command for document in DOCUMENTS for command in commands(document)))
HUB_IDS = ("zhaoyuan666/ConceptSeg-R1-7B", "facebook/sam3", "Qwen/Qwen2.5-VL-7B-Instruct")
QWEN3_ID = "Qwen/Qwen3-VL-4B-Instruct"

# Appended, where an option given twice has its last value: fewer samples and steps, and no GPU.
SHORTENED = {
    "evaluate": ["--limit", "1"],
    "ablate": ["--limit", "2"],
    "train": [
        *("--max_steps", "1", "--train_samples", "8", "--per_device_train_batch_size", "8"),
        *("--eval_strategy", "no", "--log_examples", "0"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The files that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    samples = load_benchmark("concept-shapes", split="val")
    for name, sample in zip(("photo", "a", "b", "c"), samples):
        sample.image.resize((320, 240)).save(folder / f"{name}.jpg")
    (folder / "photos").mkdir()
    shutil.copy(folder / "photo.jpg", folder / "photos")
    for name, number in zip("ab", (1, 2)):
        samples[number].mask.resize((320, 240), Image.Resampling.NEAREST).save(folder / f"{name}_mask.png")
    suite = AuthorsTree(folder / "suite")
    for name, _ in GROUPS["table1"]:
        for number in range(2):
            suite.add("train", name, name, f"train_{number}")
            suite.add("test", name, name, f"test_{number}", problem="find it")
    suite.write()
    for number in range(2):
        for part, image in (("images", "b.jpg"), ("masks", "a_mask.png")):
            (folder / "my_data" / part).mkdir(parents=True, exist_ok=True)
            Image.open(folder / image).save(folder / "my_data" / part / f"{number}.png")
    (folder / "my_data" / "prompt.txt").write_text("red circle")
    save_random_coprs(folder / "coprs_checkpoint")
    nano = conceptseg_hf.nano_checkpoint()
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "suite").symlink_to(folder / "suite")
    shutil.copytree(nano, folder / "path" / "to" / "checkpoint")
    shutil.copytree(nano, folder / "facebook" / "sam3")
    arguments = ["--to-original", "--checkpoint", str(nano), "--out", str(folder / HUB_IDS[0])]
    assert main(["convert", *arguments]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def words_of(command: str) -> list[str]:
    """The words of a command as they are run; an ellipsis stands for options that are left out."""
    words = [word for word in shlex.split(command)[1:] if word != "..."]
    words += SHORTENED.get(words[0], [])
    if "--engine" in words:  # tests/batch runs Ray
        words = words[: words.index("--engine")]
    if "cuda" in words:
        words += ["--device", "cpu"]
    return words


OURS = [
    command
    for command in COMMANDS
    if command.startswith("conceptseg ") and command != "conceptseg app"  # tests/app
]


def test_the_other_commands_are_known():
    """What is not run here: it installs, or other tests run it."""
    others = {" ".join(command.split()[:2]) for command in COMMANDS if command not in OURS}
    assert others == {
        "make demo",
        "make test",
        "pip install",
        "torchrun --nproc_per_node",
        "conceptseg app",
        "RAY_ADDRESS=auto conceptseg",
    }
    assert len(OURS) >= 20


def test_documents_whose_snippets_are_not_run_are_known():
    with_snippets = {
        f"docs/{path.name}"
        for path in (ROOT / "docs").glob("*.md")
        if any(language in ("", "python", "bash") for language, _ in blocks(f"docs/{path.name}"))
    }
    assert with_snippets == {*DOCUMENTS[1:]} | NOT_RUN | RUN_BY.keys()
    for document, test in RUN_BY.items():
        assert f'"{pathlib.Path(document).name}"' in (ROOT / test).read_text(encoding="utf-8")


def test_the_readme_is_short_and_its_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert text.index("docs/overview.png") < 1000  # on the first screen


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "api" / "inference" / "index.html").read_text(encoding="utf-8")
    assert "stream_segment" in reference and "router_base" in reference
    assert (tmp_path / "site" / "training" / "index.html").is_file()


@pytest.mark.parametrize("command", OURS)
def test_commands_run(command, folder, capsys):
    words = words_of(command)
    if words[0] == "compare":
        for name, router in (("a", "sam_only"), ("b", "adaptive")):
            assert main(["evaluate", "--limit", "1", "--router", router, "--output-dir", f"out/{name}"]) == 0
    if "--concept" in words and not pathlib.Path(words[words.index("--concept") + 1]).is_file():
        assert main(words_of(next(other for other in OURS if other.startswith("conceptseg induce")))) == 0
    if words[0] == "evaluate" and "--output-dir" not in words:
        words += ["--output-dir", f"out/evaluation_{OURS.index(command)}"]
    if words[0] == "train":
        pytest.importorskip("trl")
    code = main(words)
    # 1: the small tree has not as many files as the paper's datasets.
    assert code == (1 if words[:2] == ["data", "check"] else 0), capsys.readouterr().err


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_snippets_run(document, folder):
    """One after the other in one namespace, as a reader runs them."""
    snippets = [text for language, text in blocks(document) if language == "python"]
    if document == "docs/scale.md" and not pathlib.Path("scratch.safetensors").is_file():
        assert (
            main(words_of(next(command for command in OURS if command.startswith("conceptseg induce")))) == 0
        )
    if document == "docs/quickstart.md":
        model = AutoModel.from_pretrained(conceptseg_hf.nano_checkpoint())
        model.vlm.save_pretrained(folder / HUB_IDS[2])
        model.sam.save_pretrained(folder / "facebook" / "sam3")
    if document == "docs/families.md":
        tiny = conceptseg_hf.ConceptSegForSegmentation(
            conceptseg_hf.ConceptSegConfig.from_preset("nano-qwen3")
        )
        tiny.vlm.save_pretrained(folder / QWEN3_ID)
        tiny.sam.save_pretrained(folder / "facebook" / "sam3")
        processor = AutoProcessor.from_pretrained(conceptseg_hf.nano_checkpoint())
        processor.with_settings(vlm_family="qwen3_vl").vlm_processor().save_pretrained(folder / QWEN3_ID)
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, document, "exec"), namespace)
    if document == "README.md":
        assert namespace["result"]["mask"].size == (320, 240)
    if document == "docs/families.md":
        processor = namespace["processor"]
        assert (processor.vlm_family, processor.canvas_size) == ("qwen3_vl", 608)
        assert namespace["model"].vlm.config.model_type == "qwen3_vl"
        assert namespace["config"].vlm_config.text_config.hidden_size == 2560
    if document == "docs/quickstart.md":
        assert namespace["result"]["mask"].size == (320, 240)
        assert [result.error for result in namespace["results"]] == [None]
        assert isinstance(namespace["model"], conceptseg_hf.ConceptSegForSegmentation)


def test_the_former_idiom_runs():
    """`model.segment(processor(image, prompt))`, as an earlier README had it."""
    path = conceptseg_hf.nano_checkpoint()
    model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
    (result,) = model.segment(processor("photo.jpg", "red circle"))
    assert result.error is None and result.mask.size == (320, 240)
