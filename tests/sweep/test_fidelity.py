"""Test KL divergence and perplexity against numpy and stock mlx-lm, and the texts they use."""

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
from flashmoe.sweep.documents import WINDOW, EvalDocument, sample_answers, split_file
from flashmoe.sweep.fidelity import (
    compare_with_exact,
    exact_logits_nbytes,
    mean_and_error,
    save_exact_logits,
    token_differences,
)

RANDOM = np.random.default_rng(0)
DOCUMENTS = [
    EvalDocument(RANDOM.integers(0, 160, length).tolist(), first)
    for length, first in ((300, 1), (40, 12), (250, 7), (2, 1))
]
COUNTS = [len(d.predicted) for d in DOCUMENTS]


def test_differences_equal_sums_in_double_precision():
    """Compare with sums over the vocabulary, computed one by one in double precision."""
    exact, changed = (RANDOM.normal(0, 4, (5, 30)).astype(np.float32) for _ in range(2))
    changed[3] = exact[3]
    targets = RANDOM.integers(0, 30, 5)
    got = token_differences(exact, changed, targets)
    for row, (a, b, target) in enumerate(
        zip(exact.tolist(), changed.tolist(), targets, strict=True)
    ):
        p, q = ([math.exp(x) / sum(map(math.exp, logits)) for x in logits] for logits in (a, b))
        kl = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        nll, excess = -math.log(q[target]), math.log(p[target] / q[target])
        same = max(range(30), key=a.__getitem__) == max(range(30), key=b.__getitem__)
        np.testing.assert_allclose(got[row], [nll, excess, kl, same], rtol=1e-9, atol=1e-12)
    assert got[3, 1:].tolist() == [0, 0, 1]


def test_standard_error_is_over_documents():
    """For documents of one length it is the standard error of the mean of their means."""
    sums = RANDOM.normal(3, 1, (50, 1)) * 20
    mean, error = mean_and_error(sums, np.full(50, 20))
    of_documents = sums[:, 0] / 20
    assert mean[0] == pytest.approx(of_documents.mean())
    assert error[0] == pytest.approx(of_documents.std(ddof=1) / 50**0.5)
    assert mean_and_error(sums[:1], np.array([20]))[1] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_logits_equal_those_of_stock_mlx_lm(tmp_path, family):
    path = write_toy(tmp_path / "toy", family, tie=family == "qwen3_next")
    stock, _ = mlx_lm.utils.load_model(path)
    stock.set_dtype(mx.float32)
    model = load_streaming(Checkpoint.open(path), slots=5)
    try:
        save_exact_logits(model, DOCUMENTS, tmp_path / "exact")
    finally:
        model.close()
    kept = np.fromfile(tmp_path / "exact", np.float32).reshape(-1, 160)
    assert kept.nbytes == exact_logits_nbytes(sum(COUNTS), 160)
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


def test_model_does_not_differ_from_itself(toy, tmp_path, monkeypatch):
    """No bit differs, even if other documents share the pass, or if blocks of rows are small."""
    progress = []
    save_exact_logits(toy, DOCUMENTS, tmp_path / "exact", progress.append)
    assert progress == [1] * len(DOCUMENTS)
    result = compare_with_exact(toy, DOCUMENTS, tmp_path / "exact")
    assert (result.kl, result.kl_error) == (0, 0)
    assert (result.excess, result.same_top) == (0, 1)
    assert result.tokens == sum(COUNTS)
    monkeypatch.setattr(toy.elastic_slots, "fit_prefill", lambda *sizes: 1)
    save_exact_logits(toy, DOCUMENTS, tmp_path / "alone")
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "exact").read_bytes()
    kept = np.fromfile(tmp_path / "exact", np.float32).reshape(-1, 160)
    monkeypatch.setattr(fidelity, "BLOCK_NBYTES", 160 * 8 * 9)
    again = compare_with_exact(toy, DOCUMENTS, tmp_path / "exact")
    assert again.kl < 1e-9
    targets = np.array([t for d in DOCUMENTS for t in d.predicted])
    nll = token_differences(kept, kept, targets)[:, 0].mean()
    assert result.nll == pytest.approx(nll)
    assert result.perplexity == pytest.approx(math.exp(nll))


def test_pruned_model_differs_from_the_exact_one(toy, tmp_path):
    save_exact_logits(toy, DOCUMENTS, tmp_path / "exact")
    with toy.pruned_to(1):
        pruned = compare_with_exact(toy, DOCUMENTS, tmp_path / "exact")
    assert pruned.kl > 0.01
    assert pruned.kl_error > 0
    assert pruned.same_top < 1
    assert toy.experts == 3


def test_logits_that_are_not_finite_are_refused(tmp_path):
    path = write_toy(tmp_path / "toy")
    name = "language_model.model.norm.weight"
    edit_weights(
        path, lambda weights: weights.update({name: weights[name] * mx.array(float("nan"))})
    )
    model = load_streaming(Checkpoint.open(path), slots=5)
    try:
        with pytest.raises(CheckpointError, match="not finite numbers"):
            save_exact_logits(model, DOCUMENTS, tmp_path / "exact")
    finally:
        model.close()
    assert not (tmp_path / "exact").exists()


def test_own_answers_are_repeatable_and_have_the_given_length(tmp_path):
    model, tokenizer = load(write_chat_toy(tmp_path / "toy"), slots=5)
    progress = []
    try:
        documents = sample_answers(
            model, tokenizer, ["One?", "Two?"], max_tokens=5, total=22, advance=progress.append
        )
        again = sample_answers(model, tokenizer, ["One?", "Two?"], max_tokens=5)
    finally:
        model.close()
    assert sum(len(d.predicted) for d in documents) == sum(progress) == 22
    assert all(0 < len(d.predicted) <= 5 for d in documents)
    assert documents[:2] == again
    assert "Two?" in tokenizer.decode(again[1].tokens[: again[1].first])
    assert documents[2] != documents[0]


def test_windows_have_every_token_of_the_text(tmp_path):
    tokenizer = read_tokenizer(Checkpoint.open(write_chat_toy(tmp_path / "toy")))
    text = tmp_path / "text"
    text.write_text("The cat sat by the sea, and asked what bread is made of. " * 60)
    ids = tokenizer.encode(text.read_text())
    documents = split_file(text, tokenizer, 600)
    assert [len(d.predicted) for d in documents] == [WINDOW, WINDOW, 600 - 2 * WINDOW]
    joined = [t for d in documents for t in d.tokens]
    assert joined == ids[: len(joined)]
    whole = len(ids) - -(-len(ids) // (WINDOW + 1))
    with pytest.raises(SettingError, match=f"a longer one, or --tokens {whole}$"):
        split_file(text, tokenizer, whole + 1)
    assert sum(len(d.predicted) for d in split_file(text, tokenizer, whole)) == whole
    text.write_text("")
    with pytest.raises(SettingError, match="has 0 tokens.*use another one"):
        split_file(text, tokenizer, 5)
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SettingError, match="not UTF-8 text"):
        split_file(text, tokenizer, 5)
    with pytest.raises(SettingError, match="cannot read"):
        split_file(tmp_path / "nothing", tokenizer, 5)
