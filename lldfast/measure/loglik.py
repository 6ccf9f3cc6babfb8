"""Log-likelihood vectors: nats per text under one model, as a file, by domain (eq. (3)), and as differences Delta of two models.

`score` (score.py) makes them. Only numpy is imported here; Parquet is read and written by pyarrow, when it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lldfast.data.evalset import PARTS
from lldfast.errors import CorruptError, InputError, renamed_arguments
from lldfast.files import atomic_path
from lldfast.measure.comparable import check_comparable
from lldfast.weights.bootstrap import bootstrap_deltas

FORMAT = "lldfast-loglik"
PER = ("base_tokens", "bytes", "texts")
COLUMNS = ("logprob", "domain", "part", "n_tokens", "n_bytes", "text_hash")

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class HasTexts(Protocol):
    """What says which texts something is about: a LoglikVector, an EvalSet."""

    @property
    def text_hash(self) -> npt.NDArray[np.uint64]: ...
    @property
    def domain(self) -> npt.NDArray[np.object_]: ...


@dataclass
class LoglikVector:
    """Log-likelihoods of N texts under one model, in the order of their evaluation set.

    logprob: nats per text, fp64 [N]. domain, part: object arrays [N]. n_tokens: scored tokens of this model's tokenizer.
    n_bytes: UTF-8 bytes. text_hash: XXH3-64 of each text, by which vectors are matched. meta: model identity, tokenizer_hash,
    evalset_hash, bos, versions; of other programs also sum_dtype, where their log-probabilities are not summed in fp32.
    """

    logprob: Floats
    domain: npt.NDArray[np.object_]
    n_tokens: Ints
    n_bytes: Ints
    part: npt.NDArray[np.object_]
    text_hash: npt.NDArray[np.uint64]
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.logprob)

    @property
    def domains(self) -> list[str]:
        """Domain names in order of first appearance."""
        return list(dict.fromkeys(self.domain.tolist()))

    def select(self, part: str | None = None) -> LoglikVector:
        """The texts of one part ("estimate" or "measure"); all for None.

        Raises:
            InputError: an unknown part.
        """
        if part is None:
            return self
        if part not in PARTS:
            raise InputError(f"unknown part {part!r}: expected one of {', '.join(PARTS)}")
        keep = self.part == part
        columns: dict[str, Any] = {name: getattr(self, name)[keep] for name in COLUMNS}
        return LoglikVector(**columns, meta={**self.meta, "selected": part})

    @renamed_arguments(normalize="per")
    def by_domain(
        self, per: str = "base_tokens", base_tokens: LoglikVector | Sequence[int] | Ints | None = None
    ) -> dict[str, float]:
        """Eq. (3): sum of log-likelihoods by domain in nats per token, byte or text.

        Args:
            per: "base_tokens", "bytes" or "texts": what the sum is divided by.
            base_tokens: the base model's vector, or its [N] token counts, for "base_tokens"; default: this model's own tokens.

        Raises:
            InputError: unknown `per`, other texts, or a domain without a single token.
        """
        return _ratios(self.logprob, _denominators(self, per, base_tokens), self.domain)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write Parquet, atomically; meta goes to the schema metadata as JSON."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: pa.array(getattr(self, name)) for name in COLUMNS}
        metadata = {"format": FORMAT, "version": "1", "lldfast": json.dumps(self.meta, ensure_ascii=False)}
        with atomic_path(path) as temporary:
            pq.write_table(pa.table(columns, metadata=metadata), temporary, compression="zstd")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LoglikVector:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or Parquet of something else.
            CorruptError: not Parquet, or a column is missing or not finite.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(path).is_file():
            raise InputError(f"{path}: no such log-likelihood vector")
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise CorruptError(f"{path} is not a readable Parquet file ({error})") from None
        metadata = table.schema.metadata or {}
        if metadata.get(b"format") != FORMAT.encode():
            raise InputError(f"{path} is Parquet, but not a log-likelihood vector of lldfast")
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise CorruptError(f"{path}: no column {', '.join(missing)}")
        empty = [name for name in COLUMNS if table[name].null_count]
        if empty:
            raise CorruptError(f"{path}: column {empty[0]} has empty entries")
        try:
            vector = cls(
                np.asarray(table["logprob"].to_numpy(), np.float64),
                _objects(table["domain"].to_pylist()),
                np.asarray(table["n_tokens"].to_numpy(), np.int64),
                np.asarray(table["n_bytes"].to_numpy(), np.int64),
                _objects(table["part"].to_pylist()),
                np.asarray(table["text_hash"].to_numpy(), np.uint64),
                json.loads(metadata[b"lldfast"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{path}: a column or the metadata is not what `lldfast score` writes ({error!r})") from None
        for i in np.flatnonzero(~np.isfinite(vector.logprob))[:1]:
            raise CorruptError(f"{path}: text {i} has no finite log-likelihood")
        return vector


@renamed_arguments(normalize="per")
def delta(
    target: LoglikVector,
    base: LoglikVector,
    per: str = "base_tokens",
    bootstrap: int = 0,
    seed: int = 0,
    *,
    allow_differences: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """Delta of eq. (4): target minus base by domain, both divided by the same counts (the base's tokens by default).

    Args:
        per: "base_tokens", "bytes" or "texts": what a domain's sum is divided by.
        bootstrap: number of resamplings of the texts of each domain (`bootstrap_deltas`); 0: the second result is empty.
        allow_differences: neither warn of vectors that were not scored alike (`measure.comparable`) nor refuse them.

    Returns:
        {domain: nats per token, byte or text} and {domain: bootstrap standard error} (nan for a domain of one text).

    Raises:
        InputError: the vectors are of different texts; a domain without tokens; the two are nearer in eq. (2) than what the way
            they were scored makes alone.
    """
    check_same_texts(target, base)
    if bootstrap < 0:
        raise InputError(f"bootstrap must be 0 or more, got {bootstrap}")
    check_comparable((target, base), allow=allow_differences, stacklevel=4)  # the decorator of old names is between
    difference = target.logprob - base.logprob
    counts = counts_per(base, per)
    found = _ratios(difference, counts, base.domain)
    errors = {}
    if bootstrap:
        draws = bootstrap_deltas(difference, counts, base.domain, base.domains, n=bootstrap, seed=seed)
        for name, values in zip(base.domains, draws.T, strict=True):
            kept = values[np.isfinite(values)]  # a draw of texts without tokens only has no ratio
            several = int((base.domain == name).sum()) > 1 and len(kept) > 1
            errors[name] = float(kept.std(ddof=1)) if several else float("nan")
    return found, errors


def check_same_texts(a: HasTexts, b: HasTexts, names: tuple[str, str] = ("one", "the other")) -> None:
    """Refuse to compare log-likelihoods of different texts: the one check, by the hash of every text and by its domain.

    Args:
        names: of the two, for the message.

    Raises:
        InputError: naming the first text that differs.
    """
    if len(a.text_hash) != len(b.text_hash):
        raise InputError(f"different texts: {names[0]} ({len(a.text_hash)} texts) and {names[1]} ({len(b.text_hash)} texts)")
    for i in np.flatnonzero((a.text_hash != b.text_hash) | (a.domain != b.domain))[:1]:
        raise InputError(
            f"different texts: {names[0]} and {names[1]} differ at text {i} (domains {a.domain[i]} and {b.domain[i]})"
        )


def check_per(per: str) -> None:
    if per not in PER:
        raise InputError(f"per={per!r} is not one of {', '.join(PER)}")


def counts_per(vector: LoglikVector, per: str) -> Floats:
    """What each text counts in the denominator of eq. (3) [N]: the vector's own tokens, bytes, or one.

    Raises:
        InputError: an unknown `per`.
    """
    check_per(per)
    counts = {"base_tokens": vector.n_tokens, "bytes": vector.n_bytes, "texts": np.ones(len(vector))}[per]
    return counts.astype(np.float64)


def _denominators(vector: LoglikVector, per: str, base_tokens: Any) -> Floats:
    if base_tokens is None or per != "base_tokens":
        return counts_per(vector, per)
    if isinstance(base_tokens, LoglikVector):
        check_same_texts(vector, base_tokens)
        base_tokens = base_tokens.n_tokens
    counts = np.asarray(base_tokens, np.float64)
    if counts.shape != (len(vector),):
        raise InputError(f"base_tokens has shape {counts.shape}, the vector has {len(vector)} texts")
    return counts


def _ratios(values: Floats, counts: Floats, domain: npt.NDArray[np.object_]) -> dict[str, float]:
    out = {}
    for name in dict.fromkeys(domain.tolist()):
        rows = domain == name
        if counts[rows].sum() <= 0:
            raise InputError(f"domain {name} has no scored tokens: its texts are too short for this tokenizer")
        out[name] = float(values[rows].sum() / counts[rows].sum())
    return out


def _objects(values: list[Any]) -> npt.NDArray[np.object_]:
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out
