from __future__ import annotations

import torch
from PIL import Image

from conceptseg_hf.outputs import ConceptSegmentation, ConceptSegOutput

RESULT_KEYS = {  # documented keys
    *(
        "mask",
        "label",
        "score",
        "route",
        "route_reason",
        "presence",
        "threshold",
        "think",
        "rule",
        "answer",
        "completion",
    ),
    *("box", "check", "check_reference", "check_iou", "heatmap", "error"),
}


def test_result_dict_has_the_documented_keys():
    mask = Image.new("L", (3, 2))
    result = ConceptSegmentation(mask=mask, label="circle", score=0.5, route="shortcut").to_dict()
    assert set(result) == {*RESULT_KEYS, "decode_presence"}
    assert result["mask"] is mask and result["error"] is None


def test_failed_result():
    result = ConceptSegmentation.failed("The image is broken.", "circle")
    assert result.mask is None and result.label == "circle" and result.score == 0.0 and result.route is None
    assert result.error == "The image is broken."


def test_model_output_omits_none_values():
    output = ConceptSegOutput(concept_embeds=torch.zeros(1, 8, 4))
    assert list(output) == ["concept_embeds"] and output.loss is None
