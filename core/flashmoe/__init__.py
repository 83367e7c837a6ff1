"""flashmoe runs Mixture-of-Experts models that are larger than memory.

Dense weights stay in memory; routed experts are read from the SSD as the router picks them.

    import flashmoe, mlx_lm
    model, tokenizer = flashmoe.load("path/to/checkpoint", memory="8GB")
    print(mlx_lm.generate(model, tokenizer, "Once upon a time", max_tokens=50))

Importing this package is cheap: MLX, mlx-lm and numba come with the first `load`.
"""

from typing import TYPE_CHECKING

from .errors import BudgetError, CheckpointError, FlashMoEError, ReadError, SettingError

if TYPE_CHECKING:
    from .models.loading import load

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "FlashMoEError",
    "ReadError",
    "SettingError",
    "__version__",
    "load",
]


def __getattr__(name: str):
    if name == "load":
        from .models.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
