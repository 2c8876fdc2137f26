"""The real files: data/SOURCES.md has these figures, measured independently."""

import pytest

from tests.support.lanes import slow
from tests.support.prepared import config, done
from tests.support.real_data import FOLDER, needs_data

BENCHMARKS = {
    "aime24": "aime24/thunlp_opd_AIME24_test.json", "aime25": "aime25/thunlp_opd_AIME25_test.json",
    "amc": "amc/prime_aimo_validation_amc_83.jsonl", "gsm8k": "gsm8k/gsm8k_test.jsonl",
    "math500": "math500/simplerl_math500_test.jsonl",
    "minerva": "minerva/qwen25math_minerva_math_test.jsonl",
    "olympiad": "olympiadbench/qwen25math_olympiadbench_test.jsonl",
}  # fmt: skip


@needs_data
@pytest.mark.parametrize(
    ("name", "exact", "rows"),
    [
        ("numina_aops/rllm_aime_train.json", {"math500": 6}, {"math500": 6}),
        *slow(
            ("dapo_math_17k/dapo-math-17k-processed.parquet",
             {"amc": 29, "math500": 9, "olympiad": 39}, {"amc": 43, "math500": 11, "olympiad": 43}),
            ("gsm8k/gsm8k_train.jsonl", {}, {}),
            ("deepmath/DeepMath_deduped.parquet", {}, {}),
        ),
    ],
)  # fmt: skip
def test_real_overlaps(tmp_path, name, exact, rows):
    made = config(str(FOLDER / name), filter__solution=False)
    for benchmark, file in BENCHMARKS.items():
        made.decontaminate.benchmarks[benchmark] = str(FOLDER / file)
    found = done(tmp_path / "out", made)["contamination"]
    hits = {name: counts["found"]["exact"] for name, counts in found.items()}
    assert {name: h["problems"] for name, h in hits.items() if h["problems"]} == exact
    assert {name: h["rows"] for name, h in hits.items() if h["rows"]} == rows
