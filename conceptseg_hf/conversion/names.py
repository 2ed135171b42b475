"""Mapping between the authors' names of the VLM and CTM tensors and ours.

The released checkpoint is Qwen2.5-VL in the layout that Transformers used before version 4.52, with three
additional parts: `learnable_query` and `connector` (the CTM) and `proj_to_sam` (its projection).
"""

from __future__ import annotations

import re

# (authors', ours): prefixes of the VLM, most specific first.
_VLM_PREFIXES = (
    ("model.visual.", "vlm.model.visual."),  # the current layout of Transformers is read, but never written
    ("model.language_model.", "vlm.model.language_model."),
    ("visual.", "vlm.model.visual."),
    ("model.", "vlm.model.language_model."),
    ("lm_head.", "vlm.lm_head."),
)
_CTM_NAMES = {"learnable_query.param.weight": "ctm.queries", "connector.pos_embed": "ctm.position_embedding"}
_CTM_BLOCK_PARTS = {
    "norm0": "norm_queries",
    "norm1": "norm_states",
    "norm2": "norm_mlp",
}  # other parts have the same names
_CTM_NAMES_BACK = {ours: theirs for theirs, ours in _CTM_NAMES.items()}
_CTM_BLOCK_PARTS_BACK = {ours: theirs for theirs, ours in _CTM_BLOCK_PARTS.items()}

QUERIES = "learnable_query.param.weight"
"""The authors' name of the concept queries, a tensor of shape (L2, C)."""


def from_original(name: str) -> str | None:
    """Return our name of one of the authors' tensors, or None if the name is unknown."""
    if name in _CTM_NAMES:
        return _CTM_NAMES[name]
    if block := re.fullmatch(r"connector\.blocks\.(\d+)\.(\w+)\.(.+)", name):
        number, part, rest = block.groups()
        return f"ctm.blocks.{number}.{_CTM_BLOCK_PARTS.get(part, part)}.{rest}"
    if name.startswith("proj_to_sam."):
        return f"ctm.{name}"
    for theirs, ours in _VLM_PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


def to_original(name: str) -> str | None:
    """Return the authors' name of one of our tensors, or None for SAM 3, which their checkpoints do not contain.

    Names of the VLM's original format (`vlm.model.layers...`), in which a checkpoint may have been saved, are accepted.
    """
    if name in _CTM_NAMES_BACK:
        return _CTM_NAMES_BACK[name]
    if block := re.fullmatch(r"ctm\.blocks\.(\d+)\.(\w+)\.(.+)", name):
        number, part, rest = block.groups()
        return f"connector.blocks.{number}.{_CTM_BLOCK_PARTS_BACK.get(part, part)}.{rest}"
    if name.startswith("ctm.proj_to_sam."):
        return name.removeprefix("ctm.")
    if name.startswith("vlm."):
        ours = from_original(name.removeprefix("vlm.")) or ""
        for theirs, prefix in reversed(_VLM_PREFIXES):
            if ours.startswith(prefix):
                return theirs + ours.removeprefix(prefix)
    return None
