"""Measures the speeds of this machine for one model within seconds, before the model is downloaded.

Compute: the first layers of the model, up to one with full attention, with a few experts and a
small vocabulary, become a checkpoint whose weights are a hole in a file and so read as zeros. It is
loaded and runs like any other: speed does not depend on the values of weights. From decode steps
with K experts and with one expert follow

    weights GB/s    the bytes of K - 1 experts / the difference of the two times
    a layer         what is left of the step with K experts when all its bytes go at that speed

Rows of zeros all choose the same K experts, and there are two more experts, so two are never read.
On a GPU the host looks at every choice, as it does where experts are streamed.

Disk: random experts of the checkpoint if it is on this machine; otherwise a scratch file in the
directory that it would be downloaded to, read in ranges as long as those of its experts.
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
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.file_identity import FileIdentity
from ..checkpoint.safetensors_header import EXPERT_TENSOR, Tensor
from ..checkpoint.safetensors_writer import TensorSpec, encode_header
from ..errors import SettingError
from ..locks import temporary_directory
from ..memory import system as memory
from ..models.loading import load_streaming
from ..models.streaming_moe import StreamingMoE
from ..ops import backend as ops
from ..sizes import format_size
from ..streaming import drives
from ..streaming.disk_bench import forget, paced
from ..streaming.io_modes import BLOCK, F_NOCACHE
from ..streaming.slot_memory import allocate_pages
from .speed_model import Costs, Geometry

#: Layers that are measured in place of all, for models whose layers have the same attention.
LAYERS = 4
VOCABULARY = 2048
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
        SettingError: not even a few layers fit in memory.
    """
    with _reduced(checkpoint, k) as (small, k), closing(_load(small, activations)) as model:
        model.experts = k
        prompt_seconds = _measure_prompt(model)
        model.experts = 1
        _measure_steps(model, 1, 0.0)  # compiles
        step, more = _measure_steps(model, k, STEPS_SECONDS)
    geometry = Geometry.from_checkpoint(small)
    experts = geometry.expert_layers * geometry.expert_nbytes
    dense = geometry.layers * (geometry.layer_nbytes + geometry.shared_nbytes)
    dense += geometry.head_nbytes
    slope = more / (k - 1) if k > 1 else 0.0
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


def _measure_steps(model: StreamingMoE, k: int, seconds: float) -> tuple[float, float]:
    """Return the seconds of a step with K experts, and how much longer it takes than with one.

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
        times.append((step(k), step(1)))
    return median(many for many, _ in times), median(many - one for many, one in times)


def _measure_prompt(model: StreamingMoE) -> float:
    """Return the seconds of a prompt of PROMPT_TOKENS. A shorter one before it compiles kernels."""
    from mlx_lm.models.cache import make_prompt_cache

    from ..models.layerwise import prefill

    for tokens in (4, PROMPT_TOKENS):
        begin = perf_counter()
        for _ in prefill(model, [[0] * tokens], make_prompt_cache(model)):
            pass
    return perf_counter() - begin


@contextmanager
def _reduced(checkpoint: Checkpoint, k: int) -> Iterator[tuple[Checkpoint, int]]:
    """Yield a checkpoint of a few layers of the model, and its K.

    The K is smaller than the given one if there is not enough memory for that many experts.
    """
    config = copy.deepcopy(checkpoint.config)
    text = config.get("text_config", config)
    layers = checkpoint.text_config.get("full_attention_interval") or LAYERS
    layers = min(checkpoint.num_layers, max(layers, min(checkpoint.expert_layers) + 1))
    each = sum(x.expert_nbytes for i, x in checkpoint.expert_layers.items() if i < layers)
    vocabulary = min(VOCABULARY, checkpoint.text_config["vocab_size"])
    kept = [
        t for t in checkpoint.dense if (layer := _layer_index(t.name)) is None or layer < layers
    ]
    dense = sum(_reduced_shape(t, 1, vocabulary).nbytes for t in kept)
    # Twice the dense weights, which are widened; half of the memory, since a prompt needs some.
    left = memory.available() // 2 - 2 * dense
    experts = min(checkpoint.num_experts, k + 2, left // each)
    k = min(k, experts)
    if k < 1:
        raise SettingError(
            f"{layers} layers of the model do not fit in the available memory "
            f"({format_size(memory.available())}), so nothing can be measured: close other "
            "programs, or predict for a known machine with --machine"
        )
    text |= {"num_hidden_layers": layers, "vocab_size": vocabulary, "num_experts": experts}
    text["num_experts_per_tok"] = k
    for part in (config, text):
        part.pop("eos_token_id", None)  # these rows are gone
    kept += [t for t in checkpoint.tensors.values() if _is_expert(t.name, checkpoint, layers)]
    targets = [_reduced_shape(t, experts, vocabulary) for t in kept]
    with temporary_directory("flashmoe-probe-") as path:
        (path / "config.json").write_text(json.dumps(config))
        with open(path / "model.safetensors", "wb") as f:
            f.write(encode_header(targets))
            f.truncate(f.tell() + sum(t.nbytes for t in targets))
        yield Checkpoint.open(path), k


def _is_expert(name: str, checkpoint: Checkpoint, layers: int) -> bool:
    match = EXPERT_TENSOR.fullmatch(name)
    index = int(match["layer"]) if match else layers
    return index < layers and name.startswith(checkpoint.expert_layers[index].prefix)


def _layer_index(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def _reduced_shape(tensor: Tensor, experts: int, vocabulary: int) -> TensorSpec:
    rows, *rest = tensor.shape or (1,)
    if ".mlp.gate." in tensor.name or EXPERT_TENSOR.fullmatch(tensor.name):
        rows = experts
    elif ".embed_tokens." in f".{tensor.name}" or ".lm_head." in f".{tensor.name}":
        rows = vocabulary
    return TensorSpec(tensor.name, tensor.dtype, (rows, *rest) if tensor.shape else ())


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
