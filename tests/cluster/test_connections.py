"""How hosts of a cluster know of each other, and who owns which experts: without MLX."""

import socket
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.cluster import connections as hosts
from flashmoe.cluster.placement import owners, parse_shares
from flashmoe.errors import ClusterError, SettingError


@given(
    st.integers(1, 600),
    st.lists(st.floats(0, 100), min_size=1, max_size=9).filter(lambda s: sum(s) > 0.01),
)
def test_share_is_off_by_an_expert(experts, shares):
    found = owners(experts, tuple(shares))
    part = np.array(shares) / sum(shares)
    for upto in (experts, experts // 2):
        counts = np.bincount(found[:upto], minlength=len(shares))
        assert counts.sum() == upto
        assert np.all(np.abs(counts - part * upto) <= len(shares))
    assert not np.bincount(found, minlength=len(shares))[part == 0].any()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("1,2,3", "are 3 numbers, and there are 2"),
        ("a,b", "must be equal, or"),
        ("0,0", "not all 0"),
    ]
    + [("nan,1", "not all 0"), ("-1,2", "0 or more"), ("", "must be equal")],
)
def test_shares_that_cannot_be_are_taken(text, wrong):
    with pytest.raises(SettingError, match=wrong):
        parse_shares(text, 2)
    assert parse_shares("equal", 2) == (1, 1)
    assert parse_shares("3,1.5", 2) == (3, 1.5)


def lines(monkeypatch, silence=0.6):
    """Both ends of a line, and what each lost."""
    monkeypatch.setattr(hosts, "BEAT", 0.1)
    monkeypatch.setattr(hosts, "SILENCE", silence)
    lost = {0: [], 1: []}
    with hosts.listen("127.0.0.1") as server:
        address = server.getsockname()
        joined = []
        joins = threading.Thread(
            target=lambda: joined.append(hosts.join(address, 1, "s", lost[1].append))
        )
        joins.start()
        found = hosts.accept(server, 1, "s", lambda rank, why: lost[0].append((rank, why)))
        joins.join()
    return found[1], joined[0], lost


def test_quiet_line_is_lost(monkeypatch):
    lead, host, lost = lines(monkeypatch)
    time.sleep(1)
    assert lost == {0: [], 1: []}
    host.send("ready", text="é")
    assert lead.get(5) == {"kind": "ready", "text": "é"}
    host.close()
    time.sleep(0.5)
    assert lost[0][0][0] == 1
    assert len(lost[0]) == 1
    assert lead.get(1) is None
    lead.close()


def test_silent_host_is_waited_for(monkeypatch):
    lead, host, lost = lines(monkeypatch)
    monkeypatch.setattr(host, "send", lambda *args, **more: None)
    time.sleep(1.5)
    assert lost[0] == [(1, "nothing was heard of it for 0.6 seconds")]
    for line in (lead, host):
        line.close()


def test_end_looks_like_a_loss(monkeypatch):
    lead, host, lost = lines(monkeypatch)
    lead.send("end")
    lead.close()
    assert host.get(5) == {"kind": "end"}
    time.sleep(0.5)
    assert host.ended
    assert lost == {0: [], 1: []}
    host.close()


@pytest.mark.parametrize("hello", [b"", b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1}\n', b"[1]\n"])
def test_stranger_joins(monkeypatch, hello):
    monkeypatch.setattr(hosts, "JOIN", 1.0)
    with hosts.listen("127.0.0.1") as server:

        def knock():
            with socket.create_connection(server.getsockname()) as stranger:
                stranger.sendall(hello)

        thread = threading.Thread(target=knock)
        thread.start()
        with pytest.raises(ClusterError, match=r"hosts \[1\] did not reach the lead within 1"):
            hosts.accept(server, 1, "secret", lambda *a: None)
        thread.join()


def test_cut_leaves_a_connection():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as one, socket.create_connection(address) as other:
            accepted = [server.accept()[0] for _ in range(2)]
            assert hosts.cut(["127.0.0.1:1"]) == 0
            # Both ends of both are here.
            assert hosts.cut([f"127.0.0.1:{address[1]}"]) == 4
            assert one.recv(1) == other.recv(1) == b""
            for connection in accepted:
                connection.close()
