"""The main job end to end on a small corpus: every method, resume after SIGKILL to the bit, replay, and every way to break it."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lldfast.data.making.prepare import prepare
from lldfast.errors import BusyError, InputError, TrainingError
from lldfast.files import folder_lock, read_json
from lldfast.models.language_model import LanguageModel
from lldfast.run.config import Config, GramConfig, LogConfig, MeasureConfig, ModelConfig, TargetConfig, TrainConfig
from lldfast.run.log import read_jsonl
from lldfast.train import run
from lldfast.weights.file import load_weights, save_weights

STEPS = 24
SENTENCES = {
    "code": "def f{i}(x, y):\n    return x * {i} + y  # {j}\n\nfor k in range({j}):\n    print(f{i}(k, {i}))\n",
    "prose": "On day {i} the travellers crossed the river and counted {j} boats; nobody in the village spoke of it. ",
    "table": "{i}\t{j}\t{i}.{j}\t-{j}\n",
}


def documents(domain, n=14):
    for i in range(n):
        yield "".join(SENTENCES[domain].format(i=i * 7 + j, j=j * 3 + i) for j in range(40))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    source = root / "docs.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for domain in SENTENCES:
            for text in documents(domain):
                file.write(json.dumps({"text": text, "meta": {"set": domain}}) + "\n")
    return prepare(
        [str(source)], root / "data", domain_field="meta.set", tokenizer="bytes", eval_per_domain=8, workers=1, progress=False
    )


def config(out, corpus, **changes):
    base = Config(
        out=str(out),
        methods=["uniform"],
        model=ModelConfig(preset="test-tiny"),
        train=TrainConfig(
            steps=STEPS,
            batch_size=4,
            micro_batch_size=2,
            learning_rate=3e-3,
            min_lr=3e-4,
            threads=1,
            checkpoint_every=5,
            device="cpu",
        ),
        measure=MeasureConfig(times=3),
        log=LogConfig(progress=False, report=False, every=1),
    )
    base = dataclasses.replace(
        base, data=dataclasses.replace(base.data, path=str(corpus)), lld=dataclasses.replace(base.lld, bootstrap=20)
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="session")
def target(corpus, tmp_path_factory):
    """A small target trained on known, code-heavy weights."""
    root = tmp_path_factory.mktemp("target")
    weights = save_weights(root / "w.json", {"code": 0.8, "prose": 0.1, "table": 0.1}, rule=None, trajectory=[])
    c = config(root / "run", corpus, methods=["fixed"], seed=99)
    run(dataclasses.replace(c, lld=dataclasses.replace(c.lld, weights=str(weights))))
    return root / "run" / "methods" / "fixed" / "final"


@pytest.fixture(scope="session")
def finished(corpus, target, tmp_path_factory):
    """One run of every kind of method."""
    out = tmp_path_factory.mktemp("run") / "all"
    methods = ["uniform", "proportional", "ground-truth", "aggregated", "two-stage", "mirror-fixed", "spread", "adjusted"]
    c = config(out, corpus, methods=methods, target=TargetConfig(model=str(target)))
    with pytest.MonkeyPatch.context() as patch:  # test_train_distill.py has a report with its figures drawn
        patch.setattr("lldfast.report.figures.to_svg", lambda figure, key, label: "<svg></svg>")
        run(dataclasses.replace(c, log=dataclasses.replace(c.log, report=True)))
    return out


def test_every_method_ends_with_a_row(finished):
    summary = read_json(finished / "summary.json")
    assert [row["method"] for row in summary["rows"]] == [
        "uniform", "proportional", "ground-truth", "iterative", "aggregated", "two-stage", "mirror", "mirror-fixed", "spread",
        "adjusted",
    ]  # fmt: skip
    for row in summary["rows"]:
        assert row["kl"] == pytest.approx(row["kl_between"] + row["kl_within"])
        assert row["true_kl"] > 0 and np.isfinite(row["nll_gap"]) and np.isfinite(row["final_loss"])
    assert summary["rows"][2]["weight_kl"] == pytest.approx(0, abs=1e-9)
    assert summary["base_row"]["true_kl"] > max(row["true_kl"] for row in summary["rows"])
    assert "<html" in (finished / "report.html").read_text(encoding="utf-8").lower()


def test_the_first_pass_stores_what_it_saw(finished):
    file = read_json(finished / "methods" / "iterative" / "weights.json")
    assert [entry["step"] for entry in file["trajectory"]] == sorted({entry["step"] for entry in file["trajectory"]})
    for entry in file["trajectory"]:
        d = np.array([entry["delta"][name] for name in file["domains"]])
        w = np.exp(d - d.max())
        np.testing.assert_allclose([entry["weights"][name] for name in file["domains"]], w / w.sum(), rtol=1e-9)
        assert all(value > 0 for value in entry["delta_se"].values())
    mean = np.mean([[e["delta"][n] for n in file["domains"]] for e in file["trajectory"]], axis=0)
    closed = np.exp(mean - mean.max())
    np.testing.assert_allclose([file["weights"][n] for n in file["domains"]], closed / closed.sum(), rtol=1e-9)
    assert file["target"]["name"] and "target" in file["disclosure"] and file["corpus_hash"] and file["seed"] == 0
    adjusted = read_json(finished / "methods" / "adjusted" / "weights.json")
    gram = np.array(adjusted["trajectory"][0]["gram"])
    np.testing.assert_allclose(gram, gram.T)
    assert gram.shape == (3, 3) and (gram.diagonal() > 0).all()


def test_pass_2_trains_on_the_recipe_of_pass_1(finished):
    recipe = load_weights(finished / "methods" / "iterative" / "weights.json")
    for record in read_jsonl(finished / "methods" / "aggregated" / "log.jsonl"):
        assert record["weights"] == pytest.approx(recipe)
    stages = read_json(finished / "methods" / "two-stage" / "weights.json")["stages"]
    log = read_jsonl(finished / "methods" / "two-stage" / "log.jsonl")
    assert stages[0]["from_step"] == 0 and stages[1]["from_step"] == STEPS // 2
    assert log[STEPS // 2 - 1]["weights"] == pytest.approx(stages[0]["weights"])
    assert log[STEPS // 2]["weights"] == pytest.approx(stages[1]["weights"])
    # the errors of pass 1's one recipe are not those of a stage
    errors = [
        read_json(finished / "methods" / m / "weights.json")["weights_se"] for m in ("iterative", "aggregated", "two-stage")
    ]
    assert errors[0] == errors[1] != {} and errors[2] is None


def test_same_seed_same_start_same_order(finished):
    """Methods differ in their weights only: at step 0 iterative's base is uniform's base."""
    first = [read_jsonl(finished / "methods" / m / "metrics.jsonl")[0] for m in ("uniform", "iterative", "mirror")]
    assert first[0]["kl"] == first[1]["kl"] == first[2]["kl"]
    a, b = (read_jsonl(finished / "methods" / m / "log.jsonl") for m in ("uniform", "mirror"))
    assert a[0]["loss"] == b[0]["loss"]  # mirror's first weights are uniform


def test_a_finished_run_is_kept(finished, corpus, target, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.glob("methods/*/result.json")}
    run(config(finished, corpus, methods=["uniform", "mirror"], target=TargetConfig(model=str(target))))
    assert {p: p.stat().st_mtime_ns for p in finished.glob("methods/*/result.json")} == before
    assert "finished earlier" in capsys.readouterr().err
    assert len(read_json(finished / "summary.json")["rows"]) == 10  # methods of an earlier call stay in the answer


def test_offline_weights_of_a_run(finished, capsys):
    from lldfast.__main__ import main

    assert main(["weights", str(finished), "--method", "iterative", "--tau", "0.1"]) == 0
    assert "tau 0.1" in capsys.readouterr().out
    assert main(["weights", str(finished)]) == 1
    assert "--method" in capsys.readouterr().err
    assert main(["weights", str(finished), "--method", "adjusted", "--rule", "adjusted", "--out", str(finished / "w.json")]) == 0
    assert load_weights(finished / "w.json")


@pytest.mark.parametrize("steps", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_rules_on_a_sketched_preconditioned_gram(steps, corpus, target, tmp_path, capsys):
    """From the command's options to the report: sketches of AdamW-preconditioned rows, a fit with zeros, both kinds of pass 2."""
    from lldfast.__main__ import main

    methods = ["adjusted-trust", "adjusted-fit-aggregated", "adjusted-fit-two-stage"][: 2 if steps == 2 else 3]
    c = config(tmp_path / "run", corpus, methods=methods, target=TargetConfig(model=str(target)))
    c.gram = GramConfig(mode="fold", k=4096, precondition="adamw", groups=4)
    c.lld = dataclasses.replace(c.lld, radius=0.02, gram_scale="corr")
    c.log.report = steps > 2
    c.train.steps = steps
    run(c)
    said = capsys.readouterr().err
    file = read_json(tmp_path / "run" / "methods" / "adjusted-trust" / "weights.json")
    for entry in file["trajectory"]:
        w = np.array(list(entry["weights"].values()))
        assert (w * np.log(3 * w)).sum() == pytest.approx(0.02, rel=1e-4)
        info = entry["gram_info"]
        assert (info["mode"], info["k"]) == ("fold", 4096) and 0 < info["expected_error"] < 1 and info["ridge_used"] >= 0
        assert set(info["drift"]) == set(info["weights_se"]) == set(SENTENCES) and max(info["weights_se"].values()) > 0
        assert said.count(f"[adjusted-trust] G at step {entry['step']}: fold k 4,096, expected error of v") == 1
    assert (file["radius"], file["normalise"], file["aggregate"]) == (0.02, "corr", "geometric")

    fit = read_json(tmp_path / "run" / "methods" / "adjusted-fit" / "weights.json")
    w = np.array([[entry["weights"][name] for name in fit["domains"]] for entry in fit["trajectory"]])
    assert fit["aggregate"] == "arithmetic" and list(fit["weights"].values()) == pytest.approx(w.mean(axis=0).tolist())
    assert all(np.isfinite(value) for value in fit["weights_se"].values())
    log = read_jsonl(tmp_path / "run" / "methods" / "adjusted-fit-aggregated" / "log.jsonl")
    assert all(record["weights"] == pytest.approx(fit["weights"]) for record in log)
    if steps > 2:
        stages = read_json(tmp_path / "run" / "methods" / "adjusted-fit-two-stage" / "weights.json")["stages"]
        assert [stage["from_step"] for stage in stages] == [0, 4]
        report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        assert "Estimated in mode fold with 4,096 numbers a row" in report

    offline = tmp_path / "w.json"  # the same estimates, with the ridges and drifts that were stored
    assert main(["weights", str(tmp_path / "run"), "--method", "adjusted-fit", "--out", str(offline)]) == 0
    assert load_weights(offline) == pytest.approx(fit["weights"], abs=1e-12)
    assert main(["weights", str(tmp_path / "run"), "--method", "adjusted-trust", "--rule", "adjusted-fit"]) == 0


def test_a_run_of_an_earlier_version_goes_on(corpus, target, tmp_path):
    """Its config.yaml has no section "gram" and not every option of a rule: what it used is what are defaults now."""
    c = config(tmp_path / "run", corpus, target=TargetConfig(model=str(target)))
    c.train.steps = 6
    run(c)
    path = tmp_path / "run" / "config.yaml"
    old = yaml.safe_load(path.read_text())
    del old["gram"], old["lld"]["radius"], old["lld"]["fit_step"]
    path.write_text(yaml.safe_dump(old))
    other = dataclasses.replace(c, methods=["uniform", "spread"], gram=GramConfig(mode="exact"))
    with pytest.raises(InputError, match=r"gram\.mode = 'auto', now it is 'exact'"):
        run(other)
    path.write_text(yaml.safe_dump(old))
    run(dataclasses.replace(c, methods=["uniform", "spread"]))
    assert (tmp_path / "run" / "methods" / "spread" / "result.json").exists()
    assert yaml.safe_load(path.read_text())["gram"]["mode"] == "auto"


CHILD = """
import dataclasses, json, sys
from lldfast.run.config import *
from lldfast.train import run
spec = json.loads(sys.argv[1])
run(Config(
    out=spec["out"], methods=spec["methods"], data=DataConfig(path=spec["data"]), model=ModelConfig(preset="test-tiny"),
    target=TargetConfig(model=spec["target"]), lld=LLDConfig(bootstrap=20),
    train=TrainConfig(
        steps=24, batch_size=4, micro_batch_size=2, learning_rate=3e-3, min_lr=3e-4, threads=1, checkpoint_every=5, device="cpu"
    ),
    measure=MeasureConfig(times=3), log=LogConfig(progress=False, report=False, every=1),
))
"""


@pytest.mark.parametrize(
    "method,kills",
    [("mirror", [12]), *(pytest.param(m, [7, 16], marks=pytest.mark.slow) for m in ("iterative", "mirror", "adjusted"))],
)
def test_sigkill_and_resume_give_the_same_bits(method, kills, finished, corpus, target, tmp_path):
    """Killed at arbitrary moments, the run ends with the weights, losses and mixture states of one never killed."""
    spec = json.dumps({"out": str(tmp_path / "run"), "methods": [method], "data": str(corpus), "target": str(target)})
    log = tmp_path / "run" / "methods" / method / "log.jsonl"
    for kill_after in kills:
        child = subprocess.Popen([sys.executable, "-c", CHILD, spec], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= kill_after:
                break
            time.sleep(0.002)
        assert child.poll() is None, child.stderr.read().decode()
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stderr.close()
    done = subprocess.run([sys.executable, "-c", CHILD, spec], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    ours, theirs = tmp_path / "run" / "methods" / method, finished / "methods" / method
    a, b = load_file(ours / "final" / "model.safetensors"), load_file(theirs / "final" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    keep = ("step", "loss", "grad_norm", "weights", "loss_by_domain")
    trim = [[{k: r[k] for k in keep} for r in read_jsonl(p / "log.jsonl")] for p in (ours, theirs)]
    assert trim[0] == trim[1] and len(trim[0]) == STEPS
    assert read_json(ours / "weights.json")["trajectory"] == read_json(theirs / "weights.json")["trajectory"]
    assert read_jsonl(ours / "metrics.jsonl") == read_jsonl(theirs / "metrics.jsonl")
    assert not (ours / "checkpoints").exists()


def test_an_interrupted_run_keeps_its_finished_methods(corpus, target, tmp_path):
    c = config(tmp_path / "run", corpus, target=TargetConfig(model=str(target)))
    run(c)
    result = (tmp_path / "run" / "methods" / "uniform" / "result.json").read_bytes()
    bad = save_weights(tmp_path / "w.json", {"code": 0.5, "porse": 0.5}, rule=None, trajectory=[])
    # lld.weights is part of what makes runs comparable, so a second folder
    with pytest.raises(InputError, match="another --out"):
        run(dataclasses.replace(c, methods=["uniform", "fixed"], lld=dataclasses.replace(c.lld, weights=str(bad))))
    assert (tmp_path / "run" / "methods" / "uniform" / "result.json").read_bytes() == result


def test_unknown_domain_in_a_weights_file(corpus, tmp_path):
    weights = save_weights(tmp_path / "w.json", {"code": 0.5, "porse": 0.25, "table": 0.25}, rule=None, trajectory=[])
    c = config(tmp_path / "run", corpus, methods=["fixed"])
    with pytest.raises(InputError, match=r"w\.json: unknown domain 'porse'; did you mean 'prose'"):
        run(dataclasses.replace(c, lld=dataclasses.replace(c.lld, weights=str(weights))))


def test_nan_loss_names_step_and_domain_and_keeps_the_checkpoint(corpus, target, tmp_path, monkeypatch):
    import lldfast.distill.objective as objective

    real, calls = objective.linear_cross_entropy, []

    def poisoned(*args, **options):
        calls.append(1)
        loss, logprob = real(*args, **options)
        if len(calls) == 2 * 12 + 1:  # the first micro-batch of step 12
            logprob = logprob.clone()
            logprob[0] = float("nan")
            loss = loss * float("nan")
        return loss, logprob

    monkeypatch.setattr(objective, "linear_cross_entropy", poisoned)
    with pytest.raises(TrainingError, match=r"'uniform', step 12: the loss is not finite on (code|prose|table); .*step-0000010"):
        run(config(tmp_path / "run", corpus, target=TargetConfig(model=str(target))))
    monkeypatch.undo()
    assert all(
        bool(torch.isfinite(v).all())
        for v in load_file(tmp_path / "run/methods/uniform/checkpoints/step-0000010/model.safetensors").values()
    )
    run(config(tmp_path / "run", corpus, target=TargetConfig(model=str(target))))
    assert (tmp_path / "run" / "methods" / "uniform" / "result.json").exists()


def test_two_writers_and_two_configurations(corpus, tmp_path):
    c = config(tmp_path / "run", corpus)
    with folder_lock(tmp_path / "run"):
        script = CHILD.replace('TargetConfig(model=spec["target"])', "TargetConfig()")
        spec = json.dumps({"out": str(tmp_path / "run"), "methods": ["uniform"], "data": str(corpus)})
        done = subprocess.run([sys.executable, "-c", script, spec], capture_output=True, text=True, timeout=120)
        assert BusyError.__name__ in done.stderr and f"pid {os.getpid()}" in done.stderr
    run(c)
    with pytest.raises(InputError, match=r"train\.steps = 24, now it is 25"):
        run(dataclasses.replace(c, train=dataclasses.replace(c.train, steps=25)))


def test_tokenizer_of_shards_and_model_differ(corpus, target, tmp_path):
    c = config(tmp_path / "run", corpus, model=ModelConfig(preset="test-tiny", init=str(target)))
    about = json.loads((target / "model.json").read_text())
    about["tokenizer"]["hash"] = "0" * 16
    about["tokenizer"]["name"] = "another-bpe"
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((target / "model.safetensors").read_bytes())
    (other / "model.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="another-bpe"):
        run(dataclasses.replace(c, model=dataclasses.replace(c.model, init=str(other))))
    run(c)  # the same tokenizer is fine: continued pretraining


def test_a_prior_is_aligned_by_name_whatever_the_order_of_the_evaluation_texts(corpus, target, tmp_path):
    from lldfast.data.evalset import EvalSet
    from lldfast.run.experiment import Experiment
    from lldfast.run.methods import parse_method
    from lldfast.run.plan import make_plan

    folder = tmp_path / "data"
    shutil.copytree(corpus, folder)
    e = EvalSet.load(folder / "eval.parquet")
    back = np.arange(len(e))[::-1]
    EvalSet([e.texts[i] for i in back], e.domain[back], e.part[back], e.document[back]).save(folder / "eval.parquet")
    c = config(tmp_path / "run", folder, methods=["iterative"], target=TargetConfig(model=str(target)))
    c = dataclasses.replace(c, lld=dataclasses.replace(c.lld, prior="proportional", tau=1e9))
    exp = Experiment.open(c)
    controller = make_plan(exp, parse_method("iterative")).controller
    assert controller.domains == exp.domains[::-1]
    weights = controller.step(0, LanguageModel.from_gpt(exp.new_model(), exp.tokenizer))
    assert weights == pytest.approx(exp.shards.proportions(), rel=1e-6)


def test_a_base_to_continue_from_brings_its_own_shape(corpus, target, tmp_path):
    from lldfast.run.experiment import Experiment

    c = config(tmp_path / "run", corpus, model=ModelConfig(preset="demo-330k", init=str(target)))
    exp = Experiment.open(c)
    assert exp.new_model().config == exp.model_config() and exp.tokens_per_step == 4 * 64
    assert exp.base_identity["hash"] == json.loads((target / "model.json").read_text())["sha256"]


def test_a_ground_truth_with_a_zero_has_no_finite_weight_kl(corpus, target, tmp_path):
    truth = save_weights(tmp_path / "truth.json", {"code": 1.0, "prose": 0.0, "table": 0.0}, rule=None, trajectory=[])
    c = config(tmp_path / "run", corpus, target=TargetConfig(model=str(target), weights=str(truth)))
    run(dataclasses.replace(c, train=dataclasses.replace(c.train, steps=2)))
    assert [r["weight_kl"] for r in read_jsonl(tmp_path / "run/methods/uniform/metrics.jsonl")] == [None] * 3


def test_a_domain_without_evaluation_texts(corpus, target, tmp_path):
    from lldfast.data.evalset import EvalSet

    folder = tmp_path / "data"
    shutil.copytree(corpus, folder)
    EvalSet.load(folder / "eval.parquet").select(domains=["code", "prose"]).save(folder / "eval.parquet")
    with pytest.raises(InputError, match="'table' has no evaluation texts"):
        run(config(tmp_path / "run", folder, target=TargetConfig(model=str(target))))


def test_disk_full_while_checkpointing_keeps_the_last_one(corpus, tmp_path, monkeypatch):
    import errno

    import lldfast.run.checkpoint as checkpoint
    from lldfast.errors import WriteError

    real = checkpoint.save_file

    def full(tensors, path, *args, **options):
        if "step-0000015" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(tensors, path, *args, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(WriteError, match=r"step-0000015.*No space left"):
        run(config(tmp_path / "run", corpus))
    folder = tmp_path / "run" / "methods" / "uniform" / "checkpoints"
    assert [p.name for p in sorted(folder.iterdir())] == ["step-0000005", "step-0000010"]
    monkeypatch.undo()
    run(config(tmp_path / "run", corpus))
    assert (tmp_path / "run" / "methods" / "uniform" / "result.json").exists()


def test_draw_modes_and_accumulation_run(corpus, tmp_path):
    for draw in ("micro_batch", "step"):
        c = config(tmp_path / draw, corpus)
        run(dataclasses.replace(c, train=dataclasses.replace(c.train, draw=draw, steps=4)))
        log = read_jsonl(tmp_path / draw / "methods" / "uniform" / "log.jsonl")
        assert all(len(r["loss_by_domain"]) <= (1 if draw == "step" else 2) for r in log)


def test_wrong_weights_are_told_before_anything_is_trained(corpus, target, finished, tmp_path):
    """Of a list of methods the last must not fail after hours of the first."""
    base = config(tmp_path / "run", corpus, target=TargetConfig(model=str(target)))
    few = save_weights(tmp_path / "w.json", {"code": 1.0}, rule=None, trajectory=[])
    others = tmp_path / "others.json"
    text = (finished / "methods" / "iterative" / "weights.json").read_text()
    others.write_text(text.replace('"prose"', '"poems"'))
    for methods, lld, message in [
        (["uniform", "fixed"], {"weights": str(few)}, r"w\.json: domain 'prose' is missing"),
        (["uniform", "fixed"], {"weights": str(tmp_path / "none.json")}, r"none\.json: no such file"),
        (["uniform", "iterative"], {"floor": 0.5}, r"floor must lie in \[0, 1/K\]"),
        (["uniform", "iterative"], {"prior": str(few)}, r"w\.json: domain 'prose' is missing"),
        (["uniform", "aggregated"], {"pass1": str(others)}, r"others\.json: unknown domain 'poems'"),
        (["uniform", "two-stage"], {"pass1": str(others)}, r"others\.json: unknown domain 'poems'"),
    ]:
        c = dataclasses.replace(base, methods=methods, lld=dataclasses.replace(base.lld, **lld))
        with pytest.raises(InputError, match=message):
            run(c)
        assert not (tmp_path / "run" / "methods").exists()


def test_one_domain_and_one_step(tmp_path, target):
    """The smallest run there is: K = 1, through both passes and every rule."""
    source = tmp_path / "docs.jsonl"
    source.write_text("".join(json.dumps({"text": text, "domain": "code"}) + "\n" for text in documents("code")))
    data = prepare([str(source)], tmp_path / "data", tokenizer="bytes", eval_per_domain=2, workers=1, progress=False)
    methods = ["aggregated", "mirror-fixed", "spread", "adjusted", "adjusted-spread", "adjusted-trust", "adjusted-fit"]
    c = config(tmp_path / "run", data, methods=methods, target=TargetConfig(model=str(target)))
    run(dataclasses.replace(c, train=dataclasses.replace(c.train, steps=1)))
    rows = read_json(tmp_path / "run" / "summary.json")["rows"]
    assert len(rows) == 9 and all(row["effective_domains"] == pytest.approx(1) for row in rows)


def test_true_kl_does_not_depend_on_the_targets_first_token_rule(corpus, target, tmp_path):
    found = []
    for bos in ("auto", "none"):
        c = config(tmp_path / bos, corpus, target=TargetConfig(model=str(target), bos=bos))
        c.train.steps = 4
        run(c)
        found.append(read_json(tmp_path / bos / "summary.json")["rows"][0])
    assert found[0]["true_kl"] == found[1]["true_kl"] and found[0]["nll_gap"] != found[1]["nll_gap"]
