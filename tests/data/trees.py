"""Small datasets in the published layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (24, 16)


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_mask(
    path: Path, box: tuple[int, int, int, int] = (4, 2, 12, 10), size: tuple[int, int] = SIZE
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(mask).save(path)
    return path


def save_json(path: Path, content: Any, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    return path


class AuthorsTree:
    """all_meta.json and the files that it lists; `write` writes all_meta.json."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metadata: dict[str, dict[str, list[dict[str, Any]]]] = {"train": {}, "test": {}}

    def add(self, split: str, dataset: str, concept: str, stem: str, **changes: Any) -> dict[str, Any]:
        """Add an item with a single image and write its files."""
        item = {
            "img_path": [f"{dataset}/{split}/image/{stem}.jpg"],
            "mask_path": f"{dataset}/{split}/mask/{stem}.png",
            "cls_name": concept,
            "dataset_name": dataset,
            "task_name": dataset,
        } | changes
        self.metadata[split].setdefault(concept, []).append(item)
        for number, path in enumerate(item["img_path"]):
            save_image(self.root / path, seed=hash_of(path) + number)
        save_mask(self.root / item["mask_path"])
        return item

    def write(self) -> Path:
        save_json(self.root / "all_meta.json", self.metadata)
        return self.root


def hash_of(text: str) -> int:
    return sum(ord(letter) * place for place, letter in enumerate(text, start=1)) % 1000
