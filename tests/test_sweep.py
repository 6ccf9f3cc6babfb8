"""One causal-LM class of each kind against plain fp64 loops (bench/sweep_models.py does it for every class)."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import sweep_cases
import sweep_models
from sweep_cases import Subject, cases
from tiny_models import KINDS, Kind, build

BY_NAME = {kind.name: kind for kind in KINDS}


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    sweep_models.silence()


@pytest.mark.parametrize("name", ["llama", "falcon_h1", "bert"])
def test_scores_of_a_few_kinds(name):
    found = list(cases(BY_NAME[name].build, ("score",), ("fp32",), ("zero", "replaced")))
    assert {case.outcome for case in found} == {BY_NAME[name].expected}, found


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_no_number_of_a_kind_is_wrong(name):
    kind = BY_NAME[name]
    found = list(cases(kind.build))
    for dtype in sweep_cases.DTYPES:
        outcomes = {case.outcome for case in found if case.dtype == dtype}
        assert outcomes == {kind.expected if dtype in kind.dtypes else "refused"}, found
    assert kind.expected == "refused" or {case.part for case in found} >= set(sweep_cases.PARTS)


def test_what_is_off_is_called_wrong(monkeypatch):
    """By more than the floor, in one text."""
    score = sweep_cases.lldfast.score

    def off(*args, **options):
        found = score(*args, **options)
        found.logprob[3] += shift
        return found

    monkeypatch.setattr(sweep_cases.lldfast, "score", off)
    for shift, outcome in ((0.01, "WRONG"), (np.nan, "WRONG"), (1e-3, "right")):
        found = list(cases(BY_NAME["llama"].build, ("score",), ("fp32",), ("zero",)))
        assert [case.outcome for case in found] == [outcome] * 2, shift


def test_an_error_that_is_not_ours_is_a_crash(monkeypatch):
    def broken(*args, **options):
        raise KeyError("weight")

    monkeypatch.setattr(sweep_cases.lldfast, "true_kl", broken)
    (found,) = cases(BY_NAME["llama"].build, ("kl",), ("fp32",), ("as made",))
    assert found.outcome == "CRASH" and "KeyError" in found.note and "test_sweep.py" in found.note


def test_models_that_have_no_log_likelihood():
    assert Subject(build("llama")).unfit == ""
    assert "not causal" in Subject(build("bert")).unfit
    assert "two equal calls" in Subject(build("reformer")).unfit


@pytest.mark.parametrize("end, why", [(lambda: os._exit(3), "died with 3"), (lambda: time.sleep(60), "still running after 0.5")])
def test_a_class_that_dies_or_hangs_does_not_end_the_sweep(monkeypatch, end, why):
    monkeypatch.setattr(sweep_models, "cases", lambda *_: end())
    monkeypatch.setattr(Kind, "build", lambda self, seed=0: torch.nn.Identity())
    (found,) = sweep_models.judged(Kind("llama"), ("score",), ("fp32",), ("as made",), limit=0.5)
    assert found["outcome"] == "CRASH" and why in found["note"]
    assert sweep_models.status([found]) == 1 and "CRASH" in sweep_models.tables([found])
