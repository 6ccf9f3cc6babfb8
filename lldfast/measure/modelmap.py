"""Model maps: every model (or checkpoint) becomes a point of the plane, and distances approximate eq. (2).

Eq. (1) stacks log-likelihood vectors as the rows of `L` [M, N] (M models, N texts). Double centring gives `Q`, and

    KL(p_i, p_j) ~ |q_i - q_j|^2 / (2 N)        nats per text        (2)

so a low-dimensional picture of the rows of `Q` is a picture of the models. The checkpoints of one training run share a name
and differ in their step: `ModelMap.trail` gives them in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lldfast.errors import InputError, MissingDependencyError
from lldfast.measure.comparable import check_comparable
from lldfast.measure.loglik import LoglikVector, check_same_texts


@dataclass(frozen=True)
class ModelMap:
    """Points of the plane, aligned with the names and steps of the models.

    Attributes:
        names: name of each model, [M]; checkpoints of one run share it.
        steps: training step of each model, [M] int64; -1 for a model that is not a checkpoint (the target).
        xy: coordinates, [M, 2] float64. PCA: squared distances approximate eq. (2) from below, in the unit `unit`.
        method: "pca" or "tsne".
        explained: share of the squared distances of Q that each axis keeps (PCA), or None.
        unit: "nats/text" or "bits/byte" (unit of squared distances under PCA), or "" for t-SNE.
    """

    names: list[str]
    steps: NDArray[np.int64]
    xy: NDArray[np.float64]
    method: str
    explained: tuple[float, float] | None
    unit: str

    def trail(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps [m] and coordinates [m, 2] of the models called `name`, by increasing step.

        Raises:
            InputError: no model has that name.
        """
        index = np.array([i for i, other in enumerate(self.names) if other == name], dtype=np.int64)
        if len(index) == 0:
            raise InputError(f"model map: no model is named {name!r}")
        index = index[np.argsort(self.steps[index], kind="stable")]
        return self.steps[index], self.xy[index]


def stack(vectors: Sequence[LoglikVector | ArrayLike], names: Sequence[str] | None = None) -> NDArray[np.float64]:
    """Stack log-likelihood vectors as rows, eq. (1): `L` [M, N] in nats per text.

    Args:
        vectors: `LoglikVector`s or arrays [N] of summed natural-log probabilities, all over the same texts.
        names: used in error messages.

    Raises:
        InputError: no vector, other texts, or a value that is not finite; the message names the model and the text.
    """
    if len(vectors) == 0:
        raise InputError("model map: no log-likelihood vector was given")
    rows = [np.asarray(getattr(vector, "logprob", vector), dtype=np.float64) for vector in vectors]
    labels = [str(name) for name in names] if names is not None else [f"model {i}" for i in range(len(rows))]
    if len(labels) != len(rows):
        raise InputError(f"model map: {len(labels)} names for {len(rows)} log-likelihood vectors")
    for label, row in zip(labels, rows, strict=True):
        if row.ndim != 1 or len(row) == 0:
            raise InputError(f"model map: the log-likelihoods of {label} have shape {row.shape}, not (texts,)")
        if len(row) != len(rows[0]):
            raise InputError(f"model map: {label} has {len(row)} texts and {labels[0]} has {len(rows[0])}")
        if not np.isfinite(row).all():
            text = int(np.flatnonzero(~np.isfinite(row))[0])
            raise InputError(f"model map: the log-likelihood of {label} on text {text} is {row[text]}")
    known = [(label, vector) for label, vector in zip(labels, vectors, strict=True) if isinstance(vector, LoglikVector)]
    for label, vector in known[1:]:  # of bare arrays nobody knows the texts
        check_same_texts(known[0][1], vector, (known[0][0], label))
    return np.stack(rows)


def double_centre(loglik: ArrayLike) -> NDArray[np.float64]:
    """`Q` of eq. (2): each row (model) of `loglik` [M, N] minus its mean over texts, then each column (text) minus its mean
    over models. Differences of rows do not depend on which other models are stacked.
    """
    values = np.asarray(loglik, dtype=np.float64)
    if values.ndim != 2:
        raise InputError(f"double_centre: expected an array [models, texts], got shape {values.shape}")
    rows = values - values.mean(axis=1, keepdims=True)
    return rows - rows.mean(axis=0, keepdims=True)


def model_map(
    vectors: Sequence[LoglikVector | ArrayLike],
    names: Sequence[str],
    steps: Sequence[int | None] | None = None,
    *,
    method: str = "pca",
    mean_bytes: float | None = None,
    perplexity: float | None = None,
    seed: int = 0,
    allow_differences: bool = False,
) -> ModelMap:
    """Place models in the plane by their double-centred log-likelihood vectors (eq. (1)-(2)).

    Args:
        vectors: one `LoglikVector` (or array [N]) per model, all over the same texts.
        names: one name per model; checkpoints of one run share their name.
        steps: training step per model; None for a model that is not a checkpoint.
        method: "pca" (singular value decomposition of Q: distances are comparable over the whole map) or "tsne"
            (needs scikit-learn: neighbourhoods are kept, large distances mean nothing).
        mean_bytes: mean UTF-8 bytes per text. When given, squared PCA distances are in bits per byte, not in nats per text.
        perplexity: t-SNE's; by default a third of the models, at most 30.
        allow_differences: neither warn of vectors that were not scored alike (`measure.comparable`) nor refuse them.
        seed: t-SNE's random state. PCA is deterministic; the sign of each axis is fixed by its largest coordinate.

    Raises:
        InputError: shapes or values are wrong, an unknown method, too few models for t-SNE, or two models are nearer than what
            the way they were scored makes alone.
        MissingDependencyError: method "tsne" without scikit-learn.
    """
    if method not in ("pca", "tsne"):
        raise InputError(f"model map: unknown method {method!r}; known: pca, tsne")
    if mean_bytes is not None and not (math.isfinite(mean_bytes) and mean_bytes > 0):
        raise InputError(f"model map: mean_bytes is {mean_bytes}, not a positive number")
    if steps is not None and len(steps) != len(names):
        raise InputError(f"model map: {len(steps)} steps for {len(names)} names")
    loglik = stack(vectors, names)
    known = [(vector, name) for vector, name in zip(vectors, names, strict=True) if isinstance(vector, LoglikVector)]
    check_comparable([vector for vector, _ in known], [name for _, name in known], allow=allow_differences)
    order = np.array([-1 if step is None else int(step) for step in steps or [None] * len(names)], dtype=np.int64)
    scale = 2.0 * loglik.shape[1] * (mean_bytes * math.log(2.0) if mean_bytes else 1.0)
    scores, explained = _pca(double_centre(loglik) / math.sqrt(scale))
    if method == "pca":
        unit = "bits/byte" if mean_bytes else "nats/text"
        return ModelMap([str(name) for name in names], order, _plane(scores), method, explained, unit)
    return ModelMap([str(name) for name in names], order, _tsne(scores, perplexity, seed), method, None, "")


def _pca(centred: NDArray[np.float64]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Scores of all principal axes, [M, min(M, N)], and the share of the variance on the first two."""
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    scores = left * singular
    peak = scores[np.abs(scores).argmax(axis=0), np.arange(scores.shape[1])]
    scores = scores * np.where(peak < 0, -1.0, 1.0)
    total = float(np.square(singular).sum())
    share = np.square(singular) / total if total > 0 else np.zeros_like(singular)
    return scores, (float(share[0]), float(share[1]) if len(share) > 1 else 0.0)


def _plane(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The first two columns; a single column gets a zero one beside it."""
    if scores.shape[1] >= 2:
        return scores[:, :2].copy()
    return np.concatenate([scores, np.zeros((len(scores), 2 - scores.shape[1]))], axis=1)


def _tsne(scores: NDArray[np.float64], perplexity: float | None, seed: int) -> NDArray[np.float64]:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise MissingDependencyError(
            "model map: method 'tsne' needs scikit-learn (pip install 'lldfast[tsne]'); method 'pca' needs nothing more"
        ) from error
    count = len(scores)
    if count < 4:
        raise InputError(f"model map: t-SNE needs at least 4 models, got {count}; use method 'pca'")
    chosen = min(30.0, (count - 1) / 3) if perplexity is None else float(perplexity)
    if not 0 < chosen < count:
        raise InputError(f"model map: perplexity {chosen} must be above 0 and below the number of models ({count})")
    # The scores of all axes are Q up to a rotation, with min(M, N) columns in place of N: same distances, less work.
    # The exact method needs no threads, which cost more than they save on a few hundred models.
    how = "exact" if count < 1000 else "barnes_hut"
    model: Any = TSNE(n_components=2, perplexity=chosen, init="pca", random_state=seed, method=how)
    return np.asarray(model.fit_transform(scores), dtype=np.float64)
