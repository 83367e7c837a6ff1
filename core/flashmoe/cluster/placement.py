"""Which host of a cluster owns which experts. The same split in every layer. Imports no MLX."""

from __future__ import annotations

import math

import numpy as np

from ..errors import SettingError


def parse_shares(text: str, hosts: int) -> tuple[float, ...]:
    """ "equal", or a number for each host such as "3,1": parts of the experts, by rank.

    Raises:
        SettingError: they do not fit the hosts.
    """
    if text == "equal":
        return (1.0,) * hosts
    try:
        shares = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise SettingError(
            f"shares {text!r} must be equal, or a number for each host such as 3,1"
        ) from None
    if len(shares) != hosts:
        raise SettingError(
            f"shares {text!r} are {len(shares)} numbers, and there are {hosts} hosts"
        )
    if not all(math.isfinite(s) and s >= 0 for s in shares) or not sum(shares):
        raise SettingError(f"shares {text!r} must be 0 or more, and not all 0")
    return shares


def owners(experts: int, shares: tuple[float, ...]) -> np.ndarray:
    """The host of each expert, (experts,) int64. Each host has its part of any run of experts, and
    of all of them within one."""
    part = np.array(shares) / sum(shares)
    given = np.zeros(len(shares))
    found = np.empty(experts, np.int64)
    for expert in range(experts):
        # The one that is furthest behind.
        host = int(np.argmax(part * (expert + 1) - given))
        found[expert] = host
        given[host] += 1
    return found
