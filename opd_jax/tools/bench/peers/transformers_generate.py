"""Generation with transformers on torch: sampling at temperature 1 over the full vocabulary.

python opd_jax/tools/bench/peers/transformers_generate.py --model=FOLDER --batch=8 --prompt=64 --new=128
"""

from typing import Any

from timing import measure, prompts, read_case, report


def main() -> None:
    """Time `generate` with an exact number of tokens."""
    case = read_case("transformers generate")
    import torch
    import transformers

    torch.manual_seed(case.seed)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    model.eval()
    ids = torch.tensor(prompts(case))

    @torch.inference_mode()
    def step() -> None:
        rows = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=case.new,
            max_new_tokens=case.new,
        )
        assert rows.shape == (case.batch, case.prompt + case.new), rows.shape

    report(
        case,
        measure(step, case),
        tokens=case.batch * case.new,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
