"""What an estimate of the Gram matrix returns: G by name, its errors, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lldfast.data.evalset import EvalSet
from lldfast.errors import CorruptError, InputError, listed, renamed_arguments
from lldfast.files import atomic_path
from lldfast.gram.accumulator import read_npz
from lldfast.gram.jackknife import BLOCKS, Jackknife, jackknife
from lldfast.gram.sketch_error import direction_covariance, effective_size, expected_weight_kl
from lldfast.weights.equations import MAX_CONDITION, AdjustedDirection, adjusted_direction, adjusted_lld_weights
from lldfast.weights.simplex import align

FORMAT = "lldfast-gram"
Array = NDArray[np.float64]
_ARRAYS = ("gram", "naive_diagonal", "gram_se", "drift", "products", "group_domain", "group_tokens")


@dataclass(frozen=True, eq=False)
class GramEstimate:
    """G [K, K] in (nats per token)^2 per unit of parameter^2, in the order of `domains`, and how it was made.

    Attributes:
        naive_diagonal: |J_k|^2 before the noise of finitely many texts, tr(Sigma_k) / n_k, was taken out [K].
        n_texts: texts behind each row. debiased: per domain, whether its diagonal was debiased (one in a single group cannot be).
        mode: "exact", "sharded", "bf16", "int8", "int4" or "fold". k: size of the sketch, None with rows.
        ridge: amount for the diagonal chosen by split halves, in G's unit; None where it was not asked for.
        gram_se: standard errors of G, texts and sketch [K, K]; NaN where a domain in one group gives none, None with a single
            group.
        expected_error: expected |dv| / |v| in the norm of G, v = G^-1 Delta, by sketch or rounding alone.
        drift: J M^-1 m and weight decay, independent of the weights [K]: a step changes l by about eta (G w + drift). None
            without `precondition`.
        products, group_domain, group_tokens: inner products of the groups' gradient sums [M, M], their domains and tokens [M]:
            what error bars are made of. Sketched off the diagonal.
        evalset: the texts it was estimated on; not in the file. seconds: wall time.
        extra: n_params, layout, seed, groups, debias, the optimiser's step size eta and the like.
    """

    domains: list[str]
    gram: Array
    naive_diagonal: Array
    n_texts: list[int]
    debiased: list[bool]
    mode: str
    k: int | None
    ridge: float | None
    gram_se: Array | None
    expected_error: float
    drift: Array | None
    products: Array
    group_domain: NDArray[np.int64]
    group_tokens: Array
    seconds: float
    extra: dict[str, Any] = field(default_factory=dict)
    evalset: EvalSet | None = field(default=None, repr=False, compare=False)

    def matrix(self, domains: Sequence[str]) -> Array:
        """G with rows and columns in the order of `domains`.

        Raises:
            InputError: a domain that was not estimated.
        """
        index = self._index(domains)
        return self.gram[np.ix_(index, index)]

    def _index(self, domains: Sequence[str]) -> list[int]:
        unknown = [name for name in domains if name not in self.domains]
        if unknown:
            raise InputError(f"the Gram matrix has no domain {unknown[0]!r}; it has [{listed(map(repr, self.domains))}]")
        return [self.domains.index(name) for name in domains]

    @property
    def condition(self) -> float:
        """Condition number (inf for a singular or indefinite matrix)."""
        values = np.linalg.eigvalsh(self.gram)
        return float(values[-1] / values[0]) if values[0] > 0 else float("inf")

    @property
    def sketched(self) -> Array:
        """The Gram matrix of the vectors that were sketched: G with its naive diagonal [K, K]."""
        table = self.gram.copy()
        np.fill_diagonal(table, self.naive_diagonal)
        return table

    @property
    def effective_k(self) -> float:
        """What stands for k in formulas of errors (`effective_size`); inf where a sketch has no error or there is none."""
        return float("inf") if self.k is None else effective_size(self.k, int(self.extra["n_params"]))

    def _problem(self, delta: Mapping[str, float] | ArrayLike, ridge: float | Literal["auto"]) -> tuple[Array, float]:
        """Delta [K], and the ridge to solve with: enough for a G that leaving out a group makes indefinite."""
        d = align(delta, self.domains, "delta")
        if not np.isfinite(d).all():
            raise InputError(f"delta: the value of domain {self.domains[int(np.argmin(np.isfinite(d)))]!r} is not finite")
        if ridge != "auto":
            return d, float(ridge)
        amount = self.ridge or adjusted_direction(self.gram, d).ridge
        return d, max(amount, float(np.trace(self.gram)) / len(d) / MAX_CONDITION)

    @renamed_arguments(normalise="gram_scale")
    def direction(
        self, delta: Mapping[str, float] | ArrayLike, *, gram_scale: str = "spread", ridge: float | Literal["auto"] = "auto"
    ) -> tuple[AdjustedDirection, Jackknife]:
        """v = G^-1 Delta with its offset, contrast and condition, and the jackknife of v over the texts (`.se`, `.interval()`).

        Args:
            delta: {domain: value}, or [K] in the order of `domains`; nats per token.
        """
        d, amount = self._problem(delta, ridge)

        def v_of(gram: Array) -> Array:
            return adjusted_direction(gram, d, gram_scale=gram_scale, ridge=amount).v

        direction = v_of(self.gram)
        # where rows were kept whole, the jackknife's own G is sketched: its spread counts, not its value
        spread = dataclasses.replace(self.jackknife(v_of), value=direction)
        return adjusted_direction(self.gram, d, gram_scale=gram_scale, ridge=amount), spread

    @renamed_arguments(normalise="gram_scale")
    def weights(
        self,
        delta: Mapping[str, float] | ArrayLike,
        *,
        tau: float = 1.0,
        gram_scale: str = "spread",
        ridge: float | Literal["auto"] = "auto",
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Eq. (6)'s weights and their standard errors over the texts behind G and its sketch (Delta held fixed), by domain.

        The error of texts is a jackknife, that of the sketch a formula (`direction_covariance`); they add in squares. It is
        NaN for a domain in a single group, whose noise nothing measures; the others' errors then lack its share.
        """
        d, amount = self._problem(delta, ridge)

        def w_of(gram: Array) -> Array:
            return np.asarray(adjusted_lld_weights(gram, d, tau=tau, gram_scale=gram_scale, ridge=amount))

        w, spread = w_of(self.gram), self.jackknife(w_of)
        covariance = direction_covariance(
            self.gram, d, self.effective_k, gram_scale=gram_scale, ridge=amount, sketched=self.sketched
        )
        h = np.diag(w) - np.outer(w, w)
        error = np.sqrt(spread.se**2 + np.diag(h @ covariance @ h) / tau**2)
        error[list(spread.unmeasured)] = np.nan
        named = [dict(zip(self.domains, x.tolist(), strict=True)) for x in (w, error)]
        return named[0], named[1]

    def jackknife(self, statistic: Callable[[Array], Array]) -> Jackknife:
        """Error over the texts of anything that is made from G, by leaving out a group at a time (jackknife.py)."""
        return jackknife(self.products, self.group_domain, self.group_tokens, statistic, debias=any(self.debiased), blocks=BLOCKS)

    @renamed_arguments(normalise="gram_scale")
    def expected_kl(
        self,
        delta: Mapping[str, float] | ArrayLike,
        *,
        tau: float = 1.0,
        gram_scale: str = "spread",
        ridge: float | Literal["auto"] = "auto",
    ) -> float:
        """Expected KL(w || w of an unsketched G) in nats, by the sketch; 0 with rows kept whole."""
        d, amount = self._problem(delta, ridge)
        return expected_weight_kl(
            self.gram, d, self.effective_k, tau, gram_scale=gram_scale, ridge=amount, sketched=self.sketched
        )

    def summary(self) -> str:
        """One line for people: mode, size, expected error, condition, what was not debiased."""
        how = self.mode if self.k is None else f"{self.mode} k={self.k}"
        naive = [name for name, done in zip(self.domains, self.debiased, strict=True) if not done]
        parts = [f"Gram matrix of {len(self.domains)} domains, {how}, expected error of G^-1 Delta {self.expected_error:.2%}"]
        parts.append(f"condition {self.condition:.3g}")
        if self.ridge is not None:
            parts.append(f"ridge {self.ridge * len(self.domains) / max(np.trace(self.gram), 1e-300):.3g} tr G / K")
        if naive and self.extra.get("debias", True):
            parts.append(f"not debiased: {listed(naive)}")
        return ", ".join(parts) + f" ({self.seconds:.1f} s)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write .npz, atomically: `header` (JSON, every field that is no array) and the arrays.

        Raises:
            WriteError: the file cannot be written.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "evalset"}
        arrays = {name: fields.pop(name) for name in _ARRAYS}
        header = {"format": FORMAT, "version": 1, "units": "(nats per token)^2 per unit of parameter^2", **fields}
        try:
            text = json.dumps(header, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: the estimate cannot be written as JSON ({error})") from None
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, header=np.array(text), **{k: v for k, v in arrays.items() if v is not None})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GramEstimate:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or one of something else.
            CorruptError: truncated or altered.
        """
        header, arrays = read_npz(path, FORMAT)
        fields: dict[str, Any] = {f.name: header.get(f.name) for f in dataclasses.fields(cls) if f.name not in _ARRAYS}
        fields |= {name: arrays.get(name) for name in _ARRAYS}
        made = cls(**fields)
        k = len(made.domains or ())
        if not k or made.gram is None or made.gram.shape != (k, k) or not np.isfinite(made.gram).all():
            raise CorruptError(f"{path} holds no Gram matrix of its {k} domains")
        return made
