"""Tests of the training of the checkpoint for photographs: scenes, tasks, examples and the command."""

from __future__ import annotations

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conceptseg_trainers.experiments.settings import TrainSettings
from conceptseg_trainers.from_scratch.masks import bounding_box
from conceptseg_trainers.from_scratch.sam_stage import at_same_size
from conceptseg_trainers.mini import effects
from conceptseg_trainers.mini.__main__ import main, make_stage
from conceptseg_trainers.mini.ctm_data import PhotosCtmData
from conceptseg_trainers.mini.dense import CHANNELS, MARKED, DenseHeads, dense_loss, dense_target
from conceptseg_trainers.mini.examples import PhotoExampleWriter
from conceptseg_trainers.mini.leaks import training_items
from conceptseg_trainers.mini.nouns import PROMPTS_WITHOUT_NOUN, exclude_each_other
from conceptseg_trainers.mini.photographs import PhotographLibrary
from conceptseg_trainers.mini.report import main as write_report
from conceptseg_trainers.mini.results import dataset_table
from conceptseg_trainers.mini.sam_data import PhotosSamData, negative_prompt, positive_prompt
from conceptseg_trainers.mini.scenes import Region, Scene, sheet
from conceptseg_trainers.mini.sources import SceneMix
from conceptseg_trainers.mini.tasks import TaskSource
from conceptseg_trainers.mini.tokenizers import mini_processor
from conceptseg_trainers.mini.vlm_data import PhotosVlmData
from PIL import Image, ImageOps
from safetensors.torch import load_file

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, parse_completion
from conceptseg_hf.boxes import mask_to_box
from conceptseg_hf.presets import MINI_PATCH_SIZE

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from trees import write_photos

SIZE = 224
GRID = 14
DATASETS = (
    ("coco128", "CI", ("bus", "clock") * 12),
    ("ecssd", "CD", ("salient object segmentation",) * 20),
    ("kvasir-seg", "CD", ("polyp colon segmentation",) * 20),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), DATASETS)


@pytest.fixture(scope="module")
def writer() -> PhotoExampleWriter:
    return PhotoExampleWriter(mini_processor())


@pytest.fixture(scope="module")
def tasks(root) -> TaskSource:
    return TaskSource(root, "train", SIZE)


def test_a_thin_object_remains_at_the_size_at_which_masks_are_compared() -> None:
    masks, logits = torch.zeros(1, SIZE, SIZE), torch.full((1, 1, 64, 64), -1.0)
    masks[:, :, 100] = 1.0  # one pixel wide, as a crack
    logits[..., 28] = 3.0
    same, coarse = at_same_size(logits, masks)
    assert torch.equal(same, logits[:, 0]) and 0 < coarse.max() < 0.5
    resized, fine = at_same_size(logits, masks, SIZE // 2)
    assert resized.shape == fine.shape == (1, SIZE // 2, SIZE // 2) and fine.max() == 0.5
    torch.testing.assert_close(fine.mean(), masks.mean())


def test_parts_are_disjoint_and_complete(root) -> None:
    train, vlm, ctm, val = (
        {item.sample_id for item in PhotographLibrary(root, part, SIZE).items}
        for part in ("train", "vlm", "ctm", "val")
    )
    assert train == vlm | ctm and not vlm & ctm and not train & val and len(train | val) == 64
    assert len(vlm) > 45 and ctm and not any("/test_" in sample_id for sample_id in train)


def test_images_that_leak_test_images_are_not_trained(root, tmp_path) -> None:
    """A smaller copy of a test image, in another dataset, and exposures of a tested tile; numbers far apart are
    different tiles."""
    copy = shutil.copytree(root, tmp_path / "photos")
    source = next((copy / "kvasir-seg" / "images").glob("test_*"))
    leak = next((copy / "ecssd" / "images").glob("train_*"))
    Image.open(source).resize((150, 112)).resize((200, 150)).save(leak)
    names = {
        "blowhole-exp1_num_5000": "test",
        "blowhole-exp2_num_5800": "train",
        "crack-exp1_num_9000": "train",
    }
    tiles = write_photos(
        tmp_path / "tiles", (("magnetic-tile", "CD", ("industrial defect segmentation",) * 3),)
    )
    folder = copy / "magnetic-tile"
    lines = ["id,image,mask,prompt,split,level,group"]
    for number, (name, split) in enumerate(names.items()):
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            image = Image.open(tiles / "magnetic-tile" / part / f"train_{number}.png")
            # Without the inversion, it would be equal to the image of another dataset.
            (ImageOps.invert(image) if part == "images" else image).save(folder / part / f"{name}.png")
        lines.append(f"{name},images/{name}.png,masks/{name}.png,defect,{split},CD,group")
    (folder / "samples.csv").write_text("\n".join(lines) + "\n")
    kept = {item.sample_id for item in training_items(copy)}
    unchanged = {item.sample_id for item in training_items(root)}
    assert len(unchanged) == 64
    assert kept == unchanged - {f"ecssd/{leak.stem}-salient object segmentation"} | {
        "magnetic-tile/crack-exp1_num_9000"
    }


def test_nouns_of_other_domains_and_unmarked_classes_are_absent(root) -> None:
    library = PhotographLibrary(root, "train", SIZE)
    polyp = library.scene(library.datasets["kvasir-seg"][0])
    assert polyp.regions[0].nouns == ("polyp",) and {"bus", "salient object"} <= set(polyp.absent)
    street = library.scene(library.datasets["coco128"][0])
    present = street.regions[0].nouns[0]
    # All classes of COCO are annotated, but "salient object" is not known.
    assert {"bus", "clock", "polyp", "person"} - {present} <= set(street.absent)
    assert not {present, "salient object"} & set(street.absent)
    assert exclude_each_other("medical", "natural") and not exclude_each_other("street", "natural")


def test_augmented_masks_follow_their_images(root) -> None:
    """The objects have one color on noise, so inside of a mask the colors hardly vary."""
    library = PhotographLibrary(root, "train", SIZE)
    rng = np.random.default_rng(0)
    for dataset in ("ecssd", "kvasir-seg"):  # the second one is rotated
        for photograph in library.datasets[dataset][:6]:
            scene = library.augmented(rng, photograph)
            if not scene.regions:
                continue
            mask = scene.regions[0].mask
            inner = (
                mask & np.roll(mask, 3, 0) & np.roll(mask, -3, 0) & np.roll(mask, 3, 1) & np.roll(mask, -3, 1)
            )
            gray = scene.pixels.mean(axis=2)
            assert inner.sum() > 100 and gray[inner].std() < 0.3 * gray[~mask].std()


def test_scenes_depend_only_on_their_number(root) -> None:
    mix = SceneMix(root, SIZE, seed=0)
    for number in range(6):
        first, second = (mix.scene(3, number) for _ in range(2))
        assert np.array_equal(first.pixels, second.pixels) and first.absent == second.absent
        assert all(region.mask.any() for region in first.regions)
    reference, scene, index = mix.matching_pair(np.random.default_rng(0))
    assert reference.regions[0].nouns == scene.regions[index].nouns


def test_prompts_of_sam_have_correct_masks(root) -> None:
    mix = SceneMix(root, SIZE, seed=0)
    rng = np.random.default_rng(0)
    tokenizer = mini_processor().sam_tokenizer
    boxes = 0
    for number in range(40):
        scene = mix.scene(3, number)
        if not scene.regions:
            continue
        positive = positive_prompt(rng, scene)
        assert positive.mask.any()
        if positive.box is not None:
            boxes += 1
            assert any(np.array_equal(positive.mask, region.mask) for region in scene.regions)
        elif scene.drawn is None:
            assert np.array_equal(positive.mask, scene.masks()[positive.phrase])
        negative = negative_prompt(rng, scene)
        assert not negative.mask.any()
        if scene.drawn is None:
            assert negative.segment == (negative.phrase not in PROMPTS_WITHOUT_NOUN)
        for prompt in (positive, negative):
            assert tokenizer.unk_token_id not in tokenizer(prompt.phrase)["input_ids"], prompt.phrase
    assert boxes > 5


def test_guidance_is_the_words_inside_and_the_rest_outside(root) -> None:
    data = PhotosSamData(root, images=8)
    checked = 0
    for scene, prompts in data.prompted_scenes(0):
        for prompt in prompts:
            if scene.drawn is not None or prompt.box is not None or not prompt.mask.any():
                continue
            targets, guided = data.guidance(scene, prompt, 14, GRID)
            words = np.zeros(14, dtype=bool)
            words[1 : 1 + len(prompt.phrase.split())] = True
            assert guided.tolist() == [True, True, False, False]
            y, x = (int(i.mean()) * GRID // SIZE for i in np.nonzero(prompt.mask))
            if prompt.mask[y * 16 : y * 16 + 16, x * 16 : x * 16 + 16].all():
                assert np.array_equal(targets[0, y * GRID + x], words)
                checked += 1
    assert checked


def test_tasks_follow_the_template(tasks, writer) -> None:
    unknown = writer.tokenizer.unk_token_id
    answers = set()
    for number in range(60):
        task = tasks.task(number)
        example = writer.task(task)
        text = writer.tokenizer.decode(example.completion, skip_special_tokens=True)
        completion = parse_completion(text, 100)
        assert completion.is_valid, text
        assert (completion.think, completion.rule, completion.answer) == (task.think, task.rule, task.answer)
        assert unknown not in example.prompt and unknown not in example.completion, text
        if task.mask.any():
            box = np.asarray(mask_to_box(task.mask)) * 100 / SIZE
            assert np.abs(np.asarray(completion.bbox) - box).max() <= 0.5
        else:
            assert completion.bbox == (0, 0, 0, 0)
        answers.add(task.answer)
    assert {"polyp", "salient object", "bus", "object"} <= answers


def test_task_examples_equal_the_inputs_of_the_processor(tasks, writer) -> None:
    from conceptseg_trainers.from_scratch.vlm_examples import patches
    from PIL import Image

    for number in range(12):
        task = tasks.task(number)
        example = writer.task(task)
        prepared = writer.processor.prepare(Image.fromarray(task.pixels), task.prompt, task.references)
        assert example.prompt == prepared.input_ids.tolist()
        pixel_values = patches(example.images, MINI_PATCH_SIZE, "cpu")
        torch.testing.assert_close(pixel_values, prepared.pixel_values, rtol=0, atol=1e-5)


def test_marked_regions_have_a_red_border(tasks, writer) -> None:
    checked = 0
    for number in range(40):
        task = tasks.task(number)
        if not any(mask is not None for mask in task.marked):
            continue
        mosaic, frame = writer.mosaic(task.references)
        for region in writer._mosaic_regions(task, frame):
            x1, y1, x2, y2 = mask_to_box(region.mask)
            border = mosaic[max(0, y1 - 3) : y2 + 3, max(0, x1 - 3) : x2 + 3].reshape(-1, 3)
            if MARKED in region.nouns:
                assert (border == (255, 0, 0)).all(1).any()
                checked += 1
    assert checked > 10


def test_dense_loss_of_correct_and_wrong_logits() -> None:
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[32:112, 32:112] = True
    target = dense_target([Region(("polyp",), mask)], ["bus"], SIZE, GRID)
    assert target.channels == (CHANNELS["bus"], CHANNELS["polyp"])
    assert target.coverage[1].sum() == 25 and target.coverage[0].sum() == 0

    class Heads(DenseHeads):
        """Heads that read their outputs from the features."""

        def __init__(self) -> None:
            super().__init__(len(CHANNELS) + 4)
            self.nouns = torch.nn.Linear(len(CHANNELS) + 4, len(CHANNELS), bias=False)
            self.box = torch.nn.Linear(len(CHANNELS) + 4, 4, bias=False)
            with torch.no_grad():
                self.nouns.weight.copy_(torch.eye(len(CHANNELS), len(CHANNELS) + 4))
                self.box.weight.copy_(torch.eye(len(CHANNELS) + 4)[-4:])

    features = torch.full((GRID * GRID, len(CHANNELS) + 4), -20.0)
    inside = torch.from_numpy(target.coverage[1] > 0)
    features[inside, CHANNELS["polyp"]] = 20.0
    features[:, -4:] = torch.from_numpy(target.boxes)
    assert dense_loss(Heads(), [target], features) < 1e-2
    features[inside, CHANNELS["polyp"]] = -20.0
    assert dense_loss(Heads(), [target], features) > 0.9


def test_ctm_tasks_contain_the_target_among_the_objects(root) -> None:
    data = PhotosCtmData(root)
    held_out = data.held_out()
    for source, rows in (
        (data.task, range(8)),
        (held_out["val"], range(3)),
        (held_out["val_compositions"], range(6)),
    ):
        for row in rows:
            task = source(row)
            assert task.think.endswith(task.answer) and all(len(item.classes) == 1 for item in task.objects)
            if task.mask.any() and task.label == "compositions":
                assert any(np.array_equal(task.mask, item.mask) for item in task.objects)


@pytest.mark.parametrize("name", ["sam", "vlm"])
def test_stages_start_with_the_weights_of_a_checkpoint(root, tmp_path, name) -> None:
    model = ConceptSegForSegmentation(ConceptSegConfig.from_preset("mini"))
    model.save_pretrained(tmp_path)
    arguments = argparse.Namespace(root=root, start=tmp_path, device="cpu", seed=1, scale=0.001)
    stage, schedule = make_stage(name, arguments)
    assert schedule.restart == 0  # no pretraining
    weights = getattr(stage.module, name).state_dict()
    for key, expected in getattr(model, name).state_dict().items():
        assert torch.equal(weights[key], expected), key


def test_another_seed_trains_other_examples(root) -> None:
    # A training that continues a checkpoint would otherwise repeat its images.
    first, other = (PhotosVlmData(root, 40, count=2, seed=seed) for seed in (0, 1))
    for step in (0, 36):  # perception and tasks
        images = [
            {image.tobytes() for example in data.examples(step) for image in example.images}
            for data in (first, other)
        ]
        assert images[0] and not images[0] & images[1]


def test_sheet_keeps_the_nouns_that_are_known_of_all_photographs(root) -> None:
    size = 20
    top, everywhere = np.zeros((size, size), dtype=bool), np.ones((size, size), dtype=bool)
    top[:10] = True
    scenes = [
        Scene(np.full((size, size, 3), 10, np.uint8), (Region(("bus", "vehicle"), top),), ("clock", "cat")),
        Scene(np.full((size, size, 3), 20, np.uint8), (Region(("clock",), everywhere),), ("bus", "cat")),
        Scene(np.full((size, size, 3), 30, np.uint8), (), ("bus", "cat", "clock")),
        Scene(np.full((size, size, 3), 40, np.uint8), (), ("bus", "cat", "clock")),
    ]
    scene = sheet(scenes, size)
    assert [scene.pixels[row, column, 0] for row, column in ((0, 0), (0, 19), (19, 0), (19, 19))] == [
        10,
        20,
        30,
        40,
    ]
    assert [region.nouns for region in scene.regions] == [("bus",), ("clock",)] and scene.absent == ("cat",)
    assert bounding_box(scene.regions[0].mask) == (0, 0, 10, 5)
    assert bounding_box(scene.regions[1].mask) == (10, 0, 20, 10)

    mix = SceneMix(root, SIZE, seed=0)
    drawn, again = mix.sheet(1, 5), mix.sheet(1, 5)
    assert len(drawn.regions) >= 4 and np.array_equal(drawn.pixels, again.pixels)
    assert not set(drawn.absent) & set(drawn.masks())


def test_table_by_dataset() -> None:
    first = {("CD", "a"): {"1": 0.5, "2": 0.7}, ("CR", "b"): {"3": 0.25}}
    second = {("CD", "a"): {"1": 0.4, "2": 0.6, "9": 0.2}}
    lines = dataset_table({"one": first, "two": second}, differences=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["level", "dataset", "samples", "one", "two", "one - two"]
    assert rows[2] == [
        "CD",
        "a",
        "3",
        "0.600 [0.500, 0.700]",
        "0.400 [0.200, 0.600]",
        "+0.100 [+0.100, +0.100]",
    ]
    assert rows[3] == ["CR", "b", "1", "0.250", "-", "-"]


@pytest.mark.slow
@pytest.mark.heavy
def test_command_trains_a_checkpoint(root, tmp_path, monkeypatch) -> None:
    command = ["conceptseg_trainers.mini", "--root", str(root), "--scale", "0.001"]
    monkeypatch.setattr(sys, "argv", [*command, "--run-dir", str(tmp_path), "--threads", "1"])
    main()  # it starts processes for two of its stages
    model = ConceptSegForSegmentation.from_pretrained(tmp_path / "checkpoint")
    assert model.config.sam_config.vision_config.backbone_config.image_size == SIZE

    checkpoint, output = tmp_path / "checkpoint", tmp_path / "report"
    options = ["--root", str(root), "--limit", "3", "--other-limit", "4", "--output-dir", str(output)]
    write_report(
        [str(checkpoint), *options, "--beside", f"again={output / 'adaptive'}", "--notes", "Seed 0."]
    )
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert (
        "license: other" in card
        and "\nSeed 0.\n" in card
        and "Datasets without training data:\nnone." in card
    )
    row = next(line for line in card.splitlines() if line.startswith("| CD    | ecssd"))
    assert row.rstrip("| ").endswith("+0.000") and row.count("|") == 11

    monkeypatch.setattr(
        effects,
        "TrainSettings",
        partial(TrainSettings, prompts=2, num_generations=2, num_best_and_worst=None),
    )
    options = ["--root", str(root), "--start", str(checkpoint), "--output-dir", str(tmp_path / "effects")]
    arms = ["--arms", "sft", "meta", "--seeds", "0", "--steps", "1", "--samples", "3"]
    assert effects.main([*options, *arms]) == 0
    report = (tmp_path / "effects" / "effects.md").read_text(encoding="utf-8")
    assert "| stage I (ConceptSFTTrainer) | 1 |" in report and "| CD ecssd | 1 |" in report

    start = ["--start", str(tmp_path / "checkpoint"), "--seed", "1", "--stage", "sam"]
    monkeypatch.setattr(
        sys, "argv", [*command, *start, "--run-dir", str(tmp_path / "more"), "--threads", "1"]
    )
    main()
    continued = load_file(tmp_path / "more" / "sam" / "state.safetensors")
    for name, before in model.sam.named_parameters():
        # Random weights differ by as much as their size; a few steps of a warm-up change little.
        if before.norm() > 0.1:
            assert (continued[f"average/sam.{name}"] - before).norm() < 0.3 * before.norm(), name
