"""Whether this machine computes what it should: the bundled demo model, streamed through few slots,
against all of its experts in memory, and against another implementation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

from ..checkpoint.checkpoint import Checkpoint
from ..models.loading import PREFILL_SLOTS, load_streaming
from ..models.resident import load_resident, logits
from ..ops import backend as backends
from ..streaming.compute import Backend

#: The weights of the demo model as they are shipped.
SHA256 = "c92e82e6960ac1bed678d00c506f6d961aef11508073bd9faad078a50bfa5e90"

#: Logits of float32 models on a CPU: the largest difference.
TOLERANCE = 1e-4

#: Logits of bfloat16 models on a GPU: the norm of the difference, as a share of that of the logits.
GPU_TOLERANCE = 0.03

#: Few enough that each call evicts experts, and more than two rows for the kernels of prompts.
PROMPT = [5, 261, 1033, 4096, 77, 8001, 612, 3000]
DECODED = 2


@dataclass(frozen=True)
class Check:
    """One comparison.

    found, limit: the figure and the most that passes; None where there is no figure.
    """

    name: str
    passed: bool
    result: str
    found: float | None = None
    limit: float | None = None


def run(path: Path) -> list[Check]:
    """All checks, on the demo model in the directory `path`.

    Raises:
        FlashMoEError: it cannot be loaded.
    """
    checkpoint = Checkpoint.open(path)
    checks = [_shipped(checkpoint)]
    streamed = _streamed(checkpoint)
    resident = load_resident(path)
    try:
        checks.append(_same_bits(streamed, _logits(resident)))
    finally:
        resident.close()
    used = backends.pick().name
    if not backends.on_gpu():
        return [*checks, _near_stock(streamed, path, used)]
    if used != "reference":
        checks.append(_near_reference(streamed, checkpoint, used))
    return checks


def _shipped(checkpoint: Checkpoint) -> Check:
    digest = hashlib.sha256()
    for file in checkpoint.files:
        digest.update(file.read_bytes())
    good = digest.hexdigest() == SHA256
    result = "as shipped" if good else f"not as shipped: SHA-256 {digest.hexdigest()[:12]}..."
    return Check("demo file", good, result)


def _same_bits(streamed: np.ndarray, resident: np.ndarray) -> Check:
    different = int((streamed.view(np.uint32) != resident.view(np.uint32)).sum())
    finite = bool(np.isfinite(streamed).all())
    result = f"{different} of {streamed.size:,} logits differ from all experts resident"
    result += "" if finite else "; some are not finite"
    return Check("streaming", finite and not different, result, different, 0)


def _near_stock(streamed: np.ndarray, path: Path, used: str) -> Check:
    stock, _ = load_model(path)
    stock.set_dtype(mx.float32)
    found = float(np.abs(streamed - _logits(stock)).max())
    result = f"{used}: logits within {found:.1e} of stock mlx-lm in float32 (limit {TOLERANCE:g})"
    # Not the reverse: nan must not pass.
    return Check("kernels", found <= TOLERANCE, result, found, TOLERANCE)


def _near_reference(streamed: np.ndarray, checkpoint: Checkpoint, used: str) -> Check:
    expected = _streamed(checkpoint, backends.pick("reference"))
    found = float(np.linalg.norm(streamed - expected) / np.linalg.norm(expected))
    result = f"{used}: logits within {found:.1%} of reference (limit {GPU_TOLERANCE:.0%})"
    return Check("kernels", found <= GPU_TOLERANCE, result, found, GPU_TOLERANCE)


def _streamed(checkpoint: Checkpoint, backend: Backend | None = None) -> np.ndarray:
    slots = checkpoint.top_k + PREFILL_SLOTS
    model = load_streaming(checkpoint, slots=slots, backend=backend)
    try:
        return _logits(model)
    finally:
        model.close()


def _logits(model) -> np.ndarray:
    # The same tokens for each model, whatever it finds likely.
    found = logits(model, PROMPT + PROMPT[:DECODED], len(PROMPT), decode=0)
    return np.concatenate(found)
