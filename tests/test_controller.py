"""LLDController: what an estimate sees, what it gives, and what its state must carry."""

import numpy as np
import pytest
import torch

from lldfast.controller import LLDController
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer
from lldfast.errors import InputError
from lldfast.loglik import delta, score
from lldfast.models.gpt import GPT
from lldfast.models.scorer import Scorer
from lldfast.rules import Rule
from lldfast.weights import adjusted_lld_weights, aggregate_weights, lld_weights

rng = np.random.default_rng(0)
TOKENIZER = load_tokenizer("bytes")
TEXTS = ["".join(rng.choice(list("abc déf"), rng.integers(20, 90))) for _ in range(18)]
EVALSET = EvalSet.from_texts(TEXTS, ["b"] * 6 + ["a"] * 5 + ["c"] * 7, part=(["estimate"] * 5 + ["measure"]) * 3)
BASE = Scorer.from_gpt(GPT("test-tiny", seed=0), TOKENIZER)
TARGET = score(Scorer.from_gpt(GPT("test-tiny", seed=1), TOKENIZER), EVALSET)


def controller(**options):
    return LLDController(EVALSET, TARGET, steps=100, **options)


@pytest.mark.parametrize("normalize", ["base_tokens", "bytes", "texts"])
def test_a_step_is_eq_7_on_the_texts_kept_for_estimates(normalize):
    c = controller(normalize=normalize, rule=Rule(tau=0.5))
    weights = c.step(0, BASE)
    part = EVALSET.select("estimate")
    expected = lld_weights(delta(TARGET.select("estimate"), score(BASE, part), normalize)[0], tau=0.5)
    assert list(weights) == ["b", "a", "c"] and weights == pytest.approx(expected)
    assert c.step(3, BASE) is None and c.step(1, BASE) is not None
    with pytest.raises(InputError, match="step 1 comes after"):
        c.step(1, BASE)


def test_g_is_in_the_unit_of_delta():
    """l_k' = c_k l_k gives J' = C J, hence G' = C G C."""
    plain, other = controller(rule="adjusted"), controller(rule="adjusted", normalize="texts")
    for c in (plain, other):
        c.step(0, BASE)
    scale = other.deltas[0] / plain.deltas[0]
    np.testing.assert_allclose(other.grams[0], plain.grams[0] * np.outer(scale, scale), rtol=1e-9)
    np.testing.assert_allclose(other.weights[0], adjusted_lld_weights(other.grams[0], other.deltas[0]))


@pytest.mark.parametrize("rule", ["mirror", "adjusted"])
def test_state_goes_on_where_it_was(rule):
    model = GPT("test-tiny", seed=2)
    whole = controller(rule=rule, tokenizer=TOKENIZER, bootstrap=5)
    first = controller(rule=rule, tokenizer=TOKENIZER, bootstrap=5)
    for step in (0, 1):
        assert whole.step(step, model) == first.step(step, model)
    resumed = controller(rule=rule, tokenizer=TOKENIZER, bootstrap=5)
    resumed.load_state_dict(first.state_dict())
    with torch.no_grad():
        model.wte.weight += 0.01
    for step in (2, 4):
        assert whole.step(step, model) == resumed.step(step, model)
    assert whole.trajectory() == resumed.trajectory() and whole.aggregate_errors() == resumed.aggregate_errors()


def test_state_of_other_domains_is_refused():
    c = controller()
    c.step(0, BASE)
    order = np.argsort(EVALSET.domain.astype(str), kind="stable")
    shuffled = EvalSet.from_texts([TEXTS[i] for i in order], EVALSET.domain[order], EVALSET.part[order])
    with pytest.raises(InputError, match=r"\['b', 'a', 'c'\], in this order"):
        LLDController(shuffled, score(BASE, shuffled), steps=100).load_state_dict(c.state_dict())


def test_aggregate_counts_time_for_mirror_only():
    for rule, how in (("iterative", None), ("mirror", [1, 1, 98])):
        c = controller(rule=rule)
        for step in (0, 1, 2):
            c.step(step, BASE)
        np.testing.assert_allclose(list(c.aggregate().values()), aggregate_weights(np.stack(c.weights), step_weights=how))


def test_bad_calls():
    with pytest.raises(InputError, match="pass tokenizer="):
        controller().step(0, GPT("test-tiny", seed=0))
    with pytest.raises(InputError, match="wrap the Linear once"):
        controller(tokenizer=TOKENIZER).step(0, torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="prior has 2 entries for 3"):
        controller(rule=Rule(prior=(0.5, 0.5)))
    with pytest.raises(InputError, match="other texts"):
        LLDController(EVALSET, TARGET.select("measure"), steps=10)


def test_calls_that_make_no_sense():
    for wrong in (1, -1):
        with pytest.raises(InputError, match=f"bootstrap must be 0 or at least 2, got {wrong}"):
            controller(bootstrap=wrong)
    with pytest.raises(InputError, match="there is no estimate to aggregate"):
        controller().aggregate()


def test_adjusted_with_one_text_per_domain():
    one = EvalSet.from_texts(["one text", "another text", "a third one"], ["a", "b", "c"])
    target = score(Scorer.from_gpt(GPT("test-tiny", seed=1), TOKENIZER), one)
    weights = LLDController(one, target, steps=4, rule="adjusted").step(0, BASE)
    assert sum(weights.values()) == pytest.approx(1) and all(np.isfinite(v) for v in weights.values())
