"""The command line: user errors are one line and status 1, and `--help` covers every command."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from lldfast.__main__ import main
from lldfast.cli import build_parser
from lldfast.data.making.options import PrepareOptions


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["prepare", "--out", "x"], "either inputs or --source"),
        (["verify", "no/such/folder"], "no/such/folder"),
        (["kl", "none.parquet"], "none.parquet"),
        (["weights", "no/such/run"], "no/such/run: no such run folder"),
        (["weights", ".", "--method", "iterative"], "no such run folder"),
        (["score", "m", "--data", "d", "--out", "."], "not the name of a file"),
        (["score", "m", "--data", "d", "--out", "x.parquet", "--device", "gpu"], "d: no such"),
        (["prepare", "x" * 300 + ".jsonl", "--out", "x"], "File name too long"),
        (["prepare", "", "--out", "x"], "an input is empty"),
        (["prepare", "x.jsonl", "--out", ""], "out is empty"),
        (["train", "--config", "none.yaml"], "none.yaml"),
        (["train", "--train.dtype=float16"], "train.dtype"),
        (["train", "--lld.ridge=x"], "lld.ridge"),
        (["report", "no/such/run"], "no such file"),
        (["score", "no/such/model", "--data", "none.parquet", "--out", "x.parquet"], "none.parquet"),
        (["train", "--recipe", "nothing"], "unknown recipe"),
    ],
)
def test_user_errors_are_one_line(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def commands():
    return build_parser()._subparsers._group_actions[0]


def test_every_command_is_documented():
    assert len(commands()._choices_actions) == len(commands().choices) == 11
    for action in commands()._choices_actions:
        assert action.help


def test_every_option_has_a_help_text():
    for name, command in build_parser()._subparsers._group_actions[0].choices.items():
        assert not [action.dest for action in command._actions if not action.help], name


def test_help_needs_no_library():
    """`lldfast --help` imports what it prints, and nothing that takes a second."""
    code = "import sys\nfrom lldfast.cli import build_parser\nbuild_parser().format_help()\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pyarrow", "yaml", "transformers"} & set(done.stdout.split())


def test_the_options_of_prepare_are_the_dataclass():
    parser = commands().choices["prepare"]
    given = parser.parse_args(["x.jsonl", "--out", "x"])
    assert {f.name: getattr(given, f.name) for f in dataclasses.fields(PrepareOptions)} == vars(PrepareOptions())
    options = {action.dest: action for action in parser._actions}
    for field in dataclasses.fields(PrepareOptions):
        spelled = "dataset-config" if field.name == "config" else field.name.replace("_", "-")
        assert options[field.name].option_strings == [f"--{spelled}"] and options[field.name].help
    args = ["x", "--out", "y", "--domains", "a", "b", "--estimate-share", "0.25", "--eval-texts", "40", "--dataset-config", "en"]
    given = parser.parse_args(args)
    assert (given.domains, given.estimate_share, given.eval_texts, given.config) == (["a", "b"], 0.25, 40, "en")
    assert (given.out, given.inputs) == ("y", ["x"])


# The commands that run a model, each with the least that it needs.
RUN_A_MODEL = [
    ["score", "--out", "s.parquet"],
    ["gram", "--out", "g.npz"],
    ["teach", "--out", "cache", "--block-size", "8"],
    ["generate", "--out", "written", "--tokens", "10"],
]


@pytest.mark.parametrize("name", [command[0] for command in RUN_A_MODEL])
def test_commands_that_run_a_model_share_their_options(name):
    options = {action.dest: action for action in commands().choices[name]._actions}
    assert options["device"].default == "auto" and options["dtype"].default == "float32" and options["data"].required
    assert options["model"].help.startswith("lldfast checkpoint folder") and "cuda where there is one" in options["device"].help


def test_env_says_what_runs_here(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("torch", "cpp", "triton", "cuda"))


def test_python_dash_m_lldfast_train_is_the_train_command():
    done = subprocess.run([sys.executable, "-m", "lldfast.train", "--recipe", "nope"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: unknown recipe 'nope'")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A model folder, an evaluation corpus, and vectors of it and of another one."""
    from lldfast.data.evalset import EvalSet
    from lldfast.data.tokenizer import load_tokenizer
    from lldfast.models.gpt import GPT

    folder = tmp_path_factory.mktemp("scored")
    GPT("test-tiny", seed=0).save(folder / "model", load_tokenizer("bytes"))
    for name, texts in (("one", ["a text", "another"]), ("two", ["other text", "and more"])):
        EvalSet.from_texts(texts, ["a", "b"]).save(folder / f"{name}.parquet")
        out = str(folder / f"{name}-scored.parquet")
        assert main(["score", str(folder / "model"), "--data", str(folder / f"{name}.parquet"), "--out", out]) == 0
    return folder


def test_score_tells_a_bad_device_model_or_place_before_it_works(scored, capsys):
    data = ["--data", str(scored / "one.parquet"), "--out"]
    for model, rest, message in [
        (scored / "model", [*data, str(scored / "x"), "--device", "gpu"], "--device 'gpu' cannot be used here"),
        (scored / "model", [*data, str(scored / "x"), "--device", "meta"], "--device 'meta' cannot be used here"),
        (scored / "model", [*data, str(scored / "x"), "--device", "mps"], "--device 'mps' cannot be used here"),
        (scored / "model", [*data, str(scored)], "not the name of a file to write"),
        (scored / "model", [*data, str(scored / "one.parquet" / "x")], "cannot write"),
        ("package:numpy", [*data, str(scored / "x")], "expected package:NAME/FILE"),
        ("package:numpy//etc/passwd", [*data, str(scored / "x")], "expected package:NAME/FILE"),
        ("package:none.sub/x", [*data, str(scored / "x")], "expected package:NAME/FILE"),
        ("", [*data, str(scored / "x")], "an empty string is neither a path nor a model id"),
    ]:
        assert main(["score", str(model), *rest]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1 and len(err) < 400
    assert not (scored / "x").exists()


def test_gram_compares_the_texts_before_a_model_runs(scored, capsys, tmp_path):
    args = ["gram", str(scored / "model"), "--data", str(scored / "one.parquet"), "--out", str(tmp_path / "g.npz")]
    assert main([*args, "--target", str(scored / "two-scored.parquet")]) == 1
    said = capsys.readouterr().err
    assert "two-scored.parquet and the evaluation texts of" in said and "device" not in said and not (tmp_path / "g.npz").exists()


def test_prepare_takes_the_tokenizer_of_an_lldfast_model(scored, tmp_path):
    from lldfast.data.shards import TokenShards

    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": f"some text, number {i} " * 20, "d": "a"}) + "\n" for i in range(40))
    )
    args = ["prepare", str(tmp_path / "t.jsonl"), "--domain-field", "d", "--eval-per-domain", "4", "--quiet"]
    assert main([*args, "--tokenizer", str(scored / "model"), "--out", str(tmp_path / "data")]) == 0
    assert TokenShards(tmp_path / "data").load_tokenizer().name == "bytes"


@pytest.mark.parametrize("command", RUN_A_MODEL)
def test_a_gpu_is_taken_where_there_is_one(scored, command, broken_gpu, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [command[0], str(scored / "model"), "--data", str(scored / "one.parquet"), *command[1:]]
    assert main(args) == 1
    assert capsys.readouterr().err == "error: --device 'cuda' cannot be used here: out of order\n"


def test_train_takes_a_gpu_where_there_is_one(broken_gpu, capsys, tmp_path):
    assert main(["train", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "error: train.device 'cuda' cannot be used here: out of order\n"


def test_a_command_prints_its_device(scored, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = ["score", str(scored / "model"), "--data", str(scored / "one.parquet"), "--out", str(scored / "again.parquet")]
    assert main(args) == 0
    assert capsys.readouterr().err.startswith("device: cpu, float32\n")
    assert main([*args, "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().err.startswith("device: cpu, bfloat16\n")


@pytest.mark.parametrize("command", RUN_A_MODEL)
def test_a_commands_tokenizer_goes_to_the_model(scored, command, capsys, tmp_path, monkeypatch):
    """One that the model cannot have is refused as such, before anything is written."""
    monkeypatch.chdir(tmp_path)
    args = [command[0], str(scored / "model"), "--data", str(scored / "one.parquet"), *command[1:], "--device", "cpu"]
    assert main([*args, "--tokenizer", "gpt2"]) == 1
    assert "tokenizer gpt2 has 50257 ids, the model only" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_tokenizer_is_scored_with_one_given(scored, tmp_path):
    (tmp_path / "model").mkdir()
    for file in (scored / "model").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    about = json.loads((tmp_path / "model" / "model.json").read_text())
    (tmp_path / "model" / "model.json").write_text(json.dumps(about | {"tokenizer": None}))
    args = ["score", str(tmp_path / "model"), "--data", str(scored / "one.parquet"), "--out", str(tmp_path / "s.parquet")]
    assert main(args) == 1
    assert main([*args, "--tokenizer", "bytes"]) == 0


def test_kl_names_the_vector_of_other_texts(scored, capsys):
    assert main(["kl", str(scored / "one-scored.parquet"), str(scored / "two-scored.parquet")]) == 1
    err = capsys.readouterr().err
    assert "different texts: " in err and "one-scored.parquet and " in err and "two-scored.parquet differ at text " in err


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -c 'import sys; from lldfast.__main__ import main; sys.exit(main([\"env\"]))' | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
