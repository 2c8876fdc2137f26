"""Small tokenizers in the shapes of published ones: byte-level, SentencePiece's, with their templates."""

import json
import pathlib

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from opd_jax import data

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 ordinary ids
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = TURNS + ASKS
OPENS = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
CLOSES = (
    TURNS
    + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    + "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# R1 drops the thoughts of earlier turns, Qwen3 writes an empty block before a last turn without any.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<Assistant>{{ m.content.split('</think>')[-1] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}"
    "{% else %}{% set day = '26 Jul 2024' %}{% endif %}<|im_start|>system\nToday Date: {{ day }}<|im_end|>\n"
    + CHATML
)


def byte_level(
    folder: pathlib.Path, template: str | None, special: tuple[str, ...] = SPECIAL
) -> data.Tokenizer:
    """Single letters, and the given special tokens behind them."""
    inner = Tokenizer(kinds.BPE(vocab={t: i for i, t in enumerate(LETTERS)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template).save_pretrained(folder)
    return data.Tokenizer(str(folder))


def merged(
    folder: pathlib.Path,
    merges: tuple[str, ...],
    *,
    special: tuple[str, ...] = SPECIAL,
    template: str | None = CHATML,
    turn: int = 0,
) -> data.Tokenizer:
    """Byte-level BPE of whole texts: merges such as "a+b", in this order; `turn` moves the letters' ids."""
    letters = [*LETTERS[turn:], *LETTERS[:turn]]
    pairs = [(a, b) for a, _, b in (merge.partition("+") for merge in merges)]
    vocab = {t: i for i, t in enumerate([*letters, *(a + b for a, b in pairs)])}
    inner = Tokenizer(kinds.BPE(vocab=vocab, merges=pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=template, eos_token=special[-1]
    ).save_pretrained(folder)
    return data.Tokenizer(str(folder))


def sentencepiece(
    folder: pathlib.Path, template: str | None, *, kind: str, config: dict | None = None
) -> data.Tokenizer:
    """Characters of ASCII with byte fall-back; `kind` says how a space comes before a text.

    prepend: Llama 2's normaliser; always, first: Metaspace's prepend_scheme (Llama's newer files).
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁2", "▁so", "so"]
    tokens += [chr(i) for i in range(33, 127)]
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(
        kinds.BPE(
            vocab=vocab, merges=[("▁", "2"), ("s", "o"), ("▁", "so")],
            unk_token="<unk>", byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    if kind == "prepend":
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=template, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    if config:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return data.Tokenizer(str(folder))
