"""Tests of ablations: valid and invalid definitions, and the comparison of each variant with the baseline."""

from __future__ import annotations

import csv
import io
import json

import pytest

from conceptseg_hf.evaluation.running.ablation import ablate, ablation_names, load_ablation
from conceptseg_hf.router import ROUTER_MODES
from conceptseg_hf.sam_prompt import SAM_PROMPTS

TWO = (
    "variants:\n  one: {router: sam_only}\n  two: {router: full_reasoning, generation: {max_new_tokens: 4}}\n"
)


@pytest.fixture()
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_ablations_of_the_package_are_valid():
    assert ablation_names() == ["concept_queries", "prompt", "reference_seeds", "references", "router"]
    ablations = {name: load_ablation(name) for name in ablation_names()}
    routers = {
        settings.get("router") for ablation in ablations.values() for settings in ablation.variants.values()
    }
    assert routers - {None} == set(ROUTER_MODES)
    prompts = {settings.get("sam_prompt") for settings in ablations["prompt"].variants.values()}
    assert prompts - {None} == set(SAM_PROMPTS)
    assert [settings["num_queries"] for settings in ablations["concept_queries"].variants.values()] == [
        1,
        2,
        4,
        8,
        16,
    ]
    assert len({settings["seed"] for settings in ablations["reference_seeds"].variants.values()}) == 3
    assert ablations["reference_seeds"].deviation
    assert ablations["references"].variants["1x1"]["max_references"] == 1


def test_loads_a_user_file(write):
    ablation = load_ablation(write(TWO))
    assert (ablation.name, ablation.baseline, list(ablation.variants)) == ("mine", "one", ["one", "two"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: [", "is not YAML"),
        ("- a", "has no variants"),
        ("variants: {one: {}}", "it has 1 variants"),
        (TWO + "color: red", "unknown key 'color'"),
        (TWO + "baseline: three", "the baseline 'three' is not a variant"),
        ("variants: {one: {learning_rate: 1}, two: {}}", "variant 'one'.*unknown setting 'learning_rate'"),
        ("variants: {one: {seed: many}, two: {}}", "seed is 'many'; give an integer"),
        ("variants: {one: {max_references: true}, two: {}}", "max_references is True"),
        ("variants: {one: [], two: 3}", "variant 'two': the settings are 3"),
        ("variants: {a b: {}, a-b: {}}", "share a folder name"),
        (
            f"variants: {{{'ü' * 128}: {{}}, b: {{}}}}",
            r"the variant name 'ü{40}'\.\.\. is too long for a folder name",
        ),
    ],
)
def test_invalid_files_raise(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_ablation(write(text))


def test_unknown_name_raises():
    with pytest.raises(FileNotFoundError, match="'other' is neither a file nor one of concept_queries"):
        load_ablation("other")


def run(model, processor, ablation, folder, **options):
    return ablate(ablation, model, folder, processor=processor, **({"limit": 12} | options))


def test_evaluates_each_variant_and_resumes(model, processor, write, tmp_path):
    ablation = load_ablation(write(TWO))
    report = run(model, processor, ablation, tmp_path / "out", limit=24)
    assert [row.variant for row in report.table] == ["one", "two"]
    assert report.table[0].difference is None
    second = report.table[1]
    assert second.difference.mean == pytest.approx(second.total.mean - report.table[0].total.mean)
    assert sum(second.counts) == second.difference.samples == 22
    assert second.mean_miou_difference.mean == pytest.approx(
        second.mean_miou.mean - report.table[0].mean_miou.mean
    )
    records = tmp_path / "out" / "two" / "records.jsonl"
    before = records.stat().st_mtime_ns, records.read_text()
    resumed = run(model, processor, ablation, tmp_path / "out", limit=24)
    assert records.read_text() == before[1]
    assert resumed.to_markdown() == report.to_markdown()
    assert {path.name for path in (tmp_path / "out" / "one").iterdir()} >= {"report.md", "gallery.html"}

    assert (tmp_path / "out" / "ablation.md").read_text() == report.to_markdown() + "\n"
    content = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert content["table"][1]["stated"]["router"] == "full_reasoning"
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "ablation.csv").read_text())))
    assert float(lines[1]["difference mean"]) == pytest.approx(second.difference.mean)
    assert (lines[0]["difference mean"], lines[0]["samples"]) == ("", "24")


def test_reports_the_deviation_over_seeds(model, processor, write, tmp_path):
    text = "deviation: true\nvariants:\n" + "".join(
        f"  s{seed}: {{router: full_reasoning, seed: {seed}, generation: {{max_new_tokens: 4}}}}\n"
        for seed in (42, 43)
    )
    report = run(model, processor, load_ablation(write(text)), tmp_path / "out")
    assert [row.stated["seed"] for row in report.table] == [42, 43]
    levels = [[row.values["miou"] for row in variant.rows if row.level == "CD" and row.kind == "level"]
              for variant in report.reports.values()]  # fmt: skip
    first, second = levels[0][0], levels[1][0]
    mean, deviation = report.deviations["CD"]["miou"]
    assert mean == pytest.approx((first + second) / 2)
    assert deviation == pytest.approx(abs(first - second) / 2**0.5)
    assert "Mean ± standard deviation over the 2 variants" in report.to_markdown()


def test_concept_queries_require_separate_checkpoints(model, processor, make_model, write, tmp_path):
    text = "variants: {L2 = 8: {num_queries: 8}, L2 = 4: {num_queries: 4}}"
    ablation = load_ablation(write(text))
    with pytest.raises(
        ValueError, match=r"variant 'L2 = 4' needs a checkpoint with 4 concept queries, but .* has 8"
    ):
        run(model, processor, ablation, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "missing checkpoints must be detected before any variant is run"
    with pytest.raises(ValueError, match="has no variant 'L2 = 5'"):
        run(model, processor, ablation, tmp_path / "out", models={"L2 = 5": "x"})
    other = make_model(ctm_config=model.config.ctm_config.to_dict() | {"num_queries": 4})
    other.save_pretrained(tmp_path / "four")
    processor.save_pretrained(tmp_path / "four")
    report = ablate(
        ablation, model, tmp_path / "out", processor=processor, limit=1, models={"L2 = 4": tmp_path / "four"}
    )
    assert [row.stated["checkpoint"] for row in report.table][1] == "four"


def test_max_references_limits_the_references(model, processor, write, tmp_path):
    text = (
        "variants:\n  all: {router: full_reasoning, generation: {max_new_tokens: 4}}\n"
        "  one: {router: full_reasoning, max_references: 1, generation: {max_new_tokens: 4}}\n"
    )
    report = run(model, processor, load_ablation(write(text)), tmp_path / "out")
    several, single = (report.reports[name].records for name in ("all", "one"))
    for before, after in zip(several, single, strict=True):
        if before["level"] == "CR":
            assert before["completion"] == after["completion"]
        else:
            assert after["check_iou"] is None, "one reference has no proxy query"
    assert any(record["check_iou"] is not None for record in several if record["level"] == "CD")
