"""Make a checkpoint of a few layers and experts of a model, whose weights are holes.

It loads and runs like any other, and as fast: speed does not depend on the values of weights.
mlx-lm's own model of the reduced config.json says which shapes its tensors have, so that every
model type whose sizes are in config.json can be reduced.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..checkpoint import model_types
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.dense_tensors import with_root
from ..checkpoint.expert_layers import GLOBAL_SCALE
from ..checkpoint.json_files import show
from ..checkpoint.safetensors_header import Tensor
from ..checkpoint.safetensors_writer import TensorSpec, encode_header
from ..checkpoint.stacked_experts import layer_of
from ..errors import SettingError
from ..locks import temporary_directory
from ..memory import system as memory
from ..memory.dry_run import DryModel
from ..sizes import format_size

#: The fewest and the most layers that stand for all.
LAYERS, MOST_LAYERS = 4, 16
VOCABULARY = 2048
#: Fields that let a router choose groups of experts first, for which there are too few.
GROUPS = ("n_group", "num_expert_group", "topk_group")


@contextmanager
def reduced(checkpoint: Checkpoint, k: int) -> Iterator[tuple[Checkpoint, int]]:
    """Yield a checkpoint of the first layers of a model, and its K.

    These are so many that each kind of layer is among them, if `MOST_LAYERS` are enough for that.
    There are two experts more than K. K is smaller than the given one if there is not enough memory
    for that many experts.

    Raises:
        SettingError: they do not fit in memory, or a model of this type cannot be reduced.
    """
    layers = _count_layers(checkpoint)
    each = sum(x.expert_nbytes for x in checkpoint.expert_layers.values() if x.layer < layers)
    experts = min(checkpoint.num_experts, k + 2)
    kept = [t for t in checkpoint.dense if (layer_of(t.name) or 0) < layers]
    config = _config(checkpoint, layers, experts, k)
    dense = sum(t.nbytes for t in _shapes(checkpoint, config, kept))
    # Twice the dense weights, which are widened; half of the memory, since a prompt needs some.
    experts = min(experts, (memory.available() // 2 - 2 * dense) // each)
    k = min(k, experts)
    if k < 1:
        raise SettingError(
            f"{layers} layers of the model do not fit in the available memory "
            f"({format_size(memory.available())}), so nothing can be measured: close other "
            "programs, or predict for a known machine with --machine"
        )
    config = _config(checkpoint, layers, experts, k)
    for layer in checkpoint.expert_layers.values():
        if layer.layer < layers:
            kept += [checkpoint.tensors[name] for name in sorted(layer.names)]
    targets = _shapes(checkpoint, config, kept)
    with temporary_directory("flashmoe-probe-") as path:
        (path / "config.json").write_text(json.dumps(config))
        with open(path / "model.safetensors", "wb") as f:
            f.write(encode_header(targets))
            f.truncate(f.tell() + sum(t.nbytes for t in targets))
        yield Checkpoint.open(path), k


def _count_layers(checkpoint: Checkpoint) -> int:
    """Return how many of the first layers have one of each kind, by the names of their tensors."""
    kinds: dict[int, set[str]] = {x.layer: {"experts"} for x in checkpoint.expert_layers.values()}
    with_experts = min(kinds)
    for tensor in checkpoint.dense:
        layer = layer_of(tensor.name)
        if layer is not None:
            kinds.setdefault(layer, set()).add(tensor.name.partition(f".{layer}.")[2])
    firsts: dict[frozenset[str], int] = {}
    for layer, names in sorted(kinds.items()):
        firsts.setdefault(frozenset(names), layer)
    last = min(max(firsts.values()), MOST_LAYERS - 1)
    return min(checkpoint.num_layers, max(LAYERS, last + 1, with_experts + 1))


def _config(checkpoint: Checkpoint, layers: int, experts: int, k: int) -> dict[str, Any]:
    """Return config.json with other sizes, by whatever names the model type has for them."""
    config = copy.deepcopy(checkpoint.config)
    text = config.get("text_config")
    if not isinstance(text, dict):
        text = config
    for part in (config, text):
        part.pop("eos_token_id", None)  # these rows are gone
    for name, value in text.items():
        of_layers = isinstance(value, list) or (isinstance(value, str) and "pattern" in name)
        if of_layers and len(value) == checkpoint.num_layers:
            text[name] = value[:layers]
    defaults = model_types.defaults(model_types.resolve(checkpoint.config) or "")
    sizes = {
        "num_hidden_layers": layers,
        "vocab_size": min(VOCABULARY, checkpoint.text_config["vocab_size"]),
        "num_experts": experts,
        "num_experts_per_tok": k,
    }
    for size, value in sizes.items():
        names = model_types.ALIASES[size]
        present = [name for name in names if text.get(name) is not None]
        text |= dict.fromkeys(present or [name for name in names if name in defaults], value)
    text |= {name: 1 for name in GROUPS if text.get(name) is not None or name in defaults}
    return config


def _shapes(
    checkpoint: Checkpoint, config: dict[str, Any], tensors: Iterable[Tensor]
) -> list[TensorSpec]:
    """Return the tensors with the shapes that they have in the model of a reduced config.json."""
    try:
        shapes = DryModel(config).shapes
    except Exception as e:  # whatever it is, it comes from what was reduced
        raise irreducible(checkpoint, e) from e
    result = []
    for tensor in tensors:
        path, _, part = tensor.name.rpartition(".")
        packed = part != "bias" and f"{path}.scales" in checkpoint.tensors
        name = f"{path}.weight" if packed else tensor.name
        plain = shapes.get(name) or shapes.get(with_root(name))
        if plain is None or sorted(plain) == sorted(tensor.shape):
            shape = tensor.shape  # of a name or an order of axes that mlx-lm changes
        elif part == GLOBAL_SCALE:
            shape = plain[:1]
        elif packed:
            shape = (*plain[:-1], tensor.shape[-1])
        else:
            shape = plain
        result.append(TensorSpec(tensor.name, tensor.dtype, shape))
    return result


def irreducible(checkpoint: Checkpoint, cause: Exception) -> SettingError:
    """Return the error for a model of which no small one can be made and run."""
    return SettingError(
        f"no small {checkpoint.model_type} can be made to measure this machine with: "
        f"{type(cause).__name__}: {show(str(cause))}. Predict for a known machine with --machine"
    )
