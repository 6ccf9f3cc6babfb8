"""The statistics of G against simulation: bias, coverage, the predicted error of a sketch, and what must not change them."""

import numpy as np
import pytest

from lldfast.errors import InputError
from lldfast.gram.debias import debiased_diagonal, domain_gram, psd_clip
from lldfast.gram.jackknife import gram_standard_errors, jackknife, t_quantile
from lldfast.gram.ridge import RIDGES, auto_ridge
from lldfast.gram.sketch_error import direction_covariance, expected_weight_kl, relative_error, size_for
from lldfast.weights.equations import adjusted_direction
from lldfast.weights.simplex import softmax


def rows(rng, K, P, smallest):
    """J [K, P] whose singular values fall from 1 to `smallest`."""
    left, right = np.linalg.qr(rng.normal(size=(K, K)))[0], np.linalg.qr(rng.normal(size=(P, K)))[0]
    return (left * np.geomspace(1, smallest, K)) @ right.T


def groups(rng, J, per_domain, noise, tokens=(50, 400)):
    """Gradient sums [M, P], domains and tokens of groups of unequal length; their mean's noise energy: noise^2 tr G / K."""
    K, P = J.shape
    domain = np.repeat(np.arange(K), per_domain)
    n = rng.integers(*tokens, size=len(domain))
    sd = noise * np.sqrt((J**2).sum() / K / P) * np.sqrt(np.mean(tokens) / n)
    return (J[domain] + rng.normal(size=(len(n), P)) * sd[:, None]) * n[:, None], domain, n


def products(rng, J, per_domain, noise):
    g, domain, n = groups(rng, J, per_domain, noise)
    return g @ g.T, domain, n


def gaussian_sketches(rng, gram, k, n):
    root = np.linalg.cholesky(gram)
    for _ in range(n):
        z = root @ rng.normal(size=(len(gram), k))
        yield z @ z.T / k


# The estimate


def test_gram_is_that_of_the_rows():
    g, domain, n = groups(np.random.default_rng(0), rows(np.random.default_rng(1), 3, 20, 0.5), [4, 1, 3], 1.0)
    J = np.stack([g[domain == d].sum(axis=0) / n[domain == d].sum() for d in range(3)])
    gram, naive, debiased = domain_gram(g @ g.T, domain, n, debias=False)
    np.testing.assert_allclose(gram, J @ J.T, rtol=1e-12)
    np.testing.assert_allclose(naive, (J**2).sum(axis=1), rtol=1e-12)
    assert not debiased.any()
    gram, _, debiased = domain_gram(g @ g.T, domain, n)
    assert debiased.tolist() == [True, False, True] and gram[1, 1] == naive[1]  # one group: nothing to debias with
    own = np.bincount(domain, (g**2).sum(axis=1)) / np.bincount(domain, n) ** 2  # what exact rows keep
    diagonal, flags = debiased_diagonal(naive, own, np.bincount(domain, n**2) / np.bincount(domain, n) ** 2)
    np.testing.assert_allclose(diagonal, gram.diagonal(), rtol=1e-10)
    assert flags.tolist() == debiased.tolist()


def test_debiased_diagonal_is_unbiased_with_unequal_lengths():
    rng = np.random.default_rng(2)
    J = rows(rng, 2, 30, 0.6)
    domain, n, draws, naive = np.repeat([0, 1], [3, 5]), np.array([20, 600, 90, 40, 40, 300, 33, 150]), [], []
    for _ in range(3000):
        # noise per text that is not proportional to 1 / tokens: the U-statistic must not need that
        sd = 0.1 * np.sqrt(0.3 + 60 / n)
        g = (J[domain] + rng.normal(size=(8, 30)) * sd[:, None]) * n[:, None]
        gram, plain, debiased = domain_gram(g @ g.T, domain, n)
        assert debiased.all()
        draws.append(gram)
        naive.append(plain)
    z = (np.mean(draws, axis=0) - J @ J.T) / (np.std(draws, axis=0) / np.sqrt(3000))
    assert abs(z).max() < 3.5, z
    assert (np.mean(naive, axis=0) - (J**2).sum(axis=1) > 20 * np.std(naive, axis=0) / np.sqrt(3000)).all()


def test_negative_estimates_keep_the_naive_value():
    g = np.array([[1.0, 0.1], [-1.0, 0.1], [2.0, 0.0], [2.0, 0.0]])
    gram, naive, debiased = domain_gram(g @ g.T, [0, 0, 1, 1], [1, 1, 1, 1])
    assert debiased.tolist() == [False, True]
    np.testing.assert_allclose(gram.diagonal(), [0.01, 4.0])  # <g_0, g_1> = -0.99 is no squared norm
    np.testing.assert_allclose(naive, [0.01, 4.0])


def test_psd_clip():
    rng = np.random.default_rng(3)
    a = rng.normal(size=(6, 6))
    a = a + a.T
    clipped, values = psd_clip(a), np.linalg.eigvalsh(a)
    np.testing.assert_array_equal(clipped, clipped.T)
    assert values[0] < 0 and np.linalg.eigvalsh(clipped)[0] > -1e-12
    np.testing.assert_allclose(((clipped - a) ** 2).sum(), (values[values < 0] ** 2).sum())  # the nearest one
    np.testing.assert_array_equal(psd_clip(a @ a), a @ a)


# Shrinkage


def direction_error(gram, ridge, delta, truth):
    found = adjusted_direction(psd_clip(gram), delta, ridge=ridge).contrast
    return ((found - truth) ** 2).sum() / (truth**2).sum()


@pytest.mark.parametrize("with_delta", [True, False])
def test_auto_ridge_helps_where_the_texts_are_noisy(with_delta):
    rng, errors = np.random.default_rng(4), []
    for _ in range(40):
        J = rows(rng, 12, 200, 0.03)
        gram = J @ J.T
        delta = rng.normal(size=12) * np.sqrt(gram.diagonal())
        truth = adjusted_direction(gram, delta, ridge=0.0).contrast
        p, domain, n = products(rng, J, 8, 0.7)
        found, _, _ = domain_gram(p, domain, n)
        unit = np.trace(psd_clip(found)) / 12
        chosen = auto_ridge(p, domain, n, delta if with_delta else None)
        assert min(abs(chosen / unit - np.array(RIDGES))) < 1e-9
        fixed = [direction_error(found, max(r, 1e-8) * unit, delta, truth) for r in RIDGES]
        errors.append([direction_error(found, max(chosen, 1e-8 * unit), delta, truth), *fixed])
    auto, none, *others = np.median(errors, axis=0)
    assert auto < 0.6 * none, (auto, none, others)
    assert auto < 1.3 * min(others), (auto, others)


def test_auto_ridge_without_noise_is_zero_and_never_for_a_singular_gram():
    rng = np.random.default_rng(5)
    J = rows(rng, 5, 40, 0.2)
    domain, n = np.repeat(np.arange(5), 4), rng.integers(50, 90, 20)
    delta = rng.normal(size=5)

    def ridge(J, delta=None, **options):
        g = J[domain] * n[:, None]
        return auto_ridge(g @ g.T, domain, n, delta, **options)

    assert ridge(J) == 0.0 and ridge(J, delta) == 0.0
    singular = J.copy()
    singular[4] = singular[3]
    unit = (singular**2).sum() / 5
    assert ridge(singular, delta) >= 0.003 * unit * 0.999 and ridge(singular) > 0 and ridge(singular, grid=(0,)) > 0
    p, domain, n = products(rng, J, 1, 0.5)  # no domain can be split: the rule of `adjusted_direction`
    assert auto_ridge(p, domain, n) == 0.0
    g = singular * 100.0
    np.testing.assert_allclose(auto_ridge(g @ g.T, np.arange(5), np.full(5, 100)), 0.01 * unit)
    p, domain, n = products(rng, J, [1, 2, 3, 8, 5], 0.5)
    assert auto_ridge(p, domain, n, delta) >= 0


# The error of a sketch


@pytest.mark.parametrize(("K", "k", "smallest"), [(6, 512, 0.3), (17, 2048, 0.05)])
def test_error_of_the_direction(K, k, smallest):
    rng = np.random.default_rng(6)
    J = rows(rng, K, 3 * K, smallest)
    gram, delta = J @ J.T, rng.normal(size=K)
    v = np.linalg.solve(gram, delta)
    found = list(gaussian_sketches(rng, gram, k, 400))
    error = np.array([np.linalg.solve(g, delta) - v for g in found])
    relative = np.sqrt(np.mean([e @ gram @ e for e in error]) / (v @ gram @ v))
    assert relative == pytest.approx(relative_error(K, k), rel=0.1)
    covariance = direction_covariance(gram, delta, k)
    inverse = np.linalg.inv(gram)
    np.testing.assert_allclose(covariance, ((delta @ inverse @ delta) * inverse + np.outer(v, v)) / k, rtol=1e-8)
    assert np.trace(error.T @ error / 400 @ gram) == pytest.approx(np.trace(covariance @ gram), rel=0.2)
    bias = np.trace(np.mean([np.linalg.inv(g) for g in found], axis=0) @ gram) / K
    assert bias == pytest.approx(k / (k - K - 1), abs=0.25 * (k / (k - K - 1) - 1))  # an inverse Wishart matrix


@pytest.mark.parametrize("gram_scale", ["none", "spread", "trace", "corr"])
@pytest.mark.parametrize(("K", "k", "smallest"), [(4, 256, 0.5), (17, 2048, 0.05)])
def test_expected_kl_of_the_weights(gram_scale, K, k, smallest):
    rng = np.random.default_rng(7)
    J = rows(rng, K, 3 * K, smallest)
    gram, delta = J @ J.T, rng.normal(size=K)
    v = adjusted_direction(gram, delta, gram_scale=gram_scale, ridge=0.0).v
    tau = v.std()
    w = softmax(v / tau)
    kl = []
    for found in gaussian_sketches(rng, gram, k, 300):
        w_hat = softmax(adjusted_direction(found, delta, gram_scale=gram_scale, ridge=0.0).v / tau)
        kl.append((w * np.log(w / w_hat)).sum())
    predicted = expected_weight_kl(gram, delta, k, tau, gram_scale=gram_scale)
    assert predicted / 1.3 < np.mean(kl) < 1.3 * predicted
    assert expected_weight_kl(gram, delta, k, tau, w, gram_scale=gram_scale) == pytest.approx(predicted)
    if gram_scale == "none":
        inverse, hessian = np.linalg.inv(gram), np.diag(w) - np.outer(w, w)
        by_hand = ((delta @ inverse @ delta) * np.trace(hessian @ inverse) + v @ hessian @ v) / (2 * k * tau**2)
        assert predicted == pytest.approx(by_hand, rel=1e-8)


def test_ridge_and_text_noise_enter_the_covariance():
    """Sketched vectors have their noise, G has not, and the solution has a ridge: dv is still predicted."""
    rng = np.random.default_rng(8)
    J = rows(rng, 5, 40, 0.3)
    gram, delta, k, ridge = J @ J.T, rng.normal(size=5), 512, 0.05
    noise = np.diag([0.3, 0.1, 0.2, 0.1, 0.4])
    v = np.linalg.solve(gram + ridge * np.eye(5), delta)
    error = [
        np.linalg.solve(found - noise + ridge * np.eye(5), delta) - v for found in gaussian_sketches(rng, gram + noise, k, 1500)
    ]
    covariance = direction_covariance(gram, delta, k, ridge=ridge, sketched=gram + noise)
    assert np.mean(np.square(error).sum(axis=1)) == pytest.approx(np.trace(covariance), rel=0.25)
    assert np.trace(direction_covariance(gram, delta, k, ridge=ridge)) < 0.8 * np.trace(covariance)


def test_size_for():
    assert size_for(17, 1e-3) == 16384  # 18 / (2 * 16384) = 5.5e-4, and 8192 would give 1.1e-3
    sizes = [size_for(17, kl) for kl in (1.0, 1e-1, 1e-2, 1e-3, 1e-4)]
    assert sizes == sorted(sizes) and len(set(sizes)) > 3 and sizes[0] == 128  # the floor 4 (K + 1)
    for K in (1, 2, 17, 100):
        for kl in (1e-2, 1e-4):
            k = size_for(K, kl, 0.7)
            assert k & (k - 1) == 0 and k >= 4 * (K + 1) and (K + 1) * 0.49 / (2 * k) <= kl
            assert k // 2 < 4 * (K + 1) or (K + 1) * 0.49 / k > kl
    assert size_for(17, 1e-3, 2.0) == 4 * size_for(17, 1e-3) and size_for(17, 1e-3, 0.0) == 128
    delta = np.random.default_rng(9).normal(size=17)
    delta = (delta - delta.mean()) / delta.std()
    k = size_for(17, 1e-3)
    for scale in (1.0, 1e-6):
        exact = expected_weight_kl(scale * np.eye(17), delta, k, 1.0, gram_scale="trace")
        assert 0.5 * 18 / (2 * k) < exact < 1.05 * 18 / (2 * k)


# The error of finitely many texts


def test_jackknife_equals_leaving_texts_out():
    rng = np.random.default_rng(10)
    p, domain, n = products(rng, rows(rng, 3, 20, 0.5), [5, 3, 7], 0.3)
    mixed = rng.permutation(15)
    p, domain, n = p[np.ix_(mixed, mixed)], domain[mixed], n[mixed]
    found = jackknife(p, domain, n, lambda g: np.array([g[0, 1], np.trace(g), g[2, 2] ** 2]), blocks=20)

    def statistic(keep):
        g, _, _ = domain_gram(p[np.ix_(keep, keep)], domain[keep], n[keep])
        return np.array([g[0, 1], np.trace(g), g[2, 2] ** 2])

    variance = 0.0
    for d in range(3):
        members = np.flatnonzero(domain == d)
        left = np.array([statistic(np.delete(np.arange(15), b)) for b in members])
        variance = variance + (len(members) - 1) * left.var(axis=0)
    np.testing.assert_allclose(found.value, statistic(np.arange(15)), rtol=1e-12)
    np.testing.assert_allclose(found.se, np.sqrt(variance), rtol=1e-9)
    assert found.dof[0] < 14 and (found.dof >= 1).all() and found.unmeasured == []


def test_intervals_cover():
    """Nominal 95 % intervals of G's entries, of v's contrasts and of w: 500 corpora, 24 texts per domain in 8 blocks."""
    rng = np.random.default_rng(11)
    K = 4
    J = rows(rng, K, 60, 0.3)
    gram = J @ J.T
    delta = gram @ rng.normal(size=K)
    tau = np.linalg.solve(gram, delta).std()

    def statistic(g):
        v = np.linalg.solve(g, delta)
        return np.concatenate([g[np.triu_indices(K)], v - v.mean(), softmax(v / tau)])

    truth, covered, values, errors = statistic(gram), [], [], []
    for _ in range(500):
        found = jackknife(*products(rng, J, 24, 0.85), statistic)
        low, high = found.interval()
        covered.append((low <= truth) & (truth <= high))
        values.append(found.value)
        errors.append(found.se)
    coverage = np.mean(covered, axis=0)
    assert coverage.min() > 0.92 and coverage.max() < 0.985, coverage
    ratio = np.sqrt(np.mean(np.square(errors), axis=0)) / np.std(values, axis=0)
    assert ratio.min() > 0.9 and ratio.max() < 1.2, ratio


def test_two_groups_have_a_standard_error():
    """One group left alone has no pairs: the noise of the whole stands in. Of the diagonal that is on the safe side."""
    rng = np.random.default_rng(12)
    J = rows(rng, 2, 40, 0.7)
    found = [jackknife(*products(rng, J, 2, 0.4), lambda g: g) for _ in range(800)]
    ratio = np.mean([f.se**2 for f in found], axis=0) / np.var([f.value for f in found], axis=0)
    assert 0.8 < ratio[0, 1] < 1.3 and ratio.diagonal().min() > 0.8 and ratio.diagonal().max() < 3, ratio
    bias = np.array([f.bias.diagonal() for f in found])
    assert (abs(bias.mean(axis=0)) < 4 * bias.std(axis=0) / np.sqrt(800)).all()  # what one group alone gives is unbiased too


def test_standard_errors_of_the_gram():
    """The sketch part against 400 Gaussian sketches with exact own norms; single groups; exact products."""
    rng = np.random.default_rng(13)
    k, J = 256, rows(rng, 3, 200, 0.5)
    g, domain, n = groups(rng, J, [6, 3, 1], 1.0)
    exact, found = g @ g.T, []
    for _ in range(400):
        y = g @ rng.normal(size=(200, k)) / np.sqrt(k)
        p = y @ y.T
        np.fill_diagonal(p, exact.diagonal())
        found.append(domain_gram(p, domain, n)[0])
    errors = gram_standard_errors(exact, domain, n, k)
    inexact = np.ones((3, 3), dtype=bool)
    inexact[2, 2] = False
    np.testing.assert_allclose(np.std(found, axis=0)[inexact], errors.sketch[inexact], rtol=0.12)
    assert errors.sketch[2, 2] == 0  # one group: its own norm, which is exact
    assert np.isnan(errors.text[2]).all() and np.isnan(errors.total[:, 2]).all() and not np.isnan(errors.text[:2, :2]).any()
    np.testing.assert_allclose(errors.total[:2, :2] ** 2, (errors.text**2 + errors.sketch**2)[:2, :2])
    no_sketch = gram_standard_errors(exact, domain, n)
    np.testing.assert_array_equal(no_sketch.total, errors.text)
    assert jackknife(exact, domain, n, np.trace).unmeasured == [2]


def test_t_quantile():
    dof = [1, 2, 3.5, 7, 30, 1e9]
    np.testing.assert_allclose(t_quantile(0.95, dof), [12.7062, 4.30265, 2.94009, 2.36462, 2.04227, 1.9600], rtol=2e-3)
    np.testing.assert_allclose(t_quantile(0.99, 7), 3.49948, rtol=1e-4)


# What must not change the answer


def everything(p, domain, n, delta):
    gram, _, _ = domain_gram(p, domain, n)
    errors = gram_standard_errors(p, domain, n, 1024)
    ridge = auto_ridge(p, domain, n, delta)
    w = jackknife(p, domain, n, lambda g: softmax(adjusted_direction(g, delta).v))
    return gram, errors.total, ridge, w.value, w.se


def test_invariance():
    rng = np.random.default_rng(14)
    K = 5
    p, domain, n = products(rng, rows(rng, K, 50, 0.1), [8, 3, 12, 2, 5], 0.6)
    delta = rng.normal(size=K)
    gram, error, ridge, w, se = everything(p, domain, n, delta)
    assert ridge > 0

    turn = rng.permutation(K)  # domain d becomes turn[d]; groups are shuffled, each domain's own order kept
    place = np.argsort(rng.permutation(len(n)), kind="stable")
    for d in range(K):
        place[np.isin(place, np.flatnonzero(domain == d))] = np.flatnonzero(domain == d)
    moved = everything(p[np.ix_(place, place)], turn[domain[place]], n[place], delta[np.argsort(turn)])
    np.testing.assert_allclose(moved[0][np.ix_(turn, turn)], gram, rtol=1e-10)
    np.testing.assert_allclose(moved[1][np.ix_(turn, turn)], error, rtol=1e-8)
    assert moved[2] == pytest.approx(ridge)
    np.testing.assert_allclose(moved[3][turn], w, rtol=1e-8)
    np.testing.assert_allclose(moved[4][turn], se, rtol=1e-6)

    for got, want in zip(everything(4 * p, domain, 2 * n, delta), (gram, error, ridge, w, se)):  # every text twice
        np.testing.assert_allclose(got, want, rtol=1e-8)
    c = 1e-3  # another unit of l
    scaled = everything(c**2 * p, domain, n, c * delta)
    for got, want in zip(scaled[:3], (gram, error, ridge)):
        np.testing.assert_allclose(got, c**2 * np.array(want), rtol=1e-8)
    kl = [
        expected_weight_kl(g, d, 512, t, ridge=r) for g, d, t, r in [(gram, delta, 2.0, 0.01), (gram / 4, delta / 2, 4, 0.0025)]
    ]
    assert kl[0] == pytest.approx(kl[1])  # l -> l / 2 doubles v: so does tau

    empty = everything(np.pad(p, (0, 1)), np.append(domain, 2), np.append(n, 0), delta)  # a group without scored tokens
    for got, want in zip(empty, (gram, error, ridge, w, se)):
        np.testing.assert_allclose(got, want, rtol=1e-10)


def test_one_domain():
    rng = np.random.default_rng(15)
    gram, _, ridge, w, se = everything(*products(rng, rows(rng, 1, 10, 1.0), 6, 0.2), np.array([0.3]))
    assert gram.shape == (1, 1) and ridge == 0.0 and w == [1.0] and se == [0.0]
    assert expected_weight_kl(gram, [0.3], 64, 1.0) == 0.0
    assert direction_covariance([[2.0]], [1.0], 50)[0, 0] == pytest.approx(2 * 0.25 / 50)


def test_bad_calls():
    p, domain, n = np.eye(4), [0, 0, 1, 1], [1, 2, 3, 4]
    bad = p.copy()
    bad[2, 1] = np.nan
    for arguments, message in [
        ((p, domain, n[:3]), "expected products"),
        ((p, [0, 0, 2, 2], n), "0 .. K-1"),
        ((p, [0.0, 0.0, 1.0, 1.0], n), "integers"),
        ((bad, domain, n), "group 2"),
        ((p, domain, [1, 2, 0, 0]), "domain 1 have no scored token"),
        ((p, domain, [1, 2, -3, 4]), "tokens"),
    ]:
        with pytest.raises(InputError, match=message):
            domain_gram(*arguments)
    for call in [
        lambda: auto_ridge(p, domain, n, grid=(-1.0,)),
        lambda: auto_ridge(p, domain, n, [1.0, np.inf]),
        lambda: auto_ridge(0 * p, domain, n),
        lambda: jackknife(p, domain, n, np.trace, blocks=1),
        lambda: relative_error(17, 0),
        lambda: size_for(17, 0.0),
        lambda: expected_weight_kl(np.eye(2), [1.0, 2.0], 64, -1.0),
        lambda: direction_covariance(np.ones((2, 2)), [1.0, 2.0], 64),
        lambda: t_quantile(95, 7),
    ]:
        with pytest.raises(InputError):
            call()
