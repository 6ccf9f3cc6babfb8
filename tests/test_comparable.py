"""Vectors that were not scored alike: what is told, with which noise floor, and what is refused."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from lldfast.__main__ import main
from lldfast.controller import LLDController
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer, train_bpe
from lldfast.errors import ComparisonWarning, InputError, listed
from lldfast.measure.comparable import compare_conditions, describe_differences, find_differences
from lldfast.measure.divergence import kl, kl_matrix, nll_gap, true_kl
from lldfast.measure.loglik import LoglikVector, delta
from lldfast.measure.modelmap import model_map
from lldfast.measure.score import score
from lldfast.models.gpt import GPT
from lldfast.models.language_model import LanguageModel

TOKENIZER = load_tokenizer("bytes")
rng = np.random.default_rng(0)
TEXTS = ["".join(rng.choice(list("abc déf"), rng.integers(5, 40))) for _ in range(12)]
EVALSET = EvalSet.from_texts(TEXTS, ["a", "b"] * 6)
MODEL = {
    "name": "owner/Some-Model-1B",
    "kind": "hf",
    "source": "owner/Some-Model-1B",
    "hash": "1" * 32,
    "parameters": 1000,
    "dtype": "float32",
    "context_length": 2048,
    "extra": {},
}
META = {
    "model": MODEL,
    "tokenizer_hash": "t" * 32,
    "bos": {"mode": "auto", "id": 0},
    "overlap": 0,
    "amp_dtype": None,
    "precision": None,
}


def meta(*, model=None, **changes):
    return META | changes | {"model": MODEL | (model or {})}


def vector(logprob, about, n_tokens=100):
    n = len(logprob)
    domain = np.array(["a", "b"] * (n // 2) + ["a"] * (n % 2), dtype=object)
    tokens, n_bytes, part = np.full(n, n_tokens), np.full(n, 400), np.array(["measure"] * n, dtype=object)
    return LoglikVector(np.asarray(logprob, float), domain, tokens, n_bytes, part, np.arange(n, dtype=np.uint64), about)


def scorer(seed=0, dtype=torch.float32, tokenizer=TOKENIZER):
    return LanguageModel.from_gpt(GPT("test-tiny", seed=seed).to(dtype), tokenizer, name=f"tiny {seed}")


GGUF = {"kind": "gguf", "hash": "2" * 32, "source": "x.gguf"}
DIFFERENCES = [
    ({"bos": {"mode": "none", "id": None}}, "first token", 35),
    ({"bos": {"mode": "auto", "id": None}}, "first token", 35),
    ({"bos": {"mode": "auto", "id": 7}}, "first token", 35),
    ({"amp_dtype": "bfloat16"}, "dtype", 1.32),
    ({"model": {"dtype": "bfloat16"}}, "dtype", 1.32),
    ({"model": {"dtype": "torch.bfloat16"}}, "dtype", 1.32),
    ({"model": {"dtype": "float16"}}, "dtype", None),
    ({"precision": "bf16"}, "head's product", None),
    ({"sum_dtype": "bfloat16"}, "sums", 3.0),
    ({"tokenizer_hash": "u" * 32}, "tokenizer", 0.57),
    ({"tokenizer_hash": "u" * 32, "model": {"hash": "3" * 32, "name": "Some_Model 1B"}}, "tokenizer", 0.57),
    ({"model": GGUF | {"extra": {"file": "some-model-1b-Q8_0.gguf"}}}, "quantisation", 0.95),
    ({"model": GGUF | {"name": "Some Model 1B Q4_K_M"}}, "quantisation", 0.95),
    ({"overlap": 64, "model": {"context_length": 50}}, "overlap", None),
    ({"model": {"context_length": 50}}, "context length", None),
]


@pytest.mark.parametrize("changes, what, floor", DIFFERENCES)
def test_what_differs_and_its_floor(changes, what, floor):
    one, other = meta(model={"context_length": 60} if "overlap" in changes else None), meta(**changes)
    n_tokens = (np.array([100, 10]),) * 2
    found = [[(d.what, d.floor) for d in compare_conditions(*pair, n_tokens)] for pair in ((one, other), (other, one))]
    assert (what, floor) in found[0] and found[0] == found[1]
    assert len(found[0]) == 1 or {name for name, _ in found[0]} == {"overlap", "context length"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # Another model brings a tokenizer, a first token, a context of its own.
        {
            "model": {"name": "other", "hash": "9" * 32, "context_length": 64},
            "tokenizer_hash": "u" * 32,
            "bos": {"mode": "auto", "id": 7},
        },
        {"model": GGUF | {"name": "other", "extra": {"file": "other-Q4_0.gguf"}}},
        {"model": GGUF | {"extra": {"file": "Some-Model-1B-BF16.gguf"}}},  # the weights that were published in bf16
        {"model": {"hash": "9" * 32, "parameters": 2000}, "tokenizer_hash": "u" * 32},  # a name is not a model
        {"precision": "bf16x3"},
        {"model": {"dtype": "float64"}},
        {"overlap": 64},  # no text is as long as the context
    ],
)
def test_what_models_may_differ_in(changes):
    n_tokens = (np.array([100, 10]),) * 2
    if "precision" not in changes:
        assert compare_conditions(meta(), meta(**changes), n_tokens) == []
    assert compare_conditions(meta(**changes), meta(), n_tokens) == []


def test_models_in_memory_share_their_name_with_others():
    one, other = (meta(model={"name": "gpt", "source": "memory", "hash": h}, tokenizer_hash=h) for h in ("a", "b"))
    assert compare_conditions(one, other) == []


@pytest.mark.parametrize(
    "old", [{}, {"model": "a name"}, {"model": None, "bos": None}, {"bos": "auto"}, {"model": {"name": "x"}}]
)
def test_what_is_not_known_is_not_compared(old):
    assert compare_conditions(old, meta()) == compare_conditions(meta(), old) == compare_conditions(old, old) == []


@pytest.mark.parametrize("other, extra, expected", [
    ("auto", 0, None), ("auto", -1, 35), ("auto", 1, 8.9), ("none", 0, None), ("none", 1, 35),
])  # fmt: skip
def test_a_tokenizers_own_rule_is_told_by_what_it_scores(other, extra, expected):
    native = vector(np.zeros(4), meta(bos={"mode": "native", "id": None}), 50 + extra)
    fixed = vector(np.zeros(4), meta(bos={"mode": other, "id": None if other == "none" else 0}), 50)
    for pair in ((native, fixed), (fixed, native)):
        found = find_differences(*pair)
        assert (found and found.floor) == expected
    unknown = dataclasses.replace(native, meta=native.meta | {"tokenizer_hash": "u" * 32})
    found = find_differences(
        unknown, dataclasses.replace(fixed, meta=meta(model={"name": "x", "hash": "7"}, bos=fixed.meta["bos"]))
    )
    assert found.floor == 0 and "8.9 or as much as 35" in str(found)  # told, but no distance is known to be below it


def test_bf16_depends_on_the_batch():
    half = {"dtype": "bfloat16"}
    one, other = meta(model=half, batch_tokens=1), meta(model=half, batch_tokens=16_384)
    assert [d.floor for d in compare_conditions(one, other)] == [0.13]
    assert compare_conditions(meta(batch_tokens=1), meta(batch_tokens=2)) == []
    assert [d.what for d in compare_conditions(one, meta(amp_dtype="bfloat16"))] == ["batches"]


COMPARED = {
    "kl": kl,
    "kl_matrix": lambda a, b, **o: kl_matrix([a, b], **o),
    "nll_gap": nll_gap,
    "delta": delta,
    "model_map": lambda a, b, **o: model_map([a, b], ["one", "two"], **o),
}


@pytest.mark.parametrize("name", COMPARED)
def test_told_above_the_floor_and_refused_below_it(name):
    compared, base = COMPARED[name], np.zeros(200)
    far, near = rng.normal(0, 9, 200), rng.normal(0, 8, 200)
    far *= (2 * 36.0) ** 0.5 / far.std()
    near *= (2 * 34.0) ** 0.5 / near.std()
    plain, none = meta(), meta(bos={"mode": "none", "id": None}, model={"name": "target", "hash": "8"})
    with pytest.warns(ComparisonWarning, match=r"35 to 37 nats per text .*the distance found: 36 nats per text") as told:
        compared(vector(far, none), vector(base, plain))
    assert len(told) == 1 and told[0].filename == __file__
    names = "one and two" if name == "model_map" else "'target' and 'owner/Some-Model-1B'"
    with pytest.raises(InputError, match=rf"^{names} were not .*: 34 nats per text, which is no distance .*allow_differences"):
        compared(vector(near, none), vector(base, plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compared(vector(near, none), vector(base, plain), allow_differences=True)
        compared(vector(near, plain), vector(base, plain))  # nearer still, but alike


def test_a_single_text_has_no_distance():
    with pytest.warns(ComparisonWarning, match="of one text there is none"):
        kl(vector([1.0], meta()), vector([2.0], meta(amp_dtype="bfloat16")))


def test_a_matrix_tells_once_and_not_of_thousands():
    rows = {f"checkpoint {i}": vector(rng.normal(0, 20, 40), meta(model={"name": "m", "hash": str(i)})) for i in range(14)}
    rows["target"] = vector(rng.normal(0, 20, 40), meta(model={"name": "t", "hash": "t"}, amp_dtype="bfloat16"))
    with pytest.warns(ComparisonWarning) as told:
        kl_matrix(rows)
    message = str(told[0].message)
    assert len(told) == 1 and message.startswith("checkpoint 0 and target were not scored alike: layers are computed in float32")
    assert message.count(" and target") == 11 and message.endswith("... and 3 more")
    assert describe_differences(list(rows.values())[:14]) is None
    rows["target"].logprob[:] = rows["checkpoint 3"].logprob + 1e-3
    with pytest.raises(InputError, match=r"^checkpoint 3 and target .* 1\.32 nats per text"):
        kl_matrix(rows)


def test_one_model_scored_in_two_ways():
    one = scorer()
    plain = score(one, EVALSET)
    for other in (
        score(one, EVALSET, bos="none"),
        score(one, EVALSET, amp_dtype="bfloat16"),
        score(scorer(dtype=torch.bfloat16), EVALSET),
    ):
        with pytest.raises(InputError, match="'tiny 0' and another vector of it were not scored alike"):
            kl(plain, other)
    assert kl(plain, score(one, EVALSET, batch_tokens=64)).total < 1e-9  # fp32, whatever the batch
    assert find_differences(plain, score(one, EVALSET, bos="native")).floor == 35  # bytes put nothing in front
    assert find_differences(score(one, EVALSET, bos="none"), score(one, EVALSET, bos="native")) is None
    bpe = train_bpe(TEXTS, 257)
    rebuilt = score(LanguageModel.from_gpt(one.module, bpe, name="tiny 0"), EVALSET)
    assert [d.what for d in compare_conditions(plain.meta, rebuilt.meta)] == ["tokenizer"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kl(plain, score(scorer(1), EVALSET))
        kl(plain, score(scorer(1, tokenizer=bpe), EVALSET))  # two models, each with a tokenizer of its own


def test_true_kl_tells_of_dtypes():
    with pytest.warns(ComparisonWarning, match=r"tiny 0 and tiny 1: layers are computed in float32 and in bfloat16.* 1\.32"):
        true_kl(scorer(), scorer(1, torch.bfloat16), EVALSET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        true_kl(scorer(), scorer(1), EVALSET)
        true_kl(scorer(), scorer(1, torch.bfloat16), EVALSET, allow_differences=True)


def test_a_controller_tells_once_and_refuses_at_its_first_estimate():
    base = scorer(1)
    far = score(scorer(), EVALSET, bos="none")
    far.logprob += np.linspace(-200, 200, len(far))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        c = LLDController(EVALSET, far, steps=10, at=[0, 1, 2])
        c.step(0, base)
        c.target = dataclasses.replace(far, logprob=score(base, EVALSET).logprob)  # however near the base comes
        c.step(1, base)
    assert [warning.category for warning in told] == [ComparisonWarning] and told[0].filename == __file__
    near = score(base, EVALSET, bos="none")
    with pytest.raises(InputError, match=r"'tiny 1' and another vector of it .* 35 to 37"):
        LLDController(EVALSET, near, steps=10).step(0, base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLDController(EVALSET, near, steps=10, allow_differences=True).step(0, base)


def test_the_command_line(tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("one.parquet", "two.parquet", "three.parquet")]
    vector(np.zeros(20), meta()).save(paths[0])
    vector(np.linspace(-1, 1, 20), meta(amp_dtype="bfloat16")).save(paths[1])
    vector(np.linspace(-9, 9, 20), meta(amp_dtype="bfloat16")).save(paths[2])
    assert main(["kl", paths[0], paths[2]]) == 0
    said = capsys.readouterr()
    assert (
        said.err.startswith(f"warning: {paths[0]} and {paths[2]} were not scored alike: layers")
        and "comparable.py" not in said.err
    )
    assert main(["kl", *paths[:2]]) == 1
    assert "error:" in (said := capsys.readouterr().err) and paths[1] in said and "--anyway" in said
    assert main(["kl", *paths[:2], "--anyway"]) == 0
    said = capsys.readouterr()
    assert "1.32 nats per text" in said.err and said.out.count("\n") == 2


def test_names_are_listed_to_ten():
    assert listed(["a", "b"]) == "a, b" and listed([]) == ""
    assert listed(range(10)).endswith("8, 9")
    assert listed(map(str, range(2000))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... and 1,990 more"
