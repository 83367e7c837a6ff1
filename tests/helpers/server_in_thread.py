"""Runs a server in a thread of this process, on a free port of the loopback interface."""

import socket
import threading
from collections.abc import Sequence
from contextlib import contextmanager

import httpx

from flashmoe.engine import Engine
from flashmoe.server import run as serving
from flashmoe.server.answering import Limits
from flashmoe.server.app import Server
from flashmoe.server.connections import ConnectionLimits
from flashmoe.server.served_model import ServedModel


@contextmanager
def serve(
    engine: Engine,
    *,
    name: str = "toy",
    limits: Limits | None = None,
    send_buffer: int | None = None,
    connections: ConnectionLimits | None = None,
    models: Sequence[ServedModel] = (),
    **options,
):
    """Yield the running `Server` with `server.url`, its address, and `server.connections`.

    Args:
        models: if none, one model of this name, with an alias.
        send_buffer: bytes that the operating system buffers until the client reads them.
    """
    served = ServedModel((name, "alias"), context=4096, thinks=True, created=7, path=engine.path)
    server = Server(engine, models or served, limits, **options)
    ready = threading.Event()
    with serving.bind_socket("127.0.0.1", 0) as bound:
        if send_buffer is not None:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        uvicorn = serving.make_uvicorn(server, ready.set, connections)
        server.connections = uvicorn.server_state.connections
        server.url = serving.api_url("127.0.0.1", bound)
        thread = threading.Thread(target=uvicorn.run, args=([bound],))
        thread.start()
        try:
            assert ready.wait(60)
            yield server
        finally:
            uvicorn.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def metrics(server: Server, **headers) -> dict[str, float]:
    """Return the values of /metrics by name and labels."""
    url = server.url.removesuffix("/v1") + "/metrics"
    text = httpx.get(url, headers=headers, timeout=120).text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
