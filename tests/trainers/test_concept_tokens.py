"""Tests of the comparison of SAM 3's prompts with and without concept tokens."""

from __future__ import annotations

import pytest
from conceptseg_trainers.nano.evidence.concept_tokens import PROMPTS, main, prompt_ious, table

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, nano_checkpoint
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE


def test_prompts_agree_with_those_of_an_evaluation() -> None:
    path = nano_checkpoint()
    model = ConceptSegForSegmentation.from_pretrained(path).eval()
    processor = ConceptSegProcessor.from_pretrained(path)
    split = ConceptShapes("test", size=SIDE)
    samples = [sample for sample in (split[i] for i in range(8)) if sample.present]
    ious = prompt_ious(model, processor, samples)
    assert tuple(ious) == PROMPTS
    for prompt, sam_prompt in {
        "box": "box",
        "text": "text",
        "Z": "concept",
        "Z + text": "concept+text",
    }.items():
        report = evaluate(
            model,
            samples,
            processor=processor,
            router="full_reasoning",
            sam_prompt=sam_prompt,
            generation_config={"max_new_tokens": 64},
            batch_size=len(samples),
        )
        assert [record["foreground_iou"] for record in report.records] == pytest.approx(
            ious[prompt], abs=1e-6
        )


def test_table_averages_seeds_before_it_pairs_samples() -> None:
    seeds = [
        {"CI": {prompt: [0.5, 0.5] for prompt in PROMPTS} | {"Z + text": [0.6, 0.8]}},
        {"CI": {prompt: [0.5, 0.5] for prompt in PROMPTS} | {"Z + text": [0.8, 0.6]}},
    ]
    row = table(seeds).splitlines()[2]
    assert row.startswith(
        "| CI | 2 | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | 0.700 | +0.200 [+0.200, +0.200]"
    )


def test_command_names_a_folder_that_is_no_checkpoint(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "is not a checkpoint; train one with `make nano`" in capsys.readouterr().err
