"""Measures what this machine computes and reads with for one model, in some seconds, before the
model is here: the speeds of `speed.Costs`.

Kernels: the model's first layers, up to one with full attention, with a few experts and a short
vocabulary, become a checkpoint whose weights are a hole in a file, so zeros. It is loaded and runs
as any other; speed does not depend on what weights say. From steps with K experts and with one:

    weights GB/s    bytes of K - 1 experts / the difference of their times
    a layer         what is left of the step with K when all its bytes go at that speed

All rows of zeros choose the same K experts, so two are never read, and on a GPU the host looks at
every choice, as it does where experts are streamed.

Disk: random experts of the checkpoint when it is here; else a scratch file in the directory it
would be downloaded to, in ranges as long as its experts'.
"""

from __future__ import annotations

import copy
import fcntl
import json
import math
import mmap
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.file_identity import FileIdentity
from ..checkpoint.safetensors_header import EXPERT_TENSOR
from ..checkpoint.safetensors_writer import TensorSpec, encode_header
from ..errors import SettingError
from ..memory import system as memory
from ..models.loading import load_streaming
from ..ops import backend as ops
from ..sizes import format_size
from ..streaming import drives
from ..streaming.disk_bench import forget, paced
from ..streaming.io_modes import BLOCK, F_NOCACHE
from ..streaming.slot_memory import allocate_pages
from .speed_model import Costs, Geometry

#: Layers that stand for all where each has the same attention.
LAYERS = 4
VOCABULARY = 2048
#: Tokens of a prompt; about as many meet an expert when 512 go through a layer of hundreds.
PROMPT_TOKENS = 32
STEPS_SECONDS = 1.2
DISK_SECONDS = 1.0
FRESH_SECONDS, FRESH_NBYTES = 0.3, 1 << 28
#: Of the file that stands for a model that is not here.
SCRATCH_NBYTES = 1 << 29


@dataclass(frozen=True)
class Disk:
    """gb_per_s: while it reads. what: was read, for people."""

    gb_per_s: float
    drive: drives.Drive
    what: str


def kernels(checkpoint: Checkpoint, k: int, activations: str = "float32") -> Costs:
    """The speeds of this machine but for the disk's, which is infinite.

    k: experts of a token.

    Raises:
        SettingError: there is not memory enough even for some layers.
    """
    with _cut(checkpoint, k) as (small, k), closing(_load(small, activations)) as model:
        model.experts = k
        many, prompts = _prompts(model)
        model.experts = 1
        _steps(model, 1, 0.0)  # compiles
        step, more = _steps(model, k, STEPS_SECONDS)
    geometry = Geometry.of(small)
    experts = geometry.expert_layers * geometry.expert_nbytes
    dense = geometry.layers * (geometry.layer_nbytes + geometry.shared_nbytes)
    dense += geometry.head_nbytes
    slope = more / (k - 1) if k > 1 else 0.0
    rest = step - slope * (k + dense / experts)
    if slope <= 0 or rest < 0:  # so small that its bytes do not count
        slope, rest = step / (k + dense / experts), 0.0
    flops = 2 * prompts * geometry.weights_per_byte * (dense + k * experts)
    return Costs(
        weights_gb_s=experts / slope / 1e9,
        layer_seconds=rest / geometry.layers,
        disk_gb_s=math.inf,
        prompt_gflops=flops / max(many - rest, 0.1 * many) / 1e9,
        as_they_land=ops.pick().computes_as_loaded,
        stacks=ops.pick().stacks_sequences,
        fresh_gb_s=_fresh(),
    )


def _fresh() -> float:
    """GB/s of memory that the system gives for the first time: slow in some virtual machines."""
    pages = allocate_pages(FRESH_NBYTES)
    begin = perf_counter()
    for page in range(0, FRESH_NBYTES, mmap.PAGESIZE):
        pages[page] = 1
        if page % (1 << 24) == 0 and perf_counter() - begin > FRESH_SECONDS:
            break
    return (page + mmap.PAGESIZE) / (perf_counter() - begin) / 1e9


def with_disk(costs: Costs, disk: Disk) -> Costs:
    return replace(costs, disk_gb_s=disk.gb_per_s)


def disk(
    checkpoint: Checkpoint,
    *,
    misses: int,
    pause: float,
    scratch: Path | None = None,
    drive: drives.Drive | None = None,
) -> Disk:
    """How fast experts come from the drive.

    Args:
        misses: of a layer, one at least. pause: seconds from one layer's reads to the next one's.
        scratch: where to write a file to read from; None: the checkpoint is here, and read.
        drive: how it is read; None: as loads read it.

    Raises:
        SettingError: the scratch file cannot be written.
    """
    lengths = {"pause": pause, "seconds": DISK_SECONDS}
    if scratch is None:
        drive = drive or drives.drive_of(checkpoint.path)
        batches = _experts(checkpoint, misses)
        found = paced(batches, checkpoint.identities, drive, **lengths)
        return Disk(found.gb_per_s, drive, "its own experts")
    with _scratch_file(scratch) as file:
        drive = drive or drives.drive_of(file)
        with open(file, "rb") as f:
            identities = {file: FileIdentity.from_fd(f.fileno())}
        batches = _scratch_ranges(checkpoint, misses, file)
        found = paced(batches, identities, drive, **lengths)
    what = f"a scratch file of {format_size(SCRATCH_NBYTES)} in {scratch}"
    return Disk(found.gb_per_s, drive, what)


def _load(small: Checkpoint, activations: str):
    return load_streaming(
        small, slots=small.num_experts, io="buffered", activations=activations, prompt_cache=None
    )


def _steps(model, k: int, seconds: float) -> tuple[float, float]:
    """Seconds of a decode step with K experts, and how much longer that is than one with a single
    expert. They take turns; medians, so what else the machine does in between counts little."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)

    def step(k: int) -> float:
        model.experts = k
        begin = perf_counter()
        mx.eval(model.next_logits([0], cache), [c.state for c in cache])
        return perf_counter() - begin

    step(k)
    found = []
    start = perf_counter()
    while len(found) < 5 or perf_counter() - start < seconds:
        found.append((step(k), step(1)))
    return median(many for many, _ in found), median(many - one for many, one in found)


def _prompts(model) -> tuple[float, int]:
    """Seconds of a short prompt, and its tokens. One before it compiles."""
    from mlx_lm.models.cache import make_prompt_cache

    from ..models.layerwise import prefill

    for tokens in (4, PROMPT_TOKENS):
        begin = perf_counter()
        for _ in prefill(model, [[0] * tokens], make_prompt_cache(model)):
            pass
    return perf_counter() - begin, PROMPT_TOKENS


@contextmanager
def _cut(checkpoint: Checkpoint, k: int) -> Iterator[tuple[Checkpoint, int]]:
    """The checkpoint of a few layers of the model, and its K, which is less where memory is."""
    config = copy.deepcopy(checkpoint.config)
    text = config.get("text_config", config)
    layers = checkpoint.text_config.get("full_attention_interval") or LAYERS
    layers = min(checkpoint.num_layers, max(layers, min(checkpoint.expert_layers) + 1))
    each = sum(x.expert_nbytes for i, x in checkpoint.expert_layers.items() if i < layers)
    vocabulary = min(VOCABULARY, checkpoint.text_config["vocab_size"])
    kept = [t for t in checkpoint.dense if (layer := _layer(t.name)) is None or layer < layers]
    dense = sum(_cut_shape(t, 1, vocabulary).nbytes for t in kept)
    # Dense weights are widened, and a prompt takes some.
    room = memory.available() // 2 - 2 * dense
    experts = min(checkpoint.num_experts, k + 2, room // each)
    k = min(k, experts)
    if k < 1:
        raise SettingError(
            f"{layers} layers of the model do not fit in the memory that is left "
            f"({format_size(memory.available())}), so nothing can be measured: close other "
            "programs, or ask for a known machine with --machine"
        )
    text |= {"num_hidden_layers": layers, "vocab_size": vocabulary, "num_experts": experts}
    text["num_experts_per_tok"] = k
    kept += [t for t in checkpoint.tensors.values() if _is_expert(t.name, checkpoint, layers)]
    targets = [_cut_shape(t, experts, vocabulary) for t in kept]
    with tempfile.TemporaryDirectory(prefix="flashmoe-probe-") as directory:
        path = Path(directory)
        (path / "config.json").write_text(json.dumps(config))
        with open(path / "model.safetensors", "wb") as f:
            f.write(encode_header(targets))
            f.truncate(f.tell() + sum(t.nbytes for t in targets))
        yield Checkpoint.open(path), k


def _is_expert(name: str, checkpoint: Checkpoint, layers: int) -> bool:
    match = EXPERT_TENSOR.fullmatch(name)
    index = int(match["layer"]) if match else layers
    return index < layers and name.startswith(checkpoint.expert_layers[index].prefix)


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def _cut_shape(tensor, experts: int, vocabulary: int) -> TensorSpec:
    rows, *rest = tensor.shape or (1,)
    if ".mlp.gate." in tensor.name or EXPERT_TENSOR.fullmatch(tensor.name):
        rows = experts
    elif ".embed_tokens." in f".{tensor.name}" or ".lm_head." in f".{tensor.name}":
        rows = vocabulary
    return TensorSpec(tensor.name, tensor.dtype, (rows, *rest) if tensor.shape else ())


def _experts(checkpoint: Checkpoint, count: int) -> Iterator[list[tuple[Path, int, int]]]:
    drawn = random.Random(0)
    layers = list(checkpoint.expert_layers.values())
    while True:
        layer = drawn.choice(layers)
        yield [
            (part.file, part.range(expert)[0], part.nbytes)
            for expert in sorted(drawn.sample(range(layer.num_experts), count))
            for part in layer.parts
        ]


def _scratch_ranges(
    checkpoint: Checkpoint, count: int, file: Path
) -> Iterator[list[tuple[Path, int, int]]]:
    drawn = random.Random(0)
    layer = next(iter(checkpoint.expert_layers.values()))
    sizes = [min(part.nbytes, SCRATCH_NBYTES // 4) for part in layer.parts] * count
    while True:
        yield [(file, drawn.randrange(SCRATCH_NBYTES - n) // BLOCK * BLOCK, n) for n in sizes]


@contextmanager
def _scratch_file(directory: Path) -> Iterator[Path]:
    """A file of random bytes that has reached the disk."""
    tile = random.Random(0).randbytes(1 << 24)
    file = None
    try:
        try:
            if shutil.disk_usage(directory).free < 4 * SCRATCH_NBYTES:
                raise OSError(0, "too little room is free")
            fd, name = tempfile.mkstemp(prefix=".flashmoe-probe-", dir=directory)
            file = Path(name)
            with os.fdopen(fd, "wb", buffering=0) as f:
                if sys.platform == "darwin":
                    fcntl.fcntl(f, F_NOCACHE, 1)
                for _ in range(SCRATCH_NBYTES // len(tile)):
                    f.write(tile)
                os.fsync(f.fileno())
        except OSError as e:
            raise SettingError(
                f"no scratch file of {format_size(SCRATCH_NBYTES)} can be written to {directory} "
                f"({e.strerror}), so its drive cannot be measured: free some room, or ask for a "
                "known machine with --machine"
            ) from e
        forget(file)
        yield file
    finally:
        if file is not None:
            file.unlink(missing_ok=True)
