"""Run a worker of a cluster: it holds some experts of every layer and computes them for the lead.

A worker has no dense weights, no prompt cache and no text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import ClusterError, FlashMoEError, ReadError
from ..memory.budget import split_budget
from ..memory.footprint import CHUNK_TOKENS, RUNTIME_NBYTES
from ..memory.system import resident
from ..models.loading import PREFILL_SLOTS, reader_for
from ..models.streaming_moe import streaming_layers
from ..ops.activations import check_activations
from ..ops.arrays import to_numpy
from ..options import LoadOptions, with_settings
from ..streaming.drives import drive_of
from ..streaming.switch_glu import LayerHooks
from . import connections
from .collectives import Exchange, ExpertRequest, own_pairs, switch_inputs
from .lead import ADDRESS_NBYTES, cluster_backend, exchange_for, fingerprint, group
from .placement import owners

log = logging.getLogger("flashmoe")


def serve(
    path: str | Path,
    options: LoadOptions | None = None,
    *,
    say: Callable[[str], None] = log.info,
    **settings: Any,
) -> None:
    """Compute experts until the lead ends.

    Args:
        options: how this machine reads the experts and how much memory it takes. The lead decides
            about activations.
        settings: fields of `LoadOptions`, which replace those of `options`.
        say: takes a line of text when the worker is ready.

    Raises:
        ClusterError: the lead is gone, or has another checkpoint.
    """
    options = with_settings(options or LoadOptions(), settings)
    of_all = group()
    rank = of_all.rank()
    lost: list[str] = []

    def lose(why: str) -> None:
        lost.append(why)
        connections.cut(address for machine in connections.ring() for address in machine)

    address, port, secret = _meet(of_all)
    lead = connections.join((address, port), rank, secret, lose)
    try:
        try:
            checkpoint = Checkpoint.open(path)
            plan = lead.receive()
            if plan is None:
                raise ClusterError("the lead is gone")
            if plan["fingerprint"] != fingerprint(checkpoint):
                raise ClusterError(
                    f"{checkpoint.path} is not the checkpoint that the lead has: give all machines "
                    "the same one"
                )
            owned = owners(checkpoint.num_experts, tuple(plan["shares"])) == rank
            experts = _Experts(checkpoint, owned, plan["activations"], options)
        except FlashMoEError as e:
            lead.send("error", text=str(e))
            raise
        text = f"{owned.sum()} of {owned.size} experts a layer, {experts.plan.describe()}"
        lead.send("ready", text=text)
        say(f"worker {rank}: {text}")
        try:
            _work(lead, exchange_for(checkpoint, of_all), experts)
        except ClusterError:
            if not lead.ended:
                raise ClusterError(f"the lead is gone ({', '.join(lost) or 'no word'})") from None
        finally:
            experts.close()
    finally:
        lead.close()


def _meet(of_all: mx.distributed.Group) -> tuple[str, int, str]:
    """Return the address and port where the lead listens, and the secret."""
    data = Exchange(of_all, 0, 0).sum(np.zeros(ADDRESS_NBYTES, np.float32))
    address, port, secret = data.astype(np.uint8).tobytes().decode().split()
    return address, int(port), secret


def _work(lead: connections.Connection, exchange: Exchange, experts: _Experts) -> None:
    while (message := lead.receive()) is not None:
        if message["kind"] == "end":
            return
        while (request := exchange.receive()) is not None:
            experts.answer(request, exchange, lead)
    raise ClusterError("the lead is gone")


class _Experts:
    """The experts that this machine holds, in slots.

    Args:
        owned: (experts,) bool.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        owned: np.ndarray,
        activations: str,
        options: LoadOptions,
    ):
        backend = cluster_backend()
        check_activations(activations, backend)
        count, config = int(owned.sum()), checkpoint.text_config
        scratch = 8 * CHUNK_TOKENS * checkpoint.top_k * config["hidden_size"]
        layers = checkpoint.expert_layers
        self.plan = split_budget(
            budget=options.memory_nbytes,
            slots=options.slots,
            base=resident(),
            dense=0,
            working=RUNTIME_NBYTES + scratch,
            layer_slot_nbytes=[layer.expert_nbytes for layer in layers.values()],
            num_experts=count,
            minimum=min(checkpoint.top_k + PREFILL_SLOTS, count),
        )
        self._owned = owned
        self._reader = reader_for(checkpoint, options, drive_of(checkpoint.path))
        self._switches = streaming_layers(
            checkpoint,
            self.plan.slots_per_layer,
            self._reader,
            backend,
            LayerHooks(),
            activations,
        )

    def answer(
        self, request: ExpertRequest, exchange: Exchange, lead: connections.Connection
    ) -> None:
        """Compute this machine's part of a request and send it, input by input."""
        switch = self._switches[request.layer]
        pairs, before = own_pairs(request, self._owned), (switch.stats.needed, switch.stats.loaded)
        failed = 0
        results: Iterator[np.ndarray] = iter(())
        try:
            if own := switch_inputs(request, pairs):
                results = iter([to_numpy(y)[0] for y in switch.start(own).finish()])
        except ReadError as e:
            failed = 1
            lead.send("error", text=str(e))
        counts = (switch.stats.needed - before[0], switch.stats.loaded - before[1], failed)
        for x, indices, chosen in zip(request.xs, request.indices, pairs, strict=True):
            y = np.zeros((indices.size, x.shape[1]), np.float32)
            if chosen.size and not failed:
                y[chosen] = next(results).reshape(chosen.size, -1)
            exchange.add_results(y, counts)
            counts = (0, 0, failed)

    def close(self) -> None:
        """End the reader's threads."""
        self._reader.close()
