"""Qwen's tokenizer from `qwen.tiktoken`, its list of ordinary tokens (`dashscope` holds a copy)."""

import base64
import itertools
import pathlib

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as bpe
from transformers import PreTrainedTokenizerFast

from tests.support.families import CHATML, QWEN

ORDINARY = 151_643
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte-pair encoding joins last to make the token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, ORDINARY) for a, b in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def ordinary(file: pathlib.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of Qwen in the byte-level alphabet."""
    lines = file.read_text().splitlines()
    ranks = {base64.b64decode(text): int(rank) for text, rank in map(str.split, lines)}
    assert len(ranks) == ORDINARY
    spare = iter(range(256, 512))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {byte: chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)}

    def spell(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    pairs = (merge_of(token, ranks) for token in ranks if len(token) > 1)
    return {spell(t): i for t, i in ranks.items()}, [(spell(a), spell(b)) for a, b in pairs]


def inner(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], special: tuple[str, ...]
) -> Tokenizer:
    """Qwen's way to cut a text, with these special tokens behind the ordinary ones."""
    tokenizer = Tokenizer(bpe.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def save_tokenizer(file: pathlib.Path, folder: pathlib.Path) -> None:
    """Write Qwen2.5's tokenizer and ChatML template to a model folder."""
    tokenizer = inner(*ordinary(file), QWEN)
    tokenizer.normalizer = normalizers.NFC()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHATML, eos_token="<|im_end|>"
    ).save_pretrained(folder)
