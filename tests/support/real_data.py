"""The benchmark files that some tests read: never part of the project, so those tests may be skipped."""

import os
import pathlib

import pytest

FOLDER = pathlib.Path(
    os.environ.get("OPD_JAX_DATA", pathlib.Path(__file__).parents[3] / "shared" / "data")
)
FILES = {
    "aime24": FOLDER / "aime24/thunlp_opd_AIME24_test.json",
    "aime25": FOLDER / "aime25/thunlp_opd_AIME25_test.json",
    "amc": FOLDER / "amc/prime_aimo_validation_amc_83.jsonl",
    "math500": FOLDER / "math500/simplerl_math500_test.jsonl",
    "minerva": FOLDER / "minerva/qwen25math_minerva_math_test.jsonl",
    "olympiad": FOLDER / "olympiadbench/qwen25math_olympiadbench_test.jsonl",
    "gsm8k": FOLDER / "gsm8k/gsm8k_test.jsonl",
}
LUFFY = FOLDER / "luffy_eval/luffy_valid.all.parquet"
TRAINING = {
    "gsm8k_train": FOLDER / "gsm8k/gsm8k_train.jsonl",
    "dapo": FOLDER / "dapo_math_17k/dapo-math-17k-processed.parquet",
    "deepmath": FOLDER / "deepmath/DeepMath_deduped.parquet",
    "aops": FOLDER / "numina_aops/rllm_aime_train.json",
}
needs_data = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is not there (OPD_JAX_DATA)")


def absent() -> list[str]:
    """Names of the benchmark and training files that are not in FOLDER."""
    files = FILES | TRAINING | {"luffy": LUFFY}
    return [name for name, file in files.items() if not file.is_file()]
