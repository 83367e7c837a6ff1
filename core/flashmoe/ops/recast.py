"""Replace modules of a loaded model by subclasses that compute the same thing faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn


def recast(
    model: nn.Module, choose: Callable[[str, nn.Module], type[nn.Module] | None]
) -> list[nn.Module]:
    """Replace the modules inside `model` for which `choose` returns another class.

    The new module has the parameters, children and attributes of the old one, unevaluated arrays
    included, under the same names; its `__init__` is not called. Children are replaced first.

    Args:
        choose: gets the path of a module ("layers.0.mlp") and the module; returns the class of the
            new module, a subclass of the old one's, or None to leave it.

    Returns:
        The new modules.
    """
    made: list[nn.Module] = []

    def replaced(path: str, value: Any) -> Any:
        if isinstance(value, nn.Module):
            inside(path, value)
            kind = choose(path, value)
            if kind is None:
                return value
            made.append(_with_class(value, kind))
            return made[-1]
        if isinstance(value, list):
            items = [replaced(f"{path}.{i}", item) for i, item in enumerate(value)]
            changed = any(a is not b for a, b in zip(items, value, strict=True))
            return items if changed else value
        return value

    def inside(path: str, module: nn.Module) -> None:
        for name, value in list(module.items()):
            module[name] = replaced(f"{path}.{name}" if path else name, value)

    inside("", model)
    return made


def _with_class(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    new = kind.__new__(kind)
    # A module of MLX is a dict of its arrays and children; other attributes are plain ones.
    dict.update(new, module)
    vars(new).update(vars(module))
    return new
