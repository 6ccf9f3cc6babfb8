"""G = J J^T by exact rows: against autograd in fp64, against the change of l it predicts, and its statistics."""

import numpy as np
import pytest
import torch

from lldfast import gram
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer
from lldfast.errors import InputError, TrainingError
from lldfast.loglik import score
from lldfast.models.gpt import GPT
from lldfast.models.scorer import Scorer
from lldfast.models.scoring import IGNORE, batches
from lldfast.weights import adjusted_lld_weights

rng = np.random.default_rng(0)


def texts(n):
    return ["".join(rng.choice(list("abcdef gh"), rng.integers(20, 150))) for _ in range(n)]


EVALSET = EvalSet.from_texts(texts(24), ["a"] * 10 + ["b"] * 13 + ["c"])


@pytest.fixture
def scorer():
    return Scorer.from_gpt(GPT("test-tiny", seed=0), load_tokenizer("bytes"))


def rows_fp64(scorer, evalset):
    """J [K, P] in fp64, one domain at a time, by plain autograd on a double copy."""
    model = scorer.module.double()
    segments, rows = scorer.tokenize(evalset), []
    for name in evalset.domains:
        total, n = 0.0, 0
        for batch in batches(segments, 4096, [i for i, s in enumerate(segments) if evalset.domain[s.text] == name]):
            logits = model(batch.ids) @ model.head_weight[: model.config.valid_vocab].T
            keep = batch.labels != IGNORE
            total = total + torch.log_softmax(logits, -1)[keep].gather(1, batch.labels[keep][:, None]).sum()
            n += int(keep.sum())
        grads = torch.autograd.grad(total / n, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    model.float()
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_equals_autograd_in_fp64(scorer, batch_tokens):
    J = rows_fp64(scorer, EVALSET)
    got = gram.estimate(scorer, EVALSET, debias=False, batch_tokens=batch_tokens)
    np.testing.assert_allclose(got.gram, J @ J.T, rtol=2e-5)
    assert got.domains == ["a", "b", "c"] and got.n_texts == [10, 13, 1]


def test_predicts_the_change_of_l(scorer):
    """Eq. (4): after a step eta along J^T w, l has moved by eta G w."""
    w, eta = np.array([0.5, 0.3, 0.2]), 1e-4
    g = gram.estimate(scorer, EVALSET, debias=False).gram
    before = score(scorer, EVALSET).by_domain()
    direction = torch.from_numpy(w @ rows_fp64(scorer, EVALSET)).float()
    offset = 0
    with torch.no_grad():
        for p in scorer.module.parameters():
            p += eta * direction[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
    after = score(scorer, EVALSET).by_domain()
    change = np.array([(after[k] - before[k]) / eta for k in "abc"])
    np.testing.assert_allclose(change, g @ w, rtol=5e-3)


def test_debiased_diagonal_is_closer_to_the_truth(scorer):
    """The naive diagonal of a few texts is inflated by their noise; over many draws the debiased one is not."""
    everything = EvalSet.from_texts(texts(240), ["a"] * 240)
    truth = gram.estimate(scorer, everything, groups=240).gram[0, 0]
    naive, debiased = [], []
    for i in range(0, 240, 6):
        part = EvalSet.from_texts(everything.texts[i : i + 6], ["a"] * 6)
        got = gram.estimate(scorer, part)
        naive.append(got.naive_diagonal[0])
        debiased.append(got.gram[0, 0])
        assert got.debiased == [True]
    assert abs(np.mean(debiased) - truth) < 0.5 * abs(np.mean(naive) - truth)
    assert gram.estimate(scorer, EVALSET).debiased == [True, True, False]  # one text: no noise estimate, and it says so


def test_order_frozen_and_mode(scorer):
    full = gram.estimate(scorer, EVALSET)
    np.testing.assert_allclose(full.matrix(["c", "a"]), full.gram[np.ix_([2, 0], [2, 0])])
    scorer.module.wte.weight.requires_grad_(False)
    assert gram.estimate(scorer, EVALSET).gram[0, 0] < full.gram[0, 0]
    scorer.module.train()
    gram.estimate(scorer, EVALSET)
    assert scorer.module.training and all(p.grad is None for p in scorer.module.parameters())
    with pytest.raises(InputError, match="no domain 'z'"):
        full.matrix(["z"])


def test_the_estimate_goes_into_the_weights_by_name(scorer):
    estimate = gram.estimate(scorer, EVALSET)
    delta = {"c": 0.3, "a": -0.1, "b": 0.2}
    w = adjusted_lld_weights(estimate, delta)
    plain = adjusted_lld_weights(estimate.gram, np.array([-0.1, 0.2, 0.3]))
    np.testing.assert_allclose([w[k] for k in "abc"], plain)
    np.testing.assert_allclose(adjusted_lld_weights(estimate, np.array([-0.1, 0.2, 0.3])), plain)
    with pytest.raises(InputError, match="no domain 'z'"):
        adjusted_lld_weights(estimate, {"a": 1.0, "z": 2.0})


def test_bad_calls(scorer):
    for options, message in [
        ({"mode": "fold"}, "mode must be one of"),
        ({"groups": 0}, "groups"),
        ({"budget_bytes": 1000}, "budget"),
    ]:
        with pytest.raises(InputError, match=message):
            gram.estimate(scorer, EVALSET, **options)
    with pytest.raises(InputError, match="no evaluation texts"):
        gram.estimate(scorer, EvalSet.from_texts([], []))
    with torch.no_grad():
        scorer.module.wpe.weight[5] = float("nan")
    with pytest.raises((TrainingError, InputError), match="domain 'a'"):
        gram.estimate(scorer, EVALSET)
