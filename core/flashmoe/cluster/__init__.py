"""Spread experts over several machines (experimental: no two machines have run it yet)."""

from __future__ import annotations

from typing import Any


def serve_experts(path: str, **settings: Any) -> None:
    """Compute experts for the lead of a cluster until it ends; see `flashmoe.cluster.worker`."""
    from .worker import serve  # late: it imports MLX

    serve(path, **settings)
