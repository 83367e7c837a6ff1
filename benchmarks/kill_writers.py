"""Kill processes that write with kill -9, again and again, and look at what they leave.

    python benchmarks/kill_writers.py [--kills 50] [--only NAME ...] [--seed 1]

Each writer is started, killed at a random moment while it writes, and started again, which resumes
or begins anew as a user would. Afterwards it may end, and its result must be right.

    prompts     PromptStore.put, entry after entry, as the engine stores conversations
    register    registry.add, name after name
    quantize    flashmoe quantize flashmoe-demo, in ten shards
    sweep       flashmoe sweep flashmoe-demo, in turn with --work and in a temporary directory
    download    flashmoe download, from a server in this process

The results by writer:

    killed      processes that were killed before they had ended
    ended       processes that had ended before
    whole       entries, names or files that were looked at, and were right
    wrong       those that were corrupt, lost, or other than without kills
    left        temporary files and directories right after a kill, in sum
    stayed      those that were still there after the next start

The last line is JSON; the exit status is 1 if anything was wrong or stayed.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, KVCache

from flashmoe.catalog import DEMO, find
from flashmoe.generation.prompt_cache import PromptStore, entry_name
from flashmoe.hub import registry

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from hub_server import Hub  # noqa: E402

FLASHMOE = str(Path(sys.executable).parent / "flashmoe")
#: What names of temporary files begin or end with.
TEMPORARY = (".partial", ".incomplete")


class Trial:
    """A writer with directories of its own.

    Attributes:
        environ: the environment of its processes.
        counts: the results.
    """

    def __init__(self, root: Path, rng: random.Random):
        self.root, self.rng, self.counts = root, rng, Counter()
        names = {"FLASHMOE_CONFIG": "config", "FLASHMOE_CACHE": "prompts", "TMPDIR": "tmp"}
        self.environ = os.environ | {k: str(root / v) for k, v in names.items()}
        self.environ["HF_HOME"] = str(root / "hub")
        (root / "tmp").mkdir()

    def kill(self, command: list[str], begun: Callable[[], bool], seconds: float) -> str:
        """Start a process, and kill it within so many seconds after it has begun to write.

        Returns:
            What it printed.
        """
        with open(self.root / "printed", "w+") as out:
            process = subprocess.Popen(
                command, env=self.environ, stdout=out, stderr=subprocess.STDOUT
            )
            while process.poll() is None and not begun():
                time.sleep(0.002)
            time.sleep(self.rng.random() * seconds)
            self.counts["ended" if process.poll() is not None else "killed"] += 1
            process.kill()
            process.wait()
            out.seek(0)
            return out.read()

    def complete(self, command: list[str]) -> str:
        """Run a process to its end, and return its standard output."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{command} failed: {done.stderr}")
        return done.stdout

    def check(self, right: bool) -> None:
        self.counts["whole" if right else "wrong"] += 1

    def temporary(self) -> set[Path]:
        """Return the temporary files and directories that there are now."""
        found = set((self.root / "tmp").glob("flashmoe-*"))
        for path in self.root.rglob("*"):
            hidden = path.name.startswith((".models-", ".drives-")) or (
                path.parent.name == "prompts" and path.name.startswith(".")
            )
            if hidden or path.name.endswith(TEMPORARY):
                found.add(path)
        return found

    def compare_left(self, start: Callable[[], None]) -> None:
        """Count what is left before and after the next start."""
        before = self.temporary()
        self.counts["left"] += len(before)
        start()
        self.counts["stayed"] += len(before & self.temporary())


PROMPTS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kill_writers import entry, store
store = store(Path(sys.argv[2]))
for i in range(int(sys.argv[3]), 10**6):
    store.put(*entry(i))
    print(i, flush=True)
"""


def entry(number: int) -> tuple[str, list]:
    """Return the name and the state of an entry of some megabytes."""
    recurrent, keys = ArraysCache(size=2), KVCache()
    recurrent[0], recurrent[1] = mx.full((1, 300_000), number / 7), mx.zeros((1, 3))
    shape = (1, 2, 256, 256)
    keys.update_and_fetch(mx.full(shape, number / 3), mx.full(shape, number))
    mx.eval(recurrent.state, keys.state)
    return entry_name("kill_writers", [number]), [recurrent, keys]


def store(directory: Path) -> PromptStore:
    return PromptStore(directory, 40 * 10**6)


def prompts(trial: Trial, kills: int) -> None:
    directory, number = trial.root / "prompts", 0
    code = [sys.executable, "-c", PROMPTS, str(Path(__file__).parent), str(directory)]
    for _ in range(kills):
        trial.kill([*code, str(number)], lambda: (trial.root / "printed").stat().st_size > 0, 0.3)
        trial.compare_left(lambda: store(directory))
        number += 1000
    kept = store(directory)
    numbers = range(kills * 1000)
    names = {entry_name("kill_writers", [i]): i for i in numbers}
    for stored in kept.entries():
        number = names[stored.path.stem]
        name, expected = entry(number)
        found = kept.get(name, [ArraysCache(size=2), KVCache()])
        trial.check(found is not None and _same(found, expected))


def _same(a: list, b: list) -> bool:
    pairs = zip(tree_flatten([c.state for c in a]), tree_flatten([c.state for c in b]), strict=True)
    return all(
        name == other and (x is y or mx.array_equal(x, y).item())  # None: an empty part
        for (name, x), (other, y) in pairs
    )


REGISTER = """
import sys
from flashmoe.catalog import DEMO, find
from flashmoe.hub import registry
for i in range(int(sys.argv[1]), 10**6):
    registry.add(f"model-{i % 40}", find(DEMO), (f"alias-{i}",))
    print(i, flush=True)
"""


def register(trial: Trial, kills: int) -> None:
    os.environ["FLASHMOE_CONFIG"] = trial.environ["FLASHMOE_CONFIG"]
    for n in range(kills):
        code = [sys.executable, "-c", REGISTER, str(n * 1000)]
        begun = lambda: (trial.root / "printed").stat().st_size > 0  # noqa: E731
        lines = trial.kill(code, begun, 0.2).splitlines()
        trial.compare_left(lambda: trial.complete([FLASHMOE, "list", "--json"]))
        entries = json.loads(registry.file().read_text())["models"]
        for line in lines[-40:]:
            number = int(line)
            # The killed process may have written the next entry without having said so.
            alias = entries[f"model-{number % 40}"]["aliases"][0]
            trial.check(alias in (f"alias-{number}", f"alias-{number + 40}"))


def digests(directory: Path) -> dict[str, str]:
    """Return the hashes of the files of a directory by their names."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.is_file()
    }


def quantize(trial: Trial, kills: int) -> None:
    def command(to: Path) -> list[str]:
        return [FLASHMOE, "quantize", DEMO, str(to), "--bits", "3", "--shard-size", "2500kB"]

    whole, out = trial.root / "whole", trial.root / "out"
    trial.complete(command(whole))
    for _ in range(kills):
        trial.kill(command(out), (out / ".quantize" / "settings.json").exists, 1.0)
        trial.counts["left"] += len(trial.temporary())
        if (out / "config.json").exists() and not (out / ".quantize").exists():
            trial.check(digests(out) == digests(whole))
            subprocess.run(["rm", "-r", str(out)], check=True)
    trial.complete(command(out))
    for name, digest in digests(whole).items():
        trial.check(digests(out).get(name) == digest)
    trial.counts["stayed"] += len(trial.temporary()) + (out / ".quantize").exists()


def sweep(trial: Trial, kills: int) -> None:
    text, work = trial.root / "text", trial.root / "work"
    text.write_text("The cat sat by the sea. It asked a friend what bread is made of. " * 60)
    common = [FLASHMOE, "sweep", DEMO, "--experts", "10,4", "--bits", "own", "--text", str(text)]
    common += ["--tokens", "500", "--calls", "0", "--schemas", "0", "--json"]
    resumed = [*common, "--work", str(work)]

    def points(printed: str) -> list:
        found = json.loads(printed)["points"]
        return [{k: v for k, v in point.items() if k not in UNSTEADY} for point in found]

    whole = points(trial.complete(common))
    for n in range(kills):
        temporary = n % 2 == 1
        place = trial.root / "tmp" if temporary else work

        def begun(place: Path = place) -> bool:
            return any(place.rglob("sweep-*")) or any(place.rglob("points.jsonl"))

        trial.kill(common if temporary else resumed, begun, 3.0)
        left = trial.temporary()
        trial.counts["left"] += len(left)
    last = points(trial.complete(resumed))
    again = points(trial.complete(common))
    for one, other, expected in zip(last, again, whole, strict=True):
        trial.check(one == expected)
        trial.check(other == expected)
    trial.counts["stayed"] += len(trial.temporary())


#: Fields of a point that differ from run to run.
UNSTEADY = ("speed", "tokens_per_second", "hit_rate", "bytes_read")


def download(trial: Trial, kills: int) -> None:
    demo = find(DEMO)
    os.environ["FLASHMOE_CONFIG"] = trial.environ["FLASHMOE_CONFIG"]
    with Hub(demo) as hub:
        trial.environ |= hub.environ
        trial.environ.pop("HF_HUB_CACHE", None)
        cache = trial.root / "hub" / "hub" / "models--owner--toy"
        command = [FLASHMOE, "download", "hub:owner/toy"]
        for _ in range(kills):
            trial.kill(command, lambda: any(cache.glob("blobs/*.incomplete")), 0.3)
            trial.counts["left"] += len(trial.temporary())
            names = [m.path for m in registry.models()]
            if names:
                trial.check(_equal(names[0], demo))
                registry.remove("hub:owner/toy")
                subprocess.run(["rm", "-r", str(cache)], check=True)
        trial.complete(command)
        (model,) = registry.models()
        trial.check(_equal(model.path, demo))
        trial.counts["stayed"] += len(trial.temporary())


def _equal(directory: Path, original: Path) -> bool:
    found, expected = digests(directory), digests(original)
    return all(expected[name] == digest for name, digest in found.items()) and len(found) > 3


WRITERS = {f.__name__: f for f in (prompts, register, quantize, sweep, download)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50, help="kills of each writer")
    parser.add_argument("--only", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    results = {}
    for name in args.only:
        with tempfile.TemporaryDirectory(prefix="kill-writers-") as directory:
            trial = Trial(Path(directory), random.Random(f"{name} {args.seed}"))
            WRITERS[name](trial, args.kills)
        names = ("killed", "ended", "whole", "wrong", "left", "stayed")
        results[name] = {key: trial.counts[key] for key in names}
        print(name, *(f"{key} {count}" for key, count in results[name].items()), flush=True)
    print(json.dumps(results | {"kills": args.kills, "seed": args.seed}))
    sys.exit(any(result["wrong"] or result["stayed"] for result in results.values()))


if __name__ == "__main__":
    main()
