"""FiftyOne's model zoo: the copied source, and an archive from a server."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading

import pytest

pytestmark = pytest.mark.slow


def test_zoo_models_load_and_apply(fo, make_dataset):
    import fiftyone.zoo as foz

    from conceptseg_hf.integrations.fiftyone import install_zoo_models

    install_zoo_models()
    install_zoo_models()  # again: nothing breaks
    assert {"conceptseg-nano", "conceptseg-r1-7b"} <= set(foz.list_zoo_models())
    dataset = make_dataset(3)
    model = foz.load_zoo_model("conceptseg-nano", prompt="star", router="sam_only")
    assert foz.load_zoo_model("conceptseg-nano", prompt="star", router="sam_only") is model
    dataset.apply_model(model, "zoo")
    assert dataset.count("zoo") == len(dataset)


def test_other_weights_are_told_from_ours(fo, tmp_path):
    from conceptseg_hf.integrations.fiftyone import zoo

    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(ValueError, match="not in the format of conceptseg-hf; convert"):
        zoo.load_model("conceptseg-r1-7b", str(tmp_path))


def test_a_checkpoint_of_ours_loads_as_the_large_one(fo, tmp_path):
    import fiftyone.zoo as foz

    from conceptseg_hf import nano_checkpoint
    from conceptseg_hf.integrations.fiftyone import install_zoo_models

    folder = install_zoo_models() / "conceptseg-r1-7b"
    shutil.copytree(nano_checkpoint(), folder, dirs_exist_ok=True)
    try:
        model = foz.load_zoo_model("conceptseg-r1-7b", prompt="star")
        assert model.checkpoint == str(folder)
    finally:
        shutil.rmtree(folder)


def test_a_source_can_be_an_archive(fo, tmp_path, monkeypatch):
    import fiftyone.zoo as foz

    from conceptseg_hf.integrations.fiftyone.model_zoo import SOURCE

    shutil.copytree(SOURCE, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.make_archive(str(tmp_path / "zoo"), "zip", tmp_path / "source")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fo.config, "model_zoo_dir", str(tmp_path / "models"))
    try:
        foz.register_zoo_model_source(f"http://127.0.0.1:{server.server_port}/zoo.zip")
        model = foz.load_zoo_model("conceptseg-nano", prompt="star")
        assert type(model).__name__ == "ConceptSegFiftyOneModel"
    finally:
        server.shutdown()
        server.server_close()
