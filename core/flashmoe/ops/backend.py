"""Choose the backend that computes a model: numba, GPU kernels, or MLX."""

from __future__ import annotations

import os
from importlib import import_module

import mlx.core as mx

from flashmoe_metal import kernel

from ..errors import SettingError
from ..streaming.compute import Backend
from .compiled_code import protect_mlx

#: The environment variable that selects a backend by its name, which helps to find faults.
ENV = "FLASHMOE_OPS"

_MODULES = {
    "cpu": ".cpu.experts",
    "fused": ".gpu.fused",
    "gather": ".gpu.gather",
    "reference": ".reference.experts",
}
NAMES = tuple(_MODULES)


def on_gpu() -> bool:
    """Return whether MLX computes on a GPU (Metal or CUDA), or a test stands in for one."""
    return mx.default_device() == mx.gpu or kernel.available()


def working_set() -> int | None:
    """Return the bytes that Metal recommends to use at most; None where MLX does not use Metal."""
    if mx.default_device() != mx.gpu or not mx.metal.is_available():
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


def pick(name: str | None = None) -> Backend:
    """Return the backend `name`; by default $FLASHMOE_OPS, or the fastest for this device.

    MLX does not load code that others may have written from then on, see `protect_mlx`.

    Raises:
        SettingError: no backend has that name, or it does not run on this device.
    """
    name = name or os.environ.get(ENV) or _fastest()
    if name not in NAMES:
        raise SettingError(f"{ENV}={name!r} is not one of {', '.join(NAMES)}: unset or change it")
    if not _runs(name):
        device = "gpu" if on_gpu() else "cpu"
        raise SettingError(
            f"{ENV}={name!r} does not run on MLX's {device} device: unset it, or set it to one of "
            f"{', '.join(other for other in NAMES if _runs(other))}"
        )
    protect_mlx()
    return import_module(_MODULES[name], __package__).BACKEND


def missing() -> dict[str, str]:
    """Return the backends that do not run on this device, and what each of them needs."""
    reasons = {
        "fused": "needs a GPU and MLX's Metal or CUDA back end",
        "gather": "needs a GPU",
        "cpu": "is for MLX's cpu device",
    }
    return {name: reasons[name] for name in NAMES if not _runs(name)}


def _fastest() -> str:
    return next(name for name in ("fused", "gather", "cpu") if _runs(name))


def _runs(name: str) -> bool:
    return {"fused": kernel.available(), "gather": on_gpu(), "cpu": not on_gpu()}.get(name, True)
