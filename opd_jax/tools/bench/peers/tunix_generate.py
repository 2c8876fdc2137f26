"""Generation with Tunix's sampler and its own Llama, with the same weights.

python opd_jax/tools/bench/peers/tunix_generate.py --model=FOLDER --batch=8 --prompt=64 --new=128
"""

import json
import pathlib
from typing import Any

from timing import measure, prompts, read_case, report


class PromptTokenizer:
    """A tokenizer whose texts are indices of prompts that are tokenized already."""

    def __init__(self, rows: list[list[int]]):
        self.rows = rows

    def encode(self, text: str) -> list[int]:
        """Return the token ids of the prompt with index `text`."""
        return self.rows[int(text)]

    def decode(self, ids: Any) -> str:
        """Return an empty text, because only the sampler is measured."""
        return ""

    def bos_id(self) -> int:
        """Return an id; the sampler does not prepend it to prompts."""
        return 0

    def eos_id(self) -> int:
        """Return an id that is no token."""
        return -1

    def pad_id(self) -> int:
        """Return an id that occurs in no prompt."""
        return 2


def main() -> None:
    """Time the sampler at temperature 1 over the full vocabulary, without end tokens."""
    case = read_case("Tunix sampler")
    import itertools

    import jax
    import jax.numpy as jnp
    import tunix
    from tunix.generate import sampler
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params

    hf = json.loads((pathlib.Path(case.model) / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=int(hf["rope_theta"]),
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
    )
    model = params.create_model_from_safe_tensors(case.model, config, dtype=jnp.float32)
    rows = prompts(case)
    engine = sampler.Sampler(
        model,
        PromptTokenizer(rows),
        sampler.CacheConfig(
            cache_size=case.prompt + case.new,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        ),
    )
    texts = [str(i) for i in range(case.batch)]
    count = itertools.count()

    def step() -> None:
        out = engine(
            texts,
            max_generation_steps=case.new,
            max_prompt_length=case.prompt,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=[-1],
            seed=next(count),
        )
        assert [len(row) for row in out.tokens] == [case.new] * case.batch

    report(
        case,
        measure(step, case),
        tokens=case.batch * case.new,
        versions={"jax": jax.__version__, "tunix": getattr(tunix, "__version__", "")},
        # Its Llama uses a RoPE base of 1,000,000 whatever the config: other tokens, but the same work.
        note="Tunix's Llama ignores rope_theta of the config",
    )


if __name__ == "__main__":
    main()
