"""Know mlx-lm's model types, and where a config.json has the sizes of each. MLX is not imported.

mlx-lm's own files say which types have routed experts and which values absent fields have: they are
read as text, so that a type that mlx-lm adds is known without a line here.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .json_files import is_file

#: The size of flashmoe -> the names that the config.json of some model type has for it.
ALIASES: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    "hidden_size": ("hidden_size", "model_dim", "n_embd", "d_model"),
    "vocab_size": ("vocab_size", "num_vocab"),
    "num_attention_heads": ("num_attention_heads", "num_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads", "num_attention_groups", "num_kv_heads"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "top_k_experts",
        "moe_top_k",
        "moe_topk",
        "moe_k",
    ),
    "max_position_embeddings": (
        "max_position_embeddings",
        "model_max_length",
        "n_positions",
        "seq_length",
    ),
}

_MODEL = re.compile(r"^class Model(Args)?\b|\bimport .*\bModel\b", re.MULTILINE)
_SWITCH = re.compile(r"\bSwitch(GLU|MLP)\b")
_IMPORT = re.compile(r"^from \.(\w*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)
_OTHER_TOWERS = re.compile("Vision|Audio|Image")


@cache
def moe_types() -> tuple[str, ...]:
    """Return mlx-lm's model types that may have routed experts, sorted."""
    names = (file.stem for file in (_package() / "models").glob("*.py"))
    return tuple(sorted(n for n in names if _has_experts(n) and _source(n) is not None))


def resolve(config: dict[str, Any]) -> str | None:
    """Return the name of mlx-lm's file for a config.json, None where it has none with experts.

    A type that mlx-lm runs by the code of another one, such as minimax_m2, has the name of that.
    """
    name, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(name, str):
        return None
    by_type, by_architecture = _remapping()
    for architecture in architectures if isinstance(architectures, list) else [architectures]:
        if isinstance(architecture, str) and (name, architecture) in by_architecture:
            name = by_architecture[name, architecture]
            break
    else:
        name = by_type.get(name, name)
    return name if _has_experts(name) else None


def text_part(model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that describe the language model, those of text_config before others."""
    inner = config.get("text_config")
    if isinstance(inner, dict) and "text_config" in (_source(model_type) or ""):
        return {**config, **inner}
    return dict(config)


@cache
def defaults(model_type: str) -> dict[str, Any]:
    """Return the values that mlx-lm's classes of arguments give to absent fields."""
    values: dict[str, Any] = {}
    for name in [*_imported(model_type), model_type]:
        for node in ast.walk(ast.parse(_source(name) or "")):
            if isinstance(node, ast.ClassDef) and not _OTHER_TOWERS.search(node.name):
                values |= _fields(node)
    return values


def _fields(node: ast.ClassDef) -> dict[str, Any]:
    return {
        entry.target.id: entry.value.value
        for entry in node.body
        if isinstance(entry, ast.AnnAssign)
        and isinstance(entry.target, ast.Name)
        and isinstance(entry.value, ast.Constant)
        and entry.value.value is not None
    }


@cache
def _source(name: str) -> str | None:
    """Return the text of mlx-lm's file of that name, None where there is none with a model."""
    file = _package() / "models" / f"{name}.py"
    if not re.fullmatch(r"\w{1,64}", name) or not is_file(file):
        return None
    text = file.read_text("utf-8")
    return text if _MODEL.search(text) else None


@cache
def _imported(name: str) -> tuple[str, ...]:
    """Return the models whose files a file imports."""
    names: list[str] = []
    # Not by `ast`, which would take two seconds for all files.
    for module, imported in _IMPORT.findall(_source(name) or ""):
        names += [module] if module else re.findall(r"\w+", imported)
    return tuple(n for n in names if _source(n) is not None and n != name)


@cache
def _has_experts(name: str) -> bool:
    if _SWITCH.search(_source(name) or ""):
        return True
    return any(_has_experts(n) for n in _imported(name))


@cache
def _remapping() -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """Return what mlx-lm has for types, and for types with architectures, that others run."""
    tables: dict[str, ast.expr] = {}
    for node in ast.parse((_package() / "utils.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(name := node.targets[0], ast.Name):
            tables[name.id] = node.value
    by_type, by_architecture = (
        ast.literal_eval(tables[name])
        for name in ("MODEL_REMAPPING", "MODEL_ARCHITECTURE_REMAPPING")
    )
    return by_type, by_architecture


@cache
def _package() -> Path:
    spec = find_spec("mlx_lm")
    assert spec is not None, "mlx-lm is a dependency"
    return Path(next(iter(spec.submodule_search_locations or ())))
