"""Compute what each model of the catalogue needs, from its shapes, and print it as a table.

    python tools/model_table.py            # the table of docs/models.md
    python tools/model_table.py --short    # the table of README.md

Nothing is downloaded. A checkpoint of the right shapes is made with a hole in place of the weights,
and `flashmoe plan`'s own code plans its memory and predicts its speed. The shapes below are those
of the published config.json files as they are repeated in other projects. They are held to the
catalogue: the bytes of the tensors must be within `TOLERANCE` of the catalogue's bytes, apart from
the image encoder of Qwen3.5, which flashmoe does not load.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashmoe.checkpoint.checkpoint import Checkpoint

CATALOGUE = Path(__file__).parents[1] / "core/flashmoe/hub/known_models.json"

# Predictions are made for these Macs; docs/plan.md says how well they agree with measurements.
MACHINES = {"m4-24gb": "24 GB M4", "m3-max-48gb": "48 GB M3 Max"}

TOLERANCE = 0.002
IMAGE_ENCODER_BYTES = range(800_000_000, 900_000_000)

# Total size of the memory of Macs, in GiB.
MAC_GB = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)

BITS, GROUP_SIZE = 4, 64


def qwen3_moe(hidden: int, layers: int, heads: int, kv_heads: int, expert: int, experts: int):
    """Return the config.json of a Qwen3 MoE model."""
    return {
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "intermediate_size": 3 * hidden,
        "moe_intermediate_size": expert,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": 151_936,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": False,
    }


def linear(hidden: int, layers: int, heads: int, expert: int, experts: int, k: int, values: int):
    """Return the fields that Qwen3-Next and Qwen3.5 share; `values`: linear value heads."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": values,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "moe_intermediate_size": expert,
        "shared_expert_intermediate_size": expert,
        "num_experts": experts,
        "num_experts_per_tok": k,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": False,
    }


def qwen3_5(*shapes: int):
    """Return the config.json of a Qwen3.5 MoE model; `shapes`: the arguments of `linear`."""
    rope = {"type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    text = {"model_type": "qwen3_5_moe_text", "vocab_size": 248_320, "attention_bias": False}
    return {
        "model_type": "qwen3_5_moe",
        "text_config": {**text, **linear(*shapes), "rope_parameters": rope},
        "tie_word_embeddings": False,
    }


QWEN3_NEXT = {
    **{"model_type": "qwen3_next", "vocab_size": 151_936, "intermediate_size": 5120},
    **{"rope_theta": 1e7, "partial_rotary_factor": 0.25, "decoder_sparse_step": 1},
    **{"mlp_only_layers": [], **linear(2048, 48, 16, 512, 512, 10, 32)},
}

# By the name in the catalogue, in the order of the table.
CONFIGS = {
    "qwen3-30b-instruct": qwen3_moe(2048, 48, 32, 4, 768, 128),
    "qwen3.5-35b": qwen3_5(2048, 40, 16, 512, 256, 8, 32),
    "qwen3-next-80b": QWEN3_NEXT,
    "qwen3.5-122b": qwen3_5(3072, 48, 32, 1024, 256, 8, 64),
    "qwen3-235b": qwen3_moe(4096, 94, 64, 4, 1536, 128),
    "qwen3.5-397b": qwen3_5(4096, 60, 32, 1024, 512, 10, 64),
    "qwen3-coder-480b": qwen3_moe(6144, 62, 96, 8, 2560, 160),
}


@dataclass(frozen=True)
class Shape:
    """A tensor of the hollow checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Needs:
    """What a model needs; all but the counts are bytes.

    least: the smallest memory budget that it runs in, with the trained K; pruned_least: with K=4.
    speeds, pruned_speeds: predicted tokens per second on each of `MACHINES`; None: too small.
    """

    name: str
    repo: str
    disk: int
    k: int
    num_experts: int
    dense: int
    expert: int
    least: int
    pruned_least: int
    smallest_mac: int
    speeds: list[float | None]
    pruned_speeds: list[float | None]


def tensors(config: dict) -> tuple[list[Shape], dict]:
    """Return the tensors of mlx-lm's 4-bit conversion, and its quantization entry.

    MLX's arrays are lazy: their shapes are known, and no weight is ever computed.
    """
    import importlib

    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    entry: dict = {"group_size": GROUP_SIZE, "bits": BITS, "mode": "affine"}
    chosen = getattr(model, "quant_predicate", lambda path, layer: True)

    def predicate(path: str, layer: nn.Module) -> bool | dict:
        if not hasattr(layer, "to_quantized"):
            return False
        bits = chosen(path, layer)
        if isinstance(bits, dict):
            entry[path] = bits
        return bits

    nn.quantize(model, GROUP_SIZE, BITS, class_predicate=predicate)
    dtypes = {mx.uint32: "U32", mx.bfloat16: "BF16", mx.float32: "F32"}
    shapes = [
        Shape(name, dtypes[array.dtype], tuple(array.shape), array.nbytes)
        for name, array in tree_flatten(model.parameters())
    ]
    return shapes, entry


@contextmanager
def hollow(config: dict) -> Iterator[Path]:
    """Yield a checkpoint directory with a hole in the file in place of the weights."""
    from flashmoe.checkpoint.safetensors_writer import encode_header

    shapes, entry = tensors(config)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        with open(path / "model.safetensors", "wb") as f:
            f.write(encode_header(shapes))
            f.truncate(f.tell() + sum(shape.nbytes for shape in shapes))
        (path / "config.json").write_text(json.dumps({**config, "quantization": entry}))
        yield path


def check_size(name: str, nbytes: int, catalogue: int) -> None:
    """Refuse shapes that do not add up to the bytes of the catalogue."""
    encoder = catalogue - nbytes
    if abs(encoder) > TOLERANCE * catalogue and encoder not in IMAGE_ENCODER_BYTES:
        raise SystemExit(f"{name}: the shapes give {nbytes:,} bytes, the catalogue {catalogue:,}")


def needs(name: str) -> Needs:
    """Plan the model `name` of the catalogue."""
    from flashmoe.checkpoint.checkpoint import Checkpoint
    from flashmoe.models.loading import PREFILL_SLOTS, plan_memory
    from flashmoe.options import LoadOptions

    known = json.loads(CATALOGUE.read_text())["models"][name]
    with hollow(CONFIGS[name]) as path:
        checkpoint = Checkpoint.open(path)
        check_size(name, sum(file.stat().st_size for file in checkpoint.files), known["bytes"])
        # As on a GPU with memory to spare, which takes a little more than a CPU.
        least, pruned_least = (
            plan_memory(
                checkpoint,
                LoadOptions(slots=k + PREFILL_SLOTS, experts=k, prompt_cache=None),
                mac=2**50,
            ).total
            for k in (checkpoint.top_k, 4)
        )
        return Needs(
            name=name,
            repo=known["repo"],
            disk=known["bytes"],
            k=checkpoint.top_k,
            num_experts=checkpoint.num_experts,
            dense=checkpoint.dense_nbytes,
            expert=next(iter(checkpoint.expert_layers.values())).expert_nbytes,
            least=least,
            pruned_least=pruned_least,
            # Metal recommends 75 % of the memory, up to 36 GB two thirds: see docs/plan.md.
            smallest_mac=next(
                gb for gb in MAC_GB if (gb << 30) * (2 / 3 if gb <= 36 else 0.75) >= least
            ),
            speeds=[predicted(checkpoint, mac, checkpoint.top_k) for mac in MACHINES],
            pruned_speeds=[predicted(checkpoint, mac, 4) for mac in MACHINES],
        )


def predicted(checkpoint: Checkpoint, mac: str, k: int) -> float | None:
    """Return the tokens per second that `flashmoe plan` predicts; None where it does not fit."""
    from flashmoe.errors import BudgetError
    from flashmoe.plan.estimate import PlanOptions, estimate_speed, split_memory
    from flashmoe.plan.machines import find_machine

    options, machine = PlanOptions(experts=k), find_machine(mac)
    try:
        split = split_memory(checkpoint, options, machine)
    except BudgetError:
        return None
    return estimate_speed(checkpoint, options, split, machine.costs).token.tokens_per_second


# The models of the short table.
SHORT = ("qwen3.5-35b", "qwen3-next-80b", "qwen3.5-122b", "qwen3-235b", "qwen3.5-397b")


def short() -> Iterator[str]:
    """Yield the lines of the table in README.md."""
    yield from _head("model, 4 bits", "name", "disk", "memory, at least", *MACHINES.values())
    for model in map(needs, SHORT):
        title = model.repo.split("/")[1].removesuffix("-4bit")
        yield _row(
            *(title, f"`{model.name}`", f"{model.disk / 1e9:.0f} GB"),
            *(f"{model.least / 1e9:.0f} GB", *map(_rate, model.speeds)),
        )


def full() -> Iterator[str]:
    """Yield the lines of the table in docs/models.md."""
    yield from _head(
        *("name", "disk", "experts, K", "dense weights", "one expert"),
        *("memory, at least: K; K=4", "smallest Mac"),
        *(f"{mac}, tokens/s: K; K=4" for mac in MACHINES.values()),
    )
    for model in map(needs, CONFIGS):
        speeds = zip(model.speeds, model.pruned_speeds, strict=True)
        yield _row(
            *(f"`{model.name}`", f"{model.disk / 1e9:.0f} GB", f"{model.num_experts}, {model.k}"),
            *(f"{model.dense / 1e9:.1f} GB", f"{model.expert / 1e6:.1f} MB"),
            f"{model.least / 1e9:.1f} GB; {model.pruned_least / 1e9:.1f} GB",
            f"{model.smallest_mac} GB",
            *(f"{_rate(exact)}; {_rate(pruned)}" for exact, pruned in speeds),
        )


def _head(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield f"|{'---|' * len(names)}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rate(value: float | None) -> str:
    return "no" if value is None else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="the table of README.md")
    for line in short() if parser.parse_args().short else full():
        print(line)


if __name__ == "__main__":
    main()
