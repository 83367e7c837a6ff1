"""Test how experts are placed on the machines of a cluster by their shares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.cluster.placement import owners, parse_shares
from flashmoe.errors import SettingError


@given(
    st.integers(1, 600),
    st.lists(st.floats(0, 100), min_size=1, max_size=9).filter(lambda s: sum(s) > 0.01),
)
def test_experts_are_placed_in_proportion_to_the_shares(experts, shares):
    ranks = owners(experts, tuple(shares))
    part = np.array(shares) / sum(shares)
    for upto in (experts, experts // 2):
        counts = np.bincount(ranks[:upto], minlength=len(shares))
        assert counts.sum() == upto
        assert np.all(np.abs(counts - part * upto) <= len(shares))
    assert not np.bincount(ranks, minlength=len(shares))[part == 0].any()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("1,2,3", "are 3 numbers, and there are 2"),
        ("a,b", "must be equal, or"),
        ("0,0", "not all 0"),
    ]
    + [("nan,1", "not all 0"), ("-1,2", "0 or more"), ("", "must be equal")],
)
def test_shares_are_parsed_or_refused(text, wrong):
    with pytest.raises(SettingError, match=wrong):
        parse_shares(text, 2)
    assert parse_shares("equal", 2) == (1, 1)
    assert parse_shares("3,1.5", 2) == (3, 1.5)
