"""Runs a sweep: measures text, tool calls, JSON and speed for each K and version of a model.

A point is one K of one version. Each result of a point is written down at once (`points.jsonl`, in
a directory that is named after the model and the settings), so that a sweep that was stopped
resumes after it. Only one model is in memory at a time.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.capabilities import chat_template
from ..checkpoint.checkpoint import Checkpoint, check_experts
from ..checkpoint.tokenizer import read_tokenizer
from ..errors import SettingError, SweepError
from ..files import disk_too_full, free_nbytes, write_bytes, write_json
from .cost import ROUNDS, measure_speeds, token_bytes
from .documents import EvalDocument, sample_answers, split_file
from .versions import OWN, Version

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ..models.streaming_moe import StreamingMoE

_MARGIN_NBYTES = 64 * 2**20

#: progress(what, total) -> a context manager whose value is called with the amount of work done.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Settings:
    """What a sweep measures at each point.

    Attributes:
        experts: the values of K.
        text: the text to compare on; None: answers of the exact model.
        tokens: number of predicted tokens.
        calls: number of tool calls to ask for, 0 for none.
        schemas: number of JSON answers to ask for, 0 for none.
        memory: see `flashmoe.options.LoadOptions`.
    """

    experts: tuple[int, ...]
    text: Path | None = None
    tokens: int = 2000
    calls: int = 24
    schemas: int = 12
    memory: str | int | None = None


class Sweep:
    """One sweep of a checkpoint.

    Args:
        checkpoint: the exact model.
        versions: from `flashmoe.sweep.versions.read_versions`.
        settings: what is measured.
        work: directory for versions and results; a sweep with the same settings uses them again.
        keep: whether versions stay there after they are measured.
        progress: shows progress.

    Raises:
        SettingError: the checkpoint or its files do not allow what the settings ask for.
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
        # Every point is compared with the exact one, so that one is always measured.
        self._own_requested = any(v.name == OWN for v in versions)
        own = [] if self._own_requested else [Version(OWN, checkpoint)]
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
        """Return the largest number of bytes that the sweep still adds to the disk."""
        sizes = [
            v.nbytes for v in self.versions if not (self._directory(v) / "config.json").is_file()
        ]
        made = sum(sizes) if self.keep else max(sizes, default=0)
        exact = self._exact_nbytes() if not self._exact.is_file() else 0
        return made + exact + (_MARGIN_NBYTES if made + exact else 0)

    def forecast_seconds(self) -> float | None:
        """Return how long this machine will take for what is still to measure, roughly.

        None where it cannot be told, see `flashmoe.sweep.forecast`.
        """
        from .forecast import Work, forecast_seconds

        self._points = self._read_journal()
        s, parts = self.settings, self._parts()
        work = []
        for version in self.versions:
            missing = {part: self._missing(version, part) for part in parts}
            exact = version.name == OWN and not self._exact.is_file()
            for k in self._experts(version):
                first = exact and k == self.checkpoint.top_k
                asked = s.calls * (k in missing.get("calls", ()))
                asked += s.schemas * (k in missing.get("schemas", ()))
                sampled = first and s.text is None and not self._documents_file.is_file()
                work.append(
                    Work(
                        k,
                        sampled=s.tokens * sampled,
                        texts=(k in missing["fidelity"]) + first,
                        answers=2 * asked,  # with the grammar and without it
                        speeds=k in missing.get("speed", ()),
                    )
                )
        return forecast_seconds(self.checkpoint, work, tokens=s.tokens, memory=s.memory)

    def free_nbytes(self) -> int:
        """Return the free bytes on the disk of the work directory."""
        return free_nbytes(self.home)

    def run(self) -> None:
        """Measure everything that has not been measured yet.

        Raises:
            SweepError: the disk has too little space, or cannot be written.
        """
        if (wanted := self.needed_nbytes()) > (free := self.free_nbytes()):
            way_out = "use --work on another disk, fewer --tokens or fewer --bits"
            raise SweepError(disk_too_full(self.home.parent, wanted, free, way_out))
        try:
            self.results.mkdir(parents=True, exist_ok=True)
            self._points = self._read_journal()
            if self.settings.text is not None:
                tokenizer = read_tokenizer(self.checkpoint)
                documents = split_file(self.settings.text, tokenizer, self.settings.tokens)
                self._save_documents(documents)
            for version in self.versions:
                self._measure(version)
        except OSError as e:
            raise SweepError(
                f"cannot write {e.filename or self.results} ({e.strerror}): fix that and run the "
                "same command again; finished points are kept"
            ) from e

    def points(self) -> list[dict]:
        """Return the measured points in the order of the settings."""
        order = [(v.key, k) for v in self.versions for k in self._experts(v)]
        return [self._points[key] for key in order if "fidelity" in self._points.get(key, {})]

    @property
    def whole(self) -> bool:
        """Whether all points are measured."""
        return all(self._missing(v, part) == [] for v in self.versions for part in self._parts())

    def _check(self) -> None:
        s = self.settings
        for k in s.experts:
            check_experts(k, self.checkpoint)
        if chat_template(self.checkpoint.path) is None and (s.text is None or s.calls or s.schemas):
            raise SettingError(
                f"{self.checkpoint.path} has no chat template, so it cannot answer questions: use "
                "--text FILE --calls 0 --schemas 0"
            )
        if s.text is not None and not s.text.is_file():
            raise SettingError(f"there is no file {s.text}: pass a UTF-8 text to --text")

    def _experts(self, version: Version) -> list[int]:
        if version.name != OWN:
            return list(self.settings.experts)
        asked = self.settings.experts if self._own_requested else ()
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
        from .fidelity import exact_logits_nbytes

        return exact_logits_nbytes(self.settings.tokens, self.checkpoint.text_config["vocab_size"])

    def _measure(self, version: Version) -> None:
        missing = {part: self._missing(version, part) for part in self._parts()}
        if not any(missing.values()):
            return
        directory = self._directory(version)
        if version.plan is None:
            checkpoint = version.write(directory)
        else:
            with self.progress(f"{version.name}: rounding", version.plan.work_units) as advance:
                checkpoint = version.write(directory, advance)
        for k in self._missing(version, "size"):
            needed = token_bytes(checkpoint, k)
            size = {"dense_bytes": needed.dense, "expert_bytes": needed.experts}
            self._record(version, k, "size", {"bits": checkpoint.expert_bits, **size})
        if missing["fidelity"]:
            self._measure_text(version, checkpoint, missing["fidelity"])
            _free_memory()
        if any(ks for part, ks in missing.items() if part != "fidelity"):
            self._measure_answers(version, checkpoint, missing)
            _free_memory()
        if not self.keep:
            version.discard(directory)

    def _measure_text(self, version: Version, checkpoint: Checkpoint, missing: list[int]) -> None:
        from ..models.loading import load
        from .fidelity import compare_with_exact, save_exact_logits

        model, tokenizer = load(checkpoint.path, memory=self.settings.memory)
        try:
            documents = self._documents(model, tokenizer)
            exact = version.name == OWN and not self._exact.is_file()
            steps = len(documents) * (len(missing) + exact)
            with self.progress(f"{version.name}: text", steps) as advance:
                if exact:
                    save_exact_logits(model, documents, self._exact, advance)
                for k in missing:
                    with model.pruned_to(k):
                        fidelity = compare_with_exact(model, documents, self._exact, advance)
                    result = asdict(fidelity) | {"perplexity": fidelity.perplexity}
                    self._record(version, k, "fidelity", result)
        finally:
            model.close()

    @property
    def _documents_file(self) -> Path:
        return self.results / "documents.json"

    def _documents(self, model: StreamingMoE, tokenizer: TokenizerWrapper) -> list[EvalDocument]:
        """Return the documents, which are stored because answers of a model are random."""
        if not self._documents_file.is_file():
            total = self.settings.tokens
            with self.progress("the exact model answers", total) as advance:
                self._save_documents(sample_answers(model, tokenizer, total=total, advance=advance))
        return [EvalDocument(**d) for d in json.loads(self._documents_file.read_text())]

    def _save_documents(self, documents: list[EvalDocument]) -> None:
        highest = max(max(d.tokens) for d in documents)
        if highest >= self.checkpoint.text_config["vocab_size"]:
            raise SettingError(
                f"the tokenizer of {self.checkpoint.path} gives the token {highest}, which the "
                "model does not have: it belongs to another model, download this one again"
            )
        write_json(self._documents_file, [asdict(d) for d in documents])

    def _measure_answers(
        self, version: Version, checkpoint: Checkpoint, missing: dict[str, list[int]]
    ) -> None:
        from ..engine import Engine
        from .pass_rates import call_tasks, measure_rate, schema_tasks

        s = self.settings
        tasks = {"calls": call_tasks()[: s.calls], "schemas": schema_tasks()[: s.schemas]}
        steps = sum(2 * len(tasks[part]) * len(missing.get(part, [])) for part in tasks)
        steps += ROUNDS * len(missing.get("speed", []))
        with (
            Engine(checkpoint.path, memory=s.memory, prompt_store=0) as engine,
            self.progress(f"{version.name}: answers", steps) as advance,
        ):
            if missing.get("speed"):
                for k, speed in measure_speeds(engine, missing["speed"], advance).items():
                    self._record(version, k, "speed", speed)
            for part, questions in tasks.items():
                for k in missing.get(part, []):
                    rates = {
                        name: asdict(
                            measure_rate(
                                engine,
                                questions,
                                experts=k,
                                constrain=constrain,
                                advance=advance,
                            )
                        )
                        for name, constrain in (("grammar", True), ("free", False))
                    }
                    self._record(version, k, part, rates)

    def _record(self, version: Version, k: int, part: str, result: dict) -> None:
        """Add a result to its point and to the journal."""
        point = self._points.setdefault((version.key, k), {"version": version.name, "experts": k})
        point[part] = result
        entry = {"key": version.key, "version": version.name, "experts": k}
        with open(self._journal, "a") as f:
            f.write(json.dumps(entry | {"part": part, "found": result}) + "\n")

    @property
    def _journal(self) -> Path:
        return self.results / "points.jsonl"

    def _read_journal(self) -> dict[tuple[str, int], dict]:
        points: dict[tuple[str, int], dict] = {}
        if not (self._journal.is_file() and self._exact.is_file()):
            return points
        text = self._journal.read_text()
        if not text.endswith("\n"):  # a run that was killed left a part of a line
            text = text[: text.rfind("\n") + 1]
            write_bytes(self._journal, text.encode())
        for line in text.splitlines():
            entry = json.loads(line)
            key = entry["key"], entry["experts"]
            point = points.setdefault(key, {"version": entry["version"], "experts": key[1]})
            point[entry["part"]] = entry["found"]
        return points


def _free_memory() -> None:
    """Free the memory of a model that nothing refers to, so that the next one can be planned."""
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
