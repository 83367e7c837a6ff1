"""Check that this machine computes what it should, with the bundled demo model.

The model is streamed through few slots. Its logits are compared with those of the same model with
all experts in memory, and with those of another implementation.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model

from ..checkpoint.checkpoint import Checkpoint
from ..models.loading import PREFILL_SLOTS, load_streaming
from ..models.resident import load_resident, logits
from ..ops import backend as backends
from ..streaming.compute import Backend
from ..terminal import format_number

#: The hash of the demo model's weights as they are shipped.
SHA256 = "c92e82e6960ac1bed678d00c506f6d961aef11508073bd9faad078a50bfa5e90"

#: The largest difference between logits of float32 models on a CPU.
TOLERANCE = 1e-4

#: The norm of the difference between logits of bfloat16 models on a GPU, relative to the norm of
#: the logits.
GPU_TOLERANCE = 0.03

#: More than two tokens, so that the kernels of prompts are used, and few enough that each call
#: evicts experts.
PROMPT = [5, 261, 1033, 4096, 77, 8001, 612, 3000]
DECODED = 2


@dataclass(frozen=True)
class Check:
    """The result of one comparison.

    Attributes:
        name: what was compared.
        passed: whether the result is as it should be.
        result: the result as text.
        value, limit: the result as a number, and the highest that passes; None if there is none.
    """

    name: str
    passed: bool
    result: str
    value: float | None = None
    limit: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the fields for `flashmoe doctor --json`."""
        return {
            "name": self.name,
            "passed": self.passed,
            "result": self.result,
            "found": self.value,
            "limit": self.limit,
        }


def run(path: Path) -> list[Check]:
    """Run all checks with the demo model in a directory.

    Raises:
        FlashMoEError: the model cannot be loaded.
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
    same = digest.hexdigest() == SHA256
    result = "as shipped" if same else f"not as shipped: SHA-256 {digest.hexdigest()[:12]}..."
    return Check("demo file", same, result)


def _same_bits(streamed: np.ndarray, resident: np.ndarray) -> Check:
    different = int((streamed.view(np.uint32) != resident.view(np.uint32)).sum())
    finite = bool(np.isfinite(streamed).all())
    result = f"{different} of {streamed.size:,} logits differ from all experts resident"
    result += "" if finite else "; some are not finite"
    return Check("streaming", finite and not different, result, different, 0)


def _near_stock(streamed: np.ndarray, path: Path, used: str) -> Check:
    stock, _ = load_model(path)
    stock.set_dtype(mx.float32)
    difference = float(np.abs(streamed - _logits(stock)).max())
    result = (
        f"{used}: logits within {format_number(difference, 2)} of stock mlx-lm in float32 "
        f"(limit {format_number(TOLERANCE)})"
    )
    # Not `not difference > TOLERANCE`: NaN must not pass.
    return Check("kernels", difference <= TOLERANCE, result, difference, TOLERANCE)


def _near_reference(streamed: np.ndarray, checkpoint: Checkpoint, used: str) -> Check:
    expected = _streamed(checkpoint, backends.pick("reference"))
    difference = float(np.linalg.norm(streamed - expected) / np.linalg.norm(expected))
    result = f"{used}: logits within {difference:.1%} of reference (limit {GPU_TOLERANCE:.0%})"
    return Check("kernels", difference <= GPU_TOLERANCE, result, difference, GPU_TOLERANCE)


def _streamed(checkpoint: Checkpoint, backend: Backend | None = None) -> np.ndarray:
    slots = checkpoint.top_k + PREFILL_SLOTS
    model = load_streaming(checkpoint, slots=slots, backend=backend)
    try:
        return _logits(model)
    finally:
        model.close()


def _logits(model: nn.Module) -> np.ndarray:
    # All models get the same tokens, whichever they would generate.
    return np.concatenate(logits(model, PROMPT + PROMPT[:DECODED], len(PROMPT), decode=0))
