"""Print the structure of the code: packages from top to bottom, the imports between them, cycles.

    python tools/structure.py [CHECKOUT]

A node is a package or a top-level module; `flashmoe.ops.cpu`, `.gpu` and `.reference` count as
packages. Every import counts: late ones inside functions, and those under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

SOURCES = ("core/flashmoe", "metal/flashmoe_metal", "llm_flashmoe", "langchain_flashmoe")

Graph = Mapping[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Return the dotted name of each module below the source directories, and its file."""
    names = {}
    for source in SOURCES:
        top = root / source
        for file in sorted(top.rglob("*.py")):
            parts = (top.name, *file.relative_to(top).with_suffix("").parts)
            names[".".join(parts).removesuffix(".__init__")] = file
    return names


def imports(root: Path) -> dict[str, set[str]]:
    """Return the modules that each module imports, of those in the source directories."""
    files = modules(root)
    return {
        name: {m for m in _imported(name, file, files) if m != name} for name, file in files.items()
    }


def _imported(name: str, file: Path, files: Mapping[str, Path]) -> Iterable[str]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(parts if node.level else []) or node.module or ""
            if node.level and node.module:
                base = f"{base}.{node.module}"
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            while target and target not in files:
                target = target.rpartition(".")[0]
            if target:
                yield target


def package_of(module: str, packages: set[str]) -> str:
    """Return the package that a module is in; a top-level module is a node of its own."""
    while module not in packages and "." in module:
        parent = module.rpartition(".")[0]
        if parent in packages and "." not in parent and parent == "flashmoe":
            return module
        module = parent
    return module


def package_graph(graph: Graph, files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Return the same imports between packages and top-level modules."""
    packages = {name for name, file in files.items() if file.name == "__init__.py"}
    result: dict[str, set[str]] = {}
    for module, targets in graph.items():
        here = package_of(module, packages)
        names = {package_of(target, packages) for target in targets}
        result.setdefault(here, set()).update(names - {here})
    return result


def cycles(graph: Graph) -> list[list[str]]:
    """Return the groups of nodes that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == node:
                    break
            if len(group) > 1:
                groups.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return groups


def levels(graph: Graph) -> list[list[str]]:
    """Return the nodes from top to bottom: each imports only nodes of later lists."""
    depth: dict[str, int] = {}

    def below(node: str) -> int:
        if node not in depth:
            depth[node] = 0  # a cycle ends here
            depth[node] = 1 + max((below(t) for t in graph.get(node, ())), default=0)
        return depth[node]

    for node in graph:
        below(node)
    rows: dict[int, list[str]] = {}
    for node, d in depth.items():
        rows.setdefault(d, []).append(node)
    return [sorted(rows[d]) for d in sorted(rows, reverse=True)]


def main(root: Path) -> None:
    files = modules(root)
    graph = imports(root)
    packages = package_graph(graph, files)
    lines = sum(len(file.read_text().splitlines()) for file in files.values())
    flat = sum(file.parent == root / SOURCES[0] for file in files.values())
    for row in levels(packages):
        for node in row:
            print(f"{node:32} -> {', '.join(sorted(packages[node])) or '-'}")
        print()
    print(f"{len(files)} modules, {lines:,} lines; {flat} modules directly in {SOURCES[0]}")
    print(f"{len(packages)} packages and top-level modules on {len(levels(packages))} levels")
    print(f"{sum(map(len, packages.values()))} imports between them")
    print(f"cycles of modules: {cycles(graph) or 0}; of packages: {cycles(packages) or 0}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
