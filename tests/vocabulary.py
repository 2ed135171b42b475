"""What the tests' tokenizers have in common."""

# Qwen's, in the order that the nano preset's token ids expect after the padding token.
QWEN_SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def sam_frame():
    """CLIP's frame of a text: begin, words, end; their ids are 1 and 2."""
    from tokenizers import processors

    return processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
