"""Small datasets in the published layouts."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

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


PHOTOS = (
    ("coco128", "CI", ("bus", "clock", "bus", "clock")),
    ("ecssd", "CD", ("salient object segmentation",) * 6),
)


def write_photos(root: Path, datasets: Sequence[tuple[str, str, Sequence[str]]] = PHOTOS) -> Path:
    """Photographs of one colored object each on noise, with their masks.

    Args:
        root: Folder of the datasets.
        datasets: Name, level, and prompts of the samples of each split.
    """
    rng = np.random.default_rng(0)
    for name, level, prompts in datasets:
        folder = root / name
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True)
        with (folder / "samples.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "image", "mask", "prompt", "references", "split", "level", "group"))
            for split in ("train", "test"):
                for number, prompt in enumerate(prompts):
                    stem = f"{split}_{number}"
                    image = Image.fromarray(rng.integers(0, 255, (150, 200, 3), dtype=np.uint8))
                    mask = Image.new("L", image.size)
                    box = tuple(map(int, (*rng.integers(10, 40, 2), *rng.integers(90, 140, 2))))
                    color = tuple(map(int, rng.integers(0, 255, 3)))
                    for canvas, fill in ((image, color), (mask, 255)):
                        getattr(ImageDraw.Draw(canvas), ("ellipse", "rectangle")[number % 2])(box, fill=fill)
                    image.save(folder / "images" / f"{stem}.png")
                    mask.save(folder / "masks" / f"{stem}.png")
                    paths = f"images/{stem}.png", f"masks/{stem}.png"
                    writer.writerow((f"{stem}-{prompt}", *paths, prompt, "", split, level, "group"))
    return root
