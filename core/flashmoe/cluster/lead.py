"""Lead a cluster: the experts are on several machines, each on its own disk and in its own slots.

The lead alone has the dense weights, and asks the workers for the results of experts layer by
layer. So routers, caches and samplers work as on one machine, and the sum over a token's experts is
made here in its usual order: on CPUs the answer equals that of one machine, bit for bit. For that,
workers send K results per token, not their sum.

Lives on the engine's thread.
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
from ..checkpoint.config import TENSOR_PREFIXES
from ..errors import ClusterError, ReadError, SettingError
from ..memory.footprint import CHUNK_TOKENS
from ..ops import backend as backends
from ..ops.arrays import to_numpy
from ..streaming.block import ExpertSwitch, SwitchStats
from ..streaming.compute import Backend
from ..streaming.switch_glu import StreamingSwitchGLU, are_separate_sequences
from . import connections
from .collectives import Exchange, ExpertRequest, own_pairs, switch_inputs
from .placement import owners, parse_shares

if TYPE_CHECKING:
    from ..models.streaming_moe import StreamingMoE

log = logging.getLogger("flashmoe")

#: Seconds for workers to open the checkpoint and allocate their memory.
LOAD_SECONDS = 600.0
#: Bytes of the lead's address and the secret, as one text.
ADDRESS_NBYTES = 128


def group() -> mx.distributed.Group:
    """Return MLX's group of all machines.

    Raises:
        ClusterError: this process was not started as one of several.
    """
    try:
        machines = mx.distributed.init(strict=True)
    except RuntimeError as e:
        raise ClusterError(f"start a cluster with mlx.launch on all of its machines: {e}") from e
    if machines.size() < 2:
        raise ClusterError("a cluster needs two machines or more: start it with mlx.launch")
    return machines


def cluster_backend() -> Backend:
    """Return the backend that all machines of a cluster compute with.

    flashmoe's own GPU kernels sum a token's experts in the launch that computes them, and a cluster
    needs the results one by one.
    """
    backend = backends.pick()
    return backends.pick("gather") if backend.name == "fused" else backend


def exchange_for(checkpoint: Checkpoint, group: mx.distributed.Group) -> Exchange:
    """Return the exchange for the experts of a checkpoint."""
    return Exchange(group, checkpoint.text_config["hidden_size"], checkpoint.top_k)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hash of the experts, which must be equal on all machines.

    It covers the layout and the first bytes of each tensor, and not the files' times as
    `Checkpoint.files_identity` does, since copies on other machines have other times.
    """
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
    """The workers, as the lead sees them.

    Args:
        shares: see `flashmoe.cluster.placement.parse_shares`.
        activations: of all machines.

    Attributes:
        held: how many experts of a layer the lead holds itself.
        backend: computes the experts of all machines.
        nbytes: bytes of the lead's memory that the exchange takes.
        remote_bytes: bytes that the workers have read.

    Raises:
        ClusterError: a worker does not connect, or has another checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, shares: str, activations: str):
        if not checkpoint.is_checked_type:
            # Workers know no model, and take every expert for SwiGLU without biases.
            raise SettingError(
                f"a cluster runs {', '.join(TENSOR_PREFIXES)}, and {checkpoint.path} is a "
                f"{checkpoint.model_type}: run it on one machine"
            )
        self._group = group()
        others = self._group.size() - 1
        split = parse_shares(shares, others + 1)
        self._owners = owners(checkpoint.num_experts, split)
        self.held = int((self._owners == 0).sum())
        if not self.held:
            raise SettingError(
                f"shares {shares!r} leave no expert to the lead: give it one or more"
            )
        config = checkpoint.text_config
        self.nbytes = 8 * CHUNK_TOKENS * checkpoint.top_k * config["hidden_size"]
        self.backend = cluster_backend()
        self.remote_bytes = 0
        self.exchange = exchange_for(checkpoint, self._group)
        self._workers: dict[int, connections.Connection] = {}
        self._lost: str | None = None
        self._awake = False
        self._owed: list[tuple[int, ...]] = []
        self._meet(others)
        plan = {"fingerprint": fingerprint(checkpoint), "shares": split}
        for worker in self._workers.values():
            worker.send("plan", activations=activations, **plan)
        for worker in self._workers.values():
            answer = worker.receive(LOAD_SECONDS)
            if answer is None or answer["kind"] != "ready":
                why = answer["text"] if answer else self._lost or "it does not answer"
                self.close()
                raise ClusterError(f"{worker.who}: {why}")
            log.info("%s: %s", worker.who, answer["text"])

    def join(self, model: StreamingMoE) -> None:
        """Make a loaded model ask all machines for its experts."""
        model.remote_bytes = lambda: self.remote_bytes
        for index, block in model.blocks.items():
            switch = block.switch_mlp
            assert isinstance(switch, StreamingSwitchGLU), "the model was just loaded"
            block.switch_mlp = ClusterSwitch(switch, self, index)

    @property
    def owned(self) -> np.ndarray:
        """The experts that the lead holds, (experts,) bool."""
        return self._owners == 0

    def send(self, request: ExpertRequest) -> None:
        """Send a request to all workers."""
        self._drain()
        if not self._awake:
            self._tell("work")
            self._awake = True
        self._checked(self.exchange.send, request)
        self._owed = [indices.shape for indices in request.indices]

    def add_results(self, own: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Add up the results of the next input of the request: see `Exchange.add_results`.

        Raises:
            ReadError: a worker could not read an expert.
        """
        self._owed.pop(0)
        results, counts = self._checked(self.exchange.add_results, own, (0, 0, 0))
        if counts[2]:
            raise ReadError(self._worker_error())
        return results, counts

    def rest(self) -> None:
        """Let the workers sleep until there is work again."""
        if self._awake and self._lost is None:
            self._drain()
            self._checked(self.exchange.rest)
            self._awake = False

    def close(self) -> None:
        """End the workers."""
        with suppress(ClusterError):
            self.rest()
        for worker in self._workers.values():
            with suppress(OSError):
                worker.send("end")
            worker.close()
        self._workers = {}
        self._lost = self._lost or "the cluster was closed"

    def _drain(self) -> None:
        """Receive what is left of a request that was abandoned: the workers send it in any case."""
        while self._owed:
            rows, k = self._owed[0]
            with suppress(ReadError):
                self.add_results(np.zeros((rows * k, self.exchange.hidden), np.float32))

    def _meet(self, count: int) -> None:
        ring = connections.ring()
        address = ring[0][0].rpartition(":")[0] if ring else socket.gethostbyname(os.uname()[1])
        secret = secrets.token_hex(16)
        with connections.listen(address) as server:
            text = f"{address} {server.getsockname()[1]} {secret}".encode().ljust(ADDRESS_NBYTES)
            self.exchange.sum(np.frombuffer(text, np.uint8).astype(np.float32))
            self._workers = connections.accept(server, count, secret, self._lose)

    def _lose(self, rank: int, why: str) -> None:
        """Cut the collectives' connections, so that what waits for a worker ends with an error.

        Called on a connection's thread.
        """
        self._lost = self._lost or f"worker {rank} is gone ({why})"
        connections.cut(address for machine in connections.ring() for address in machine)

    def _tell(self, kind: str) -> None:
        for worker in self._workers.values():
            try:
                worker.send(kind)
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
            for worker in self._workers.values():
                worker.receive(0.05)
        why = self._lost or "a worker is gone"
        return ClusterError(
            f"{why}: no answer can continue without its experts. Start all machines again"
        )

    def _worker_error(self) -> str:
        """Return the error text of the worker that failed."""
        for _ in range(50):
            for worker in self._workers.values():
                if (message := worker.receive(0.1)) is not None:
                    return f"{worker.who}: {message.get('text')}"
        return "a worker could not read an expert: see what it prints"


class ClusterSwitch(ExpertSwitch):
    """Takes the place of a `StreamingSwitchGLU` on the lead.

    Args:
        switch: the experts of that layer that the lead holds.
    """

    def __init__(self, switch: StreamingSwitchGLU, cluster: Cluster, layer: int):
        self.own = switch
        self.cluster = cluster
        self.layer = layer
        self.needed = self.loaded = 0

    @property
    def stats(self) -> SwitchStats:
        """Counts of all machines."""
        own = self.own.stats
        return SwitchStats(own.needed + self.needed, own.loaded + self.loaded)

    def start(self, inputs: Sequence[tuple[mx.array, mx.array]], look=np.array) -> ClusterCall:
        """Start the reads of a call on all machines, as `StreamingSwitchGLU.start` does."""
        return ClusterCall(self, inputs, look)


class ClusterCall:
    """One call of a ClusterSwitch, between its `start` and its `finish`."""

    def __init__(self, switch: ClusterSwitch, inputs, look):
        mx.eval(inputs)
        self._switch = switch
        self._dtype = inputs[0][0].dtype
        width = inputs[0][0].shape[-1]
        xs = [to_numpy(x)[0].reshape(-1, width) for x, _ in inputs]
        chosen = [look(i).astype(np.int64).reshape(-1, i.shape[-1]) for _, i in inputs]
        separate = [are_separate_sequences(i) for _, i in inputs]
        self._request = ExpertRequest(switch.layer, xs, chosen, self._dtype, separate)
        switch.cluster.send(self._request)
        self._pairs = own_pairs(self._request, switch.cluster.owned)
        own = switch_inputs(self._request, self._pairs)
        self._call = switch.own.start(own) if own else None

    def finish(
        self,
        scores: Sequence[mx.array] | None = None,
        extras: Sequence[dict[str, Any]] | None = None,
    ) -> Iterator[mx.array]:
        """Yield each input's sum weighted by its scores (..., top_k), without extras."""
        assert scores is not None, "a cluster gives weighted sums only"
        switch, request = self._switch, self._request
        own = iter(() if self._call is None else self._call.finish())
        results = []
        for x, indices, pairs in zip(request.xs, request.indices, self._pairs, strict=True):
            y = np.zeros((indices.size, x.shape[1]), np.float32)
            if pairs.size:
                y[pairs] = to_numpy(next(own))[0].reshape(pairs.size, -1)
            y, (needed, loaded, _) = switch.cluster.add_results(y)
            switch.needed += needed
            switch.loaded += loaded
            switch.cluster.remote_bytes += loaded * switch.own.expert_nbytes
            results.append(y.reshape(*indices.shape, -1))
        for result, s in zip(results, scores, strict=True):
            array = mx.array(result).astype(self._dtype)
            out = switch.own.weighted_sum(array, s.reshape(-1, s.shape[-1]))
            yield out.reshape(*s.shape[:-1], -1)
