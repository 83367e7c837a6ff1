"""Compiles kernels for CUDA as MLX does, with NVRTC, which needs no GPU.

The packages nvidia-cuda-nvrtc, nvidia-cuda-runtime and mlx-cuda-13 are searched among the installed
ones and in the folder $FLASHMOE_CUDA_SITE, which may hold unpacked wheels.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

#: The text that MLX puts before the header of a kernel.
PRELUDE = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
#: MLX's headers that the prelude includes, each with a text by which it is found in MLX's library.
HEADERS = {
    "mlx/backend/cuda/device/utils.cuh": b"struct alignas(sizeof(T) * N) AlignedVector",
    "mlx/backend/cuda/device/complex.cuh": b"struct is_complex :",
    "mlx/backend/cuda/device/config.h": b"#define MAX_NDIM",
}
#: Bytes reserved for the headers that NVRTC compiles beforehand; CUDA 13 needs 316 MB.
PRECOMPILED = 512 << 20
TYPES = {
    mx.bool_: "bool",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}


@dataclass(frozen=True)
class Toolkit:
    """Libraries of NVRTC and of MLX with its CUDA back end, and the folders of headers."""

    nvrtc: Path
    mlx: Path
    include: tuple[Path, ...]


def _sites() -> list[Path]:
    named = os.environ.get("FLASHMOE_CUDA_SITE")
    return [Path(p) for p in ([named] if named else []) + sys.path if Path(p).is_dir()]


def _matching(*patterns: str) -> Iterator[Path]:
    """Yield the files of all sites that match one of the patterns."""
    for site in _sites():
        for pattern in patterns:
            yield from sorted(site.glob(pattern))


@cache
def toolkit() -> Toolkit | None:
    """Return the toolkit, or None if a part of it is missing."""
    system = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    nvrtc = [*_matching("nvidia/*/lib/libnvrtc.so.*"), *system.glob("lib64/libnvrtc.so.*")]
    runtime = [*_matching("nvidia/*/include/cuda_fp16.h"), *system.glob("include/cuda_fp16.h")]
    cccl = list(_matching("mlx/include/cccl"))
    libraries = [c.parents[1] / "lib/libmlx.so" for c in cccl]
    if not (nvrtc and runtime and cccl and libraries[0].exists()):
        return None
    return Toolkit(nvrtc[0], libraries[0], (cccl[0], runtime[0].parent))


@cache
def _headers(library: Path) -> dict[str, str]:
    """Return the texts of MLX's headers.

    Raises:
        LookupError: This version of MLX has other headers.
    """
    with library.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"\0" + PRELUDE.encode() + b"\0") < 0:
            raise LookupError("this version of MLX puts another text before a kernel")
        return {name: _text_around(content, word) for name, word in HEADERS.items()}


def _text_around(content: mmap.mmap, word: bytes) -> str:
    at = content.find(word)
    if at < 0:
        raise LookupError(f"this version of MLX has no header with {word.decode()!r}")
    return content[content.rfind(b"\0", 0, at) + 1 : content.find(b"\0", at)].decode(
        "utf-8", "replace"
    )


def unit(
    kernel,
    *,
    inputs: Sequence[mx.array],
    template: Sequence[tuple],
    output_dtypes: Sequence[mx.Dtype],
    **_,
) -> str:
    """Return the text that MLX's `cuda_kernel` compiles for a call of a `Kernel`."""
    parameters = []
    for name, x in zip(kernel.inputs, inputs, strict=True):
        parameters.append(f"const {_type(x.dtype)}* {name}")
        for what, declared in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
            if x.ndim and f"{name}_{what}" in kernel.source_without_comments:
                parameters.append(f"const __grid_constant__ {declared} {name}_{what}")
    for name, dtype in zip(kernel.outputs, output_dtypes, strict=True):
        parameters.append(f"{_type(dtype)}* {name}")
    signature = ",\n".join(f"    {p}" for p in parameters)
    constants = "".join(map(_constant, template))
    return (
        f"{PRELUDE}{kernel.header('cuda')}"
        "namespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {_name(kernel)}(\n{signature}) {{\n{constants}\n"
        f"{kernel.source_without_comments}\n}}\n\n"
        "} // namespace mlx::core::cu\n"
    )


def _name(kernel) -> str:
    return f"custom_kernel_flashmoe_{kernel.name}"


def _type(dtype: mx.Dtype) -> str:
    return TYPES.get(dtype) or str(dtype).removeprefix("mlx.core.") + "_t"


def _constant(argument: tuple) -> str:
    name, value = argument
    if isinstance(value, mx.Dtype):
        return f"  using {name} = {_type(value)};\n"
    kind, value = ("bool", str(value).lower()) if isinstance(value, bool) else ("int", value)
    return f"  constexpr {kind} {name} = {value};\n"


@cache
def _precompiled() -> tempfile.TemporaryDirectory:
    """A directory in which NVRTC keeps compiled headers, which are most of what it compiles."""
    return tempfile.TemporaryDirectory(prefix="flashmoe-cuda-")


def errors(kernel, *, architecture: str = "sm_90", **call) -> str:
    """Return the errors that NVRTC reports about a kernel for a call of it, or ""."""
    tools = toolkit()
    headers = _headers(tools.mlx)
    nvrtc = ctypes.CDLL(str(tools.nvrtc))
    program = ctypes.c_void_p()
    texts, names = _strings(headers.values()), _strings(headers)
    source = unit(kernel, **call).encode()
    title = f"{kernel.name}.cu".encode()
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source, title, len(headers), texts, names
    )
    assert status == 0, status
    try:
        nvrtc.nvrtcAddNameExpression(program, f"mlx::core::cu::{_name(kernel)}".encode())
        options = ["--device-as-default-execution-space", f"--gpu-architecture={architecture}"]
        options += [f"--include-path={path}" for path in tools.include]
        if hasattr(nvrtc, "nvrtcSetPCHHeapSize"):
            nvrtc.nvrtcSetPCHHeapSize(ctypes.c_size_t(PRECOMPILED))
            options += ["--pch", f"--pch-dir={_precompiled().name}"]
        failed = nvrtc.nvrtcCompileProgram(program, len(options), _strings(options))
        return _log(nvrtc, program) if failed else ""
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _strings(texts) -> ctypes.Array:
    encoded = [t.encode() for t in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _log(nvrtc, program) -> str:
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.value.decode()
