"""Commands and Python snippets of the documents run as they are written, in a folder that has the files they name."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from documents import HUB_IDS, ROOT, blocks, commands, words_of, write_files
from test_guides import GUIDES
from transformers import AutoModel, AutoProcessor

import conceptseg_hf
from conceptseg_hf.cli import main

DOCUMENTS = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("quickstart", "cli", "concepts", "how_it_works", "app", "scale", "families", "faq")
    ),
)
# Documents whose commands another test runs, with tiny random models.
RUN_BY = {"docs/qwen3.md": "tests/trainers/test_qwen3_guide.py"}
# Documents on models and long experiments that are tested elsewhere: tests/coprs, tests/trainers/test_evidence.py.
NOT_RUN = {"docs/coprs.md", "docs/evidence.md"}
QWEN3_ID = "Qwen/Qwen3-VL-4B-Instruct"


COMMANDS = list(dict.fromkeys(command for document in DOCUMENTS for command in commands(document)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return write_files(tmp_path_factory.mktemp("readme"))


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


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
    assert with_snippets == {*DOCUMENTS[1:], *GUIDES} | NOT_RUN | RUN_BY.keys()
    for document, test in RUN_BY.items():
        assert f'"{pathlib.Path(document).name}"' in (ROOT / test).read_text(encoding="utf-8")


def test_the_readme_is_short_and_its_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert text.index("docs/overview.png") < 1000  # on the first screen


def test_the_comparison_of_the_readme_is_that_of_the_site():
    """The page of the site has notes and sources for the cells."""
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/comparison.md"))
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) > 10 and "\n".join(re.sub(r" \[\d\]", "", row) for row in rows) in readme
    notes = re.findall(r"^(\d)\. ", page, re.MULTILINE)
    assert sorted(set(re.findall(r"\[(\d)\]", "\n".join(rows)))) == notes


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
    # 1: the small tree does not have as many files as the paper's datasets.
    incomplete = words[:2] == ["data", "check"] and "plain" not in words
    assert code == int(incomplete), capsys.readouterr().err


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
    if document == "docs/faq.md":
        assert [result["error"] for result in namespace["results"]] == [None, None]
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
