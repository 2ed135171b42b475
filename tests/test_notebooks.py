"""The notebooks run from top to bottom, with smaller values of their parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import conceptseg_hf

FOLDER = Path(conceptseg_hf.__file__).resolve().parents[1] / "examples" / "notebooks"
PARAMETERS = {
    "quick_start": {},
    "defects": {"NUM_IMAGES": 3},
    "meta_grpo": {"NUM_GENERATIONS": 2, "STEPS": 1, "BATCH": 2},
    "evaluation": {"LIMIT": 10},
}
EXPECTED = {
    "quick_start": "<rule>",
    "defects": "explains the references with a mean IoU",
    "meta_grpo": "advantage",
    "evaluation": "SAM 3 alone",
}


def test_notebooks_are_known_and_stored_without_outputs():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(PARAMETERS)
    for path in FOLDER.glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs") and not cell.get("execution_count"), path


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_notebooks_run(name, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if name == "meta_grpo":
        pytest.importorskip("trl")
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER.parents[1]}:{FOLDER.parents[1] / 'trainers'}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            for parameter, value in PARAMETERS[name].items():
                cell.source, count = re.subn(
                    rf"^{parameter} = .*$", f"{parameter} = {value}", cell.source, flags=re.MULTILINE
                )
                assert count == 1
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())]
    assert EXPECTED[name] in "".join(texts)
