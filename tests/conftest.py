"""Shared fixtures: random models of the nano preset, and a processor with word-level tokenizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # both must be set before the imports below
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from families import tiny_config, tiny_processor
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vocabulary import QWEN_SPECIAL_TOKENS, sam_frame

import conceptseg_hf
from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, ConceptSegProcessor
from conceptseg_hf.presets import NANO_IMAGE_SIZE, NANO_SAM_TEXT_LENGTH

torch.set_num_threads(1)

SPECIAL_TOKENS = ["<|pad|>", *QWEN_SPECIAL_TOKENS]
WORDS = (
    *(
        "<think>",
        "</think>",
        "<rule>",
        "</rule>",
        "<check>",
        "</check>",
        "<bbox>",
        "</bbox>",
        "<answer>",
        "</answer>",
    ),
    *(
        "[",
        "]",
        ",",
        ".",
        "system",
        "user",
        "assistant",
        "a",
        "the",
        "is",
        "in",
        "out",
        "find",
        "same",
        "odd",
        "one",
    ),
    *(
        "red",
        "green",
        "blue",
        "circle",
        "square",
        "star",
        "left",
        "right",
        "large",
        "small",
        "object",
        "image",
    ),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the files with the most slow tests to the front, so that no worker starts one of them last."""
    slow_tests = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow_tests[item.path])


def build_vlm_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """Create a word-level tokenizer with template tags, punctuation, numbers up to 100, and a few words."""
    vocabulary = {
        token: i for i, token in enumerate([*SPECIAL_TOKENS, "<|unk|>", *WORDS, *map(str, range(101))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"</?\w+>|\d+|\w+|[^\w\s]"), "isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        additional_special_tokens=[
            token for token in SPECIAL_TOKENS if token not in ("<|pad|>", "<|im_end|>")
        ],
        **settings,
    )


def build_sam_tokenizer() -> PreTrainedTokenizerFast:
    """Create a word-level tokenizer that adds begin and end tokens, as CLIP's does."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = sam_frame()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def vlm_family(request) -> str:
    """The family of the VLM of `processor` and `model`; see `families.all_families`."""
    return getattr(request, "param", "qwen2_5_vl")


@pytest.fixture(scope="session")
def processor(vlm_family) -> ConceptSegProcessor:
    # It requires torchvision or the shim of conceptseg_hf, which must be imported first.
    from transformers import Sam3ImageProcessor

    return tiny_processor(
        vlm_family,
        build_vlm_tokenizer,
        sam_image_processor=Sam3ImageProcessor(size={"height": NANO_IMAGE_SIZE, "width": NANO_IMAGE_SIZE}),
        sam_tokenizer=build_sam_tokenizer(),
        sam_text_length=NANO_SAM_TEXT_LENGTH,
    )


@pytest.fixture(scope="session")
def make_model(processor, vlm_family) -> Callable[..., ConceptSegForSegmentation]:
    """Create a random model of the nano preset, in eval mode."""

    def make(tied: bool = True, seed: int = 0, **overrides: Any) -> ConceptSegForSegmentation:
        torch.manual_seed(seed)
        config = tiny_config(vlm_family, **overrides).to_dict()
        config["vlm_config"]["tie_word_embeddings"] = tied
        config["vlm_config"]["text_config"]["tie_word_embeddings"] = tied
        model = ConceptSegForSegmentation(ConceptSegConfig.from_dict(config)).eval()
        # With the small initial weights, all images and prompts would have nearly the same mask, which would hide
        # errors.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(
                    4
                )
        model.processor = processor
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model) -> ConceptSegForSegmentation:
    """A model shared by tests that do not modify it."""
    return make_model()


@pytest.fixture()
def picture() -> Callable[..., Image.Image]:
    """Create a small noise image from a seed."""

    def make(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture()
def fresh_python(tmp_path) -> Callable[..., str]:
    """Run code in a new interpreter and return its standard output.

    In the code, `import torchvision_shim` makes torchvision importable without the package.
    """
    shim = Path(conceptseg_hf.__file__).with_name("_compat.py").read_text(encoding="utf-8")
    (tmp_path / "torchvision_shim.py").write_text(f"{shim}\n\nensure_torchvision()\n", encoding="utf-8")

    def run(code: str, *arguments: str) -> str:
        path = os.pathsep.join(
            [str(tmp_path), str(Path(conceptseg_hf.__file__).parents[1]), *filter(None, sys.path)]
        )
        environment = {**os.environ, "PYTHONPATH": path, "HF_MODULES_CACHE": str(tmp_path / "modules")}
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run


@pytest.fixture()
def limited_files() -> Callable[[int], AbstractContextManager[None]]:
    """Return a context in which files that are written have at most a number of bytes, which simulates a full disk."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def record_like() -> Callable[..., dict[str, Any]]:
    """Create an evaluation record of a shortcut prediction that covers the given fraction of a square."""
    from conceptseg_hf import ConceptSegmentation
    from conceptseg_hf.data import ConceptSample
    from conceptseg_hf.evaluation.metrics import METRICS
    from conceptseg_hf.evaluation.records import make_record

    def make(found: float = 1.0, metrics: tuple[str, ...] = METRICS, **changes: Any) -> dict[str, Any]:
        ground_truth, mask = np.zeros((20, 20), dtype=np.uint8), np.zeros((20, 20), dtype=np.uint8)
        ground_truth[5:15, 5:15] = 255
        mask[5:15, 5 : 5 + round(10 * found)] = 255
        sample = ConceptSample(
            image=Image.new("RGB", (20, 20)),
            mask=Image.fromarray(ground_truth),
            prompt="red circle",
            level="CI",
            group="diverse classes",
            family="attribute",
            box=(5, 5, 15, 15),
            dataset="mine",
            sample_id="one",
        )
        result = ConceptSegmentation(
            Image.fromarray(mask), "red circle", 0.6, route="shortcut", decode_presence=0.9
        )
        return make_record(sample, result, "standard", metrics) | changes

    return make


_CONNECTION_ERRORS = ("gloo/transport", "EADDRINUSE", "Address already in use")


@pytest.fixture(scope="session")
def run_two_processes() -> Callable[..., subprocess.CompletedProcess]:
    """Run a program in two processes with torchrun; see `run`."""

    def run(*arguments: str, env: Mapping[str, str]) -> subprocess.CompletedProcess:
        """Run the program, and retry once if its processes cannot connect to each other.

        torchrun selects a free port and binds it later, when another test may already use it.
        """
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            *arguments,
        ]
        for _ in range(2):
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode == 0 or not any(error in done.stderr for error in _CONNECTION_ERRORS):
                break
        return done

    return run


def find_chromium() -> str | None:
    """Return the path of Chromium from CONCEPTSEG_CHROMIUM or PATH, or None."""
    names = (os.environ.get("CONCEPTSEG_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


@pytest.fixture(autouse=True)
def no_photographs_in_demos(monkeypatch) -> None:
    """Tests that read real photographs find them on import; `conceptseg demo` would show some of them, too."""
    monkeypatch.delenv("CONCEPTSEG_PHOTOS", raising=False)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Return a headless browser; a process can only start Playwright once."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(
                f"Chromium does not start; set CONCEPTSEG_CHROMIUM to its path: {error.message[:200]}"
            )
        yield browser
        browser.close()
