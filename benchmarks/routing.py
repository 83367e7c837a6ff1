"""Which experts each token of a run chose, and what the slot policy alone would have hit with them.

    with Routing() as routing:
        ...                       # the model computes
    routing.distinct()            # experts that were needed at least once, over all layers
    routing.expected(slots, experts, warm)

It looks at what `StreamingSwitchGLU.start` was given, from outside: a copy of K numbers a token.
"""

from __future__ import annotations

import numpy as np
from policies import Aged
from replay import Layer, hit_rate

from flashmoe.streaming.switch_glu import StreamingSwitchGLU


class Routing:
    """Records while it is entered."""

    def __init__(self):
        self._calls: dict[int, list[np.ndarray]] = {}  # by layer: modules have no hash

    def __enter__(self) -> Routing:
        self._start = start = StreamingSwitchGLU.start
        calls = self._calls

        def recorded(switch, inputs):
            call = start(switch, inputs)  # evaluates the indices
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
        """Of each layer, the K experts of each token."""
        return [np.concatenate(calls).tolist() for calls in self._calls.values()]

    def distinct(self) -> int:
        """Pairs of layer and expert that some token chose."""
        return sum(np.unique(np.concatenate(calls)).size for calls in self._calls.values())

    def expected(self, slots: int, experts: int, warm: int) -> float:
        """The hit rate of the tokens from `warm` on when slots are all that there is: the policy
        given token by token what the model was given, chunks of a prompt too."""
        return hit_rate(self.layers, warm, lambda layer: Aged(slots, experts))
