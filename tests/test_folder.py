"""The run folder: what is finished, and the guard against mixing two runs."""

import dataclasses

import pytest

from lldfast.errors import InputError
from lldfast.files import write_json
from lldfast.run.config import Config
from lldfast.run.folder import RunFolder


def made(tmp_path):
    folder, config = RunFolder(tmp_path / "run"), Config(out=str(tmp_path / "run"))
    folder.write_config(config)
    write_json(folder.experiment, {"methods": ["uniform", "mirror"]})
    return folder, config


def test_paths_are_those_of_the_documented_format(tmp_path):
    folder = RunFolder(tmp_path)
    method = folder.method("mirror-fixed")
    assert method.name == "mirror-fixed" and method.loglik(12) == tmp_path / "methods/mirror-fixed/loglik/step-000012.parquet"
    assert {p.name for p in (method.weights, method.replicates, method.log, method.metrics, method.result)} == {
        "weights.json", "delta_bootstrap.npz", "log.jsonl", "metrics.jsonl", "result.json",
    }  # fmt: skip
    assert folder.target_run.method("fixed").final == tmp_path / "target-run/methods/fixed/final"


def test_finished_methods_stay(tmp_path):
    folder, _ = made(tmp_path)
    assert folder.with_finished(["spread"]) == ["spread"]
    write_json(folder.method("mirror").result, {})
    assert folder.with_finished(["spread"]) == ["mirror", "spread"] and folder.with_finished(["mirror"]) == ["mirror"]
    assert [m.name for m in folder.methods()] == ["mirror"] and folder.methods()[0].finished


def test_another_configuration_is_refused_once_there_are_results(tmp_path):
    folder, config = made(tmp_path)
    other = dataclasses.replace(config, seed=1)
    folder.check_same(other)  # nothing is there yet
    folder.target.touch()
    folder.check_same(other)  # the target's scores do not depend on the seed
    with pytest.raises(InputError, match=r"was made with data\.seed = 0, now it is 3: use another --out"):
        folder.check_same(dataclasses.replace(config, data=dataclasses.replace(config.data, seed=3)))
    write_json(folder.method("mirror").result, {})
    with pytest.raises(InputError, match="was made with seed = 0, now it is 1"):
        folder.check_same(other)
    folder.check_same(dataclasses.replace(config, methods=["spread"], log=dataclasses.replace(config.log, every=7)))
