"""Describe what an expert computes: its matrices, and the function between them.

mlx-lm has two kinds of experts. `backend.start` gets the form with the memory of the slots:

    SwitchGLU   down_proj(activation(up_proj(x), gate_proj(x)))
    SwitchMLP   fc2(activation(fc1(x)))

Each matrix has its own quantisation, and may have a `bias` for each expert, which is added to its
product, and a `global_scale` (of nvfp4): `ExpertLayer.parts` has those that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU, SwitchMLP

from ..checkpoint.expert_layers import GLU, MLP


@dataclass(frozen=True)
class ExpertForm:
    """What an expert computes.

    Attributes:
        projections: the names of its matrices. The last one is applied to the activation of the
            products of the others.
        activation: takes the products of the matrices but the last, in the reverse of their order,
            and returns an array of that shape, each value of which depends on the values in its
            place alone. None: SwiGLU, for which backends have faster code.
    """

    projections: tuple[str, ...] = GLU
    activation: Callable[..., mx.array] | None = None

    @classmethod
    def of(cls, module: nn.Module) -> ExpertForm:
        """Return the form of a SwitchGLU or SwitchMLP of mlx-lm, quantised or not."""
        if isinstance(module, SwitchMLP):
            return cls(MLP, module.activation)
        assert isinstance(module, SwitchGLU), f"{type(module).__name__} is not known"
        return cls(GLU, None if type(module.activation) is SwiGLU else module.activation)

    def activate(self, products: list[mx.array]) -> mx.array:
        """Return the activation of the products of all matrices but the last, in their order."""
        if self.activation is None:
            gate, up = products
            return swiglu(gate, up)
        return self.activation(*reversed(products))


#: SwiGLU, as most models have it.
SWIGLU = ExpertForm()
