"""Gets the source that MLX gives to Metal for a kernel, without Metal, and turns it into C++.

MLX can trace a kernel where there is no Metal, and prints the kernel's source then. So the
signature, the template arguments and the address spaces are the ones that MLX writes.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import count

import mlx.core as mx

_stdout = threading.Lock()

#: The expression in lanes.h for each attribute of a kernel's parameter.
PLACES = {
    "thread_position_in_grid": "msl::lane().in_grid",
    "thread_position_in_threadgroup": "msl::lane().in_group",
    "thread_index_in_threadgroup": "msl::lane().index",
    "thread_index_in_simdgroup": "msl::lane().in_simd",
    "simdgroup_index_in_threadgroup": "msl::lane().simd",
    "simdgroups_per_threadgroup": "msl::group().simds",
    "threads_per_simdgroup": "msl::kSimd",
    "threadgroup_position_in_grid": "msl::group().position",
    "threadgroups_per_grid": "msl::group().groups",
    "threads_per_threadgroup": "msl::group().size",
    "threads_per_grid": "msl::group().grid",
}

#: The declaration of a threadgroup array, as (indent, type, name, sizes). It matches no pointers.
SHARED_ARRAY = re.compile(r"(?m)^(\s*)threadgroup\s+([\w:<>, ]+?)\s+(\w+)((?:\s*\[[^\]]*\])*)\s*;")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel. declared: its type. what: the attribute, such as "buffer(0)"."""

    declared: str
    name: str
    what: str

    @cached_property
    def buffer(self) -> int | None:
        """The number of a buffer; None for other parameters."""
        match = re.fullmatch(r"buffer\((\d+)\)", self.what)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Source:
    """A kernel's text for Metal and its parts: header, signature, body, instantiation."""

    text: str

    @cached_property
    def _parts(self) -> re.Match:
        pattern = r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n(.*)\n\}\n"
        return re.search(pattern, self.text, re.S)

    @property
    def name(self) -> str:
        return self._parts[1]

    @property
    def head(self) -> str:
        """The text before the body."""
        return self.text[: self._parts.start(3)]

    @property
    def body(self) -> str:
        return self._parts[3]

    @cached_property
    def parameters(self) -> list[Parameter]:
        pattern = re.compile(r"\s*(.*?)\s*(\w+) \[\[(.*)\]\]")
        return [Parameter(*pattern.fullmatch(p).groups()) for p in self._parts[2].split(",\n")]

    @property
    def instance(self) -> str:
        """The function to call: `name<arguments>` of a template, or the name."""
        match = re.search(r"decltype\((\w+<.*?>)\)", self.text[self._parts.end() :])
        return match[1] if match else self.name


def source(kernel, *, inputs: Sequence[mx.array], **call) -> Source:
    """Return the source that MLX makes of an `mx.fast.metal_kernel` for a call."""
    like = tuple((tuple(x.shape), x.dtype) for x in inputs)
    fixed = {k: tuple(v) if isinstance(v, list) else v for k, v in call.items()}
    fixed["output_shapes"] = tuple(map(tuple, fixed["output_shapes"]))
    return _source(kernel, like, tuple(sorted(fixed.items())))


@cache
def _source(kernel, like: tuple, call: tuple) -> Source:
    """Cache the sources: a trace takes some milliseconds, and tests launch a kernel often."""
    arguments = {k: list(v) if k in ("template", "output_dtypes") else v for k, v in call}
    inputs = [mx.zeros(shape, dtype) for shape, dtype in like]

    def launch(*arrays):
        return kernel(inputs=list(arrays), verbose=True, **arguments)

    with tempfile.NamedTemporaryFile(suffix=".mlxfn") as file, _printed() as printed:
        mx.export_function(file.name, launch, *inputs)
    text = printed[0]
    return Source(text[text.index("```\n") + 4 : text.rindex("```")])


@contextmanager
def _printed():
    """Yield a list that, after the block, holds what C++ code wrote to standard output."""
    printed = []
    with _stdout, tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        saved = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield printed
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            printed.append(file.read().decode())


def to_cpp(source: Source, title: str) -> str:
    """Return a C++ file whose function `run` launches the kernel.

    Args:
        title: the name of the body in messages about its lines.

    Raises:
        ValueError: The kernel has something that the stand-in would misinterpret.
    """
    head = re.sub(r"\[\[.*?\]\]", "", source.head)
    arguments = ", ".join(map(_argument, source.parameters))
    return f"""#include <metal_stdlib>
#line 1 "{title} (header)"
{head}
#line 1 "{title}"
{_shared_arrays(source.body)}
}}
extern "C" __attribute__((visibility("default")))
const char* run(void** buffers, const unsigned* sizes, unsigned seed) {{
  auto body = [](void* given) {{
    auto buffers = static_cast<void**>(given);
    (void)buffers;
    {source.instance}({arguments});
  }};
  return msl::launch(body, buffers, sizes, seed);
}}
"""


def _argument(parameter: Parameter) -> str:
    if parameter.buffer is None:
        if parameter.what not in PLACES:
            raise ValueError(f"the stand-in has no {parameter.what}")
        place = PLACES[parameter.what]
        if parameter.declared == "uint3":
            return f"uint3({place}.x, {place}.y, {place}.z)"
        return place
    pointer = f"({parameter.declared.rstrip('&*')}*)buffers[{parameter.buffer}]"
    return f"*{pointer}" if parameter.declared.endswith("&") else pointer


def _shared_arrays(body: str) -> str:
    """Return a body whose threadgroup arrays are shared by all lanes, with the same lines."""
    number = count()
    body = SHARED_ARRAY.sub(
        lambda m: f"{m[1]}auto& {m[3]} = msl::shared<{m[2]}{m[4]}, {next(number)}>();", body
    )
    if left := re.search(r"(?m)^\s*(threadgroup\s+[\w:<>, ]+?\s+\w+\s*[\[,=][^;]*;)", body):
        raise ValueError(f"declare only one threadgroup array in a statement: {left[1]!r}")
    return body
