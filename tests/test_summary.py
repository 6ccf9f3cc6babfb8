"""The table, and the sentences that say when not to trust it."""

import pytest

from lldfast.errors import CorruptError
from lldfast.report.summary import disagreements, instability, summarise, table


def row(method, kl, true_kl, se=0.1):
    return {
        "method": method,
        "kl": kl,
        "kl_se": se,
        "true_kl": true_kl,
        "nll_gap": 0.1,
        "kl_between": kl * 0.9,
        "kl_within": kl * 0.1,
    }


def test_measures_that_agree_are_left_alone():
    assert disagreements([row("a", 5.0, 1.0), row("b", 6.0, 1.5)]) == []


def test_opposite_orders_are_named_with_their_figures():
    (warning,) = disagreements([row("mirror", 5.0, 1.5), row("uniform", 6.0, 1.0)])
    assert "mirror is closer to the target than uniform (5.00 < 6.00" in warning and "(1.500 > 1.000)" in warning


def test_differences_within_the_error_are_not_called_disagreement():
    assert disagreements([row("a", 5.0, 1.5, se=2.0), row("b", 6.0, 1.0, se=2.0)]) == []
    assert disagreements([row("a", 5.0, 1.001), row("b", 6.0, 1.0)]) == []


def test_scale_and_missing_true_kl():
    assert "30 to 30 times" in disagreements([row("a", 30.0, 1.0)])[0]
    assert "no true KL" in disagreements([row("a", 30.0, None)])[0]


def test_instability():
    calm = [{"loss": 5 - i / 100, "grad_norm": 1.0} for i in range(200)]
    assert instability("m", calm) == []
    spike = [dict(r) for r in calm]
    spike[150]["grad_norm"] = 90.0
    assert "90.0" in instability("m", spike)[0]
    diverged = calm + [{"loss": 9.0, "grad_norm": 1.0} for _ in range(100)]
    assert "diverged" in " ".join(instability("m", diverged))


def test_table_leaves_out_what_nobody_measured():
    rows = [{**row("uniform", 5.0, None), "weight_kl": None, "effective_domains": 12.0, "wall_s": 3.0}]
    text = table({"rows": rows, "base_row": None, "warnings": ["careful"]})
    assert "true KL" not in text.splitlines()[0] and "5.00" in text and text.endswith("warning: careful")


@pytest.mark.parametrize("content", ["[1]", "{}", '{"methods": ["uniform"]}'])
def test_a_damaged_run_folder_is_named(tmp_path, content):
    (tmp_path / "experiment.json").write_text(content)
    with pytest.raises(CorruptError, match=r"experiment\.json is not what a run writes"):
        summarise(tmp_path)
    (tmp_path / "experiment.json").write_text('{"methods": ["uniform"], "ground_truth": null}')
    (tmp_path / "methods" / "uniform").mkdir(parents=True)
    (tmp_path / "methods" / "uniform" / "result.json").write_text("{}")
    (tmp_path / "methods" / "uniform" / "weights.json").write_text('{"a": 1}')
    with pytest.raises(CorruptError, match=r"result\.json is not what a run writes"):
        summarise(tmp_path)
