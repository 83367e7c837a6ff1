"""Check the shapes and dtypes of the dense tensors against config.json.

mlx-lm infers how a matrix was quantised by dividing one size by another, so sizes that do not fit
reach MLX as a group of 0 weights, which ends the process; and it takes a tensor of integers for
weights. Here each tensor is compared with what the model of these sizes has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_files import DOWNLOAD_AGAIN, show
from .quantization import FLOATS, quantization_of
from .safetensors_header import Tensor

PARTS = ("weight", "scales", "biases")

Shape = tuple[int, ...]


def check_dense(
    dense: tuple[Tensor, ...],
    model_type: str,
    text_config: dict[str, Any],
    quantization: dict[str, Any] | None,
    path: Path,
) -> None:
    """Check the dense tensors of a checkpoint.

    Tensors that the model has no use for are left to mlx-lm, which refuses them.

    Args:
        text_config, quantization: from `parse_text_config` and `parse_quantization`.
        path: the checkpoint directory, for errors.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype than the model needs, or is
            quantised in a way that is not supported.
    """
    # The path of the model for which `matrices` and `vectors` give names.
    root = "language_model." if model_type == "qwen3_5_moe" else ""
    tensors: dict[str, Tensor] = {}
    for tensor in dense:
        name = with_root(tensor.name) if root else tensor.name
        if name in tensors:
            raise CheckpointError(
                f"{path} holds both {show(tensors[name].name)} and {show(tensor.name)}, which are "
                "one tensor: convert the original weights again"
            )
        tensors[name] = tensor
    for module, shape in matrices(model_type, text_config):
        _check_matrix(root + module, shape, tensors, quantization)
    for name, shapes in vectors(model_type, text_config):
        tensor = _present(root + name, tensors)
        _check_floats(tensor)
        if tensor.shape not in shapes:
            raise _disagrees(tensor, shapes[0])


def matrices(model_type: str, c: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Yield the name and the shape (rows, columns) of each matrix that may be quantised.

    Args:
        c: the part of config.json that describes the language model.
    """
    hidden, heads, head = c["hidden_size"], c["num_attention_heads"], c["head_dim"]
    queries, keys = heads * head, c["num_key_value_heads"] * head
    yield "model.embed_tokens", (c["vocab_size"], hidden)
    if not c["tie_word_embeddings"]:
        yield "lm_head", (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        if is_linear(model_type, c, layer):
            yield from _linear_attention(f"{base}.linear_attn", model_type, c)
        else:
            # With a gate beside each query, but for qwen3_moe.
            gated = queries if model_type == "qwen3_moe" else 2 * queries
            yield f"{base}.self_attn.q_proj", (gated, hidden)
            yield f"{base}.self_attn.k_proj", (keys, hidden)
            yield f"{base}.self_attn.v_proj", (keys, hidden)
            yield f"{base}.self_attn.o_proj", (hidden, queries)
        if not has_experts(model_type, c, layer):
            yield from _gated_mlp(f"{base}.mlp", hidden, c["intermediate_size"])
            continue
        yield f"{base}.mlp.gate", (c["num_experts"], hidden)
        if model_type != "qwen3_moe":
            inner = c["shared_expert_intermediate_size"]
            yield from _gated_mlp(f"{base}.mlp.shared_expert", hidden, inner)
            yield f"{base}.mlp.shared_expert_gate", (1, hidden)


def _linear_attention(base: str, model_type: str, c: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, heads = c["hidden_size"], c["linear_num_value_heads"]
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    values = heads * c["linear_value_head_dim"]
    if model_type == "qwen3_next":
        yield f"{base}.in_proj_qkvz", (2 * keys + 2 * values, hidden)
        yield f"{base}.in_proj_ba", (2 * heads, hidden)
    else:
        yield f"{base}.in_proj_qkv", (2 * keys + values, hidden)
        yield f"{base}.in_proj_z", (values, hidden)
        yield f"{base}.in_proj_b", (heads, hidden)
        yield f"{base}.in_proj_a", (heads, hidden)
    yield f"{base}.out_proj", (hidden, values)


def _gated_mlp(base: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{base}.gate_proj", (inner, hidden)
    yield f"{base}.up_proj", (inner, hidden)
    yield f"{base}.down_proj", (hidden, inner)


def vectors(model_type: str, c: dict[str, Any]) -> Iterator[tuple[str, tuple[Shape, ...]]]:
    """Yield the name and the possible shapes of each tensor that is never quantised."""
    hidden, head = c["hidden_size"], c["head_dim"]
    # The attention of qwen3_moe has no biases, whatever config.json says.
    biased = c["attention_bias"] and model_type != "qwen3_moe"
    rows = dict(matrices(model_type, c)) if biased else {}
    yield "model.norm.weight", ((hidden,),)
    for layer in range(c["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        yield f"{base}.input_layernorm.weight", ((hidden,),)
        yield f"{base}.post_attention_layernorm.weight", ((hidden,),)
        if not is_linear(model_type, c, layer):
            yield f"{base}.self_attn.q_norm.weight", ((head,),)
            yield f"{base}.self_attn.k_norm.weight", ((head,),)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                if module := rows.get(f"{base}.self_attn.{name}"):
                    yield f"{base}.self_attn.{name}.bias", (module[:1],)
            continue
        heads, kernel = c["linear_num_value_heads"], c["linear_conv_kernel_dim"]
        values = heads * c["linear_value_head_dim"]
        channels = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"] + values
        yield f"{base}.linear_attn.A_log", ((heads,),)
        yield f"{base}.linear_attn.dt_bias", ((heads,),)
        yield f"{base}.linear_attn.norm.weight", ((c["linear_value_head_dim"],),)
        # The second is that of the original weights, which mlx-lm turns.
        yield f"{base}.linear_attn.conv1d.weight", ((channels, kernel, 1), (channels, 1, kernel))


def is_linear(model_type: str, c: dict[str, Any], layer: int) -> bool:
    """Return whether a layer has linear attention."""
    return model_type != "qwen3_moe" and (layer + 1) % c["full_attention_interval"] != 0


def has_experts(model_type: str, c: dict[str, Any], layer: int) -> bool:
    """Return whether a layer has routed experts."""
    return model_type == "qwen3_5_moe" or (
        layer not in c["mlp_only_layers"] and (layer + 1) % c["decoder_sparse_step"] == 0
    )


def with_root(name: str) -> str:
    """Return the name of a tensor as mlx-lm's qwen3_5_moe rewrites it."""
    if name.startswith("model.language_model"):
        name = name.replace("model.language_model", "language_model.model")
    return name if name.startswith("language_model.") else f"language_model.{name}"


def _check_matrix(
    path: str, shape: Shape, tensors: dict[str, Tensor], quantization: dict[str, Any] | None
) -> None:
    """Check the tensors of one module, whose weights are a matrix of `shape`."""
    rows, columns = shape
    named = None if quantization is None else quantization.get(path)
    parts = {part: tensors.get(f"{path}.{part}") for part in PARTS}
    if not named and not parts["scales"] and not parts["biases"]:
        weight = _present(f"{path}.weight", tensors)
        _check_floats(weight)
        if weight.shape != shape:
            raise _disagrees(weight, shape)
        return
    how = quantization_of(path, parts, columns, quantization)
    for part, width in how.widths(columns).items():
        tensor = _present(f"{path}.{part}", tensors)
        if tensor.shape != (rows, width):
            raise _disagrees(tensor, (rows, width))


def _present(name: str, tensors: dict[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"tensor {show(name)} is missing: {DOWNLOAD_AGAIN}")
    return tensors[name]


def _check_floats(tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{tensor.file.name}: {show(tensor.name)} has dtype {tensor.dtype}, needed is one of "
            f"{', '.join(FLOATS)}: convert the original weights again"
        )


def _disagrees(tensor: Tensor, needed: Shape) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file.name}: {show(tensor.name)} has shape {tensor.shape}, but config.json needs "
        f"{needed}; config.json and the weights are from two checkpoints"
    )
