"""Scoring, a full update, and only the matrix products of both, with torch.

python opd_jax/tools/bench/peers/torch_train.py --what=WHAT --model=FOLDER --batch=8 --prompt=256

WHAT is score, update, products_forward or products_update.

The rows have `batch` x `prompt` tokens; every token except the first is predicted. `--teacher` is the second
model of scoring (default: the same folder).
"""

from typing import Any

from timing import measure, prompts, read_case, report


def main() -> None:
    """Time one of the four workloads, and report numbers that check the result."""
    case = read_case(
        "torch forward, update, products",
        what="score",
        teacher="",
        attention="sdpa",  # attn_implementation of transformers: sdpa | eager
        logprob="cross_entropy",  # or logsumexp: logit of the token - logsumexp
        adamw="fused",  # or foreach
        rows=0,  # rows per forward pass of scoring; 0 = all
        learning_rate=1e-6,
    )
    import torch
    import transformers

    torch.manual_seed(case.seed)
    step, check = {
        "score": _score,
        "update": _update,
        "products_forward": _products,
        "products_update": _products,
    }[case.what](case, torch, transformers)
    report(
        case,
        measure(step, case),
        tokens=case.batch * case.prompt,
        check=check,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        threads=torch.get_num_threads(),
    )


def _load(case: Any, path: str, torch: Any, transformers: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=case.attention
    )


def _logprob(case: Any, torch: Any, logits: Any, tokens: Any) -> Any:
    """Return log p of tokens [N] under logits [N, V]."""
    if case.logprob == "cross_entropy":
        return -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    return chosen - torch.logsumexp(logits, dim=-1)


def _predict(case: Any, torch: Any, model: Any, ids: Any) -> Any:
    """Return log p of every token except the first, flattened."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1]))
    return _logprob(case, torch, logits, ids[:, 1:].reshape(-1))


def _score(case: Any, torch: Any, transformers: Any) -> tuple:
    """Compute log-probs of each token under a student and a teacher."""
    paths = case.model, case.teacher or case.model
    pair = [_load(case, path, torch, transformers).eval() for path in paths]
    ids = torch.tensor(prompts(case))

    @torch.inference_mode()
    def step() -> list:
        return [
            torch.cat(
                [_predict(case, torch, model, part) for part in ids.split(case.rows or len(ids))]
            )
            for model in pair
        ]

    student, teacher = step()
    return step, {"student": student.mean().item(), "teacher": teacher.mean().item()}


def _update(case: Any, torch: Any, transformers: Any) -> tuple:
    """Forward, mean negative log-prob, backward, clipping, AdamW."""
    model = _load(case, case.model, torch, transformers).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=case.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        **{case.adamw: True},
    )
    ids = torch.tensor(prompts(case))

    def step() -> tuple[float, float]:
        loss = -_predict(case, torch, model, ids).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    loss, norm = step()
    return step, {"loss": loss, "grad_norm": norm}


def _products(case: Any, torch: Any, transformers: Any) -> tuple:
    """Run only the matrix products of a forward pass, or also the two per product of the backward pass."""
    config = transformers.AutoConfig.from_pretrained(case.model)
    width, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    size, inner = config.head_dim, config.intermediate_size
    backward = case.what == "products_update"

    def weight(rows: int, columns: int) -> Any:
        return (torch.randn(rows, columns) * columns**-0.5).requires_grad_(backward)

    layers = [
        [
            weight(heads * size, width), weight(kv * size, width), weight(kv * size, width),
            weight(width, heads * size), weight(inner, width), weight(inner, width),
            weight(width, inner),
        ]
        for _ in range(config.num_hidden_layers)
    ]  # fmt: skip
    head = weight(config.vocab_size, width)
    x = torch.randn(case.batch, case.prompt, width)
    gradient = torch.randn(case.batch, case.prompt, config.vocab_size) if backward else None
    weights = [w for layer in layers for w in layer] + [head]
    linear = torch.nn.functional.linear

    def split(y: Any, count: int) -> Any:
        return y.view(case.batch, case.prompt, count, size).transpose(1, 2)

    def forward() -> Any:
        y = x
        for q, k, v, o, gate, up, down in layers:
            query = split(linear(y, q), heads).reshape(case.batch, kv, -1, size)
            keys, values = split(linear(y, k), kv), split(linear(y, v), kv)
            mixed = (query @ keys.transpose(-1, -2)) @ values
            mixed = mixed.reshape(case.batch, heads, case.prompt, size).transpose(1, 2)
            y = linear(mixed.reshape(case.batch, case.prompt, -1), o)
            y = linear(linear(y, gate) + linear(y, up), down)
        return linear(y, head)

    def step() -> None:
        if not backward:
            with torch.inference_mode():
                forward()
            return
        forward().backward(gradient)
        for w in weights:
            w.grad = None

    return step, {}


if __name__ == "__main__":
    main()
