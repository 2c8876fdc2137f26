"""The tokenizer of a model folder: transformers' fast tokenizer, its chat template, and its end tokens."""

import datetime
import functools
import json
import os
import pathlib
import re
import sys
import threading
from typing import Any

# No warning that torch is missing: this is intended.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import numpy as np

from opd_jax.data.problem import History
from opd_jax.errors import ModelError

# A directive of strftime at any position of a template: flags, a width, a modifier, a letter.
_DIRECTIVE = re.compile(r"(?=(%[-_0^#+:]*\d*[EO]?[A-Za-z]))")
_PERCENT = "\ue000"  # in place of %% until all directives are replaced


class Tokenizer:
    """Text to ids and back for one model folder; thread-safe.

    It downloads nothing and runs no code of the folder.
    """

    def __init__(
        self, path: str, *, chat_template: str = "", enable_thinking: bool = True, date: str = ""
    ):
        """Read the folder.

        `chat_template` is a Jinja file that replaces the folder's own; `enable_thinking` is passed to the
        template, which may support it (Qwen3's does). `date` (YYYY-MM-DD) is the day for a template that
        prints the date; "" = today.
        """
        if not (pathlib.Path(path) / "tokenizer.json").is_file():
            raise ModelError(
                f"{path}/tokenizer.json is missing; copy the tokenizer files into the model folder"
            )
        _require_plain_merges(path)
        from transformers import PreTrainedTokenizerFast  # takes a second or two to import

        try:
            # Not AutoTokenizer: the class it picks by model_type may rebuild the splitting of text
            # and add tokens (<|endoftext|> to R1-Distill) that the checkpoint was not trained with.
            self.hf: Any = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(
                f"{path}: cannot read the tokenizer ({reason}); copy it again"
            ) from None
        if chat_template:
            self.hf.chat_template = _template(chat_template)
        self.hf.model_max_length = sys.maxsize  # the setup checks lengths
        self._one = threading.Lock()  # transformers' tokenizer is not thread-safe
        self.path = path
        self.enable_thinking = enable_thinking
        self.day = datetime.date.fromisoformat(date) if date else datetime.date.today()
        self._wants_beginning = _adds_beginning(path)
        self._begin = self.hf.bos_token_id if self._wants_beginning else None
        self.size = max(self.hf.get_vocab().values()) + 1

    @property
    def has_template(self) -> bool:
        """Whether prompts use a chat template; a base model may have none."""
        return bool(self.hf.chat_template)

    @property
    def prints_date(self) -> bool:
        """Whether the chat template prints today's date (Llama 3's does)."""
        return "strftime_now" in str(self.hf.chat_template or "")

    @property
    def adds_beginning(self) -> bool:
        """Whether plain prompts get a beginning token that tokenizer.json does not add."""
        return not self.has_template and self._begin is not None

    @property
    def lacks_beginning(self) -> bool:
        """Whether add_bos_token requires a beginning token before plain prompts, but none is named."""
        return not self.has_template and self._wants_beginning and self._begin is None

    def render(
        self, text: str, *, system: str = "", history: History = (), reply: str | None = None
    ) -> str:
        """Return the text of a prompt: optional system turn, earlier turns, a user turn, up to the answer.

        With `reply`, return the text of the closed conversation instead. Without a chat template the prompt
        is the text itself (a base model), and no other turn is possible.

        Raises ModelError where the template is missing but needed, or refuses the turns.
        """
        if not self.has_template:
            if system:
                raise ModelError(
                    f"{self.path}: the tokenizer has no chat template, wanted one for the system "
                    "prompt; name a Jinja file by --config.student.chat_template or "
                    "--config.teacher.chat_template, or drop it: --config.data.system_prompt=none"
                )
            if history:
                raise ModelError(
                    f"{self.path}: the tokenizer has no chat template, wanted one for a problem with "
                    f"{len(history)} earlier turns; name a Jinja file by "
                    "--config.student.chat_template or --config.teacher.chat_template"
                )
            return text + (reply or "")
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": role, "content": earlier} for role, earlier in history]
        messages.append({"role": "user", "content": text})
        if reply is not None:
            messages.append({"role": "assistant", "content": reply})
        return self._apply(messages, generation_prompt=reply is None)

    def _apply(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
        try:  # transformers renders in a sandbox: the template is a program from the model folder
            return self.hf.apply_chat_template(
                messages,
                chat_template=self._dated_template(),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                enable_thinking=self.enable_thinking,
            )
        except Exception as error:  # jinja's errors, and any error that a template raises
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            system = messages[0]["role"] == "system"
            # Earlier turns are those besides the system turn, the question and a reply to it.
            earlier = len(messages) > system + 1 + (messages[-1]["role"] == "assistant")
            turns = f"a {'system' if system else 'user'} turn" + " and earlier turns" * earlier
            raise ModelError(
                f"{self.path}: its chat template cannot render {turns} "
                f"({reason}); correct its chat_template.jinja, or "
                "name another: --config.student.chat_template or --config.teacher.chat_template"
            ) from None

    def _dated_template(self) -> str:
        """Return the template; its `strftime_now` prints `day` instead of the clock's date."""
        template = self.hf.get_chat_template()
        return _dated(template, self.day) if self.prints_date else template

    def chat(self, text: str, *, system: str = "", history: History = ()) -> list[int]:
        """Return the ids of a prompt; see `render`."""
        return self.chats([(text, system, history)])[0]

    def chats(self, prompts: list[tuple[str, str, History]]) -> list[list[int]]:
        """Return the ids of many prompts, each a tuple (text, system, history); see `prompt_ids`."""
        return self.prompt_ids(
            [self.render(text, system=s, history=earlier) for text, s, earlier in prompts]
        )

    def prompt_ids(self, rendered: list[str]) -> list[list[int]]:
        """Return the ids of rendered prompts; fast tokenizers use every core.

        A chat template writes its special tokens itself; a plain prompt gets those that the tokenizer
        adds to a text (a beginning token, for Llama), and the beginning token that add_bos_token in
        tokenizer_config.json requires.
        """
        plain = not self.has_template
        with self._one:
            ids = self.hf(rendered, add_special_tokens=plain)["input_ids"] if rendered else []
        if self.adds_beginning:
            ids = [row if row[:1] == [self._begin] else [self._begin, *row] for row in ids]
        return ids

    @functools.cached_property
    def _turn(self) -> tuple[str, str, str]:
        """The template's text after a user turn: the generation prompt; before a reply; after a reply."""
        question, reply = "9876543210", "0123456789"
        prompt_end = self.render(question).rpartition(question)[2]
        before, _, after = (
            self.render(question, reply=reply).rpartition(question)[2].rpartition(reply)
        )
        return prompt_end, before, after

    @property
    def reply_space(self) -> str:
        """White space between the prompt and a reply in a closed conversation (Llama 2 has one)."""
        prompt_end, before, _ = self._turn
        space = before.removeprefix(prompt_end) if before.startswith(prompt_end) else ""
        return space if space.isspace() else ""

    @property
    def unopened_turn(self) -> str:
        """The text that opens the model's turn in a conversation and that the generation prompt lacks.

        "" for a template with a generation prompt, and for one whose turns need no opening.
        """
        if not self.has_template:
            return ""
        prompt_end, before, _ = self._turn
        alone = self._apply([{"role": "user", "content": "?"}], generation_prompt=False)
        missing = before.removeprefix(prompt_end).strip()
        return missing if before.startswith(prompt_end) and alone.endswith("?" + prompt_end) else ""

    def end_of_turn(self) -> int | None:
        """Return the special token with which the chat template closes the model's turn, if it does."""
        if not self.has_template:
            return None
        after = self._turn[2]
        special = set(self.hf.get_added_vocab().values())
        return next((i for i in self.encode(after) if i in special), None)

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text, without special tokens."""
        with self._one:
            return self.hf.encode(text, add_special_tokens=False)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of many texts, each as `encode` does."""
        with self._one:
            return self.hf(texts, add_special_tokens=False)["input_ids"] if texts else []

    def encode_text(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of many texts; what looks like a special token is text, too."""
        if not texts:
            return []
        with self._one:
            return self.hf(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        """Return the text of the ids; special tokens are omitted unless `special`."""
        # An array, because transformers checks every id of a list, which takes longer than decoding.
        with self._one:
            return self.hf.decode(np.asarray(ids, np.int64), skip_special_tokens=not special)

    def vocabulary(self) -> dict[str, int]:
        """Return token string -> id, added tokens included."""
        return self.hf.get_vocab()

    def added(self) -> set[int]:
        """Return the ids of the tokens added to the trained vocabulary: special and other added tokens."""
        return set(self.hf.get_added_vocab().values())


@functools.lru_cache(maxsize=16)
def _dated(template: str, day: datetime.date) -> str:
    """Prefix a template with a `strftime_now` that formats the day, at 00:00:00, in its directives."""
    # It must be a macro, because transformers passes no functions to a template.
    directives = sorted(set(_DIRECTIVE.findall(template)))
    pairs = [("%%", _PERCENT), *((d, day.strftime(d)) for d in directives), (_PERCENT, "%")]
    filled = "".join(
        f"{{% set format = format|replace({json.dumps(old)}, {json.dumps(new)}) %}}"
        for old, new in pairs
        if old != new
    )
    return f"{{% macro strftime_now(format) %}}{filled}{{{{ format }}}}{{% endmacro %}}\n{template}"


def _adds_beginning(path: str) -> bool:
    """Return whether tokenizer_config.json has add_bos_token, which transformers does not read."""
    try:
        fields = json.loads((pathlib.Path(path) / "tokenizer_config.json").read_bytes())
        return bool(fields.get("add_bos_token"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _require_plain_merges(path: str) -> None:
    """Refuse merges whose second part loses a prefix when they are joined.

    tokenizers 0.23 cuts the prefix off in bytes; inside a character this ends the process (SIGABRT). No
    model of the supported families has such a prefix.
    """
    try:
        model = json.loads((pathlib.Path(path) / "tokenizer.json").read_bytes())["model"]
        prefix = model.get("continuing_subword_prefix")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # the library reports this error
    if prefix:
        raise ModelError(
            f"{path}/tokenizer.json: model.continuing_subword_prefix={prefix!r:.40}, wanted none; copy "
            "the tokenizer again, or use a model without this prefix"
        )


def _template(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"chat template {path!r} cannot be read ({error}); give the path of a Jinja file"
        ) from None
