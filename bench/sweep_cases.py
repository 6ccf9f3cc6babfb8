"""One causal language model, everything that lldfast says of it, and what a plain loop says in fp64. Not run by itself.

    from sweep_cases import Subject, cases      (bench/sweep_models.py, tests/test_sweep.py)

The plain loop is the model itself on one text at a time, without padding, without a cache, its own logits in fp64. Every case
ends as one of `OUTCOMES`: a gap is right when it is under a floor, or no larger than a small multiple of the gap that the model's
own plain loop has in the same dtype: rounding is the model's, what comes on top of it would be ours.
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import lldfast
from lldfast.data.evalset import EvalSet
from lldfast.data.shards import ShardWriter, TokenShards, write_manifest
from lldfast.data.tokenizer import load_tokenizer
from lldfast.distill.cache import TeacherCache
from lldfast.distill.teach import teach
from lldfast.errors import LLDError

OUTCOMES = ("right", "right by full logits", "refused", "WRONG", "CRASH")
PARTS = ("score", "gram", "kl", "teach")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS = ("as made", "zero", "scaled", "replaced")

TEXTS = [
    ("prose", "Hi"),
    ("prose", "The quick brown fox jumps over the lazy dog. It was a bright cold day, and the clocks were striking thirteen."),
    ("prose", "naïve café – Ünïcödé"),
    ("code", "def f(x):\n    return x**2  # a comment\n" * 4),
    ("code", "x"),
    ("code", "for i in range(10): print(i)"),
    ("numbers", "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"),
    ("numbers", "3.14159265358979"),
]
EOT = 256  # of the byte tokenizer; goes before every text
OTHER_SEEDS = (2, 3)
WINDOW, WINDOWS, TOP = 24, 6, 8  # of the teacher cache

# Gaps that are right whatever the model: (fp32, bf16). score: nats per text, nats per token; gram and kl: relative; teach: nats,
# the largest and the mean.
FLOORS = {"score": (2e-3, 3e-2), "gram": (2e-4, 2e-2), "kl": (2e-4, 2e-2), "teach": (2e-4, 2e-2)}
MULTIPLE = 3.0  # of the plain loop's own gap in the same dtype


@dataclass(frozen=True)
class Case:
    """What came out. gap and own are in the unit of FLOORS[part]; note: the reason of a refusal, a fallback or a crash."""

    part: str
    dtype: str
    head: str
    batch: str
    outcome: str
    gap: float | None = None
    own: float | None = None
    note: str = ""

    def record(self) -> dict[str, Any]:
        return asdict(self)


def evaluation_texts() -> EvalSet:
    return EvalSet.from_texts([text for _, text in TEXTS], [domain for domain, _ in TEXTS])


def tokens(text: str) -> Tensor:
    return torch.tensor([EOT, *text.encode()])


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """ids [T] -> the model's own logits [T, V] in fp64."""
    return model(input_ids=ids[None], use_cache=False).logits[0].double()


def token_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """log p of ids[1:], the model run on all of them: where its values depend on a text's length, that is the whole text's."""
    return torch.log_softmax(logits(model, ids), -1)[:-1].gather(-1, ids[1:, None])[:, 0]


def plain_scores(model: nn.Module) -> list[np.ndarray]:
    """Nats of every token of every text."""
    with torch.no_grad():
        return [token_logprobs(model, tokens(text)).numpy() for _, text in TEXTS]


def plain_gram(model: nn.Module) -> np.ndarray:
    """G = J J^T of eq. (4) [K, K]; row k of J is the gradient of domain k's mean log-likelihood per token."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for domain in dict.fromkeys(domain for domain, _ in TEXTS):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for _, text in (pair for pair in TEXTS if pair[0] == domain):
            ids = tokens(text)
            total = total + token_logprobs(model, ids).sum()
            count += len(ids) - 1
        found = torch.autograd.grad(total / count, parameters, allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).double().flatten() for p, g in pairs]))
    jacobian = torch.stack(rows)
    return (jacobian @ jacobian.T).numpy()


def plain_kl(target: nn.Module, base: nn.Module) -> float:
    """Token-level KL in bits per byte."""
    nats, count = 0.0, 0
    with torch.no_grad():
        for _, text in TEXTS:
            p, q = (torch.log_softmax(logits(model, tokens(text)), -1)[:-1] for model in (target, base))
            nats += float((p.exp() * (p - q)).sum())
            count += len(text.encode())
    return nats / count / math.log(2)


def plain_rows(model: nn.Module, windows: Tensor) -> Tensor:
    """Log-probabilities [windows, T, V], a window at a time."""
    with torch.no_grad():
        return torch.stack([torch.log_softmax(logits(model, ids), -1) for ids in windows])


class Subject:
    """A model to be judged: `module` in its dtype, `exact` the same weights in fp64, and what plain loops say of both.

    Attributes:
        exact_note: empty, or why `exact` is not fp64.
        unfit: why no log-likelihood of this model means anything; empty for a causal, deterministic one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.exact, self.exact_note = in_fp64(module)

    @functools.cached_property
    def unfit(self) -> str:
        varies, moves = looks_ahead(self.exact)
        rounding = 1e-3 if self.exact_note else 1e-5  # nats; many classes have norms and caps in fp32 always
        if varies > rounding:
            return f"two equal calls differ by {varies:.2g} nats"
        if moves > rounding:
            return f"not causal: a later token moves a log-probability by {moves:.2g} nats"
        return ""

    @functools.cached_property
    def scores(self) -> list[np.ndarray]:
        """Nats of every token of every text, exact."""
        return plain_scores(self.exact)

    @property
    def texts(self) -> np.ndarray:
        """Nats of every text [N], exact."""
        return np.array([values.sum() for values in self.scores])

    def own_gaps(self) -> np.ndarray:
        """Of every text [N], the sum of what the plain loop in the model's own dtype is off by, token by token.

        Not what its sum is off by, where errors cancel by luck: a 16-bit router that sends tokens elsewhere does so at random.
        """
        pairs = zip(plain_scores(self.module), self.scores, strict=True)
        return np.array([np.abs(own - exact).sum() for own, exact in pairs])


def in_fp64(module: nn.Module) -> tuple[nn.Module, str]:
    """A copy in fp64, or in fp32 with the reason where the class cannot run in fp64."""
    exact = copy.deepcopy(module).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # torch's grouped product, their default, does not take fp64
    try:
        with torch.no_grad():
            logits(exact, tokens("probe"))
        return exact, ""
    except RuntimeError as error:
        return copy.deepcopy(module).float(), f"plain loop in fp32: the class does not run in fp64 ({short(error, 100)})"


def looks_ahead(module: nn.Module) -> tuple[float, float]:
    """(largest change between equal calls, largest change before a changed token), in nats; several lengths, several places."""
    varies = moves = 0.0
    with torch.no_grad():
        for length, places in ((9, (8,)), (70, (69, 40)), (150, (149, 80))):
            ids = 3 + torch.arange(length) * 37 % 250  # none of the padding, beginning and end
            first, again = (torch.log_softmax(logits(module, ids), -1) for _ in range(2))
            varies = max(varies, float((first - again).abs().max()))
            for place in places:
                changed = ids.clone()
                changed[place] = changed[place] + 1
                rows = torch.log_softmax(logits(module, changed), -1)
                moves = max(moves, float((rows - first)[:place].abs().max()))
    return varies, moves


def head_of(module: Any) -> Any:
    """The module that owns the output matrix, or None."""
    head = module.get_output_embeddings()
    return head if isinstance(getattr(head, "weight", None), nn.Parameter) else None


def loaded(module: nn.Module, head: str) -> lldfast.LanguageModel:
    """`module` as lldfast sees it, with what happens to its head meanwhile.

    Args:
        head: "as made"; "zero" or "scaled": so (0, or 1e-3 of itself) when it is loaded, itself again afterwards; "replaced": a
            new Parameter of other values afterwards.
    """
    bytes_ = load_tokenizer("bytes")
    if head == "as made":
        return lldfast.load_model(module, tokenizer=bytes_)
    owner = head_of(module)
    kept = [(p, p.detach().clone()) for p in (owner.weight, getattr(owner, "bias", None)) if isinstance(p, Tensor)]
    with torch.no_grad():
        for p, _ in kept if head != "replaced" else ():
            p.mul_(0.0 if head == "zero" else 1e-3)
        try:
            model = lldfast.load_model(module, tokenizer=bytes_)
        finally:
            for p, value in kept:
                p.copy_(value)
        if head == "replaced":
            owner.weight = nn.Parameter(0.7 * owner.weight.flip(0))
    return model


Build = Callable[[int], nn.Module]  # seed -> a model in fp32, in evaluation mode
Compared = tuple[np.ndarray, np.ndarray, Callable[[], float]]  # ours, exact, gap of a plain loop in the model's own dtype


def cases(
    build: Build,
    parts: tuple[str, ...] = PARTS,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    heads: tuple[str, ...] = HEADS,
) -> Iterator[Case]:
    """Judge a model in every part, dtype, state of its head, padded and alone."""
    for dtype in dtypes:
        module = build(0).to(DTYPES[dtype])
        try:
            with torch.no_grad():
                logits(module, tokens(max((text for _, text in TEXTS), key=len)))
        except Exception as error:  # noqa: BLE001 - the model itself cannot; whether lldfast says so is what is asked
            yield _without_loop(module, dtype, f"the model itself does not run: {short(error)}")
            continue
        subject = Subject(module)
        for head in (h for h in HEADS if h in heads):  # "replaced" last: the others leave the model as it was
            if head == "as made" or head_of(module) is not None:
                yield from _of_one(subject, build, parts, dtype, head)


def _of_one(subject: Subject, build: Build, parts: tuple[str, ...], dtype: str, head: str) -> Iterator[Case]:
    try:
        model = loaded(subject.module, head)
    except Exception as error:  # noqa: BLE001 - judged
        yield _raised("load", dtype, head, "", error)
        return
    if head == "replaced":
        subject = Subject(subject.module)
    note = str(model.identity["head"])
    way = "right" if note == "weight" else "right by full logits"
    remark = "; ".join(x for x in ("" if note == "weight" else note, subject.exact_note) if x)
    for part, batch, run in _runs(subject, model, build, parts, dtype, head):
        try:
            ours, exact, own_gap = run()
            floor = FLOORS[part][dtype == "bf16"]
            gap, own = float(np.abs(ours - exact).max()), None
            if not gap <= floor:  # only then: the plain loop of the model's own dtype costs as much as the exact one
                own = float(own_gap())
        except Exception as error:  # noqa: BLE001 - judged
            yield _raised(part, dtype, head, batch, error)
            continue
        right = own is None or gap <= MULTIPLE * own  # a NaN is not
        outcome = way if right and not subject.unfit else "WRONG"
        yield Case(part, dtype, head, batch, outcome, gap, own, "; ".join(x for x in (subject.unfit, remark) if x))


def _without_loop(module: nn.Module, dtype: str, why: str) -> Case:
    head = "as made"
    try:
        model = loaded(module, head)
        lldfast.score(model, evaluation_texts())
    except Exception as error:  # noqa: BLE001 - judged
        found = _raised("load", dtype, head, "", error)
        return Case("load", dtype, head, "", found.outcome, note=f"{why}; lldfast: {found.note}")
    return Case("load", dtype, head, "", "WRONG", note=f"{why}, and lldfast scores it")


def _raised(part: str, dtype: str, head: str, batch: str, error: Exception) -> Case:
    """A refusal of ours, or a crash with its place."""
    if isinstance(error, LLDError):
        return Case(part, dtype, head, batch, "refused", note=short(error))
    frames = traceback.extract_tb(error.__traceback__)
    innermost = [frames[-1], *[f for f in frames[:-1] if "/lldfast/" in f.filename][:-3:-1]]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in innermost)
    return Case(part, dtype, head, batch, "CRASH", note=f"{type(error).__name__}: {short(error)} at {where}")


def _runs(
    subject: Subject, model: lldfast.LanguageModel, build: Build, parts: tuple[str, ...], dtype: str, head: str
) -> Iterator[tuple[str, str, Callable[[], Compared]]]:
    """(part, batch, run) in turn."""
    if "score" in parts:
        per = np.array([len(text.encode()) for _, text in TEXTS]) if dtype == "bf16" else np.ones(len(TEXTS))

        def score(batch_tokens: int) -> Compared:
            found = lldfast.score(model, evaluation_texts(), batch_tokens=batch_tokens).logprob
            return found / per, subject.texts / per, lambda: (subject.own_gaps() / per).max()

        yield "score", "padded", lambda: score(4096)
        yield "score", "alone", lambda: score(1)
        if (dtype, head) == ("fp32", "as made"):
            yield "score", "padded, other weights", lambda: _score_others(build)
    if head != "as made" and (dtype, head) != ("fp32", "replaced"):
        return  # gram, KL and teach ask for the head as score does
    if "gram" in parts:

        def gram() -> Compared:
            found = lldfast.gram.estimate(model, evaluation_texts(), mode="exact", debias=False, groups=1, ridge=None).gram
            exact = plain_gram(subject.exact)
            size = np.abs(exact).max()
            return found / size, exact / size, lambda: np.abs(plain_gram(subject.module) - exact).max() / size

        yield "gram", "padded", gram
    if "kl" in parts:

        def kl() -> Compared:
            other = build(1).to(DTYPES[dtype])
            found = lldfast.true_kl(model, lldfast.load_model(other, tokenizer=load_tokenizer("bytes")), evaluation_texts())
            exact = plain_kl(subject.exact, in_fp64(other)[0])
            return np.array(found / exact), np.array(1.0), lambda: abs(plain_kl(subject.module, other) / exact - 1)

        yield "kl", "padded", kl
    if "teach" in parts:
        yield "teach", "windows", lambda: _teach(subject, model, dtype)


def _score_others(build: Build) -> Compared:
    """Padded, of models of other seeds: what an indexer or a router chooses beside padding is not seen in every model."""
    subjects = [Subject(build(seed)) for seed in OTHER_SEEDS]
    found = [lldfast.score(loaded(subject.module, "as made"), evaluation_texts()).logprob for subject in subjects]
    exact = np.stack([subject.texts for subject in subjects])
    return np.stack(found), exact, lambda: max(subject.own_gaps().max() for subject in subjects)


def _teach(subject: Subject, model: lldfast.LanguageModel, dtype: str) -> Compared:
    """Top log-probabilities [windows, T, 2 k + 1]: as sorted values, at the cached ids, and the log mass of the rest.

    In bf16 their mean gap: the largest is that of a token which a router sent elsewhere, nats for any loop.
    """
    stream = np.frombuffer(" ".join(text for _, text in TEXTS).encode(), np.uint8)[: WINDOW * WINDOWS - 1].astype(np.uint16)
    ids = torch.from_numpy(np.append(stream, EOT).astype(np.int64)).view(WINDOWS, WINDOW)
    with tempfile.TemporaryDirectory() as folder:
        bytes_ = load_tokenizer("bytes")
        with ShardWriter(Path(folder, "shards"), "all", "uint16") as writer:
            writer.add(np.append(stream, EOT), n_bytes=len(stream))
            entry = writer.close()
        write_manifest(Path(folder, "shards"), bytes_.describe(), bytes_.vocab_size, {"all": entry})
        made = teach(model, TokenShards(folder), Path(folder, "cache"), k=TOP, block_size=WINDOW, progress=False)
        cache = TeacherCache(made)
        top, logprob, rest = (np.array(cache.part("all", part)) for part in ("ids", "logprob", "rest"))
    chosen = torch.from_numpy(top.astype(np.int64)).view(WINDOWS, WINDOW, TOP)
    shape = (WINDOWS, WINDOW, -1)
    ours = np.concatenate([logprob.reshape(shape), logprob.reshape(shape), rest.reshape(shape)], -1)

    def of(module: nn.Module) -> np.ndarray:
        rows = plain_rows(module, ids)
        others = rows.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([rows.topk(TOP).values, rows.gather(-1, chosen), others], -1).numpy()

    exact = of(subject.exact)
    if dtype == "bf16":
        return np.abs(ours - exact).mean(), np.zeros(()), lambda: np.abs(of(subject.module) - exact).mean()
    return ours, exact, lambda: np.abs(of(subject.module) - exact).max()


def short(error: object, length: int = 240) -> str:
    """One line of an error's message."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else text[: length - 3] + "..."
