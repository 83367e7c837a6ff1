"""A kernel: one text, written in Metal's words, for every GPU that MLX has a back end for.

`kernels/NAME.metal` holds the body, as `mx.fast.metal_kernel` takes it. CUDA compiles the same
body behind `headers/cuda.h`, which says what Metal's words mean there. Two rules keep a body fit
for both: pointers into inputs are `auto` (MLX passes inputs of fewer than 8 elements as `constant`
on Metal), and all 32 lanes of a simdgroup meet at each collective.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

import mlx.core as mx

#: A launch of a kernel, for those that have no GPU: see `launched_by`.
Launcher = Callable[..., list[mx.array]]

_launcher: Launcher | None = None


@cache
def text(path: str) -> str:
    """The text of a file of this package, such as "kernels/router.metal"."""
    return _place(path).read_text()


def _place(path: str):
    return files(__package__).joinpath(path)


class Kernel:
    """One kernel, compiled by MLX for each set of types and template arguments that it meets.

    Args:
        name: of the file in `kernels/`.
        inputs, outputs: the names that its body gives them.
        helpers: files of `kernels/` that come before it.
        defines: what is defined for its `#if`. An input that is not read costs the host as much as
            one that is, so each variant has its own inputs.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        helpers: Sequence[str] = (),
        **defines: bool,
    ):
        self.name = name
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.helpers, self.defines = list(helpers), defines
        self._made: dict[tuple[str, tuple[mx.Dtype, ...]], Any] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Launch it; lazy, as every operation of MLX.

        grid: in threads, a multiple of threadgroup in each dimension.
        """
        call = {
            "inputs": list(inputs),
            "template": list(template),
            "grid": grid,
            "threadgroup": threadgroup,
            "output_shapes": list(output_shapes),
            "output_dtypes": list(output_dtypes),
        }
        if _launcher is not None:
            return _launcher(self, **call)
        return self.on_gpu(**call)

    def on_gpu(self, **call) -> list[mx.array]:
        """Launch it by MLX, whoever else may launch kernels now."""
        target = "metal" if mx.metal.is_available() else "cuda"
        return self.made(target, call["inputs"])(**call)

    @property
    def source(self) -> str:
        """The body."""
        return text(f"kernels/{self.name}.metal")

    @property
    def bare(self) -> str:
        """The body without what only a reader wants."""
        lines = (re.sub("//.*", "", line).strip() for line in self.source.splitlines())
        return "\n".join(line for line in lines if line)

    def header(self, target: str) -> str:
        """What comes before the body. target: "metal" or "cuda"."""
        defines = "".join(f"#define {word} {int(on)}\n" for word, on in self.defines.items())
        if target == "metal":
            return "\n".join([*map(text, self._headers(target)), defines])
        # MLX hashes the whole text in each launch: 3 us for what these files hold.
        words, *helpers = (f'#include "{_place(path)}"\n' for path in self._headers(target))
        # Where the body is, and where the names of its words are.
        return f"{words}{defines}namespace mlx::core::cu {{\n{''.join(helpers)}}}\n"

    def _headers(self, target: str) -> list[str]:
        return [f"headers/{target}.h", *(f"kernels/{name}" for name in self.helpers)]

    def made(self, target: str, inputs: Sequence[mx.array]):
        """As an `mx.fast.metal_kernel` or `cuda_kernel`, for inputs of these types. One for Metal
        can be made, and traced, where there is no Metal. target: "metal" or "cuda".

        MLX keeps what it compiled by name, template arguments and, not always, text, in which an
        included file is a path. So the name says what the code depends on: all of its text, and
        the types of the inputs.
        """
        dtypes = tuple(x.dtype for x in inputs)
        if (target, dtypes) not in self._made:
            texts = [text(path) for path in self._headers(target)]
            digest = sha256(repr((texts, self.defines, self.source, dtypes)).encode()).hexdigest()
            make = mx.fast.metal_kernel if target == "metal" else mx.fast.cuda_kernel
            self._made[target, dtypes] = make(
                name=f"flashmoe_{self.name}_{digest[:12]}",
                input_names=self.inputs,
                output_names=self.outputs,
                source=self.source if target == "metal" else self.bare,
                header=self.header(target),
            )
        return self._made[target, dtypes]


def available() -> bool:
    """Whether kernels can be launched: on a GPU for which MLX compiles them, or by a launcher."""
    if _launcher is not None:
        return True
    return mx.default_device() == mx.gpu and (mx.metal.is_available() or mx.cuda.is_available())


def compiled(f: Callable) -> Callable:
    """f by `mx.compile`, which spares the building of its launches: most of what one costs.

    f: a pure function of arrays, that holds evaluated arrays only. A launcher is not part of a
    compiled function, so it goes through f itself.
    """
    fast = mx.compile(f)

    def call(*args):
        return (f if _launcher is not None else fast)(*args)

    return call


@contextmanager
def launched_by(launcher: Launcher):
    """Let something else launch the kernels, as `launcher(kernel, **call)`: tests without a GPU."""
    global _launcher
    before, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = before
