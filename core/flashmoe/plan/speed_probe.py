"""Measures the speeds of this machine for one model within seconds, before the model is downloaded.

Compute: the first layers of the model, with a few experts and a small vocabulary, become a
checkpoint whose weights are a hole in a file and so read as zeros (`reduced_checkpoint`). From
decode steps with K experts and with one expert (two of a type that cannot do with one) follow

    weights GB/s    the bytes of K - 1 experts / the difference of the two times
    a layer         what is left of the step with K experts when all its bytes go at that speed

Rows of zeros all choose the same K experts, and there are two more experts, so two are never read.
On a GPU the host looks at every choice, as it does where experts are streamed.

Disk: random experts of the checkpoint if it is on this machine; otherwise a scratch file in the
directory that it would be downloaded to, read in ranges as long as those of its experts.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.file_identity import FileIdentity
from ..errors import CheckpointError, SettingError
from ..locks import temporary_directory
from ..models.generic_moe import LEAST_K
from ..models.loading import load_streaming
from ..models.streaming_moe import StreamingMoE
from ..ops import backend as ops
from ..sizes import format_size
from ..streaming import drives
from ..streaming.disk_bench import forget, paced
from ..streaming.io_modes import BLOCK, F_NOCACHE
from ..streaming.slot_memory import allocate_pages
from .reduced_checkpoint import irreducible, reduced
from .speed_model import Costs, Geometry

#: Tokens of the measured prompt. With 512 tokens in a layer of hundreds of experts, about this many
#: meet in one expert.
PROMPT_TOKENS = 32
STEPS_SECONDS = 1.2
DISK_SECONDS = 1.0
FRESH_SECONDS, FRESH_NBYTES = 0.3, 1 << 28
#: Size of the file that is read in place of a model that is not on this machine.
SCRATCH_NBYTES = 1 << 29


@dataclass(frozen=True)
class DiskSpeed:
    """The measured speed of a drive.

    Attributes:
        gb_per_s: GB/s while the drive reads; pauses do not count.
        drive: how the drive was read.
        what: what was read, for people.
    """

    gb_per_s: float
    drive: drives.Drive
    what: str


def measure_compute(checkpoint: Checkpoint, k: int, activations: str = "float32") -> Costs:
    """Measure the speeds of this machine, except for the disk, whose speed is set to infinity.

    Args:
        k: experts per token.

    Raises:
        SettingError: not even a few layers fit in memory, or no small model of this type runs.
    """
    least = LEAST_K.get(checkpoint.model_type, 1)
    with ExitStack() as stack:
        try:
            small, k = stack.enter_context(reduced(checkpoint, k))
            model = stack.enter_context(closing(_load(small, activations)))
        except CheckpointError as e:
            raise irreducible(checkpoint, e) from e
        model.experts = k
        prompt_seconds = _measure_prompt(model)
        model.experts = least
        _measure_steps(model, least, least, 0.0)  # compiles
        step, more = _measure_steps(model, k, least, STEPS_SECONDS)
    geometry = Geometry.from_checkpoint(small)
    experts = geometry.expert_layers * geometry.expert_nbytes
    dense = geometry.layers * (geometry.layer_nbytes + geometry.shared_nbytes)
    dense += geometry.head_nbytes
    slope = more / (k - least) if k > least else 0.0
    rest = step - slope * (k + dense / experts)
    if slope <= 0 or rest < 0:  # the model is so small that its bytes do not count
        slope, rest = step / (k + dense / experts), 0.0
    flops = 2 * PROMPT_TOKENS * geometry.weights_per_byte * (dense + k * experts)
    return Costs(
        weights_gb_s=experts / slope / 1e9,
        layer_seconds=rest / geometry.layers,
        disk_gb_s=math.inf,
        prompt_gflops=flops / max(prompt_seconds - rest, 0.1 * prompt_seconds) / 1e9,
        as_they_land=ops.pick().computes_as_loaded,
        stacks=ops.pick().stacks_sequences,
        fresh_gb_s=_measure_fresh_memory(),
    )


def _measure_fresh_memory() -> float:
    """Return the GB/s at which the system provides new memory: slow in some virtual machines."""
    pages = allocate_pages(FRESH_NBYTES)
    begin = perf_counter()
    for page in range(0, FRESH_NBYTES, mmap.PAGESIZE):
        pages[page] = 1
        if page % (1 << 24) == 0 and perf_counter() - begin > FRESH_SECONDS:
            break
    return (page + mmap.PAGESIZE) / (perf_counter() - begin) / 1e9


def measure_disk(
    checkpoint: Checkpoint,
    *,
    misses: int,
    pause: float,
    scratch: Path | None = None,
    drive: drives.Drive | None = None,
) -> DiskSpeed:
    """Measure how fast experts are read from the drive.

    Args:
        misses: experts of a layer that are read together, 1 or more.
        pause: seconds from the reads of one layer to those of the next one.
        scratch: directory for a file to read from; None: read the experts of the checkpoint.
        drive: how to read; None: as a loaded model reads.

    Raises:
        SettingError: the scratch file cannot be written.
    """
    lengths = {"pause": pause, "seconds": DISK_SECONDS}
    if scratch is None:
        drive = drive or drives.drive_of(checkpoint.path)
        batches = _expert_batches(checkpoint, misses)
        measured = paced(batches, checkpoint.identities, drive, **lengths)
        return DiskSpeed(measured.gb_per_s, drive, "its own experts")
    with _scratch_file(scratch) as file:
        drive = drive or drives.drive_of(file)
        with open(file, "rb") as f:
            identities = {file: FileIdentity.from_fd(f.fileno())}
        batches = _scratch_batches(checkpoint, misses, file)
        measured = paced(batches, identities, drive, **lengths)
    what = f"a scratch file of {format_size(SCRATCH_NBYTES)} in {scratch}"
    return DiskSpeed(measured.gb_per_s, drive, what)


def _load(small: Checkpoint, activations: str) -> StreamingMoE:
    return load_streaming(
        small, slots=small.num_experts, io="buffered", activations=activations, prompt_cache=None
    )


def _measure_steps(model: StreamingMoE, k: int, least: int, seconds: float) -> tuple[float, float]:
    """Return the seconds of a step with K experts, and how much longer it takes than with `least`.

    Both kinds of steps alternate, and the results are medians, so that other work of the machine
    has little influence.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)

    def step(k: int) -> float:
        model.experts = k
        begin = perf_counter()
        mx.eval(model.next_logits([0], cache), [c.state for c in cache])
        return perf_counter() - begin

    step(k)
    times: list[tuple[float, float]] = []
    start = perf_counter()
    while len(times) < 5 or perf_counter() - start < seconds:
        times.append((step(k), step(least)))
    return median(many for many, _ in times), median(many - few for many, few in times)


def _measure_prompt(model: StreamingMoE) -> float:
    """Return the seconds of a prompt of PROMPT_TOKENS. A shorter one before it compiles kernels."""
    from mlx_lm.models.cache import make_prompt_cache

    from ..models.layerwise import prefill

    for tokens in (4, PROMPT_TOKENS):
        begin = perf_counter()
        for _ in prefill(model, [[0] * tokens], make_prompt_cache(model)):
            pass
    return perf_counter() - begin


def _expert_batches(checkpoint: Checkpoint, count: int) -> Iterator[list[tuple[Path, int, int]]]:
    rng = random.Random(0)
    layers = list(checkpoint.expert_layers.values())
    while True:
        layer = rng.choice(layers)
        yield [
            (part.file, part.range(expert)[0], part.nbytes)
            for expert in sorted(rng.sample(range(layer.num_experts), count))
            for part in layer.parts
        ]


def _scratch_batches(
    checkpoint: Checkpoint, count: int, file: Path
) -> Iterator[list[tuple[Path, int, int]]]:
    rng = random.Random(0)
    layer = next(iter(checkpoint.expert_layers.values()))
    sizes = [min(part.nbytes, SCRATCH_NBYTES // 4) for part in layer.parts] * count
    while True:
        yield [(file, rng.randrange(SCRATCH_NBYTES - n) // BLOCK * BLOCK, n) for n in sizes]


@contextmanager
def _scratch_file(directory: Path) -> Iterator[Path]:
    """Yield a file of random bytes that has been written to the disk, and remove it afterwards."""
    tile = random.Random(0).randbytes(1 << 24)
    with ExitStack() as stack:
        try:
            if shutil.disk_usage(directory).free < 4 * SCRATCH_NBYTES:
                raise OSError(0, "too little space is free")
            own = stack.enter_context(temporary_directory(".flashmoe-probe-", directory))
            file = own / "scratch"
            with open(file, "wb", buffering=0) as f:
                if sys.platform == "darwin":
                    fcntl.fcntl(f, F_NOCACHE, 1)
                for _ in range(SCRATCH_NBYTES // len(tile)):
                    f.write(tile)
                os.fsync(f.fileno())
        except OSError as e:
            raise SettingError(
                f"cannot write a scratch file of {format_size(SCRATCH_NBYTES)} to {directory} "
                f"({e.strerror}), so its drive cannot be measured: free some space, or predict for "
                "a known machine with --machine"
            ) from e
        forget(file)
        yield file
