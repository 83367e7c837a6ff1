"""The registry: which model types flashmoe computes in its own way.

Every MoE model type of mlx-lm streams through `generic_moe`, without an entry here. An entry is for
a type whose blocks and layers are flashmoe's own, which is faster; see CONTRIBUTING. mlx-lm is
imported by `streaming_classes` alone.
"""

from __future__ import annotations

from typing import Any

#: model_type of config.json -> the class of its streaming model in `qwen_moe`. Its MoE blocks are
#: flashmoe's own, and prompts and batches go through it layer by layer (`layerwise`).
FAMILIES = {"qwen3_5_moe": "Qwen3_5Moe", "qwen3_next": "Qwen3Next", "qwen3_moe": "Qwen3Moe"}


def streaming_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the class of the streaming model of a config.json, and mlx-lm's of its arguments.

    Raises:
        CheckpointError: mlx-lm has no Mixture-of-Experts model of that type.
    """
    from ..memory.dry_run import model_classes
    from . import generic_moe, qwen_moe

    model, args = model_classes(config)
    if (known := FAMILIES.get(config["model_type"])) is not None:
        return getattr(qwen_moe, known), args
    return generic_moe.streaming_class(model), args
