"""Files that are no concept, for the tests of everything that reads concepts."""

from __future__ import annotations

import functools
import json
import struct

import torch
from safetensors.torch import save


@functools.cache
def hostile_files() -> dict[str, bytes]:
    """Contents that are no concept, each with an idea of what is wrong."""
    good = {"prompt": "p", "phrases": ["x"], "rule": None, "threshold": 0.1, "score": None, "scores": []}
    good["model_hash"] = ""

    def content(tensors=None, version="1", kind="conceptseg-concept", **changes) -> bytes:
        text = json.dumps({**good, **changes})
        return save(tensors or {}, {"format": kind, "version": version, "concept": text})

    whole = content()
    header = struct.pack("<Q", 10_000_000) + b"{" * 100  # of which most is missing
    files = {
        "empty": b"",
        "short": b"abc",
        "zeros": bytes(64),
        "text": b"concept: star\n" * 30,
        "cut header": whole[:40],
        "cut tensor": content({"concept_embeds": torch.zeros(8, 8)})[:-100],
        "huge header": header,
        "endless header": struct.pack("<Q", 2**62) + b"{}",
        "no metadata": save({"concept_embeds": torch.zeros(2, 2)}),
        "another format": content(kind="weights"),
        "newer version": content(version="2"),
        "other tensors": content({"weight": torch.zeros(2, 2)}),
        "NaN tokens": content({"concept_embeds": torch.full((2, 2), float("nan"))}),
        "flat tokens": content({"concept_embeds": torch.zeros(4)}),
        "integer tokens": content({"concept_embeds": torch.zeros(2, 2, dtype=torch.long)}),
        "NaN threshold": content(threshold=float("nan")),
        "negative threshold": content(threshold=-1),
        "text threshold": content(threshold="high"),
        "score above 1": content(score=7),
        "rule score above 1": content(rule_score=7),
        "NaN IoU of reasoning": content(reasoning_ious=[float("nan")]),
        "IoUs of reasoning null": content(reasoning_ious=None),
        "IoU of the rule above 1": content(rule_ious=[0.5, 2]),
        "no phrases": content(phrases=[]),
        "phrases of numbers": content(phrases=[1, 2]),
        "phrases null": content(phrases=None),
        "blank prompt": content(prompt="  "),
        "prompt of a list": content(prompt=["a"]),
        "long rule": content(rule="x" * 50_000),
        "scores of text": content(scores=["good"]),
        "scores without names": content(scores=[{"score": 1.0}]),
        "NaN scores": content(scores=[{"name": "x", "score": float("nan"), "per_reference": []}]),
        "scores above 1": content(scores=[{"name": "x", "score": 0.5, "per_reference": [2]}]),
        "phrases in one text": content(phrases="scratch"),
        "phrases in a mapping": content(phrases={"scratch": 1}),
        "huge threshold": content(threshold=10**400),
        "hash of a list": content(model_hash=["a"]),
        "rule of a number": content(rule=3),
        "no tokens": content({"concept_embeds": torch.zeros(0, 4)}),
        "8-bit tokens": content({"concept_embeds": torch.zeros(2, 4).to(torch.float8_e4m3fn)}),
        "complex tokens": content({"concept_embeds": torch.zeros(2, 4, dtype=torch.complex64)}),
        "many tokens": content({"concept_embeds": torch.zeros(1_100_000, 4)}),
        "header of text": struct.pack("<Q", 20) + b"this is not JSON ..." + bytes(64),
        "header of a list": struct.pack("<Q", 2) + b"[]" + bytes(64),
        "10 MB header": struct.pack("<Q", 10_000_000) + b"{" + b" " * 9_999_998 + b"}",
    }
    broken = {"no JSON": "{", "a JSON list": "[]", "JSON null": "null", "nested JSON": "[" * 100_000}
    for name, text in broken.items():
        files[name] = save({}, {"format": "conceptseg-concept", "version": "1", "concept": text})
    return files
