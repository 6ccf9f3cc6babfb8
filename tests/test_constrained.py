"""Weights under a constraint: the trust region, non-negative least squares, and the fit on the simplex."""

import math

import numpy as np
import pytest

from lldfast.errors import InputError
from lldfast.weights.constrained import (
    fit_weights,
    nonnegative_least_squares,
    simplex_fit,
    trust_region_tau,
    trust_region_weights,
)

rng = np.random.default_rng(0)


def random_gram(k: int, rank: int | None = None, seed: int = 0) -> np.ndarray:
    j = np.random.default_rng(seed).normal(size=(k, 3 * k if rank is None else rank))
    return j @ j.T


class Estimate:
    """What gram.estimate returns, as far as `HasGram` asks for it."""

    def __init__(self, domains, gram, ridge=None, drift=None):
        self.domains, self.gram, self.ridge, self.drift = domains, np.asarray(gram), ridge, drift

    def matrix(self, domains):
        index = [self.domains.index(name) for name in domains]
        return self.gram[np.ix_(index, index)]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())


class TestTrustRegion:
    gram, delta = random_gram(6), np.random.default_rng(1).normal(size=6)
    prior = np.array([0.05, 0.1, 0.15, 0.2, 0.3, 0.2])

    @pytest.mark.parametrize("radius", [1e-10, 1e-3, 0.1, 1.0])
    def test_the_weights_are_at_the_radius_and_of_eq_6(self, radius):
        w = trust_region_weights(self.gram, self.delta, radius=radius, prior=self.prior)
        assert kl(w, self.prior) == pytest.approx(radius, rel=1e-5, abs=1e-15)
        v = np.linalg.solve(self.gram, self.delta)
        logits = np.log(w / self.prior)  # v / tau for some tau > 0
        slope = np.cov(v, logits)[0, 1] / v.var(ddof=1)
        assert slope > 0
        np.testing.assert_allclose(logits - logits.mean(), slope * (v - v.mean()), rtol=1e-4, atol=1e-9)

    def test_no_weights_within_the_radius_gain_more(self):
        v = np.linalg.solve(self.gram, self.delta)
        best = trust_region_weights(self.gram, self.delta, radius=0.2) @ v
        points = np.random.default_rng(2).dirichlet(np.full(6, 3.0), size=4000)
        inside = [w for w in points if kl(w, np.full(6, 1 / 6)) <= 0.2]
        assert len(inside) > 100 and all(w @ v <= best + 1e-9 for w in inside)

    def test_units_do_not_matter(self):
        w = trust_region_weights(self.gram, self.delta, radius=0.3)
        for c, s in [(7.0, 1.0), (1.0, 1e6), (1e-3, 1e-9)]:  # l -> c l, G -> s G
            np.testing.assert_allclose(trust_region_weights(c**2 * s * self.gram, c * self.delta, radius=0.3), w, rtol=1e-7)
        for gram_scale in ("spread", "trace"):
            again = trust_region_weights(self.gram, self.delta, radius=0.3, gram_scale=gram_scale)
            np.testing.assert_allclose(again, w, rtol=1e-7)
        corr = trust_region_weights(self.gram, self.delta, radius=0.3, gram_scale="corr")
        assert kl(corr, np.full(6, 1 / 6)) == pytest.approx(0.3) and not np.allclose(corr, w, rtol=1e-3)
        order = np.random.default_rng(3).permutation(6)
        shuffled = trust_region_weights(self.gram[np.ix_(order, order)], self.delta[order], radius=0.3)
        np.testing.assert_allclose(shuffled, w[order], rtol=1e-9)

    def test_a_radius_past_all_weights_gives_the_largest(self):
        w = trust_region_weights(np.eye(3), [0.1, 0.9, 0.3], radius=5.0)
        np.testing.assert_allclose(w, [0, 1, 0], atol=1e-100)
        assert (w > 0).all()  # an exact zero would stay in every geometric mean
        shared = trust_region_weights(np.eye(3), [0.9, 0.9, 0.3], radius=5.0, prior=[0.1, 0.3, 0.6])
        np.testing.assert_allclose(shared, [0.25, 0.75, 0], atol=1e-100)

    def test_no_direction_gives_the_prior(self):
        for delta in (np.zeros(6), np.ones(6)):
            np.testing.assert_allclose(trust_region_weights(np.eye(6), delta, radius=0.1, prior=self.prior), self.prior)
        assert trust_region_weights([[2.0]], [0.3], radius=0.1) == pytest.approx([1.0])

    def test_a_domain_of_prior_zero_stays_there_and_does_not_count(self):
        prior = [0.5, 0.5, 0.0]
        w = trust_region_weights(np.eye(3), [0.2, 0.1, 9.0], radius=0.05, prior=prior)
        assert w[2] == 0 and kl(w[:2], np.array([0.5, 0.5])) == pytest.approx(0.05)

    def test_rank_deficient_names_and_floor(self):
        names = list("abcdef")
        delta = dict(zip(names, self.delta.tolist(), strict=True))
        w = trust_region_weights(Estimate(names, random_gram(6, rank=2)), delta, radius=0.1, floor=0.01)
        assert list(w) == names and min(w.values()) >= 0.01 and sum(w.values()) == pytest.approx(1)
        chosen = trust_region_weights(Estimate(names[::-1], self.gram[::-1, ::-1], ridge=4.0), delta, radius=0.1)
        assert chosen == pytest.approx(trust_region_weights(self.gram, delta, radius=0.1, ridge=4.0))

    @pytest.mark.parametrize("radius", [0.0, -1.0, math.nan, math.inf, "1"])
    def test_bad_radius(self, radius):
        with pytest.raises(InputError, match="radius must be > 0"):
            trust_region_weights(np.eye(2), [1.0, 2.0], radius=radius)

    def test_tau_has_the_unit_of_v(self):
        v = np.array([0.3, -0.2, 1.0])
        assert trust_region_tau(10 * v, 0.1) == pytest.approx(10 * trust_region_tau(v, 0.1))
        assert trust_region_tau(np.ones(3), 0.1) == math.inf


class TestNonnegativeLeastSquares:
    @pytest.mark.parametrize("seed", range(30))
    def test_conditions_of_an_optimum(self, seed):
        """Karush-Kuhn-Tucker: the gradient vanishes where x > 0 and points inward where x = 0."""
        r = np.random.default_rng(seed)
        m, n = r.integers(1, 30), r.integers(1, 25)
        a, b = r.normal(size=(m, n)), r.normal(size=m)
        if seed % 3 == 0:
            a = a * 10.0 ** r.uniform(-4, 4, n)
        if seed % 4 == 0 and n > 1:
            a[:, -1] = a[:, 0]
        x = nonnegative_least_squares(a, b)
        gradient = a.T @ (b - a @ x) / np.linalg.norm(a, axis=0)
        assert (x >= 0).all() and (gradient <= 1e-12).all() and np.abs(gradient[x > 0]).max(initial=0) <= 1e-12

    def test_against_scipy(self):
        optimize = pytest.importorskip("scipy.optimize")
        r = np.random.default_rng(0)
        for _ in range(50):
            a, b = r.normal(size=(12, 9)), r.normal(size=12)
            np.testing.assert_allclose(nonnegative_least_squares(a, b), optimize.nnls(a, b)[0], rtol=1e-9, atol=1e-12)

    def test_nothing_to_fit(self):
        assert not nonnegative_least_squares(np.zeros((3, 2)), np.ones(3)).any()
        assert not nonnegative_least_squares(np.eye(3), -np.ones(3)).any()


class TestFit:
    gram, delta = random_gram(6, rank=8), np.random.default_rng(1).normal(size=6)

    def distance(self, w, step, drift=0.0, gram=None, delta=None):
        left = (self.delta if delta is None else delta) - step * ((self.gram if gram is None else gram) @ w + drift)
        return float(((left - left.mean()) ** 2).sum())

    @pytest.mark.parametrize("drift", [None, np.array([1.0, 2.0, -1.0, 0.5, 0.0, -2.0])])
    @pytest.mark.parametrize("step", ["auto", 0.01, 0.1, 1.0, 10.0])
    def test_no_point_of_the_simplex_fits_better(self, step, drift):
        fit = simplex_fit(self.gram, self.delta, step=step, drift=drift)
        move = 0.0 if drift is None else drift
        best = self.distance(fit.weights, fit.step, move)
        assert fit.residual == pytest.approx(best / ((self.delta - self.delta.mean()) ** 2).sum(), rel=1e-6, abs=1e-12)
        points = np.random.default_rng(2).dirichlet(np.full(6, 0.5), size=2000)
        near = (fit.weights + points * 1e-3) / 1.001
        steps = [fit.step] if step != "auto" else [fit.step * s for s in (0.5, 0.99, 1.0, 1.01, 2.0)]
        slack = 1e-8 * (1 + best)
        assert all(self.distance(w, s, move) >= best - slack for s in steps for w in [*points, *near, *np.eye(6)])

    def test_a_mixture_on_the_simplex_is_found_again(self):
        """Delta = a G w + offset for a w with zeros: that w fits exactly, and with the step known it is the only one."""
        gram = random_gram(6)
        w = np.array([0.5, 0.2, 0.3, 0, 0, 0])
        delta = 0.4 * gram @ w + 7.0
        fit = simplex_fit(gram, delta, step=0.4)
        np.testing.assert_allclose(fit.weights, w, atol=1e-6)
        drift = np.array([1.0, -1.0, 2.0, 0.0, 0.5, 3.0])
        np.testing.assert_allclose(fit_weights(gram, delta + 0.4 * drift, step=0.4, drift=drift), w, atol=1e-6)
        assert simplex_fit(gram, delta).residual < 1e-9

    def test_identity_with_a_free_step_is_what_delta_exceeds_its_least_by(self):
        w = fit_weights(2.5 * np.eye(6), self.delta)
        expected = self.delta - self.delta.min()
        np.testing.assert_allclose(w, expected / expected.sum(), atol=1e-8)
        assert simplex_fit(2.5 * np.eye(6), self.delta).step == pytest.approx(expected.sum() / 2.5)

    @pytest.mark.parametrize("prior", [None, np.array([0.05, 0.1, 0.15, 0.2, 0.3, 0.2])])
    @pytest.mark.parametrize("rank", [3, 18])
    def test_units_and_order_do_not_matter(self, prior, rank):
        gram = random_gram(6, rank=rank)
        drift = np.array([1.0, 2.0, -1.0, 0.5, 0.0, -2.0])
        w = fit_weights(gram, self.delta, prior=prior, drift=drift)
        fixed = fit_weights(gram, self.delta, prior=prior, drift=drift, step=0.05)
        for c, s in [(7.0, 1.0), (1.0, 1e6), (1e-3, 1e-9), (1e6, 1e3)]:  # l -> c l; G -> s G
            scaled = {"gram": c**2 * s * gram, "delta": c * self.delta, "drift": c**2 * s * drift, "prior": prior}
            np.testing.assert_allclose(fit_weights(**scaled), w, atol=1e-6)
            np.testing.assert_allclose(fit_weights(**scaled, step=0.05 / (c * s)), fixed, atol=1e-6)
        np.testing.assert_allclose(fit_weights(gram, self.delta + 100, prior=prior, drift=drift), w, atol=1e-6)
        order = np.random.default_rng(3).permutation(6)
        back = None if prior is None else prior[order]
        shuffled = fit_weights(gram[np.ix_(order, order)], self.delta[order], prior=back, drift=drift[order])
        np.testing.assert_allclose(shuffled, w[order], atol=1e-6)

    @pytest.mark.parametrize("step", ["auto", 0.5])
    def test_equal_domains_share_as_the_prior_does(self, step):
        gram = np.array([[1, 1, 0.1], [1, 1, 0.1], [0.1, 0.1, 1]])
        even = fit_weights(gram, [1.0, 1.0, 0.3], step=step, ridge=1e-9)
        assert even[0] == pytest.approx(even[1], rel=1e-4) and even[0] > 0.3
        w = fit_weights(gram, [1.0, 1.0, 0.3], step=step, ridge=1e-9, prior=[0.2, 0.6, 0.2])
        assert w[1] == pytest.approx(3 * w[0], rel=1e-4)

    def test_no_direction_helps(self):
        """A domain that only gains by moving what must stay behind: u = 0, so the answer is the prior."""
        prior = np.array([0.2, 0.3, 0.5])
        for delta in (np.zeros(3), np.full(3, 4.0)):
            fit = simplex_fit(np.eye(3), delta, prior=prior)
            np.testing.assert_allclose(fit.weights, prior)
            assert fit.step == 0 and fit.residual == 0
        fit = simplex_fit(np.eye(2), [1.0, 0.0], drift=[-10.0, 10.0], prior=prior[:2] / 0.5)
        np.testing.assert_allclose(fit.weights, [0.4, 0.6])
        assert fit.step == 0 and fit.residual == pytest.approx(1)
        balance = fit_weights(np.diag([1.0, 2.0, 4.0]), np.zeros(3), step=1.0)  # with a step, equal gains everywhere
        np.testing.assert_allclose(balance, np.array([4, 2, 1]) / 7, rtol=1e-6)

    def test_one_domain(self):
        for step in ("auto", 0.1):
            assert fit_weights([[2.0]], [0.3], step=step) == pytest.approx([1.0])

    def test_a_domain_of_prior_zero_stays_there(self):
        for step in ("auto", 0.1):
            w = fit_weights(self.gram, self.delta, step=step, prior=[0.5, 0.5, 1, 1, 1, 0])
            assert w[5] == 0 and w.sum() == pytest.approx(1)

    def test_names_floor_and_what_an_estimate_brings(self):
        names = list("abcdef")
        delta = dict(zip(names, self.delta.tolist(), strict=True))
        drift = dict(zip(names, [1.0, 2.0, -1.0, 0.5, 0.0, -2.0], strict=True))
        by_hand = fit_weights(self.gram, delta, drift=drift, ridge=3.0)
        backward = Estimate(names[::-1], self.gram[::-1, ::-1], ridge=3.0, drift=np.ones(6))
        assert fit_weights(backward, delta, drift=drift) == pytest.approx(by_hand, abs=1e-9)
        assert fit_weights(backward, delta) != pytest.approx(by_hand, abs=1e-3)
        floored = fit_weights(self.gram, delta, floor=0.02)
        plain = fit_weights(self.gram, delta)
        assert floored == pytest.approx({name: 0.88 * w + 0.02 for name, w in plain.items()}) and list(floored) == names

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"step": 0.0}, "step must be 'auto'"),
            ({"step": math.inf}, "step must be 'auto'"),
            ({"step": "big"}, "step must be 'auto'"),
            ({"drift": [1.0]}, "drift: expected 2"),
            ({"drift": [1.0, math.inf]}, "drift has entries that are not finite"),
            ({"ridge": -1.0}, "ridge"),
            ({"prior": [1.0, -1.0]}, "prior"),
            ({"floor": 0.7}, "floor"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(InputError, match=message):
            fit_weights(np.eye(2), [1.0, 2.0], **options)
