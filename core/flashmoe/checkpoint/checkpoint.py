"""Open an MLX checkpoint directory: which tensors it holds, and at which bytes each expert is.

Only config.json, generation_config.json, the index and the safetensors headers are read, all as
hostile input. Nothing that a checkpoint contains is executed. MLX is not imported.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SettingError
from . import stacked_experts
from .config import is_checked_type, parse_text_config
from .dense_tensors import check_dense, with_root
from .expert_layers import ExpertLayer, find_expert_layers
from .file_identity import FileIdentity
from .generation_config import GenerationConfig, read_generation_config
from .json_files import check_files, read_object, show
from .quantization import parse_quantization
from .safetensors_header import EXPERT_TENSOR, Tensor, is_loaded, read_tensors
from .stacked_experts import find_stacked_experts


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint.

    Attributes:
        path: its directory.
        config: the content of config.json.
        text_config: the part of `config` that describes the language model, with mlx-lm's defaults.
        tensors: all tensors by name.
        expert_layers: the experts of each MoE layer, by the index of the layer.
        identities: what the shards were when their headers were read.
        generation: what the checkpoint says about generation.
    """

    path: Path
    config: dict[str, Any]
    text_config: dict[str, Any]
    tensors: dict[str, Tensor]
    expert_layers: dict[int, ExpertLayer]
    identities: dict[Path, FileIdentity]
    generation: GenerationConfig

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open and check a local directory.

        Raises:
            CheckpointError: says which values are wrong, and the way out.
        """
        path = _directory(path)
        check_files(path)
        config = read_object(path / "config.json")
        text_config = parse_text_config(config, path)
        generation = read_generation_config(path, config, text_config)
        quantization = parse_quantization(config, text_config, path)
        tensors, identities = read_tensors(path)
        if not is_checked_type(config):
            layers = find_stacked_experts(text_config, quantization, tensors, path)
            text_config |= _expert_sizes(layers, text_config, path)
            return cls(path, config, text_config, tensors, layers, identities, generation)
        if config["model_type"] == "qwen3_5_moe":
            tensors = _with_expert_names(tensors, path)
        layers = find_expert_layers(config["model_type"], text_config, quantization, tensors, path)
        checkpoint = cls(path, config, text_config, tensors, layers, identities, generation)
        check_dense(checkpoint.dense, config["model_type"], text_config, quantization, path)
        return checkpoint

    @property
    def is_checked_type(self) -> bool:
        """Return whether all tensors were compared with config.json when it was opened.

        Otherwise they are compared with mlx-lm's model when that is built.
        """
        return is_checked_type(self.config)

    @property
    def model_type(self) -> str:
        """Return mlx-lm's name for the kind of model, such as "qwen3_next"."""
        return self.config["model_type"]

    @property
    def num_layers(self) -> int:
        """Return the number of layers, with and without experts."""
        return self.text_config["num_hidden_layers"]

    @property
    def num_experts(self) -> int:
        """Return the number of routed experts of each MoE layer."""
        return self.text_config["num_experts"]

    @property
    def top_k(self) -> int:
        """Return K, the number of experts per token that the model was trained with."""
        return self.text_config["num_experts_per_tok"]

    @property
    def max_context(self) -> int:
        """Return the longest context that the model supports, in tokens."""
        return self.text_config["max_position_embeddings"]

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the safetensors files, sorted."""
        return tuple(sorted({t.file for t in self.tensors.values()}))

    @property
    def nbytes(self) -> int:
        """Return the bytes of all shards."""
        return sum(identity.nbytes for identity in self.identities.values())

    @cached_property
    def files_identity(self) -> str:
        """Return a hash that changes when a shard is replaced, resized or written to.

        It covers the names, sizes and modification times of the shards, not their bytes, so copies
        of a checkpoint on two machines differ. config.json is not covered.
        """
        files = [(f.name, i.nbytes, i.mtime_ns) for f, i in sorted(self.identities.items())]
        return hashlib.sha256(repr(files).encode()).hexdigest()

    @property
    def expert_nbytes(self) -> int:
        """Return the bytes of all experts of all layers."""
        return sum(x.num_experts * x.expert_nbytes for x in self.expert_layers.values())

    @cached_property
    def dense(self) -> tuple[Tensor, ...]:
        """Return the tensors to keep in memory.

        These are all but experts, the vision tower and multi-token prediction.
        """
        experts = {name for layer in self.expert_layers.values() for name in layer.names}
        loaded: Callable[[str], bool] = is_loaded
        if not self.is_checked_type:
            loaded = partial(stacked_experts.is_loaded, layers=self.num_layers)
        return tuple(t for n, t in self.tensors.items() if n not in experts and loaded(n))

    @property
    def expert_bits(self) -> float:
        """Return the bits of an expert weight, 16 or 32 when unquantised.

        Where projections differ, it is their mean.
        """
        bits = []
        for layer in self.expert_layers.values():
            for part in layer.parts:
                if part.part == "weight":
                    quantization = layer.quantization[part.projection]
                    unquantised = 32 if part.dtype == "F32" else 16
                    bits.append(unquantised if quantization is None else quantization.bits)
        return sum(bits) / len(bits)

    @property
    def dense_nbytes(self) -> int:
        """Return the bytes of `dense` on disk."""
        return sum(t.nbytes for t in self.dense)


def _with_expert_names(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors with experts named as in mlx-lm's module tree.

    Converters name them as the original weights too, which mlx-lm rewrites.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if EXPERT_TENSOR.fullmatch(name) and is_loaded(name):
            name = with_root(name)
            tensor = replace(tensor, name=name)
        if name in named:
            raise CheckpointError(
                f"{path} holds {show(name)} under two names: convert the original weights again"
            )
        named[name] = tensor
    return named


def _expert_sizes(
    layers: dict[int, ExpertLayer], text_config: dict[str, Any], path: Path
) -> dict[str, int]:
    """Return the sizes of the experts as their tensors have them."""
    experts = {layer.num_experts for layer in layers.values()}
    k = text_config["num_experts_per_tok"]
    if len(experts) > 1 or k > max(experts):
        raise CheckpointError(
            f"{path} has layers of {sorted(experts)} experts, of which config.json gives {k} to a "
            "token: each layer must have as many as the others, and no fewer than that"
        )
    first = next(iter(layers.values()))
    rows = next(p for p in first.parts if p.projection == first.projections[0]).shape[0]
    return {"num_experts": experts.pop(), "moe_intermediate_size": rows}


def check_experts(k: int | None, checkpoint: Checkpoint) -> int:
    """Return K, the number of experts per token, as given or else as trained.

    Raises:
        SettingError: K is not in 1..trained K.
    """
    if k is None:
        return checkpoint.top_k
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= checkpoint.top_k:
        raise SettingError(
            f"experts={k!r} is out of range: this model was trained with {checkpoint.top_k} "
            f"experts per token, so experts must be between 1 and {checkpoint.top_k}"
        )
    return k


def _check_text(path: Path) -> None:
    """Check that libraries that take text can open the files of a directory."""
    try:
        str(path).encode()
    except UnicodeEncodeError as e:
        raise CheckpointError(
            f"the path {show(str(path))} is not UTF-8, which MLX needs: rename its directories"
        ) from e


def _directory(path: str | Path) -> Path:
    """Return the path of a directory that exists."""
    text, path = str(path), Path(path)
    try:
        if path.is_dir():
            _check_text(path)
            return path
        exists = path.exists()
    except (OSError, ValueError):
        exists = False
    if exists:
        raise CheckpointError(
            f"{show(text)} is not a directory: give the directory that holds config.json"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise CheckpointError(
            f"there is no directory {show(text)}. If it is a repository of the Hugging Face hub, "
            f"download it first (flashmoe download hub:{text}) and give hub:{text}"
        )
    raise CheckpointError(f"there is no directory {show(text)}: give the path of a checkpoint")
