"""Weights files: round trip, offline recomputation from stored Delta_t, and what is refused."""

import json

import numpy as np
import pytest

from lldfast.errors import CorruptError, InputError
from lldfast.weights.constrained import fit_weights
from lldfast.weights.disclosure import disclosure
from lldfast.weights.equations import adjusted_lld_weights, aggregate_weights, lld_weights
from lldfast.weights.file import WeightsFile, load_weights, save_weights
from lldfast.weights.recompute import recompute
from lldfast.weights.rules import Rule, replay

rng = np.random.default_rng(0)
NAMES = ["Github", "Pile-CC", "Wikipedia (en)"]
STEPS, TOTAL = [0, 1, 2, 4, 10, 20], 30
DELTAS = rng.normal(size=(6, 3))


@pytest.fixture
def run(tmp_path):
    """A finished pass 1 of the iterative rule."""
    w = replay(Rule(), STEPS, TOTAL, DELTAS)
    trajectory = [
        {
            "step": s,
            "delta": dict(zip(NAMES, d.tolist(), strict=True)),
            "weights": dict(zip(NAMES, x.tolist(), strict=True)),
            "gram": None,
        }
        for s, d, x in zip(STEPS, DELTAS, w, strict=True)
    ]
    path = tmp_path / "weights.json"
    recipe = dict(zip(NAMES, aggregate_weights(w).tolist(), strict=True))
    save_weights(path, recipe, total_steps=TOTAL, trajectory=trajectory, **Rule().to_json())
    replicates = DELTAS[:, None, :] + 0.1 * rng.normal(size=(6, 40, 3))
    np.savez(tmp_path / "delta_bootstrap.npz", steps=np.array(STEPS), deltas=replicates)
    return path


def values(file):
    return np.array([file.weights[name] for name in NAMES])


def test_recompute_the_recipe_itself(run):
    np.testing.assert_allclose(values(recompute(run)), values(WeightsFile.load(run)), rtol=1e-12)


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_any_tau_by_the_closed_form(run, tau):
    out = recompute(run, rule=Rule(tau=tau))
    np.testing.assert_allclose(values(out), lld_weights(DELTAS.mean(axis=0), tau=tau), rtol=1e-9)
    assert out.made_by().tau == tau and len(out.weights_se) == 3 and all(v > 0 for v in out.weights_se.values())


def test_subsets_rules_and_stages(run):
    late = recompute(run, steps=[10, 20])
    np.testing.assert_allclose(values(late), lld_weights(DELTAS[4:].mean(axis=0)), rtol=1e-9)
    last = recompute(run, aggregate="none")
    np.testing.assert_allclose(values(last), lld_weights(DELTAS[-1]), rtol=1e-9)
    mirror = recompute(run, rule=Rule("mirror"))
    assert mirror.step_weights == "elapsed" and not np.allclose(values(mirror), values(late))
    two = recompute(run, stages=2)
    assert [s.from_step for s in two.stages] == [0, 15]
    with pytest.raises(InputError, match="no estimate at step 3"):
        recompute(run, steps=[3])
    with pytest.raises(InputError, match="Gram"):
        recompute(run, rule=Rule("adjusted"))


def test_the_trajectory_follows_the_rule(run):
    """A two-stage pass 2 is made from the trajectory's weights, so a recomputed file must not keep those of the old rule."""
    out = recompute(run, rule=Rule(tau=0.1), steps=[10, 20])
    assert [entry.step for entry in out.trajectory] == [10, 20]
    for entry, d in zip(out.trajectory, DELTAS[4:], strict=True):
        np.testing.assert_allclose([entry.weights[n] for n in NAMES], lld_weights(d, tau=0.1), rtol=1e-9)
    assert out.last_weights == out.trajectory[-1].weights


def test_two_stages_weight_by_time_as_training_does(run):
    assert recompute(run, stages=2).step_weights == "elapsed"
    equal = recompute(run, stages=2, step_weights="equal").stages
    closed = lld_weights(DELTAS[:5].mean(axis=0))  # estimates at 0, 1, 2, 4, 10; the boundary is 15
    np.testing.assert_allclose([equal[0].weights[n] for n in NAMES], closed, rtol=1e-9)


def test_a_prior_is_kept_by_name(tmp_path):
    prior = (0.2, 0.3, 0.5)
    fields = Rule(prior=prior).to_json(NAMES)
    assert fields["prior"] == dict(zip(NAMES, prior, strict=True))
    path = save_weights(tmp_path / "w.json", dict(zip(NAMES[::-1], prior, strict=True)), **fields)
    assert WeightsFile.load(path).made_by().prior == prior[::-1]


GRAMS = [(lambda j: j @ j.T)(np.random.default_rng(t).normal(size=(3, 9))) for t in range(6)]


@pytest.fixture
def fitted(run):
    """The same run with a Gram matrix, a ridge and a drift at every estimate, made by "adjusted-fit"."""
    file = json.loads(run.read_text())
    for t, entry in enumerate(file["trajectory"]):
        drift = {"Pile-CC": 0.1 * t, "Github": 1.0, "Wikipedia (en)": -1.0}  # not in the order of the domains
        entry |= {"gram": GRAMS[t].tolist(), "gram_info": {"ridge": 0.5 + t, "drift": drift}}
    run.write_text(json.dumps({**file, **Rule("adjusted-fit").to_json()}))
    return run


def test_every_field_of_a_rule_is_kept():
    rule = Rule(
        "adjusted-fit", tau=2.0, tau_end=3.0, step_size=5.0, floor=0.1, gram_scale="corr", ridge=0.5, prior=(0.2, 0.3, 0.5),
        radius=0.3, fit_step=0.7,
    )  # fmt: skip
    fields = rule.to_json(NAMES)
    assert Rule.from_json(json.loads(json.dumps(fields)), NAMES) == rule
    del fields["radius"], fields["fit_step"]  # a file of before these rules
    old = Rule.from_json(fields, NAMES)
    assert (old.radius, old.fit_step) == (0.1, "auto")


def test_the_ridge_and_drift_of_an_estimate_are_used_offline(fitted):
    _, _, grams = WeightsFile.load(fitted).arrays()
    assert [g.ridge for g in grams] == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5] and grams[2].drift.tolist() == [1.0, 0.2, -1.0]
    last = recompute(fitted, rule=Rule("adjusted"), aggregate="none")
    np.testing.assert_allclose(values(last), adjusted_lld_weights(GRAMS[-1], DELTAS[-1], ridge=5.5), rtol=1e-9)
    fit = recompute(fitted, aggregate="none")
    np.testing.assert_allclose(values(fit), fit_weights(GRAMS[-1], DELTAS[-1], ridge=5.5), rtol=1e-9)
    fixed = recompute(fitted, rule=Rule("adjusted-fit", fit_step=0.5), aggregate="none")
    expected = fit_weights(GRAMS[-1], DELTAS[-1], step=0.5, ridge=5.5, drift=np.array([1.0, 0.5, -1.0]))
    np.testing.assert_allclose(values(fixed), expected, rtol=1e-9)
    file = json.loads(fitted.read_text())
    for entry in file["trajectory"]:
        del entry["gram_info"]  # a file of before ridges were stored
    fitted.write_text(json.dumps(file))
    old = recompute(fitted, rule=Rule("adjusted"), aggregate="none")
    np.testing.assert_allclose(values(old), adjusted_lld_weights(GRAMS[-1], DELTAS[-1]), rtol=1e-9)


def test_a_fit_whose_domains_are_all_zero_somewhere_has_a_recipe(fitted):
    w = np.array([[e.weights[n] for n in NAMES] for e in recompute(fitted).trajectory])
    assert (w == 0).any(axis=0).all()  # the geometric mean does not exist
    with pytest.raises(InputError, match="geometric mean is 0"):
        aggregate_weights(w)
    for asked in ("geometric", "arithmetic"):
        out = recompute(fitted, aggregate=asked)
        assert out.aggregate == "arithmetic" and len(out.weights_se) == 3
        np.testing.assert_allclose(values(out), w.mean(axis=0))
    stages = recompute(fitted, stages=2).stages
    time = np.array([1, 1, 2, 6, 5, 0]) / 15  # the boundary is 15
    np.testing.assert_allclose([stages[0].weights[n] for n in NAMES], time @ w)
    assert sum(load_weights(save_weights(fitted.with_name("w.json"), out.weights)).values()) == pytest.approx(1)


def test_load_checks_names(run, tmp_path):
    assert list(load_weights(run, NAMES[::-1])) == NAMES[::-1]
    with pytest.raises(InputError, match=r"weights\.json: unknown domain 'Github'; did you mean 'GitHub'"):
        load_weights(run, ["GitHub", "Pile-CC", "Wikipedia (en)"])
    with pytest.raises(InputError, match="'ArXiv' is missing"):
        load_weights(run, [*NAMES, "ArXiv"])
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps({"a": 3, "b": 1}))
    assert load_weights(plain) == {"a": 0.75, "b": 0.25}
    with pytest.raises(InputError, match="fixed, not estimated"):
        recompute(plain)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[1, 2]", InputError, "expected a JSON object"),
        ('{"a": "x"}', InputError, "neither"),
        ('{"a": 1', CorruptError, "not valid JSON"),
        ('{"a": -1, "b": 2}', InputError, "-1"),
        ('{"format": "lldfast-weights", "version": 9, "weights": {"a": 1}}', CorruptError, "version 9"),
        ('{"format": "lldfast-weights", "version": 1, "weights": {}}', InputError, "no weights"),
        ('{"format": "lldfast-weights", "version": 1, "weights": {"a": "x"}}', InputError, "weight of domain 'a' is 'x'"),
    ],
)
def test_bad_files(tmp_path, text, error, message):
    path = tmp_path / "w.json"
    path.write_text(text)
    with pytest.raises(error, match=message):
        load_weights(path)


def test_disclosure_names_the_target():
    assert "'Gemma-2B'" in disclosure("iterative", {"name": "Gemma-2B", "licence": "gemma"})
    assert "not stated" in disclosure("iterative", {"name": "x", "licence": None})
    assert "not estimated from a target" in disclosure(None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(domains=["x", "y", "z"]), "its domains are not those of its weights"),
        (lambda f: f.update(trajectory=[1]), "its trajectory is not a list of estimates"),
        (lambda f: f["trajectory"][1].update(step="x"), "the step 'x'"),
        (lambda f: f["trajectory"].append(f["trajectory"][0]), "the step 0 of its trajectory is not an integer after 20"),
        (lambda f: f["trajectory"][1].pop("delta"), "delta of step 1 does not have its domains"),
        (lambda f: f["trajectory"][1]["weights"].pop("Github"), "weights of step 1 does not have its domains"),
        (lambda f: f["trajectory"][1]["delta"].update(Github=float("nan")), "delta of step 1 is nan for domain 'Github'"),
        (lambda f: f["trajectory"][1].update(gram=[[1.0]]), "gram of step 1"),
        (lambda f: f["trajectory"][1].update(gram=[[1, 2, 3], [1, 2], [3]]), "gram of step 1 does not have a row"),
        (lambda f: f["trajectory"][1].update(gram=[["x"] * 3] * 3), "gram of step 1 does not have a row"),
        (lambda f: f["trajectory"][1].update(gram=[[float("nan")] * 3] * 3), "gram of step 1 has an entry that is not finite"),
        (lambda f: f["trajectory"][1].update(gram_info=[1]), "gram_info of step 1 is not an object"),
        (lambda f: f["trajectory"][1].update(gram_info={"ridge": -1}), "gram_info of step 1 has the ridge -1"),
        (lambda f: f["trajectory"][1].update(gram_info={"ridge": "x"}), "gram_info of step 1 has the ridge 'x'"),
        (lambda f: f["trajectory"][1].update(gram_info={"drift": {"a": 1}}), "a drift that does not have its domains"),
        (
            lambda f: f["trajectory"][1].update(gram_info={"drift": dict.fromkeys(NAMES, float("inf"))}),
            "the drift inf for domain 'Github'",
        ),
        (lambda f: f.pop("total_steps"), "total_steps is None"),
        (lambda f: f.update(total_steps=0), "total_steps is 0"),
        (lambda f: f.update(domains=[1, 2, 3]), "its domains are not a list of names"),
        (lambda f: f.update(stages=5), "its stages is 5, not a list"),
        (lambda f: f.update(target="gpt2"), "its target is 'gpt2', not an object"),
        (lambda f: f.update(rule=["iterative"]), "its rule is .*, not a string"),
    ],
)
def test_damaged_trajectories_are_named(run, change, message):
    file = json.loads(run.read_text())
    change(file)
    run.write_text(json.dumps(file))
    with pytest.raises(CorruptError, match=rf"weights\.json: .*{message}"):
        recompute(run)


def test_rules_of_altered_files(run):
    file = json.loads(run.read_text())
    for change, message in [
        ({"tau": "x"}, "tau must be"),
        ({"prior": [1.0]}, "prior"),
        ({"rule": "x"}, "unknown rule 'x'"),
        ({"radius": 0}, "radius"),
        ({"step_size": None}, "step_size must be a number, got None"),
        ({"floor": [0.1]}, "floor must be a number"),
        ({"ridge": {}}, "ridge must be a number"),
        ({"ridge": float("inf")}, "ridge must be >= 0 and finite"),
        ({"prior": dict.fromkeys(NAMES, "x")}, "prior: expected numbers"),
        ({"prior": dict.fromkeys(NAMES, 0)}, "prior: all weights are zero"),
        ({"rule": "adjusted"}, "needs a Gram matrix at every step, and none is stored at step 0"),
    ]:
        run.write_text(json.dumps({**file, **change}))
        with pytest.raises((InputError, CorruptError), match=rf"weights\.json: .*{message}"):
            recompute(run)


def test_what_is_not_known_is_kept(run):
    """Fields of a person's or of another program's, of the file and of an estimate, survive a save and a recomputation."""
    file = json.loads(run.read_text())
    file["note"] = [1]
    file["trajectory"][1]["note"] = "by hand"
    run.write_text(json.dumps(file))
    for kept in (WeightsFile.load(run).to_json(), recompute(run).to_json()):
        assert kept["note"] == [1] and [entry.get("note") for entry in kept["trajectory"]][:3] == [None, "by hand", None]


def test_options_under_their_python_names_are_not_lost(tmp_path):
    for name, stored in [("gram_scale", "normalise"), ("per", "normalize")]:
        with pytest.raises(InputError, match=rf"w\.json: weights files say '{stored}' for '{name}'"):
            save_weights(tmp_path / "w.json", {"a": 1.0}, **{name: "corr"})


def test_weights_are_saved_by_name_only(tmp_path):
    with pytest.raises(InputError, match=r"w\.json: weights must be .* got list"):
        save_weights(tmp_path / "w.json", [0.5, 0.5])
    with pytest.raises(InputError, match="cannot be written as JSON"):
        save_weights(tmp_path / "w.json", {"a": 1.0}, tau=float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_damaged_replicates_are_named(run):
    path = run.with_name("delta_bootstrap.npz")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"text"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"delta_bootstrap\.npz is not a readable file"):
            recompute(run)
    np.savez(path, steps=np.array(STEPS[1:]), deltas=np.zeros((5, 4, 3)))
    with pytest.raises(CorruptError, match=r"delta_bootstrap\.npz does not have the steps"):
        recompute(run)


def test_replicates_are_taken_by_name(run):
    before = recompute(run).weights_se
    path = run.with_name("delta_bootstrap.npz")
    with np.load(path) as stored:
        steps, deltas = stored["steps"], stored["deltas"]
    back = [2, 0, 1]
    np.savez(path, steps=steps, deltas=deltas[:, :, back], domains=np.array([NAMES[i] for i in back]))
    assert recompute(run).weights_se == before
    np.savez(path, steps=steps, deltas=deltas, domains=np.array(["x", *NAMES[1:]]))
    with pytest.raises(CorruptError, match=r"delta_bootstrap\.npz has the domains \['x'"):
        recompute(run)
    file = json.loads(run.read_text())
    for name in ("../x.npz", "", 3):
        run.write_text(json.dumps({**file, "replicates": name}))
        with pytest.raises(CorruptError, match=r"weights\.json: its replicates are"):
            recompute(run)
