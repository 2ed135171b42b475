"""Word-level tokenizers of small checkpoints, and their processor."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Sam3ImageProcessor

from conceptseg_hf.processing_conceptseg import ConceptSegProcessor
from conceptseg_hf.prompt_template import PromptTemplate
from conceptseg_hf.vlm_families import DEFAULT_FAMILY

COORDINATE_SCALE = 100
TAGS = ("think", "rule", "check", "bbox", "answer")

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


def build_vlm_tokenizer(words: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Build the VLM's tokenizer: tags, punctuation, words, and one token for each number from 0 to 100.

    Args:
        words: The words.
        size: Number of embeddings.

    Raises:
        ValueError: If the words are not unique or too many, as for `build_sam_tokenizer`.
    """
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
    numbers = [str(number) for number in range(COORDINATE_SCALE + 1)]
    tokenizer = _word_level([*special, *tags, *punctuation, *words, *numbers], size, "the VLM tokenizer")
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


def build_sam_tokenizer(words: Sequence[str], size: int, text_length: int) -> PreTrainedTokenizerFast:
    """Build SAM 3's tokenizer: the words between a begin and an end token, as in CLIP.

    Args:
        words: The words.
        size: Number of embeddings.
        text_length: Maximum number of tokens.
    """
    tokenizer = _word_level(["<pad>", "<start>", "<end>", "<unk>", *words], size, "SAM 3's tokenizer")
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
        model_max_length=text_length,
    )


def build_processor(
    vlm_tokenizer: PreTrainedTokenizerFast,
    sam_tokenizer: PreTrainedTokenizerFast,
    image_size: int,
    template: PromptTemplate,
    patch_size: int = 8,
    vlm_family: str = DEFAULT_FAMILY,
) -> ConceptSegProcessor:
    """Build a processor with the same size of canvas and SAM 3's input, and coordinates from 0 to 100.

    Args:
        vlm_tokenizer: The VLM's tokenizer.
        sam_tokenizer: SAM 3's tokenizer.
        image_size: Side length of canvas and input in pixels.
        template: The prompt template.
        patch_size: Patch size of the VLM; 2 x 2 patches are an image token.
        vlm_family: Family of the VLM: "qwen2_5_vl" or "qwen3_vl".
    """
    image_processor = Qwen2VLImageProcessor(
        patch_size=patch_size,
        temporal_patch_size=1,
        merge_size=2,
        min_pixels=image_size**2,
        max_pixels=image_size**2,
    )
    return ConceptSegProcessor(
        image_processor=image_processor,
        tokenizer=vlm_tokenizer,
        sam_image_processor=Sam3ImageProcessor(size={"height": image_size, "width": image_size}),
        sam_tokenizer=sam_tokenizer,
        canvas_size=image_size,
        coordinate_scale=COORDINATE_SCALE,
        sam_text_length=sam_tokenizer.model_max_length,
        prompt_template=template.to_dict(),
        vlm_family=vlm_family,
    )
