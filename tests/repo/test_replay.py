"""Tests the slot policies that benchmarks/replay.py compares, and the files that it reads."""

import numpy as np
import pytest
import replay
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import Clairvoyant, hottest

EXPERTS = 12
tokens = st.lists(st.sampled_from(range(EXPERTS)), min_size=3, max_size=3, unique=True)


def misses(make, steps):
    """Return the misses of a policy at each step."""
    policy = make(steps)
    return [policy.access(experts) for experts in steps]


@settings(max_examples=60)
@given(st.lists(tokens, min_size=1, max_size=40), st.integers(3, EXPERTS))
def test_no_policy_beats_the_clairvoyant_one(steps, slots):
    best = sum(misses(lambda layer: Clairvoyant(slots, layer), steps))
    different = len({e for experts in steps for e in experts})
    assert best >= different
    for name, make in replay.policies(slots, EXPERTS, len(steps) // 2).items():
        missed = misses(make, steps)
        hot = hottest(steps[: len(steps) // 2]) if name == "pinned half" else []
        assert sum(missed) + len(hot) >= best, name
        assert all(0 <= count <= 3 for count in missed), name
        # The experts of a token are resident when the same token follows.
        assert misses(make, [*steps, steps[-1]])[-1] == 0, name
        if slots == EXPERTS:
            assert sum(missed) <= different, name


def test_frequencies_are_read_and_drawn_from(tmp_path):
    shares = replay.read_frequencies(replay.TRACES / "qwen3.5-397b.freq")
    assert shares.shape == (60, 512)
    np.testing.assert_allclose(shares.sum(axis=1), 10, rtol=1e-5)
    drawn = replay.draw(shares, 50, 4)
    assert {len(set(experts)) for layer in drawn for experts in layer} == {4}
    (tmp_path / "other").write_bytes(b"ABCD" + bytes(12))
    with pytest.raises(SystemExit, match="not QERF"):
        replay.read_frequencies(tmp_path / "other")


def test_trace_is_read():
    layers, prompt, experts = replay.read_trace(replay.TRACES / "qwen3-30b-a3b.route.csv.gz")
    assert (len(layers), prompt, experts) == (47, 28, 128)
    assert {len(layer) for layer in layers} == {156}
    assert layers[0][0] == [49, 19, 58, 29, 16, 70]
    assert replay.slots_of(48e9, 60, 512) == 96


def test_warm_start_saves_at_most_what_it_reads_before():
    layers, prompt, experts = replay.read_trace(replay.TRACES / "qwen3-30b-a3b.route.csv.gz")
    counts = replay.warm_start(layers, 90, 16, experts, 20)
    assert counts["experts"] < counts["frequencies"] <= counts["cold"]
    assert counts["cold"] <= counts["experts"] + counts["before"]
    assert counts["before"] == 16 * 47
