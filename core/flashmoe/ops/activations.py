"""Check the setting `activations`: how decoding multiplies activations by packed weights.

    float32   exact, the default
    int8      each group of a row is rounded to 8 bits, so that the CPU's integer instructions
              apply: faster, not exact. CPU only. The router stays in float32, and so do products of
              many rows (prefill), weights of 3, 5 and 6 bits or of small floats, and plain weights

The `End` of an answer says which one was used.
"""

from __future__ import annotations

from ..errors import SettingError
from ..streaming.compute import Backend


def check_activations(activations: str, backend: Backend) -> None:
    """Check that a backend computes with these activations, one of `flashmoe.options.ACTIVATIONS`.

    Raises:
        SettingError: the backend does not compute with them.
    """
    if activations not in backend.activations:
        raise SettingError(
            f"activations={activations!r} is for the CPU, and this model would be computed by the "
            f"{backend.name!r} backend: leave activations at {backend.activations[0]!r}"
        )
