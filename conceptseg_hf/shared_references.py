"""Prefix sharing of references: prompts with the same references read their mosaic once.

The system text and the mosaic stand before the target in a prompt. Their images are encoded once for each set of
references, and their key-value pairs are reused: by the rows of a batch, and across batches with a `ReferenceStore`.
Tokens and hidden states equal those of separate passes up to numerical error.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .hashing import weights_state
from .vlm_families import Vlm, get_family

DEFAULT_MAX_BYTES = 2**30


@dataclass(frozen=True)
class _Prefix:
    """A prompt up to the end of its first image.

    Attributes:
        row: The first row that starts with it.
        columns: Its columns in this row.
        image: Index of its image in the batch.
        pixels: Its part of `pixel_values`.
    """

    row: int
    columns: slice
    image: int
    pixels: slice


@dataclass(frozen=True)
class _KeysValues:
    """Key-value pairs of a prefix.

    Attributes:
        layers: Keys and values of each layer, (1, heads, tokens, width).
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


class ReferenceStore:
    """Key-value pairs of sets of references; the least recently used ones are dropped.

    All of them are dropped when the weights of the VLM, its adapters, dtype or device have changed.

    Args:
        max_bytes: Maximum size of the key-value pairs.
        across_batches: Whether references that occur once in a batch are kept, too.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES, across_batches: bool = False) -> None:
        if max_bytes < 0:
            raise ValueError(f"shared_references: max_bytes is {max_bytes}; use at least 0.")
        self.max_bytes, self.across_batches = max_bytes, across_batches
        self._kept: OrderedDict[Hashable, _KeysValues] = OrderedDict()
        self._state: Hashable = None

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Size of the key-value pairs that are kept."""
        return sum(prefix.num_bytes for prefix in self._kept.values())

    def drop_stale(self, vlm: nn.Module) -> None:
        """Drop all key-value pairs if they belong to another state of the weights."""
        state = weights_state(vlm)
        if state != self._state:
            self._kept.clear()
            self._state = state

    def get(self, key: Hashable) -> _KeysValues | None:
        """Return the key-value pairs of a prefix and mark them as used."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def add(self, key: Hashable, prefix: _KeysValues) -> None:
        """Keep the key-value pairs of a prefix, and drop others if there are too many."""
        self._kept[key] = prefix
        while self._kept and self.num_bytes > self.max_bytes:
            self._kept.popitem(last=False)


def read_references(vlm: Vlm, inputs: Mapping[str, Tensor], store: ReferenceStore) -> dict[str, Any] | None:
    """Read the references of a batch, each set once.

    Args:
        vlm: The VLM.
        inputs: The VLM's inputs (see `VlmFamily.model_inputs`): complete, left-padded prompts.
        store: Key-value pairs of earlier batches.

    Returns:
        Arguments of `vlm.generate` that replace `inputs`, or None if nothing is shared. Rows are padded at the start
        and between the references and the target.
    """
    prefix_of_row, prefixes = _find_prefixes(vlm, inputs)
    counts = [prefix_of_row.count(index) for index in range(len(prefixes))]
    if not prefixes or (max(counts) == 1 and not store.across_batches):
        return None
    if store.across_batches:
        store.drop_stale(vlm)
    read = _read_prefixes(vlm, inputs, prefixes, store)
    return _continued_inputs(vlm, inputs, prefix_of_row, prefixes, read)


def _find_prefixes(vlm: Vlm, inputs: Mapping[str, Tensor]) -> tuple[list[int | None], list[_Prefix]]:
    """Return the index of the prefix of each row (None for rows with one image), and the unique prefixes."""
    family = get_family(vlm.config)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    num_pixels, num_tokens = family.pixels_per_image(inputs), family.tokens_per_image(vlm.config, inputs)
    starts = inputs["attention_mask"].argmax(dim=1).tolist()
    first_image_tokens = (ids == vlm.config.image_token_id).int().argmax(dim=1).tolist()
    prefixes: list[_Prefix] = []
    prefix_of_row: list[int | None] = []
    for row, part in enumerate(family.images_of_rows(vlm.config, inputs)):
        if part.images.stop - part.images.start < 2:
            prefix_of_row.append(None)
            continue
        image = part.images.start
        found = _Prefix(
            row,
            slice(starts[row], first_image_tokens[row] + num_tokens[image]),
            image,
            slice(part.pixels.start, part.pixels.start + num_pixels[image]),
        )

        def is_same(other: _Prefix, found: _Prefix = found, row: int = row) -> bool:
            return torch.equal(ids[row, found.columns], ids[other.row, other.columns]) and torch.equal(
                pixels[found.pixels], pixels[other.pixels]
            )

        index = next((i for i, other in enumerate(prefixes) if is_same(other)), len(prefixes))
        if index == len(prefixes):
            prefixes.append(found)
        prefix_of_row.append(index)
    return prefix_of_row, prefixes


def _read_prefixes(
    vlm: Vlm, inputs: Mapping[str, Tensor], prefixes: Sequence[_Prefix], store: ReferenceStore
) -> list[_KeysValues]:
    """Return the key-value pairs of prefixes; those that are not kept are read together."""
    keys = [_key(inputs, prefix) if store.across_batches else None for prefix in prefixes]
    found = [None if key is None else store.get(key) for key in keys]
    missing = [index for index, prefix in enumerate(found) if prefix is None]
    if missing:
        read = _forward_prefixes(vlm, inputs, [prefixes[index] for index in missing])
        for index, key_values in zip(missing, read, strict=True):
            found[index] = key_values
            if keys[index] is not None:
                store.add(keys[index], key_values)
    return [key_values for key_values in found if key_values is not None]


def _key(inputs: Mapping[str, Tensor], prefix: _Prefix) -> Hashable:
    """Return a hash of the tokens and pixels of a prefix."""
    digest = hashlib.blake2b(digest_size=16)
    ids = inputs["input_ids"][prefix.row, prefix.columns].cpu()
    pixels = inputs["pixel_values"][prefix.pixels].cpu().contiguous()
    digest.update(ids.numpy().tobytes())
    digest.update(pixels.view(torch.uint8).numpy().tobytes())
    return str(pixels.dtype), tuple(pixels.shape), digest.digest()


def _forward_prefixes(
    vlm: Vlm, inputs: Mapping[str, Tensor], prefixes: Sequence[_Prefix]
) -> list[_KeysValues]:
    """Read prefixes in one forward pass."""
    length = max(prefix.columns.stop - prefix.columns.start for prefix in prefixes)
    family = get_family(vlm.config)
    batch = {
        name: torch.stack(
            [_left_padded(inputs[name][prefix.row, prefix.columns], length) for prefix in prefixes]
        )
        for name in family.row_names
    }
    family.reset(vlm)
    cache = DynamicCache(config=vlm.config.get_text_config())
    vlm.base_model(
        **batch,
        **family.select_images(inputs, [prefix.image for prefix in prefixes]),
        **family.prompt_positions(batch["attention_mask"]),
        past_key_values=cache,
        use_cache=True,
    )
    family.reset(vlm)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    layers: Any = cache.layers  # their annotations include caches of other architectures
    return [
        _KeysValues(
            tuple(
                # Copies, since views would keep the pairs of all prefixes in memory.
                (
                    layer.keys[row : row + 1, :, -count:].clone(),
                    layer.values[row : row + 1, :, -count:].clone(),
                )
                for layer in layers
            )
        )
        for row, count in enumerate(lengths)
    ]


def _continued_inputs(
    vlm: Vlm,
    inputs: Mapping[str, Tensor],
    prefix_of_row: Sequence[int | None],
    prefixes: Sequence[_Prefix],
    read: Sequence[_KeysValues],
) -> dict[str, Any]:
    """Return the arguments of `generate` for rows that continue prefixes: [padding, prefix, padding, rest]."""
    family = get_family(vlm.config)
    lengths = [0 if index is None else read[index].length for index in prefix_of_row]
    width = max(lengths)
    total = inputs["input_ids"].shape[1]
    starts = (inputs["attention_mask"].argmax(dim=1)).tolist()
    rest = max(total - start - length for start, length in zip(starts, lengths, strict=True))
    batch: dict[str, Any] = {}
    for name in family.row_names:
        rows = []
        for tensor, start, length in zip(inputs[name], starts, lengths, strict=True):
            begin, end = tensor[start : start + length], tensor[start + length :]
            rows.append(torch.cat([_left_padded(begin, width), _left_padded(end, rest)]))
        batch[name] = torch.stack(rows)
    cache = DynamicCache(config=vlm.config.get_text_config())
    for layer in range(len(read[0].layers)):
        pairs = []
        for kind in range(2):
            empty = read[0].layers[layer][kind][:, :, :0]
            padded = [
                nn.functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))
                for tensor in (empty, *(each.layers[layer][kind] for each in read))
            ]
            pairs.append(torch.cat([padded[0 if index is None else index + 1] for index in prefix_of_row]))
        cache.update(pairs[0], pairs[1], layer)
    # Only images after the prefixes are encoded.
    new_images = [
        image
        for row, index in zip(family.images_of_rows(vlm.config, inputs), prefix_of_row, strict=True)
        for image in range(row.images.start + (index is not None), row.images.stop)
    ]
    tokens = family.encode_images(vlm, family.select_images(inputs, new_images))
    batch |= {name: inputs[name] for name in family.image_names}
    return batch | {"past_key_values": cache} | family.encoded_images(vlm, tokens)


def _left_padded(row: Tensor, length: int) -> Tensor:
    return nn.functional.pad(row, (length - len(row), 0))
