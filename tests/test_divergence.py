"""Eq. (2) and the distances between mixtures, on vectors made by hand."""

import math

import numpy as np
import pytest

from lldfast.errors import InputError
from lldfast.measure.divergence import jsd_matrix, kl, kl_matrix, nll_gap, weight_kl
from lldfast.measure.loglik import LoglikVector

rng = np.random.default_rng(0)
N = 60
DOMAIN = np.array(["a"] * 20 + ["b"] * 40, dtype=object)
BYTES = rng.integers(300, 1024, N)
CODE = [  # Table 4, column Code
    0.0915, 0.0127, 0.00143, 0.00745, 0.0625, 0.202, 0.0222, 0.0165, 0.00306,
    0.00388, 0.185, 0.0314, 0.147, 0.137, 0.0373, 0.0235, 0.0156,
]  # fmt: skip


def vector(logprob, domain=DOMAIN, n_bytes=BYTES, text_hash=None):
    n = len(logprob)
    hashes = np.arange(n, dtype=np.uint64) if text_hash is None else text_hash
    part = np.array(["measure"] * n, dtype=object)
    return LoglikVector(np.asarray(logprob, dtype=float), domain, np.ones(n, dtype=int), n_bytes, part, hashes)


def test_var_identity():
    """1/2 Var(l_i - l_j) = |q_i - q_j|^2 / (2 N) for any number of models in the centring."""
    L = rng.normal(size=(N, 5)) * 50
    Q = L - L.mean(axis=1, keepdims=True)
    Q = Q - Q.mean(axis=0, keepdims=True)
    matrix = kl_matrix([vector(L[:, j]) for j in range(5)])
    unit = BYTES.mean() * math.log(2)
    for i in range(5):
        for j in range(5):
            q = ((Q[:, i] - Q[:, j]) ** 2).sum() / (2 * N) / unit
            assert matrix[i, j] == pytest.approx(q, abs=1e-12)
            assert kl(vector(L[:, i]), vector(L[:, j])).total == pytest.approx(q, abs=1e-12)


def test_split_sums_and_sees_what_it_should():
    base = rng.normal(size=N) * 10
    shift = np.where(DOMAIN == "a", 30.0, -5.0)
    d = kl(vector(base + shift), vector(base))
    assert d.within == pytest.approx(0, abs=1e-12) and d.between == pytest.approx(d.total)
    noisy = kl(vector(base + shift + rng.normal(size=N)), vector(base))
    assert noisy.total == pytest.approx(noisy.between + noisy.within) and noisy.within > 0
    blind = kl(vector(base + 1000.0), vector(base))
    assert blind.total == pytest.approx(0, abs=1e-9)
    assert nll_gap(vector(base + 1000.0), vector(base)) == pytest.approx(1000 * N / (BYTES.sum() * math.log(2)))


def test_standard_error_matches_simulation():
    truth = [kl(vector(rng.normal(size=N) * 10), vector(np.zeros(N))) for _ in range(600)]
    assert np.std([k.total for k in truth]) == pytest.approx(np.mean([k.se for k in truth]), rel=0.15)


def test_other_texts_are_refused():
    a = vector(np.zeros(N))
    for other in (
        vector(np.zeros(3), DOMAIN[:3], BYTES[:3]),
        # as many texts, of the same sizes and domains
        vector(np.zeros(N), text_hash=np.arange(1, N + 1, dtype=np.uint64)),
        vector(np.zeros(N), DOMAIN[::-1]),
    ):
        with pytest.raises(InputError, match="different texts"):
            kl(a, other)
        with pytest.raises(InputError, match="different texts"):
            kl_matrix({"A": a, "B": other})
        with pytest.raises(InputError, match="different texts"):
            nll_gap(a, other)
    with pytest.raises(InputError, match="no vectors"):
        kl_matrix([])


def test_golden_weight_kl():
    """The paper's 0.819: KL(u || w_code) of Table 4's Code column, renormalised."""
    assert weight_kl(np.full(17, 1 / 17), CODE) == pytest.approx(0.8189, abs=5e-5)


def test_weight_kl_by_name():
    assert weight_kl({"a": 0.5, "b": 0.5}, {"b": 0.5, "a": 0.5}) == 0
    assert weight_kl({"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}) == pytest.approx(math.log(2))
    assert weight_kl([0.5, 0.5], [1.0, 0.0]) == math.inf
    with pytest.raises(InputError, match="unknown domain 'c'"):
        weight_kl({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.3, "c": 0.2})


def test_jsd():
    w = rng.dirichlet(np.ones(4), size=6)
    m = jsd_matrix(w)
    mid = (w[1] + w[4]) / 2
    assert m[1, 4] == pytest.approx((weight_kl(w[1], mid) + weight_kl(w[4], mid)) / 2)
    np.testing.assert_allclose(m, m.T)
    assert np.abs(np.diag(m)).max() < 1e-12
    assert jsd_matrix([[1.0, 0.0], [0.0, 1.0]])[0, 1] == pytest.approx(math.log(2))
    named = jsd_matrix({"early": {"a": 0.9, "b": 0.1}, "late": {"b": 0.9, "a": 0.1}})
    np.testing.assert_allclose(named, jsd_matrix([[0.9, 0.1], [0.1, 0.9]]))
    with pytest.raises(InputError):
        jsd_matrix([])
