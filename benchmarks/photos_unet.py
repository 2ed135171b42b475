"""A plain U-Net on the benchmark "photos", trained for a given CPU time, as a measure for models of similar cost.

    python benchmarks/photos_unet.py --root ../shared/data/photos --cpu-seconds 36000      # 10 CPU hours, one thread
    python benchmarks/photos_unet.py --root ../shared/data/photos --cpu-seconds 60 --limit 42   # try it
    python benchmarks/photos_table.py unet=unet/evaluation

Convolutions and batch normalization at half resolution and below, without pretraining. The prompt is a learned vector
that scales and shifts the channels of the bottleneck and of each decoder block (FiLM); prompts that do not occur in
training share one vector, which 5 % of the training samples use. References are not seen. Training images that leak
test images are left out (`conceptseg_trainers.mini.leaks`). Images and masks are resized
to a square. Datasets are drawn with the square root of their size, then one of their training samples with random
scaling, shift, horizontal flip, brightness and contrast. Loss: dice + 10 focal (without class weights). AdamW; the
learning rate follows a cosine over CPU time, which includes decoding and resizing (images stay in memory, about
2 GB for all datasets) but not the evaluation.

A run is saved every `--save-seconds` and resumed by the same command. The batches depend only on seed and step; the
learning rate depends on measured CPU time, so two runs are not identical.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from conceptseg_trainers.mini.leaks import training_benchmark
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from conceptseg_hf.data import ConceptSample, FileBenchmark, UnreadableSampleError, load_benchmark
from conceptseg_hf.evaluation import evaluate_masks
from conceptseg_hf.losses import dice_loss, focal_loss
from conceptseg_hf.progress import progress_bar
from conceptseg_hf.writing import json_text, write_file

FOCAL_WEIGHT = 10.0
UNKNOWN_SHARE = 0.05  # training samples whose prompt is replaced by the unknown prompt
WARM_UP = 0.02  # fraction of the CPU time
MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)  # of ImageNet


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions with batch normalization."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [
            nn.Conv2d(width, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(True),
        ]
    return nn.Sequential(*layers)


class Film(nn.Module):
    """Scales and shifts channels by a prompt vector; starts as the identity."""

    def __init__(self, prompt_width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(prompt_width, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor, prompt: Tensor) -> Tensor:
        """Features (B, C, H, W), prompt vectors (B, P)."""
        scale, shift = self.linear(prompt)[:, :, None, None].chunk(2, dim=1)
        return features * (1 + scale) + shift


class UNet(nn.Module):
    """U-Net at half resolution, conditioned on the index of a prompt.

    Args:
        prompts: Number of prompts, including the unknown one.
        width: Channels at half resolution; doubled at each of the first three of the further levels.
        levels: Number of levels below half resolution.
        prompt_width: Length of a prompt vector.
    """

    def __init__(self, prompts: int, width: int = 32, levels: int = 4, prompt_width: int = 64) -> None:
        super().__init__()
        widths = [width * 2 ** min(level, 3) for level in range(levels + 1)]
        self.prompts = nn.Embedding(prompts, prompt_width)
        nn.init.normal_(self.prompts.weight, std=0.5)
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.down = nn.ModuleList(
            convolutions(inputs, outputs) for inputs, outputs in zip([width, *widths], widths)
        )
        self.middle = Film(prompt_width, widths[-1])
        self.up = nn.ModuleList(
            convolutions(lower + upper, upper) for lower, upper in zip(widths[:0:-1], widths[-2::-1])
        )
        self.films = nn.ModuleList(Film(prompt_width, channels) for channels in widths[-2::-1])
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor, prompts: Tensor) -> Tensor:
        """Mask logits (B, 1, H, W) of images (B, 3, H, W), 0 to 255, and prompt indices (B,)."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        features, skipped = self.stem((images - mean) / std), []
        for number, block in enumerate(self.down):
            features = block(F.max_pool2d(features, 2) if number else features)
            skipped.append(features)
        vectors = self.prompts(prompts)
        features = self.middle(skipped.pop(), vectors)
        for block, film in zip(self.up, self.films):
            upper = skipped.pop()
            features = F.interpolate(features, size=upper.shape[-2:], mode="bilinear", align_corners=False)
            features = film(block(torch.cat([features, upper], dim=1)), vectors)
        return F.interpolate(
            self.head(features), size=images.shape[-2:], mode="bilinear", align_corners=False
        )


class TrainingData:
    """Training samples at a fixed size, drawn by seed and step.

    Args:
        samples: The training split.
        side: Side of the square.
        seed: Random seed.
    """

    def __init__(self, samples: FileBenchmark, side: int, seed: int) -> None:
        self.samples, self.side, self.seed = samples, side, seed
        self.by_dataset: dict[str, list[int]] = {}
        for index, item in enumerate(samples.items):
            self.by_dataset.setdefault(item.dataset, []).append(index)
        sizes = np.sqrt([len(members) for members in self.by_dataset.values()])
        self.shares = sizes / sizes.sum()
        names = sorted({item.prompt for item in samples.items})
        self.prompts = {name: number for number, name in enumerate(names, start=1)}  # 0: unknown
        self._images: dict[Path, np.ndarray] = {}
        self._masks: dict[int, np.ndarray] = {}

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, S, S) from 0 to 255, masks (B, 1, S, S) from 0 to 1, and prompt indices (B,)."""
        rng = np.random.default_rng([self.seed, step])
        members = list(self.by_dataset.values())
        rows = []
        while len(rows) < size:
            indices = members[rng.choice(len(members), p=self.shares)]
            index = indices[rng.integers(len(indices))]
            try:
                pixels = self._pixels(index)
            except UnreadableSampleError:
                continue
            prompt = 0 if rng.random() < UNKNOWN_SHARE else self.prompts[self.samples.items[index].prompt]
            rows.append((*pixels, prompt))
        images, masks, prompts = zip(*rows, strict=True)
        stacked = np.concatenate([np.stack(images), np.stack(masks)[..., None]], axis=3)
        values = torch.from_numpy(stacked).permute(0, 3, 1, 2).float()
        values = F.grid_sample(
            values, _random_grid(rng, values.shape), "bilinear", "reflection", align_corners=False
        )
        light = torch.from_numpy(rng.uniform(0.75, 1.25, (2, size, 1, 1, 1))).float()
        average = values[:, :3].mean(dim=(1, 2, 3), keepdim=True)
        colored = ((values[:, :3] - average) * light[0] + average) * light[1]
        return colored.clamp(0, 255), (values[:, 3:] / 255).clamp(0, 1), torch.tensor(prompts)

    def _pixels(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        path = self.samples.items[index].image
        if index not in self._masks or path not in self._images:
            sample = self.samples[index]
            self._images[path] = _resized(sample.image, self.side)
            self._masks[index] = np.asarray(sample.mask.resize((self.side,) * 2, Image.Resampling.BOX))
        return self._images[path], self._masks[index]


def _resized(image: Image.Image, side: int) -> np.ndarray:
    return np.array(image.resize((side, side), Image.Resampling.BILINEAR))


def _random_grid(rng: np.random.Generator, shape: Sequence[int]) -> Tensor:
    """Random scale from 0.65 to 1.1, shift and horizontal flip of each row."""
    count = shape[0]
    scale = rng.uniform(0.65, 1.1, count)
    flip = rng.choice((-1, 1), count)
    shift = rng.uniform(-1, 1, (2, count)) * np.maximum(1 - scale, 0)
    zero = np.zeros(count)
    matrix = np.stack([np.stack([scale * flip, zero, shift[0]]), np.stack([zero, scale, shift[1]])])
    return F.affine_grid(torch.from_numpy(matrix).permute(2, 0, 1).float(), list(shape), align_corners=False)


class Training:
    """A model with its optimizer and the CPU time used, kept in one safetensors file."""

    def __init__(self, model: nn.Module, settings: Mapping[str, object], path: Path) -> None:
        self.model, self.settings, self.path = model, dict(settings), path
        self.parameters = dict(model.named_parameters())
        decayed = [each for each in self.parameters.values() if each.ndim > 1]
        others = [each for each in self.parameters.values() if each.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 1e-2}, {"params": others, "weight_decay": 0.0}], lr=0.0
        )
        self.step, self.seconds = 0, 0.0
        if path.exists():
            self._load()

    def update(self, loss: Tensor, rate: float) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1

    def save(self) -> None:
        """Write the state; the file is complete or unchanged."""
        tensors = {f"model/{name}": value.contiguous() for name, value in self.model.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.contiguous()
        state = {"step": self.step, "seconds": self.seconds, "settings": self.settings}
        write_file(self.path, save(tensors, {"state": json_text(state)}))

    def _load(self) -> None:
        with safe_open(self.path, "pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if state["settings"] != self.settings:
            raise SystemExit(
                f"{str(self.path)!r} is of a run with other settings; give another --output-dir."
            )
        self.step, self.seconds = state["step"], state["seconds"]
        weights = {name.removeprefix("model/"): v for name, v in tensors.items() if name.startswith("model/")}
        self.model.load_state_dict(weights)
        for name, parameter in self.parameters.items():
            moments = {
                key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if self.step
            }
            if moments:
                self.optimizer.state[parameter] = moments


def rate_at(fraction: float, peak: float) -> float:
    """Learning rate after a fraction of the CPU time: linear warm-up, then a cosine to 0."""
    if fraction < WARM_UP:
        return peak * max(fraction / WARM_UP, 0.01)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - WARM_UP) / (1 - WARM_UP))))


def train(training: Training, data: TrainingData, arguments: argparse.Namespace) -> None:
    """Train until the CPU time is used."""
    model, budget = training.model, arguments.cpu_seconds
    model.train()
    start, saved = time.process_time() - training.seconds, training.seconds
    shown = training.seconds
    losses: list[float] = []
    with progress_bar(round(budget), "CPU-s", "unet", initial=round(shown)) as bar:
        while training.seconds < budget:
            images, masks, prompts = data.batch(training.step, arguments.batch_size)
            logits = model(images.contiguous(memory_format=torch.channels_last), prompts)
            loss = dice_loss(logits, masks) + FOCAL_WEIGHT * focal_loss(logits, masks, alpha=-1)
            if not torch.isfinite(loss):
                raise SystemExit(
                    f"the loss is not finite at step {training.step}; use a lower --learning-rate."
                )
            training.update(loss, rate_at(training.seconds / budget, arguments.learning_rate))
            losses.append(loss.item())
            training.seconds = time.process_time() - start
            bar.update(int(training.seconds) - int(shown))
            shown = training.seconds
            if training.seconds - saved >= arguments.save_seconds:
                training.save()
                saved = training.seconds
                seen = training.step * arguments.batch_size
                print(
                    f"{training.seconds:.0f} CPU-s: {seen} samples seen, loss {np.mean(losses):.3f}",
                    flush=True,
                )
                losses.clear()
    training.save()


def predictor(model: UNet, prompts: Mapping[str, int], side: int) -> Callable[[ConceptSample], np.ndarray]:
    """Return the function that predicts the mask of a sample."""
    model.eval()

    @torch.no_grad()
    def predict(sample: ConceptSample) -> np.ndarray:
        image = torch.from_numpy(_resized(sample.image, side)).permute(2, 0, 1)[None].float()
        logits = model(image, torch.tensor([prompts.get(sample.prompt, 0)]))
        size = sample.image.size[::-1]
        return (F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0, 0] > 0).numpy()

    return predict


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder of the datasets")
    parser.add_argument("--output-dir", default="unet", help="output folder (default: %(default)s)")
    parser.add_argument("--cpu-seconds", type=float, default=36_000.0, help="CPU time (default: %(default)s)")
    parser.add_argument("--datasets", help="train only on these datasets, separated by commas")
    parser.add_argument("--side", type=int, default=224, help="side of the images (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=32, help="channels at half resolution (default: %(default)s)"
    )
    parser.add_argument(
        "--levels", type=int, default=4, help="levels below half resolution (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="peak (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--save-seconds", type=float, default=600.0, help="CPU time between saves (default: 600)"
    )
    parser.add_argument("--limit", type=int, help="maximum number of test samples")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)

    samples = training_benchmark(Path(arguments.root))
    if arguments.datasets:
        names = arguments.datasets.split(",")
        samples.items = [item for item in samples.items if item.dataset in names]
        if not samples.items:
            parser.error(f"--datasets {arguments.datasets!r} has no training samples")
    data = TrainingData(samples, arguments.side, arguments.seed)
    model = UNet(len(data.prompts) + 1, arguments.width, arguments.levels)
    model = model.to(memory_format=torch.channels_last)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{size / 1e6:.2f} M parameters, {len(samples)} training samples, {len(data.prompts)} prompts",
        flush=True,
    )
    names = ("datasets", "side", "width", "levels", "batch_size", "learning_rate", "cpu_seconds")
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {"training_seed": arguments.seed, "parameters": size}
    folder = Path(arguments.output_dir)
    training = Training(model, settings, folder / "state.safetensors")
    train(training, data, arguments)

    test = load_benchmark("photos", arguments.root, limit=arguments.limit)
    report = evaluate_masks(
        predictor(model, data.prompts, arguments.side),
        test,
        "unet",
        folder / "evaluation",
        settings | {"steps": training.step},
        progress=True,
    )
    print(report.to_markdown())
    print(
        f"{report.summary()} ({training.step * arguments.batch_size} samples in {training.seconds:.0f} CPU-s)"
    )


if __name__ == "__main__":
    main()
