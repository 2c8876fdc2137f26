"""Benchmark problems in training problems: what each method finds, and what it leaves alone."""

import json
import sys
import types

import numpy as np
import pytest

from opd_jax.errors import ConfigError, DataError
from opd_jax.tools.prepare_data import decontaminate
from opd_jax.tools.prepare_data.decontaminate import BenchmarkProblem, Benchmarks, Match

LONG = "Find the number of ways to place seven rooks on a chess board of eight rows and columns."
SHORT = "What is the value of $2 + 2 \\cdot 3$?"  # 15 letters and digits, 8 words


def benchmarks(*prompts: str, **changes: object) -> Benchmarks:
    problems = [BenchmarkProblem("b", str(i), i + 1, p) for i, p in enumerate(prompts)]
    return Benchmarks(problems, **changes)


def test_exact_ignores_signs_and_surroundings():
    index = benchmarks(LONG, ngram=0)
    spelt = LONG.replace(" ", "  ").replace("seven", "$\\textbf{}$ Seven,") + " Think step by step."
    # the command's name is text too: only signs are left out
    other = LONG.replace("seven", "\\textbf{seven}")
    found = index.find([LONG, LONG.upper(), "Solve: " + LONG, spelt, other, LONG[:-10], ""])
    assert found[:3] == [[Match(0, "exact", 1.0)]] * 3
    assert found[3:] == [[], [], [], []]


def test_exact_compares_160_characters_and_needs_31():
    same = "x" * 160
    index = benchmarks(same + "a", "y" * 30, "z" * 31, ngram=0)
    found = index.find([same + "b", same[:-1] + "b", "y" * 30, "y" * 99, "z" * 31, "z" * 30])
    assert [[match.problem for match in row] for row in found] == [[0], [], [], [], [2], []]
    assert index.unchecked("b") == {"exact": 1}


def test_texts_that_begin_alike_are_told_apart():
    index = benchmarks(LONG, LONG.replace("eight rows", "nine rows"), LONG[:40], ngram=0)
    assert [m.problem for m in index.find([LONG])[0]] == [0, 2]
    assert [m.problem for m in index.find([LONG.replace("eight", "nine")])[0]] == [1, 2]


def test_ngram_share_by_hand():
    words = [f"w{i}" for i in range(16)]  # 16 words: four 13-grams
    index = benchmarks(" ".join(words), ngram_share=0.5)
    cut = ["x " + " ".join(words[:n]) + " y" for n in (16, 15, 14, 13, 12)]
    shares = [[m.score for m in row if m.method == "ngram"] for row in index.find(cut)]
    assert shares == [[1.0], [0.75], [0.5], [], []]
    assert benchmarks(" ".join(words), ngram=0).find(cut)[1] == []


def test_ngrams_find_another_spelling():
    spelt = LONG.replace("the number of", "the NUMBER of").replace("Find", "Determine")
    (found,) = benchmarks(LONG).find([spelt])
    assert [m.method for m in found] == ["ngram"]
    assert found[0].score == pytest.approx(
        5 / 6, abs=1e-4
    )  # 18 words, 6 n-grams, one holds the first word


def test_repeated_ngrams_count_once():
    index = benchmarks("a " * 40 + "b c", ngram=3)  # n-grams: aaa, aab, abc
    (row,) = index.find(["a a a a a a"])
    assert [m.score for m in row] == []
    (row,) = benchmarks("a " * 40 + "b c", ngram=3, ngram_share=0.3).find(["a a a a a a"])
    assert [m.score for m in row] == [pytest.approx(1 / 3, abs=1e-4)]


def test_short_problems_are_counted_as_unchecked():
    index = benchmarks(LONG, SHORT)
    assert index.find([SHORT]) == [[]]
    assert index.unchecked("b") == {"exact": 1, "ngram": 1}
    assert index.methods == ("exact", "ngram")
    assert benchmarks(LONG, ngram=0).methods == ("exact",)


def angles(texts) -> np.ndarray:
    """An encoder for tests: a text is its angle in degrees."""
    radians = np.deg2rad([float(text) for text in texts])
    return np.stack([np.cos(radians), np.sin(radians)], axis=1) * 7  # not of unit length


def test_embeddings_match_from_the_cosine_on():
    index = benchmarks("0", "90", encoder=angles, ngram=0)
    assert index.methods == ("exact", "embedding")
    found = index.find(["0", "53", "54", "180", "45"])  # cos 53 = 0.602, cos 54 = 0.588
    assert [[m.problem for m in row] for row in found] == [[0], [0, 1], [1], [], [0, 1]]
    assert found[1][0] == Match(0, "embedding", 0.6018)
    assert index.find([]) == []


def test_without_benchmarks_nothing_is_found():
    assert benchmarks().find([LONG, ""]) == [[], []]


def test_benchmark_files(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text('{"question": "q", "id": 7}\n\n{"question": "r"}\n')
    assert decontaminate.read_benchmarks({"b": str(path)}) == [
        BenchmarkProblem("b", "7", 1, "q"), BenchmarkProblem("b", "b-3", 3, "r"),
    ]  # fmt: skip
    path.write_text('{"question": "q"}\n{"text": "r"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: no problem .*decontaminate\.columns"):
        decontaminate.read_benchmarks({"b": str(path)})
    path.write_text('{"question": "q"}\n{')
    with pytest.raises(DataError, match=r"b\.jsonl, line 2, column 2: not JSON"):
        decontaminate.read_benchmarks({"b": str(path)})


@pytest.mark.parametrize(
    "beside",
    [
        {"choices": ["1", "2"]}, {"context": "A board is given."}, {"images": [{"bytes": "x"}]},
        {"history": [["1+1?", "2"]]}, {"images": ["x"], "options": ["1", "2"], "passage": "So."},
    ],
)  # fmt: skip
def test_a_benchmark_question_is_found_without_what_stands_beside_it(tmp_path, beside):
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({"question": LONG} | beside) + "\n")
    index = Benchmarks(decontaminate.read_benchmarks({"b": str(path)}))
    both = [Match(0, "exact", 1.0), Match(0, "ngram", 1.0)]
    assert index.find([LONG, f"1+1?\n2\n{LONG}\n\nA. 1", SHORT]) == [both, both, []]
    assert index.unchecked("b") == {"exact": 0, "ngram": 0}


def test_a_short_benchmark_question_is_found_with_what_stands_beside_it(tmp_path):
    path = tmp_path / "b.jsonl"
    rows = [{"question": SHORT, "context": LONG}, {"question": SHORT, "history": [[LONG, "8"]]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = Benchmarks(decontaminate.read_benchmarks({"b": str(path)}), ngram=0)
    found = index.find([f"{LONG} {SHORT}", f"{LONG}\n8\n{SHORT}", SHORT, LONG])
    assert [[match.problem for match in row] for row in found] == [[0], [1], [], []]
    assert index.unchecked("b") == {"exact": 0}


def test_an_encoder_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"embedding_model='/nowhere' is not a folder"):
        decontaminate.load_encoder("/nowhere")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match="pip install sentence-transformers") as error:
        decontaminate.load_encoder(str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_encoder_that_loads_or_fails(tmp_path, monkeypatch):
    class Model:
        def __init__(self, path):
            if "broken" in path:
                raise OSError("no config\nfound")

        def encode(self, texts, show_progress_bar):
            return [[1.0, len(text)] for text in texts]

    package = types.SimpleNamespace(SentenceTransformer=Model)
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    encoder = decontaminate.load_encoder(str(tmp_path))
    np.testing.assert_array_equal(encoder(("a", "bcd")), [[1, 1], [1, 3]])
    (tmp_path / "broken").mkdir()
    with pytest.raises(DataError, match=r"cannot be loaded \(no config\)"):
        decontaminate.load_encoder(str(tmp_path / "broken"))
