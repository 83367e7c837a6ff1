"""Check how the matrices of a checkpoint are quantised, as hostile input.

config.json and the tensors must agree. MLX has four modes; these are all that it writes:

| mode   | a weight                         | a scale                    | group       | bias  |
|--------|----------------------------------|----------------------------|-------------|-------|
| affine | unsigned int of 2 to 8 bits      | float of the model's dtype | 32, 64, 128 | float |
| mxfp4  | e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 | e8m0: a power of two       | 32          | none  |
| mxfp8  | e4m3: up to 448                  | e8m0                       | 32          | none  |
| nvfp4  | e2m1                             | e4m3, times a global scale | 16          | none  |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_files import DOWNLOAD_AGAIN, is_file, is_int, show
from .safetensors_header import Tensor

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Quantization:
    """How the rows of a matrix are quantised: every `group_size` weights share one scale.

    Attributes:
        bits: of a weight.
        mode: "affine", where groups have a bias too, or one of `FLOAT_MODES`.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    @property
    def scale_dtype(self) -> str | None:
        """The kind of a scale, "e8m0" or "e4m3"; None where it is a float of the model's dtype."""
        return {"mxfp4": "e8m0", "mxfp8": "e8m0", "nvfp4": "e4m3"}.get(self.mode)

    def widths(self, inner: int) -> dict[str, int]:
        """Return the parts that a matrix has, and how wide each is for rows of `inner` weights."""
        groups = inner // self.group_size
        widths = {"weight": inner * self.bits // 32, "scales": groups}
        return widths | ({"biases": groups} if self.mode == "affine" else {})

    def __str__(self) -> str:
        mode = "" if self.mode == "affine" else f"{self.mode}, "
        return f"{mode}{self.bits}-bit, group {self.group_size}"


#: The modes whose weights are small floats. Each has one number of bits and one group size.
FLOAT_MODES = {
    q.mode: q
    for q in (
        Quantization(4, 32, "mxfp4"),
        Quantization(8, 32, "mxfp8"),
        Quantization(4, 16, "nvfp4"),
    )
}
#: The fields that are no module.
_DEFAULTS = ("bits", "group_size", "mode")
MODES = ("affine", *FLOAT_MODES)
#: A weight of nvfp4 with a global scale is that scale / (448 * 6) as large as without it.
GLOBAL_SCALE_UNIT = 2688


def parse_quantization(config: dict, text_config: dict, path: Path) -> dict[str, Any] | None:
    """Return config["quantization"], checked, or None if the model is not quantised.

    It holds the default bits, group_size and mode, and overrides by the path of a module: an object
    with the same fields, False for a module that is not quantised, True for the defaults.

    Raises:
        CheckpointError: the model is quantised in a way that is not supported.
    """
    where = path / "config.json"
    quantization = config.get("quantization")
    if quantization is None:
        other = config.get("quantization_config") or text_config.get("quantization_config")
        if other is None and is_file(path / "hf_quant_config.json"):
            other = {"quant_method": "modelopt"}
        if other:
            method = other.get("quant_method") if isinstance(other, dict) else other
            raise CheckpointError(
                f"{path} is quantised by the method {show(method)}, which is not supported: "
                "convert the original weights with mlx_lm.convert -q"
            )
        return None
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"{where} has quantization {show(quantization)}: it must be an object"
        )
    _check_entry("quantization", quantization, where)
    checked: dict[str, Any] = {}
    for name, value in quantization.items():
        if isinstance(value, dict):
            value = _with_defaults(value)
            _check_entry(f"quantization[{show(name)}]", value, where)
        elif name not in _DEFAULTS and not isinstance(value, bool):
            if "." in name:
                raise CheckpointError(
                    f"{where}: quantization[{show(name)}] is {show(value)}: an object or bool is "
                    "needed"
                )
            continue  # the name of a method, or of a program: no module has it
        checked[name] = value
    return checked


def _with_defaults(entry: dict[str, Any]) -> dict[str, Any]:
    """Return how a module is quantised, with what mlx-lm takes where nothing is said."""
    mode = entry.get("mode", "affine")
    fixed = FLOAT_MODES.get(mode) if isinstance(mode, str) else None
    usual = fixed or Quantization(4, 64)
    return {"bits": usual.bits, "group_size": usual.group_size} | entry


def _check_entry(name: str, entry: dict, where: Path) -> None:
    """Check the mode, bits and group size of the defaults or of one module."""
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str) or mode not in MODES:
        raise CheckpointError(
            f"{where}: {name} has mode {show(mode)}, not one of {', '.join(MODES)}: convert the "
            "original weights with mlx_lm.convert -q"
        )
    fixed = FLOAT_MODES.get(mode)
    for key, allowed in (
        ("bits", (fixed.bits,) if fixed else BITS),
        ("group_size", (fixed.group_size,) if fixed else GROUP_SIZES),
    ):
        if not is_int(entry.get(key), 1, 128) or entry[key] not in allowed:
            needed = f"{allowed[0]}, which {mode} needs" if fixed else f"one of {allowed}"
            raise CheckpointError(
                f"{where}: {name} has {key} {show(entry.get(key))}, not {needed}: "
                "convert the original weights again with mlx_lm.convert -q"
            )


def quantization_of(
    path: str, tensors: Mapping[str, Tensor | None], inner: int, config: dict[str, Any] | None
) -> Quantization:
    """Return how a quantised module is quantised, by config.json or else as mlx-lm infers it.

    Args:
        path: the module.
        tensors: its "weight", "scales" and "biases", None for an absent one. Their shapes need not
            fit: see `Quantization.widths`.
        inner: the number of weights in a row.
        config: from `parse_quantization`; it must allow that the module is quantised.

    Raises:
        CheckpointError: a tensor is absent or has a dtype of another mode, no mode has tensors of
            these shapes, or config.json says that the module is not quantised.
    """
    if config is None or config.get(path) is False:
        raise CheckpointError(
            f"{show(path)} is quantised, but config.json says that it is not: "
            "download config.json again, or convert the original weights again"
        )
    named = config.get(path)
    scales = tensors["scales"]
    packed_floats = scales is not None and scales.dtype == "U8"
    if named is None:
        needed = ("weight", "scales") if packed_floats else ("weight", "scales", "biases")
        present = _present(path, tensors, needed)
        quantization = _inferred(path, present, inner, packed_floats)
    else:
        entry = config if named is True else named
        quantization = Quantization(entry["bits"], entry["group_size"], entry.get("mode", "affine"))
        present = _present(path, tensors, tuple(quantization.widths(inner)))
    _check_dtypes(path, present, tensors, quantization)
    if inner % quantization.group_size:
        raise CheckpointError(
            f"{show(path)} has rows of {inner} weights, not a multiple of the group size "
            f"{quantization.group_size} that config.json gives: download config.json again"
        )
    return quantization


def _present(
    path: str, tensors: Mapping[str, Tensor | None], needed: tuple[str, ...]
) -> dict[str, Tensor]:
    present: dict[str, Tensor] = {}
    for part in needed:
        tensor = tensors[part]
        if tensor is None:
            raise CheckpointError(f"tensor {show(f'{path}.{part}')} is missing: {DOWNLOAD_AGAIN}")
        present[part] = tensor
    return present


def _check_dtypes(
    path: str,
    present: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor | None],
    quantization: Quantization,
) -> None:
    dtypes = {part: tensor.dtype for part, tensor in present.items()}
    if quantization.mode == "affine":
        right = dtypes["weight"] == "U32" and dtypes["scales"] == dtypes["biases"] in FLOATS
        needed = f"scales and biases of one dtype of {', '.join(FLOATS)}"
    else:
        right = dtypes == {"weight": "U32", "scales": "U8"} and tensors["biases"] is None
        dtypes |= {"biases": "present"} if tensors["biases"] is not None else {}
        needed = "U8 scales, and no biases"
    if not right:
        raise CheckpointError(
            f"{show(path)} has dtypes {dtypes}, needed for {quantization.mode} is a U32 weight, "
            f"{needed}: convert the original weights again"
        )


def _inferred(
    path: str, tensors: Mapping[str, Tensor], inner: int, packed_floats: bool
) -> Quantization:
    """Return the quantisation of a module that config.json does not name, as mlx-lm infers it."""
    weight, scales = (tensors[part].shape for part in ("weight", "scales"))
    words, groups = ((shape or (0,))[-1] for shape in (weight, scales))
    formats = (
        list(FLOAT_MODES.values())
        if packed_floats
        else [Quantization(bits, group_size) for bits in BITS for group_size in GROUP_SIZES]
    )
    for q in formats:
        if (words * 32, groups * q.group_size) == (inner * q.bits, inner):
            return q
    modes = ", ".join(FLOAT_MODES) if packed_floats else f"{BITS} bits in groups of {GROUP_SIZES}"
    raise CheckpointError(
        f"{path} has a weight of shape {weight} and scales of shape {scales}: for the rows of "
        f"{inner} weights that config.json gives, that is no quantisation to {modes}; "
        "config.json and the weights are from two checkpoints"
    )
