"""ops/distill/options.py, spec.py: how settings and presets meet, what is refused and what is warned of."""

import dataclasses
import inspect
import math
import typing
import warnings

import pytest
import torch

from lldfast.errors import InputError
from lldfast.ops.distill.loss import distill_loss, distill_loss_from_logits, distill_loss_topk
from lldfast.ops.distill.options import NAMES, PRESETS, DistillOptions
from lldfast.run.distill import DistillConfig


def make():
    torch.manual_seed(0)
    return torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)


@pytest.mark.parametrize("place", [distill_loss, distill_loss_from_logits, DistillConfig])
def test_the_options_are_stated_alike_everywhere(place):
    """Names, order and types are those of DistillOptions; None, the default, takes what a preset or DistillOptions has."""
    types = typing.get_type_hints(DistillOptions)
    of_place = typing.get_type_hints(place)
    parameters = {name: p for name, p in inspect.signature(place).parameters.items() if name in NAMES}
    own = {"ce_weight": (float, 1.0)} if place is DistillConfig else {}  # of the methods with +ce, so that it needs no preset
    listed = {"ab": list[float] | None} if place is DistillConfig else {}  # YAML has no tuples
    assert set(parameters) == set(NAMES) and (place is DistillConfig or tuple(parameters) == NAMES)
    for name, parameter in parameters.items():
        kind, default = own.get(name, (listed.get(name, types[name] | None), None))
        assert of_place[name] == kind and parameter.default == default, name


def test_the_room_names_what_is_public():
    import lldfast as lld
    from lldfast.ops import distill

    for name in ("distill_loss", "distill_loss_from_logits", "distill_loss_topk"):
        assert getattr(distill, name) is getattr(lld, name)
    assert distill.DistillOptions is DistillOptions and distill_loss_topk is distill.distill_loss_topk
    with pytest.raises(AttributeError, match="no attribute 'distill_los'"):
        distill.distill_los  # noqa: B018


def test_options_are_checked_and_do_not_change():
    with pytest.raises(InputError, match="lam is the teacher's share"):
        DistillOptions(lam=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        DistillOptions().lam = 0.5


def test_explicit_settings_beat_the_preset_and_none_does_not():
    of = DistillOptions.of
    assert of() == DistillOptions()
    assert of("amid") == DistillOptions(**PRESETS["amid"])
    assert of("skl", lam=0.3, order=None, detach_assistant=False).lam == 0.3
    assert of("skl", lam=0.3, order=None).order == "pr"
    assert of("taid", detach_assistant=False).detach_assistant is False
    assert of("kl+ce", ce_weight=0.0).ce_weight == 0.0
    assert of("srkl", lam=0).lam == 0
    assert of("ab", ab=(1, 0)).ab == (1, 0)


def test_lam_of_jsd_is_its_beta():
    for chosen, beta in (({}, 0.5), ({"lam": 0.2}, 0.2), ({"beta": 0.7}, 0.7), ({"lam": 0.2, "beta": 0.7}, 0.7)):
        got = DistillOptions.of("jsd", **chosen)
        assert (got.beta, got.lam) == (beta, 0.0)
    assert DistillOptions.of(divergence="js", lam=0.2).lam == 0.2  # without the preset it is the assistant's


@pytest.mark.parametrize("chosen,message", [
    ({"preset": "distillm"}, "preset='distillm' is not one of kl, rkl"), ({"order": "qp"}, "order='qp' is not one of pr, qr"),
    ({"divergence": "tv"}, "divergence='tv' is not one of kl, rkl, js, ab, alpha"), ({"backend": "abacus"}, "abacus"),
    ({"alpha": math.nan}, "alpha must be a number, not nan"), ({"alpha": "1"}, "alpha must be a number, not '1'"),
    ({"lam": 1.01}, r"lam is the teacher's share of the assistant: it must be in \[0, 1\], not 1.01"),
    ({"lam": True}, "lam must be a number, not True"), ({"lam": -0.1}, "lam is the teacher's share"),
    ({"temperature": 0}, "temperature must be positive and finite, not 0"), ({"temperature": -1.0}, "temperature must be posi"),
    ({"temperature": math.inf}, "temperature must be positive and finite, not inf"), ({"chunk_bytes": 0}, "chunk_bytes must"),
    ({"ce_weight": -1.0}, "ce_weight must be >= 0 and finite, not -1.0"), ({"ce_weight": math.inf}, "ce_weight must be >= 0"),
    ({"divergence": "js", "beta": 0}, "beta must lie between 0 and 1, not 0"), ({"preset": "jsd", "lam": 1}, "beta must lie"),
    ({"preset": "ab", "ab": (0.1, 0.2, 0.3)}, "ab must be the two exponents"), ({"preset": "ab", "ab": 0.5}, "ab must be the"),
    ({"divergence": "alpha", "alpha": math.inf}, "the alpha-divergence needs a finite divergence_alpha, not inf"),
    ({"divergence": "alpha", "divergence_alpha": math.nan}, "needs a finite"), ({"valid_vocab": 0}, "valid_vocab must be"),
    ({"preset": "ab", "ab": (0.1, math.inf)}, "ab must be finite"), ({"preset": "kl+ce"}, "ce_weight=1.0 needs labels"),
    ({"reduction": "median"}, "reduction='median' is not 'mean', 'sum' or 'none'"),
])  # fmt: skip
def test_bad_settings(chosen, message):
    with pytest.raises(InputError, match=message):
        distill_loss_from_logits(*make(), **{"backend": "torch"} | chosen)
    with pytest.raises(InputError, match="distillation has no setting 'gamma'; it has divergence, order"):
        DistillOptions.of("kl", gamma=1)


WARNED = [
    *({"order": "qr", "alpha": alpha} for alpha in (1, 1 + 1e-5, 3, math.inf)),
    {"divergence": "rkl", "order": "pr", "alpha": 1.0}, {"divergence": "ab", "order": "rp", "alpha": 5.0},
]  # fmt: skip
SILENT = [
    *({"order": "qr", "alpha": alpha} for alpha in (1 - 1e-5, -1, -math.inf)), {"order": "pr", "alpha": 3.0},
    *({"order": "qr", "alpha": 3} | more for more in ({"divergence": "rkl"}, {"divergence": "js"}, {"lam": 1}, {"order": "rq"})),
    *({"preset": name} for name in PRESETS if name != "kl+ce"), {"order": "rp", "alpha": 3.0, "lam": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("chosen,warned", [*((x, True) for x in WARNED), *((x, False) for x in SILENT)])
def test_collapse_is_warned_of(chosen, warned):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        distill_loss_from_logits(*make(), backend="torch", **chosen)
    assert [("collapse" in str(x.message), x.filename == __file__) for x in seen] == [(True, True)] * warned
