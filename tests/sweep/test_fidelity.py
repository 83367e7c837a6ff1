"""KL and perplexity, against numpy and against stock mlx-lm; the text they are taken on."""

import math

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from checkpoint_edits import edit_weights
from toys import FAMILIES, write_chat_toy, write_toy

from flashmoe.checkpoint.checkpoint import Checkpoint
from flashmoe.checkpoint.tokenizer import read_tokenizer
from flashmoe.errors import CheckpointError, SettingError
from flashmoe.models.loading import load, load_streaming
from flashmoe.sweep import fidelity
from flashmoe.sweep.documents import WINDOW, Document, own_answers, windows
from flashmoe.sweep.fidelity import compare, differences, exact_nbytes, keep_exact, means

RANDOM = np.random.default_rng(0)
DOCUMENTS = [
    Document(RANDOM.integers(0, 160, length).tolist(), first)
    for length, first in ((300, 1), (40, 12), (250, 7), (2, 1))
]
COUNTS = [len(d.predicted) for d in DOCUMENTS]


def test_numbers_are_others():
    """Against sums over the vocabulary, one by one, in double precision."""
    exact, found = (RANDOM.normal(0, 4, (5, 30)).astype(np.float32) for _ in range(2))
    found[3] = exact[3]
    targets = RANDOM.integers(0, 30, 5)
    got = differences(exact, found, targets)
    for row, (a, b, target) in enumerate(zip(exact.tolist(), found.tolist(), targets, strict=True)):
        p, q = ([math.exp(x) / sum(map(math.exp, logits)) for x in logits] for logits in (a, b))
        kl = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        nll, excess = -math.log(q[target]), math.log(p[target] / q[target])
        same = max(range(30), key=a.__getitem__) == max(range(30), key=b.__getitem__)
        np.testing.assert_allclose(got[row], [nll, excess, kl, same], rtol=1e-9, atol=1e-12)
    assert got[3, 1:].tolist() == [0, 0, 1]


def test_standard_error_is_of_tokens_and_not_of_documents():
    """Documents of one length: that of the mean of their means."""
    sums = RANDOM.normal(3, 1, (50, 1)) * 20
    mean, error = means(sums, np.full(50, 20))
    of_documents = sums[:, 0] / 20
    assert mean[0] == pytest.approx(of_documents.mean())
    assert error[0] == pytest.approx(of_documents.std(ddof=1) / 50**0.5)
    assert means(sums[:1], np.array([20]))[1] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_logits_are_not_those_of_stock(tmp_path, family):
    path = write_toy(tmp_path / "toy", family, tie=family == "qwen3_next")
    stock, _ = mlx_lm.utils.load_model(path)
    stock.set_dtype(mx.float32)
    model = load_streaming(Checkpoint.open(path), slots=5)
    try:
        keep_exact(model, DOCUMENTS, tmp_path / "exact")
    finally:
        model.close()
    kept = np.fromfile(tmp_path / "exact", np.float32).reshape(-1, 160)
    assert kept.nbytes == exact_nbytes(sum(COUNTS), 160)
    start = 0
    for document, count in zip(DOCUMENTS, COUNTS, strict=True):
        logits = np.array(stock(mx.array([document.tokens])))[0, document.first - 1 : -1]
        np.testing.assert_allclose(kept[start : start + count], logits, atol=2e-3)
        start += count


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    model = load_streaming(
        Checkpoint.open(write_toy(tmp_path_factory.mktemp("f") / "toy")), slots=5
    )
    yield model
    model.close()


def test_model_differs_from_itself(toy, tmp_path, monkeypatch):
    """Not by a bit, also where other documents share the sweep, or blocks of rows are small."""
    told = []
    keep_exact(toy, DOCUMENTS, tmp_path / "exact", told.append)
    assert told == [1] * len(DOCUMENTS)
    found = compare(toy, DOCUMENTS, tmp_path / "exact")
    assert (found.kl, found.kl_error, found.excess, found.same_top) == (0, 0, 0, 1)
    assert found.tokens == sum(COUNTS)
    monkeypatch.setattr(toy.room, "for_prompts", lambda *sizes: 1)
    keep_exact(toy, DOCUMENTS, tmp_path / "alone")
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "exact").read_bytes()
    kept = np.fromfile(tmp_path / "exact", np.float32).reshape(-1, 160)
    monkeypatch.setattr(fidelity, "BLOCK_NBYTES", 160 * 8 * 9)
    again = compare(toy, DOCUMENTS, tmp_path / "exact")
    assert again.kl < 1e-9
    targets = np.array([t for d in DOCUMENTS for t in d.predicted])
    nll = differences(kept, kept, targets)[:, 0].mean()
    assert found.nll == pytest.approx(nll)
    assert found.perplexity == pytest.approx(math.exp(nll))


def test_pruned_model_is_the_exact_one(toy, tmp_path):
    keep_exact(toy, DOCUMENTS, tmp_path / "exact")
    with toy.pruned_to(1):
        found = compare(toy, DOCUMENTS, tmp_path / "exact")
    assert found.kl > 0.01
    assert found.kl_error > 0
    assert found.same_top < 1
    assert toy.experts == 3


def test_logits_that_are_no_numbers_become_a_result(tmp_path):
    path = write_toy(tmp_path / "toy")
    name = "language_model.model.norm.weight"
    edit_weights(
        path, lambda weights: weights.update({name: weights[name] * mx.array(float("nan"))})
    )
    model = load_streaming(Checkpoint.open(path), slots=5)
    try:
        with pytest.raises(CheckpointError, match="no finite numbers"):
            keep_exact(model, DOCUMENTS, tmp_path / "exact")
    finally:
        model.close()
    assert not (tmp_path / "exact").exists()


def test_answers_are_other_ones(tmp_path):
    model, tokenizer = load(write_chat_toy(tmp_path / "toy"), slots=5)
    told = []
    try:
        found = own_answers(
            model, tokenizer, ["One?", "Two?"], most=5, total=22, advance=told.append
        )
        again = own_answers(model, tokenizer, ["One?", "Two?"], most=5)
    finally:
        model.close()
    assert sum(len(d.predicted) for d in found) == sum(told) == 22
    assert all(0 < len(d.predicted) <= 5 for d in found)
    assert found[:2] == again
    assert "Two?" in tokenizer.decode(again[1].tokens[: again[1].first])
    assert found[2] != found[0]


def test_windows_miss_tokens(tmp_path):
    tokenizer = read_tokenizer(Checkpoint.open(write_chat_toy(tmp_path / "toy")))
    text = tmp_path / "text"
    text.write_text("The cat sat by the sea, and asked what bread is made of. " * 60)
    ids = tokenizer.encode(text.read_text())
    found = windows(text, tokenizer, 600)
    assert [len(d.predicted) for d in found] == [WINDOW, WINDOW, 600 - 2 * WINDOW]
    joined = [t for d in found for t in d.tokens]
    assert joined == ids[: len(joined)]
    whole = len(ids) - -(-len(ids) // (WINDOW + 1))
    with pytest.raises(SettingError, match=f"a longer one, or --tokens {whole}$"):
        windows(text, tokenizer, whole + 1)
    assert sum(len(d.predicted) for d in windows(text, tokenizer, whole)) == whole
    text.write_text("")
    with pytest.raises(SettingError, match="has 0 tokens.*give another one"):
        windows(text, tokenizer, 5)
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SettingError, match="no UTF-8 text"):
        windows(text, tokenizer, 5)
    with pytest.raises(SettingError, match="cannot read"):
        windows(tmp_path / "nothing", tokenizer, 5)
