"""A server that speaks the part of the hub's protocol that downloads use, with planned faults.

Large files (safetensors, tokenizer.json) are LFS files: as on the hub, their addresses redirect to
another host, which serves ranges. huggingface_hub reads HF_ENDPOINT when it is imported, so a
client of this server runs in its own process, with the variables of `Hub.environ`.
"""

import hashlib
import json
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"


@dataclass
class Fault:
    """What goes wrong when a file is sent.

    Attributes:
        stop: the connection is cut after this many bytes of an answer.
        hold: after this many bytes nothing more is sent, and the connection stays open.
        status, headers: an answer that is sent instead of the file.
        short: bytes that are missing at the end of the file; the Content-Length fits what is sent.
        corrupted: the last byte is another one.
        no_ranges: the whole file is sent, even if a range was asked for.
        pause: seconds to wait before each 64 KiB.
        times: how many answers have the fault; later ones are right.
    """

    stop: int | None = None
    hold: int | None = None
    status: int | None = None
    headers: dict = field(default_factory=dict)
    short: int = 0
    corrupted: bool = False
    no_ranges: bool = False
    pause: float = 0
    times: int = 10**9


class Hub:
    """A server of the repository owner/toy with the files of a directory.

    Attributes:
        faults: the faults by file name; "api" is the listing.
        requests: (name, first byte asked for) of each file that was sent.
        sent: bytes of all answers.
        listings: bodies of the next answers about the listing, instead of the right one.
        claimed: sizes by file name that the listing gives instead of the real ones.
        needs_token: the repository is gated.
        held: set when an answer has come to its `Fault.hold`.
    """

    repo = "owner/toy"

    def __init__(self, directory: Path):
        self.directory = directory
        self.faults: dict[str, Fault] = {}
        self.requests: list[tuple[str, int]] = []
        self.sent = 0
        self.listings: list[bytes] = []
        self.claimed: dict[str, int] = {}
        self.needs_token = False
        self.held = threading.Event()
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables that lead a client to this server."""
        return {
            "HF_ENDPOINT": f"http://localhost:{self.port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "localhost,127.0.0.1",
        }

    def content(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()

    def siblings(self) -> list[dict]:
        """Return the entries of the files in the listing of the repository."""
        files = []
        for path in sorted(p for p in self.directory.rglob("*") if p.is_file()):
            name, content = path.relative_to(self.directory).as_posix(), path.read_bytes()
            size = self.claimed.get(name, len(content))
            entry = {"rfilename": name, "size": size, "blobId": git_hash(content)}
            if is_lfs(name):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha, "size": size, "pointerSize": 134}
            files.append(entry)
        return files

    def listing(self) -> dict:
        """Return the listing of the repository."""
        return {"id": self.repo, "sha": COMMIT, "siblings": self.siblings()}

    def fault(self, name: str) -> Fault:
        """Return the fault of the next answer about a file, and count the answer."""
        planned = self.faults.get(name, Fault())
        if planned.times <= 0:
            return Fault()
        planned.times -= 1
        return planned


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", "tokenizer.json", ".bin"))


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/revision/([\w.-]+)", path):
                self._listing(*match.groups())
            elif match := re.fullmatch(rf"/{hub.repo}/resolve/{COMMIT}/(.+)", path):
                self._resolve(match[1])
            elif match := re.fullmatch(r"/lfs/(.+)", path):
                # The hub's storage is another host, which must not get the token.
                if self.headers["Authorization"]:
                    self._send(400, b"a token came here")
                else:
                    self._file(match[1])
            else:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

        def _listing(self, repo, revision):
            fault = hub.fault("api")
            if fault.status:
                self._send(fault.status, b"", fault.headers)
            elif repo != hub.repo:  # the hub's answer to clients that are not logged in
                self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", COMMIT):
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                body = hub.listings.pop(0) if hub.listings else json.dumps(hub.listing()).encode()
                self._send(200, body, {"Content-Type": "application/json"})

        def _resolve(self, name):
            if hub.needs_token and self.headers["Authorization"] != f"Bearer {TOKEN}":
                self._send(403, b"", {"X-Error-Code": "GatedRepo"})
                return
            if not is_lfs(name):
                self._file(name)
                return
            content = hub.content(name)
            headers = {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "Location": f"http://127.0.0.1:{hub.port}/lfs/{name}",
            }
            self._send(302, b"", headers)

        def _file(self, name):
            content, fault = hub.content(name), hub.fault(name)
            if fault.status:
                self._send(fault.status, b"", fault.headers)
                return
            etag = f'"{git_hash(content)}"'
            if fault.corrupted:
                content = content[:-1] + bytes([content[-1] ^ 1])
            content = content[: len(content) - fault.short]
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
            first, last = 0, len(content) - 1
            if asked and not fault.no_ranges:
                first, last = int(asked[1]), min(last, int(asked[2] or last))
            part = content[first : last + 1]
            headers = {"ETag": etag, "X-Repo-Commit": COMMIT}
            if len(part) < len(content):
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            if self.command == "GET":
                hub.requests.append((name, int(asked[1]) if asked else 0))
            self._send(206 if len(part) < len(content) else 200, part, headers, fault)

        def _send(self, status, body, headers=None, fault=None):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **(headers or {})}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "HEAD":
                return
            fault = fault or Fault()
            limit = min(n for n in (fault.stop, fault.hold, len(body)) if n is not None)
            for start in range(0, limit, 1 << 16):
                time.sleep(fault.pause)
                hub.sent += self.wfile.write(body[start : min(start + (1 << 16), limit)])
            if fault.hold is not None:
                hub.held.set()
                hub.closing.wait()
            if limit < len(body):
                self.close_connection = True

        def handle(self):
            with suppress(BrokenPipeError, ConnectionResetError):  # the client was killed
                super().handle()

    return Handler
