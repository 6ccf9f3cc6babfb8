"""Weight plans: which weights come into force at which step, and what is written about them."""

import pytest

from lldfast.run.folder import MethodFolder
from lldfast.run.plan import FixedPlan
from lldfast.weights.file import Stage, WeightsFile
from lldfast.weights.rules import Rule

ONE, TWO = {"a": 0.25, "b": 0.75}, {"a": 0.5, "b": 0.5}


def test_stages_come_into_force_at_their_first_step(tmp_path):
    plan = FixedPlan([Stage(0, ONE), Stage(10, TWO)])
    assert plan.initial == ONE
    assert [plan.at(step) for step in (0, 1, 9, 10, 11)] == [ONE, None, None, TWO, None]
    assert plan.trained_on({"a": 30, "b": 10}) == {"a": 0.75, "b": 0.25}  # what was drawn, as the weights moved
    assert plan.record(MethodFolder(tmp_path)).stages == [Stage(0, ONE), Stage(10, TWO)]
    plan.load_state_dict(plan.state_dict())


def test_one_stage_is_what_a_model_was_trained_on(tmp_path):
    plan = FixedPlan([Stage(0, ONE)])
    assert plan.trained_on({"a": 30, "b": 10}) == ONE
    file = plan.record(MethodFolder(tmp_path))
    assert file.stages == [] and file.rule is None and file.pass1 is None


@pytest.mark.parametrize("several", [False, True])
def test_a_second_pass_says_where_it_comes_from(tmp_path, several):
    pass1 = WeightsFile(ONE, method="mirror", weights_se={"a": 0.1, "b": 0.1}, total_steps=5, target={"name": "t"})
    pass1.set_rule(Rule("mirror", step_size=2.0), pass1.domains)
    stages = [Stage(0, ONE), Stage(3, TWO)] if several else [Stage(0, ONE)]
    file = FixedPlan(stages, origin=pass1).record(MethodFolder(tmp_path))
    assert file.made_by() == pass1.made_by() and file.target == {"name": "t"}
    assert file.pass1["method"] == "mirror" and file.pass1["total_steps"] == 5
    assert file.weights_se == (None if several else pass1.weights_se)  # they are of the one recipe, not of a stage's
