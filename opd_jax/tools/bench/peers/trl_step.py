"""A complete on-policy distillation step of TRL: rollout, teacher, loss, update.

python opd_jax/tools/bench/peers/trl_step.py --model=FOLDER --batch=8 --prompt=64 --new=64

The loss is the reverse KL over the full vocabulary (TRL's default, beta=1). Every rollout is on-policy, in
float32, without gradient checkpointing (TRL's default is with, which is slower).
"""

import itertools
import logging
import tempfile
import time
from typing import Any

from timing import SHARPER, prompts, read_case, report


def main() -> None:
    """Train for the warm-ups and repeats, and time every step of TRL's trainer."""
    case = read_case("TRL distillation step", teacher="", learning_rate=1e-6, beta=1.0)
    import datasets
    import torch
    import transformers
    import trl

    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    rows = prompts(case)

    class PromptTokenizer(transformers.PreTrainedTokenizerFast):
        """A tokenizer whose texts are indices of prompts that are tokenized already."""

        def __call__(self, text: Any = None, **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [rows[int(number)] for number in text]}

    class Clock(transformers.TrainerCallback):
        """The times at which training began and each step ended."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.generated = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    def load(path: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    clock = Clock()
    teacher = load(case.teacher or case.model)
    teacher.model.norm.weight.data.mul_(SHARPER)
    steps = case.warmups + case.repeats
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DistillationTrainer(
            model=load(case.model),
            teacher_model=teacher,
            args=trl.DistillationConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=case.batch,
                max_completion_length=case.new,
                generation_kwargs={"min_new_tokens": case.new},
                beta=case.beta,
                temperature=1.0,
                learning_rate=case.learning_rate,
                lr_scheduler_type="constant",
                max_steps=steps,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                shuffle_dataset=False,
                seed=case.seed,
            ),
            train_dataset=datasets.Dataset.from_dict(
                {"prompt": [str(i) for i in range(case.batch)] * steps}
            ),
            processing_class=PromptTokenizer.from_pretrained(case.model),
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        generate = trainer._generate_single_turn

        def counted(*arguments: Any, **more: Any) -> Any:
            completions = generate(*arguments, **more)
            assert [len(ids) for ids in completions] == [case.new] * case.batch
            clock.generated += sum(map(len, completions))
            return completions

        trainer._generate_single_turn = counted
        trainer.train()
    assert clock.generated == steps * case.batch * case.new, clock.generated
    seconds = [after - before for before, after in itertools.pairwise(clock.times)]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    report(
        case,
        (seconds[: case.warmups], seconds[case.warmups :]),
        tokens=case.batch * case.new,
        losses=losses,
        versions={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
