"""The maths of the expert block. One definition (`reference`), several speeds; `pick` chooses.

An ops module has `ACTIVATIONS`, the values of that setting which it computes with; `STACKS`,
whether a `Work` can be told that its tokens are of sequences of their own (alone=True);
`run_all(works, experts)`, if it is faster than `run` of each work of a call with its experts;
`prepare(model, head)`, which readies the dense layers of a loaded model; and one class, `Work`:
the expert block of one layer for one call of the model. And `weigh(y, scores)`, which makes
`work.combined(scores)` of `work.result()`.

    work = ops.Work(bank, x, top_k)   # x: (tokens, hidden), evaluated
    work.run({slot: pairs, ...})      # experts that are resident now; any split into calls
    work.settle()                     # before a slot of those that were run is overwritten
    y = work.result()                 # (tokens, top_k, hidden)
    y = work.combined(scores)         # or: (tokens, hidden), weighted by scores (tokens, top_k)

Where `work.lazy`, what it gives reads slots when it is evaluated.

A pair is one (token, choice) of the router, numbered token * top_k + choice. The bits of a pair's
result depend on its expert and on the pairs of that expert in this call (of the numba kernels: on
whether they are few). They do not depend on slots or on how the experts are split into `run`
calls: that is what makes streaming exact.
"""

import os
from importlib import import_module
from types import ModuleType

import mlx.core as mx

from flashmoe_metal import kernel

from ..errors import SettingError

ENV = "FLASHMOE_OPS"
MODULES = {
    "cpu": ".cpu.experts",
    "fused": ".gpu.fused",
    "gather": ".gpu.gather",
    "reference": ".reference.experts",
}
NAMES = tuple(MODULES)


def on_gpu() -> bool:
    """Whether MLX computes on a GPU here (Metal or CUDA), or something stands in for one."""
    return mx.default_device() == mx.gpu or kernel.available()


def pick(name: str | None = None) -> ModuleType:
    """The ops module `name`; by default $FLASHMOE_OPS, or the fastest for this device.

    Raises:
        SettingError: there is none of that name, or it does not run here.
    """
    name = name or os.environ.get(ENV) or _fastest()
    if name not in NAMES:
        raise SettingError(f"{ENV}={name!r} is not one of {', '.join(NAMES)}")
    if not _runs(name):
        device = "gpu" if on_gpu() else "cpu"
        raise SettingError(f"{ENV}={name!r} does not run on MLX's {device} device; unset it")
    return import_module(MODULES[name], __package__)


def missing() -> dict[str, str]:
    """The ops modules that do not run here, and why."""
    why = {
        "fused": "needs a GPU and MLX's Metal or CUDA back end",
        "gather": "needs a GPU",
        "cpu": "is for MLX's cpu device",
    }
    return {name: why[name] for name in NAMES if not _runs(name)}


def _fastest() -> str:
    return next(name for name in ("fused", "gather", "cpu") if _runs(name))


def _runs(name: str) -> bool:
    return {"fused": kernel.available(), "gather": on_gpu(), "cpu": not on_gpu()}.get(name, True)
