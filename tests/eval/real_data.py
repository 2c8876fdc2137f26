"""The benchmark files that some tests read: never part of the project, so those tests may be skipped."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(
    os.environ.get("OPD_JAX_DATA", pathlib.Path(__file__).parents[3] / "shared" / "data")
)
FILES = {
    "aime24": ROOT / "aime24/thunlp_opd_AIME24_test.json",
    "aime25": ROOT / "aime25/thunlp_opd_AIME25_test.json",
    "amc": ROOT / "amc/prime_aimo_validation_amc_83.jsonl",
    "math500": ROOT / "math500/simplerl_math500_test.jsonl",
    "minerva": ROOT / "minerva/qwen25math_minerva_math_test.jsonl",
    "olympiad": ROOT / "olympiadbench/qwen25math_olympiadbench_test.jsonl",
    "gsm8k": ROOT / "gsm8k/gsm8k_test.jsonl",
}
LUFFY = ROOT / "luffy_eval/luffy_valid.all.parquet"
TRAINING = {
    "gsm8k_train": ROOT / "gsm8k/gsm8k_train.jsonl",
    "dapo": ROOT / "dapo_math_17k/dapo-math-17k-processed.parquet",
    "deepmath": ROOT / "deepmath/DeepMath_deduped.parquet",
    "aops": ROOT / "numina_aops/rllm_aime_train.json",
}
needs_data = pytest.mark.skipif(not ROOT.is_dir(), reason=f"{ROOT} is not there (OPD_JAX_DATA)")
