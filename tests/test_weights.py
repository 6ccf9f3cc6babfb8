"""Eqs. (5)-(9), golden values of the method, and every way to call them wrongly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lldfast.errors import InputError
from lldfast.weights.bootstrap import bootstrap_deltas, standard_errors
from lldfast.weights.constrained import (
    fit_weights,
    trust_region_weights,
)
from lldfast.weights.equations import adjusted_direction, adjusted_lld_weights, aggregate_weights, lld_weights
from lldfast.weights.recipe import aggregation, elapsed_weights, two_stage_weights
from lldfast.weights.rules import Rule, StepGram, replay
from lldfast.weights.simplex import effective_domains, simplex, with_floor

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


@pytest.mark.parametrize(("tau", "domains"), [(0.1, 2.5), (1.0, 14.8), (10.0, 17.0)])
def test_golden_effective_domains(tau, domains):
    w = lld_weights(np.linspace(0, 1.8, 17), tau=tau)
    assert effective_domains(w) == pytest.approx(domains, abs=0.05)


def test_softmax_with_prior():
    delta, prior = rng.normal(size=6), rng.dirichlet(np.ones(6))
    w = lld_weights(delta, tau=0.7, prior=prior)
    expected = prior * np.exp(delta / 0.7)
    np.testing.assert_allclose(w, expected / expected.sum(), rtol=1e-14)
    np.testing.assert_allclose(lld_weights(delta, tau=math.inf, prior=prior), prior, rtol=1e-14)


def test_is_the_maximum_of_eq_5():
    """No random point of the simplex beats the closed form on <w, v> - tau KL(w || w0)."""
    v, prior, tau = rng.normal(size=5), rng.dirichlet(np.ones(5)), 0.5

    def objective(w):
        return w @ v - tau * (w * np.log(w / prior)).sum()

    best = objective(lld_weights(v, tau=tau, prior=prior))
    assert best == pytest.approx(tau * np.log((prior * np.exp(v / tau)).sum()))
    assert all(objective(w) <= best + 1e-12 for w in rng.dirichlet(np.ones(5), size=2000))


def test_answer_has_the_form_of_the_question():
    assert isinstance(lld_weights({"a": 1.0, "b": 2.0}), dict)
    assert list(lld_weights({"b": 1.0, "a": 2.0})) == ["b", "a"]
    assert isinstance(lld_weights([1.0, 2.0]), np.ndarray)


def test_names_align_by_name_not_position():
    delta = {"x": 1.0, "y": -1.0, "z": 0.5}
    prior = {"z": 0.2, "x": 0.5, "y": 0.3}
    by_name = lld_weights(delta, prior=prior)
    by_array = lld_weights(np.array([1.0, -1.0, 0.5]), prior=np.array([0.5, 0.3, 0.2]))
    np.testing.assert_allclose(list(by_name.values()), by_array)
    np.testing.assert_allclose(lld_weights(np.array([1.0, -1.0, 0.5]), prior=prior, domains=["x", "y", "z"]), by_array)


@pytest.mark.parametrize(
    ("delta", "options", "message"),
    [
        ([1.0, 2.0], {"tau": 0.0}, "tau"),
        ([1.0, 2.0], {"tau": -1.0}, "tau"),
        ([1.0, 2.0], {"tau": math.nan}, "tau"),
        ({"a": 1.0, "b": math.nan}, {}, "'b'"),
        ({"a": 1.0, "b": math.inf}, {}, "'b'"),
        ({"a": 1.0, "git": 2.0}, {"prior": {"a": 0.5, "gti": 0.5}}, "'gti'.*did you mean 'git'"),
        ({"a": 1.0, "b": 2.0}, {"prior": {"a": 1.0}}, "'b' is missing"),
        ([1.0, 2.0], {"prior": [0.5, 0.3, 0.2]}, "expected 2"),
        ([1.0, 2.0], {"prior": [-0.5, 1.5]}, "-0.5"),
        ([1.0, 2.0], {"prior": [0.0, 0.0]}, "all weights are zero"),
        ([1.0, 2.0], {"floor": 0.6}, "floor"),
        ([1.0, 2.0], {"domains": ["a", "a"]}, "repeat"),
        ([[1.0, 2.0]], {}, "one value per domain"),
    ],
)
def test_bad_input_is_named(delta, options, message):
    with pytest.raises(InputError, match=message):
        lld_weights(delta, **options)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-800, 800), min_size=1, max_size=20), st.floats(0.01, 100), st.floats(-1e3, 1e3))
def test_on_the_simplex_and_blind_to_an_offset(delta, tau, offset):
    w = lld_weights(np.array(delta), tau=tau)
    assert w.sum() == pytest.approx(1) and (w >= 0).all()
    np.testing.assert_allclose(lld_weights(np.array(delta) + offset, tau=tau), w, rtol=1e-6, atol=1e-9)


def test_domain_permutation():
    delta = rng.normal(size=8)
    order = rng.permutation(8)
    np.testing.assert_allclose(lld_weights(delta)[order], lld_weights(delta[order]))


class TestAdjusted:
    gram = (lambda j: j @ j.T)(rng.normal(size=(6, 40)))
    delta = rng.normal(size=6)

    def test_literal_rule(self):
        w = adjusted_lld_weights(self.gram, self.delta, gram_scale="none", ridge=0.0, tau=0.3)
        v = np.linalg.solve(self.gram, self.delta) / 0.3
        np.testing.assert_allclose(w, np.exp(v) / np.exp(v).sum(), rtol=1e-9)

    @pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
    @pytest.mark.parametrize("gram_scale", ["spread", "trace", "corr"])
    def test_scale_of_g_does_not_matter_once_normalised(self, scale, gram_scale):
        a = adjusted_lld_weights(self.gram, self.delta, gram_scale=gram_scale)
        np.testing.assert_allclose(adjusted_lld_weights(scale * self.gram, self.delta, gram_scale=gram_scale), a, rtol=1e-7)

    @pytest.mark.parametrize("gram_scale", ["spread", "trace", "corr"])
    def test_identity_gives_back_eq_7(self, gram_scale):
        w = adjusted_lld_weights(3.0 * np.eye(6), self.delta, gram_scale=gram_scale)
        np.testing.assert_allclose(w, lld_weights(self.delta), rtol=1e-9)

    @pytest.mark.parametrize("ridge", ["auto", 0.3])
    def test_corr_gives_back_eq_7_for_every_diagonal_gram(self, ridge):
        diagonal = np.diag(10.0 ** np.linspace(-4, 4, 6))
        w = adjusted_lld_weights(diagonal, self.delta, gram_scale="corr", ridge=ridge)
        np.testing.assert_allclose(w, lld_weights(self.delta), rtol=1e-9)
        assert not np.allclose(adjusted_lld_weights(diagonal, self.delta, gram_scale="spread"), lld_weights(self.delta), rtol=0.1)

    def test_corr_solves_in_the_correlation_matrix(self):
        """v = D^1/2 G^-1 D^1/2 Delta, whatever unit each domain's log-likelihood has: G'_kk' = c_k c_k' G_kk'."""
        root = np.diag(np.sqrt(self.gram.diagonal()))
        d = adjusted_direction(self.gram, self.delta, gram_scale="corr")
        np.testing.assert_allclose(d.v, root @ np.linalg.solve(self.gram, root @ self.delta), rtol=1e-9)
        units = np.diag([1.0, 10.0, 0.1, 3.0, 1.0, 0.5])
        other = adjusted_direction(units @ self.gram @ units, self.delta, gram_scale="corr")
        np.testing.assert_allclose(other.v, d.v, rtol=1e-9)
        assert d.condition == pytest.approx(np.linalg.cond(np.linalg.inv(root) @ self.gram @ np.linalg.inv(root)))

    @pytest.mark.parametrize("gram_scale", ["spread", "trace", "none"])
    def test_effective_tau_is_that_of_the_literal_rule(self, gram_scale):
        tau = adjusted_direction(self.gram, self.delta, gram_scale=gram_scale).effective_tau(0.7)
        literal = adjusted_lld_weights(self.gram, self.delta, gram_scale="none", tau=tau)
        np.testing.assert_allclose(
            literal, adjusted_lld_weights(self.gram, self.delta, gram_scale=gram_scale, tau=0.7), rtol=1e-9
        )

    def test_effective_tau_without_an_equal(self):
        corr = adjusted_direction(self.gram, self.delta, gram_scale="corr")
        literal = adjusted_direction(self.gram, self.delta, gram_scale="none")
        assert literal.contrast.std() / corr.effective_tau(0.7) == pytest.approx(corr.contrast.std() / 0.7)
        flat = adjusted_direction(self.gram, np.ones(6))  # spread 0 of Delta: the prior, which is eq. (6) at tau inf
        assert flat.effective_tau(1.0) == math.inf

    def test_the_ridge_of_an_estimate_is_used_unless_one_is_given(self):
        names = list("abcdef")
        delta = dict(zip(names, self.delta.tolist(), strict=True))
        chosen = Estimate(names, self.gram, ridge=5.0)
        for options, expected in [({}, 5.0), ({"ridge": 0.0}, 0.0), ({"ridge": 2.0}, 2.0)]:
            by_hand = adjusted_lld_weights(self.gram, delta, ridge=expected)
            assert adjusted_lld_weights(chosen, delta, **options) == pytest.approx(by_hand, rel=1e-12)
        assert adjusted_lld_weights(Estimate(names, self.gram), delta) == adjusted_lld_weights(self.gram, delta)
        backward = dict(reversed(delta.items()))
        assert adjusted_lld_weights(chosen, backward) == pytest.approx(adjusted_lld_weights(chosen, delta))

    def test_spread_keeps_the_meaning_of_tau(self):
        d = adjusted_direction(self.gram, self.delta)
        assert d.v.std() == pytest.approx(self.delta.std())
        assert d.offset == pytest.approx(d.v.mean()) and d.contrast.mean() == pytest.approx(0, abs=1e-12)

    def test_rank_deficient_gets_a_ridge_that_is_reported(self):
        j = rng.normal(size=(6, 3))
        d = adjusted_direction(j @ j.T, self.delta)
        assert d.ridge > 0 and d.condition <= 1.01e8 and np.isfinite(d.v).all()
        with pytest.raises(InputError, match="ridge is 0"):
            adjusted_direction(np.diag([1.0, 0.0]), [1.0, 2.0], ridge=0.0)

    def test_one_domain_and_no_difference(self):
        assert adjusted_lld_weights([[2.0]], [0.3]) == pytest.approx([1.0])
        np.testing.assert_allclose(adjusted_lld_weights(self.gram, np.zeros(6)), np.full(6, 1 / 6))

    @pytest.mark.parametrize(
        ("gram", "message"),
        [
            (np.eye(3), r"\[K, K\]"),
            (np.full((6, 6), np.nan), "not finite"),
            (np.triu(np.ones((6, 6))), "symmetric"),
            (-np.eye(6), "no positive eigenvalue"),
        ],
    )
    def test_bad_gram(self, gram, message):
        with pytest.raises(InputError, match=message):
            adjusted_lld_weights(gram, self.delta)

    def test_bad_options(self):
        with pytest.raises(InputError, match="gram_scale"):
            adjusted_lld_weights(self.gram, self.delta, gram_scale="sprad")
        with pytest.raises(InputError, match="ridge"):
            adjusted_lld_weights(self.gram, self.delta, ridge=-1.0)


class TestAggregate:
    deltas = rng.normal(size=(20, 17)) * 3

    def test_golden_closed_form(self):
        """The geometric mean of softmaxes is the softmax of the mean logit."""
        w = np.stack([lld_weights(d) for d in self.deltas])
        closed = lld_weights(self.deltas.mean(axis=0))
        assert np.abs(aggregate_weights(w) - closed).max() < 1e-15

    def test_minimises_eq_9(self):
        w = np.stack([lld_weights(d) for d in self.deltas[:, :5]])
        wbar = aggregate_weights(w)

        def total(p):
            return sum((p * np.log(p / q)).sum() for q in w)

        best = total(wbar)
        assert all(total(p) >= best for p in rng.dirichlet(np.ones(5), size=2000))

    def test_step_weights_and_arithmetic(self):
        w = np.array([[0.5, 0.5], [0.9, 0.1]])
        np.testing.assert_allclose(aggregate_weights(w, step_weights=[1, 0]), w[0])
        np.testing.assert_allclose(aggregate_weights(w, method="arithmetic"), [0.7, 0.3])
        g = np.sqrt(w[0] * w[1])
        np.testing.assert_allclose(aggregate_weights(w), g / g.sum())

    def test_forms(self):
        rows = [{"a": 0.5, "b": 0.5}, {"b": 0.1, "a": 0.9}]
        out = aggregate_weights(rows)
        assert list(out) == ["a", "b"] and out["a"] == pytest.approx(0.75)
        assert aggregate_weights({0: rows[0], 5: rows[1]}) == pytest.approx(out)

    def test_zero_weights(self):
        np.testing.assert_allclose(aggregate_weights([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])[2], 0)
        np.testing.assert_allclose(aggregate_weights([[1.0, 0.0], [0.5, 0.5]], step_weights=[0, 1]), [0.5, 0.5])
        with pytest.raises(InputError, match="geometric mean is 0"):
            aggregate_weights([[1.0, 0.0], [0.0, 1.0]])

    @pytest.mark.parametrize(
        ("weights", "options", "message"),
        [
            ([], {}, "no steps"),
            ([[0.5, 0.5]], {"method": "median"}, "geometric"),
            ([[0.5, 0.5]], {"step_weights": [1, 2]}, "step_weights"),
            ([[0.5, 0.5]], {"step_weights": [-1]}, "step_weights"),
            ([{"a": 1.0}, {"b": 1.0}], {}, "unknown domain 'b'"),
        ],
    )
    def test_bad_input(self, weights, options, message):
        with pytest.raises(InputError, match=message):
            aggregate_weights(weights, **options)


class TestRules:
    steps, total = [0, 1, 2, 4, 8, 50, 100], 200
    deltas = rng.normal(size=(7, 5))

    def test_iterative_replay_is_eq_7(self):
        w = replay(Rule("iterative", tau=0.5), self.steps, self.total, self.deltas)
        np.testing.assert_allclose(w, [lld_weights(d, tau=0.5) for d in self.deltas])

    def test_spread_has_the_same_sharpness_whatever_the_scale(self):
        small = replay(Rule("spread"), self.steps, self.total, self.deltas)
        np.testing.assert_allclose(replay(Rule("spread"), self.steps, self.total, 100 * self.deltas), small)

    def test_mirror_integrates_over_elapsed_time(self):
        rule = Rule("mirror", step_size=4.0)
        w = replay(rule, self.steps, self.total, self.deltas)
        np.testing.assert_allclose(w[0], 0.2)  # nothing has elapsed yet
        centred = self.deltas - self.deltas.mean(axis=1, keepdims=True)
        elapsed = np.diff(self.steps) / self.total
        logits = 4 * (centred[1:] * elapsed[:, None]).sum(axis=0)
        np.testing.assert_allclose(w[-1], np.exp(logits) / np.exp(logits).sum())

    def test_mirror_does_not_depend_on_how_finely_a_constant_delta_is_sampled(self):
        constant = np.tile(self.deltas[0], (51, 1))
        coarse = replay(Rule("mirror"), [0, 100], 200, constant[:2])[-1]
        fine = replay(Rule("mirror"), list(range(0, 102, 2)), 200, constant)[-1]
        np.testing.assert_allclose(fine, coarse)

    def test_tau_schedule_moves_geometrically(self):
        rule = Rule(tau=8.0, tau_end=2.0)
        assert [rule.temperature(p) for p in (0, 0.5, 1)] == pytest.approx([8, 4, 2])

    def test_adjusted_spread_matches_the_sharpness_of_spread(self):
        gram = (lambda j: j @ j.T)(rng.normal(size=(5, 9)))
        logits = Rule("adjusted-spread").logits(self.deltas[0], gram, 0, 0, np.zeros(5))
        assert logits.std() == pytest.approx(1)
        with pytest.raises(InputError, match="Gram"):
            Rule("adjusted").logits(self.deltas[0], None, 0, 0, np.zeros(5))

    def test_trust_and_fit_are_the_functions_of_their_names(self):
        gram, drift = random_gram(5), np.array([0.5, 0.0, -1.0, 2.0, 1.0])
        prior = (0.1, 0.3, 0.2, 0.2, 0.2)
        kept = StepGram(gram, ridge=2.0, drift=drift)
        for gram_t, ridge, moved in [(gram, "auto", None), (kept, 2.0, drift), (kept._replace(ridge=None), "auto", drift)]:
            trust = replay(Rule("adjusted-trust", radius=0.3, prior=prior), [0], 10, self.deltas[:1], [gram_t])[0]
            by_hand = trust_region_weights(gram, self.deltas[0], radius=0.3, prior=prior, ridge=ridge)
            np.testing.assert_allclose(trust, by_hand, rtol=1e-9)
            for step in ("auto", 0.2):
                fit = replay(Rule("adjusted-fit", fit_step=step, prior=prior), [0], 10, self.deltas[:1], [gram_t])[0]
                expected = fit_weights(
                    gram, self.deltas[0], step=step, prior=prior, ridge=ridge, drift=None if step == "auto" else moved
                )
                np.testing.assert_allclose(fit, expected, rtol=1e-9, atol=1e-12)
        explicit = replay(Rule("adjusted", ridge=1.0), [0], 10, self.deltas[:1], [kept])
        np.testing.assert_allclose(explicit[0], adjusted_lld_weights(gram, self.deltas[0], ridge=1.0))

    def test_the_zeros_of_a_fit(self):
        rule, grams = Rule("adjusted-fit"), [random_gram(5, seed=t) for t in range(7)]
        w = replay(rule, self.steps, self.total, self.deltas, grams)
        assert (w == 0).any() and np.isfinite(w).all() and w.sum(axis=1) == pytest.approx(1)
        lifted = replay(Rule("adjusted-fit", floor=0.02), self.steps, self.total, self.deltas, grams)
        np.testing.assert_allclose(lifted, 0.9 * w + 0.02)
        prior = replay(Rule("adjusted-fit", prior=(0.5, 0.5, 0, 0, 0)), self.steps, self.total, self.deltas, grams)
        assert not prior[:, 2:].any() and prior.sum(axis=1) == pytest.approx(1)
        assert aggregation("adjusted-fit", "geometric") == "arithmetic" and aggregation("adjusted", "geometric") == "geometric"
        assert aggregation("adjusted-fit", "none") == "none" and aggregation(None, "geometric") == "geometric"

    def test_reading(self):
        gram, delta = random_gram(5), self.deltas[0]
        for name in ("adjusted", "adjusted-spread", "adjusted-trust"):
            rule = Rule(name, tau=0.7)
            found = rule.reading(delta, StepGram(gram, ridge=0.5), 0.0)
            assert found["ridge_used"] == 0.5 and found["fit_step"] is None
            literal = adjusted_lld_weights(gram, delta, gram_scale="none", ridge=0.5, tau=found["effective_tau"])
            np.testing.assert_allclose(
                rule.weights(rule.logits(delta, StepGram(gram, 0.5), 0, 0, np.zeros(5))), literal, rtol=1e-8
            )
        found = Rule("adjusted-fit").reading(delta, gram, 0.0)
        assert found["fit_step"] > 0 and 0 <= found["fit_residual"] <= 1 and found["effective_tau"] is None

    def test_what_a_sketch_is_planned_for_is_the_spread_of_the_logits(self):
        delta, gram = self.deltas[0], np.eye(5)
        for rule in (Rule("adjusted", tau=0.5), Rule("adjusted-spread", tau=0.5), Rule("adjusted-trust", radius=0.001)):
            spread = rule.logits(delta, gram, 0, 0, np.zeros(5)).std()
            assert delta.std() / rule.planned_tau(delta, 0) == pytest.approx(spread, rel=0.05)

    def test_bad_rules(self):
        with pytest.raises(InputError, match="unknown rule"):
            Rule("itrative")
        with pytest.raises(InputError, match="step_size"):
            Rule("mirror", step_size=0)

    def test_elapsed_and_two_stage(self):
        np.testing.assert_allclose(elapsed_weights(self.steps, self.total) * 200, [1, 1, 2, 4, 42, 50, 100])
        w = replay(Rule(), self.steps, self.total, self.deltas)
        boundary, one, two = two_stage_weights(self.steps, self.total, w)
        assert boundary == 100
        np.testing.assert_allclose(two, w[-1])
        np.testing.assert_allclose(one, aggregate_weights(w[:6], step_weights=[1, 1, 2, 4, 42, 50]))


def test_floor():
    w = with_floor(np.array([0.9, 0.1, 0.0]), 0.05)
    assert w.min() >= 0.05 and w.sum() == pytest.approx(1) and w[0] > w[1]


def test_simplex_forgives_rounding_and_nothing_else():
    assert simplex([0.5, 0.49903], ["a", "b"]).sum() == pytest.approx(1)
    with pytest.raises(InputError, match="'b' is inf"):
        simplex([0.5, math.inf], ["a", "b"])


def test_bootstrap_covers_the_truth():
    """The spread of the replicates is the standard error of the mean, and replicates share their texts across steps."""
    n = 400
    domain = ["a"] * n + ["b"] * n
    difference = rng.normal(size=2 * n) * 10 + 5
    counts = np.ones(2 * n)
    draws = bootstrap_deltas(difference, counts, domain, ["a", "b"], n=400, seed=1)
    assert draws.mean(axis=0) == pytest.approx([difference[:n].mean(), difference[n:].mean()], abs=0.1)
    assert draws.std(axis=0) == pytest.approx([10 / math.sqrt(n)] * 2, rel=0.15)
    shifted = bootstrap_deltas(difference + 1, counts, domain, ["a", "b"], n=400, seed=1)
    np.testing.assert_allclose(shifted - draws, 1)
    assert (standard_errors(draws, lambda d: lld_weights(d)) > 0).all()
    with pytest.raises(InputError, match="'c' has no"):
        bootstrap_deltas(difference, counts, domain, ["a", "c"])


def test_what_is_no_weights_is_named():
    for call, message in [
        (lambda: lld_weights({}), "there are no domains"),
        (lambda: lld_weights("abc"), "expected numbers, got 'abc'"),
        (lambda: lld_weights({"a": "x"}), r"delta: expected numbers, got \['x'\]"),
        (lambda: lld_weights([1.0, 2.0], tau="1"), "tau must be > 0"),
        (lambda: adjusted_lld_weights({"a": 1}, {"a": 1.0}), "gram: expected numbers"),
        (lambda: adjusted_lld_weights(np.zeros((0, 0)), []), "there are no domains"),
        (lambda: simplex([1e308, 1e308], ["a", "b"]), "the sum of the weights is not finite"),
        (lambda: effective_domains([-1, 2]), "domain '0' is -1"),
        (lambda: effective_domains([0, 0]), "all weights are zero"),
        (lambda: Rule(prior={"a": 1.0}), "tuple of weights in the order of the domains"),
        (lambda: Rule(floor=-0.1), "floor"),
        (lambda: Rule(gram_scale="std"), "gram_scale must be one of"),
        (lambda: Rule(ridge=-1.0), "ridge"),
        (lambda: Rule(step_size=math.inf), "step_size"),
        (lambda: Rule(radius=0), "radius"),
        (lambda: Rule(fit_step=-1.0), "step must be 'auto'"),
        (lambda: two_stage_weights([0], 1, np.ones((1, 2))), "a run of 1 steps split at 0.5 has no second stage"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
