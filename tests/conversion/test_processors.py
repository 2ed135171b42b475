"""Conversion of tokenizers and image processors in the published formats."""

from __future__ import annotations

import json
import shutil

import pytest
from parity.meta_sam3 import write_vocabulary
from transformers import (
    AutoProcessor,
    CLIPTokenizer,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Sam3ImageProcessor,
    Sam3Processor,
)
from vocabulary import QWEN_SPECIAL_TOKENS

from conceptseg_hf import ConceptSegProcessor
from conceptseg_hf.conversion import ConversionError, convert
from conceptseg_hf.conversion.processors import BPE_NAME, read_bpe

CHAT = "{% for message in messages %}{{ message['role'] }}{% for part in message['content'] %}"
CHAT += "{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"


def qwen_tokenizer() -> Qwen2Tokenizer:
    letters = [chr(i) for i in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ"]
    vocabulary = {token: i for i, token in enumerate([*letters, "re", "red"])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[("r", "e"), ("re", "d")])
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL_TOKENS)})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.fixture()
def bare(parts, tmp_path):
    """Folders of the checkpoint and SAM 3 that contain only config and weights."""
    folders = []
    for name, folder in (("c", parts.checkpoint), ("s", parts.sam_folder)):
        (tmp_path / name).mkdir()
        for path in (folder / "config.json", *folder.glob("model*")):
            shutil.copy(path, tmp_path / name)
        folders.append(tmp_path / name)
    return folders


def old_preprocessor(folder) -> None:
    """Write the image-processor config that Qwen2.5-VL was published with."""
    content = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def test_published_format(bare, tmp_path):
    checkpoint, sam = bare
    qwen_tokenizer().save_pretrained(checkpoint)
    old_preprocessor(checkpoint)
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    clip = read_bpe(write_vocabulary(tmp_path / BPE_NAME))
    Sam3Processor(Sam3ImageProcessor(size={"height": 128, "width": 128}), clip).save_pretrained(sam)

    processor = AutoProcessor.from_pretrained(convert(checkpoint, sam, tmp_path / "out"))
    assert type(processor) is ConceptSegProcessor
    assert (type(processor.tokenizer), type(processor.sam_tokenizer)) == (Qwen2Tokenizer, CLIPTokenizer)
    assert processor.tokenizer.tokenize("red") == ["red"] and processor.image_token == "<|image_pad|>"
    assert processor.chat_template == CHAT
    assert processor.image_processor.patch_size == 14 and processor.image_processor.temporal_patch_size == 2
    assert processor.sam_image_processor.size["height"] == 128
    ids, mask = processor.sam_text(["the striped cat"])
    assert ids.shape == (1, 32) and ids[0][mask[0].bool()].tolist() == clip("the striped cat")["input_ids"]


def test_format_of_current_transformers(bare, tmp_path):
    checkpoint, sam = bare
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=8, temporal_patch_size=1),
        qwen_tokenizer(),
        Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    ).save_pretrained(checkpoint)
    write_vocabulary(sam / BPE_NAME)
    processor = AutoProcessor.from_pretrained(convert(checkpoint, sam, tmp_path / "out"))
    assert processor.image_processor.patch_size == 8 and processor.image_processor.temporal_patch_size == 1
    assert processor.sam_image_processor.size["height"] == 128  # from the config, because there is no file
    assert processor.chat_template == CHAT


def test_sam3_without_vocabulary_is_rejected(bare, parts, tmp_path):
    with pytest.raises(ConversionError, match=f"copy {BPE_NAME}"):
        convert(parts.checkpoint, bare[1], tmp_path / "out")


def test_damaged_vocabulary_is_rejected(bare, parts, tmp_path):
    (bare[1] / BPE_NAME).write_bytes(b"not gzip")
    with pytest.raises(ConversionError, match="cannot be read"):
        convert(parts.checkpoint, bare[1], tmp_path / "out")
