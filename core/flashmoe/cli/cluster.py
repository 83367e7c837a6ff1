"""Decide what a command does on a machine of a cluster: lead it, or compute experts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from ..options import EngineOptions


def leads(path: Path, options: EngineOptions) -> bool:
    """Return whether this process answers requests: it is alone, or the lead of its cluster.

    A worker computes its experts in here, until the lead ends.

    Raises:
        ClusterError: see `flashmoe.cluster.lead.group` and `flashmoe.cluster.worker.serve`.
    """
    if options.cluster is None:
        return True
    from ..cluster.lead import group  # late: MLX

    if group().rank() == 0:
        return True
    from ..cluster.worker import serve

    serve(path, options, say=partial(click.echo, err=True))
    return False
