"""Vocabulary shared by the tokenizers of the tests."""

# Qwen's special tokens, in the order of the nano preset's token ids after the padding token.
QWEN_SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def sam_frame():
    """Create a post-processor that adds CLIP's begin and end tokens, with ids 1 and 2."""
    from tokenizers import processors

    return processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
