"""Packages and their layers: an import points down, and the shift by one has two homes."""

import ast
import re

from tests.support.paths import PACKAGE

LAYER = {
    "aot": 0, "errors": 0, "host_memory": 0, "rng": 0, "types": 0,
    "hardware": 1, "shapes": 1,
    "grading": 1, "losses": 2, "metrics": 2, "sharding": 2, "data": 2,
    "models": 3,
    "scoring": 4,
    "rollout": 5,
    "config": 6,
    "workdir": 7,
    "training": 8,
    "checkpoint": 9, "cli": 9,
    "evaluation": 10, "memory_plan": 10,
    "report": 11,
    "train_loop": 12,
    "train": 13,
    "tools": 14,
}  # fmt: skip


def imported(file):
    """The packages and root modules of opd_jax that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "opd_jax":
                yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


def test_imports_point_down():
    seen, wrong = set(), []
    for file in sorted(PACKAGE.rglob("*.py")):
        home = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if home == "__init__":
            continue
        seen.add(home)
        wrong += [
            f"{file.relative_to(PACKAGE)} imports {other}"
            for other in imported(file)
            if other not in (home, "__version__") and LAYER[other] >= LAYER[home]
        ]
    assert not wrong, "\n".join(wrong)
    assert seen == set(LAYER)


def test_few_places_at_the_root():
    modules = [f for f in PACKAGE.glob("*.py") if f.name != "__init__.py"]
    packages = [f for f in PACKAGE.iterdir() if (f / "__init__.py").exists()]
    assert len(modules) <= 10
    assert len(packages) <= 16


def test_only_scoring_and_sampling_shift():
    shift = re.compile(r"\[:, 1:|\[:, :-1\]|jnp\.roll\(|index_C - 1")
    files = [f for f in PACKAGE.rglob("*.py") if "tools" not in f.parts]
    shifting = {f.name for f in files if shift.search(f.read_text())}
    assert shifting == {"chunked.py", "rope.py"}  # rope.py rolls the features of a token


def test_private_parts_of_jax_are_imported_with_a_fallback():
    """`jax._src` may change in any version: an import of it stands inside `try`, in a function."""
    homes = []
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        guarded = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.Try) and node.handlers
            for statement in node.body
            for inner in ast.walk(statement)
        }
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(re.match(r"jax\._src|jaxlib", name) for name in names):
                homes.append(file.name)
                assert id(node) in guarded, f"{file}:{node.lineno}"
    assert homes == ["multihost.py", "h200.py"]  # a new one needs a test of its fallback
