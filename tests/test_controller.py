"""LLDController: what an estimate sees, what it gives, and what its state must carry."""

import dataclasses
import inspect
import json
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch

from lldfast.controller import GRAM_OPTIONS, LLDController
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer
from lldfast.errors import CorruptError, InputError
from lldfast.gram import estimate
from lldfast.gram import step as gram_step
from lldfast.gram.options import MODES, GramOptions
from lldfast.measure.loglik import delta
from lldfast.measure.score import score
from lldfast.models.gpt import GPT
from lldfast.models.language_model import LanguageModel
from lldfast.run.config import GramConfig
from lldfast.terminal import option_help
from lldfast.weights.bootstrap import standard_errors
from lldfast.weights.constrained import fit_weights
from lldfast.weights.equations import adjusted_lld_weights, aggregate_weights, lld_weights
from lldfast.weights.file import WeightsFile, save_weights, step_gram
from lldfast.weights.recompute import recompute
from lldfast.weights.rules import Rule, replay

rng = np.random.default_rng(0)
TOKENIZER = load_tokenizer("bytes")
TEXTS = ["".join(rng.choice(list("abc déf"), rng.integers(20, 90))) for _ in range(18)]
EVALSET = EvalSet.from_texts(TEXTS, ["b"] * 6 + ["a"] * 5 + ["c"] * 7, part=(["estimate"] * 5 + ["measure"]) * 3)
BASE = LanguageModel.from_gpt(GPT("test-tiny", seed=0), TOKENIZER)
TARGET = score(LanguageModel.from_gpt(GPT("test-tiny", seed=1), TOKENIZER), EVALSET)


def controller(**options):
    return LLDController(EVALSET, TARGET, steps=100, **options)


@pytest.mark.parametrize("per", ["base_tokens", "bytes", "texts"])
def test_a_step_is_eq_7_on_the_texts_kept_for_estimates(per):
    c = controller(per=per, rule=Rule(tau=0.5))
    weights = c.step(0, BASE)
    part = EVALSET.select("estimate")
    expected = lld_weights(delta(TARGET.select("estimate"), score(BASE, part), per)[0], tau=0.5)
    assert list(weights) == ["b", "a", "c"] and weights == pytest.approx(expected)
    assert c.step(3, BASE) is None and c.step(1, BASE) is not None
    with pytest.raises(InputError, match="step 1 comes after"):
        c.step(1, BASE)


def test_g_is_in_the_unit_of_delta():
    """l_k' = c_k l_k gives J' = C J, hence G' = C G C."""
    plain, other = controller(rule="adjusted"), controller(rule="adjusted", per="texts")
    for c in (plain, other):
        c.step(0, BASE)
    scale = other.deltas[0] / plain.deltas[0]
    np.testing.assert_allclose(other.grams[0], plain.grams[0] * np.outer(scale, scale), rtol=1e-9)
    ridge = other.gram_info[0]["ridge"]  # None where the estimate chose none
    share = [(c.gram_info[0]["ridge"] or 0.0) / c.grams[0].trace() for c in (plain, other)]
    assert share[0] == pytest.approx(share[1])
    np.testing.assert_allclose(other.weights[0], adjusted_lld_weights(other.grams[0], other.deltas[0], ridge=ridge or "auto"))


@pytest.mark.parametrize(
    "rule", ["mirror", "adjusted-fit", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("adjusted", "adjusted-trust"))]
)
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


class FakeEstimate:
    """gram.estimate with a known answer, in the reverse order of the domains: what it was asked for is in `calls`."""

    names = ("c", "a", "b")
    gram = (lambda j: j @ j.T)(np.random.default_rng(5).normal(size=(3, 9)))

    def __init__(self, k=None, ridge=0.5, drift=(0.3, -0.2, 0.7), expected_error=0.01, noise=1.0):
        self.calls, self.k, self.ridge, self.drift, self.error, self.noise = [], k, ridge, drift, expected_error, noise

    def __call__(
        self, model, evalset, *, mode="auto", k="auto", groups=8, debias=True, precondition=None, budget_bytes=None,
        batch_tokens=4096, seed=0, delta=None, tau=1.0, target_kl=1e-4, ridge="auto",
    ):  # fmt: skip
        self.calls.append({name: value for name, value in locals().items() if name not in ("self", "model", "evalset")})
        scale = 1 + 0.1 * len(self.calls)
        return SimpleNamespace(
            domains=list(self.names),
            matrix=lambda names: scale * self.gram[np.ix_(*[[self.names.index(n) for n in names]] * 2)],
            mode="exact" if self.k is None else "fold",
            k=self.k,
            ridge=None if self.ridge is None else self.ridge * scale,
            drift=None if self.drift is None else np.array(self.drift),
            expected_error=self.error,
            naive_diagonal=self.noise * scale * self.gram.diagonal(),
            debiased=[True, False, True],
            seconds=1.25,
        )


@pytest.fixture
def fake(monkeypatch):
    def install(**options):
        found = FakeEstimate(**options)
        monkeypatch.setattr(gram_step, "estimate", found)
        return found

    return install


def test_the_estimate_takes_what_the_controller_gives():
    taken = inspect.signature(estimate).parameters
    assert taken.keys() == {"model", "evalset", "delta", "tau", *GRAM_OPTIONS}
    assert taken.keys() == inspect.signature(FakeEstimate.__call__).parameters.keys() - {"self"}


def test_options_are_stated_once():
    """The signature of `gram.estimate`, which people read, has the defaults and modes of `GramOptions`."""
    taken = inspect.signature(estimate, eval_str=True).parameters
    defaults = GramOptions().keywords()
    assert {name: taken[name].default for name in defaults} == defaults
    assert get_args(taken["mode"].annotation) == MODES
    names = [f.name for f in dataclasses.fields(GramOptions)]
    assert (
        list(option_help(GramOptions)) == names == [f.name for f in dataclasses.fields(GramConfig)]
        and GramConfig().keywords() == defaults
    )


def test_the_old_name_of_the_steps_is_deprecated():
    c = controller()
    c.step(0, BASE)
    with pytest.warns(DeprecationWarning, match="estimated_at"):
        assert c.steps == c.estimated_at == [0]


def test_options_of_the_estimate(fake):
    found = fake()
    model = GPT("test-tiny", seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    options = GramConfig(mode="fold", k=1024, budget_mb=2, precondition="adamw", batch_tokens=77, target_kl=0.5).keywords()
    c = controller(rule=Rule("adjusted", tau=0.5), gram_options=options, seed=7)
    for step in (0, 2):
        c.step(step, BASE, optimizer)
    for call, step in zip(found.calls, (0, 2), strict=True):
        assert call["precondition"] is optimizer
        assert {name: call[name] for name in options if name != "precondition"} == {
            name: value for name, value in options.items() if name != "precondition"
        }
        assert call["seed"] == 7 + step and call["tau"] == 0.5
        np.testing.assert_array_equal(call["delta"], c.deltas[0])
    with pytest.raises(InputError, match=r"'adamw': give LLDController\.step the optimizer"):
        controller(rule="adjusted", gram_options=options).step(0, BASE)
    plain = controller(rule="adjusted", batch_tokens=500)
    plain.step(0, BASE)
    assert found.calls[-1]["batch_tokens"] == 500 and found.calls[-1]["mode"] == "auto"
    with pytest.raises(InputError, match="gram_options has no entry 'kay'; it takes mode, k"):
        controller(gram_options={"kay": 1})


def test_ridge_and_drift_are_in_the_unit_of_delta(fake):
    """Per text a domain's log-likelihood is u_k times that per token: G' = U G U, drift' = U drift, and the ridge keeps its share
    of tr G."""
    found = fake()
    plain, other = controller(rule="adjusted-fit"), controller(rule="adjusted-fit", per="texts")
    for c in (plain, other):
        found.calls.clear()
        c.step(0, BASE)
    np.testing.assert_allclose(found.calls[0]["delta"], plain.deltas[0])  # the estimate works per token
    assert other.deltas[0].std() / other.rule.planned_tau(other.deltas[0], 0) == pytest.approx(
        plain.deltas[0].std() / found.calls[0]["tau"]
    )
    unit = other.deltas[0] / plain.deltas[0]
    a, b = (step_gram(c.grams[0], c.gram_info[0], c.domains) for c in (plain, other))
    assert a.drift.tolist() == [0.7, -0.2, 0.3] and a.ridge == pytest.approx(0.55)
    np.testing.assert_allclose(b.matrix, a.matrix * np.outer(unit, unit))
    np.testing.assert_allclose(b.drift, a.drift * unit)
    assert b.ridge / b.matrix.trace() == pytest.approx(a.ridge / a.matrix.trace())
    for c, g in ((plain, a), (other, b)):
        expected = fit_weights(g.matrix, c.deltas[0], ridge=g.ridge)
        np.testing.assert_allclose(c.weights[0], expected, atol=1e-9)


@pytest.mark.parametrize("rule", ["adjusted", "adjusted-trust", "adjusted-fit"])
def test_ridge_and_drift_go_through_state_file_and_replay(rule, fake, tmp_path):
    fake()
    first = controller(rule=rule, bootstrap=5)
    for step in (0, 1):
        first.step(step, BASE)
    np.savez(tmp_path / "state.npz", **first.state_dict())
    resumed = controller(rule=rule, bootstrap=5)
    with np.load(tmp_path / "state.npz") as stored:
        resumed.load_state_dict(dict(stored))
    for c in (first, resumed):
        fake(ridge=3.0, drift=None)
        c.step(4, BASE)
    assert first.trajectory() == resumed.trajectory()
    assert first.aggregate_errors() == resumed.aggregate_errors() and first.last_errors() == resumed.last_errors()
    fields = first.rule.to_json(first.domains)
    save_weights(tmp_path / "w.json", first.aggregate(), trajectory=first.trajectory(), total_steps=100, **fields)
    first.save_replicates(tmp_path / "delta_bootstrap.npz")
    offline = recompute(tmp_path / "w.json")
    assert offline.weights == pytest.approx(first.aggregate(), abs=1e-12)
    assert offline.weights_se == pytest.approx(first.aggregate_errors(), abs=1e-12)
    for entry, w in zip(offline.trajectory, first.weights, strict=True):
        assert list(entry.weights.values()) == pytest.approx(w.tolist(), abs=1e-12)
    mean = "arithmetic" if rule == "adjusted-fit" else "geometric"
    assert offline.aggregate == mean
    np.testing.assert_allclose(list(first.aggregate().values()), aggregate_weights(np.stack(first.weights), method=mean))


def test_a_state_of_before_ridges_were_stored(fake):
    fake(ridge=None, drift=None)
    first, resumed = controller(rule="adjusted", bootstrap=5), controller(rule="adjusted", bootstrap=5)
    first.step(0, BASE)
    old = {name: value for name, value in first.state_dict().items() if name != "gram_info"}
    resumed.load_state_dict(old)
    assert resumed.gram_info == [None] and resumed.aggregate_errors() == first.aggregate_errors()
    np.testing.assert_allclose(replay(resumed.rule, [0], 100, resumed.deltas, resumed.grams), first.weights)


def test_what_is_told_about_an_estimate(fake):
    fake()
    c = controller(rule="adjusted")
    with pytest.raises(InputError, match="there is no estimate of G"):
        c.gram_line()
    c.step(0, BASE)
    info = json.loads(json.dumps(c.trajectory(), allow_nan=False))[0]["gram_info"]
    assert (info["mode"], info["k"], info["debiased"], info["expected_error"]) == ("exact", None, 2, 0.01)
    assert info["weights_se"] is None and info["ridge_used"] == info["ridge"] > 0 and info["condition"] > 1
    literal = adjusted_lld_weights(c.grams[0], c.deltas[0], tau=info["effective_tau"], gram_scale="none", ridge=info["ridge"])
    np.testing.assert_allclose(c.weights[0], literal)
    line = c.gram_line()
    assert "G at step 0: exact, expected error of v 1 %" in line and "2/3 domains debiased, 1.2 s" in line
    fake(k=1 << 16, expected_error=float("nan"))
    c.step(1, BASE)
    assert c.gram_info[1]["expected_error"] is None and "fold k 65,536, expected error of v unknown" in c.gram_line()
    other = controller(rule="iterative")
    other.step(0, BASE)
    assert other.trajectory()[0]["gram_info"] is None


@pytest.mark.parametrize("noise", [1.0, 1.5])
@pytest.mark.parametrize("rule", ["adjusted", "adjusted-fit"])
def test_errors_of_weights_by_a_sketch(rule, noise, fake):
    """Against sketches drawn one by one: Gaussian vectors, 512 numbers each, of rows with G plus the noise that was taken out."""
    fake(k=512, noise=noise)
    c = controller(rule=Rule(rule, tau=0.02))  # the Delta of these models is small
    c.step(0, BASE)
    g = step_gram(c.grams[0], c.gram_info[0], c.domains)
    taken_out = (noise - 1) * np.diag(g.matrix.diagonal())
    r = np.random.default_rng(11)
    half = np.linalg.cholesky(g.matrix + taken_out)
    draws = [half @ r.normal(size=(3, 512)) / np.sqrt(512) for _ in range(400)]
    errors = standard_errors(
        np.stack([s @ s.T - taken_out for s in draws]),
        lambda gram: replay(c.rule, [0], 100, c.deltas, [g._replace(matrix=gram)])[0],
    )
    found = c.gram_info[0]["weights_se"]
    assert list(found) == c.domains and errors.max() > 5e-3
    np.testing.assert_allclose(list(found.values()), errors, rtol=0.3, atol=1e-3)
    small = controller(rule=c.rule)
    fake(k=2)  # fewer numbers than domains
    small.step(0, BASE)
    assert max(small.gram_info[0]["weights_se"].values()) > max(found.values())


def test_no_errors_of_weights_from_a_gram_that_is_noise_alone(fake):
    """A million times more was taken out of the diagonal than is left: most simulated sketches leave nothing positive."""
    fake(k=4, noise=1e6)
    one = EvalSet.from_texts(TEXTS[:4], ["a"] * 4)
    c = LLDController(one, score(LanguageModel.from_gpt(GPT("test-tiny", seed=1), TOKENIZER), one), steps=10, rule="adjusted")
    assert c.step(0, BASE) == {"a": 1.0}
    assert c.gram_info[0]["weights_se"] is None


def test_bad_calls():
    with pytest.raises(InputError, match="pass tokenizer="):
        controller().step(0, GPT("test-tiny", seed=0))
    with pytest.raises(InputError, match="wrap the Linear once"):
        controller(tokenizer=TOKENIZER).step(0, torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="prior has 2 entries for 3"):
        controller(rule=Rule(prior=(0.5, 0.5)))
    with pytest.raises(InputError, match="different texts: the target's scores"):
        LLDController(EVALSET, TARGET.select("measure"), steps=10)
    other = dataclasses.replace(TARGET, text_hash=TARGET.text_hash[::-1].copy())  # as many texts, of the same sizes and domains
    with pytest.raises(InputError, match="different texts: the target's scores"):
        LLDController(EVALSET, other, steps=10)


def test_calls_that_make_no_sense():
    for wrong in (1, -1):
        with pytest.raises(InputError, match=f"bootstrap must be 0 or at least 2, got {wrong}"):
            controller(bootstrap=wrong)
    with pytest.raises(InputError, match="there is no estimate to aggregate"):
        controller().aggregate()


def test_adjusted_with_one_text_per_domain():
    one = EvalSet.from_texts(["one text", "another text", "a third one"], ["a", "b", "c"])
    target = score(LanguageModel.from_gpt(GPT("test-tiny", seed=1), TOKENIZER), one)
    weights = LLDController(one, target, steps=4, rule="adjusted").step(0, BASE)
    assert sum(weights.values()) == pytest.approx(1) and all(np.isfinite(v) for v in weights.values())


def test_save_says_all_that_the_controller_knows(tmp_path):
    c = controller(rule=Rule("mirror", step_size=2.0), bootstrap=4)
    with pytest.raises(InputError, match="no estimate"):
        c.save(tmp_path / "w.json")
    for step in (0, 1, 2):
        c.step(step, BASE)
    file = WeightsFile.load(c.save(tmp_path / "w.json", corpus_hash="abc"))
    assert file.weights == pytest.approx(c.aggregate(), abs=1e-15) and file.weights_se == c.aggregate_errors()
    assert [e.to_json() for e in file.trajectory] == c.trajectory() and file.made_by() == c.rule
    assert (file.step_weights, file.aggregate, file.per) == ("elapsed", "geometric", "base_tokens")
    assert file.target == TARGET.meta["model"] and file.base == BASE.identity and file.about["corpus_hash"] == "abc"
    assert file.target["name"] in file.disclosure and file.about["evalset_hash"] == c.evalset.hash
    offline = recompute(tmp_path / "w.json")
    assert offline.weights == pytest.approx(file.weights, abs=1e-12) and offline.weights_se == pytest.approx(file.weights_se)
    other = controller()  # another recipe in the same folder has errors of its own, or none
    other.step(0, BASE)
    other.save(tmp_path / "other.json")
    assert recompute(tmp_path / "other.json").weights_se is None
    assert recompute(tmp_path / "w.json").weights_se == offline.weights_se


def test_save_takes_provenance_and_no_estimates(tmp_path):
    c = controller()
    c.step(0, BASE)
    file = WeightsFile.load(c.save(tmp_path / "w.json", method="mine", seed=7, target={"name": "T", "licence": "MIT"}))
    assert (file.method, file.about["seed"], file.target["licence"]) == ("mine", 7, "MIT")
    assert "'T' (licence: MIT)" in file.disclosure
    for name in ("weights", "trajectory", "rule", "tau"):
        with pytest.raises(InputError, match=f"'{name}' is what the controller has estimated"):
            c.save(tmp_path / "w.json", **{name: None})
    with pytest.raises(CorruptError, match=r"w\.json: its target is 'T', not an object"):
        c.save(tmp_path / "w.json", target="T")


def test_an_unknown_unit_is_refused_at_once():
    with pytest.raises(InputError, match="per='nonsense' is not one of base_tokens, bytes, texts"):
        controller(per="nonsense")


def test_former_names_work_and_say_the_present_one():
    with pytest.warns(DeprecationWarning, match="per="):
        c = controller(normalize="texts")
    assert c.per == "texts"
    with pytest.warns(DeprecationWarning, match="gram_scale"):
        rule = Rule("adjusted", normalise="corr")
    assert rule == Rule("adjusted", gram_scale="corr")
    with pytest.warns(DeprecationWarning, match=r"Rule\.gram_scale"):
        assert rule.normalise == "corr"
    with pytest.raises(TypeError, match="both 'normalise' and 'gram_scale'"):
        Rule("adjusted", normalise="corr", gram_scale="none")
    with pytest.warns(DeprecationWarning, match="per="):
        assert TARGET.by_domain(normalize="bytes") == TARGET.by_domain("bytes")


def test_one_bootstrap_of_delta():
    """The errors that `delta` gives are those of the controller for the same texts and seed."""
    c = controller(bootstrap=50, seed=3)
    c.step(0, BASE)
    part = EVALSET.select("estimate")
    _, errors = delta(TARGET.select("estimate"), score(BASE, part), bootstrap=50, seed=3)
    assert errors == pytest.approx(c.trajectory()[0]["delta_se"], rel=1e-12)


def test_an_estimate_that_fails_leaves_nothing_behind(monkeypatch):
    """A caller may catch the error, and try the step again."""
    c, other = controller(bootstrap=3), controller(bootstrap=3)
    c.step(0, BASE), other.step(0, BASE)
    real = Rule.weights

    def broken(self, logits):
        raise InputError("no weights")

    monkeypatch.setattr(Rule, "weights", broken)
    with pytest.raises(InputError, match="no weights"):
        c.step(1, BASE)
    monkeypatch.setattr(Rule, "weights", real)
    assert c.estimated_at == [0] and len(c.deltas) == len(c.weights) == len(c.replicates) == 1
    c.step(1, BASE), other.step(1, BASE)
    assert c.trajectory() == other.trajectory() and c.aggregate_errors() == other.aggregate_errors()


def test_a_state_that_cannot_be_read_changes_nothing():
    c, other = controller(bootstrap=3), controller(bootstrap=3)
    c.step(0, BASE), other.step(0, BASE), other.step(1, BASE)
    before, damaged = c.trajectory(), other.state_dict()
    del damaged["replicates"]
    with pytest.raises(KeyError):
        c.load_state_dict(damaged)
    assert c.trajectory() == before and len(c.replicates) == 1
