"""The two word-level tokenizers of the nano model, and its processor."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Sam3ImageProcessor

from conceptseg_hf.data.concept_shapes.rendering import COLORS, GREY, SHAPES, TEXTURES
from conceptseg_hf.presets import (
    NANO_IMAGE_SIZE,
    NANO_SAM_TEXT_LENGTH,
    NANO_SAM_VOCABULARY_SIZE,
    NANO_VLM_VOCABULARY_SIZE,
)
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor
from conceptseg_hf.prompt_template import PromptTemplate

COORDINATE_SCALE = 100
TAGS = ("think", "rule", "check", "bbox", "answer")

# Words of noun phrases; they come first in the vocabularies.
NOUN_WORDS = (
    *(*COLORS, GREY, *SHAPES, *TEXTURES),
    *"object glass transparent hidden shadow core scratch stain hole lesion visual".split(),
)
OTHER_WORDS = tuple(
    "a above among and another are as asks background before below blends box boxes breaks broken but by "
    "camouflaged can changes check dark darker defect differs each eye find first for frame from goes ground has "
    "healthy here image images in industrial inside into is it its largest last left light locate mark marked new "
    "no none not objects odd of on one ones others out part passes pattern reference references region regular "
    "right rule salient same see segmentation share shared shares show shows smallest stands target that the their "
    "there this through tissue to tone unlike user view was what where which with without "
    "bottom color farthest highest leftmost less lowest nearest only outside rightmost second so third top".split()
)

NANO_TEMPLATE = PromptTemplate(
    system="locate",
    with_proxy="boxes {reference_boxes} check find {problem}",
    support_only="boxes {reference_boxes} find {problem}",
    single_reference="boxes {reference_boxes} find {problem}",
    no_reference="find {problem}",
)
SHORT_TEMPLATE = PromptTemplate(
    system="show",
    with_proxy="boxes {reference_boxes} find {problem}",
    support_only="boxes {reference_boxes} find {problem}",
    single_reference="boxes {reference_boxes} find {problem}",
    no_reference="find {problem}",
)
"""Template for completions without rule and check, as in the ablation without meta reasoning."""
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{_IMAGE}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _word_level(vocabulary: list[str], size: int, name: str) -> Tokenizer:
    if len(set(vocabulary)) != len(vocabulary) or len(vocabulary) > size:
        raise ValueError(
            f"{name} has {len(vocabulary)} words, {len(set(vocabulary))} of them unique; use at most {size} unique "
            "words, the size of the embeddings."
        )
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def build_vlm_tokenizer() -> PreTrainedTokenizerFast:
    """Build the VLM's tokenizer: words, tags, punctuation, and one token for each number from 0 to 100."""
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<unk>",
    ]
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    punctuation = ["[", "]", ",", ".", ":", "?", "system", "assistant"]
    words = list(dict.fromkeys([*NOUN_WORDS, *OTHER_WORDS]))
    numbers = [str(number) for number in range(COORDINATE_SCALE + 1)]
    tokenizer = _word_level(
        [*special, *tags, *punctuation, *words, *numbers], NANO_VLM_VOCABULARY_SIZE, "the VLM tokenizer"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"</?[a-z]+>|[a-z]+|[0-9]+|[^\sa-z0-9]"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    # Words are joined by spaces; spaces around tags, brackets and commas are removed.
    remove_spaces = [
        decoders.Replace(Regex(pattern), "")
        for pattern in (r" (?=[\[\],<])", r"(?<=[\[,>]) ", r"(?<=\]) (?=<)")
    ]
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), *remove_spaces]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:7],
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_sam_tokenizer() -> PreTrainedTokenizerFast:
    """Build SAM 3's tokenizer: the same words between a begin and an end token, as in CLIP."""
    words = list(dict.fromkeys([*NOUN_WORDS, *OTHER_WORDS]))
    tokenizer = _word_level(
        ["<pad>", "<start>", "<end>", "<unk>", *words], NANO_SAM_VOCABULARY_SIZE, "SAM 3's tokenizer"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=NANO_SAM_TEXT_LENGTH,
    )


def build_processor() -> ConceptSegProcessor:
    """Build the nano model's processor: canvas and SAM 3 input of 128 pixels, coordinates from 0 to 100."""
    side = {"height": NANO_IMAGE_SIZE, "width": NANO_IMAGE_SIZE}
    image_processor = Qwen2VLImageProcessor(
        patch_size=8,
        temporal_patch_size=1,
        merge_size=2,
        min_pixels=NANO_IMAGE_SIZE**2,
        max_pixels=NANO_IMAGE_SIZE**2,
    )
    return ConceptSegProcessor(
        image_processor=image_processor,
        tokenizer=build_vlm_tokenizer(),
        sam_image_processor=Sam3ImageProcessor(size=side),
        sam_tokenizer=build_sam_tokenizer(),
        canvas_size=NANO_IMAGE_SIZE,
        coordinate_scale=COORDINATE_SCALE,
        sam_text_length=NANO_SAM_TEXT_LENGTH,
        prompt_template=NANO_TEMPLATE.to_dict(),
    )


def short_processor(processor: ConceptSegProcessor) -> ConceptSegProcessor:
    """Return a copy of a processor with the template for completions without rule and check."""
    return processor.with_settings(prompt_template=SHORT_TEMPLATE.to_dict())
