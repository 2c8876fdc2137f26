"""Mutations of JSON trees and of bytes, drawn from a seeded generator; see fuzz.py."""

import copy
import json
import math
import random
from typing import Any

DEPTH = 20  # nodes of a JSON tree below this depth are not changed
WEIRD = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, -0.0, 0.5, 1e308, math.nan, math.inf, "",
    " ", "a", "\0", "../../../etc/passwd", "/etc/passwd", "C:\\x", "\ud800", "é" * 50, "9" * 5000,
    "{" * 200, [], {}, [[]], [None], [1, "a", {}], {"": ""}, {"a": {"b": {"c": []}}}, "cos.system('x')\np0\n",
    "{{ ''.__class__.__mro__ }}", "{% for i in range(9**9) %}x{% endfor %}", "__import__('os')",
)  # fmt: skip


def weird(draw: random.Random) -> Any:
    """Return a value of an unexpected type or size, sometimes a deeply nested list."""
    if draw.random() < 0.03:
        value: Any = []
        for _ in range(draw.choice([50, 900])):
            value = [value]
        return value
    return copy.deepcopy(draw.choice(WEIRD))


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths of all nodes of a JSON tree except its root, down to `DEPTH`."""
    if len(path) > DEPTH:
        return []
    found: list[tuple] = []
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for name, value in items:
        found += [(*path, name), *places(value, (*path, name))]
    return found


def mutated_tree(draw: random.Random, tree: Any) -> Any:
    """Return a copy of a JSON tree with a few nodes replaced, removed or duplicated."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        paths = places(tree)
        if not paths:
            return weird(draw)
        *parents, last = draw.choice(paths)
        node = tree
        for name in parents:
            node = node[name]
        how = draw.random()
        if how < 0.6:
            node[last] = weird(draw)
        elif how < 0.8:
            del node[last]
        elif isinstance(node, dict):
            node[draw.choice(["", "x", "__metadata__", str(last) + "2"])] = node[last]
        else:
            node.append(node[last])
    return weird(draw) if draw.random() < 0.02 else tree


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    """Return `content` with bytes changed, removed, inserted or repeated."""
    out = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        if not out:
            break
        at, how = draw.randrange(len(out)), draw.randrange(6)
        size = min(draw.choice([1, 4, 64, 4096]), len(out) - at)
        if how == 0:
            out[at] = draw.randrange(256)
        elif how == 1:
            del out[at:]
        elif how == 2:
            del out[at : at + size]
        elif how == 3:
            out[at:at] = out[at : at + size] * draw.choice([1, 50])
        elif how == 4:
            out[at:at] = draw.randbytes(size)
        else:
            out[at : at + size] = draw.choice([b"\0", b"\xff", b'"', b"9", b"["]) * size
    return bytes(out)


def dumped(draw: random.Random, tree: Any) -> bytes:
    """Return a tree as JSON, with or without ASCII escapes; brackets where it is nested too deeply."""
    try:
        text = json.dumps(tree, ensure_ascii=draw.random() < 0.5)
    except RecursionError:
        text = "[" * 5000
    return text.encode("utf-8", "surrogatepass")


def mutated_json(draw: random.Random, tree: Any) -> bytes:
    """Return a mutated tree as text, or a tree as mutated text."""
    if draw.random() < 0.7:
        return dumped(draw, mutated_tree(draw, tree))
    return mutated_bytes(draw, json.dumps(tree).encode())
