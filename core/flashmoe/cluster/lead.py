"""The lead of a cluster: its experts are on several hosts, each on its own disk and in its own
slots. Lives on the engine's thread.

The lead alone has the dense weights, and asks the hosts for the experts' results layer by layer. So
routers, caches and samplers are those of one machine, and the sum over a token's experts is made
here in its usual order: the answer is that of one machine, bit for bit, on a CPU. What hosts send
is K rows a token for that, not their sum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import ClusterError, ReadError, SettingError
from ..memory.footprint import CHUNK_TOKENS
from ..ops import backend as backends
from ..ops.arrays import to_numpy
from ..streaming.block import ExpertSwitch, SwitchStats
from ..streaming.compute import Backend
from ..streaming.switch_glu import StreamingSwitchGLU, are_separate_sequences
from . import connections as hosts
from .collectives import Exchange, Request, inputs, mine
from .placement import owners, parse_shares

if TYPE_CHECKING:
    from ..models.qwen_moe import StreamingMoE

log = logging.getLogger("flashmoe")

#: Seconds for hosts to open the checkpoint and take their memory.
LOAD = 600.0
#: Bytes of the address and the secret, as one text.
ADDRESS = 128


def group() -> mx.distributed.Group:
    """MLX's group of all hosts.

    Raises:
        ClusterError: this process was not started as one of several.
    """
    try:
        found = mx.distributed.init(strict=True)
    except RuntimeError as e:
        raise ClusterError(f"a cluster is started by mlx.launch on all of its hosts: {e}") from e
    if found.size() < 2:
        raise ClusterError("a cluster needs two hosts or more: start it by mlx.launch")
    return found


def cluster_backend() -> Backend:
    """Return the backend that all machines of a cluster compute with.

    flashmoe's own GPU kernels sum a token's experts in the launch that computes them, and a cluster
    needs the results one by one.
    """
    backend = backends.pick()
    return backends.pick("gather") if backend.name == "fused" else backend


def exchange_for(checkpoint: Checkpoint, group: mx.distributed.Group) -> Exchange:
    return Exchange(group, checkpoint.text_config["hidden_size"], checkpoint.top_k)


def fingerprint(checkpoint: Checkpoint) -> str:
    """What all hosts have to have in common: the experts. A part of each tensor is read."""
    digest = hashlib.sha256()
    for layer in checkpoint.expert_layers.values():
        for part in layer.parts:
            facts = [layer.layer, layer.num_experts, part.projection, part.part, part.dtype]
            digest.update(json.dumps([*facts, part.shape]).encode())
            with part.file.open("rb") as file:
                file.seek(part.start)
                digest.update(file.read(min(part.nbytes, 4096)))
    return digest.hexdigest()


class Cluster:
    """The other hosts.

    Args:
        shares: see `flashmoe.cluster.placement.parse_shares`.

    Attributes:
        held: how many experts of a layer are the lead's own.
        backend: computes the experts of all machines.
        nbytes: what it takes of the lead's memory.
        elsewhere: bytes that the other hosts have read.

    Raises:
        ClusterError: a host does not come, or does not fit.
    """

    def __init__(self, checkpoint: Checkpoint, shares: str, activations: str):
        self._group = group()
        others = self._group.size() - 1
        split = parse_shares(shares, others + 1)
        self._owners = owners(checkpoint.num_experts, split)
        self.held = int((self._owners == 0).sum())
        if not self.held:
            raise SettingError(f"shares {shares!r} leave the lead no expert: give it one or more")
        config = checkpoint.text_config
        self.nbytes = 8 * CHUNK_TOKENS * checkpoint.top_k * config["hidden_size"]
        self.backend = cluster_backend()
        self.elsewhere = 0
        self.exchange = exchange_for(checkpoint, self._group)
        self._lines: dict[int, hosts.Line] = {}
        self._lost: str | None = None
        self._awake = False
        self._owed: list[tuple[int, ...]] = []
        self._meet(others)
        plan = {"fingerprint": fingerprint(checkpoint), "shares": split}
        for line in self._lines.values():
            line.send("plan", activations=activations, **plan)
        for line in self._lines.values():
            answer = line.get(LOAD)
            if answer is None or answer["kind"] != "ready":
                why = answer["text"] if answer else self._lost or "it does not answer"
                self.close()
                raise ClusterError(f"{line.who}: {why}")
            log.info("%s: %s", line.who, answer["text"])

    def join(self, model: StreamingMoE) -> None:
        """Let a loaded model ask all hosts for its experts."""
        model.remote_bytes = lambda: self.elsewhere
        for index, block in model.blocks.items():
            block.switch_mlp = ClusterSwitch(block.switch_mlp, self, index)

    @property
    def owned(self) -> np.ndarray:
        """(experts,) bool: those of the lead."""
        return self._owners == 0

    def ask(self, request: Request) -> None:
        """Send a request to all hosts."""
        self._settle()
        if not self._awake:
            self._tell("work")
            self._awake = True
        self._checked(self.exchange.send, request)
        self._owed = [indices.shape for indices in request.indices]

    def results(self, own: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Of the next piece of the request: see `Exchange.results`.

        Raises:
            ReadError: a host could not read an expert.
        """
        self._owed.pop(0)
        found, notes = self._checked(self.exchange.results, own, (0, 0, 0))
        if notes[2]:
            raise ReadError(self._error())
        return found, notes

    def rest(self) -> None:
        """Let the hosts sleep until there is work again."""
        if self._awake and self._lost is None:
            self._settle()
            self._checked(self.exchange.rest)
            self._awake = False

    def close(self) -> None:
        """Let the hosts end."""
        with suppress(ClusterError):
            self.rest()
        for line in self._lines.values():
            with suppress(OSError):
                line.send("end")
            line.close()
        self._lines = {}
        self._lost = self._lost or "the cluster was closed"

    def _settle(self) -> None:
        """Take what is owed of a request that was left: the hosts send it in any case."""
        while self._owed:
            rows, k = self._owed[0]
            with suppress(ReadError):
                self.results(np.zeros((rows * k, self.exchange.hidden), np.float32))

    def _meet(self, count: int) -> None:
        ring = hosts.ring()
        address = ring[0][0].rpartition(":")[0] if ring else socket.gethostbyname(os.uname()[1])
        secret = secrets.token_hex(16)
        with hosts.listen(address) as server:
            text = f"{address} {server.getsockname()[1]} {secret}".encode().ljust(ADDRESS)
            self.exchange.sum(np.frombuffer(text, np.uint8).astype(np.float32))
            self._lines = hosts.accept(server, count, secret, self._lose)

    def _lose(self, rank: int, why: str) -> None:
        """Called on a line's thread. What waits for the hosts ends with an error."""
        self._lost = self._lost or f"host {rank} is gone ({why})"
        hosts.cut(address for host in hosts.ring() for address in host)

    def _tell(self, kind: str) -> None:
        for line in self._lines.values():
            try:
                line.send(kind)
            except OSError as e:
                raise self._gone() from e

    def _checked(self, call, *args):
        if self._lost is not None:
            raise self._gone()
        try:
            return call(*args)
        except ClusterError as e:
            raise self._gone() from e

    def _gone(self) -> ClusterError:
        deadline = monotonic() + 1
        while self._lost is None and monotonic() < deadline:
            for line in self._lines.values():
                line.get(0.05)
        why = self._lost or "a host is gone"
        return ClusterError(f"{why}: no answer can go on without its experts; start all hosts anew")

    def _error(self) -> str:
        """What a host that failed says."""
        for _ in range(50):
            for line in self._lines.values():
                if (message := line.get(0.1)) is not None:
                    return f"{line.who}: {message.get('text')}"
        return "a host could not read an expert: see what it says"


class ClusterSwitch(ExpertSwitch):
    """Takes the place of a `StreamingSwitchGLU` on the lead.

    Args:
        switch: the lead's own experts of that layer.
    """

    def __init__(self, switch: StreamingSwitchGLU, cluster: Cluster, layer: int):
        self.own = switch
        self.cluster = cluster
        self.layer = layer
        self.needed = self.loaded = 0

    @property
    def stats(self) -> SwitchStats:
        """Of all hosts."""
        own = self.own.stats
        return SwitchStats(own.needed + self.needed, own.loaded + self.loaded)

    def start(self, inputs: Sequence[tuple[mx.array, mx.array]], look=np.array) -> ClusterCall:
        """As `StreamingSwitchGLU.start`, on all hosts."""
        return ClusterCall(self, inputs, look)


class ClusterCall:
    """One call, between its `start` and its `finish`."""

    def __init__(self, switch: ClusterSwitch, inputs_, look):
        mx.eval(inputs_)
        self._switch = switch
        self._dtype = inputs_[0][0].dtype
        width = inputs_[0][0].shape[-1]
        xs = [to_numpy(x)[0].reshape(-1, width) for x, _ in inputs_]
        chosen = [look(i).astype(np.int64).reshape(-1, i.shape[-1]) for _, i in inputs_]
        alone = [are_separate_sequences(i) for _, i in inputs_]
        self._request = Request(switch.layer, xs, chosen, self._dtype, alone)
        switch.cluster.ask(self._request)
        self._pairs = mine(self._request, switch.cluster.owned)
        own = inputs(self._request, self._pairs)
        self._call = switch.own.start(own) if own else None

    def finish(
        self, scores: Sequence[mx.array], extras: Sequence[dict[str, Any]] | None = None
    ) -> Iterator[mx.array]:
        """As `flashmoe.streaming.switch_glu.Call.finish`, with scores and without extras."""
        switch, request = self._switch, self._request
        own = iter(() if self._call is None else self._call.finish())
        found = []
        for x, indices, pairs in zip(request.xs, request.indices, self._pairs, strict=True):
            y = np.zeros((indices.size, x.shape[1]), np.float32)
            if pairs.size:
                y[pairs] = to_numpy(next(own))[0].reshape(pairs.size, -1)
            y, (needed, loaded, _) = switch.cluster.results(y)
            switch.needed += needed
            switch.loaded += loaded
            switch.cluster.elsewhere += loaded * switch.own.expert_nbytes
            found.append(y.reshape(*indices.shape, -1))
        for y, s in zip(found, scores, strict=True):
            y = mx.array(y).astype(self._dtype)
            out = switch.own.weighted_sum(y, s.reshape(-1, s.shape[-1]))
            yield out.reshape(*s.shape[:-1], -1)
