"""The rooms and their layers: an import points down, and the shift by one has two homes."""

import ast
import pathlib
import re

import opd_jax

ROOT = pathlib.Path(opd_jax.__file__).parent
LAYER = {
    "aliases": 0, "host_memory": 0,
    "signals": 0, "whole": 0, "copies": 2, "intact": 2, "numerics": 6, "resume": 7, "failures": 8,
    "errors": 0, "programs": 0, "keys": 0, "types": 0, "display": 0, "clock": 0,
    "eval.boxed": 0, "eval.statistics": 0, "eval.protocol": 0, "supports": 1,
    "placement": 1, "mesh": 2, "processes": 1, "profiling": 0, "trace": 1,
    "shapes": 1, "batching": 1, "repetition": 1, "right_wrong": 1, "eval.answer": 1,
    "eval.answer_file": 1, "eval.number_rules": 2, "eval.list_rules": 3, "eval.relation_rules": 4,
    "eval.equivalence": 5, "eval.grading_worker": 6,
    "guard": 2, "unused": 3, "losses": 2, "models": 2, "data": 2, "checkpoint": 3, "eval.grade": 2,
    "eval.benchmarks": 3, "config": 3, "metrics": 3, "scoring": 3, "rollout": 3,
    "objectives": 4, "rules": 4, "workdir": 4, "fitting": 4, "cli": 4, "eval.evaluate": 4,
    "eval.results": 4, "best": 4, "comparison": 5,
    "data.decontaminate": 4, "data.prepare_config": 4, "data.judge": 5, "data.prepare": 6,
    "living": 5, "report": 6, "devices": 1, "account": 3, "plan": 6, "plan.real": 7, "plan.verify": 8,
    "rows": 5, "update": 5, "setup": 5, "sample_file": 5,
    "sample": 6, "ahead": 6, "export": 6, "loading": 6, "collect": 6, "stepping": 7, "held_out": 8,
    "train": 9, "probe": 7, "eval.model": 7, "bench": 8, "eval.runner": 8, "profile": 10,
}  # fmt: skip


def room(module: str) -> str:
    """`opd_jax.models.hf` -> `models`; files that LAYER names are rooms of their own."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if ".".join(parts[:2]) in LAYER else parts[0]


def imported_rooms(file: pathlib.Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("opd_jax"):
            if node.module == "opd_jax":
                rooms |= {alias.name for alias in node.names}
            elif node.module == "opd_jax.eval":  # its files are rooms of their own
                rooms |= {f"eval.{alias.name}" for alias in node.names}
            else:
                rooms.add(room(node.module))
    return rooms


def test_imports_point_down():
    seen = set()
    for file in sorted(ROOT.rglob("*.py")):
        module = "opd_jax." + ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if file.name == "__init__.py":
            continue
        mine = room(module)
        seen.add(mine)
        for other in imported_rooms(file) - {mine, "__version__"}:
            assert LAYER[other] < LAYER[mine], f"{module} imports {other}, which is not below it"
    assert seen == set(LAYER)  # every room has a layer, every layer a room


def test_only_scoring_and_sampling_shift():
    shift = re.compile(r"\[:, 1:|\[:, :-1\]|jnp\.roll\(")
    shifting = {f.name for f in ROOT.rglob("*.py") if shift.search(f.read_text())}
    assert shifting == {"scoring.py"}
