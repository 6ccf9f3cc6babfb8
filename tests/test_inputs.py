"""A run folder takes the inputs that its results were made from, and no others: what a path holds may have been replaced."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from lldfast.data.making.prepare import prepare
from lldfast.data.shards import TokenShards
from lldfast.data.tokenizer import load_tokenizer, train_bpe
from lldfast.distill.teach import teach
from lldfast.errors import CorruptError, InputError
from lldfast.files import read_json, write_json
from lldfast.measure.loglik import LoglikVector
from lldfast.models.gpt import GPT
from lldfast.run.config import Config, DistillConfig, LLDConfig, LogConfig, ModelConfig, TargetConfig, TrainConfig
from lldfast.run.experiment import Experiment
from lldfast.train import run
from lldfast.weights.file import Estimate, WeightsFile, save_weights

BYTES = load_tokenizer("bytes")


def make_data(folder, word):
    """Documents of two domains, of the same sizes whatever the word of five letters is."""
    source = folder.with_suffix(".jsonl")
    rows = [{"text": f"{word} {i} {domain} " * 30, "domain": domain} for i in range(8) for domain in ("a", "b")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(folder, ignore_errors=True)
    return prepare([str(source)], folder, tokenizer="bytes", eval_per_domain=2, workers=1, progress=False)


def save_gpt(folder, seed, tokenizer=BYTES):
    GPT("test-tiny", seed=seed).save(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of one step, and everything that its configuration names."""
    root = tmp_path_factory.mktemp("inputs")
    save_weights(root / "truth.json", {"a": 0.5, "b": 0.5})
    save_weights(root / "fixed.json", {"a": 0.25, "b": 0.75})
    save_weights(root / "prior.json", {"a": 0.5, "b": 0.5})
    estimate = Estimate(0, {"a": 0.0, "b": 0.0}, {"a": 0.5, "b": 0.5})
    WeightsFile({"a": 0.5, "b": 0.5}, trajectory=[estimate], rule="iterative", total_steps=2).save(root / "pass1.json")
    config = Config(
        out=str(root / "run"),
        methods=["uniform"],
        model=ModelConfig(preset="test-tiny", init=str(save_gpt(root / "base", 1))),
        target=TargetConfig(model=str(save_gpt(root / "target", 2)), weights=str(root / "truth.json")),
        lld=LLDConfig(
            weights=str(root / "fixed.json"), prior=str(root / "prior.json"), pass1=str(root / "pass1.json"), bootstrap=0
        ),
        train=TrainConfig(steps=1, batch_size=1, micro_batch_size=1, device="cpu"),
        log=LogConfig(progress=False, report=False),
    )
    config.data.path = str(make_data(root / "data", "river"))
    run(config)
    return root, config


@pytest.fixture
def again(made, tmp_path):
    """A copy of the run and of its inputs, whose configuration is the same."""
    root, config = made
    kept = tmp_path / "kept"
    shutil.copytree(root, kept)
    yield root, config
    shutil.rmtree(root)
    shutil.copytree(kept, root)


def test_equal_inputs_go_on(again):
    root, config = again
    kept = read_json(root / "run" / "experiment.json")["inputs"]
    assert kept.keys() == {"corpus", "evalset", "base", "target", "target.weights", "lld.weights", "lld.prior", "lld.pass1"}
    save_gpt(root / "target", 2)
    save_weights(root / "fixed.json", {"b": 3.0, "a": 1.0}, seed=3)  # the same mixture, said in another way
    make_data(root / "data", "river")
    assert Experiment.open(config).inputs == kept
    run(dataclasses.replace(config, methods=["uniform", "fixed"]))
    assert read_json(root / "run" / "experiment.json")["inputs"] == kept


REPLACED = {
    "on the data": lambda root: make_data(root / "data", "stone"),
    "from the base": lambda root: save_gpt(root / "base", 7),
    "beside the target's mixture": lambda root: save_weights(root / "truth.json", {"a": 0.4, "b": 0.6}),
    "on the weights": lambda root: save_weights(root / "fixed.json", {"a": 0.4, "b": 0.6}),
    "with the prior": lambda root: save_weights(root / "prior.json", {"a": 0.4, "b": 0.6}),
}


@pytest.mark.parametrize("phrase", REPLACED)
def test_what_was_replaced_is_named(again, phrase):
    root, config = again
    if phrase == "on the data":  # the same evaluation texts, so that the target's scores are of them
        kept = (root / "data" / "eval.parquet").read_bytes()
        REPLACED[phrase](root)
        (root / "data" / "eval.parquet").write_bytes(kept)
    else:
        REPLACED[phrase](root)
    before = {path: path.read_bytes() for path in (root / "run").rglob("*.json")}
    with pytest.raises(InputError, match=rf"run was trained {phrase} \(.*\) whose hash .* it was replaced.*another --out"):
        run(config)
    assert {path: path.read_bytes() for path in (root / "run").rglob("*.json")} == before
    shutil.rmtree(root / "run" / "methods")  # nothing that was trained: nothing to mix
    if phrase != "on the data":
        Experiment.open(config)


def test_a_recipe_whose_trajectory_changed(again):
    root, config = again
    file = read_json(root / "pass1.json")
    file["trajectory"][0]["weights"] = {"a": 0.6, "b": 0.4}
    write_json(root / "pass1.json", file)
    with pytest.raises(InputError, match=r"on the recipe \(lld\.pass1\)"):
        run(config)


def other_tokenizer(root):
    save_gpt(root / "target", 2, train_bpe(["river stone"], 257))


def scored_in_bf16(root):
    path = root / "run" / "target.parquet"
    vector = LoglikVector.load(path)
    vector.meta["amp_dtype"] = "bfloat16"
    vector.save(path)


TARGETS = {
    "its hash": lambda root: save_gpt(root / "target", 8),
    "its tokenizer's hash": other_tokenizer,
    "amp_dtype": scored_in_bf16,
}


@pytest.mark.parametrize("what", TARGETS)
def test_a_part_of_the_target_was_replaced(again, what):
    root, config = again
    shutil.rmtree(root / "run" / "methods")  # its scores alone are there
    TARGETS[what](root)
    with pytest.raises(InputError, match=rf"target\.parquet was scored with another target or other texts: {what} was"):
        run(config)
    (root / "run" / "target.parquet").unlink()
    if what != "its tokenizer's hash":
        Experiment.open(config)  # scored anew


def test_the_targets_scores_are_gone_and_the_target_is_another(again):
    root, config = again
    (root / "run" / "target.parquet").unlink()
    save_gpt(root / "target", 8)
    with pytest.raises(InputError, match=r"run was trained toward the target \(target\.model\)"):
        run(config)


def test_a_run_of_before_inputs_were_kept(again):
    root, config = again
    path = root / "run" / "experiment.json"
    old = read_json(path)
    del old["inputs"]
    write_json(path, old)
    Experiment.open(config)
    kept = (root / "data" / "eval.parquet").read_bytes()
    make_data(root / "data", "stone")
    (root / "data" / "eval.parquet").write_bytes(kept)
    with pytest.raises(InputError, match="was trained on the data"):
        run(config)
    write_json(path, old | {"corpus": None})
    with pytest.raises(CorruptError, match=r"experiment\.json"):
        run(config)


def test_a_recorded_teacher_was_replaced(made, tmp_path):
    root, config = made
    make = {"k": 4, "block_size": 64, "max_windows": 4, "device": "cpu", "progress": False}
    cache = tmp_path / "cache"
    teach(str(root / "target"), root / "data", cache, **make)
    shards = TokenShards(root / "data")
    with pytest.raises(InputError, match="teacher hash"):  # not taken for the cache of another teacher
        teach(str(root / "base"), shards, cache, **make)
    config = dataclasses.replace(config, out=str(tmp_path / "run"), methods=["distill"], distill=DistillConfig(cache=str(cache)))
    run(config)
    inputs = read_json(tmp_path / "run" / "experiment.json")["inputs"]
    assert "top 4" in inputs["teacher"]
    shutil.rmtree(cache)
    teach(str(root / "target"), shards, cache, **{**make, "max_windows": 3})
    with pytest.raises(InputError, match="was trained against the teacher"):
        run(dataclasses.replace(config, methods=["distill", "distill+ce"]))
    run(config)  # finished, and its teacher is not needed any more
    assert read_json(tmp_path / "run" / "experiment.json")["inputs"] == inputs


def test_how_target_and_base_are_scored_is_told_once(made, tmp_path, capsys):
    """A far target is told of and recorded; one below the noise floor is refused, unless the configuration allows it."""
    root, config = made
    target = TargetConfig(model=str(root / "target"), bos="none")
    config = dataclasses.replace(config, out=str(tmp_path / "run"), methods=["uniform", "proportional"], target=target)
    near = "were not scored alike: the first has nothing before every text, the second token 256. For that alone eq"
    with pytest.raises(InputError, match=near):
        run(config)
    capsys.readouterr()
    config.measure = dataclasses.replace(config.measure, allow_differences=True)
    run(config)  # in the same folder
    said = capsys.readouterr()
    assert said.err.count(near) == 1
    for name in config.methods:
        conditions = read_json(tmp_path / "run" / "methods" / name / "result.json")["conditions"]
        assert [(row["what"], row["floor"]) for row in conditions] == [("first token", 35.0)]
    warnings = read_json(tmp_path / "run" / "summary.json")["warnings"]
    assert sum("not scored alike" in line and "35 nats per text" in line for line in warnings) == 1
    assert "conditions" not in read_json(root / "run" / "methods" / "uniform" / "result.json")
    assert np.isfinite(read_json(tmp_path / "run" / "methods" / "uniform" / "result.json")["kl"])
