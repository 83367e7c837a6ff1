"""The option `--cluster` of commands that run a model: what all hosts but the lead do."""

from __future__ import annotations

from functools import partial

import click

cluster_option = click.option(
    "--cluster",
    metavar="SHARES",
    help="Run on all hosts of mlx.launch: equal, or a number for each, such as 3,1.",
)


def leads(path, cluster: str | None, memory, slots, depth, io) -> bool:
    """Whether this process answers: it is alone, or the lead of its cluster. Another host computes
    its experts here until the lead ends.

    Raises:
        ClusterError: see `flashmoe.cluster.lead.group` and `flashmoe.cluster.worker.serve`.
    """
    if cluster is None:
        return True
    from ..cluster.lead import group  # late: MLX

    if group().rank() == 0:
        return True
    from ..cluster.worker import serve

    say = partial(click.echo, err=True)
    serve(path, memory=memory, slots=slots, depth=depth, io=io, say=say)
    return False
