"""Decide which machine of a cluster holds which experts, the same in every layer.

Imports no MLX.
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import SettingError


def parse_shares(text: str, machines: int) -> tuple[float, ...]:
    """Return the share of the experts that each machine holds, by rank, in proportion.

    Args:
        text: "equal", or a number for each machine such as "3,1".
        machines: the number of machines, the lead included.

    Raises:
        SettingError: the text cannot be parsed or does not fit the number of machines.
    """
    if text == "equal":
        return (1.0,) * machines
    try:
        shares = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise SettingError(
            f"shares {text!r} must be equal, or a number for each machine such as 3,1"
        ) from None
    if len(shares) != machines:
        raise SettingError(
            f"shares {text!r} are {len(shares)} numbers, and there are {machines} machines"
        )
    if not all(math.isfinite(s) and s >= 0 for s in shares) or not sum(shares):
        raise SettingError(f"shares {text!r} must be 0 or more, and not all 0")
    return shares


def owners(experts: int, shares: tuple[float, ...]) -> np.ndarray:
    """Return the rank of the machine that holds each expert, (experts,) int64.

    Each machine has its share of any run of neighbouring experts, and of all experts its exact
    share rounded to one expert.
    """
    part = np.array(shares) / sum(shares)
    given = np.zeros(len(shares))
    owner = np.empty(experts, np.int64)
    for expert in range(experts):
        # The machine that is furthest behind its share.
        machine = int(np.argmax(part * (expert + 1) - given))
        owner[expert] = machine
        given[machine] += 1
    return owner
