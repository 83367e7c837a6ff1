"""A host of a cluster that is not the lead: it owns some experts of every layer, and computes them
for whoever sends rows. No dense weights, no prompt cache, no text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import ClusterError, FlashMoEError, ReadError
from ..memory import budget as memory_module
from ..memory.footprint import CHUNK_TOKENS, RUNTIME_NBYTES
from ..models.loading import PREFILL_SLOTS
from ..ops import backend as ops
from ..ops.activations import check_activations
from ..ops.arrays import host
from ..streaming.cuda import device_memory
from ..streaming.drives import drive_of
from ..streaming.reader import Reader
from ..streaming.slot_memory import SlotMemory
from ..streaming.switch_glu import LayerHooks, StreamingSwitchGLU
from . import connections as hosts
from .collectives import Exchange, Request, inputs, mine
from .lead import ADDRESS, exchange_for, fingerprint, group
from .placement import owners

log = logging.getLogger("flashmoe")


def serve(
    path: str | Path,
    *,
    memory: str | int | None = None,
    slots: int | None = None,
    depth: int | None = None,
    io: str | None = None,
    say: Callable[[str], None] = log.info,
) -> None:
    """Compute experts until the lead ends. Settings as of `flashmoe.load`, of this host.

    Raises:
        ClusterError: the lead is gone, or has another checkpoint.
    """
    of_all = group()
    rank, lost = of_all.rank(), []

    def lose(why: str) -> None:
        lost.append(why)
        hosts.cut(address for host in hosts.ring() for address in host)

    address, port, secret = _meet(of_all)
    line = hosts.join((address, port), rank, secret, lose)
    try:
        try:
            checkpoint = Checkpoint.open(path)
            plan = line.get()
            if plan is None:
                raise ClusterError("the lead is gone")
            if plan["fingerprint"] != fingerprint(checkpoint):
                raise ClusterError(
                    f"{checkpoint.path} is another checkpoint than the lead's: give all hosts the "
                    "same one"
                )
            owned = owners(checkpoint.num_experts, tuple(plan["shares"])) == rank
            experts = _Experts(checkpoint, owned, plan["activations"], memory, slots, depth, io)
        except FlashMoEError as e:
            line.send("error", text=str(e))
            raise
        text = f"{owned.sum()} of {owned.size} experts a layer, {experts.plan.describe()}"
        line.send("ready", text=text)
        say(f"host {rank}: {text}")
        try:
            _work(line, exchange_for(checkpoint, of_all), experts)
        except ClusterError:
            if not line.ended:
                raise ClusterError(f"the lead is gone ({', '.join(lost) or 'no word'})") from None
        finally:
            experts.close()
    finally:
        line.close()


def _meet(of_all: mx.distributed.Group) -> tuple[str, int, str]:
    """Where the lead listens, and the secret."""
    data = Exchange(of_all, 0, 0).sum(np.zeros(ADDRESS, np.float32))
    address, port, secret = data.astype(np.uint8).tobytes().decode().split()
    return address, int(port), secret


def _work(line: hosts.Line, exchange: Exchange, experts: _Experts) -> None:
    while (message := line.get()) is not None:
        if message["kind"] == "end":
            return
        while (request := exchange.receive()) is not None:
            experts.answer(request, exchange, line)
    raise ClusterError("the lead is gone")


class _Experts:
    """Those of this host, in their slots. owned: (experts,) bool."""

    def __init__(self, checkpoint, owned, activations, memory, slots, depth, io):
        module = ops.pick()
        check_activations(activations, module)
        count, config = int(owned.sum()), checkpoint.text_config
        scratch = 8 * CHUNK_TOKENS * checkpoint.top_k * config["hidden_size"]
        layers = checkpoint.expert_layers
        self.plan = memory_module.plan(
            budget=None if memory is None else memory_module.parse_size(memory),
            slots=slots,
            base=memory_module.resident(),
            dense=0,
            working=RUNTIME_NBYTES + scratch,
            layer_slot_nbytes=[layer.expert_nbytes for layer in layers.values()],
            num_experts=count,
            minimum=min(checkpoint.top_k + PREFILL_SLOTS, count),
        )
        drive = drive_of(checkpoint.path)
        self._reader = Reader(
            depth or drive.depth, checkpoint.identities, io or drive.io, drive.split
        )
        self._owned = owned
        device, watch = device_memory(), LayerHooks()
        self._switches = {}
        for index, layer in layers.items():
            bank = SlotMemory(
                layer,
                self.plan.slots_per_layer,
                on_gpu=ops.on_gpu(),
                device=device,
                activations=activations,
            )
            self._switches[index] = StreamingSwitchGLU(bank, self._reader, module, watch)

    def answer(self, request: Request, exchange: Exchange, line: hosts.Line) -> None:
        """Compute this host's part of a request and send it, piece by piece."""
        switch = self._switches[request.layer]
        pairs, before = mine(request, self._owned), (switch.stats.needed, switch.stats.loaded)
        failed, results = 0, iter(())
        try:
            if own := inputs(request, pairs):
                results = iter([host(y)[0] for y in switch.start(own).finish()])
        except ReadError as e:
            failed = 1
            line.send("error", text=str(e))
        notes = (switch.stats.needed - before[0], switch.stats.loaded - before[1], failed)
        for x, indices, chosen in zip(request.xs, request.indices, pairs, strict=True):
            y = np.zeros((indices.size, x.shape[1]), np.float32)
            if chosen.size and not failed:
                y[chosen] = next(results).reshape(chosen.size, -1)
            exchange.results(y, notes)
            notes = (0, 0, failed)

    def close(self) -> None:
        self._reader.close()
