"""Whether two log-likelihood vectors were scored alike: what differs in how, and how large eq. (2) is for that alone.

A model against itself has an eq. (2) of 0 only where both sides saw the same tokens after the same first token and computed in
the same arithmetic. Everything else leaves a floor, and a distance below its floor is not a distance between models.

Two models may differ in all that belongs to them: another tokenizer, another context length, another token that stands for the
start. What counts is a rule of scoring that differs (whether there is a first token, the arithmetic, the overlap of windows),
and, for what is the same model on both sides, its tokenizer and its quantisation too.

Only numpy is imported here.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lldfast.errors import ComparisonWarning, InputError, listed

Meta = Mapping[str, Any]

# Eq. (2) of one model against itself, nats per text, where only the named thing differs.
MEASURED_ON = "SmolLM2-135M-Instruct against itself, 210 Pile texts of at most 1,024 bytes, 662 on average"
FLOORS = {
    "first token": 35.0,  # end-of-text, none and the chat start token, two by two: 35 to 37
    "first token twice": 8.9,  # end-of-text once or twice in front
    "sums": 3.0,  # log-softmax summed in bf16 against fp32
    "dtype": 1.32,  # fp32 against bf16 weights and layers
    "quantisation": 0.95,  # Q8_0, the finest, against fp32; Q4_0 made 796
    "tokenizer": 0.57,  # rebuilt from a GGUF file against the published one
    "batches": 0.13,  # bf16, one text at a time against batches
}
RANGES = {"first token": "35 to 37"}  # of what was measured for several pairs
UNQUANTISED = ("F32", "F16", "BF16")
NATIVE, NOTHING, ONE = "native", "nothing", "one token"


class Scored(Protocol):
    """A LoglikVector, as far as it is needed here."""

    @property
    def logprob(self) -> npt.NDArray[np.float64]: ...
    @property
    def n_tokens(self) -> npt.NDArray[np.int64]: ...
    @property
    def meta(self) -> dict[str, Any]: ...


class Difference(NamedTuple):
    """One thing in which two vectors were scored differently.

    Attributes:
        what: a key of FLOORS, or "overlap", "context length" or "head's product", of which no floor is known.
        floor: eq. (2) of one model against itself for that alone, nats per text; None where nobody measured it.
        sentence: what it is on the two sides.
    """

    what: str
    floor: float | None
    sentence: str


def compare_conditions(
    a: Meta, b: Meta, n_tokens: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None
) -> list[Difference]:
    """In what two vectors were scored differently, by their `meta`. What one of them does not say is taken for equal.

    Args:
        n_tokens: scored tokens [N] of both, where they are known: they tell what a tokenizer's own rule puts in front, and
            whether a text is longer than a context.
    """
    found = [
        _first_token(a, b, n_tokens),
        _sums(a, b),
        _dtype(a, b),
        _head_product(a, b),
        _overlap(a, b, n_tokens),
    ]
    if same_model(a, b):
        found += [_tokenizer(a, b), _quantisation(a, b), _context_length(a, b, n_tokens)]
    return [difference for difference in found if difference is not None]


class Finding(NamedTuple):
    """Two vectors that were not scored alike.

    Attributes:
        names: of the two. differences: at least one.
        distance: their eq. (2), nats per text; NaN of a single text, which has none.
    """

    names: tuple[str, str]
    differences: list[Difference]
    distance: float

    @property
    def floor(self) -> float:
        """The largest floor that is known, nats per text; 0 where none is."""
        return max((d.floor for d in self.differences if d.floor is not None), default=0.0)

    def _say_floor(self) -> str:
        return next((RANGES[d.what] for d in self.differences if d.what in RANGES and d.floor == self.floor), f"{self.floor:g}")

    @property
    def below(self) -> bool:
        """The distance is known to be smaller than what the differences alone make."""
        return self.floor > self.distance

    def __str__(self) -> str:
        one, other = self.names
        what = "; ".join(difference.sentence for difference in self.differences)
        floor = f". For that alone eq. (2) is {self._say_floor()} nats per text ({MEASURED_ON})" if self.floor else ""
        found = "of one text there is none" if np.isnan(self.distance) else f"{self.distance:.3g} nats per text"
        return f"{one} and {other} were not scored alike: {what}{floor}; the distance found: {found}"

    def to_json(self) -> list[dict[str, Any]]:
        """The differences as JSON: {"what", "floor" (nats per text or None), "sentence"}."""
        return [difference._asdict() for difference in self.differences]


def find_differences(a: Scored, b: Scored, names: tuple[str, str] | None = None) -> Finding | None:
    """In what two vectors of the same texts were scored differently, with their distance; None where in nothing.

    Args:
        names: of the two, for people; by default those of their models.
    """
    differences = compare_conditions(a.meta, b.meta, (np.asarray(a.n_tokens), np.asarray(b.n_tokens)))
    if not differences:
        return None
    change = np.asarray(a.logprob, np.float64) - np.asarray(b.logprob, np.float64)
    distance = float(change.var()) / 2 if len(change) > 1 else float("nan")
    return Finding(names or _names(a.meta, b.meta), differences, distance)


def check_comparable(
    vectors: Sequence[Scored], names: Sequence[str] | None = None, *, allow: bool = False, stacklevel: int = 3
) -> None:
    """Warn once of vectors, all of the same texts, that were not scored alike; refuse a distance below its noise floor.

    Args:
        names: of the vectors, for people; by default those of their models.
        allow: neither warn nor refuse.
        stacklevel: of the warning; 3 is the caller of the caller.

    Raises:
        InputError: two vectors are nearer than what the way they were scored makes alone; both are named.
    """
    found = [] if allow else _findings(vectors, names)
    for finding in found:
        if finding.below:
            raise InputError(
                f"{finding}, which is no distance between models. Score both alike (--bos and --dtype; target.bos and "
                "target.dtype of a run), or go on with allow_differences (--anyway on the command line, "
                "measure.allow_differences of a run)"
            )
    if found:
        warnings.warn(_say(found), ComparisonWarning, stacklevel=stacklevel)


def describe_differences(vectors: Sequence[Scored], names: Sequence[str] | None = None) -> str | None:
    """What `check_comparable` would warn of, in one line, whatever the distances are; None where all were scored alike."""
    found = _findings(vectors, names)
    return _say(found) if found else None


def _findings(vectors: Sequence[Scored], names: Sequence[str] | None) -> list[Finding]:
    pairs = itertools.combinations(range(len(vectors)), 2)
    named = ((i, j, None if names is None else (str(names[i]), str(names[j]))) for i, j in pairs)
    found = (find_differences(vectors[i], vectors[j], both) for i, j, both in named)
    return [finding for finding in found if finding is not None]


def _say(found: Sequence[Finding]) -> str:
    rest = [" and ".join(finding.names) for finding in found[1:]]
    return f"{found[0]}. Neither were {listed(rest)}" if rest else str(found[0])


def same_model(a: Meta, b: Meta) -> bool:
    """Whether both are the same weights, or files made of the same: one hash, or one name with as many parameters.

    A name in memory is nobody's, and neither is one that is not known.
    """
    one, two = _model(a), _model(b)
    if one.get("hash") is not None and one.get("hash") == two.get("hash"):
        return True
    if "memory" in (one.get("source"), two.get("source")):
        return False
    names = [_plain_name(model.get("name")) for model in (one, two)]
    return bool(names[0]) and names[0] == names[1] and not _differ(one.get("parameters"), two.get("parameters"))


def _first_token(a: Meta, b: Meta, n_tokens: Any) -> Difference | None:
    """Whether there is a token in front of every text, and of one tokenizer also which."""
    (one, id_one), (two, id_two) = _front(a), _front(b)
    if one is None or two is None or one == two == NATIVE:
        return None
    one_tokenizer = _tokenizer_hash(a) is not None and _tokenizer_hash(a) == _tokenizer_hash(b)
    what, floor = "first token", FLOORS["first token"]
    if NATIVE not in (one, two):
        if one != two:
            return Difference(what, floor, f"the first has {_say_front(a)} before every text, the second {_say_front(b)}")
        if one_tokenizer and _differ(id_one, id_two):
            return Difference(what, floor, f"the first token is {id_one} and {id_two}")
        return None
    other = two if one == NATIVE else one
    sentence = f"the first has {_say_front(a)} before every text, the second {_say_front(b)}"
    if not one_tokenizer or n_tokens is None:
        unknown = f", which may be as little as {FLOORS['first token twice']:g} or as much as {floor:g} nats per text"
        return Difference(what, None, sentence + unknown)
    # With one tokenizer the counts tell: a text of n tokens has n scored after one in front, and n - 1 after none.
    counts = np.stack(n_tokens)[:, np.maximum(*n_tokens) > 0]  # of an empty text nothing is scored by any rule
    more = np.unique((counts[0] - counts[1]) * (1 if one == NATIVE else -1))
    in_front = int(more[0]) + (other == ONE) if len(more) == 1 else -1
    if in_front == (other == ONE):  # a tokenizer's one token is the one that "auto" takes
        return None
    if in_front == 2 and other == ONE:
        return Difference("first token twice", FLOORS["first token twice"], "one has a token before every text, the other two")
    return Difference(what, floor, sentence)


def _front(meta: Meta) -> tuple[str | None, int | None]:
    """What stands before every text (None where it is not said), and the token's id."""
    rule = meta.get("bos", _model(meta).get("bos"))
    if isinstance(rule, str):
        rule = {"mode": rule}
    if not isinstance(rule, Mapping) or rule.get("mode") is None:
        return None, None
    mode, number = rule["mode"], rule.get("id")
    if mode == "native":
        return NATIVE, None
    return (NOTHING, None) if mode == "none" or (number is None and "id" in rule) else (ONE, number)


def _say_front(meta: Meta) -> str:
    kind, number = _front(meta)
    if kind == NATIVE:
        return "what the tokenizer itself puts"
    return "nothing" if kind == NOTHING else "one token" if number is None else f"token {number}"


def _sums(a: Meta, b: Meta) -> Difference | None:
    """The log-softmax in bf16, which lldfast itself never does: vectors of other programs say "sum_dtype"."""
    one, two = (_short_dtype(meta.get("sum_dtype") or "float32") for meta in (a, b))
    if one == two:
        return None
    floor = FLOORS["sums"] if {one, two} == {"float32", "bfloat16"} else None
    return Difference("sums", floor, f"log-probabilities are summed in {one} and in {two}")


def _dtype(a: Meta, b: Meta) -> Difference | None:
    """What weights and layers are computed in."""
    weights = [_short_dtype(_model(meta).get("dtype")) for meta in (a, b)]
    used = [_short_dtype(meta.get("amp_dtype")) or own for meta, own in zip((a, b), weights, strict=True)]
    if None in used:
        return None
    if used[0] != used[1]:
        floor = FLOORS["dtype"] if set(used) == {"float32", "bfloat16"} else None
        unknown = "" if floor else f" (not measured; bfloat16 makes {FLOORS['dtype']:g} nats per text)"
        return Difference("dtype", floor, f"layers are computed in {used[0]} and in {used[1]}{unknown}")
    if used[0] != "bfloat16":
        return None
    if _differ(*weights):
        return Difference("batches", FLOORS["batches"], f"bfloat16 is that of {weights[0]} weights and of {weights[1]} weights")
    sizes = [meta.get("batch_tokens") for meta in (a, b)]
    if _differ(*sizes):
        return Difference("batches", FLOORS["batches"], f"bfloat16 layers had batches of {sizes[0]} and of {sizes[1]} tokens")
    return None


def _head_product(a: Meta, b: Meta) -> Difference | None:
    """The head's product in bf16; "bf16x3" is as good as fp32. Where the layers are in bf16, so is the head."""
    fine = [meta.get("precision") != "bf16" for meta in (a, b)]
    known = ["precision" in meta for meta in (a, b)]
    if not all(known) or fine[0] == fine[1] or "bfloat16" in (_short_dtype(_model(meta).get("dtype")) for meta in (a, b)):
        return None
    which = "first" if fine[1] else "second"
    return Difference(
        "head's product", None, f"the {which} one's head was multiplied in bf16, the other's in fp32 (not measured)"
    )


def _overlap(a: Meta, b: Meta, n_tokens: Any) -> Difference | None:
    """How much of a long text its windows repeat, where both models have to cut texts into windows."""
    if not _differ(a.get("overlap"), b.get("overlap")):
        return None
    contexts = [_model(meta).get("context_length") for meta in (a, b)]
    known = n_tokens is not None and None not in contexts
    if known and any(not (counts > context).any() for counts, context in zip(n_tokens, contexts, strict=True)):
        return None
    return Difference("overlap", None, f"the windows of long texts overlap by {a['overlap']} and by {b['overlap']} tokens")


def _tokenizer(a: Meta, b: Meta) -> Difference | None:
    if not _differ(_tokenizer_hash(a), _tokenizer_hash(b)):
        return None
    return Difference("tokenizer", FLOORS["tokenizer"], "it is one model with two tokenizers")


def _quantisation(a: Meta, b: Meta) -> Difference | None:
    one, two = (quantisation(meta) for meta in (a, b))
    if one is None or two is None or one == two or (one in UNQUANTISED and two in UNQUANTISED):
        return None
    return Difference("quantisation", FLOORS["quantisation"], f"it is one model, as {one} and as {two}")


def _context_length(a: Meta, b: Meta, n_tokens: Any) -> Difference | None:
    one, two = (_model(meta).get("context_length") for meta in (a, b))
    if one is None or two is None or one == two:
        return None
    if n_tokens is not None and not (np.maximum(*n_tokens) > min(one, two)).any():
        return None
    return Difference(
        "context length", None, f"it is one model with {one} and with {two} tokens of context, and texts are longer"
    )


def quantisation(meta: Meta) -> str | None:
    """Kind of a model's quantisation as GGUF calls it ("Q8_0"), "F32" and the like for none; None where nothing tells."""
    model = _model(meta)
    given = model.get("extra")
    extra: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    for key in ("quantisation", "quantization"):
        value = extra.get(key, model.get(key))
        if isinstance(value, str):
            return value.upper()
    for text in (extra.get("file"), model.get("source"), model.get("name")):
        tags = _TAG.findall(str(text)) if text else []
        if tags:
            return str(tags[-1]).upper()
    return "F32" if model.get("kind") in ("hf", "gpt") else None


_TAG = re.compile(r"(?<![a-z0-9])(I?Q[1-8]_[0-9A-Z]+(?:_[A-Z]{1,2})?|TQ[12]_0|MXFP4|BF16|F16|F32)(?![a-z0-9])", re.IGNORECASE)


def _plain_name(name: object) -> str:
    """A model's name without its owner, its quantisation and how it is spelt: "smollm2135minstruct"."""
    last = str(name or "").rstrip("/").rpartition("/")[2]
    last = re.sub(r"(?<![a-z0-9])gguf(?![a-z0-9])", "", _TAG.sub("", last), flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]", "", last.casefold())


def _names(a: Meta, b: Meta) -> tuple[str, str]:
    one, two = (_model(meta).get("name") for meta in (a, b))
    if one is None or two is None:
        return "one vector", "the other"
    return (repr(one), repr(two)) if one != two else (repr(one), "another vector of it")


def _model(meta: Meta) -> Mapping[str, Any]:
    """The identity of the model; of vectors made by hand it may be a name, or absent."""
    model = meta.get("model")
    return model if isinstance(model, Mapping) else {} if model is None else {"name": model}


def _tokenizer_hash(meta: Meta) -> Any:
    own = _model(meta).get("tokenizer")
    return meta.get("tokenizer_hash", own.get("hash") if isinstance(own, Mapping) else None)


def _short_dtype(value: Any) -> str | None:
    """A dtype's name; fp64 counts as fp32, whose rounding no floor knows."""
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    return {"float64": "float32", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}.get(name, name)


def _differ(one: Any, two: Any) -> bool:
    """Both are known, and not the same."""
    return one is not None and two is not None and one != two
