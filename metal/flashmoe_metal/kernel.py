"""Define GPU kernels whose text is written once, in Metal's language, for Metal and CUDA.

`kernels/NAME.metal` holds the body of a kernel, as `mx.fast.metal_kernel` takes it. CUDA compiles
the same body behind `headers/cuda.h`, which defines Metal's words there. Two rules keep a body fit
for both: pointers into inputs are `auto` (MLX passes inputs of fewer than 8 elements as `constant`
on Metal), and all 32 lanes of a simdgroup meet at each collective.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python 3.10 has it elsewhere

#: Launches a kernel in place of MLX, for tests without a GPU: see `launched_by`.
Launcher = Callable[..., list[mx.array]]

_launcher: Launcher | None = None


@cache
def read_text(path: str) -> str:
    """Return the text of a file of this package, such as "kernels/router.metal"."""
    return _file(path).read_text()


def _file(path: str) -> Traversable:
    return files(__package__).joinpath(path)


class Kernel:
    """One kernel, compiled by MLX for each set of types and template arguments that it meets.

    Args:
        name: the name of the file in `kernels/`, without its ending.
        inputs, outputs: the names that the body gives them.
        helpers: files of `kernels/` that come before the body.
        defines: the macros that the body's `#if` tests. An input that is not read costs the host as
            much as one that is, so each variant has its own inputs.
    """

    ending = "metal"

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
        self._settings: dict[str, Any] = {}
        self._built: dict[tuple[str, tuple[mx.Dtype, ...]], Any] = {}

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
        """Launch the kernel; lazy, like every operation of MLX.

        Args:
            template: names and values of the template arguments.
            grid: threads in each dimension, a multiple of `threadgroup`.
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
        return self.launch_with_mlx(**call)

    def launch_with_mlx(self, **call: Any) -> list[mx.array]:
        """Launch the kernel by MLX on the GPU, also while `launched_by` has another launcher.

        Args:
            call: the arguments of `__call__`.
        """
        target = "metal" if mx.metal.is_available() else "cuda"
        return self.built_for(target, call["inputs"])(**call)

    @property
    def source(self) -> str:
        """The text of the body."""
        return read_text(f"kernels/{self.name}.{self.ending}")

    @property
    def source_without_comments(self) -> str:
        """The text of the body without comments, indentation and empty lines."""
        lines = (re.sub("//.*", "", line).strip() for line in self.source.splitlines())
        return "\n".join(line for line in lines if line)

    def header(self, target: str) -> str:
        """Return the text that comes before the body.

        Args:
            target: "metal" or "cuda".
        """
        defines = "".join(f"#define {word} {int(on)}\n" for word, on in self.defines.items())
        if target == "metal":
            return "\n".join([*map(read_text, self._headers(target)), defines])
        # MLX hashes the whole text in each launch: 3 us for what these files hold. So they are
        # included by their paths.
        words, *helpers = (f'#include "{_file(path)}"\n' for path in self._headers(target))
        # The body is in this namespace too, and so are the names of the words that it uses.
        return f"{words}{defines}namespace mlx::core::cu {{\n{''.join(helpers)}}}\n"

    def _headers(self, target: str) -> list[str]:
        return [f"headers/{target}.h", *(f"kernels/{name}" for name in self.helpers)]

    def built_for(self, target: str, inputs: Sequence[mx.array]) -> Any:
        """Return the `mx.fast.metal_kernel` or `cuda_kernel` for inputs of these types.

        One for Metal can be made, and traced, where there is no Metal.

        MLX keeps what it compiled by name, template arguments and, not always, text, in which an
        included file is only a path. So the name states everything that the code depends on: all of
        its text, and the types of the inputs.

        Args:
            target: "metal" or "cuda".
        """
        dtypes = tuple(x.dtype for x in inputs)
        if (target, dtypes) not in self._built:
            texts = [read_text(path) for path in self._headers(target)]
            digest = sha256(repr((texts, self.defines, self.source, dtypes)).encode()).hexdigest()
            make = mx.fast.metal_kernel if target == "metal" else mx.fast.cuda_kernel
            self._built[target, dtypes] = make(
                name=f"flashmoe_{self.name}_{digest[:12]}",
                input_names=self.inputs,
                output_names=self.outputs,
                source=self.source if target == "metal" else self.source_without_comments,
                header=self.header(target),
                **self._settings,
            )
        return self._built[target, dtypes]


class CudaKernel(Kernel):
    """A kernel in CUDA's own language, `kernels/NAME.cu`, where Metal needs none.

    Args:
        shared_memory: bytes of a block's shared memory.
    """

    ending = "cu"

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        helpers: Sequence[str] = (),
        *,
        shared_memory: int = 0,
        **defines: bool,
    ):
        super().__init__(name, inputs, outputs, helpers, **defines)
        self._settings = {"shared_memory": shared_memory}


def available() -> bool:
    """Return whether kernels can be launched: on a GPU that MLX compiles for, or by a launcher."""
    if _launcher is not None:
        return True
    return mx.default_device() == mx.gpu and (mx.metal.is_available() or mx.cuda.is_available())


def compiled(f: Callable) -> Callable:
    """Return f compiled by `mx.compile`, which spares most of the host's part of a launch.

    That part is the building of the launches. A launcher is not part of a compiled function, so
    with one each call goes through f itself.

    Args:
        f: a pure function of arrays; other arrays that it uses must be evaluated.
    """
    fast = mx.compile(f)

    def call(*args):
        return (f if _launcher is not None else fast)(*args)

    return call


@contextmanager
def launched_by(launcher: Launcher) -> Iterator[None]:
    """Let `launcher(kernel, **call)` launch all kernels meanwhile: for tests without a GPU."""
    global _launcher
    before, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = before
