"""What happens to special tokens and to the end of a response, for each pair of model families.

    python -m tests.support.families        prints the table of docs/end_tokens.md

A family is a small folder with the special tokens, end tokens and kind of chat template of a published
model (EOS ids: its config.json and generation_config.json), behind 256 ordinary tokens in place of
its own; ids are shown as they are in the published model. JustRL-DeepSeek and Skywork-OR1 have the
tokens of R1-Distill-Qwen.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as bpe
from transformers import PreTrainedTokenizerFast

from opd_jax import config as configuration
from opd_jax import data, models
from opd_jax.models import decoder
from opd_jax.training import roles

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 ordinary tokens
_VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
           "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
           "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")  # fmt: skip
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
        "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", *_VISION)  # fmt: skip
QWEN3 = (*QWEN, "<tool_response>", "</tool_response>", "<think>", "</think>")
R1 = ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<|EOT|>",
      "<think>", "</think>", "<|quad_start|>", "<|quad_end|>", *_VISION)  # fmt: skip
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
         "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
         "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
         "<|eot_id|>", "<|python_tag|>")  # fmt: skip
SMOLLM2 = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>",
           "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>",
           "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>",
           "<jupyter_script>", "<empty_output>")  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1_TEMPLATE = (
    "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
LLAMA_TEMPLATE = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A model as its tokenizer sees it. `first` is the published id of the first special token."""

    name: str
    vocabulary: str
    special: tuple[str, ...]
    first: int
    ends: tuple[int, ...]
    template: str | None

    def folder(self, root: pathlib.Path) -> str:
        """A model folder with these tokens, made under `root`."""
        # Vocabularies of other families differ in their ordinary ids.
        turn = {"Qwen": 0, "Llama": 1, "SmolLM2": 2}[self.vocabulary]
        letters = [*LETTERS[turn:], *LETTERS[:turn]]
        inner = Tokenizer(bpe.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens(list(self.special))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=self.template)
        model = models.ModelConfig(
            model_type="qwen2", vocab_size=300, hidden_size=16, intermediate_size=16, num_layers=1,
            num_heads=2, num_kv_heads=1, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6,
            max_position=512, tie_embeddings=False, qkv_bias=True, qk_norm=False,
            eos_token_ids=tuple(i - self.first + 256 for i in self.ends),
        )  # fmt: skip
        path = root / self.name
        models.save(
            str(path), model, decoder.init(jax.random.key(len(self.name)), model), tokenizer
        )
        return str(path)


FAMILIES = (
    Family("Qwen2.5-Math", "Qwen", QWEN, 151_643, (151_643,), CHATML),
    Family("R1-Distill-Qwen", "Qwen", R1, 151_643, (151_643,), R1_TEMPLATE),
    Family("OpenThinker3", "Qwen", QWEN, 151_643, (151_645,), CHATML),
    Family("Qwen3", "Qwen", QWEN3, 151_643, (151_645, 151_643), CHATML),
    Family("Qwen3-Base", "Qwen", QWEN3, 151_643, (151_643,), CHATML),
    Family("Llama-3.1", "Llama", LLAMA, 128_000, (128_001,), None),
    Family(
        "Llama-3.1-Instruct", "Llama", LLAMA, 128_000, (128_001, 128_008, 128_009), LLAMA_TEMPLATE
    ),
    Family("SmolLM2", "SmolLM2", SMOLLM2, 0, (0,), None),
    Family("SmolLM2-Instruct", "SmolLM2", SMOLLM2, 0, (2,), CHATML),
)


def rows() -> Iterator[str]:
    """The table's lines, a pair each; pairs of other vocabularies share one line."""
    yield "| student | teacher | student ends at | teacher ends at | the event's id | remapped | masked |"
    yield "|---|---|---|---|---|---|---|"
    by_text = set()
    with tempfile.TemporaryDirectory() as root:
        opened = {family: _open(family.folder(pathlib.Path(root))) for family in FAMILIES}
        for mine in FAMILIES:
            for theirs in FAMILIES:
                if mine.vocabulary == theirs.vocabulary:
                    yield _row(mine, theirs, *opened[mine], *opened[theirs])
                    continue
                found, _ = data.align_text(*_pair(*opened[mine], *opened[theirs]))
                assert found.ends is not None
                assert found.counted[list(found.stop_ids)].all()
                by_text.add((mine.vocabulary, theirs.vocabulary))
    assert len(by_text) == 6  # every pair of two vocabularies, both ways
    how = "compared by [spans of text](spans.md)"
    yield f"| any | of another vocabulary (Qwen, Llama, SmolLM2) | | | {how} | | |"


def _open(path: str) -> tuple[models.ModelConfig, data.Tokenizer]:
    section = configuration.default().student
    section.path = path
    return roles.open_model(section, "")


def _align(
    student: models.ModelConfig,
    tokenizer: data.Tokenizer,
    teacher: models.ModelConfig,
    teacher_tokenizer: data.Tokenizer,
) -> data.Alignment:
    end = roles.golden_end(student, tokenizer, tokenizer.path)
    pair = _pair(student, tokenizer, teacher, teacher_tokenizer)
    return data.align(*pair, special_tokens="remap", end=end)


def _pair(
    student: models.ModelConfig,
    tokenizer: data.Tokenizer,
    teacher: models.ModelConfig,
    teacher_tokenizer: data.Tokenizer,
) -> tuple[data.Vocabulary, data.Vocabulary]:
    return (
        data.Vocabulary(tokenizer, 300, student.eos_token_ids),
        data.Vocabulary(teacher_tokenizer, 300, teacher.eos_token_ids),
    )


def _row(
    mine: Family,
    theirs: Family,
    student: models.ModelConfig,
    tokenizer: data.Tokenizer,
    teacher: models.ModelConfig,
    teacher_tokenizer: data.Tokenizer,
) -> str:
    found = _align(student, tokenizer, teacher, teacher_tokenizer)
    assert found.ends is not None
    assert found.counted[list(found.stop_ids)].all()  # no end of the student's is left out

    def named(ids, of: data.Tokenizer = tokenizer, family: Family = mine) -> str:
        texts = of.hf.convert_ids_to_tokens([int(i) for i in ids])
        published = (int(i) - 256 + family.first for i in ids)
        return ", ".join(f"{i} `{t}`" for t, i in zip(texts, published, strict=True)) or "-"

    remapped = [d.id for d in found.differing if d.treatment.startswith("remapped")]
    masked = np.flatnonzero(~found.counted).tolist()
    cells = (
        mine.name, theirs.name, named(found.stop_ids),
        named(teacher.eos_token_ids, teacher_tokenizer, theirs), str(found.ends.id - 256 + mine.first),
        named(remapped), named(masked),
    )  # fmt: skip
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print("\n".join(rows()))
