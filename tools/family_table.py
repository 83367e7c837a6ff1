"""Print the table of MoE model types in docs/models.md, or how far each is from mlx-lm.

    python tools/family_table.py                 # the table
    python tools/family_table.py --differences   # logits of small random models against mlx-lm's

The small configurations are those of the tests. No weights are made for the table: mlx-lm's models
are built, and tokens go through them without work.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import mlx.core as mx  # noqa: E402
import moe_types  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

from flashmoe.checkpoint.checkpoint import Checkpoint  # noqa: E402
from flashmoe.generation.prompt_cache import can_trim  # noqa: E402
from flashmoe.memory.dry_run import DryModel, find_switches, model_classes  # noqa: E402
from flashmoe.models.families import FAMILIES  # noqa: E402
from flashmoe.models.loading import load_streaming  # noqa: E402
from flashmoe.models.resident import load_resident, logits, same  # noqa: E402
from flashmoe.streaming.expert_form import ExpertForm  # noqa: E402

#: mlx-lm's names of caches -> what they hold.
CACHES = {
    "KVCache": "keys and values",
    "RotatingKVCache": "sliding window",
    "ChunkedKVCache": "chunked",
    "ArraysCache": "recurrent state",
    "LayerCache": "compressed and sliding window",
}
PROMPT = np.random.default_rng(0).integers(0, 150, 40).tolist()


def table() -> list[str]:
    """Return the table, a line of Markdown each."""
    head = ("`model_type`", "experts", "shared expert", "caches", "earlier turns", "own blocks")
    rows = [head, tuple("---" for _ in head), *(row(name) for name in sorted(moe_types.CONFIGS))]
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def row(name: str) -> tuple[str, ...]:
    """Return what the table has of one type."""
    own = "yes" if name in FAMILIES else ""
    try:
        dry = DryModel(moe_types.config_of(name))
        cache = dry.new_cache()
        dry.run(4, cache)
    except RuntimeError:
        return (f"`{name}`", "needs Metal", "", "", "", own)
    model_class, args_class = model_classes(moe_types.config_of(name))
    model = model_class(args_class.from_dict(moe_types.config_of(name)))
    forms = sorted({form_name(ExpertForm.of(m)) for m in find_switches(model).values()})
    shared = "during the reads" if dry.shared else ""
    kinds = sorted({CACHES[type(leaf).__name__] for entry in cache for leaf in leaves(entry)})
    kept = "trimmed" if can_trim(cache) else "kept at turns"
    return (f"`{name}`", ", ".join(forms), shared, ", ".join(kinds), kept, own)


def form_name(form: ExpertForm) -> str:
    """Return a short name of what an expert computes."""
    if form.activation is None:
        return "SwiGLU"
    kind = type(form.activation)
    return f"{kind.__name__}{'' if len(form.projections) == 3 else ', two matrices'}"


def leaves(entry: Any) -> Iterator[Any]:
    """Yield the caches inside an entry of a prompt cache."""
    yield from getattr(entry, "caches", None) or [entry]


def differences() -> Iterator[str]:
    """Yield a line of the largest difference of logits for each type and format."""
    for name in sorted(moe_types.CONFIGS):
        if name == "muse_spark" and not mx.metal.is_available():
            yield f"{name}: needs Metal"
            continue
        cells = [difference(name, bits, mode) for bits, mode in ((None, "affine"), (4, "affine"))]
        yield f"{name}: plain {cells[0]}; 4 bits {cells[1]}"


def difference(name: str, bits: int | None, mode: str) -> str:
    """Return the largest difference of float32 logits, and what was evicted, of one checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        path = moe_types.write_moe(Path(directory) / "model", name, bits=bits, mode=mode)
        checkpoint = Checkpoint.open(path)
        model = load_streaming(checkpoint, slots=checkpoint.top_k + 2)
        streamed = logits(model, PROMPT, 24, 3)
        evictions = sum(switch.evictions for switch in model.switches.values())
        model.close()
        resident = load_resident(path)
        exact = same(streamed, logits(resident, PROMPT, 24, 3))
        resident.close()
        stock, _ = load_model(path)
        stock.set_dtype(mx.float32)
        theirs = logits(stock, PROMPT, 24, 3)
    far = max(np.abs(a - b).max() for a, b in zip(streamed, theirs, strict=True))
    most = max(np.abs(b).max() for b in theirs)
    how = "as resident" if exact else "NOT AS RESIDENT"
    return f"{far:.1e} of {most:.1f} ({how}, {evictions} evictions)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--differences", action="store_true", help="compare with mlx-lm")
    logging.disable(logging.INFO)
    for line in differences() if parser.parse_args().differences else table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
