"""Every command of README and docs: its launcher is there, its flags are known, its config is accepted."""

import ast
import functools
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from absl import flags
from ml_collections import config_flags

from opd_jax.config import validate
from opd_jax.config.validate import validate_evaluation, validate_sampling
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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


@pytest.mark.parametrize("launcher", sorted({launcher for _, launcher, _ in COMMANDS}))
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


def test_readme_begins_with_two_commands():
    """Each block is one line to copy, and .ci/run takes the second out of it."""
    text = PAGES[0].read_text(encoding="utf-8")
    first, second = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[:2]
    assert text.index(first) < 500
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
