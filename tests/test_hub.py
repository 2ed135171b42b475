from __future__ import annotations

import json

import pytest

from conceptseg_hf.hub import save_remote_stub

LOAD = """
import sys
import torchvision_shim
from transformers import AutoConfig, AutoModel, AutoProcessor
folder = sys.argv[1]
try:
    AutoModel.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("remote code ran without consent")
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
print()  # Transformers asks a question before it refuses
print(type(config).__name__, type(model).__name__, type(model).__module__, type(processor).__name__,
processor.canvas_size)
"""

LOAD_AFTER_IMPORT = """
import sys
import conceptseg_hf
from transformers import AutoModel, AutoProcessor, pipeline
pipe = pipeline("concept-segmentation", model=sys.argv[1], device="cpu")
print(type(pipe.model) is conceptseg_hf.ConceptSegForSegmentation, type(pipe.processor) is
conceptseg_hf.ConceptSegProcessor)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, processor):
    folder = tmp_path_factory.mktemp("stub")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_remote_stub(folder)
    return folder


def test_loads_with_trust_remote_code_and_without_import(checkpoint, fresh_python):
    expected = (
        "ConceptSegConfig ConceptSegForSegmentation conceptseg_hf.modeling_conceptseg ConceptSegProcessor 64"
    )
    assert fresh_python(LOAD, str(checkpoint)).splitlines()[-1] == expected


def test_after_the_import_the_stub_is_not_needed(checkpoint, fresh_python):
    assert fresh_python(LOAD_AFTER_IMPORT, str(checkpoint)) == "True True"


def test_files(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel"} and "custom_pipelines" not in config
    assert set(json.loads((checkpoint / "processor_config.json").read_text())["auto_map"]) == {
        "AutoProcessor"
    }
    before = {path: path.read_bytes() for path in checkpoint.glob("*.*")}
    save_remote_stub(checkpoint)
    assert {path: path.read_bytes() for path in checkpoint.glob("*.*")} == before


def test_needs_a_saved_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config"):
        save_remote_stub(tmp_path)
