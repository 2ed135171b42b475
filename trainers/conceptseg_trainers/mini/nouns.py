"""The noun phrases that photographs are described with, and where they can occur."""

from __future__ import annotations

from conceptseg_hf.data.files import FileItem

OBJECT = "object"
"""Noun of objects whose class is not known."""

COCO_CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,"
    "wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,"
    "chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,"
    "toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)

_NOUNS = {
    "bsdata": ("pitting", "defect"),
    "busi-99": ("breast tumor",),
    "camo": ("hidden object",),
    "cleargrasp-real": ("glass", "transparent"),
    "crackforest": ("crack",),
    "ecssd": ("salient object",),
    "gdd-glass": ("glass", "transparent"),
    "isic-51": ("skin lesion",),
    "isic2018-128": ("skin lesion",),
    "kvasir-seg": ("polyp",),
    "magnetic-tile": ("defect",),
    "msrc-cow": ("cow",),
    "neu-seg": ("steel defect", "defect"),
    "shadow-82": ("shadow",),
}
"""The nouns of datasets with a single concept; the first one is the answer."""

CAMVID_CLASSES = tuple(
    "building,car,cyclist,fence,pavement,pedestrian,pole,road,sky,traffic sign,tree".split(",")
)

OTHER_NOUNS = ("carrot plant", "weed", "inclusion", "patches", "scratches")
"""Nouns of samples that name their class, of cwfid and neu-seg."""

PROMPTS_WITHOUT_NOUN = (
    "industrial defect segmentation",
    "camouflaged object segmentation",
    "salient object segmentation",
    "breast tumor segmentation",
    "skin melanocytic tumor segmentation",
    "polyp colon segmentation",
    "common object segmentation",
    "the same kind of object as the marked one",
    "the same kind of defect as the marked one",
    "the object marked in the first picture",
    "what is new compared with the first picture",
    "what changed compared with the earlier picture",
    "the odd one out",
)
"""Prompts that do not name an object. SAM 3 is trained to predict that they are absent, so that the router uses the
VLM."""

_TILE_DEFECTS = {
    "blowhole": "blowhole",
    "break": "break",
    "crack": "crack",
    "fray": "fray",
    "uneven": "uneven spot",
}

DOMAINS = {
    "medical": ("busi-99", "isic-51", "isic2018-128", "kvasir-seg"),
    "industrial": ("bsdata", "crackforest", "magnetic-tile", "neu-seg"),
    "street": ("camvid",),
    "field": ("cwfid",),
    "natural": (
        *("camo", "cleargrasp-real", "coco128", "davis2016-val", "ecssd", "gdd-glass", "msrc-cow", "sbi2015"),
        "shadow-82",
    ),
}
"""Datasets by domain. Nouns of a dataset do not occur in other domains, except for those of streets and nature."""

_RELATED = frozenset({"street", "natural"})


PHOTO_NOUNS = tuple(
    dict.fromkeys(
        [
            OBJECT,
            *(noun for nouns in _NOUNS.values() for noun in nouns),
            *_TILE_DEFECTS.values(),
            *CAMVID_CLASSES,
            *OTHER_NOUNS,
            *COCO_CLASSES,
        ]
    )
)
"""All noun phrases of photographs."""

ABSENT_FROM_COMPOSITIONS = (
    *(
        "breast tumor",
        "skin lesion",
        "polyp",
        "steel defect",
        "blowhole",
        "fray",
        "pitting",
        "carrot plant",
        "weed",
    ),
    *("inclusion", "patches", "uneven spot"),
)
"""Nouns that neither the objects nor the backgrounds of `ConceptPhotos` show."""


def nouns_of(item: FileItem) -> tuple[str, ...]:
    """Return the nouns of what a sample marks, the answer first; empty if the sample has no class."""
    name = item.sample_id.partition("/")[2]
    if item.level == "CI":
        return (item.prompt,)
    if item.dataset == "magnetic-tile":
        return (_TILE_DEFECTS[name.partition("-")[0]], "defect")
    if item.dataset == "neu-seg" and item.level == "CR":
        return (name.rpartition("-")[2], "defect")
    if item.dataset == "coco128":
        return (" ".join(part for part in name.split("-")[1:] if part != "like" and not part.isdigit()),)
    return _NOUNS.get(item.dataset, ())


def domain_of(dataset: str) -> str:
    """Return the domain of a dataset; datasets that are not listed are natural."""
    return next((name for name, datasets in DOMAINS.items() if dataset in datasets), "natural")


def exclude_each_other(domain: str, other: str) -> bool:
    """Return whether the nouns of a domain never occur in images of another one."""
    return domain != other and not {domain, other} <= _RELATED
