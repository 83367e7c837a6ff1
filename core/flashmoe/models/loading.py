"""Load a checkpoint directory into a model that streams its experts."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from ..checkpoint.checkpoint import Checkpoint, check_experts
from ..checkpoint.json_files import show
from ..checkpoint.tokenizer import read_tokenizer
from ..errors import BudgetError, CheckpointError, FlashMoEError
from ..memory import system
from ..memory.budget import MemoryPlan, split_budget
from ..memory.footprint import (
    PLANNED_CONTEXTS,
    lasting_nbytes,
    program_nbytes,
    prompt_cache_nbytes,
    prompt_nbytes,
)
from ..ops import backend as backends
from ..ops.activations import check_activations
from ..options import LoadOptions, with_settings
from ..process_limits import check_threads
from ..sizes import format_size
from ..streaming.compute import Backend
from ..streaming.cuda import device_memory
from ..streaming.drives import Drive, drive_of
from ..streaming.reader import Reader
from .families import FAMILIES, streaming_classes
from .streaming_moe import StreamingMoE

log = logging.getLogger("flashmoe")

#: Slots beyond the K of one token: in prefill, one expert is computed while the next one is read.
PREFILL_SLOTS = 2


def plan_memory(
    checkpoint: Checkpoint,
    options: LoadOptions | None = None,
    *,
    held: int | None = None,
    reserved: int = 0,
    context: int | None = None,
    mac: int | None = None,
) -> MemoryPlan:
    """Split the memory of this process as a load of the checkpoint would.

    Before a tokenizer is loaded, and in a smaller process than the one that will answer, the plan
    is the same: the program has at least the size of `footprint.program_nbytes`.

    Args:
        options: None: the defaults of an engine, with a prompt cache of one conversation.
        held: how many experts of each layer are read on this machine. None: all.
        reserved: bytes kept free for something else.
        context: tokens that memory is kept for. None, as for a load: those of the options, else
            the planned length, or what there is memory for.
        mac: plan for a Mac that can spare this many bytes, instead of for this machine.

    Raises:
        BudgetError: it does not fit; the text says what would.
    """
    options = LoadOptions(prompt_cache=None) if options is None else options
    k = check_experts(options.experts, checkpoint)
    held = checkpoint.num_experts if held is None else held
    gpu = mac is not None or backends.on_gpu()
    budget, slots = options.memory_nbytes, options.slots
    base = max(system.resident(), program_nbytes(checkpoint))
    if mac is not None:
        base = 0
        if budget is None and slots is None:
            budget = mac
    elif device_memory() is not None:
        # What is on the card is planned for; the process itself holds little beside it.
        base = 0
        if budget is None and slots is None:
            budget = system.default_budget(int(mx.device_info()["free_memory"]))
    working_set = None if mac is not None else backends.working_set()
    if budget and working_set and budget > system.WORKING_SET_SHARE * working_set:
        log.warning(
            "memory %s is more than %s, which is 90%% of what Metal recommends to use: give less, "
            "or raise the limit: sudo sysctl iogpu.wired_limit_mb=%d",
            format_size(budget),
            format_size(int(system.WORKING_SET_SHARE * working_set)),
            int(budget / system.WORKING_SET_SHARE) >> 20,
        )

    # The stacks of MLX arrays on a GPU cannot give memory back.
    elastic = slots is None and not gpu

    def split(tokens: int) -> MemoryPlan:
        cached = options.prompt_cache_nbytes
        if cached is None:
            cached = prompt_cache_nbytes(checkpoint, tokens, on_gpu=gpu)
        passing = prompt_nbytes(checkpoint, k, on_gpu=gpu, context=tokens)
        plan = split_budget(
            budget=budget,
            slots=slots,
            base=base,
            dense=checkpoint.dense_nbytes,
            working=lasting_nbytes(checkpoint, on_gpu=gpu) + cached + passing + reserved,
            layer_slot_nbytes=[x.expert_nbytes for x in checkpoint.expert_layers.values()],
            num_experts=held,
            minimum=min(k + PREFILL_SLOTS, held),
            passing=passing,
            elastic=elastic,
            working_set=working_set,
            held_now=min(base, system.resident()),
        )
        return replace(plan, cached=cached, context=min(tokens, checkpoint.max_context))

    if context is None:
        context = options.context
    lengths = PLANNED_CONTEXTS if elastic else PLANNED_CONTEXTS[:-2]
    *longer, shortest = lengths if context is None else (context,)
    for tokens in longer:
        with suppress(BudgetError):
            return split(tokens)
    return split(shortest)


def load(path: str | Path, options: LoadOptions | None = None, **settings: Any):
    """Load the dense weights of a local MLX checkpoint; its experts stay on disk.

    Args:
        path: the checkpoint directory, in MLX format, of a MoE model type that mlx-lm has.
        options: how to load it.
        settings: fields of `LoadOptions` (memory, slots, experts, depth, io, activations,
            prompt_cache), which replace those of `options`.

    Returns:
        (model, tokenizer) as from `mlx_lm.load`: mlx-lm's generate, samplers, caches and tools
        accept them.

    Raises:
        CheckpointError, BudgetError, SettingError: with the values and the way out.
    """
    options = with_settings(options or LoadOptions(), settings)
    checkpoint = Checkpoint.open(path)
    tokenizer = read_tokenizer(checkpoint)
    return load_streaming(checkpoint, options), tokenizer


def load_streaming(
    checkpoint: Checkpoint,
    options: LoadOptions | None = None,
    *,
    backend: Backend | None = None,
    held: int | None = None,
    reserved: int = 0,
    **settings: Any,
) -> StreamingMoE:
    """Load the model of an open checkpoint, as `load` does, without the tokenizer.

    Args:
        backend: computes the layers. None: the fastest for this device.
        held: how many experts of a layer may be in slots on this machine. None: all.
        reserved: bytes of memory kept free for something else.
    """
    check_threads()
    options = with_settings(options or LoadOptions(), settings)
    backend = backends.pick() if backend is None else backend
    check_activations(options.activations, backend)
    held = checkpoint.num_experts if held is None else held
    plan = plan_memory(checkpoint, options, held=held, reserved=reserved)
    log.info("%s: %s", checkpoint.path.name, plan.describe())
    reader = reader_for(checkpoint, options, drive_for(checkpoint, plan))
    try:
        model = _build(checkpoint, plan, reader, backend, options.activations, held)
        model.experts = check_experts(options.experts, checkpoint)
    except BaseException as e:
        reader.close()
        if isinstance(e, MemoryError) or "allocate" in str(e):
            raise BudgetError(
                f"the system did not provide the memory ({e}); planned was {plan.describe()}: "
                "pass less memory"
            ) from e
        if isinstance(e, FlashMoEError):
            raise
        if isinstance(e, Exception):  # whatever it is, it comes from what the checkpoint says
            raise CheckpointError(
                f"mlx-lm cannot load the {checkpoint.model_type} in {checkpoint.path}: "
                f"{type(e).__name__}: {show(str(e))}. Download it again, or convert it again with "
                "this version of mlx-lm"
            ) from e
        raise
    return model


def _build(
    checkpoint: Checkpoint,
    plan: MemoryPlan,
    reader: Reader,
    backend: Backend,
    activations: str,
    held: int,
) -> StreamingMoE:
    """Make the model, and load its dense weights."""
    model_class, args_class = streaming_classes(checkpoint.config)

    def make(args):
        model = model_class(args)
        model.stream_from(checkpoint, plan, reader, backend, activations, held)
        return model

    def classes(config: dict) -> tuple[Any, Any]:
        return make, args_class

    model, _ = load_model(checkpoint.path, lazy=True, get_model_classes=classes)
    assert isinstance(model, StreamingMoE), "`make` makes it"
    backend.set_dtypes(model)
    if backend.fuses_blocks and checkpoint.model_type in FAMILIES:
        # Late: it needs the kernels. Before the dense layers, because only plain ones are joined.
        from .fused_blocks import recast_blocks

        recast_blocks(model)
    backend.prepare_layers(model, head(model))
    model.finish_layers()
    # Layer by layer, so that what a cast reads and what it makes do not both grow.
    for layer in model.layers:
        mx.eval(layer.parameters())
    mx.eval(model.parameters())
    return model


def reader_for(checkpoint: Checkpoint, options: LoadOptions, drive: Drive) -> Reader:
    """Return a reader of the checkpoint's files, by the options or else by the drive."""
    io = options.io or drive.io
    depth = options.depth or drive.depth
    log.info("io=%s, depth=%d, split=%d", io, depth, drive.split)
    return Reader(depth, checkpoint.identities, io, drive.split)


def drive_for(checkpoint: Checkpoint, plan: MemoryPlan) -> Drive:
    """Return how a load with this plan reads experts, unless the options say otherwise."""
    drive = drive_of(checkpoint.path)
    all_fit = max(plan.slots_per_layer, plan.most_slots) == checkpoint.num_experts
    return replace(drive, io="buffered") if all_fit else drive


def head(model: nn.Module) -> nn.Module | None:
    """Return the output projection, or None when the embedding is used for it."""
    # qwen3_5_moe nests its text model.
    return getattr(getattr(model, "language_model", model), "lm_head", None)
