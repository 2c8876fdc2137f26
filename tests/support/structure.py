"""Figures about the source tree: python -m tests.support.structure [FOLDER]  (default: this checkout).

Lines of code, modules at the root, layers of imports, repeated blocks, functions with many parameters.
"""

import ast
import pathlib
import sys
from collections import defaultdict
from collections.abc import Iterator

from tests.support.paths import ROOT

MANY = 8  # parameters
BLOCK = 10  # lines


def sources(root: pathlib.Path) -> list[pathlib.Path]:
    """The modules of the package."""
    return sorted((root / "opd_jax").rglob("*.py"))


def code_lines(file: pathlib.Path) -> int:
    """Lines that are neither blank nor a comment."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def imports(file: pathlib.Path, known: set[str]) -> Iterator[str]:
    """Modules of the package that a file imports when it is loaded."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opd_jax"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else str(node.module)


def layers(root: pathlib.Path) -> int:
    """The longest chain of imports between modules; packages' __init__ are left out."""
    modules = {
        ".".join(file.relative_to(root).with_suffix("").parts): file
        for file in sources(root)
        if file.name != "__init__.py"
    }
    below = {
        name: set(imports(file, set(modules))) & set(modules) for name, file in modules.items()
    }
    depth: dict[str, int] = {}

    def of(name: str, above: tuple[str, ...] = ()) -> int:
        if name not in depth:
            assert name not in above, f"a circle of imports: {' -> '.join([*above, name])}"
            depth[name] = 1 + max((of(one, (*above, name)) for one in below[name]), default=0)
        return depth[name]

    return max(map(of, modules))


def repeated_blocks(root: pathlib.Path) -> int:
    """Blocks of `BLOCK` lines with code that stand in two places, imports left out."""
    places = defaultdict(set)
    for file in sources(root):
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        code = [
            (i, line) for i, line in enumerate(lines) if len(line) > 3 and "import " not in line
        ]
        for start in range(len(code) - BLOCK + 1):
            block = tuple(line for _, line in code[start : start + BLOCK])
            places[block].add((file, code[start][0]))
    starts = {place for found in places.values() if len(found) > 1 for place in found}
    return sum((file, line - 1) not in starts for file, line in starts)


def long_signatures(root: pathlib.Path) -> list[str]:
    """Functions with more than `MANY` parameters, `self` not counted."""
    found = []
    for file in sources(root):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = sum(name.arg not in ("self", "cls") for name in names)
                if count > MANY:
                    found.append(f"{file.relative_to(root)}: {node.name} ({count})")
    return found


def main(root: pathlib.Path) -> None:
    """Print the figures."""
    package = root / "opd_jax"
    beside = package / "tools"
    tools = sum(code_lines(file) for file in sources(root) if beside in file.parents)
    whole = sum(map(code_lines, sources(root)))
    print(f"lines of code: {whole - tools} on the path from config to report, {tools} in tools/")
    print(f"modules at the root: {len(list(package.glob('*.py'))) - 1}")
    print(f"packages: {len(list(package.glob('*/__init__.py')))}")
    print(f"layers of modules: {layers(root)}")
    print(f"repeated blocks of {BLOCK} lines or more: {repeated_blocks(root)}")
    print(f"functions with more than {MANY} parameters:", *long_signatures(root), sep="\n  ")
    readme = (root / "README.md").read_text(encoding="utf-8")
    print(f"lines of README.md: {len(readme.splitlines())}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
