r"""The rules that guard math-verify, on hand-labelled pairs: false positives and negatives by kind.

    pytest -s tests/grading/test_equivalence.py

prints every pair of answer_pairs.tsv with the bare and the guarded verdict, and their errors by kind.
"""

import pathlib
import time

import pytest

from opd_jax import config, workdir
from opd_jax.errors import WorkdirError
from opd_jax.grading import Grade, Grader, equivalence, worker
from opd_jax.grading.extract import Found
from opd_jax.grading.list_rules import bracket, named, sequence
from opd_jax.grading.number_rules import colons, exact, numeral
from opd_jax.grading.relation_rules import ranges, sides

PAIRS: dict[str, list[tuple[str, str, str]]] = {}
for _line in (pathlib.Path(__file__).parent / "answer_pairs.tsv").read_text().splitlines():
    if not _line.startswith("#"):
        _kind, *_pair = _line.split("\t")
        PAIRS.setdefault(_kind, []).append(tuple(_pair))
# Pairs that the guarded grader gets wrong: (answer, gold).
KNOWN = {
    ("2x=6", "x=3"),  # math-verify compares 3 with an equation
    (r"0.333\ldots", r"\frac{1}{3}"),  # no rule reads recurring decimals
}


def verdict(answer, gold, grader):
    try:
        return worker.compare(Found(answer), gold, "plain", grader)
    except Exception:  # as in the grading process
        return "UNPARSED"


def errors(kind, verdicts):
    """(false positives, false negatives) of verdicts on the pairs of a kind."""
    wanted = [want for _, _, want in PAIRS[kind]]
    both = list(zip(wanted, verdicts, strict=True))
    return (sum(want == "WRONG" and grade == "CORRECT" for want, grade in both),
            sum(want == "CORRECT" and grade != "CORRECT" for want, grade in both))  # fmt: skip


def test_the_pairs_are_many_and_of_every_kind():
    assert sum(map(len, PAIRS.values())) >= 200
    assert all(len(pairs) >= 10 for pairs in PAIRS.values())
    for pairs in PAIRS.values():
        assert {want for _, _, want in pairs} == {"CORRECT", "WRONG"}
        assert len({pair[:2] for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("kind", PAIRS)
def test_hand_labelled_pairs(kind):
    bare, guarded = [
        [verdict(answer, gold, grader) for answer, gold, _ in PAIRS[kind]]
        for grader in ("math_verify", "guarded")
    ]
    print(f"\n{kind}: wanted, math-verify, guarded")
    for (answer, gold, want), one, other in zip(PAIRS[kind], bare, guarded, strict=True):
        print(f"  {want:9}{one:9}{other:9}{answer}  against  {gold}")
    found = {name: errors(kind, grades) for name, grades in (("bare", bare), ("guarded", guarded))}
    print(f"{kind}, {len(bare)} pairs: (false positives, false negatives) {found}")
    assert found["guarded"][0] == 0
    assert found["guarded"][1] <= found["bare"][1]
    missed = {
        (answer, gold)
        for (answer, gold, want), grade in zip(PAIRS[kind], guarded, strict=True)
        if (grade == "CORRECT") != (want == "CORRECT")
    }
    assert missed == KNOWN & {pair[:2] for pair in PAIRS[kind]}


@pytest.mark.slow
def test_the_switch_gives_the_bare_verdict():
    pairs = [(rf"\boxed{{{answer}}}", gold) for answer, gold in [
        (r"\text{073}", "073"), ("52_9", "52_8"), ("1e5", "100000"), (r"\frac12", "0.5"), ("7", "007"),
    ]]  # fmt: skip
    correct, wrong, *_ = Grade
    with Grader(workers=1) as grader:
        assert grader.grade(pairs) == [correct, wrong, correct, correct, correct]
    with Grader(workers=1, verdict="math_verify") as grader:
        assert grader.grade(pairs) == [wrong, correct, wrong, correct, correct]


def test_a_run_does_not_change_its_grader(tmp_path):
    """Rewards depend on it; the other fields of evaluations may change."""
    started = config.default()
    (tmp_path / "config.json").write_text(config.to_json(started))
    started.eval.samples = 3
    assert workdir.check(tmp_path, started) == []
    started.grading.grader = "math_verify"
    with pytest.raises(WorkdirError, match=r"grading\.grader: 'guarded' there, 'math_verify' now"):
        workdir.check(tmp_path, started)
    assert len(workdir.check(tmp_path, started, accept=True)) == 1


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("7", ["numbers"]), (r"\frac{14}{3}", ["numbers"]), (r"\text{073}", ["fonts", "numbers"]),
        ("2.5e-05", ["exponents", "numbers"]), ("52_9", ["bases"]), ("10:30", ["ratios"]),
        (r"1,2,\ldots,9", ["ellipses"]), ("x<3", ["inequalities"]), ("x=3, y=4", ["names"]),
        (r"\{1,2\}", ["brackets"]), ("(3,4)", ["inequalities", "brackets"]), ("x=5", ["equations"]),
        (r"\sqrt{2}", []), ("x^2-1", []), (r"\text{Evelyn}", []), ("f(x)", []),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", []),
    ],
)  # fmt: skip
def test_which_rules_read_a_gold_answer(text, rules):
    assert equivalence.touched(text) == rules


def test_what_the_rules_read():
    assert exact("1,000") == 1000
    assert exact("100, 200") is None
    assert exact("1e-07") == exact("10^{-7}") != exact("0")
    assert numeral("a_{12}") is None
    assert numeral(r"2143 \text{ base } 5") == numeral("2143_{5}")
    assert colons("10:30").time
    assert not colons("7:15").time
    assert not colons("18:24").time
    assert colons("3:05").clock
    assert not colons("10:30").clock
    assert colons(r"f:A\to B") is None
    assert sequence("1,2") is None
    assert sequence(r"0.142857\ldots") is None
    assert sequence(r"0.5,\ldots") == ["0.5", "…"]
    assert named("x=3") is named("AB=3") is named("f(x)=3") is named("f(1)=f(2)") is None
    assert named("f(1)=3") == [("f(1)", "3")]
    assert named(r"\text{side length}=3,\;\mathrm{AB}=4") == [("sidelength", "3"), ("AB", "4")]
    assert numeral("52_{b}") == numeral("52_b") != numeral("52_{c}")
    assert named("(x,y)=(3,4)") == named(r"x=3,\;y=4") == [("x", "3"), ("y", "4")]
    assert bracket("(7)") is None
    assert sides("x=3,y=4") is None
    assert ranges("x+y<3") is None
    assert ranges(r"0<\ln x<1") is None
    assert ranges(r"0<\theta_1<1").name == r"\theta_1"
    assert ranges("x>2").pieces == ranges(r"(2,\infty)").pieces != ranges(r"[2,\infty)").pieces


def test_the_rules_take_little_time_on_hostile_texts():
    parts = ["1", "1,", "e1", "1e5", "_2", ":1", "(", "{", r"\text{1", r"\ldots", "x<", "x=1,", "= ",
             "1 ", r"\{", r"\frac{1}{2}", r"\cup", "-", "base", "or "]  # fmt: skip
    start = time.process_time()
    for part in parts:
        equivalence.readable(part * (20_000 // len(part)))
        text = part * (1_000 // len(part))
        equivalence.decide(text, text + "1", lambda answer, gold: False)
        equivalence.touched(text)
    assert time.process_time() - start < 20
