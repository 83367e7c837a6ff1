"""Record which experts each token of a run chose, and replay them through the slot policy.

    with Routing() as routing:
        ...                       # the model computes
    routing.distinct()            # experts that were needed at least once, over all layers
    routing.expected(slots, experts, warm)

It wraps `StreamingSwitchGLU.start` and copies its indices: K numbers per token.
"""

from __future__ import annotations

import numpy as np
from policies import Aged
from replay import Layer, hit_rate

from flashmoe.streaming.switch_glu import StreamingSwitchGLU


class Routing:
    """Records what the routers choose while the context is entered."""

    def __init__(self):
        self._calls: dict[int, list[np.ndarray]] = {}  # by id of the layer: modules have no hash

    def __enter__(self) -> Routing:
        self._start = start = StreamingSwitchGLU.start
        calls = self._calls

        def recorded(switch, inputs, look=np.array):
            call = start(switch, inputs, look)  # evaluates the indices
            for _, indices in inputs:
                chosen = np.array(indices).reshape(-1, indices.shape[-1])
                calls.setdefault(id(switch), []).append(chosen)
            return call

        StreamingSwitchGLU.start = recorded
        return self

    def __exit__(self, *exc) -> None:
        StreamingSwitchGLU.start = self._start

    @property
    def layers(self) -> list[Layer]:
        """The K experts of each token, for each layer."""
        return [np.concatenate(calls).tolist() for calls in self._calls.values()]

    def distinct(self) -> int:
        """Return the number of pairs of layer and expert that some token chose."""
        return sum(np.unique(np.concatenate(calls)).size for calls in self._calls.values())

    def expected(self, slots: int, experts: int, warm: int) -> float:
        """Return the hit rate of the tokens from `warm` on, of the slot policy alone.

        The policy takes what the model took token by token, chunks of a prompt too.
        """
        return hit_rate(self.layers, warm, lambda layer: Aged(slots, experts))
