"""Tests that the tests of the kernels notice planted faults."""

import sys
from collections.abc import Callable

import gated_delta_problems
import mlx.core as mx
import msl_build
import pytest
import sanitized
from expert_problems import (
    Case,
    Kind,
    combine_problem,
    down_problem,
    gate_up_problem,
    matvec_problem,
    router_problem,
)
from msl_cpu import KernelError
from planted import planted

from flashmoe_metal.gated_delta_step import gated_delta_step

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="kernels run on Metal itself"),
    pytest.mark.skipif(msl_build.compiler() is None, reason="no C++ compiler"),
]
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
TERM = "terms[(term * TEAMS + team) * ROWS + r] = sum"
SHARED = Case(rows=3, shared=Kind(8), residual=mx.bfloat16)


def noticed(check: Callable, *fault: str, seed: int) -> bool:
    """Return whether a check fails with a fault, which is (file, old text, new text)."""
    with planted(*fault, seed=seed):
        try:
            check()
        except (AssertionError, KernelError):
            return True
    return False


def assert_noticed(check: Callable, *fault: str):
    # A fault may go unnoticed where lanes run in their order, so tests shuffle them.
    assert any(noticed(check, *fault, seed=seed) for seed in (0, 1, 2))


def test_sound_kernels_pass():
    for problem in (down_problem(SHARED), router_problem(), combine_problem(SHARED)):
        assert not noticed(problem.check, "rows.h", "METAL_FUNC", "METAL_FUNC", seed=1)


@pytest.mark.parametrize(
    ("old", "new", "case"),
    [
        ("i * BITS % 32;", "(i ^ 1) * BITS % 32;", Case()),
        ("<< (32 - shift)", "<< (31 - shift)", Case(Kind(5))),
        ("words[word + (shift + BITS > 32)]", "words[word]", Case(Kind(3))),
        ("(1u << BITS) - 1", "(1u << (BITS - 1)) - 1", Case(Kind(8))),
        ("i % 2 ? words[i / 2] >> 16", "i % 2 == 0 ? words[i / 2] >> 16", Case(dtype=mx.float16)),
        ("chunk * 32 / M::GROUP;", "chunk * 32 / M::GROUP + 1;", Case()),
        ("chunk * 32 / M::GROUP;", "chunk;", Case()),
        ("row * (M::IN / M::GROUP)", "row * (M::IN / 32)", Case()),
        ("fma(biases[r], v.sum, sums[r])", "sums[r]", Case()),
        ("chunks % LANES == 0 || chunk < chunks", "true", Case(Kind(0), out=33, columns=480)),
        ("chunk = i * LANES + lane", "chunk = lane", Case(out=5, columns=768)),
        ("v += simd_shuffle_xor(v, k);", "if (v > 0) v += simd_shuffle_xor(v, k);", Case()),
        ("int k = LANES / 2; k; k /= 2", "int k = LANES; k; k /= 2", Case()),
    ],
    ids=[
        "another nibble",
        "a code in two words shifted",
        "a code in two words cut",
        "a bit less",
        "halves swapped",
        "the next group",
        "groups of chunks",
        "rows of chunks",
        "no bias",
        "past the row",
        "the first chunk again",
        "a divergent collective",
        "lanes of two teams",
    ],
)
def test_fault_in_rows_is_noticed(old, new, case):
    assert_noticed(matvec_problem(case).check, "rows.h", old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (BARRIER, ""),
        (BARRIER, f"if (simdgroup_index_in_threadgroup != 1) {BARRIER}"),
        (TERM, TERM.replace("(term * TEAMS + team)", "((term + 1) * TEAMS + team)")),
        ("i < TEAMS * ROWS; i +=", "i < 1; i +="),
        ("slots[pair]", "slots[term]"),
        ("scores[token * TOP_K + k]", "scores[k]"),
        ("shared_h + size_t(token) * SHARED_IN", "shared_h"),
        ("token * GATE_STRIDE + GATE_AT", "token * GATE_STRIDE"),
        ("sum += float(residual", "sum -= float(residual"),
    ],
    ids=[
        "no barrier",
        "a barrier for some",
        "past the terms",
        "rows left out",
        "slots of the first token",
        "scores of the first token",
        "the first token's shared term",
        "another gate",
        "the residual's sign",
    ],
)
def test_fault_in_down_is_noticed(old, new):
    assert_noticed(down_problem(SHARED).check, "down.metal", old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lane == 0 && first + r < outs", "lane == 0"),
        ("g * sigmoid(g) * u", "u * sigmoid(u) * g"),
        ("first, SHARED_OUT - 1", "first, OUT - 1"),
        ("x + token * IN", "x"),
        ("pair = token * TOP_K", "pair = token * (TOP_K + SHARED)"),
        ("term < TOP_K", "term <= TOP_K"),
    ],
    ids=[
        "rows past the end",
        "gate and up swapped",
        "another height",
        "the first token's x",
        "the shared expert counts as a pair",
        "the shared expert of a stack",
    ],
)
def test_fault_in_gate_up_is_noticed(old, new):
    case = Case(shared=Kind(8, 32), shared_size=99)
    assert_noticed(gate_up_problem(case).check, "gate_up.metal", old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("keys[i] >= best", "keys[i] > best"),
        (
            "simd_max(best == key ? at * 32 + lane : 0u)",
            "simd_min(best == key ? at * 32 + lane : E)",
        ),
        ("keys[i] = i * 32 + lane < E ?", "keys[i] = i * 32 + lane <= E ?"),
        ("e < E ? float(", "e <= E ? float("),
        ("static_cast<T>(values[i] * (1 / total))", "values[i]"),
        ("most = simd_max(most)", "most = lane < 8 ? simd_max(most) : most"),
    ],
    ids=[
        "the first of equals in a lane",
        "the first of equals",
        "an expert too many",
        "a logit too many",
        "no sum",
        "a divergent collective",
    ],
)
def test_fault_in_router_is_noticed(old, new):
    problem = router_problem(logits="none", normalise=False, more=3)
    assert_noticed(problem.check, "router.metal", old, new)


def test_ignored_places_in_combine_are_noticed():
    change = "size_t(places[pair])", "size_t(pair)"
    assert_noticed(combine_problem(SHARED).check, "combine.metal", *change)


@pytest.mark.parametrize("after", ["\n\n// Eight lanes", "\n\nfloat squares"])
def test_missing_barrier_in_gated_delta_step_is_noticed(after):
    inputs, rest = gated_delta_problems.case(gated_delta_problems.SHAPES["plain"], mx.float32)

    def check():
        gated_delta_problems.check(gated_delta_step(inputs, **rest), inputs, **rest)

    assert_noticed(check, "gated_delta_step.metal", BARRIER + after, after)


@pytest.mark.skipif(sanitized.library() is None, reason="no AddressSanitizer of GCC")
def test_address_sanitizer_notices_a_read_past_the_last_row():
    done = sanitized.run("planted")
    assert done.stdout.split("\n")[:2] == ["sound", "past the end"], done.stderr
    assert "AddressSanitizer: use-after-poison" in done.stderr
