"""Tests of profiles: their settings, saving them, and omitting default values."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import AutoProcessor

from conceptseg_hf import ConceptSegConfig, ConceptSegProcessor, cli
from conceptseg_hf.cli.arguments import PROFILES as NAMES
from conceptseg_hf.profiles import (
    PROFILES,
    apply_profile,
    describe_profile,
    find_template_profile,
    profile_changes,
    using_profile,
)
from conceptseg_hf.prompt_template import OFFICIAL_TEMPLATE, released_template

# Differences of the released code from the paper, by config and mosaic field.
RELEASED_CONFIG = {
    "end_of_turn_state": True,  # the CTM attends to all states after the prompt
    "router_drop_parentheses": True,  # also removed from SAM's text
    "router_min_words": 0,  # l = 0 for a prompt that is completely in parentheses
    "missing_answer": "empty",  # SAM's text is empty without <answer>
    "max_total_length": 2816,  # prompt and completion together
}
RELEASED_MOSAIC = {
    "grid": 2,  # always 2 x 2
    "resampling": "bilinear",
    "boxes_from": "cell",  # boxes of masks resized to 300 x 300
    "corners": "inclusive",
    "mark_single": False,
    "several_boxes": "enclosing",
}


class Model:
    """A stand-in for a model, which has only a config."""

    def __init__(self) -> None:
        self.config = ConceptSegConfig.from_preset("nano")


@pytest.fixture()
def own(processor):
    """A copy of the processor with the paper's template."""
    return processor.with_settings(prompt_template=OFFICIAL_TEMPLATE)


def test_settings_of_the_released_profile(own):
    model = Model()
    changes = apply_profile(model, own, "released")
    assert {name: getattr(model.config, name) for name in RELEASED_CONFIG} == RELEASED_CONFIG
    assert model.config.profile == "released"
    assert (own.mosaic, own.shortcut_size) == (RELEASED_MOSAIC, 600)
    assert own.template == released_template()
    assert set(changes) == {
        *RELEASED_CONFIG,
        *(f"mosaic.{name}" for name in RELEASED_MOSAIC),
        *("shortcut_size", "prompt_template"),
    }
    assert changes["mosaic.grid"] == (None, 2) and changes["prompt_template"] == ("paper", "released")
    assert profile_changes("released", model.config, own) == {}
    assert (PROFILES["released"].protocol, PROFILES["released"].loader) == ("released", "released")
    assert (PROFILES["paper"].protocol, PROFILES["paper"].loader) == ("standard", "default")


def test_paper_profile_restores_the_defaults(own, processor):
    model = Model()
    apply_profile(model, own, "released")
    apply_profile(model, own, "paper")
    assert model.config.non_default_fields == {"profile": "paper"}
    assert own.to_dict() == processor.with_settings(prompt_template=OFFICIAL_TEMPLATE).to_dict()


def test_custom_template_and_canvas_are_kept(own):
    texts = dict.fromkeys(
        ("with_proxy", "support_only", "single_reference", "no_reference"), "{problem} in my words"
    )
    custom = own.with_settings(prompt_template={"system": "", **texts}, canvas_size=640)
    changes = apply_profile(Model(), custom, "released")
    assert "prompt_template" not in changes and custom.template.with_proxy == "{problem} in my words"
    assert (custom.canvas_size, custom.coordinate_scale) == (640, own.coordinate_scale)
    assert find_template_profile(custom.template) is None
    spaced = own.with_settings(
        prompt_template={**OFFICIAL_TEMPLATE.to_dict(), "system": "You are a helpful assistant. "}
    )
    assert find_template_profile(spaced.template) == "paper"
    apply_profile(Model(), spaced, "paper")
    assert spaced.template.system.endswith(" "), "the template already matches the paper's"


def test_profile_is_saved_and_default_settings_are_omitted(own, tmp_path):
    model = Model()
    plain = tmp_path / "plain"
    model.config.save_pretrained(plain)
    own.save_pretrained(plain)
    texts = [(plain / name).read_text() for name in ("config.json", "processor_config.json")]
    switches = (*RELEASED_CONFIG, "profile", "mosaic", "shortcut_size", "sam_resampling", "mask_resampling")
    assert not [name for name in switches for text in texts if f'"{name}"' in text]

    apply_profile(model, own, "released")
    model.config.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert {name: content[name] for name in RELEASED_CONFIG} == RELEASED_CONFIG
    config, processor = ConceptSegConfig.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert config.non_default_fields == {**RELEASED_CONFIG, "profile": "released"}
    assert type(processor) is ConceptSegProcessor and processor.mosaic == RELEASED_MOSAIC
    assert profile_changes("released", config, processor) == {}


def test_using_profile_restores_the_settings(own):
    model = Model()
    before = copy.deepcopy(own.to_dict())
    with using_profile(model, own, "released") as processor:
        assert model.config.end_of_turn_state and processor.shortcut_size == 600
        assert processor.tokenizer is own.tokenizer
    assert model.config.non_default_fields == {} and own.to_dict() == before
    with using_profile(model, own, None) as processor:
        assert processor is own
    with pytest.raises(RuntimeError), using_profile(model, own, "released"):
        raise RuntimeError
    assert model.config.non_default_fields == {}


def test_describe_profile_lists_differences(own):
    model = Model()
    apply_profile(model, own, "released")
    described = [model.config, own]
    assert describe_profile("released", *described, "released", "released") == "released"
    assert describe_profile("released", *described, "released", None) == "released"
    description = describe_profile("released", *described, "standard", "default")
    assert description == "released but protocol standard, loader default"
    model.config.end_of_turn_state = False
    own.prompt_template = OFFICIAL_TEMPLATE.to_dict()
    description = describe_profile("released", *described, "released", "released")
    assert description == "released but end_of_turn_state False, prompt_template another"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"missing_answer": "none"}, "missing_answer is 'none'; use 'prompt' or 'empty'"),
        ({"router_min_words": 3}, "router_min_words is 3; use 0 or 1"),
        ({"max_total_length": 0}, "max_total_length is 0; use at least 1"),
    ],
)
def test_rejects_invalid_config_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ConceptSegConfig.from_preset("nano", **fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shortcut_size": 0}, "shortcut_size is 0; use a positive number"),
        ({"mask_resampling": "nearest"}, "mask_resampling is 'nearest'; use 'bicubic' or 'bilinear'"),
        ({"sam_resampling": "box"}, "sam_resampling is 'box'"),
        ({"mosaic": {"cells": 3}}, "mosaic: unknown field 'cells'"),
        ({"tokenizer": None}, "unknown setting 'tokenizer'"),
    ],
)
def test_rejects_invalid_processor_settings(processor, settings, message):
    with pytest.raises(ValueError, match=message):
        processor.with_settings(**settings)


def test_profile_choices_of_the_command(capsys):
    assert tuple(PROFILES) == NAMES
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--profile", "theirs"])
    assert "invalid choice: 'theirs'" in capsys.readouterr().err


def test_documentation_lists_all_profile_settings():
    """The table of docs/weights.md: setting | paper | released | default | measured effect."""
    lines = (Path(__file__).parents[1] / "docs" / "weights.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| setting | paper | released | default | measured effect |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 :]]
    rows = rows[: next(number for number, row in enumerate(rows) if len(row) != 5)]
    switches = " ".join(row[0] for row in rows)
    released = PROFILES["released"]
    names = [*released.config, *released.processor, *(f"mosaic.{name}" for name in RELEASED_MOSAIC)]
    names += ["sam_resampling", "mask_resampling"]
    names.remove("mosaic")
    assert not [name for name in names if f"`{name}`" not in switches.replace("processor `", "`")]
    assert all(row[4] for row in rows) and "@" not in "".join(map("".join, rows))
