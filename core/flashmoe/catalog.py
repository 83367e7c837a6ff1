"""Names that people type, and the checkpoints behind them. Imports nothing heavy."""

from pathlib import Path

from .errors import CheckpointError

DEMO = "flashmoe-demo"


def names() -> list[str]:
    """The models that are here without a download."""
    return [DEMO]


def find(name: str) -> Path:
    """The checkpoint directory of a name, or of a path to one.

    Raises:
        CheckpointError: neither.
    """
    if name == DEMO:
        return Path(__file__).parent / "demo"
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
    except (OSError, ValueError, RuntimeError):
        pass  # too long for a path, a zero byte, a home that is not there
    raise CheckpointError(
        f"{str(name)[:200]!r} is no model name ({', '.join(names())}) and no directory: give the "
        "directory of an MLX checkpoint"
    )
