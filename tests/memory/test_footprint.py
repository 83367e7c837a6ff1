"""Tests the planned footprint of a model against the arrays of mlx-lm's models and caches."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from toys import FAMILIES, write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.memory import footprint

LINEAR = ("qwen3_5_moe", "qwen3_next")


def edited(toy, **fields):
    """Write fields of the language model into config.json, and return the opened checkpoint."""
    file = toy / "config.json"
    config = json.loads(file.read_text())
    config.get("text_config", config).update(fields)
    file.write_text(json.dumps(config))
    return Checkpoint.open(toy)


@pytest.mark.slow
@pytest.mark.parametrize("interval", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_planned_caches_cover_those_of_mlx_lm(tmp_path, family, interval):
    linear = {"full_attention_interval": interval} if family in LINEAR else {}
    toy = write_toy(tmp_path, family, max_position_embeddings=256, **linear)
    model, _ = load_model(toy)
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 256), mx.int32), cache=cache)
    mx.eval([c.state for c in cache])
    arrays = [a for _, a in tree_flatten([c.state for c in cache]) if isinstance(a, mx.array)]
    used = sum(a.size * 4 for a in arrays)
    planned = footprint.cache_nbytes(Checkpoint.open(toy))
    # The plan counts one more column of each convolution than mlx-lm keeps.
    assert used <= planned <= 1.1 * used


@pytest.mark.parametrize("kind", [{}, {"bits": None}, {"bits": None, "dtype": "float32"}])
def test_widened_weights_equal_those_of_mlx(tmp_path, kind):
    checkpoint = Checkpoint.open(write_toy(tmp_path, **kind))
    quantised = {t.name.removesuffix("scales") for t in checkpoint.dense if "scales" in t.name}
    total = 0
    for name, array in mx.load(str(checkpoint.files[0])).items():
        module = name.removesuffix("weight").removesuffix("scales").removesuffix("biases")
        if "switch_mlp" not in name and module not in quantised:
            total += array.astype(mx.float32).nbytes - array.nbytes
    assert (total > 0) == ("dtype" not in kind)
    assert footprint.widened_nbytes(checkpoint) == total
    cpu, gpu = (footprint.lasting_nbytes(checkpoint, on_gpu=on_gpu) for on_gpu in (False, True))
    assert cpu - gpu == total


@pytest.mark.parametrize("family", FAMILIES)
def test_footprint_grows_with_context_up_to_the_planned_one(tmp_path, family):
    toy = write_toy(tmp_path, family)
    sizes = []
    for tokens in (256, 512, footprint.PLANNED_CONTEXT, 2**20):
        checkpoint = edited(toy, max_position_embeddings=tokens)
        prompt = footprint.prompt_nbytes(checkpoint, 2, on_gpu=True)
        sizes.append((footprint.cache_nbytes(checkpoint), prompt))
    (short, _), (longer, _), *planned = sizes
    assert sizes == sorted(sizes)
    assert planned[0] == planned[1]
    keys = 2 * 32 * 4 * (4 if family == "qwen3_moe" else 1)  # keys and values of a token
    assert longer - short == 256 * keys


def test_interval_is_ignored_without_linear_attention(tmp_path):
    toy = write_toy(tmp_path, "qwen3_moe")
    planned = footprint.cache_nbytes(Checkpoint.open(toy))
    assert footprint.cache_nbytes(edited(toy, full_attention_interval=0)) == planned


@pytest.mark.parametrize("family", LINEAR)
def test_absent_interval_gets_the_default(tmp_path, family):
    toy = write_toy(tmp_path, family)
    planned = footprint.cache_nbytes(Checkpoint.open(toy))
    config = json.loads((toy / "config.json").read_text())
    del config.get("text_config", config)["full_attention_interval"]
    (toy / "config.json").write_text(json.dumps(config))
    assert footprint.cache_nbytes(Checkpoint.open(toy)) == planned
