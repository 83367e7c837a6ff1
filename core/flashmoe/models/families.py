"""The registry: how each model type runs beyond what every type does.

Every MoE model type of mlx-lm streams through `generic_moe`, without an entry here. An entry is for
a type whose blocks or layers flashmoe computes in its own way, which is faster; see CONTRIBUTING.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_lm.models import qwen3_5_moe, qwen3_moe, qwen3_next

from ..memory.dry_run import model_classes
from .generic_moe import streaming_class
from .qwen_moe import Qwen3_5Moe, Qwen3Moe, Qwen3Next
from .streaming_moe import StreamingMoE


@dataclass(frozen=True)
class Family:
    """How the models of a type run.

    Attributes:
        model: the class of the streaming model.
        args: mlx-lm's class of its arguments.
        own_blocks: whether its MoE blocks are flashmoe's own; on a GPU they are a few launches.
    """

    model: type[StreamingMoE]
    args: Any
    own_blocks: bool = False

    @property
    def prompts(self) -> str:
        """How a prompt is taken through the layers, as `info` says it."""
        if self.model.layerwise:
            return "several chunks in one layer after the other: experts are read once for all"
        return "chunk by chunk: experts are read for each chunk of 512 tokens"

    @property
    def batches(self) -> str:
        """How the sequences of a batch are computed, as `info` says it."""
        if self.model.layerwise:
            return "together: sequences share the reads of each layer"
        return "one after another"


#: model_type of config.json -> what is known of it. Other types have no entry, and run.
FAMILIES: dict[str, Family] = {
    # Gated attention and GatedDeltaNet layers, a shared expert.
    "qwen3_5_moe": Family(Qwen3_5Moe, qwen3_5_moe.ModelArgs, own_blocks=True),
    # The same with other projections.
    "qwen3_next": Family(Qwen3Next, qwen3_next.ModelArgs, own_blocks=True),
    # Attention layers, no shared expert.
    "qwen3_moe": Family(Qwen3Moe, qwen3_moe.ModelArgs, own_blocks=True),
}


def family_of(config: dict[str, Any]) -> Family:
    """Return how the model of a config.json runs.

    Raises:
        CheckpointError: mlx-lm has no Mixture-of-Experts model of that type.
    """
    if (known := FAMILIES.get(config["model_type"])) is not None:
        return known
    model, args = model_classes(config)
    return Family(streaming_class(model), args)
