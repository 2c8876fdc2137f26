"""Small cases of two tokenizers, and what GOLD of TRL 1.16 computes for them.

    python3.12 -m venv TRL && TRL/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.23.0
    TRL/bin/python -m tests.support.trl_gold          writes trl_gold.json (needs no JAX)

Each model has logits before every token of one text; TRL's loss gets them behind a prompt of one token.
"""

import dataclasses
import json
import pathlib
import types
from collections.abc import Sequence

import numpy as np

FILE = pathlib.Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Model:
    """Token texts, and the tokens of the response. `seed`: of the logits; None: sure of every token."""

    vocabulary: Sequence[str]
    tokens: Sequence[int]
    seed: int | None

    def logits(self) -> np.ndarray:
        """float64 [T, V], before each of the tokens."""
        if self.seed is None:
            return 40.0 * np.eye(len(self.vocabulary))[list(self.tokens)]
        place, token = np.mgrid[: len(self.tokens), : len(self.vocabulary)]
        return 2.0 * np.sin(1.0 + 7.0 * self.seed + 3.0 * place + 5.0 * token + place * token)


@dataclasses.dataclass(frozen=True)
class Case:
    """One text as two models write it."""

    student: Model
    teacher: Model


STUDENT, TEACHER = ("ab", "cd", "d", "e", "x"), ("abc", "d", "cd", "e")
CASES = {
    "spans of one": Case(Model(STUDENT, (3, 2, 3), 0), Model(TEACHER, (3, 1, 3), 1)),
    "longer spans": Case(Model(STUDENT, (3, 0, 1, 3), 2), Model(TEACHER, (3, 0, 1, 3), 3)),
    "one against two": Case(
        Model(STUDENT, (1, 3, 0, 1), 4), Model((*TEACHER, "abcd"), (2, 3, 4), 5)
    ),
    "sure of one text": Case(Model(STUDENT, (0, 1), None), Model(TEACHER, (0, 1), None)),
}


def shared(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Ids of student and teacher of one text, by the teacher's."""
    texts = list(case.student.vocabulary)
    pairs = [(texts.index(t), i) for i, t in enumerate(case.teacher.vocabulary) if t in texts]
    mine, theirs = np.array(pairs, np.int32).T
    return mine, theirs


def stored() -> dict[str, dict[str, float]]:
    """What TRL has computed for each case."""
    return json.loads(FILE.read_text())


def main() -> None:
    """Compute and store TRL's numbers: all ids sorted, hybrid, and all sorted by its default, `observed`."""
    out = {
        name: {
            "sorted": _trl(case, "bayesian", hybrid=False),
            "matched": _trl(case, "bayesian", hybrid=True),
            "observed": _trl(case, "observed", hybrid=False),
        }
        for name, case in CASES.items()
    }
    FILE.write_text(json.dumps(out, indent=1) + "\n")


def _trl(case: Case, merge: str, *, hybrid: bool) -> float:
    """TRL's distillation loss of one row: a prompt token, the response, and nothing behind it."""
    import torch
    from trl.experimental.gold.gold_trainer import ULDLoss

    numbers = types.SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.0,
        uld_teacher_temperature=1.0, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
        use_extended_uld=True, uld_token_merge_strategy=merge, uld_use_hybrid_loss=hybrid,
        uld_hybrid_matched_weight=None, uld_hybrid_unmatched_weight=None, beta=0.5,
    )  # fmt: skip
    pair = case.student, case.teacher
    tokenizers = [
        types.SimpleNamespace(get_vocab=lambda m=model: {t: i for i, t in enumerate(m.vocabulary)})
        for model in pair
    ]
    loss = ULDLoss(numbers, *tokenizers)
    logits, labels, ids, offsets = [], [], [], []
    for model in pair:
        behind = np.zeros((1, len(model.vocabulary)))  # after the last token, which nothing follows
        logits.append(torch.tensor(np.concatenate([model.logits(), behind])[None]))
        ids.append(torch.tensor([[0, *model.tokens]]))
        labels.append(torch.tensor([[-100, *model.tokens]]))
        ends = np.cumsum([0, *(len(model.vocabulary[i]) for i in model.tokens)])
        offsets.append(torch.tensor([[[0, 0], *np.stack([ends[:-1], ends[1:]], 1).tolist()]]))
    return float(loss(*logits, *labels, *ids, *offsets))


if __name__ == "__main__":
    main()
