"""The config of prepare_data: its fields, and the constraints between them."""

# fmt: off
from ml_collections import ConfigDict

from opd_jax.config.record import Choices, Field, Range, Section
from opd_jax.config.schema import check
from opd_jax.config.trees import Tree
from opd_jax.errors import ConfigError

BENCHMARKS = ("aime24", "aime25", "amc", "math500", "minerva", "olympiad", "gsm8k")


def _columns(files: str) -> tuple[Field, ...]:
    return tuple(
        Field(f"columns.{name}", "", None, f"Column of the {name} in {files}, a dotted path into a row; "
              "empty = detected by its usual names (docs/data.md).")
        for name in ("problem", "solution", "answer", "id")
    )


SECTIONS = (
    Section("", "The complete run.", (
        Field("seed", 0, Range(0), "Seed of the split into SFT and OPD."),
        Field("block", 5000, Range(1), "Rows per block. A block is processed and saved as a unit."),
    )),
    Section("data", "The raw problems.", (
        Field("train", "", None, "Files, separated by commas; * in a name is a wildcard."),
        *_columns("these files"),
        Field("bad_rows", "skip", Choices("opd_jax.data.dataset:BAD_ROWS"),
              "What to do with a row that cannot be read: skip and count it, or stop with an error."),
    )),
    Section("filter", "Which rows are dropped.", (
        Field("solution", True, None, "Whether rows without a solution are dropped."),
        Field("answer", True, None, "Whether rows without an answer are dropped."),
        Field("grade", False, None, "Whether math-verify grades solutions that have no result "
              "in a column correctness_math_verify."),
        Field("tokenizer", "", None, "Model folder whose tokenizer counts tokens; empty = no length check."),
        Field("max_tokens", 8192, Range(1), "Maximum length of a solution in tokens."),
        Field("duplicates", False, None, "Whether duplicate problems are kept."),
    )),
    Section("decontaminate", "Removal of benchmark problems.", (
        *(Field(f"benchmarks.{name}", "", None, f"File of {name}; empty = not used.") for name in BENCHMARKS),
        *_columns("the benchmark files"),
        Field("ngram", 13, Range(0), "Words of an n-gram; 0 = off (GPT-3 used 13, 2005.14165, app. C)."),
        Field("ngram_share", 0.5, Range(above=0, high=1),
              "A row that has at least this fraction of a benchmark problem's n-grams is dropped "
              "(Tulu 3, 2411.15124: 50 %)."),
        Field("embedding_model", "", None, "Model folder for sentence-transformers; empty = off."),
        Field("embedding_cosine", 0.6, Range(-1, 1), "Minimum cosine similarity at which a row is dropped."),
    )),
    Section("split", "The split into sft.jsonl and opd.jsonl.", (
        Field("sft", 0, Range(0), "Rows for supervised fine-tuning; 0 = all rows that are not for OPD."),
        Field("opd", 0, Range(0), "Rows for OPD; 0 = all rows that are not for SFT."),
        Field("opd_share", 13 / 46, Range(0, 1), "Fraction for OPD if both are 0 (2604.08527: 13k of 46k)."),
    )),
)
# fmt: on
TREE = Tree("launch/prepare_data.py", SECTIONS, maker="opd_jax.tools.prepare_data.config.default()")
_PREFIX = "decontaminate.benchmarks."  # the user may add others


def default() -> ConfigDict:
    """Return the config with all defaults."""
    return TREE.default()


def validate(config: ConfigDict) -> None:
    """Check a config before any file is opened.

    Raises ConfigError for an unknown field or an invalid value, in one line: the field, its value, what is
    allowed, and the option to set.
    """
    named = config.get("decontaminate", {}).get("benchmarks", {})
    others = tuple(Field(name, "", None, "") for name in named if _PREFIX + name not in TREE.fields)
    check(config, TREE, Tree(TREE.program, (*SECTIONS, Section(_PREFIX.rstrip("."), "", others))))
    if not config.data.train:
        raise ConfigError(
            "data.train='' names no file to prepare; set --config.data.train=FILE.jsonl"
        )
    if config.filter.grade and not (config.filter.answer and config.filter.solution):
        raise ConfigError(
            "filter.grade=True needs solutions and answers to compare; "
            "set --config.filter.answer=True --config.filter.solution=True"
        )
