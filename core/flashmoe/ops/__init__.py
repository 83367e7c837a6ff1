"""The maths of the expert block. One definition (`reference`), several speeds; `pick` chooses.

An ops module has `ACTIVATIONS`, the values of that setting which it computes with;
`prepare(model, head)`, which readies the dense layers of a loaded model; and one class, `Work`:
the expert block of one layer for one call of the model.

    work = ops.Work(bank, x, top_k)   # x: (tokens, hidden), evaluated
    work.run({slot: pairs, ...})      # experts that are resident now; any split into calls
    y = work.result()                 # (tokens, top_k, hidden)
    y = work.combined(scores)         # or: (tokens, hidden), weighted by scores (tokens, top_k)

A pair is one (token, choice) of the router, numbered token * top_k + choice. The bits of a pair's
result depend on its expert and on the pairs of that expert in this call (of the numba kernels: on
whether they are few). They do not depend on slots or on how the experts are split into `run`
calls: that is what makes streaming exact.
"""

import os
from types import ModuleType

import mlx.core as mx

from ..errors import SettingError

ENV = "FLASHMOE_OPS"
NAMES = ("cpu", "gather", "reference")


def on_gpu() -> bool:
    """Whether MLX computes on a GPU here (Metal or CUDA)."""
    return mx.default_device() == mx.gpu


def pick(name: str | None = None) -> ModuleType:
    """The ops module `name`; by default $FLASHMOE_OPS, or the fastest for this device."""
    name = name or os.environ.get(ENV) or ("gather" if on_gpu() else "cpu")
    if name not in NAMES:
        raise SettingError(f"{ENV}={name!r} is not one of {', '.join(NAMES)}")
    if name != "reference" and (name == "gather") != on_gpu():
        device = "gpu" if on_gpu() else "cpu"
        raise SettingError(f"{ENV}={name!r} does not run on MLX's {device} device; unset it")
    if name == "cpu":
        from . import cpu as module
    elif name == "gather":
        from . import gather as module
    else:
        from . import reference as module
    return module
