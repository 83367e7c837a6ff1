"""Tests that slots give way to prompts and other processes without changing a bit of an answer."""

import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from toys import write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import ContextError
from flashmoe.memory import footprint
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import load_resident, logits, same
from flashmoe.ops import backend as ops
from flashmoe.streaming.elastic_slots import ElasticSlots

pytestmark = pytest.mark.skipif(ops.on_gpu(), reason="on a GPU the number of slots stays")
MB = 10**6
EXPERTS = 48


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A toy with experts of 1.6 MB each, 302 MB in all."""
    return write_toy(
        tmp_path_factory.mktemp("toy"),
        bits=None,
        hidden_size=512,
        moe_intermediate_size=512,
        num_experts=EXPERTS,
        max_position_embeddings=8192,
    )


@pytest.fixture(scope="module")
def checkpoint(path):
    return Checkpoint.open(path)


@pytest.fixture
def model(checkpoint):
    model = load_streaming(checkpoint, memory="4GB")
    yield model
    model.close()


def slots_with(model, spare: int) -> ElasticSlots:
    """Return slots with a budget that leaves `spare` bytes beside what lasts."""
    plan = model.plan
    lasting = plan.total - plan.slots_nbytes - plan.passing
    slots = max(plan.least_slots, min(EXPERTS, (spare - plan.passing) // plan.slot_nbytes))
    plan = replace(plan, budget=lasting + spare, slots_per_layer=slots)
    switches = [block.switch_mlp for block in model.blocks.values()]
    return ElasticSlots(model.checkpoint, plan, switches, on_gpu=False)


def needs(model, tokens, context):
    """Return the bytes that a prompt of this many tokens needs beside the slots."""
    k, checkpoint = model.experts, model.checkpoint
    return (
        footprint.cache_nbytes(checkpoint, context)
        + footprint.chunk_nbytes(checkpoint, tokens, context, k, on_gpu=False)
        + min(tokens, footprint.CHUNK_TOKENS) * footprint.pass_token_nbytes(checkpoint, k)
    )


def test_prompt_that_fits_leaves_all_slots(model):
    slots = slots_with(model, 1000 * MB)
    slots.fit_decoding([100])
    assert slots.per_layer == EXPERTS
    assert slots.fit_prefill(2000, [2000], model.experts) == 2000
    assert slots.per_layer == EXPERTS


def test_slots_give_way_to_a_prompt_and_come_back(model):
    plan = model.plan
    spare = needs(model, 4000, 4000) + 10 * plan.slot_nbytes
    slots = slots_with(model, spare)
    slots.fit_decoding([100])
    before = slots.per_layer
    pass_tokens = slots.fit_prefill(4000, [4000], model.experts)
    held = needs(model, 4000, 4000) + (pass_tokens - 512) * footprint.pass_token_nbytes(
        model.checkpoint, model.experts
    )
    assert plan.least_slots <= slots.per_layer < before
    assert pass_tokens >= footprint.CHUNK_TOKENS
    assert held + slots.per_layer * plan.slot_nbytes <= spare
    assert (
        spare
        < held
        + (slots.per_layer + 1) * plan.slot_nbytes
        + footprint.pass_token_nbytes(model.checkpoint, model.experts) * 512
    ), "some memory is unused"
    slots.fit_decoding([100])
    assert slots.per_layer == before


def test_prompt_that_cannot_fit_raises_context_error(model):
    fits = needs(model, 3000, 3000) + model.plan.least_slots * model.plan.slot_nbytes
    assert (
        slots_with(model, fits).fit_prefill(3000, [3000], model.experts) == footprint.CHUNK_TOKENS
    )
    with pytest.raises(ContextError, match="3000 tokens needs at least .* and there are") as e:
        slots_with(model, fits - 10).fit_prefill(3000, [3000], model.experts)
    assert 'memory="' in str(e.value)


def test_requested_number_of_slots_does_not_change(checkpoint):
    model = load_streaming(checkpoint, slots=7)
    assert model.elastic_slots.fit_prefill(4000, [4000], model.experts) >= footprint.CHUNK_TOKENS
    model.elastic_slots.fit_decoding([4000])
    model.elastic_slots.shrink_if_short()
    assert model.elastic_slots.per_layer == 7
    model.close()


def test_resizing_slots_does_not_change_a_bit(path, model):
    """Slots change between any two layers, and experts leave that the next call needs."""
    expected = logits(load_resident(path), list(range(60)), 7, decode=20)
    sizes = [model.plan.least_slots, EXPERTS, 11, 5, 30]

    def between():
        sizes.append(sizes.pop(0))
        model.elastic_slots._resize(sizes[0])

    model.hooks.between_layers = between
    assert same(logits(model, list(range(60)), 7, decode=20), expected)


def resident_nbytes():
    from flashmoe.memory.system import resident

    return resident()


def test_memory_of_dropped_slots_is_released(model):
    cache = make_prompt_cache(model)
    model.elastic_slots._resize(EXPERTS)
    mx.eval(model(mx.array([list(range(150))]), cache=cache))
    full = resident_nbytes()
    model.elastic_slots._resize(model.plan.least_slots)
    freed = (EXPERTS - model.plan.least_slots) * model.plan.slot_nbytes
    assert full - resident_nbytes() > 0.9 * freed


CHILD = """
import sys, zlib
import mlx.core as mx, numpy as np
from mlx_lm.models.cache import make_prompt_cache
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.models.loading import load_streaming
from flashmoe.memory.system import resident

sys.stdin.readline()
model = load_streaming(Checkpoint.open(sys.argv[1]))
for line in sys.stdin:
    if line.strip():
        model.elastic_slots.fit_decoding([1])
    digest = 0
    cache = make_prompt_cache(model)
    for token in range(70):
        model.elastic_slots._next_measurement = 0
        out = np.array(model.next_logits([token], cache).astype(mx.float32))
        digest = zlib.crc32(out.tobytes(), digest)
    print(model.elastic_slots.per_layer, resident(), digest, flush=True)
"""
TAKER = "import sys; sys.stdin.readline(); x = b'x' * int(sys.argv[1]); print(len(x), flush=True); "
TAKER += "sys.stdin.readline()"


@pytest.mark.slow
def test_slots_shrink_when_another_process_takes_memory(path, own_cgroup):
    """The memory group has no swap, so the kernel kills a process that does not fit."""

    def start(*args):
        process = subprocess.Popen(
            [sys.executable, "-c", *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        (own_cgroup / "cgroup.procs").write_text(str(process.pid))
        process.stdin.write("\n")
        process.stdin.flush()
        return process

    def go(process, line=""):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return [int(word) for word in process.stdout.readline().split()]

    (own_cgroup / "memory.limit_in_bytes").write_text(str(3000 * MB))
    model = start(CHILD, str(path))
    try:
        slots, held, bits = go(model, "begin an answer")
        assert slots == EXPERTS
        left = 3000 * MB - int((own_cgroup / "memory.usage_in_bytes").read_text())
        taker = start(TAKER, str(left - 10 * MB))
        taker.stdout.readline()
        assert model.poll() is None
        fewer, less, same_bits = go(model)
        assert fewer < slots
        assert less < held - 20 * MB
        assert same_bits == bits
        taker.communicate("\n")
        assert go(model, "begin an answer")[0] == EXPERTS
        # The limit follows the memory in use, which falls as slots give way.
        limits = []
        for _ in range(4):
            used = int((own_cgroup / "memory.usage_in_bytes").read_text())
            limits.append(used + 5 * MB)
            (own_cgroup / "memory.limit_in_bytes").write_text(str(limits[-1]))
            slots, _, same_bits = go(model)
            assert same_bits == bits
        assert slots < EXPERTS
        assert limits[-1] < limits[0] - 20 * MB
    finally:
        model.stdin.close()
        model.wait(60)
