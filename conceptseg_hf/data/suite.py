"""Metadata of the benchmark suite: name, prompt, number of samples and origin of each set.

Counts are those of the paper's Tables 5 and 6 (Appendix B); a set with different counts is a different set. The paper
lists optical property under CI in Table 1 and under CD in Table 5; its text assigns it to CD, which is used here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

AUTHORS = "https://huggingface.co/datasets/zhaoyuan666/ConceptSeg-Benchmark"
LISA = "https://github.com/dvlab-research/LISA"
MIGICIAN = "https://huggingface.co/datasets/Michael4933"

CLASS_NAME = "{cls_name}"


@dataclass(frozen=True)
class Source:
    """A named set of samples in files.

    Attributes:
        name: Name for `load_benchmark`: `dataset_name` in the authors' metadata, if the set is part of it.
        title: Name used by its publishers.
        level: "CI", "CD" or "CR".
        group: Column of the paper's Table 1, or the task of Table 6.
        problem: The prompt; `CLASS_NAME` stands for the class name of the item; None if each item has its own prompt.
        layout: File layout, a key of `LAYOUTS` in `layouts`.
        published: URL where its owners publish it.
        counts: Number of samples of each split in the paper; None if the paper does not count this split.
        counts_images: Whether the paper counts images, each of which can give several samples.
        paper_splits: Splits used in the paper: "train" for training sets, others for evaluation sets.
        aliases: Alternative names of splits, such as "test" for the split that is evaluated.
        note: Information for users who compare results.
    """

    name: str
    title: str
    level: str
    group: str
    problem: str | None
    layout: str
    published: str
    counts: dict[str, int | None]
    counts_images: bool = False
    paper_splits: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    note: str = ""


def _authors(
    name: str, title: str, level: str, group: str, problem: str | None, note: str = "", **counts: int
) -> Source:
    return Source(
        name,
        title,
        level,
        group,
        problem,
        "authors",
        AUTHORS,
        # Items with one image draw references from the train split, which the paper counts only for training sets.
        counts={"train": counts.get("train"), "test": counts.get("test")},
        paper_splits=tuple(counts),
        note=note,
    )


def _coco20i(name: str, title: str, note: str) -> Source:
    return Source(
        name,
        title,
        "CI",
        "diverse classes",
        CLASS_NAME,
        "coco20i",
        "https://cocodataset.org",
        counts={"train": None, "val": None},
        aliases={"test": "val"},
        note=note,
    )


_SUITE = (
    _authors("coco2014_Living", "COCO-20i living", "CI", "diverse classes", CLASS_NAME, test=1700),
    _authors("coco2014_Artifact", "COCO-20i artifact", "CI", "diverse classes", CLASS_NAME, test=6244),
    _authors("rare", "iNaturalist fine-grained", "CI", "diverse classes", CLASS_NAME, test=5325),
    _authors("ultra_rare", "iNaturalist ultra rare", "CI", "diverse classes", CLASS_NAME, test=52),
    _authors("transparent1024", "Trans10K", "CD", "optical property", "transparent", test=4428),
    _authors("Shadow_detection", "SBU", "CD", "optical property", "shadow", test=638),
    _authors(
        "COD10K1024", "COD10K", "CD", "camouflage", "camouflaged object segmentation", train=4040, test=2026
    ),
    _authors("DUTS", "DUTS", "CD", "saliency", "salient object segmentation", train=10548, test=5017),
    _authors(
        "ESDIDefects", "ESDIs-SOD", "CD", "industrial anomaly", "industrial defect segmentation", test=717
    ),
    _authors("Polyp", "Colon Polyp", "CD", "medical lesion", "polyp colon segmentation", test=798),
    _authors("Breast_Tumor", "BUSI", "CD", "medical lesion", "breast tumor segmentation", test=161),
    _authors("isic2018", "ISIC18", "CD", "medical lesion", "skin melanocytic tumor segmentation", test=808),
    _authors("MIG_common_object", "MIG common", "CR", "consistency", None, test=477),
    _authors("MIG_correspondence", "MIG correspondence", "CR", "consistency", None, test=84),
    _authors("MIG_refer_grounding", "MIG reference", "CR", "consistency", None, test=93),
    _authors("MIG_diff", "MIG static", "CR", "difference", None, test=187),
    _authors("MIG_view_diff", "MIG view", "CR", "difference", None, test=85),
    _authors("MIG_reasoning", "MIG logical", "CR", "rationality", None, test=89),
    _authors("MIG_multi_view", "MIG cross-view", "CR", "spatio-temporality", None, test=224),
    _authors("MIG_object_tracking", "MIG cross-frame", "CR", "spatio-temporality", None, test=543),
    _authors(
        "fewshot1000", "FSS-1000", "CR", "consistency", "Common object segmentation", train=10000
    ),
    _authors(
        "CoSOD3k1024", "CoSOD3k", "CR", "consistency", "Common object segmentation", train=3316
    ),
    _authors(
        "MGrounding",
        "MGrounding",
        "CR",
        "consistency",
        None,
        train=9102 + 5854,
        note="9102 items of consistency and 5854 of difference; the metadata calls both MGrounding",
    ),
    Source(
        "cityscapes",
        "Cityscapes",
        "CI",
        "urban scenes",
        CLASS_NAME,
        "cityscapes",
        "https://www.cityscapes-dataset.com",
        counts={"train": 2975, "val": 500},
        counts_images=True,
        paper_splits=("val",),
        aliases={"test": "val"},
        note="one sample per image and present class; the test labels are not public, so test stands for val",
    ),
    Source(
        "reasonseg",
        "ReasonSeg",
        "CR",
        "reasoning",
        None,
        "reasonseg",
        LISA,
        counts={"train": 239, "val": 200, "test": 779},
        paper_splits=("val", "test"),
        note="polygons as published; ignore regions do not count",
    ),
)  # fmt: skip

_OTHERS = (
    *(
        Source(
            name,
            title,
            "CI",
            "diverse classes",
            CLASS_NAME,
            "authors",
            AUTHORS,
            counts={"train": None, "test": None},
            note="supported by the authors' loader; not in the paper",
        )
        for name, title in (
            ("LVISRare", "LVIS, rare classes"),
            ("LVISCommon", "LVIS, common classes"),
            ("iNaturalist", "iNaturalist"),
            ("SASilver_inaturalist", "iNaturalist, silver masks"),
        )
    ),
    Source(
        "reasonseg-hf",
        "ReasonSeg, Hugging Face copy",
        "CR",
        "reasoning",
        None,
        "reasonseg-hf",
        "https://huggingface.co/datasets/Ricky06662/ReasonSeg_test",
        counts={"val": 200, "test": 779},
        note="ignore regions are foreground in this copy, so its scores are not comparable with those of reasonseg",
    ),
    *(
        Source(
            name,
            title,
            "CR",
            "referring expressions",
            None,
            "refcoco",
            "https://github.com/lichengunc/refer",
            counts=dict.fromkeys(splits),
            aliases={} if "test" in splits else {"test": "val"},
            note="one sample per expression; cIoU is the usual metric; not in the ConceptSeg-R1 paper",
        )
        for name, title, splits in (
            ("refcoco", "RefCOCO, UNC splits", ("train", "val", "testA", "testB")),
            ("refcoco+", "RefCOCO+, UNC splits", ("train", "val", "testA", "testB")),
            ("refcocog", "RefCOCOg, UMD splits", ("train", "val", "test")),
            ("refcocog-google", "RefCOCOg, Google splits", ("train", "val")),
        )
    ),
    _coco20i(
        "coco20i",
        "COCO-20i",
        "all 80 classes of COCO 2014, val images; the paper's subsets are coco2014_Living and coco2014_Artifact",
    ),
    *(
        _coco20i(
            f"coco20i-{fold}",
            f"COCO-20i, fold {fold}",
            f"the 20 classes with zero-based index % 4 == {fold}",
        )
        for fold in range(4)
    ),
    Source(
        "mig-bench",
        "MIG-Bench as published",
        "CR",
        "",
        None,
        "mig-bench",
        f"{MIGICIAN}/MIG-Bench",
        counts={"test": None},
        note="boxes only; the paper's masks are in MIG_*",
    ),
    Source(
        "mgrounding",
        "MGrounding-630k as published",
        "CR",
        "",
        None,
        "mgrounding",
        f"{MIGICIAN}/MGrounding-630k",
        counts={"train": None},
        note="boxes only; the paper's masks are in MGrounding",
    ),
    Source(
        "plain",
        "your own data",
        "",
        "",
        None,
        "plain",
        "",
        counts={},
        note="a folder with samples.jsonl, samples.csv, or images/ and masks/",
    ),
    Source(
        "photos",
        "photographs of several datasets",
        "",
        "",
        None,
        "photos",
        "",
        counts={},
        note="a folder of folders like those of plain; references are drawn from the train split of each",
    ),
)

SOURCES = {source.name: source for source in (*_SUITE, *_OTHERS)}
"""All named sets that read files; the paper's suite comes first."""

SUITE = tuple(source.name for source in _SUITE)
"""Names of the paper's suite (Tables 5 and 6)."""
