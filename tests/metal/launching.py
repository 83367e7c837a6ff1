"""Launches kernels in tests, through MLX on a GPU, and otherwise on the stand-in `msl_cpu`."""

import io
import re
from collections import Counter
from contextlib import contextmanager

import mlx.core as mx

from flashmoe_metal import kernel


@contextmanager
def launched(seed: int = 0):
    """Let kernels be launched, and yield a list to which each launch adds the kernel's name.

    Args:
        seed: seed of the order in which the stand-in runs the lanes; 0 runs them in their order.
    """
    launches = []
    on_gpu = kernel.available()

    def launch(k: kernel.Kernel, **call):
        launches.append(k.name)
        if on_gpu:
            return k.launch_with_mlx(**call)
        import msl_cpu

        return msl_cpu.launcher(seed=seed)(k, **call)

    with kernel.launched_by(launch):
        yield launches


def operations(f, *args) -> Counter[str]:
    """Count the operations in MLX's graph of the array f(*args). Each launch is one "Depends"."""

    def launch(_, inputs, output_shapes, output_dtypes, **call):
        outputs = [mx.zeros(*kind) for kind in zip(output_shapes, output_dtypes, strict=True)]
        mx.eval(outputs)
        return mx.depends(outputs, list(inputs))

    with kernel.launched_by(launch):
        graph = io.StringIO()
        mx.export_to_dot(graph, f(*args))
    # In the graph, arrays are labelled with letters and operations with words.
    return Counter(re.findall(r'label ?= ?"([A-Z]\w*[a-z]\w*)"', graph.getvalue()))
