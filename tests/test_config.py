import dataclasses
import subprocess
import sys

import pytest
import yaml

from lldfast.data.making.options import CorpusOptions, PrepareOptions
from lldfast.errors import InputError
from lldfast.ops.distill.options import DistillOptions
from lldfast.run.config import Config, DataConfig, GramConfig
from lldfast.run.distill import DistillConfig
from lldfast.run.methods import parse_method
from lldfast.run.parsing import parse_config, recipe_path, with_defaults
from lldfast.terminal import option_help


def test_precedence_defaults_recipe_config_options(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {steps: 50, batch_size: 4, micro_batch_size: 2}\nmethods: [uniform]\n")
    override = tmp_path / "c.yaml"
    override.write_text("train: {steps: 60}\n")
    c = parse_config(["--recipe", str(recipe), "--config", str(override), "--train.batch_size=8"])
    assert (c.train.steps, c.train.batch_size, c.train.micro_batch_size) == (60, 8, 2)
    assert c.methods == ["uniform"] and c.train.weight_decay == 0.1 and c.recipe == str(recipe)


def test_a_real_model_in_place_of_a_recipes_mixture():
    c = parse_config(["--recipe", "pile-sample", "--target.model", "some/model", "--target.mixture", "null"])
    assert c.target.model == "some/model" and c.target.mixture is None


@pytest.mark.parametrize("name", ["demo", "demo-target", "paper", "pile-sample", "smollm2"])
def test_shipped_recipes_parse(name):
    extra = ["--target.model=x"] if name == "paper" else []
    c = parse_config(["--recipe", name, *extra])
    assert c.recipe == name and yaml.safe_load(c.to_yaml())["train"]["steps"] == c.train.steps
    assert "#" in recipe_path(name).read_text()  # a recipe gives its reasons


def test_the_paper_recipe_is_the_papers():
    c = parse_config(["--recipe", "paper", "--target.model=x"])
    assert c.train.batch_size * 1024 == 524_288 and c.train.micro_batch_size == 64 and c.train.steps == 10_000
    assert (c.train.learning_rate, c.train.min_lr, c.train.warmup, c.train.weight_decay) == (6e-4, 6e-5, 0.1, 0.1)
    assert c.train.draw == "step" and c.lld.tau == 1.0 and c.model.preset == "nano-124m"


def test_demo_is_the_default_and_methods_take_commas():
    assert parse_config([]).recipe == "demo"
    assert parse_config(["--method", "uniform,mirror"]).methods == ["uniform", "mirror"]
    assert parse_config(["--methods=[uniform, spread]"]).methods == ["uniform", "spread"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recipe", "dmeo"], "unknown recipe 'dmeo'.*demo"),
        (["--recipe", "none.yaml"], "does not exist"),
        (["--method", "itrative"], "unknown method 'itrative'.*iterative"),
        (["--method", "uniform,uniform"], "repeats"),
        (["--method", "fixed"], "lld.weights"),
        (["--train.steps=0"], "train.steps"),
        (["--train.micro_batch_size=3"], "does not divide"),
        (["--train.warmup=2"], "warmup"),
        (["--train.learning_rate=0"], "learning_rate"),
        (["--lld.bootstrap=1"], "bootstrap"),
        (["--target.mixture={a: 1}"], "not both"),
        (["--method"], "needs a value"),
        (["--method=", "--train.steps=1"], "--method needs a value"),
        (["--method", "--train.steps=1"], "--method needs a value"),
        (["--data.path="], r"--data\.path needs a value"),
        (["--data.path", ""], r"--data\.path needs a value"),
        (["--lld.tau=0"], "tau must be > 0"),
        (["--lld.tau=.nan"], "tau must be > 0"),
        (["--lld.tau_end=-1"], "tau must be > 0"),
        (["--lld.floor=2"], "floor"),
        (["--lld.ridge=-1"], "ridge"),
        (["--lld.step_size=.inf"], "step_size"),
        (["--lld.every=0"], "every"),
        (["--lld.split=1"], "lld.split"),
        (["--lld.radius=0"], "radius must be > 0"),
        (["--lld.fit_step=0"], "step must be 'auto'"),
        (["--lld.gram_scale=std"], "gram_scale"),
        (["--gram.mode=sketch"], r"gram\.mode"),
        (["--gram.k=1000"], "gram.k must be a power of two or auto, got 1000"),
        (["--gram.k=0"], "gram.k must be a power of two"),
        (["--gram.mode=exact", "--gram.k=1024"], "gram.k is the size of a sketch: mode 'exact'"),
        (["--gram.groups=0"], "gram.groups"),
        (["--gram.groups=1"], "gram.groups must be >= 2"),
        (["--gram.batch_tokens=0"], "gram.batch_tokens"),
        (["--gram.budget_mb=0"], "gram.budget_mb"),
        (["--gram.target_kl=.nan"], "gram.target_kl"),
        (["--gram.precondition=sgd"], r"gram\.precondition"),
        (["--method", "two-stage", "--train.steps=1"], "'two-stage'.*no second stage"),
        (["--train.learning_rate=.inf"], "learning_rate"),
        (["--train.min_lr=.nan"], "min_lr"),
        (["--train.beta1=1"], "train.beta1"),
        (["--train.eps=-1"], "train.eps"),
        (["--train.grad_clip=-1"], "train.grad_clip"),
        (["--train.weight_decay=.nan"], "train.weight_decay"),
        (["--train.threads=-1"], "train.threads"),
        (["--seed=-1"], "seed"),
        (["--measure.times=0"], "measure.times"),
        (["--target.steps=0"], "target.steps"),
        (["--model.init=folder", "--model.n_layer=3"], "model.n_layer cannot be changed"),
    ],
)
def test_bad_values_name_the_parameter(args, message):
    with pytest.raises(InputError, match=message):
        parse_config(args)


def test_a_misspelt_option_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--train\.stpes"):
        parse_config(["--train.stpes=3"])
    for text, message in [
        ("train: {stpes: 4}", "'stpes'"),
        ("trian: {steps: 4}", "trian"),
        ("train: 5", "train is a section of the configuration, got 5"),
        ("train: {steps: four}", r"train\.steps.*four"),
        ("- a", "Unexpected config"),
        ("a: [", "Problems parsing config"),
    ]:
        (tmp_path / "c.yaml").write_text(text + "\n")
        with pytest.raises(InputError, match=message) as caught:
            parse_config(["--config", str(tmp_path / "c.yaml")])
        assert "\n" not in str(caught.value)


def test_the_data_section_is_the_options_of_prepare():
    """One statement of both: names, defaults, meanings."""
    data = {f.name: f for f in dataclasses.fields(DataConfig)}
    assert list(data) == ["path", "source", *(f.name for f in dataclasses.fields(CorpusOptions))]
    prepared = {f.name: f.default for f in dataclasses.fields(PrepareOptions)}
    for name, default in DataConfig().corpus_options().items():
        assert prepared[name] == default == data[name].default
    assert option_help(DataConfig).items() >= option_help(CorpusOptions).items() <= option_help(PrepareOptions).items()


def test_help_says_what_options_mean(capsys):
    with pytest.raises(SystemExit) as done:
        parse_config(["--help"])
    shown = "".join(capsys.readouterr().out.split())  # lines are broken at spaces and hyphens
    assert done.value.code == 0
    sections = [type(value) for value in vars(Config()).values() if dataclasses.is_dataclass(value)]
    for section in (Config, *sections):
        said = (option_help(DistillOptions) if section is DistillConfig else {}) | option_help(section)
        for option in dataclasses.fields(section):
            if dataclasses.is_dataclass(option.default_factory):
                continue  # a section
            assert said.get(option.name), f"{section.__name__}.{option.name} has no help text"
            assert said[option.name].replace(" ", "") in shown


def test_values_as_people_write_them(tmp_path):
    assert parse_config(["--lld.tau=inf"]).lld.tau == parse_config(["--lld.tau", "inf"]).lld.tau == float("inf")
    name = str(tmp_path / "my data, all.jsonl")
    assert parse_config(["--data.source", name]).data.source == parse_config([f"--data.source={name}"]).data.source == [name]
    assert parse_config(["--data.source=[a.jsonl, b.jsonl]"]).data.source == ["a.jsonl", "b.jsonl"]


def test_rules_need_a_target():
    with pytest.raises(InputError, match=r"'iterative' needs target\.model"):
        Config(methods=["iterative"]).check()
    Config(methods=["uniform"]).check()


def test_method_names():
    assert parse_method("aggregated").rule == "iterative" and parse_method("aggregated").passes == 2
    assert parse_method("mirror-fixed") == parse_method("mirror-fixed")
    assert parse_method("mirror-two-stage").stages == 2
    assert parse_method("adjusted-spread").passes == 1
    assert parse_method("ground-truth").rule is None
    for rule in ("adjusted-trust", "adjusted-fit"):
        assert parse_method(rule).passes == 1 and parse_method(rule).rule == rule
        for suffix, stages in (("aggregated", 1), ("fixed", 1), ("two-stage", 2)):
            spec = parse_method(f"{rule}-{suffix}")
            assert (spec.rule, spec.passes, spec.stages) == (rule, 2, stages)


def test_gram_options_on_the_command_line():
    c = parse_config(["--gram.mode", "fold", "--gram.k", "65536", "--gram.budget_mb=1.5", "--gram.precondition=adamw"])
    assert c.gram.keywords() == {
        "mode": "fold",
        "k": 65536,
        "groups": 8,
        "debias": True,
        "precondition": "adamw",
        "budget_bytes": 3 * 2**19,
        "target_kl": 1e-4,
        "batch_tokens": 4096,
    }
    plain = GramConfig().keywords()
    assert plain["precondition"] is None and plain["budget_bytes"] is None and plain["k"] == "auto"
    assert parse_config(["--gram.k=auto", "--gram.groups=1", "--gram.debias=false"]).gram.groups == 1
    fit = parse_config(["--lld.fit_step=0.5", "--lld.radius", "0.02"]).lld.rule("adjusted-fit", (0.5, 0.5))
    assert (fit.fit_step, fit.radius, fit.prior) == (0.5, 0.02, (0.5, 0.5))
    assert parse_config(["--lld.fit_step=auto"]).lld.rule("adjusted-fit").fit_step == "auto"


def test_the_configuration_is_read_without_torch():
    code = "import sys, lldfast.run.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_every_option_of_a_rule_reaches_it():
    changed = {"tau": 2.0, "tau_end": 3.0, "step_size": 5.0, "floor": 0.01, "gram_scale": "corr", "ridge": 0.5}
    changed |= {"radius": 0.3, "fit_step": 0.7}
    rule = dataclasses.replace(Config().lld, **changed).rule("adjusted", (1.0,))
    assert {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)} == {"name": "adjusted", "prior": (1.0,), **changed}


def test_a_configuration_of_an_earlier_version_is_completed():
    c = Config(out="x", methods=["uniform"])
    c.target.mixture = {"a": 1.0}  # a value, not a section with missing keys
    c.train.steps = 77
    old = yaml.safe_load(c.to_yaml())
    del old["gram"], old["lld"]["radius"]
    assert with_defaults(old) == yaml.safe_load(c.to_yaml()) == with_defaults(with_defaults(old))


def test_former_keys_go_on_working_and_say_the_present_ones(tmp_path):
    former = tmp_path / "c.yaml"
    former.write_text("lld: {tau: 2.0, normalise: corr, normalize: bytes}\nmethods: [uniform]\n")
    with pytest.warns(DeprecationWarning) as said:
        c = parse_config(["--config", str(former), "--target.model=x"])
    assert (c.lld.tau, c.lld.gram_scale, c.lld.per) == (2.0, "corr", "bytes")
    assert {str(w.message) for w in said} >= {
        f"{former}: lld.normalise is deprecated: use lld.gram_scale",
        f"{former}: lld.normalize is deprecated: use lld.per",
    }
    with pytest.warns(DeprecationWarning, match=r"--lld\.normalise is deprecated: use --lld\.gram_scale"):
        assert parse_config(["--lld.normalise=trace"]).lld.gram_scale == "trace"
    with pytest.warns(DeprecationWarning, match=r"use --lld\.per"):
        assert parse_config(["--lld.normalize", "texts"]).lld.per == "texts"
    stored = with_defaults({"lld": {"normalise": "corr"}})["lld"]  # the config.yaml of an earlier run
    assert stored["gram_scale"] == "corr" and "normalise" not in stored
    former.write_text("lld: {gram_scale: none, normalise: corr}\n")
    with pytest.raises(InputError, match=r"lld\.normalise is the former name of lld\.gram_scale"):
        parse_config(["--config", str(former)])


@pytest.mark.parametrize("form", ["--lld=TEXT", "--lld TEXT", "--lld section.yaml", "--config ref.yaml", "--config dot.yaml"])
def test_former_keys_of_a_section_given_whole(tmp_path, monkeypatch, form):
    """The parser also takes a section as text, as the name of a file, and its keys with dots: former names pass there too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "section.yaml").write_text("{normalise: corr, tau: 4.0}")
    (tmp_path / "ref.yaml").write_text("lld: section.yaml\nmethods: [uniform]")
    (tmp_path / "dot.yaml").write_text("lld.normalise: corr\nlld.tau: 4.0\nmethods: [uniform]")
    arguments = [part.replace("TEXT", "{normalise: corr, tau: 4.0}") for part in form.split()]
    with pytest.warns(DeprecationWarning, match=r"lld\.gram_scale"):
        lld = parse_config([*arguments, "--method=uniform"]).lld
    assert (lld.gram_scale, lld.tau) == ("corr", 4.0)


def test_a_config_that_is_no_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xbb\xff")
    for option in ("--config", "--recipe"):
        with pytest.raises(InputError, match=r"c\.yaml is not a text file"):
            parse_config([option, str(tmp_path / "c.yaml")])


@pytest.mark.slow
def test_former_names_are_told_to_whoever_types_them():
    said = subprocess.run(
        [sys.executable, "-m", "lldfast", "train", "--lld.normalise=corr", "--print_config"], capture_output=True, text=True
    )
    assert "gram_scale: corr" in said.stdout and "--lld.normalise is deprecated: use --lld.gram_scale" in said.stderr
