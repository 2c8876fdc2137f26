"""A model folder with the tokenizer of another family, for runs whose student and teacher share no ids.

    python -m tests.support.transplant MODEL QWEN_TIKTOKEN OUT

MODEL is a folder with tied embeddings, for example SmolLM2-135M; QWEN_TIKTOKEN is Qwen's list of ordinary
tokens (the package `dashscope` holds a copy). All weights are the model's own, but each row of the
embedding is that of the model's token with the same text. Where the model needs several tokens, it is
their mean times `SEVERAL`: the rows are output weights too, and the mean alone would make 100,000 rare
tokens likely.
"""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

from opd_jax.data.spelling import Spelling
from opd_jax.data.tokenizer import Tokenizer
from tests.support.qwen_tokenizer import save_tokenizer

EMBEDDING = "model.embed_tokens.weight"
SEVERAL = 0.1


def embedding(rows_VD: np.ndarray, source: Spelling, target: Spelling) -> np.ndarray:
    """Return a row for each token of `target`, from those of its text in `source`."""
    ids = [i for i, piece in enumerate(target.pieces) if piece is not None]
    texts = source.encode([target.pieces[i] or b"" for i in ids])
    out_VD = np.tile(rows_VD.mean(axis=0), (len(target.pieces), 1))
    for i, found in zip(ids, texts, strict=True):
        if found:
            out_VD[i] = rows_VD[found].mean(axis=0) * (SEVERAL if len(found) > 1 else 1.0)
    for text, i in target.added.items():
        if text in source.added:
            out_VD[i] = rows_VD[source.added[text]]
    return out_VD.astype(rows_VD.dtype)


def main(model: str, tiktoken: str, out: str) -> None:
    """Write the folder."""
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(pathlib.Path(tiktoken), folder)
    target, source = Spelling(Tokenizer(out)), Spelling(Tokenizer(model))
    weights = load_file(f"{model}/model.safetensors")
    weights[EMBEDDING] = embedding(weights[EMBEDDING], source, target)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((pathlib.Path(model) / "config.json").read_text())
    end = target.added["<|im_end|>"]
    fields |= {"vocab_size": len(target.pieces), "eos_token_id": end, "bos_token_id": None}
    fields["pad_token_id"] = end
    (folder / "config.json").write_text(json.dumps(fields, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    print(
        f"{out}: {len(target.pieces):,} ids, {weights[EMBEDDING].size:,} numbers of the embedding"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
