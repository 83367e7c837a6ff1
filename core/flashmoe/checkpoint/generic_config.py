"""Check the config.json of any of mlx-lm's MoE model types, as hostile input.

The three Qwen families have a table of fields of their own (`limits`). Of other types all numbers
are checked, by the kind of their name; the shapes of the tensors, which are compared with the model
that mlx-lm builds from config.json, check the sizes once more.

| fields of the language model                 | kind    | range        |
|----------------------------------------------|---------|--------------|
| those of `limits.SIZES`, by any name         | int     | as there     |
| names that end in _dim, _size, _rank, heads, | int     | 0..2^24      |
|   kernel, _layers, experts, top_k, topk      |         |              |
| names with eps                               | number  | 1e-12..0.1   |
| names with rope_theta                        | number  | 0, 2..1e15   |
| names with partial_rotary_factor             | number  | 1e-6..1      |
| objects with rope in their name              |         | see `rotation` |
| fields that are true or false in mlx-lm      | bool    |              |
| every other number                           |         | finite, -1e15..1e15; ints are int32 |

Fields of other towers (vision, audio) are not read, and not checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import model_types
from .json_files import is_int, show
from .limits import EPSILON, SIZES, check_number
from .rotation import BASE, NUMBERS, ORIGINAL

#: Positions that a model is taken to have where neither config.json nor mlx-lm says it.
MAX_POSITIONS = 2**17

_LARGEST, _INT = 1e15, 2**31 - 1
_SIZE = re.compile(r".*(_dim|_size|_rank|heads|kernel|_layers|experts|top_?k)")
_NOT_READ = re.compile(
    r".*(vision|audio|image|video|architectures|label|transformers_version|quantization).*|"
    r"task_specific_params|auto_map|.*_token(_id|_index)?s?"
)
#: Infinity is a value of this field in real checkpoints, and mlx-lm clips to it.
_UNBOUNDED = "time_step_limit"
_AGAIN = "download it again"


def parse_generic_config(config: dict[str, Any], model_type: str, where: Path) -> dict[str, Any]:
    """Return the fields of the language model, checked, with flashmoe's names for its sizes.

    Args:
        config: the content of config.json.
        model_type: from `model_types.resolve`.
        where: the file, for errors.

    Raises:
        CheckpointError: names file, field and value.
    """
    text = model_types.text_part(model_type, config)
    defaults = model_types.defaults(model_type)
    for name, value in text.items():
        if value is None or name == "text_config" or _NOT_READ.fullmatch(name):
            continue
        if isinstance(defaults.get(name), bool) and not isinstance(value, bool):
            raise CheckpointError(
                f"{where} has {name} {show(value)}: true or false is needed; {_AGAIN}"
            )
        for path, entry in _entries(name, value):
            _check_entry(path, entry, "rope" in name, where)
    return text | _sizes(text, defaults, where)


def _sizes(text: dict[str, Any], defaults: dict[str, Any], where: Path) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for name, aliases in model_types.ALIASES.items():
        found = next((a for a in aliases if text.get(a) is not None), None)
        value = next((defaults[a] for a in aliases if a in defaults), None)
        if found is not None:
            value = text[found]
        if isinstance(value, list) and value and name == "num_experts_per_tok":
            value = max((v for v in value if is_int(v, 0, _INT)), default=None)
        if value is None and name == "num_key_value_heads":
            value = sizes["num_attention_heads"]
        if value is None and name == "max_position_embeddings":
            value = MAX_POSITIONS
        if value is None and name == "num_experts":
            continue  # the tensors say it
        low, high = SIZES[name]
        if not is_int(value, low, high):
            raise CheckpointError(
                f"{where} has {found or name} {show(value)}: a whole number in {low}..{high} is "
                f"needed; {_AGAIN}"
            )
        sizes[name] = value
    return sizes


def _entries(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of everything inside a field that is no object or list."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _entries(f"{name}.{key}", inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(name, inner)
    else:
        yield name, value


def _check_entry(path: str, value: Any, in_rotation: bool, where: Path) -> None:
    if value is None or isinstance(value, bool | str):
        return
    name = path.rpartition(".")[2]
    if "eps" in name:
        check_number(path, value, EPSILON, where)
    elif "rope_theta" in name:
        if value != 0:  # no rotation
            check_number(path, value, BASE, where)
    elif "partial_rotary_factor" in name:
        check_number(path, value, NUMBERS["partial_rotary_factor"], where)
    elif in_rotation and name in NUMBERS:
        check_number(path, value, NUMBERS[name], where)
    elif in_rotation and name == ORIGINAL:
        _check_int(path, value, 2, _INT, where)
    elif _SIZE.fullmatch(name):
        _check_int(path, value, 0, 2**24, where)
    elif isinstance(value, int):
        _check_int(path, value, -_INT, _INT, where)
    elif not (name == _UNBOUNDED and value == float("inf")):
        check_number(path, value, (-_LARGEST, _LARGEST), where)


def _check_int(path: str, value: Any, low: int, high: int, where: Path) -> None:
    if not is_int(value, low, high):
        raise CheckpointError(
            f"{where} has {path} {show(value)}: a whole number in {low}..{high} is needed; {_AGAIN}"
        )
