"""What a person sees."""

from opd_jax.workdir import console


def row(seconds: float) -> dict[str, float]:
    return {"time/step_s": seconds, "score/reverse_kl": 0.25, "rollout/truncation_rate": 0.5}


def test_time_left_forgets_the_compilation(capsys):
    progress = console.Progress(steps=100, first=0)
    progress.step(1, row(30.0))
    assert "left" not in capsys.readouterr().out
    for step in (2, 3, 100):
        progress.step(step, row(2.0))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "step 100/100  2.00 s/step  0:00:00 left  reverse KL 0.250  truncated 50%"


def test_plain_lines_are_sparse(capsys):
    progress = console.Progress(steps=1000, first=0)
    for step in range(1, 50):
        progress.step(step, row(0.1))
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_table_by_hand():
    one = {"accuracy": 0.5, "stderr": 0.035, "truncation_rate": 0.0, "repetition_rate": 0.01,
           "length_mean": 61.25}  # fmt: skip
    head, line = console.table({"student after": one}).splitlines()
    assert head.split() == ["accuracy", "TruncRate", "RepRate", "mean", "length"]
    assert line.split() == ["student", "after", "50.0%", "±", "3.5%", "0.0%", "1.0%", "61.2"]


def test_columns_are_aligned():
    rows = [("a", "bb", "c"), ("long", "b", "10")]
    assert console.aligned(rows) == ["a     bb   c", "long   b  10"]
    assert console.aligned(rows, left=(0, 1)) == ["a     bb   c", "long  b   10"]
    assert console.aligned([("a", "")], left=(1,)) == ["a"]
