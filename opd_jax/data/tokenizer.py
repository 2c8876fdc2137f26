"""The tokenizer of a model folder: transformers' own, its chat template, and its end tokens."""

import os
import pathlib
from typing import Any

os.environ.setdefault(
    "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
)  # that torch is not here is intended

from transformers import AutoTokenizer

from opd_jax.errors import ModelError


class Tokenizer:
    """Text to ids and back for one model folder. Nothing is fetched, no code of the folder runs."""

    def __init__(self, path: str):
        if not (pathlib.Path(path) / "tokenizer.json").is_file():
            raise ModelError(
                f"{path}/tokenizer.json is missing; copy the tokenizer files into the model folder"
            )
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the tokenizers library raises bare Exception
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(
                f"{path}: cannot read the tokenizer ({reason}); copy it again"
            ) from None
        self.path = path
        self.size = len(self.hf)

    def chat(self, problem: str, *, template: str = "{problem}", system: str = "") -> list[int]:
        """Ids of a prompt: `template` with the problem filled in, through the chat template.

        Without a chat template the text is encoded as it is (a base model).
        """
        text = template.replace("{problem}", problem)
        if not self.hf.chat_template:
            return self.encode((system + "\n" if system else "") + text)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        try:  # in transformers' sandbox; the template is a program from the model folder
            rendered = self.hf.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja's own, and whatever a template raises
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{self.path}: its chat template cannot render a {messages[0]['role']} turn "
                f"({reason}); correct chat_template"
            ) from None
        return self.encode(rendered)

    def encode(self, text: str) -> list[int]:
        """Ids of the text as it stands, no special tokens added."""
        return self.hf.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self.hf.decode(ids, skip_special_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        """Token string -> id, added tokens included."""
        return self.hf.get_vocab()
