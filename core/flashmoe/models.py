"""mlx-lm's Qwen MoE models with experts that stay on disk, and `load`, which makes one.

Each family is a subclass of mlx-lm's model. What changes: expert weights are not loaded, the MoE
blocks start the reads before they compute the shared expert, and the router may be pruned to its
top K. Embedding, attention, caches, masks and the head are mlx-lm's.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5_moe, qwen3_moe, qwen3_next
from mlx_lm.utils import load_config, load_model, load_tokenizer

from . import memory as memory_module
from . import ops
from .bank import ExpertBank
from .checkpoint import Checkpoint
from .errors import BudgetError, CheckpointError, FlashMoEError, SettingError
from .footprint import working_nbytes
from .reader import Reader, ReadStats
from .switch import StreamingSwitchGLU, Watch

log = logging.getLogger("flashmoe")

#: Slots beyond the K of one token: in prefill, one expert is computed while the next one is read.
PREFILL_SLOTS = 2


def route(block: nn.Module, x: mx.array) -> tuple[mx.array, mx.array]:
    """mlx-lm's router: (indices, scores), each (..., top_k), in the dtypes and order it gives."""
    gates = mx.softmax(block.gate(x), axis=-1, precise=True)
    k = block.top_k
    indices = mx.argpartition(gates, kth=-k, axis=-1)[..., -k:]
    scores = mx.take_along_axis(gates, indices, axis=-1)
    if block.norm_topk_prob:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return indices, scores


class SharedExpertBlock(qwen3_next.Qwen3NextSparseMoeBlock):
    """The MoE block of qwen3_next and qwen3_5_moe."""

    def __call__(self, x: mx.array) -> mx.array:
        indices, scores = route(self, x)
        call = self.switch_mlp.start(x, indices)
        shared = mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        # Let it run while the reads are in flight.
        mx.async_eval(shared)
        y = call.finish()
        return (y * scores[..., None]).sum(axis=-2) + shared


class RoutedBlock(qwen3_moe.Qwen3MoeSparseMoeBlock):
    """The MoE block of qwen3_moe, which has no shared expert."""

    def __call__(self, x: mx.array) -> mx.array:
        indices, scores = route(self, x)
        y = self.switch_mlp(x, indices)
        return (y * scores[..., None]).sum(axis=-2).astype(y.dtype)


@dataclass(frozen=True)
class StreamStats:
    """What streaming did since the model was loaded; subtract two for what lies between."""

    needed: int  # experts that calls needed, each once per layer and call
    loaded: int  # of these, the ones read from disk
    reads: ReadStats

    @property
    def hit_rate(self) -> float:
        """Share of the needed experts that were resident, 0..1."""
        return 1 - self.loaded / self.needed if self.needed else 0.0

    def __sub__(self, earlier: StreamStats) -> StreamStats:
        return StreamStats(
            self.needed - earlier.needed, self.loaded - earlier.loaded, self.reads - earlier.reads
        )


class StreamingMoE:
    """What the streaming models have beyond mlx-lm's. A mixin in front of its model class.

    Attributes:
        checkpoint: the checkpoint that the experts are read from.
        plan: how the memory was split.
        reader: the reader that all layers share.
        watch: its check is called between experts.
    """

    checkpoint: Checkpoint
    plan: memory_module.Plan
    reader: Reader
    watch: Watch
    block: type[nn.Module]

    def sanitize(self, weights: dict) -> dict:
        # mx.load is lazy: an expert tensor that is dropped here is never read.
        dense = {t.name for t in self.checkpoint.dense}
        return super().sanitize({k: v for k, v in weights.items() if k in dense})

    def stream_from(self, checkpoint: Checkpoint, plan: memory_module.Plan, reader: Reader) -> None:
        """Replace the expert blocks, before the weights are loaded."""
        self.checkpoint, self.plan, self.reader = checkpoint, plan, reader
        self.watch = Watch()
        module = ops.pick()
        for index, layer in checkpoint.expert_layers.items():
            block = self.layers[index].mlp
            bank = ExpertBank(layer, plan.slots_per_layer, on_gpu=ops.on_gpu())
            block.switch_mlp = StreamingSwitchGLU(bank, reader, module, self.watch)
            # In place: the block keeps its router and its shared expert under mlx-lm's names.
            block.__class__ = self.block

    @property
    def experts(self) -> int:
        """K in use: the experts that the router picks for a token."""
        return self._blocks[0].top_k

    @experts.setter
    def experts(self, k: int | None) -> None:
        k = check_experts(k, self.checkpoint)
        if k > self.plan.slots_per_layer:
            raise SettingError(
                f"experts={k} needs {k} slots in each layer, and the model was loaded with "
                f"{self.plan.slots_per_layer}: load it with experts={k} or with more memory"
            )
        for block in self._blocks:
            block.top_k = k

    @contextmanager
    def pruned_to(self, k: int | None):
        """Run with the router pruned to its top K (None: leave K as it is)."""
        before = self.experts
        self.experts = before if k is None else k
        try:
            yield self
        finally:
            self.experts = before

    @property
    def stats(self) -> StreamStats:
        return StreamStats(
            needed=sum(b.switch_mlp.stats.needed for b in self._blocks),
            loaded=sum(b.switch_mlp.stats.loaded for b in self._blocks),
            reads=self.reader.stats,
        )

    def close(self) -> None:
        """End the reader's threads. The model cannot be used after that."""
        self.reader.close()

    @property
    def _blocks(self) -> list[nn.Module]:
        return [self.layers[i].mlp for i in self.checkpoint.expert_layers]


class Qwen3_5Moe(StreamingMoE, qwen3_5_moe.Model):
    block = SharedExpertBlock


class Qwen3Next(StreamingMoE, qwen3_next.Model):
    block = SharedExpertBlock


class Qwen3Moe(StreamingMoE, qwen3_moe.Model):
    block = RoutedBlock


FAMILIES = {
    "qwen3_5_moe": (Qwen3_5Moe, qwen3_5_moe.ModelArgs),
    "qwen3_next": (Qwen3Next, qwen3_next.ModelArgs),
    "qwen3_moe": (Qwen3Moe, qwen3_moe.ModelArgs),
}


def check_experts(k: int | None, checkpoint: Checkpoint) -> int:
    """K as given, or the trained one.

    Raises:
        SettingError: K is not in 1..trained K.
    """
    if k is None:
        return checkpoint.top_k
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= checkpoint.top_k:
        raise SettingError(
            f"experts={k!r} is out of range: this model was trained with {checkpoint.top_k} "
            f"experts a token, so experts must be 1 to {checkpoint.top_k}"
        )
    return k


def plan_memory(
    checkpoint: Checkpoint,
    *,
    memory: str | int | None = None,
    slots: int | None = None,
    experts: int | None = None,
) -> memory_module.Plan:
    """How the memory of this process would be split for the checkpoint.

    Args:
        memory: budget for the peak of the whole process, such as "8GB" or a number of bytes.
            None: what the machine can spare.
        slots: experts resident in each layer, instead of what the budget gives.
        experts: K, or None for the trained one.

    Raises:
        BudgetError: it does not fit; the text says what would.
    """
    if memory is not None and slots is not None:
        raise SettingError(f"give memory={memory!r} or slots={slots!r}, not both")
    k = check_experts(experts, checkpoint)
    return memory_module.plan(
        budget=None if memory is None else memory_module.parse_size(memory),
        slots=slots,
        base=memory_module.resident(),
        dense=checkpoint.dense_nbytes,
        working=working_nbytes(checkpoint, on_gpu=ops.on_gpu()),
        layer_slot_nbytes=[x.expert_nbytes for x in checkpoint.expert_layers.values()],
        num_experts=checkpoint.num_experts,
        minimum=min(k + PREFILL_SLOTS, checkpoint.num_experts),
    )


def load(
    path: str | Path,
    *,
    memory: str | int | None = None,
    slots: int | None = None,
    experts: int | None = None,
    depth: int = 8,
):
    """Load the dense weights of a local MLX checkpoint; its experts stay on disk.

    Args:
        path: the checkpoint directory: qwen3_5_moe, qwen3_next or qwen3_moe in MLX format.
        memory, slots, experts: see `plan_memory`.
        depth: how many reads may be in flight at the drive.

    Returns:
        (model, tokenizer) as from `mlx_lm.load`: mlx-lm's generate, samplers, caches and tools
        accept them.

    Raises:
        CheckpointError, BudgetError, SettingError: with the values and the way out.
    """
    checkpoint = Checkpoint.open(path)
    tokenizer = read_tokenizer(checkpoint)
    model = load_streaming(checkpoint, memory=memory, slots=slots, experts=experts, depth=depth)
    return model, tokenizer


def load_streaming(
    checkpoint: Checkpoint,
    *,
    memory: str | int | None = None,
    slots: int | None = None,
    experts: int | None = None,
    depth: int = 8,
) -> StreamingMoE:
    """`load` without the tokenizer, from an open checkpoint."""
    if depth < 1:
        raise SettingError(f"depth={depth} must be 1 or more: it is a number of reads in flight")
    plan = plan_memory(checkpoint, memory=memory, slots=slots, experts=experts)
    log.info("%s: %s", checkpoint.path.name, plan.describe())
    model_class, args_class = FAMILIES[checkpoint.model_type]
    reader = Reader(depth, checkpoint.identities)

    def build(args):
        model = model_class(args)
        model.stream_from(checkpoint, plan, reader)
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


def head(model: nn.Module) -> nn.Module | None:
    """The output projection, or None when the embedding is used for it."""
    # qwen3_5_moe nests its text model.
    return getattr(getattr(model, "language_model", model), "lm_head", None)


def read_tokenizer(checkpoint: Checkpoint):
    """The checkpoint's tokenizer, as mlx-lm wraps it. None of its code is ever run.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        return load_tokenizer(
            checkpoint.path,
            {"trust_remote_code": False},
            eos_token_ids=load_config(checkpoint.path).get("eos_token_id"),
        )
    except Exception as e:  # transformers raises many kinds for a broken file
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer that can be read ({type(e).__name__}: {e}): it "
            "needs tokenizer.json and tokenizer_config.json; download the model again"
        ) from e
