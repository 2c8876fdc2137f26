"""The bytes that each token of a vocabulary spells, and texts as tokens without losing a byte.

Two tokenizers can be compared only by what they write. A byte-level tokenizer (Qwen, Llama 3, SmolLM2)
writes each byte as one letter of an alphabet of 256; SentencePiece's with byte fall-back (Llama 2) writes
a space as "▁" and a byte that it has no piece for as "<0x0A>". Others drop or change bytes (lower case,
unknown words), and are refused.
"""

import json
import re
from collections.abc import Callable, Sequence

import numpy as np

from opd_jax.data.tokenizer import Tokenizer
from opd_jax.errors import ModelError

_PROBE = "The 12 + 3.5 = x,\n\n\tÄö don't  漢字 😀 Z"
_INVALID = re.compile(
    "([\udc80-\udcff])"
)  # bytes of no character, as `surrogateescape` writes them
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Spelling:
    """Tokens to bytes and back for one tokenizer; thread-safe as the tokenizer is.

    Attributes:
      pieces: bytes by id; None for special tokens, which are not text, and for ids without a token.
      added: text -> id of every added token, special or not.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Read the vocabulary. Raises ModelError where its tokens have no bytes, or lose some of a text."""
        self.tokenizer = tokenizer
        self.added = {str(text): i for text, i in tokenizer.hf.get_added_vocab().items()}
        spell = _speller(tokenizer)
        special = set(tokenizer.hf.all_special_ids) | _special(tokenizer)
        self.pieces: list[bytes | None] = [None] * tokenizer.size
        for text, i in tokenizer.vocabulary().items():
            if text in self.added:
                self.pieces[i] = None if i in special else text.encode()
            else:
                self.pieces[i] = spell(text)
        self._single = {
            piece[0]: i for i, piece in enumerate(self.pieces) if piece and len(piece) == 1
        }
        if self.encode([_PROBE.encode()])[0] is None:
            raise ModelError(
                f"{tokenizer.path}: the tokenizer changes the text that it reads, wanted one that keeps "
                "every byte; use a student and a teacher of one tokenizer family"
            )

    def text(self, ids: Sequence[int]) -> bytes | None:
        """Return the bytes that ordinary tokens spell, None if one of them spells none."""
        pieces = [self.pieces[i] for i in ids]
        return None if None in pieces else b"".join(piece for piece in pieces if piece)

    def lengths(self, ids: Sequence[int]) -> np.ndarray:
        """Return the number of bytes of each ordinary token; int64 [n]."""
        return np.array([len(self.pieces[i] or b"") for i in ids], np.int64)

    def encode(self, texts: Sequence[bytes]) -> list[list[int] | None]:
        """Return the ids of each text, of any bytes; None where no ids spell exactly these.

        Each is read as the rest of a longer text: SentencePiece's space before a text is left out. Bytes
        of no character become single-byte tokens. Text that looks like a special token is read as text.
        """
        parts = [_INVALID.split(raw.decode("utf-8", "surrogateescape")) for raw in texts]
        runs = [run for split in parts for run in split[::2] if run]
        encoded = iter(self._runs(runs))
        out: list[list[int] | None] = []
        for split in parts:
            ids: list[int] | None = []
            for place, part in enumerate(split):
                if place % 2:  # an invalid byte
                    byte = self._single.get(ord(part) - 0xDC00)
                    found = None if byte is None else [byte]
                else:
                    found = next(encoded) if part else []
                ids = None if ids is None or found is None else ids + found
            out.append(ids)
        return out

    def _runs(self, runs: list[str]) -> list[list[int] | None]:
        """Return the ids of texts of whole characters."""
        return [
            self._exact(run, ids)
            for run, ids in zip(runs, self.tokenizer.encode_text(runs), strict=True)
        ]

    def _exact(self, run: str, ids: list[int]) -> list[int] | None:
        raw, got = run.encode(), self.text(ids)
        if got == raw:
            return ids
        if got != b" " + raw:
            return None
        if self.pieces[ids[0]] == b" ":
            return ids[1:]
        # The space is part of the first piece: read the text behind a line break, which joins no piece.
        ids = self.tokenizer.encode_text(["\n" + run])[0]
        return next((ids[k:] for k in (1, 2) if self.text(ids[k:]) == raw), None)


def _speller(tokenizer: Tokenizer) -> Callable[[str], bytes | None]:
    """Return the function from a token's string to its bytes (None: not of this alphabet)."""
    inner = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    parts = json.dumps([inner.get("pre_tokenizer"), inner.get("decoder")])
    if '"ByteLevel"' in parts:
        byte_of = {letter: byte for byte, letter in _alphabet().items()}

        def byte_level(text: str) -> bytes | None:
            known = text and all(letter in byte_of for letter in text)
            return bytes(byte_of[letter] for letter in text) if known else None

        return byte_level
    if inner["model"].get("byte_fallback"):

        def sentencepiece(text: str) -> bytes | None:
            byte = _BYTE.fullmatch(text)
            return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()

        return sentencepiece
    raise ModelError(
        f"{tokenizer.path}: a {inner['model'].get('type')} tokenizer without byte-level tokens or byte "
        "fall-back, so that its tokens cannot be aligned with the bytes of another's; use a student and a "
        "teacher of one tokenizer family"
    )


def _alphabet() -> dict[int, str]:
    """Return the letter of each byte in byte-level vocabularies (GPT-2): printable ones as they are."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


def _special(tokenizer: Tokenizer) -> set[int]:
    return {i for i, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
