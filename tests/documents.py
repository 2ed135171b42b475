"""Commands and snippets of the documents, and the files that they name."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

from PIL import Image
from random_coprs import save_random_coprs

import conceptseg_hf
from conceptseg_hf.cli import main
from conceptseg_hf.data import GROUPS, load_benchmark

sys.path.insert(0, str(Path(__file__).parent / "data"))
from trees import AuthorsTree

ROOT = Path(conceptseg_hf.__file__).resolve().parents[1]
HUB_IDS = ("zhaoyuan666/ConceptSeg-R1-7B", "facebook/sam3", "Qwen/Qwen2.5-VL-7B-Instruct")

# Appended, where an option given twice has its last value: fewer samples and steps, and no GPU.
SHORTENED = {
    "evaluate": ["--limit", "1"],
    "ablate": ["--limit", "2"],
    "train": [
        *("--max_steps", "1", "--train_samples", "8", "--per_device_train_batch_size", "8"),
        *("--eval_strategy", "no", "--log_examples", "0"),
    ],
}


def blocks(document: str) -> list[tuple[str, str]]:
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


def command_lines(text: str) -> list[str]:
    """Return the commands of a block, without comments."""
    return [
        line.partition("  #")[0].strip()
        for line in text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]


def commands(document: str) -> list[str]:
    return [
        line
        for language, text in blocks(document)
        if language in ("", "bash")
        for line in command_lines(text)
    ]


def write_files(folder: Path) -> Path:
    """Write the files that the documents name."""
    samples = load_benchmark("concept-shapes", split="val")
    for name, sample in zip(("photo", "a", "b", "c"), samples):
        sample.image.resize((320, 240)).save(folder / f"{name}.jpg")
    (folder / "photos").mkdir()
    shutil.copy(folder / "photo.jpg", folder / "photos")
    for name, number in zip("ab", (1, 2)):
        samples[number].mask.resize((320, 240), Image.Resampling.NEAREST).save(folder / f"{name}_mask.png")
    suite = AuthorsTree(folder / "suite")
    for name, _ in GROUPS["table1"]:
        for number in range(2):
            suite.add("train", name, name, f"train_{number}")
            suite.add("test", name, name, f"test_{number}", problem="find it")
    suite.write()
    for number in range(2):
        for part, image in (("images", "b.jpg"), ("masks", "a_mask.png")):
            (folder / "my_data" / part).mkdir(parents=True, exist_ok=True)
            Image.open(folder / image).save(folder / "my_data" / part / f"{number}.png")
    (folder / "my_data" / "prompt.txt").write_text("red circle")
    save_random_coprs(folder / "coprs_checkpoint")
    nano = conceptseg_hf.nano_checkpoint()
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "suite").symlink_to(folder / "suite")
    shutil.copytree(nano, folder / "path" / "to" / "checkpoint")
    shutil.copytree(nano, folder / "facebook" / "sam3")
    arguments = ["--to-original", "--checkpoint", str(nano), "--out", str(folder / HUB_IDS[0])]
    assert main(["convert", *arguments]) == 0
    return folder


def words_of(command: str) -> list[str]:
    """The words of a command as they are run; an ellipsis stands for options that are left out."""
    words = [word for word in shlex.split(command)[1:] if word != "..."]
    words += SHORTENED.get(words[0], [])
    if "--engine" in words:  # tests/batch runs Ray
        words = words[: words.index("--engine")]
    if "cuda" in words:
        words += ["--device", "cpu"]
    return words
