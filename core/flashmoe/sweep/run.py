"""Measures what pruning the router (K) and fewer bits cost: text, tool calls, JSON, speed.

A point is one K of one version. What was measured of it is written down at once, so that a sweep
which was ended goes on behind it: `points.jsonl`, in a directory that is named after the model and
what is asked of it. One model is in memory at a time.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..checkpoint.capabilities import chat_template
from ..checkpoint.checkpoint import Checkpoint, check_experts
from ..errors import SettingError, SweepError
from ..files import disk_too_full, free_nbytes, write_bytes, write_json
from .cost import ROUNDS, needed, speeds
from .documents import Document, own_answers, windows
from .versions import OWN, Version

_MARGIN_NBYTES = 64 * 2**20

#: progress(what, total) -> a context whose value is told of work done.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Settings:
    """experts: the values of K. text: a file; None: the exact model's own answers. tokens:
    predicted ones. calls, schemas: answers of each kind at each point, 0 for none. memory: see
    `flashmoe.load`."""

    experts: tuple[int, ...]
    text: Path | None = None
    tokens: int = 2000
    calls: int = 24
    schemas: int = 12
    memory: str | int | None = None


class Sweep:
    """One sweep of a checkpoint.

    Args:
        versions: from `read_versions`.
        work: where files are kept; they are used again by a sweep of the same.
        keep: False: versions are removed once they are measured.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        versions: list[Version],
        settings: Settings,
        work: Path,
        *,
        keep: bool,
        progress: Progress,
    ):
        self.checkpoint = checkpoint
        # All is held against the exact point, so that one is always measured.
        self._own_asked = any(v.name == OWN for v in versions)
        own = [] if self._own_asked else [Version(OWN, checkpoint)]
        self.versions = [*own, *versions]
        self.settings = settings
        self.keep = keep
        self.progress = progress
        self._check()
        self.home = work / f"{checkpoint.path.absolute().name}-{checkpoint.files_identity[:12]}"
        text = settings.text and hashlib.sha256(settings.text.read_bytes()).hexdigest()
        asked = _hash([text, settings.tokens, settings.calls, settings.schemas])
        self.results = self.home / f"sweep-{asked}"
        self._exact = self.results / "exact.f32"
        self._points: dict[tuple[str, int], dict] = {}

    def needed_nbytes(self) -> int:
        """Bytes on disk that a whole sweep takes at its most, and that are not there yet."""
        sizes = [
            v.nbytes for v in self.versions if not (self._directory(v) / "config.json").is_file()
        ]
        made = sum(sizes) if self.keep else max(sizes, default=0)
        exact = self._exact_nbytes() if not self._exact.is_file() else 0
        return made + exact + (_MARGIN_NBYTES if made + exact else 0)

    def free_nbytes(self) -> int:
        return free_nbytes(self.home)

    def run(self) -> None:
        """Measure all that has not been measured.

        Raises:
            SweepError: the disk has too little room, or does not take what is written.
        """
        if (wanted := self.needed_nbytes()) > (free := self.free_nbytes()):
            way_out = "give --work on another disk, fewer --tokens or fewer --bits"
            raise SweepError(disk_too_full(self.home.parent, wanted, free, way_out))
        try:
            self.results.mkdir(parents=True, exist_ok=True)
            self._points = self._read()
            if self.settings.text is not None:
                self._keep_documents(self._windows())
            for version in self.versions:
                self._measure(version)
        except OSError as e:
            raise SweepError(
                f"cannot write {e.filename or self.results}: {e.strerror}. Mend that, and run the "
                "same command again"
            ) from e

    def points(self) -> list[dict]:
        """What was measured, of each point in the order in which it was asked for."""
        order = [(v.key, k) for v in self.versions for k in self._experts(v)]
        return [self._points[key] for key in order if "fidelity" in self._points.get(key, {})]

    @property
    def whole(self) -> bool:
        return all(self._missing(v, part) == [] for v in self.versions for part in self._parts())

    def _check(self) -> None:
        s = self.settings
        for k in s.experts:
            check_experts(k, self.checkpoint)
        if chat_template(self.checkpoint.path) is None and (s.text is None or s.calls or s.schemas):
            raise SettingError(
                f"{self.checkpoint.path} has no chat template, so it answers no questions: give "
                "--text FILE --calls 0 --schemas 0"
            )
        if s.text is not None and not s.text.is_file():
            raise SettingError(f"there is no file {s.text}: give a UTF-8 text for --text")

    def _experts(self, version: Version) -> list[int]:
        if version.name != OWN:
            return list(self.settings.experts)
        asked = self.settings.experts if self._own_asked else ()
        return list(dict.fromkeys([self.checkpoint.top_k, *asked]))

    def _parts(self) -> list[str]:
        s = self.settings
        chats = chat_template(self.checkpoint.path) is not None
        wanted = {"fidelity": True, "calls": s.calls, "schemas": s.schemas, "speed": chats}
        return [part for part, yes in wanted.items() if yes]

    def _missing(self, version: Version, part: str) -> list[int]:
        return [
            k for k in self._experts(version) if part not in self._points.get((version.key, k), {})
        ]

    def _directory(self, version: Version) -> Path:
        return self.home / f"bits-{version.name.replace('/', '-')}"

    def _exact_nbytes(self) -> int:
        from .fidelity import exact_nbytes

        return exact_nbytes(self.settings.tokens, self.checkpoint.text_config["vocab_size"])

    def _measure(self, version: Version) -> None:
        missing = {part: self._missing(version, part) for part in self._parts()}
        if not any(missing.values()):
            return
        directory = self._directory(version)
        checkpoint = version.checkpoint
        if version.plan is not None:
            work = sum(part.work for part in version.plan.parts)
            with self.progress(f"{version.name}: rounding", work) as advance:
                checkpoint = version.make(directory, advance)
        for k in self._missing(version, "size"):
            found = needed(checkpoint, k)
            sizes = {"dense_bytes": found.dense, "expert_bytes": found.experts}
            self._note(version, k, "size", {"bits": checkpoint.expert_bits, **sizes})
        if missing["fidelity"]:
            self._text(version, checkpoint, missing["fidelity"])
            _free()
        if any(ks for part, ks in missing.items() if part != "fidelity"):
            self._answers(version, checkpoint, missing)
            _free()
        if not self.keep:
            version.discard(directory)

    def _text(self, version: Version, checkpoint: Checkpoint, missing: list[int]) -> None:
        from ..models.loading import load
        from .fidelity import compare, keep_exact

        model, tokenizer = load(checkpoint.path, memory=self.settings.memory)
        try:
            documents = self._documents(model, tokenizer)
            exact = version.name == OWN and not self._exact.is_file()
            steps = len(documents) * (len(missing) + exact)
            with self.progress(f"{version.name}: text", steps) as advance:
                if exact:
                    keep_exact(model, documents, self._exact, advance)
                for k in missing:
                    with model.pruned_to(k):
                        found = compare(model, documents, self._exact, advance)
                    as_plain = asdict(found) | {"perplexity": found.perplexity}
                    self._note(version, k, "fidelity", as_plain)
        finally:
            model.close()

    @property
    def _documents_file(self) -> Path:
        return self.results / "documents.json"

    def _documents(self, model, tokenizer) -> list[Document]:
        """Written down, since those that a model answers are drawn."""
        if not self._documents_file.is_file():
            total = self.settings.tokens
            with self.progress("the exact model answers", total) as advance:
                self._keep_documents(own_answers(model, tokenizer, total=total, advance=advance))
        return [Document(**d) for d in json.loads(self._documents_file.read_text())]

    def _windows(self) -> list[Document]:
        from ..checkpoint.tokenizer import read_tokenizer

        tokenizer = read_tokenizer(self.checkpoint)
        return windows(self.settings.text, tokenizer, self.settings.tokens)

    def _keep_documents(self, documents: list[Document]) -> None:
        highest = max(max(d.tokens) for d in documents)
        if highest >= self.checkpoint.text_config["vocab_size"]:
            raise SettingError(
                f"the tokenizer of {self.checkpoint.path} gives {highest}: it is another's"
            )
        write_json(self._documents_file, [asdict(d) for d in documents])

    def _answers(self, version: Version, checkpoint: Checkpoint, missing: dict) -> None:
        from ..engine import Engine
        from .pass_rates import call_tasks, rate, schema_tasks

        s = self.settings
        tasks = {"calls": call_tasks()[: s.calls], "schemas": schema_tasks()[: s.schemas]}
        steps = sum(2 * len(tasks[part]) * len(missing.get(part, [])) for part in tasks)
        steps += ROUNDS * len(missing.get("speed", []))
        with (
            Engine(checkpoint.path, memory=s.memory, prompt_store=0) as engine,
            self.progress(f"{version.name}: answers", steps) as advance,
        ):
            if missing.get("speed"):
                for k, found in speeds(engine, missing["speed"], advance).items():
                    self._note(version, k, "speed", found)
            for part, asked in tasks.items():
                for k in missing.get(part, []):
                    both = {
                        name: asdict(
                            rate(engine, asked, experts=k, constrain=constrain, advance=advance)
                        )
                        for name, constrain in (("grammar", True), ("free", False))
                    }
                    self._note(version, k, part, both)

    def _note(self, version: Version, k: int, part: str, found: dict) -> None:
        point = self._points.setdefault((version.key, k), {"version": version.name, "experts": k})
        point[part] = found
        noted = {"key": version.key, "version": version.name, "experts": k}
        with open(self._journal, "a") as f:
            f.write(json.dumps(noted | {"part": part, "found": found}) + "\n")

    @property
    def _journal(self) -> Path:
        return self.results / "points.jsonl"

    def _read(self) -> dict[tuple[str, int], dict]:
        found: dict[tuple[str, int], dict] = {}
        if not (self._journal.is_file() and self._exact.is_file()):
            return found
        text = self._journal.read_text()
        if not text.endswith("\n"):  # the last line of a run that was killed
            text = text[: text.rfind("\n") + 1]
            write_bytes(self._journal, text.encode())
        for line in text.splitlines():
            noted = json.loads(line)
            key = noted["key"], noted["experts"]
            point = found.setdefault(key, {"version": noted["version"], "experts": key[1]})
            point[noted["part"]] = noted["found"]
        return found


def _free() -> None:
    """Give back the memory of a model that nothing refers to: the next one is planned for it."""
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()


def _hash(what) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
