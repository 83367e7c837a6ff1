"""flashmoe runs Mixture-of-Experts models that are larger than memory.

Dense weights stay in memory; routed experts are read from the SSD as the router picks them.

    import flashmoe, mlx_lm
    model, tokenizer = flashmoe.load("path/to/checkpoint", memory="8GB")
    print(mlx_lm.generate(model, tokenizer, "Once upon a time", max_tokens=50))

Chats, tools and structured output go through an engine:

    with flashmoe.Engine(flashmoe.find("flashmoe-demo")) as engine:
        request = flashmoe.Request([{"role": "user", "content": "Hello!"}])
        for event in engine.stream(request):
            print(event)

Importing this package is cheap: MLX, mlx-lm and numba are imported by the first `load`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import process_limits
from .errors import BudgetError, CheckpointError, FlashMoEError, ReadError, SettingError

if TYPE_CHECKING:
    from .catalog import find as find
    from .engine import Engine as Engine
    from .models.loading import load as load
    from .options import EngineOptions as EngineOptions
    from .options import LoadOptions as LoadOptions
    from .requests import Request as Request

__version__ = "0.1.0"

# Imported when they are first used.
_LATE = {
    "Engine": ".engine",
    "EngineOptions": ".options",
    "LoadOptions": ".options",
    "Request": ".requests",
    "find": ".catalog",
    "load": ".models.loading",
}

__all__ = [
    "BudgetError",
    "CheckpointError",
    "Engine",
    "EngineOptions",
    "FlashMoEError",
    "LoadOptions",
    "ReadError",
    "Request",
    "SettingError",
    "__version__",
    "find",
    "load",
]


process_limits.watch_import()


def __getattr__(name: str):
    if name in _LATE:
        return getattr(import_module(_LATE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
