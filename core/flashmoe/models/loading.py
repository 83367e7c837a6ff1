"""From a checkpoint directory to a model that is ready: plan the memory, load the dense weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from ..checkpoint.checkpoint import Checkpoint, check_experts
from ..checkpoint.tokenizer import read_tokenizer
from ..errors import BudgetError, CheckpointError, FlashMoEError, SettingError
from ..memory import budget as memory_module
from ..memory.footprint import PLANNED_CONTEXT, lasting_nbytes, prompt_cache_nbytes, prompt_nbytes
from ..ops import backend as ops
from ..ops.activations import check_activations
from ..streaming.cuda import device_memory
from ..streaming.drives import Drive, drive_of
from ..streaming.io_modes import IO_MODES
from ..streaming.reader import Reader
from .qwen_moe import FAMILIES, StreamingMoE

if TYPE_CHECKING:
    from ..cluster.lead import Cluster

log = logging.getLogger("flashmoe")

#: Slots beyond the K of one token: in prefill, one expert is computed while the next one is read.
PREFILL_SLOTS = 2


def plan_memory(
    checkpoint: Checkpoint,
    *,
    memory: str | int | None = None,
    slots: int | None = None,
    experts: int | None = None,
    prompt_cache: int | None = None,
    held: int | None = None,
    beside: int = 0,
    context: int = PLANNED_CONTEXT,
    mac: int | None = None,
) -> memory_module.Plan:
    """How the memory of this process would be split for the checkpoint.

    Args:
        memory: budget for the peak of the whole process, such as "8GB" or a number of bytes; of
            the memory of the GPU, when it has its own. None: what can be spared.
        slots: experts resident in each layer, instead of what the budget gives.
        experts: K, or None for the trained one.
        prompt_cache: bytes kept free for states of prompts, as an engine keeps them. None: those
            of one conversation of the planned length.
        held: how many experts of each layer are read here. None: all.
        beside: bytes kept free for something else.
        context: tokens that memory is kept for; a load keeps it for the planned length.
        mac: as on a Mac that can spare so many bytes, instead of here.

    Raises:
        BudgetError: it does not fit; the text says what would.
    """
    if memory is not None and slots is not None:
        raise SettingError(f"give memory={memory!r} or slots={slots!r}, not both")
    k = check_experts(experts, checkpoint)
    held = checkpoint.num_experts if held is None else held
    gpu = mac is not None or ops.on_gpu()
    passing = prompt_nbytes(checkpoint, k, on_gpu=gpu, context=context)
    kept = prompt_cache_nbytes(checkpoint) if prompt_cache is None else prompt_cache
    budget = None if memory is None else memory_module.parse_size(memory)
    base = memory_module.resident()
    if mac is not None:
        base = 0
        if budget is None and slots is None:
            budget = mac
    elif device_memory() is not None:
        # What lies on the card is planned for; the process itself holds little beside it.
        base = 0
        if budget is None and slots is None:
            budget = memory_module.spare(mx.device_info()["free_memory"])
    return memory_module.plan(
        budget=budget,
        slots=slots,
        base=base,
        dense=checkpoint.dense_nbytes,
        working=lasting_nbytes(checkpoint, on_gpu=gpu) + kept + passing + beside,
        layer_slot_nbytes=[x.expert_nbytes for x in checkpoint.expert_layers.values()],
        num_experts=held,
        minimum=min(k + PREFILL_SLOTS, held),
        passing=passing,
        # The stacks of MLX arrays on a GPU cannot give memory back.
        elastic=slots is None and not gpu,
    )


def load(
    path: str | Path,
    *,
    memory: str | int | None = None,
    slots: int | None = None,
    experts: int | None = None,
    depth: int | None = None,
    io: str | None = None,
    activations: str = "float32",
    prompt_cache: int | None = 0,
):
    """Load the dense weights of a local MLX checkpoint; its experts stay on disk.

    Args:
        path: the checkpoint directory: qwen3_5_moe, qwen3_next or qwen3_moe in MLX format.
        memory, slots, experts, prompt_cache: see `plan_memory`.
        depth: how many reads may be in flight at the drive. None: what `flashmoe bench disk` found,
            or 8.
        io: how experts are read, one of `flashmoe.streaming.io_modes.IO_MODES`. None: what
            `flashmoe bench disk` found, or the default of `flashmoe.streaming.drives`; "buffered"
            where all experts fit into slots, so that the next process finds them in the page cache.
        activations: "float32", or "int8" on a CPU: faster, not exact. See
            `flashmoe.ops.activations`.

    Returns:
        (model, tokenizer) as from `mlx_lm.load`: mlx-lm's generate, samplers, caches and tools
        accept them.

    Raises:
        CheckpointError, BudgetError, SettingError: with the values and the way out.
    """
    checkpoint = Checkpoint.open(path)
    tokenizer = read_tokenizer(checkpoint)
    model = load_streaming(
        checkpoint,
        memory=memory,
        slots=slots,
        experts=experts,
        depth=depth,
        io=io,
        activations=activations,
        prompt_cache=prompt_cache,
    )
    return model, tokenizer


def load_streaming(
    checkpoint: Checkpoint,
    *,
    memory: str | int | None = None,
    slots: int | None = None,
    experts: int | None = None,
    depth: int | None = None,
    io: str | None = None,
    activations: str = "float32",
    prompt_cache: int | None = 0,
    cluster: Cluster | None = None,
) -> StreamingMoE:
    """`load` without the tokenizer, from an open checkpoint.

    Args:
        cluster: the hosts that have the other experts.
    """
    if depth is not None and depth < 1:
        raise SettingError(f"depth={depth} must be 1 or more: it is a number of reads in flight")
    if io is not None and io not in IO_MODES:
        raise SettingError(f"io={io!r} must be one of {', '.join(IO_MODES)}")
    check_activations(activations, ops.pick())
    held = checkpoint.num_experts if cluster is None else cluster.held
    plan = plan_memory(
        checkpoint,
        memory=memory,
        slots=slots,
        experts=experts,
        prompt_cache=prompt_cache,
        held=held,
        beside=0 if cluster is None else cluster.nbytes,
    )
    log.info("%s: %s", checkpoint.path.name, plan.describe())
    model_class, args_class = FAMILIES[checkpoint.model_type]
    drive = drive_for(checkpoint, plan)
    io = drive.io if io is None else io
    depth = drive.depth if depth is None else depth
    log.info("io=%s, depth=%d, split=%d", io, depth, drive.split)
    reader = Reader(depth, checkpoint.identities, io, drive.split)

    def build(args):
        model = model_class(args)
        model.stream_from(checkpoint, plan, reader, activations, held)
        return model

    try:
        model, _ = load_model(
            checkpoint.path, lazy=True, get_model_classes=lambda config: (build, args_class)
        )
        ops.pick().prepare(model, head(model))
        # Layer by layer, so that what a cast reads and what it makes do not both grow.
        for layer in model.layers:
            mx.eval(layer.parameters())
        mx.eval(model.parameters())
        model.experts = check_experts(experts, checkpoint)
        if cluster is not None:
            cluster.join(model)
    except BaseException as e:
        reader.close()
        if isinstance(e, MemoryError) or "allocate" in str(e):
            raise BudgetError(
                f"the system did not give the memory ({e}); planned was {plan.describe()}: "
                "pass less memory"
            ) from e
        if isinstance(e, FlashMoEError):
            raise
        if isinstance(e, KeyError | TypeError | ValueError | RuntimeError | OSError):
            raise CheckpointError(
                f"mlx-lm cannot load the {checkpoint.model_type} in {checkpoint.path}: {e}. "
                "Download it again, or convert it again with this version of mlx-lm"
            ) from e
        raise
    return model


def drive_for(checkpoint: Checkpoint, plan: memory_module.Plan) -> Drive:
    """How a load with this plan reads experts, when nothing else is asked for."""
    drive = drive_of(checkpoint.path)
    all_fit = max(plan.slots_per_layer, plan.most_slots) == checkpoint.num_experts
    return replace(drive, io="buffered") if all_fit else drive


def head(model: nn.Module) -> nn.Module | None:
    """The output projection, or None when the embedding is used for it."""
    # qwen3_5_moe nests its text model.
    return getattr(getattr(model, "language_model", model), "lm_head", None)
