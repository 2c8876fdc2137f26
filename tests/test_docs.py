"""README and docs: their commands, links, paths and the Python example are right.

Of every command the launcher is there, its flags are known, and its config is accepted.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from absl import flags
from ml_collections import config_flags

from opd_jax.config.validate import validate, validate_evaluation, validate_sampling
from tests.support.lanes import slow
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The changelog names files as they were.
CURRENT = [page for page in PAGES if page.name != "changelog.md"]
# Files of the repository, as docs and docstrings name them.
REPOSITORY_PATH = re.compile(
    r"(?<![\w/.-])(?:opd_jax|tests|configs|launch|docs)/[\w./-]*\w\.(?:py|md|json|jsonl|tsv|txt|png)\b"
)
# What stands for something of the reader's own.
PLACEHOLDER = re.compile(
    r"\.\.\.|\b(FILE|FOLDER|NAME|RECIPE|PROTOCOL|FIELD|SEED|ACTION|N|16N|64N)\b"
)
CHECKS = {"evaluate": validate_evaluation, "prepare_data": None, "sample": validate_sampling}


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, launcher, arguments) of each command, as it is written."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for match in re.finditer(r"launch/(\w+)\.py([^\S\n][^`\n]*)?", text):
            command = re.split(r"\s{2,}| \| | && |; | & |  #", match[2] or "")[0]
            plain = command.replace("[", " ").replace("]", " ")
            if "--" in plain:
                found.append((page.name, match[1], shlex.split(plain)))
    return found


COMMANDS = commands()
IDS = [f"{page} {launcher} {i}" for i, (page, launcher, _) in enumerate(COMMANDS)]


@functools.cache
def defined(launcher: str) -> dict[str, str]:
    """Flags of a launcher, by name; that of `config` with the file it stands for without one."""
    names = {}
    for node in ast.walk(ast.parse((ROOT / f"launch/{launcher}.py").read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr.startswith("DEFINE_"):
            (name,) = node.args[:1]
            if isinstance(name, ast.Constant):
                names[name.value] = ""
            else:  # launch/bench.py has one of each peer
                names |= {f"{peer}_python": "" for peer in ("trl", "tunix")}
        elif node.func.attr == "define_config":
            names |= {"config": node.args[0].value, "fields": ""}
        elif node.func.attr == "define_flags":  # of opd_jax/tools/sweep.py
            names |= dict.fromkeys(("out", "seeds", "steps", "only"), "")
        elif node.func.attr == "define_processes":
            names |= dict.fromkeys(("coordinator", "num_processes", "process_id"), "")
    return names


def test_there_are_commands():
    assert len(COMMANDS) > 80
    assert {"train", "evaluate", "plan", "profile", "report", "probe"} <= {c[1] for c in COMMANDS}


@pytest.mark.parametrize(("page", "launcher", "arguments"), COMMANDS, ids=IDS)
def test_launcher_and_flags_are_there(page, launcher, arguments):
    known = defined(launcher)
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].partition(".")[0]
            assert name in known or name in {f"no{flag}" for flag in known}, argument


@pytest.mark.parametrize(
    "launcher", ["train", *slow(*sorted({launcher for _, launcher, _ in COMMANDS} - {"train"}))]
)
def test_every_launcher_starts_and_says_what_it_takes(launcher):
    done = subprocess.run(
        [sys.executable, f"launch/{launcher}.py", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "flags:" in done.stdout, done.stderr
    for name in defined(launcher):
        assert re.search(rf"^ +--(\[no\])?{name}\b", done.stdout, re.MULTILINE), name


@pytest.mark.parametrize(("page", "launcher", "arguments"), COMMANDS, ids=IDS)
def test_the_config_is_accepted(page, launcher, arguments, monkeypatch):
    given = [a for a in arguments if a.startswith("--config")]
    default = defined(launcher).get("config")
    if not default or any(PLACEHOLDER.search(a) for a in given):
        return  # a synopsis: its flags are looked at above
    monkeypatch.chdir(ROOT)
    if not any(a.startswith("--config=") for a in given):
        given.insert(0, f"--config={default}")
    monkeypatch.setattr("sys.argv", ["command", *given])  # where overrides are looked for
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", default, flag_values=values)
    values(["command", *given])
    config = values.config.copy_and_resolve_references()
    check = CHECKS.get(launcher, validate)
    if check is not None:
        if not config.data.get("train", "a benchmark's file"):
            config.data.train = "tiny:train"  # the reader's own file
        check(config)


@pytest.mark.parametrize("page", CURRENT, ids=[page.name for page in CURRENT])
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, heading = target.partition("#")
        linked = (page.parent / file) if file else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, target


@pytest.mark.parametrize("page", CURRENT, ids=[page.name for page in CURRENT])
def test_paths_and_modules_exist(page):
    text = page.read_text(encoding="utf-8")
    folders = re.findall(r"`((?:opd_jax|tests|configs|launch|docs)/[\w/]*)`", text)
    for path in [*REPOSITORY_PATH.findall(text), *folders]:
        if not PLACEHOLDER.search(path):
            assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ((?:opd_jax|tests)[\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for name in re.findall(r"`([\w]+\.md)`|(?<![\w/(\[])([a-z_]+\.md)\b(?!\))", text):
        assert (page.parent / (name[0] or name[1])).exists(), name


def test_pages_that_the_code_names_exist():
    files = [
        file
        for folder in ("opd_jax", "configs", "launch", "tests")
        for file in sorted((ROOT / folder).rglob("*.py"))
    ]
    named = {
        (file.relative_to(ROOT).as_posix(), page)
        for file in files
        for page in re.findall(r"\bdocs/[\w/]+\.md", file.read_text(encoding="utf-8"))
    }
    assert len(named) > 30
    assert not [(file, page) for file, page in sorted(named) if not (ROOT / page).exists()]


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]
    assert not [page for page in pages if page != "README.md" and f"]({page})" not in index]


def test_the_table_of_changes_names_many():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| `opd_jax/[\w/]+\.py`", text, re.MULTILINE)
    assert len(rows) >= 30


def test_readme_fits_its_reader():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 160


def test_the_python_example_of_the_readme_runs(monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    value = float(capsys.readouterr().out.partition(":")[2])
    assert 0.0 < value < 1.0  # nats a token; the quick start's first step has 0.12
    gap_BT = names["rolled"].sampler_logprob_BT - names["student_logprob_BT"]
    assert abs(gap_BT[names["rolled"].response_mask_BT]).max() < 1e-4


def test_readme_has_two_commands():
    """Each block is one line to copy, and .ci/run takes the one behind its mark."""
    text = PAGES[0].read_text(encoding="utf-8")
    first, second = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert text.index(first) < 1000
    for block in (first, second):
        assert block.count("\n") == 1
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install -q ")
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    extract = re.search(r"^command=\$\((.*)\)$", script, re.MULTILINE)[1]
    done = subprocess.run(
        ["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == second


def test_extras_are_named_as_their_packages_name_them():
    """pip warns of another spelling, and leaves the extra out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    named = re.findall(r"'([\w-]+)\[([\w-]+)\]", str(lists))
    assert named
    for package, extra in named:
        assert extra in importlib.metadata.metadata(package).get_all("Provides-Extra")
