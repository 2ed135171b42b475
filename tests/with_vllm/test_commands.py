"""The command with vLLM, in this process."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm", reason="vLLM needs an environment of its own: run `make test-vllm`")

from conceptseg_hf.data import load_benchmark


@pytest.fixture
def run(monkeypatch, engine):
    """Run a subcommand; vLLM engines that it builds are the engine of the other tests."""
    from conceptseg_hf import vllm_engine
    from conceptseg_hf.cli import main

    monkeypatch.setattr(vllm_engine, "VllmEngine", lambda model, processor: engine)
    return lambda *arguments: main([str(argument) for argument in arguments])


def test_segment_writes_the_same_answer(run, tmp_path) -> None:
    sample = load_benchmark("concept-shapes", split="test", limit=1)[0]
    sample.image.save(tmp_path / "image.png")
    sample.references[0].image.save(tmp_path / "reference.png")
    box = ",".join(map(str, sample.references[0].box))
    records = {}
    for engine in ("transformers", "vllm"):
        command = ["segment", tmp_path / "image.png", "--prompt", sample.prompt, "--router", "full_reasoning"]
        command += ["--reference", f"{tmp_path / 'reference.png'}:{box}", "--output-dir", tmp_path / engine]
        assert run(*command, "--vlm-engine", engine) == 0
        records[engine] = json.loads((tmp_path / engine / "image.json").read_text(encoding="utf-8"))
    assert records["vllm"].pop("vlm_engine") == "vllm"
    names = ("think", "rule", "answer", "box")
    assert [records["vllm"][name] for name in names] == [records["transformers"][name] for name in names]


def test_evaluate_gives_the_same_records_and_refuses_those_of_another_engine(run, tmp_path, capsys) -> None:
    command = ["evaluate", "--router", "full_reasoning", "--limit", 10, "--batch-size", 4, "--output-dir"]
    assert run(*command, tmp_path / "a") == 0
    assert run(*command, tmp_path / "b", "--mllm-engine", "vllm") == 0
    settings = {name: json.loads((tmp_path / name / "settings.json").read_text()) for name in "ab"}
    assert settings["b"].pop("vlm_engine") == "vllm" and settings["a"] == settings["b"]
    records = {
        name: [json.loads(line) for line in (tmp_path / name / "records.jsonl").read_text().splitlines()]
        for name in "ab"
    }
    assert len(records["a"]) == len(records["b"]) >= 10
    for one, other in zip(records["a"], records["b"]):
        assert one.get("answer") == other.get("answer") and one.get("rule") == other.get("rule")
        assert one.get("fg_iou", 0) == pytest.approx(other.get("fg_iou", 0), abs=1e-3)
    capsys.readouterr()
    assert run(*command, tmp_path / "a", "--vlm-engine", "vllm") == 2
    assert "vlm_engine" in capsys.readouterr().err
