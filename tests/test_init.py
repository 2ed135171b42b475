from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

import conceptseg_hf
from conceptseg_hf import (
    ConceptSegConfig,
    ConceptSegForSegmentation,
    ConceptSegmentationPipeline,
    ConceptSegProcessor,
)

IMPORT_AFTER_THE_BACKBONES = """
import sys
import torchvision_shim
from transformers import Qwen2_5_VLForConditionalGeneration, Sam3Model
before = set(sys.modules)
import conceptseg_hf
print(*sorted(set(sys.modules) - before))
"""
NO_SOCKETS = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")

socket.socket.__init__ = socket.create_connection = socket.getaddrinfo = refuse
import torchvision_shim
from transformers import GenerationMixin  # older releases import scikit-learn, which imports pandas
loaded_before = set(sys.modules)
import conceptseg_hf, conceptseg_trainers
heavy = {"trl", "deepspeed", "fiftyone", "datasets", "matplotlib", "pandas", "pyarrow"}
heavy &= set(sys.modules) - loaded_before
assert not heavy, heavy
"""


def test_registration_is_idempotent():
    for _ in range(2):
        conceptseg_hf.register()
    assert CONFIG_MAPPING["conceptseg"] is ConceptSegConfig
    assert isinstance(AutoConfig.for_model("conceptseg_ctm"), conceptseg_hf.ConceptTranslationConfig)
    task, _ = PIPELINE_REGISTRY.check_task("concept-segmentation")[:2]
    assert task == "concept-segmentation"
    assert PIPELINE_REGISTRY.supported_tasks[task]["impl"] is ConceptSegmentationPipeline


def test_auto_classes(tmp_path, model, processor):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is ConceptSegForSegmentation
    assert type(AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))) is ConceptSegForSegmentation
    assert type(AutoProcessor.from_pretrained(tmp_path)) is ConceptSegProcessor


def test_is_not_registered_for_mask_generation(model):
    """Models for mask generation are prompted with points and boxes, which ConceptSeg does not support."""
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForMaskGeneration.from_config(model.config)


def test_all_public_names_exist():
    assert all(hasattr(conceptseg_hf, name) for name in conceptseg_hf.__all__)
    assert conceptseg_hf.nano_checkpoint().parts[-3:] == ("conceptseg_hf", "checkpoints", "nano")


def test_import_opens_no_socket_and_loads_no_heavy_packages(fresh_python):
    fresh_python(NO_SOCKETS)


def test_import_loads_little_beyond_the_backbones(fresh_python):
    """The import time in seconds is measured by `make bench`."""
    loaded = fresh_python(IMPORT_AFTER_THE_BACKBONES).split()
    own = [name for name in loaded if name.startswith("conceptseg_hf")]
    assert len(own) <= 70 and not any(
        name.startswith(("conceptseg_hf.data", "conceptseg_hf.evaluation", "conceptseg_hf.integrations"))
        for name in own
    )
    others = {".".join(name.split(".")[:2]) for name in loaded if name not in own}
    assert others == {"transformers.pipelines", "PIL.ImageFile", "PIL.TiffImagePlugin"}
