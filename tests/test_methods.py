"""Method names, and the settings of the distilled ones."""

from __future__ import annotations

import pytest

from lldfast.errors import InputError
from lldfast.run.distill import DistillConfig
from lldfast.run.methods import LOSSES, parse_method
from lldfast.run.parsing import parse_config


@pytest.mark.parametrize(
    ("name", "mixture", "preset", "ce", "objective"),
    [
        ("uniform", "uniform", None, True, "ce"),
        ("aggregated", "aggregated", None, True, "ce"),
        ("distill", "uniform", None, False, "distill"),
        ("distill+ce", "uniform", None, True, "distill+ce"),
        ("distill-amid", "uniform", "amid", False, "distill"),
        ("mirror-fixed+distill-skl+ce", "mirror-fixed", "skl", True, "distill+ce"),
        ("adjusted-two-stage+distill", "adjusted-two-stage", None, False, "distill"),
        ("ground-truth+distill-kl", "ground-truth", "kl", False, "distill"),
    ],
)
def test_parse(name, mixture, preset, ce, objective):
    method = parse_method(name)
    assert (method.name, method.mixture, method.preset, method.ce, method.objective) == (name, mixture, preset, ce, objective)
    plain = parse_method(mixture)
    assert (method.rule, method.passes, method.stages) == (plain.rule, plain.passes, plain.stages)


@pytest.mark.parametrize(
    "name", ["distil", "distill+", "distill-kl+ce+ce", "distill-none", "distill-kl+ce-", "no+distill", "+distill", "ce"]
)
def test_unknown_names(name):
    with pytest.raises(InputError, match="unknown method"):
        parse_method(name)


def test_a_method_chooses_its_preset_and_the_configuration_the_rest():
    config = DistillConfig(preset="skl", lam=0.3, ce_weight=0.5)
    assert config.loss(parse_method("distill"))["preset"] == "skl"
    loss = config.loss(parse_method("distill-amid+ce"))
    assert (loss["preset"], loss["lam"], loss["ce_weight"], loss["alpha"]) == ("amid", 0.3, 0.5, None)
    assert config.loss(parse_method("distill"))["ce_weight"] == 0


def test_lam_moves_to_its_end():
    config = DistillConfig(preset="taid", lam=0.2, lam_end=1.0)
    at = [config.loss(parse_method("distill"), step, 5)["lam"] for step in range(5)]
    assert at == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    jsd = DistillConfig(preset="jsd", lam_end=0.9)  # its own lam is its beta, 0.5
    assert jsd.loss(parse_method("distill"), 0, 5)["lam"] == 0.5 and jsd.loss(parse_method("distill"), 4, 5)["lam"] == 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "kl+ce"}, "preset"),
        ({"preset": "huh"}, "preset"),
        ({"lam": 1.5}, "lam"),
        ({"lam_end": -0.1}, "lam_end"),
        ({"temperature": 0.0}, "temperature"),
        ({"ce_weight": float("inf")}, "ce_weight"),
        ({"divergence": "huh"}, "divergence"),
        ({"order": "pq"}, "order"),
        ({"ab": [1.0], "preset": "ab"}, "ab"),
        ({"teacher": "a", "cache": "b"}, "not both"),
        ({"cache": "b", "alpha": 1.0, "lam": 0.5}, "full distribution"),
        ({"cache": "b", "preset": "taid"}, "full distribution"),
        ({"cache": "b", "temperature": 2.0}, "temperature 1"),
    ],
)
def test_wrong_settings_are_told_before_training(settings, message):
    with pytest.raises(InputError, match=message):
        DistillConfig(**settings).check([parse_method("distill")])


@pytest.mark.parametrize("preset", LOSSES)
def test_every_preset_passes(preset):
    DistillConfig().check([parse_method(f"distill-{preset}"), parse_method(f"uniform+distill-{preset}+ce")])


def test_a_distilled_method_needs_a_teacher():
    with pytest.raises(InputError, match="needs a teacher"):
        parse_config(["--recipe", "demo", "--target.model", "null", "--method", "distill"])
    assert parse_config(["--recipe", "demo", "--method", "distill", "--distill.alpha", "inf"]).distill.alpha == float("inf")


@pytest.mark.parametrize(("lam", "end"), [(0.1, 1.0), (0.9, 0.0), (0.2, 1.0)])
def test_lam_stays_in_its_range_and_reaches_its_end(lam, end):
    config = DistillConfig(preset="taid", lam=lam, lam_end=end)
    for steps in (4, 7, 13, 14, 22, 100, 1200):
        at = [config.loss(parse_method("distill"), step, steps)["lam"] for step in range(steps)]
        assert at[0] == lam and at[-1] == end and min(at) >= 0 and max(at) <= 1


def test_a_preset_in_a_name_is_as_published_but_taid_moves():
    config = DistillConfig(lam=None, lam_end=1.0, preset="taid")
    assert config.loss(parse_method("distill-amid"), 9, 10)["lam"] is None
    assert config.loss(parse_method("distill-taid"), 9, 10)["lam"] == config.loss(parse_method("distill"), 9, 10)["lam"] == 1.0
    moving = DistillConfig(preset="jsd", beta=0.3, lam_end=0.9)
    assert [moving.options(parse_method("distill"), i, 3).beta for i in range(3)] == pytest.approx([0.3, 0.6, 0.9])


@pytest.mark.parametrize(
    ("methods", "config", "message"),
    [
        (["distill", "uniform+distill"], {}, "are the same"),
        (["distill+ce", "distill-kl+ce"], {}, "are the same"),
        (["distill"], {"preset": "skl", "lam_end": 1.0}, "with itself"),
        (["distill"], {"preset": "srkl", "lam_end": 0.0}, "with itself"),
        (["distill"], {"preset": "taid", "lam": 0.0, "lam_end": 1.0, "cache": "c"}, "full distribution"),
    ],
)
def test_what_would_train_in_vain(methods, config, message):
    with pytest.raises(InputError, match=message):
        DistillConfig(**config).check([parse_method(name) for name in methods])
