"""gram.estimate: against autograd in fp64, against the change of l it predicts, its modes, groups, memory and errors."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from lldfast import gram
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer
from lldfast.errors import CorruptError, InputError, TrainingError
from lldfast.gram.debias import domain_gram
from lldfast.gram.estimation import choose_storage, split_groups
from lldfast.gram.rows import GradientRows, row_bytes
from lldfast.gram.sketch_error import expected_weight_kl, relative_error
from lldfast.gram.step import estimate_step
from lldfast.measure.score import score
from lldfast.models.batches import IGNORE, batches, token_logprobs
from lldfast.models.gpt import GPT, GPTConfig
from lldfast.models.language_model import LanguageModel
from lldfast.ops.sketch import fold as sketch
from lldfast.weights.equations import adjusted_lld_weights
from lldfast.weights.rules import Rule

rng = np.random.default_rng(0)


def texts(n, letters="abcdef gh"):
    return ["".join(rng.choice(list(letters), rng.integers(20, 150))) for _ in range(n)]


EVALSET = EvalSet.from_texts(texts(24), ["a"] * 10 + ["b"] * 13 + ["c"])
# domains that differ, so that G is well conditioned
APART = EvalSet.from_texts(
    texts(8, "abcdef ") + texts(8, "0123456789+") + texts(8, "XYZ(){};=\n"), ["words"] * 8 + ["numbers"] * 8 + ["code"] * 8
)


@pytest.fixture
def scorer():
    return LanguageModel.from_gpt(GPT("test-tiny", seed=0), load_tokenizer("bytes"))


def rows_fp64(scorer, evalset):
    """J [K, P] in fp64, one domain at a time, by plain autograd on a double copy; zeros for what a domain does not touch."""
    model = scorer.module.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    segments, rows = scorer.tokenize(evalset), []
    for name in evalset.domains:
        total, n = 0.0, 0
        for batch in batches(segments, 4096, [i for i, s in enumerate(segments) if evalset.domain[s.text] == name]):
            logits = model(batch.ids) @ model.head_weight[: model.config.valid_vocab].T
            keep = batch.labels != IGNORE
            total = total + torch.log_softmax(logits, -1)[keep].gather(1, batch.labels[keep][:, None]).sum()
            n += int(keep.sum())
        grads = torch.autograd.grad(total / n, parameters, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters, strict=True)])
        )
    model.float()
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
@pytest.mark.parametrize("groups", [1, 3, 100])
def test_equals_autograd_in_fp64(scorer, batch_tokens, groups):
    J = rows_fp64(scorer, EVALSET)
    got = gram.estimate(scorer, EVALSET, debias=False, batch_tokens=batch_tokens, groups=groups)
    np.testing.assert_allclose(got.gram, J @ J.T, rtol=2e-5)
    assert got.domains == ["a", "b", "c"] and got.n_texts == [10, 13, 1] and got.mode == "exact" and got.k is None
    assert got.expected_error == 0 and not any(got.debiased)


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


@pytest.mark.parametrize(("mode", "limit"), [("bf16", 3e-3), ("int8", 6e-3), ("int4", 0.1)])
def test_quantised_rows(scorer, mode, limit):
    exact = gram.estimate(scorer, APART, debias=False)
    got = gram.estimate(scorer, APART, mode=mode, debias=False)
    scale = np.sqrt(np.outer(exact.gram.diagonal(), exact.gram.diagonal()))
    assert np.abs(got.gram - exact.gram).max() > 0 and np.abs((got.gram - exact.gram) / scale).max() < limit
    np.testing.assert_allclose(got.naive_diagonal, exact.naive_diagonal, rtol=1e-6)  # norms are exact
    again = gram.estimate(scorer, APART, mode=mode, debias=False)
    np.testing.assert_array_equal(got.gram, again.gram)


def test_stochastic_rounding_is_unbiased():
    torch.manual_seed(0)
    J = torch.randn(3, 700) * torch.logspace(-3, 0, 700)
    J[1] += J[0]
    exact = (J.double() @ J.double().T).numpy()
    for mode in ("bf16", "int8", "int4"):
        many = []
        for seed in range(200):
            rows = GradientRows(["a", "b", "c"], (0, 700), mode, seed, torch.device("cpu"))
            for name, row in zip("abc", J, strict=True):
                rows.add(name, 0, 0, row[:300] * 7)
                rows.add(name, 0, 300, row[300:] * 7)
                rows.finish(name, 7)
            found, variance = rows.gram()
            many.append(found)
        upper, many = np.triu_indices(3, 1), np.stack(many)
        np.testing.assert_allclose(many.std(0)[upper], np.sqrt(variance[upper]), rtol=0.25)  # as it says of itself
        z = (many.mean(0) - exact)[upper] / (many.std(0, ddof=1) / np.sqrt(200))[upper]
        assert np.abs(z).max() < 4 and many.std(0)[upper].min() > 0
        np.testing.assert_allclose(many[0].diagonal(), exact.diagonal(), rtol=1e-6)


def sketched(scorer, seeds, k):
    """Delta, G of APART without a sketch, and with one of every seed, from the same gradients."""

    class Keep(dict):
        def add(self, domain, group, offset, tensor, scale=None, dot=None):
            self.setdefault((domain, group), torch.zeros(size))[offset : offset + tensor.numel()] = tensor.flatten()
            return 0.0

    kept, size = Keep(), sum(p.numel() for p in scorer.module.parameters())
    segments = scorer.tokenize(APART)
    collector, tokens = gram.Collector(scorer.module, kept), {}
    for name in APART.domains:
        for index, part in enumerate(split_groups(APART, name, 8)):
            which = [i for i, s in enumerate(segments) if s.text in part]
            tokens[name, index] = sum(len(segments[i]) for i in which)
            with collector.group(name, index):
                for batch in batches(segments, 4096, which):
                    token_logprobs(scorer, batch).sum().backward()
    keys = list(kept)
    J = torch.stack([kept[key] for key in keys]).double()
    domain, n = np.array([APART.domains.index(d) for d, _ in keys]), np.array([tokens[key] for key in keys])
    exact = domain_gram((J @ J.T).numpy(), domain, n)[0]
    grams = []
    for seed in range(seeds):
        acc = gram.Accumulator(size, APART.domains, k, seed)
        for key in keys:
            acc.add(*key, 0, kept[key])
            acc.count(*key, tokens[key])
        grams.append(acc.gram(debias=True))
    return np.array([0.3, -0.1, 0.25]), exact, grams


def test_fold_error_and_kl_are_the_formulas(scorer):
    """|dv| / |v| in the norm of G, and the KL between weights, over many seeds."""
    k = 2048
    delta, exact, grams = sketched(scorer, 150, k)
    v, w = np.linalg.solve(exact, delta), adjusted_lld_weights(exact, delta, ridge=0.0)
    errors, kls = [], []
    for got in grams:
        dv = np.linalg.solve(got, delta) - v
        errors.append(dv @ exact @ dv / (v @ exact @ v))
        kls.append(float((w * np.log(w / adjusted_lld_weights(got, delta, ridge=0.0))).sum()))
    formula = relative_error(3, k)
    assert 0.75 * formula < np.sqrt(np.mean(errors)) < 1.25 * formula
    predicted = expected_weight_kl(exact, delta, k, 1.0, gram_scale="spread")
    assert predicted / 1.5 < np.mean(kls) < predicted * 1.5


def test_fold_of_everything_in_one_chunk_is_exact(scorer):
    exact = gram.estimate(scorer, APART)
    got = gram.estimate(scorer, APART, mode="fold", k=2**16)
    np.testing.assert_allclose(got.gram, exact.gram, rtol=1e-5, atol=1e-8 * exact.gram.max())
    assert got.expected_error == 0 and got.k == 2**16
    assert got.expected_kl({"code": 0.3, "words": -0.1, "numbers": 0.2}) == 0


def test_the_order_of_texts_and_the_batch_do_not_matter(scorer):
    order = rng.permutation(len(APART))
    shuffled = EvalSet.from_texts([APART.texts[i] for i in order], APART.domain[order])
    one = gram.estimate(scorer, APART, mode="fold", k=1024, batch_tokens=100)
    two = gram.estimate(scorer, shuffled, mode="fold", k=1024, batch_tokens=10_000)
    np.testing.assert_allclose(two.matrix(one.domains), one.gram, rtol=1e-4, atol=1e-6 * one.gram.max())


def test_debiased_diagonal_is_closer_to_the_truth(scorer):
    """The naive diagonal of a few texts is inflated by their noise; over many draws the debiased one is not."""
    n = 150
    everything = EvalSet.from_texts(texts(n), ["a"] * n)
    truth = gram.estimate(scorer, everything, groups=n, mode="exact").gram[0, 0]
    naive, debiased = [], []
    for i in range(0, n, 6):
        part = EvalSet.from_texts(everything.texts[i : i + 6], ["a"] * 6)
        got = gram.estimate(scorer, part)
        naive.append(got.naive_diagonal[0])
        debiased.append(got.gram[0, 0])
        assert got.debiased == [True]
    assert abs(np.mean(debiased) - truth) < 0.5 * abs(np.mean(naive) - truth)
    assert gram.estimate(scorer, EVALSET).debiased == [True, True, False]  # one text: no noise estimate, and it says so


def test_groups_keep_documents_whole_and_forget_the_order():
    n = 40
    evalset = EvalSet(texts(n), ["a"] * n, ["measure"] * n, [i // 4 for i in range(n)])
    parts = split_groups(evalset, "a", 4)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    for part in parts:
        documents = evalset.document[part]
        assert all((evalset.document == d).sum() == (documents == d).sum() for d in documents)
    order = rng.permutation(n)
    shuffled = EvalSet([evalset.texts[i] for i in order], ["a"] * n, ["measure"] * n, evalset.document[order])
    other = [{shuffled.texts[i] for i in part} for part in split_groups(shuffled, "a", 4)]
    assert other == [{evalset.texts[i] for i in part} for part in parts]
    same = EvalSet.from_texts(["the same"] * 5, ["a"] * 5)
    assert [len(part) for part in split_groups(same, "a", 8)] == [5]  # they say nothing about the noise of texts
    few = EvalSet(texts(12), ["a"] * 12, ["measure"] * 12, [i // 4 for i in range(12)])
    assert [len(part) for part in split_groups(few, "a", 8)] == [4, 4, 4]


def test_order_frozen_and_mode(scorer):
    full = gram.estimate(scorer, EVALSET)
    np.testing.assert_allclose(full.matrix(["c", "a"]), full.gram[np.ix_([2, 0], [2, 0])])
    scorer.module.wte.weight.requires_grad_(False)
    assert gram.estimate(scorer, EVALSET).gram[0, 0] < full.gram[0, 0]
    scorer.module.train()
    before = torch.ones(32)
    scorer.module.ln_f.bias.grad = before  # a gradient that somebody else is accumulating
    gram.estimate(scorer, EVALSET)
    assert scorer.module.training and scorer.module.ln_f.bias.grad is before and bool(before.eq(1).all())
    assert all(p.grad is None for p in scorer.module.parameters() if p is not scorer.module.ln_f.bias)
    with pytest.raises(InputError, match="no domain 'z'"):
        full.matrix(["z"])


class Experts(GPT):
    """Every token goes to one of two experts by its id: a domain of even bytes never touches the odd one. One layer is unused."""

    def __init__(self, checkpointed=None):
        super().__init__("test-tiny", seed=0)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.unused = nn.Linear(3, 3)
        self.checkpointed = checkpointed

    def forward(self, ids):
        def body(x):
            even = self.experts[0](x) if bool((ids % 2 == 0).any()) else 0
            odd = self.experts[1](x) if bool((ids % 2 == 1).any()) else 0
            return x + torch.where((ids % 2 == 0)[..., None], even, odd)

        def again(x):
            return x + self.experts[0](x) * 0.1  # a parameter in two pieces of the backward pass

        x = super().forward(ids)
        if self.checkpointed is None:
            return again(body(x))
        return checkpoint(again, checkpoint(body, x, use_reentrant=self.checkpointed), use_reentrant=self.checkpointed)


@pytest.mark.parametrize("checkpointed", [None, False, True])
def test_experts_unused_parameters_and_checkpointing(checkpointed):
    torch.manual_seed(0)
    model, plain = Experts(checkpointed), Experts()
    plain.load_state_dict(model.state_dict())
    scorer = LanguageModel.from_gpt(model, load_tokenizer("bytes"))
    evalset = EvalSet.from_texts(texts(6, "bdfhjl") + texts(6, "abcdefgh"), ["even"] * 6 + ["both"] * 6)
    J = rows_fp64(LanguageModel.from_gpt(plain, load_tokenizer("bytes")), evalset)
    for mode, options in (("exact", {}), ("fold", {"k": 2**16})):
        got = gram.estimate(scorer, evalset, mode=mode, debias=False, batch_tokens=200, **options)
        np.testing.assert_allclose(got.gram, J @ J.T, rtol=1e-4)


def test_half_precision_parameters_are_summed_in_fp32():
    model = GPT("test-tiny", seed=0).bfloat16()
    scorer = LanguageModel.from_gpt(model, load_tokenizer("bytes"))
    many = gram.estimate(scorer, APART, debias=False, batch_tokens=1)
    J = rows_fp64(scorer, APART)
    scale = np.sqrt(np.outer(*[(J @ J.T).diagonal()] * 2))
    assert np.abs((many.gram - J @ J.T) / scale).max() < 0.03


def test_fold_never_holds_rows(scorer, monkeypatch):
    """The largest tensor made on the way is a gradient or a sketch, and together they stay under the declared budget."""
    model = GPT("demo-1m", seed=0)
    big = LanguageModel.from_gpt(model, load_tokenizer("bytes"))
    size, made = sum(p.numel() for p in model.parameters()), []
    for name in ("zeros", "empty", "zeros_like", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, o=original, **k: made.append(o(*a, **k)) or made[-1])
    got = gram.estimate(big, APART, mode="fold", k=4096, budget_bytes=24 * 4096 * 8)
    assert max(t.numel() * t.element_size() for t in made) < 4 * size
    assert got.extra["bytes"] == 24 * 4096 * 8
    del made[:]
    with pytest.raises(InputError, match="budget"):
        gram.estimate(big, APART, mode="fold", k=4096, budget_bytes=24 * 4096 * 8 - 1)


def test_auto_takes_the_most_accurate_that_fits():
    size, k, groups = 10_000_000, 12, 96
    beside = 8 * 2**14 * groups

    def mode(budget):
        return choose_storage("auto", "auto", k, groups, size, budget, 1e-4).mode

    assert mode(None) == "exact"
    assert mode(4 * size * k + beside) == "exact"
    assert mode(4 * size * k + beside - 1) == "bf16"
    assert mode(2 * size * k + beside - 1) == "int8"
    assert mode(int(1.03125 * size * k) + beside - 1) == "int4"
    plan = choose_storage("auto", "auto", k, groups, size, 60 << 20, 1e-4)
    assert plan.mode == "fold" and plan.k == 2**16 and plan.bytes <= 60 << 20
    assert (
        choose_storage("fold", "auto", k, groups, size, None, 1e-2).k
        < choose_storage("fold", "auto", k, groups, size, None, 1e-5).k
    )
    with pytest.raises(InputError, match="budget is 1,000"):
        choose_storage("auto", "auto", k, groups, size, 1000, 1e-4)
    with pytest.raises(InputError, match="distributed"):
        choose_storage("sharded", "auto", k, groups, size, None, 1e-4)


SHAPES = [(2000, 2000, 10_000), (2000, 16_000, 10_000), (3, 24, 7), (2000, 2000, 10), (17, 136, 2**20), (12, 96, 5_000_000)]


@pytest.mark.parametrize("domains, groups, size", SHAPES)
@pytest.mark.parametrize("mode", ["auto", "exact", "bf16", "int8", "int4", "fold"])
@pytest.mark.parametrize("budget", [None, 4 << 30])
def test_no_planned_sketch_has_more_numbers_than_parameters(mode, budget, domains, groups, size):
    plan = choose_storage(mode, "auto", domains, groups, size, budget, 1e-4)
    exact = choose_storage("exact", "auto", domains, groups, size, budget, 1e-4)
    assert plan.k <= size and plan.bytes == choose_storage(plan.mode, plan.k, domains, groups, size, None, 1e-4).bytes
    if mode in ("auto", "fold"):
        assert plan.bytes <= exact.bytes
    assert (mode == plan.mode) or (mode, plan.mode) in {("auto", "exact"), ("fold", "exact")}


def test_two_thousand_domains_of_a_small_model():
    plan = choose_storage("fold", "auto", 2000, 2000, 10_000, None, 1e-4)
    assert plan == ("fold", 10_000, 8 * 10_000 * 2000)  # a sketch planned without regard to the model had 2^20 numbers
    # Error bars take fewer numbers where the rows fit and their own sketches alone would not.
    plan = choose_storage("auto", "auto", 2000, 16_000, 10_000, 500 << 20, 1e-4)
    assert plan.mode == "exact" and plan.k == 2048 and plan.bytes == 4 * 10_000 * 2000 + 8 * 2048 * 16_000
    with pytest.raises(InputError, match="sketches of 16000 groups"):
        choose_storage("auto", "auto", 2000, 16_000, 10_000, 1 << 20, 1e-4)
    assert choose_storage("fold", 2**16, 2000, 2000, 10_000, None, 1e-4).k == 2**16  # what the caller asks for


@pytest.mark.parametrize("mode", ["exact", "bf16", "int8", "int4"])
def test_rows_take_what_is_planned_for_them(mode):
    names, size = [str(i) for i in range(5)], 100
    rows = GradientRows(names, (0, size), mode, 0, torch.device("cpu"))
    for name in names:
        rows.add(name, 0, 0, torch.randn(size))
        rows.finish(name, 1.0)
    kept = [rows._rows] if mode == "exact" else [part for row in rows._packed for part in row if part is not None]
    assert sum(part.numel() * part.element_size() for part in kept) == len(names) * row_bytes(mode, size)
    plan = choose_storage(mode, "auto", len(names), 10, size, None, 1e-4)
    assert plan.bytes == len(names) * row_bytes(mode, size) + 8 * 10 * plan.k


def test_a_small_model_is_folded_to_its_own_gradients(monkeypatch):
    """As many numbers as parameters: G without an error, also through a run's estimate, and no sketch is larger."""
    small = LanguageModel.from_gpt(GPT(GPTConfig(257, 257, 16, 1, 1, 8), seed=0), load_tokenizer("bytes"))
    size = sum(p.numel() for p in small.module.parameters())
    exact, got = (gram.estimate(small, EVALSET, mode=mode) for mode in ("exact", "fold"))
    assert (got.mode, got.k, got.expected_error) == ("fold", size, 0.0) and size & (size - 1)
    np.testing.assert_allclose(got.gram, exact.gram, rtol=1e-5, atol=1e-7 * exact.gram.max())
    np.testing.assert_allclose(got.gram_se, exact.gram_se, rtol=1e-5, atol=1e-7 * exact.gram.max())
    step = estimate_step(
        small, EVALSET, Rule("adjusted"), np.linspace(-1, 1, len(EVALSET.domains)), np.ones(len(EVALSET.domains)),
        step=0, progress=0.0, seed=0, options={"mode": "fold"},
    )  # fmt: skip
    assert step.info["expected_error"] == 0 and step.info["weights_se"] is None


@pytest.mark.parametrize("mode", ["exact", "fold"])
def test_errors_and_ridge_go_into_the_weights(scorer, mode):
    delta = {"code": 0.3, "words": -0.1, "numbers": 0.2}
    estimate = gram.estimate(scorer, APART, mode=mode, k=1024, delta=delta)
    w, se = estimate.weights(delta)
    plain = adjusted_lld_weights(estimate.gram, np.array([-0.1, 0.2, 0.3]), ridge=estimate.ridge)
    np.testing.assert_allclose([w[k] for k in ("words", "numbers", "code")], plain)
    assert list(w) == ["words", "numbers", "code"] and all(0 < x < 0.2 for x in se.values())
    direction, jackknife = estimate.direction(delta)
    assert jackknife.se.shape == (3,) and np.all(jackknife.se > 0)
    np.testing.assert_allclose(direction.contrast + direction.offset, direction.v)
    assert estimate.ridge >= 0 and estimate.gram_se.shape == (3, 3) and np.all(estimate.gram_se > 0)
    assert (estimate.expected_kl(delta) > 0) == (mode == "fold")
    assert gram.estimate(scorer, APART, ridge=None).ridge is None
    assert gram.estimate(scorer, APART, ridge=0.25).ridge == 0.25
    assert mode in estimate.summary() and "ridge" in estimate.summary()


def test_the_estimate_goes_into_the_weights_by_name(scorer):
    estimate = gram.estimate(scorer, EVALSET, ridge=None)
    delta = {"c": 0.3, "a": -0.1, "b": 0.2}
    w = adjusted_lld_weights(estimate, delta)
    plain = adjusted_lld_weights(estimate.gram, np.array([-0.1, 0.2, 0.3]))
    np.testing.assert_allclose([w[k] for k in "abc"], plain)
    np.testing.assert_allclose(adjusted_lld_weights(estimate, np.array([-0.1, 0.2, 0.3])), plain)
    with pytest.raises(InputError, match="no domain 'z'"):
        adjusted_lld_weights(estimate, {"a": 1.0, "z": 2.0})


def test_one_domain_and_scaled_losses(scorer):
    one = EvalSet.from_texts(texts(6), ["only"] * 6)
    got = gram.estimate(scorer, one, mode="fold", k=256)
    assert got.gram.shape == (1, 1) and adjusted_lld_weights(got, {"only": 3.0}) == {"only": 1.0}
    twice = EvalSet.from_texts(APART.texts * 2, [*APART.domain, *APART.domain])
    a, b = (gram.estimate(scorer, e, debias=False) for e in (APART, twice))
    np.testing.assert_allclose(a.gram, b.gram, rtol=1e-5)  # per token: duplicated texts change nothing


def test_the_declared_error_of_rounded_rows_is_theirs(scorer):
    exact, delta = gram.estimate(scorer, APART, debias=False).gram, np.array([0.3, -0.1, 0.25])
    v = np.linalg.solve(exact, delta)
    for mode in ("int8", "int4"):
        errors = []
        for seed in range(10):
            got = gram.estimate(scorer, APART, mode=mode, debias=False, seed=seed, groups=1)
            dv = np.linalg.solve(got.gram, delta) - v
            errors.append(dv @ exact @ dv / (v @ exact @ v))
        assert 0.4 < np.sqrt(np.mean(errors)) / got.expected_error < 2  # this Delta is one of all that the formula averages


def test_noise_that_was_not_measured_is_not_zero(scorer):
    delta = {"code": 0.3, "words": -0.1, "numbers": 0.2}
    one = gram.estimate(scorer, APART, groups=1)
    assert one.gram_se is None and np.isnan(list(one.weights(delta)[1].values())).all()
    assert "not debiased: words, numbers, code" in one.summary()
    assert "not debiased" not in gram.estimate(scorer, APART, groups=1, debias=False).summary()
    mixed = EvalSet(APART.texts, APART.domain, APART.part, [i if i < 16 else 99 for i in range(24)])  # code: one document
    found = gram.estimate(scorer, mixed)
    errors = found.weights(delta)[1]
    assert np.isnan(errors["code"]) and errors["words"] > 0 and found.debiased == [True, True, False]


def test_texts_that_touch_no_trainable_parameter(scorer):
    """Positions from 40 on are all that is trained: the gradient of shorter texts is 0, not missing."""

    class Late(GPT):
        def forward(self, ids):
            x = super().forward(ids)
            return x if ids.shape[1] < 40 else x + self.late

    model = Late("test-tiny", seed=0)
    for p in model.parameters():
        p.requires_grad_(False)
    model.late = torch.nn.Parameter(torch.zeros(32))
    evalset = EvalSet.from_texts(["short", *(t * 3 for t in texts(4))], ["short", *["long"] * 4])
    got = gram.estimate(LanguageModel.from_gpt(model, load_tokenizer("bytes")), evalset, debias=False)
    assert got.gram[0].tolist() == [0, 0] and got.gram[1, 1] > 0
    with torch.inference_mode():
        again = gram.estimate(LanguageModel.from_gpt(model, load_tokenizer("bytes")), evalset, debias=False)
    np.testing.assert_array_equal(got.gram, again.gram)


def test_save_and_load(scorer, tmp_path):
    got = gram.estimate(scorer, APART, mode="fold", k=512)
    path = tmp_path / "gram.npz"
    got.save(path)
    back = gram.GramEstimate.load(path)
    np.testing.assert_array_equal(back.gram, got.gram)
    assert back.summary() == got.summary() and back.extra == got.extra and back.domains == got.domains
    np.testing.assert_allclose(back.jackknife(lambda g: g).se, got.jackknife(lambda g: g).se)
    with pytest.raises(InputError, match="pass evalset="):
        gram.fidelity(scorer, torch.optim.SGD(scorer.module.parameters(), lr=1.0), back)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CorruptError, match=r"gram\.npz"):
        gram.GramEstimate.load(path)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(InputError, match="header"):
        gram.GramEstimate.load(tmp_path / "other.npz")
    with pytest.raises(InputError, match="no such file"):
        gram.GramEstimate.load(tmp_path / "none.npz")


def test_bad_calls(scorer):
    for options, message in [
        ({"mode": "sketch"}, "mode must be one of"),
        ({"groups": 0}, "groups"),
        ({"groups": True}, "groups"),
        ({"budget_bytes": 1000}, "budget"),
        ({"mode": "exact", "budget_bytes": 1000}, "budget"),
        ({"mode": "sharded"}, "torch.distributed"),
        ({"mode": "fold", "k": 1000}, "power of two"),
        ({"k": "large"}, "power of two"),
        ({"seed": -1}, "seed"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"tau": 0}, "tau"),
        ({"target_kl": 0}, "target_kl"),
        ({"ridge": -1}, "ridge"),
        ({"ridge": "some"}, "ridge"),
        ({"delta": {"a": 1.0}}, "delta: domain 'b' is missing"),
        ({"delta": [1.0, float("inf"), 0.0]}, "delta: the value of domain 'b'"),
        ({"budget_bytes": -1}, "budget_bytes"),
        ({"budget_bytes": float("nan")}, "budget_bytes"),
        ({"precondition": "adamw"}, "optimiser"),
        ({"precondition": torch.optim.NAdam(scorer.module.parameters())}, "Adam or AdamW"),
        ({"precondition": torch.optim.SGD(scorer.module.parameters(), lr=1.0)}, "AdamW"),
    ]:
        with pytest.raises(InputError, match=message):
            gram.estimate(scorer, EVALSET, **options)
    with pytest.raises(InputError, match="no evaluation texts"):
        gram.estimate(scorer, EvalSet.from_texts([], []))
    with pytest.raises(InputError, match="load_model"):
        gram.estimate(scorer.module, EVALSET)
    for p in scorer.module.parameters():
        p.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter requires a gradient"):
        gram.estimate(scorer, EVALSET)


@pytest.mark.parametrize("mode", ["exact", "fold", "int8"])
def test_what_is_not_finite_is_named_by_domain_and_text(scorer, mode):
    with torch.no_grad():
        scorer.module.wpe.weight[10] = float("nan")
    evalset = EvalSet.from_texts(["short"] * 5 + ["tiny", "small", "longer than ten", "few", "less"], ["fine"] * 5 + ["bad"] * 5)
    with pytest.raises(TrainingError, match=r"text 7 of domain 'bad' \('longer than ten'"):
        gram.estimate(scorer, evalset, mode=mode, k=256)
    assert all(p.grad is None for p in scorer.module.parameters())


def test_an_optimiser_fused_into_backward_is_refused(scorer):
    p = scorer.module.ln_f.weight
    p.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(InputError, match=r"ln_f\.weight"):
        gram.estimate(scorer, EVALSET)


def test_fold_has_the_same_bits_on_torch_and_cpp(scorer, monkeypatch):
    got = gram.estimate(scorer, EVALSET, mode="fold", k=1024, groups=2)
    original = sketch.choose
    monkeypatch.setattr(sketch, "choose", lambda op, backend, *t: "torch" if backend == "auto" else original(op, backend, *t))
    plain = gram.estimate(scorer, EVALSET, mode="fold", k=1024, groups=2)
    off = ~np.eye(len(got.products), dtype=bool)
    np.testing.assert_array_equal(plain.products[off], got.products[off])
    np.testing.assert_allclose(plain.products.diagonal(), got.products.diagonal(), rtol=1e-6)


SHARDED = """
import sys
import numpy as np
import torch.distributed as dist
from lldfast import gram
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer
from lldfast.models.gpt import GPT, GPTConfig
from lldfast.models.language_model import LanguageModel

rank, size, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
scorer = LanguageModel.from_gpt(GPT("test-tiny", seed=0), load_tokenizer("bytes"))
evalset = EvalSet.load(out + "/eval.parquet")
got = gram.estimate(scorer, evalset, mode="sharded")
assert got.mode == "sharded"
if rank == 0:
    got.save(out + "/sharded.npz")
budget = 4 * 35744 * 3 - 8  # all rows of one process do not fit; its share of them does, beside the smallest sketches
assert gram.estimate(scorer, evalset, budget_bytes=budget).mode == "sharded"
dist.destroy_process_group()
"""


def test_the_parts_of_two_processes_add_up(scorer, monkeypatch):
    """What either of two processes computes under "sharded", one after the other in this one."""
    parts = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda table: None)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        got = gram.estimate(scorer, APART, mode="sharded", debias=False)
        assert got.mode == "sharded"
        parts.append(got.gram)
    monkeypatch.undo()
    whole = gram.estimate(scorer, APART, debias=False).gram
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)
    assert all(np.abs(part).max() < 0.99 * np.abs(whole).max() for part in parts)


@pytest.mark.slow
def test_sharded_over_processes(scorer, tmp_path):
    APART.save(tmp_path / "eval.parquet")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "sharded.py"
    Path(script).write_text(SHARDED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, str(script), str(rank), "2", str(port), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    np.testing.assert_allclose(
        gram.GramEstimate.load(tmp_path / "sharded.npz").gram, gram.estimate(scorer, APART).gram, rtol=1e-5
    )
