"""Model maps: distances in Q space are eq. (2), the plane keeps them, and names and steps stay with their points."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from lldfast.errors import InputError, MissingDependencyError
from lldfast.measure.divergence import kl_matrix
from lldfast.measure.loglik import LoglikVector
from lldfast.measure.modelmap import double_centre, model_map, stack


@pytest.fixture
def loglik() -> np.ndarray:
    """[M, N]: six models on 40 texts, with text and model effects far larger than what tells the models apart."""
    rng = np.random.default_rng(0)
    return rng.normal(-500, 200, 40) + rng.normal(0, 300, (6, 1)) + rng.normal(0, 3, (6, 40))


def squared_distances(points):
    """|q_i - q_j|^2 between rows [M, M], by differences."""
    return np.square(points[:, None] - points[None]).sum(axis=-1)


def test_distances_in_q_space_are_equation_2(loglik: np.ndarray) -> None:
    distances = squared_distances(double_centre(loglik)) / (2 * loglik.shape[1])
    for i in range(6):
        for j in range(6):
            assert distances[i, j] == pytest.approx(0.5 * np.var(loglik[i] - loglik[j]), rel=1e-10, abs=1e-12)


def test_kl_matrix_is_the_same_distance_in_bits_per_byte(loglik: np.ndarray) -> None:
    domain, n_bytes = np.array(["a"] * 20 + ["b"] * 20, dtype=object), np.full(40, 900)
    part, hashes = np.array(["measure"] * 40, dtype=object), np.arange(40, dtype=np.uint64)
    vectors = [LoglikVector(row, domain, n_bytes, n_bytes, part, hashes) for row in loglik]
    ours = squared_distances(double_centre(stack(vectors))) / (2 * 40) / (900 * math.log(2))
    np.testing.assert_allclose(ours, kl_matrix(vectors), rtol=1e-10, atol=1e-14)


def test_centring_removes_model_and_text_means_and_no_difference(loglik: np.ndarray) -> None:
    centred = double_centre(loglik)
    np.testing.assert_allclose(centred.mean(axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(centred.mean(axis=1), 0, atol=1e-10)
    pair = double_centre(loglik[:2])
    np.testing.assert_allclose(pair[0] - pair[1], centred[0] - centred[1], atol=1e-9)


def test_pca_keeps_the_distances_of_models_in_a_plane() -> None:
    rng = np.random.default_rng(1)
    axes = rng.normal(0, 1, (2, 50))  # two directions of log-likelihood space span all differences
    loglik = rng.normal(0, 5, (7, 2)) @ axes + rng.normal(-300, 100, 50)
    points = model_map(list(loglik), [f"m{i}" for i in range(7)])
    expected = squared_distances(double_centre(loglik)) / 100
    np.testing.assert_allclose(squared_distances(points.xy), expected, rtol=1e-8, atol=1e-10)
    assert points.explained is not None and sum(points.explained) == pytest.approx(1.0)
    assert points.unit == "nats/text"
    in_bits = model_map(list(loglik), [f"m{i}" for i in range(7)], mean_bytes=900.0)
    np.testing.assert_allclose(squared_distances(in_bits.xy), expected / (900 * math.log(2)), rtol=1e-8, atol=1e-10)
    assert in_bits.unit == "bits/byte"


def test_distances_of_the_map_never_exceed_equation_2(loglik: np.ndarray) -> None:
    points = model_map(list(loglik), list("abcdef"))
    exact = squared_distances(double_centre(loglik)) / 80
    assert (squared_distances(points.xy) <= exact + 1e-9).all()
    assert points.explained is not None and 0 < points.explained[1] <= points.explained[0] < 1


def test_trails_follow_names_and_steps_in_any_order_of_models(loglik: np.ndarray) -> None:
    names, steps = ["target", "a", "b", "a", "b", "a"], [None, 64, 0, 0, 8, 2]
    points = model_map(list(loglik), names, steps)
    trail_steps, xy = points.trail("a")
    assert trail_steps.tolist() == [0, 2, 64]
    np.testing.assert_array_equal(xy, points.xy[[3, 5, 1]])
    assert points.trail("target")[0].tolist() == [-1]
    order = [4, 2, 0, 5, 1, 3]
    shuffled = model_map([loglik[i] for i in order], [names[i] for i in order], [steps[i] for i in order])
    np.testing.assert_allclose(shuffled.trail("a")[1], xy, atol=1e-8)
    with pytest.raises(InputError, match="'c'"):
        points.trail("c")


def test_two_models_make_a_line_and_one_a_point(loglik: np.ndarray) -> None:
    two = model_map(list(loglik[:2]), ["a", "b"])
    assert two.xy[:, 1] == pytest.approx([0, 0], abs=1e-9)
    assert np.sum((two.xy[0] - two.xy[1]) ** 2) == pytest.approx(0.5 * np.var(loglik[0] - loglik[1]))
    one = model_map(list(loglik[:1]), ["a"])
    assert one.xy.shape == (1, 2) and not one.xy.any() and one.explained == (0.0, 0.0)


def test_bad_input_names_the_model_and_the_text(loglik: np.ndarray) -> None:
    broken = loglik.copy()
    broken[2, 7] = np.nan
    with pytest.raises(InputError, match="c on text 7 is nan"):
        model_map(list(broken), list("abcdef"))
    with pytest.raises(InputError, match="b has 39 texts and a has 40"):
        model_map([loglik[0], loglik[1][:39]], ["a", "b"])
    with pytest.raises(InputError, match="5 names for 6"):
        model_map(list(loglik), list("abcde"))
    with pytest.raises(InputError, match="2 steps for 6 names"):
        model_map(list(loglik), list("abcdef"), [1, 2])
    with pytest.raises(InputError, match="no log-likelihood vector"):
        model_map([], [])
    with pytest.raises(InputError, match="shape"):
        model_map([loglik], ["a"])
    with pytest.raises(InputError, match="umap"):
        model_map(list(loglik), list("abcdef"), method="umap")
    with pytest.raises(InputError, match="mean_bytes"):
        model_map(list(loglik), list("abcdef"), mean_bytes=0.0)
    with pytest.raises(InputError, match="models, texts"):
        double_centre(loglik[0])


def test_tsne_keeps_groups_together() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(2)
    centres = rng.normal(0, 30, (3, 60))
    loglik = np.concatenate([centre + rng.normal(0, 0.5, (6, 60)) for centre in centres])
    points = model_map(list(loglik), [f"m{i}" for i in range(18)], method="tsne", perplexity=4, seed=3)
    distances = squared_distances(points.xy)
    for i in range(18):
        others = distances[i].copy()
        others[i] = np.inf
        assert others.argmin() // 6 == i // 6
    assert points.explained is None and points.unit == ""
    again = model_map(list(loglik), [f"m{i}" for i in range(18)], method="tsne", perplexity=4, seed=3)
    np.testing.assert_array_equal(points.xy, again.xy)
    with pytest.raises(InputError, match="perplexity"):
        model_map(list(loglik), [f"m{i}" for i in range(18)], method="tsne", perplexity=18)
    with pytest.raises(InputError, match="at least 4 models"):
        model_map(list(loglik[:3]), list("abc"), method="tsne")


def test_tsne_without_scikit_learn_says_what_to_install(loglik: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(MissingDependencyError, match=r"lldfast\[tsne\]"):
        model_map(list(loglik), list("abcdef"), method="tsne")


def test_vectors_of_different_texts_are_no_map(loglik: np.ndarray) -> None:
    domain, n_bytes = np.array(["a"] * 40, dtype=object), np.full(40, 900)
    part = np.array(["measure"] * 40, dtype=object)
    one, other = (LoglikVector(loglik[i], domain, n_bytes, n_bytes, part, np.arange(i, 40 + i, dtype=np.uint64)) for i in (0, 1))
    with pytest.raises(InputError, match="different texts: A and B differ at text 0"):
        model_map([one, other], ["A", "B"])
