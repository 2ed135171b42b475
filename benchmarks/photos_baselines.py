"""Baselines without a network on the benchmark "photos", scored as `conceptseg evaluate` scores a model.

    python benchmarks/photos_baselines.py --root ../shared/data/photos                 # all methods
    python benchmarks/photos_baselines.py --root ../shared/data/photos --methods otsu,prior
    python benchmarks/photos_table.py otsu=baselines/otsu grabcut=baselines/grabcut-center

Needs `pip install conceptseg-hf[benchmarks]` (OpenCV). Records and report of each method are written to a folder
of its name, so `conceptseg compare` accepts them; an interrupted run is resumed. Choices that depend on data (polarity,
threshold) are made on the train split, separately for each dataset and prompt, on at most 200 training samples each. If
there are none, those of all datasets with the same prompt are used, or else all. The methods see neither prompt nor
references otherwise, except for "difference":

- all: every pixel is foreground.
- prior: the mean training mask at 64 x 64, thresholded.
- otsu: Otsu's threshold of the gray image; the darker or the brighter part.
- saliency: spectral residual saliency (Hou and Zhang, 2007) at 64 x 64, smoothed, with Otsu's threshold.
- grabcut-center: GrabCut, 5 iterations, from the central rectangle (without 10 % at each side).
- grabcut-saliency: GrabCut, 5 iterations, from the mask of "saliency".
- difference: for the group "difference" only: absolute difference to the last reference, smoothed, with Otsu's
  threshold.

GrabCut runs at 256 pixels on the longer side with OpenCV's random seed 0, everything else at the stored size.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from conceptseg_hf.data import ConceptSample, FileBenchmark, UnreadableSampleError, load_benchmark
from conceptseg_hf.evaluation import evaluate_masks, foreground_iou
from conceptseg_hf.images import load_image, load_mask
from conceptseg_hf.progress import progress_bar

try:
    import cv2
except ImportError as error:
    raise SystemExit("OpenCV is not installed; run pip install conceptseg-hf[benchmarks].") from error

FIT_SAMPLES = 200
GRABCUT_SIDE, GRABCUT_ITERATIONS = 256, 5
SALIENCY_SIDE, PRIOR_SIDE = 64, 64
POLARITIES = ("dark", "bright")
PRIOR_THRESHOLDS = tuple(np.arange(1, 10) / 10)
Key = tuple[str, str]


def gray(image: Image.Image) -> np.ndarray:
    """The gray image, (H, W) uint8."""
    return np.asarray(image.convert("L"))


def otsu(values: np.ndarray) -> np.ndarray:
    """Pixels above Otsu's threshold, (H, W) bool; `values` is uint8."""
    return cv2.threshold(values, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1] > 0


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Values scaled to 0 to 255."""
    spread = float(values.max() - values.min())
    return (
        np.zeros(values.shape, np.uint8)
        if spread == 0
        else (255 * (values - values.min()) / spread).astype(np.uint8)
    )


def resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A float or bool map at (width, height), bilinear."""
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)


def spectral_residual(image: Image.Image) -> np.ndarray:
    """Saliency map at 64 x 64: what remains of the log spectrum after subtracting its local mean."""
    small = cv2.resize(gray(image), (SALIENCY_SIDE,) * 2, interpolation=cv2.INTER_AREA).astype(np.float64)
    spectrum = np.fft.fft2(small)
    log_amplitude = np.log(np.abs(spectrum) + 1e-9)
    residual = log_amplitude - cv2.blur(log_amplitude, (3, 3))
    saliency = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    return cv2.GaussianBlur(saliency, (0, 0), 2.5)


def saliency_mask(image: Image.Image) -> np.ndarray:
    """Otsu's threshold of the saliency map at the size of the image."""
    return otsu(to_uint8(resized(spectral_residual(image), image.size)))


def grabcut(image: Image.Image, start: np.ndarray | None) -> np.ndarray:
    """GrabCut from a mask, (H, W) bool, or from the central rectangle."""
    scale = min(1.0, GRABCUT_SIDE / max(image.size))
    width, height = (max(8, round(scale * side)) for side in image.size)
    pixels = cv2.resize(np.asarray(image), (width, height), interpolation=cv2.INTER_AREA)
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    if start is None:
        labels = np.zeros((height, width), np.uint8)
        rectangle = (width // 10, height // 10, width - 2 * (width // 10), height - 2 * (height // 10))
        mode = cv2.GC_INIT_WITH_RECT
    else:
        likely = resized(start, (width, height)) > 0.5
        labels = np.where(likely, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
        rectangle, mode = None, cv2.GC_INIT_WITH_MASK
        if likely.all() or not likely.any():  # GrabCut needs both
            return resized(likely, image.size) > 0.5
    cv2.grabCut(pixels, labels, rectangle, background, foreground, GRABCUT_ITERATIONS, mode)
    return resized((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD), image.size) > 0.5


def difference_mask(sample: ConceptSample) -> np.ndarray:
    """Pixels that differ from the last reference."""
    if not sample.references:
        raise ValueError(f"sample {sample.sample_id!r} has no reference; use another method.")
    before = load_image(sample.references[-1].image).resize(sample.image.size)
    change = np.abs(np.asarray(sample.image, np.float32) - np.asarray(before, np.float32)).mean(axis=2)
    return otsu(to_uint8(cv2.GaussianBlur(change, (0, 0), 2)))


class Fit:
    """Values chosen on training samples, for a dataset and prompt, a prompt, or all samples.

    Args:
        train: The training split.
        measure: Returns the score of each choice, (C,), or any array whose mean defines the choice.
    """

    def __init__(
        self, train: FileBenchmark, measure: Callable[[ConceptSample], np.ndarray], name: str
    ) -> None:
        indices: dict[Key, list[int]] = defaultdict(list)
        for index, item in enumerate(train.items):
            if len(indices[item.dataset, item.prompt]) < FIT_SAMPLES:
                indices[item.dataset, item.prompt].append(index)
        total = sum(map(len, indices.values()))
        rows: dict[Key, list[np.ndarray]] = defaultdict(list)
        with progress_bar(total, "samples", f"{name}, fit") as bar:
            for key, members in indices.items():
                for index in members:
                    bar.update()
                    try:
                        rows[key].append(measure(train[index]))
                    except UnreadableSampleError:
                        continue
        self._means: dict[Key | str | None, np.ndarray] = {
            key: np.mean(values, axis=0) for key, values in rows.items()
        }
        prompts: dict[str, list[np.ndarray]] = defaultdict(list)
        for (_, prompt), values in rows.items():
            prompts[prompt] += values
        self._means |= {prompt: np.mean(values, axis=0) for prompt, values in prompts.items()}
        self._means[None] = np.mean([value for values in rows.values() for value in values], axis=0)

    def __getitem__(self, sample: ConceptSample) -> np.ndarray:
        for key in ((sample.dataset, sample.prompt), sample.prompt):
            if key in self._means:
                return self._means[key]
        return self._means[None]


def fit_otsu(train: FileBenchmark) -> Callable[[ConceptSample], np.ndarray]:
    """Otsu's threshold with the polarity that is better on the training samples."""

    def masks(sample: ConceptSample) -> tuple[np.ndarray, np.ndarray]:
        bright = otsu(gray(sample.image))
        return ~bright, bright

    scores = Fit(
        train,
        lambda sample: np.array([foreground_iou(m, load_mask(sample.mask)) for m in masks(sample)]),
        "otsu",
    )
    return lambda sample: masks(sample)[int(scores[sample].argmax())]


def fit_prior(train: FileBenchmark) -> Callable[[ConceptSample], np.ndarray]:
    """The mean training mask, with the threshold that is best on the training samples."""

    def small(sample: ConceptSample) -> np.ndarray:
        return cv2.resize(
            load_mask(sample.mask).astype(np.float32), (PRIOR_SIDE,) * 2, interpolation=cv2.INTER_AREA
        )

    mean = Fit(train, small, "prior")

    def scores(sample: ConceptSample) -> np.ndarray:
        target, prior = small(sample) > 0.5, mean[sample]
        return np.array([foreground_iou(prior > t * prior.max(), target) for t in PRIOR_THRESHOLDS])

    best = Fit(train, scores, "prior, threshold")

    def predict(sample: ConceptSample) -> np.ndarray:
        prior = resized(mean[sample], sample.image.size)
        return prior > PRIOR_THRESHOLDS[int(best[sample].argmax())] * mean[sample].max()

    return predict


METHODS: Mapping[str, Callable[[FileBenchmark], Callable[[ConceptSample], np.ndarray]]] = {
    "all": lambda train: lambda sample: np.ones(sample.image.size[::-1], dtype=bool),
    "prior": fit_prior,
    "otsu": fit_otsu,
    "saliency": lambda train: lambda sample: saliency_mask(sample.image),
    "grabcut-center": lambda train: lambda sample: grabcut(sample.image, None),
    "grabcut-saliency": lambda train: lambda sample: grabcut(sample.image, saliency_mask(sample.image)),
    "difference": lambda train: difference_mask,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the methods and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder of the datasets")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="methods, separated by commas (default: all)"
    )
    parser.add_argument("--limit", type=int, help="maximum number of test samples")
    parser.add_argument("--output-dir", default="baselines", help="output folder (default: %(default)s)")
    arguments = parser.parse_args(argv)
    names = arguments.methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"no method is named {unknown[0]!r}; use some of {', '.join(METHODS)}")
    cv2.setNumThreads(1)
    test = load_benchmark("photos", arguments.root, limit=arguments.limit)
    train = load_benchmark("photos", arguments.root, "train")
    for name in names:
        indices = [
            i for i, item in enumerate(test.items) if name != "difference" or item.group == "difference"
        ]
        if not indices:
            print(f"{name}: no samples of its group")
            continue
        start = time.process_time()
        report = evaluate_masks(
            METHODS[name](train),
            test,
            name,
            Path(arguments.output_dir) / name,
            indices=indices,
            progress=True,
        )
        print(f"{name}: {report.summary()} ({time.process_time() - start:.0f} CPU-s)", flush=True)


if __name__ == "__main__":
    main()
