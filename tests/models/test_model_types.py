"""Tests that every MoE model type of mlx-lm streams, bit for bit as with its experts in memory."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from moe_types import CONFIGS, WITHOUT_CONFIG, write_moe

from flashmoe.checkpoint import model_types
from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.errors import SettingError
from flashmoe.generation.prompt_cache import PromptCache, PromptStore
from flashmoe.models.layerwise import Chunk, run_pass
from flashmoe.models.loading import load_streaming
from flashmoe.models.resident import load_resident, logits, same
from flashmoe.ops import backend as ops
from flashmoe.ops.reference.experts import BACKEND as REFERENCE

on_cpu = pytest.mark.skipif(ops.on_gpu(), reason="on a GPU the models compute in bfloat16")

#: These need Metal kernels of mlx-lm, whatever streams.
NEED_METAL = {"muse_spark"}
TYPES = sorted(set(CONFIGS) - (set() if mx.metal.is_available() else NEED_METAL))
#: How the experts are stored: bits, mode.
FORMATS = {"plain": (None, "affine"), "affine": (4, "affine"), "mxfp4": (4, "mxfp4")}
PROMPT = np.random.default_rng(0).integers(0, 150, 40).tolist()


def test_every_moe_type_of_mlx_lm_has_a_small_configuration():
    """A type that fails here is new in mlx-lm: give it an entry in tests/helpers/moe_types.py."""
    assert set(model_types.moe_types()) == set(CONFIGS) | set(WITHOUT_CONFIG)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return a function that writes the checkpoint of a type and a format once."""
    written = {}

    def get(name: str, kind: str = "plain") -> Checkpoint:
        if (name, kind) not in written:
            bits, mode = FORMATS[kind]
            path = tmp_path_factory.mktemp(f"{name}-{kind}")
            written[name, kind] = Checkpoint.open(write_moe(path, name, bits=bits, mode=mode))
        return written[name, kind]

    yield get
    for checkpoint in written.values():
        shutil.rmtree(checkpoint.path)


@pytest.fixture(autouse=True)
def _forget_arrays():
    yield
    mx.clear_cache()


def loaded(checkpoint: Checkpoint, **settings):
    return load_streaming(checkpoint, slots=checkpoint.top_k + 2, prompt_cache=0, **settings)


@pytest.mark.parametrize("kind", ["plain", "affine", pytest.param("mxfp4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TYPES)
def test_streamed_logits_are_those_of_mlx_lm(checkpoints, name, kind):
    """Prompt in two chunks, then three tokens, with slots for half of the experts.

    By plain MLX the streamed model has the bits of mlx-lm's own model with its experts in memory.
    """
    checkpoint = checkpoints(name, kind)
    model = loaded(checkpoint, backend=REFERENCE)
    try:
        streamed = logits(model, PROMPT, 24, 3)
        assert sum(switch.evictions for switch in model.switches.values()) > 0
    finally:
        model.close()
    stock, _ = load_model(checkpoint.path)
    if not ops.on_gpu():
        stock.set_dtype(mx.float32)
        assert same(streamed, logits(stock, PROMPT, 24, 3))
    assert all(np.isfinite(step).all() for step in streamed)


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", TYPES)
def test_fastest_backend_streams_what_it_computes_with_all_experts_resident(
    checkpoints, name, kind
):
    checkpoint = checkpoints(name, kind)
    model = loaded(checkpoint)
    resident = load_resident(checkpoint.path)
    try:
        assert same(logits(model, PROMPT, 24, 3), logits(resident, PROMPT, 24, 3))
    finally:
        model.close()
        resident.close()


#: MLX crashes in the compiled router of bailing_moe with K = 1.
REFUSES_K = {"bailing_moe"}
PRUNED = sorted(set(TYPES) - {"llama4"})  # its K is 1


@pytest.mark.parametrize("name", sorted(set(PRUNED) - REFUSES_K))
def test_pruned_k_asks_for_so_many_experts_and_goes_back(checkpoints, name):
    model = loaded(checkpoints(name), backend=REFERENCE)
    try:
        trained = model.experts
        full = logits(model, PROMPT[:8], 8, 1)
        before = model.stats
        with model.pruned_to(1):
            pruned = logits(model, PROMPT[:1], 1, 0)
        assert (model.stats - before).needed == len(model.switches)
        assert np.isfinite(pruned[0]).all()
        assert model.experts == trained
        assert same(logits(model, PROMPT[:8], 8, 1), full)
    finally:
        model.close()


@pytest.mark.parametrize("name", sorted(REFUSES_K))
def test_k_that_a_router_cannot_have_is_refused(checkpoints, name):
    model = loaded(checkpoints(name), backend=REFERENCE)
    try:
        with pytest.raises(SettingError, match="experts=1 is not possible"):
            model.experts = 1
        assert np.isfinite(logits(model, PROMPT[:8], 8, 1)[0]).all()
    finally:
        model.close()


def steps_of(model, cache, tokens, count=2):
    """Return the logits after a chunk of a prompt, and after each of the tokens that follow."""
    results = run_pass(model, [Chunk(tokens, cache)])
    rows = [model.logits(results[0].hidden)]
    for token in range(count):
        (result,) = run_pass(model, [Chunk([token], cache, step=True)])
        rows.append(model.logits(result.hidden))
    return [np.array(row.astype(mx.float32)) for row in rows]


@pytest.mark.parametrize("name", TYPES)
def test_restored_prompt_cache_and_neighbours_change_no_bit(checkpoints, tmp_path, name):
    """A cache that was kept after a chunk continues from memory, from disk, and beside others."""
    model = loaded(checkpoints(name), backend=REFERENCE)
    try:
        first, second = PROMPT[:24], PROMPT[24:]
        cache = make_prompt_cache(model)
        (kept,) = run_pass(model, [Chunk(first, cache, keep=True)])
        expected = steps_of(model, cache, second)

        entries = PromptCache(10**9)
        entries.put("entry", kept.state)
        assert same(steps_of(model, entries.get("entry"), second), expected)

        store = PromptStore(tmp_path / "states")
        store.put("a" * 40 + "-24", kept.state)
        stored = store.get("a" * 40 + "-24", make_prompt_cache(model))
        if name in NOT_STORED:
            assert stored is None
        else:
            assert same(steps_of(model, stored, second), expected)

        mine, other = entries.get("entry"), make_prompt_cache(model)
        together = run_pass(model, [Chunk(PROMPT[5:30], other), Chunk(second, mine)])
        rows = [model.logits(together[1].hidden)]
        for token in range(2):
            chunks = [Chunk([token + 7], other, step=True), Chunk([token], mine, step=True)]
            rows.append(model.logits(run_pass(model, chunks)[1].hidden))
        assert same([np.array(row.astype(mx.float32)) for row in rows], expected)
    finally:
        model.close()


#: mlx-lm cannot save the caches of these.
NOT_STORED = {"deepseek_v41"}
