"""The config of prepare_data: the table of its fields, and the rules between them."""

# fmt: off
from ml_collections import ConfigDict

from opd_jax.config.record import Choices, Field, Range, Section
from opd_jax.config.schema import check
from opd_jax.config.trees import Tree
from opd_jax.errors import ConfigError

BENCHMARKS = ("aime24", "aime25", "amc", "math500", "minerva", "olympiad", "gsm8k")


def _columns(of: str) -> tuple[Field, ...]:
    return tuple(
        Field(f"columns.{name}", "", None, f"Column of the {name} in {of}, a dotted path into a row; empty = "
              "found by the names that people use (docs/data.md).")
        for name in ("problem", "solution", "answer", "id")
    )


SECTIONS = (
    Section("", "The run as a whole.", (
        Field("seed", 0, Range(0), "Seed of the split into SFT and OPD."),
        Field("block", 5000, Range(1), "Rows that are worked on, and saved, at one time."),
    )),
    Section("data", "The raw problems.", (
        Field("train", "", None, "Files, comma-separated or with * in their names."),
        *_columns("these files"),
        Field("bad_rows", "skip", Choices("opd_jax.data.dataset:BAD_ROWS"),
              "What is done about a row that cannot be read: skip the row and count it, or refuse the file."),
    )),
    Section("filter", "Rows that are dropped.", (
        Field("solution", True, None, "Whether rows without a solution are dropped."),
        Field("answer", True, None, "Whether rows without an answer are dropped."),
        Field("grade", False, None, "Whether math-verify grades solutions for which no column "
              "correctness_math_verify vouches."),
        Field("tokenizer", "", None, "Model folder whose tokenizer counts; empty = length is not checked."),
        Field("max_tokens", 8192, Range(1), "Longest solution, in tokens."),
        Field("duplicates", False, None, "Whether problems that occur twice stay."),
    )),
    Section("decontaminate", "Problems of benchmarks that are taken out.", (
        *(Field(f"benchmarks.{name}", "", None, f"File of {name}; empty = left out.") for name in BENCHMARKS),
        *_columns("the benchmark files"),
        Field("ngram", 13, Range(0), "Words of an n-gram; 0 = off (GPT-3 used 13, 2005.14165, app. C)."),
        Field("ngram_share", 0.5, Range(above=0, high=1),
              "Share of a benchmark problem's n-grams from which on a row is dropped (Tulu 3, "
              "2411.15124: 50 %)."),
        Field("embedding_model", "", None, "Folder for sentence-transformers; empty = off."),
        Field("embedding_cosine", 0.6, Range(-1, 1), "Cosine from which on a row is dropped."),
    )),
    Section("split", "The two files that are written.", (
        Field("sft", 0, Range(0), "Rows for supervised fine-tuning; 0 = all that OPD does not take."),
        Field("opd", 0, Range(0), "Rows for OPD; 0 = all that SFT does not take."),
        Field("opd_share", 13 / 46, Range(0, 1), "Share for OPD where both are 0 (2604.08527: 13k of 46k)."),
    )),
)
# fmt: on
TREE = Tree("launch/prepare_data.py", SECTIONS, maker="opd_jax.tools.prepare_data.config.default()")
_OWN = "decontaminate.benchmarks."  # the user may name others


def default() -> ConfigDict:
    """The tree with every default."""
    return TREE.default()


def validate(config: ConfigDict) -> None:
    """Refuse unknown fields and impossible values, before a file is opened.

    Raises ConfigError with one line: the field, what it is, what is wanted, the option that fixes it.
    """
    named = config.get("decontaminate", {}).get("benchmarks", {})
    others = tuple(Field(name, "", None, "") for name in named if _OWN + name not in TREE.fields)
    check(config, TREE, Tree(TREE.program, (*SECTIONS, Section(_OWN.rstrip("."), "", others))))
    if not config.data.train:
        raise ConfigError(
            "data.train='', wanted the file to prepare; set --config.data.train=FILE.jsonl"
        )
    if config.filter.grade and not (config.filter.answer and config.filter.solution):
        raise ConfigError(
            "filter.grade=True needs solutions and answers to compare; "
            "set --config.filter.answer=True --config.filter.solution=True"
        )
