"""Check how config.json says that heads are rotated (RoPE), as mlx-lm reads it.

The ranges are in the table of `limits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_files import is_int, show
from .limits import check_number

BASE = (2, 1e15)
FACTOR = (1e-6, 1e6)
NUMBERS = {
    "factor": (1, 1e6),
    "low_freq_factor": FACTOR,
    "high_freq_factor": FACTOR,
    "beta_fast": FACTOR,
    "beta_slow": FACTOR,
    "mscale": (0, 1e6),
    "mscale_all_dim": (0, 1e6),
    "partial_rotary_factor": (1e-6, 1),
}
ORIGINAL = "original_max_position_embeddings"
_YARN = (("factor",), (ORIGINAL, "beta_fast", "beta_slow", "mscale", "mscale_all_dim"))
#: The types of rotation that mlx-lm has: the fields that each needs, and those that it may have.
TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor",), (ORIGINAL, "low_freq_factor", "high_freq_factor")),
    **dict.fromkeys(("yarn", "deepseek_yarn", "telechat3-yarn"), _YARN),
    "longrope": ((ORIGINAL, "short_factor", "long_factor"), ()),
    "proportional": ((), ("factor", "partial_rotary_factor")),
    "mrope": (("mrope_section",), ()),
}

_AGAIN = "download it again"


def check_rotation(model_type: str, text_config: Mapping[str, Any], where: Path) -> None:
    """Check the base of the rotation, how many values of a head it takes, and its scaling.

    Args:
        text_config: the part of config.json that describes the language model, its head_dim
            checked.
        where: the file, for errors.

    Raises:
        CheckpointError: names file, field and value.
    """
    field = "rope_scaling"
    base, share = text_config.get("rope_theta"), text_config.get("partial_rotary_factor")
    if model_type == "qwen3_moe":
        share = 1  # mlx-lm rotates whole heads
    elif model_type == "qwen3_5_moe":
        base = text_config.get("rope_theta", 100000)
        share = text_config.get("partial_rotary_factor", 0.25)
        given = text_config.get("rope_parameters", {"type": "default"})
        if given:
            field = "rope_parameters"
            _check_object(field, given, where)
            base = given.get("rope_theta", 100000)
            share = given.get("partial_rotary_factor", 0.25)
    check_number("rope_theta", base, BASE, where)
    check_number("partial_rotary_factor", share, NUMBERS["partial_rotary_factor"], where)
    head = text_config["head_dim"]
    rotated = int(head * share)
    if rotated < 2 or rotated % 2:
        raise CheckpointError(
            f"{where} has head_dim {head} and partial_rotary_factor {share}, so {rotated} values "
            f"of a head are rotated: an even number of them is needed; {_AGAIN}"
        )
    scaling = text_config.get(field)
    if scaling is not None:
        _check_object(field, scaling, where)
        _check_scaling(scaling, rotated, field, where)


def _check_object(field: str, value: object, where: Path) -> None:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} has {field} {show(value)}: an object or null is needed")


def _check_scaling(scaling: dict[str, Any], rotated: int, field: str, where: Path) -> None:
    # As mlx-lm picks it.
    kind = scaling.get("type") or scaling.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in TYPES:
        raise CheckpointError(
            f"{where}: {field} has type {show(kind)}; supported are {', '.join(TYPES)}"
        )
    needed, optional = TYPES[kind]
    for name in needed:
        if name not in scaling:
            raise CheckpointError(
                f"{where}: {field} of type {kind} has no {name}, which it needs; {_AGAIN}"
            )
    for name in (*needed, *optional):
        if name in NUMBERS and name in scaling:
            check_number(f"{field}.{name}", scaling[name], NUMBERS[name], where)
    if ORIGINAL in (*needed, *optional) and not is_int(scaling.get(ORIGINAL, 8192), 2, 2**31):
        raise CheckpointError(
            f"{where} has {field}.{ORIGINAL} {show(scaling[ORIGINAL])}: a whole number in "
            f"2..{2**31} is needed; {_AGAIN}"
        )
    if kind == "llama3":
        low, high = scaling.get("low_freq_factor", 1), scaling.get("high_freq_factor", 4)
        if low >= high:
            raise CheckpointError(
                f"{where} has {field}.low_freq_factor {low} and high_freq_factor {high}: the "
                f"first must be less; {_AGAIN}"
            )
    if kind == "dynamic" and rotated < 4:
        raise CheckpointError(
            f"{where}: {field} of type dynamic rotates {rotated} values of a head: 4 or more are "
            f"needed; {_AGAIN}"
        )
    _check_lists(scaling, kind, rotated, field, where)


def _check_lists(scaling: dict[str, Any], kind: str, rotated: int, field: str, where: Path) -> None:
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        values = scaling[name]
        if not isinstance(values, list) or len(values) != rotated // 2:
            raise CheckpointError(
                f"{where} has {field}.{name} {show(values)}: a list of {rotated // 2} numbers is "
                f"needed, one for each pair that is rotated; {_AGAIN}"
            )
        for value in values:
            check_number(f"{field}.{name}", value, FACTOR, where)
    sections = scaling.get("mrope_section")
    if (sections is not None or kind == "mrope") and (
        not isinstance(sections, list)
        or len(sections) != 3
        or not all(is_int(n, 0, 2**14) for n in sections)
    ):
        raise CheckpointError(
            f"{where} has {field}.mrope_section {show(sections)}: three whole numbers are needed; "
            f"{_AGAIN}"
        )
