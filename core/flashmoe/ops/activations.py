"""How activations meet packed weights in the products of decode; the values of a setting.

    float32   as they are: the exact default
    int8      each group of a row rounded to 8 bits, so that the CPU's integer instructions apply:
              faster, not exact. CPU only. The router stays in float32, and so do products of
              many rows (prefill), weights of 3, 5 and 6 bits, and weights that are not quantised

The setting of an answer is in its `End`.
"""

from types import ModuleType

from ..errors import SettingError

ACTIVATIONS = ("float32", "int8")


def check_activations(activations: str, ops: ModuleType) -> None:
    """
    Raises:
        SettingError: a value that is not known, or that this module of `flashmoe.ops` lacks.
    """
    if activations not in ACTIVATIONS:
        raise SettingError(f"activations={activations!r} must be one of {', '.join(ACTIVATIONS)}")
    if activations not in ops.ACTIVATIONS:
        name = ops.NAME
        raise SettingError(
            f"activations={activations!r} is for the CPU, and this model would be computed by the "
            f"ops {name!r}: leave activations at {ops.ACTIVATIONS[0]!r}"
        )
