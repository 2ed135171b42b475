"""Profiles: what they set, that both files save it, and that nothing is said of settings that are as usual."""

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

# What the nine points say of the released code, by the fields that hold it.
RELEASED_CONFIG = {
    "end_of_turn_state": True,  # every state after the prompt
    "router_drop_parentheses": True,  # from SAM's text too
    "router_min_words": 0,  # l = 0 for a prompt that is all in parentheses
    "missing_answer": "empty",  # without <answer> SAM's text is empty
    "max_total_length": 2816,  # tokens in all
}
RELEASED_MOSAIC = {
    "grid": 2,  # always 2 x 2
    "resampling": "bilinear",
    "boxes_from": "cell",  # of the mask at 300 x 300
    "corners": "inclusive",
    "mark_single": False,
    "several_boxes": "enclosing",
}


class Model:
    """A model is its config here."""

    def __init__(self) -> None:
        self.config = ConceptSegConfig.from_preset("nano")


@pytest.fixture()
def own(processor):
    """A processor that a test may change, with the paper's template."""
    return processor.with_settings(prompt_template=OFFICIAL_TEMPLATE)


def test_released_is_what_was_found(own):
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


def test_paper_undoes_it(own, processor):
    model = Model()
    apply_profile(model, own, "released")
    apply_profile(model, own, "paper")
    assert model.config.switches == {"profile": "paper"}
    assert own.to_dict() == processor.with_settings(prompt_template=OFFICIAL_TEMPLATE).to_dict()


def test_a_template_and_a_canvas_of_ones_own_stay(own):
    words = dict.fromkeys(
        ("with_proxy", "support_only", "single_reference", "no_reference"), "{problem} in my words"
    )
    mine = own.with_settings(prompt_template={"system": "", **words}, canvas_size=640)
    changes = apply_profile(Model(), mine, "released")
    assert "prompt_template" not in changes and mine.template.with_proxy == "{problem} in my words"
    assert (mine.canvas_size, mine.coordinate_scale) == (640, own.coordinate_scale)
    assert find_template_profile(mine.template) is None
    spaced = own.with_settings(
        prompt_template={**OFFICIAL_TEMPLATE.to_dict(), "system": "You are a helpful assistant. "}
    )
    assert find_template_profile(spaced.template) == "paper"
    apply_profile(Model(), spaced, "paper")
    assert spaced.template.system.endswith(" "), "it is the paper's already"


def test_both_files_hold_the_profile_and_nothing_is_written_without(own, tmp_path):
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
    assert config.switches == {**RELEASED_CONFIG, "profile": "released"}
    assert type(processor) is ConceptSegProcessor and processor.mosaic == RELEASED_MOSAIC
    assert profile_changes("released", config, processor) == {}


def test_for_a_while(own):
    model = Model()
    before = copy.deepcopy(own.to_dict())
    with using_profile(model, own, "released") as processor:
        assert model.config.end_of_turn_state and processor.shortcut_size == 600
        assert processor.tokenizer is own.tokenizer
    assert model.config.switches == {} and own.to_dict() == before
    with using_profile(model, own, None) as processor:
        assert processor is own
    with pytest.raises(RuntimeError), using_profile(model, own, "released"):
        raise RuntimeError
    assert model.config.switches == {}


def test_what_differs_is_told(own):
    model = Model()
    apply_profile(model, own, "released")
    described = [model.config, own]
    assert describe_profile("released", *described, "released", "released") == "released"
    assert describe_profile("released", *described, "released", None) == "released"
    notified = describe_profile("released", *described, "standard", "default")
    assert notified == "released but protocol standard, loader default"
    model.config.end_of_turn_state = False
    own.prompt_template = OFFICIAL_TEMPLATE.to_dict()
    notified = describe_profile("released", *described, "released", "released")
    assert notified == "released but end_of_turn_state False, prompt_template another"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"missing_answer": "none"}, "missing_answer is 'none'; use 'prompt' or 'empty'"),
        ({"router_min_words": 3}, "router_min_words is 3; use 0 or 1"),
        ({"max_total_length": 0}, "max_total_length is 0; use at least 1"),
    ],
)
def test_fields_that_cannot_be_used(fields, message):
    with pytest.raises(ValueError, match=message):
        ConceptSegConfig.from_preset("nano", **fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shortcut_size": 0}, "shortcut_size is 0; give a positive number"),
        ({"mask_resampling": "nearest"}, "mask_resampling is 'nearest'; use 'bicubic' or 'bilinear'"),
        ({"sam_resampling": "box"}, "sam_resampling is 'box'"),
        ({"mosaic": {"cells": 3}}, "mosaic has the field 'cells'"),
        ({"tokenizer": None}, "no setting 'tokenizer' that is plain data"),
    ],
)
def test_settings_that_cannot_be_used(processor, settings, message):
    with pytest.raises(ValueError, match=message):
        processor.with_settings(**settings)


def test_the_command_knows_the_same_names(capsys):
    assert tuple(PROFILES) == NAMES
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--profile", "theirs"])
    assert "invalid choice: 'theirs'" in capsys.readouterr().err


def test_the_table_names_every_switch():
    """docs/weights.md: switch | paper | released | ours by default | effect measured."""
    lines = (Path(__file__).parents[1] / "docs" / "weights.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("| switch | paper | released | ours by default | effect measured |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 :]]
    rows = rows[: next(number for number, row in enumerate(rows) if len(row) != 5)]
    switches = " ".join(row[0] for row in rows)
    released = PROFILES["released"]
    names = [*released.config, *released.processor, *(f"mosaic.{name}" for name in RELEASED_MOSAIC)]
    names += ["sam_resampling", "mask_resampling"]
    names.remove("mosaic")
    assert not [name for name in names if f"`{name}`" not in switches.replace("processor `", "`")]
    assert all(row[4] for row in rows) and "@" not in "".join(map("".join, rows))
