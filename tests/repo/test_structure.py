"""Check the layers of the code: packages import only packages below them, and no imports circle."""

from pathlib import Path

import structure

ROOT = Path(__file__).parents[2]

#: From top to bottom. A package may import those below its line, not those on or above it.
LAYERS = """
llm_flashmoe langchain_flashmoe
flashmoe
flashmoe.cli
flashmoe.server flashmoe.sweep flashmoe.doctor
flashmoe.engine
flashmoe.generation
flashmoe.plan flashmoe.quantize flashmoe.cluster
flashmoe.models
flashmoe.ops.cpu flashmoe.ops.gpu
flashmoe.ops.reference
flashmoe.ops
flashmoe.streaming flashmoe.grammar flashmoe.catalog
flashmoe.chat flashmoe.hub flashmoe.memory
flashmoe.checkpoint
flashmoe.options flashmoe.user_dirs
flashmoe.files
flashmoe.bounded flashmoe.locks flashmoe.private_dirs flashmoe.process_limits flashmoe.system_errors
flashmoe.sizes flashmoe.requests flashmoe.terminal
flashmoe.errors
flashmoe.events flashmoe.macos flashmoe.shutdown flashmoe_metal
"""

#: `flashmoe` itself imports its public names when they are first used, for type checkers.
FACE = "flashmoe"


def layers() -> dict[str, int]:
    rows = [line.split() for line in LAYERS.strip().splitlines()]
    return {name: depth for depth, row in enumerate(rows) for name in row}


def test_packages_import_only_lower_layers():
    depth = layers()
    graph = structure.package_graph(structure.imports(ROOT), structure.modules(ROOT))
    assert set(graph) == set(depth), "each package has its line in LAYERS"
    upward = [
        f"{package} imports {target}"
        for package, targets in graph.items()
        for target in targets
        if package != FACE and depth[target] <= depth[package]
    ]
    assert not upward


def test_modules_do_not_import_each_other_in_circles():
    graph = structure.imports(ROOT)
    del graph[FACE]
    assert structure.cycles(graph) == []


def test_cycles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert structure.cycles(graph) == [["b", "c"]]
