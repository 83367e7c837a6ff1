"""MLX arrays as numpy sees them."""

import mlx.core as mx
import numpy as np


def host(*arrays: mx.array) -> list[np.ndarray]:
    """Evaluate arrays and view them as float32 numpy arrays, without a copy on the CPU."""
    ready = [mx.contiguous(x if x.dtype == mx.float32 else x.astype(mx.float32)) for x in arrays]
    mx.eval(ready)
    return [np.array(x, copy=False) for x in ready]
