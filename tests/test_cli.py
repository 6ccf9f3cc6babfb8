"""The command line: user errors are one line and status 1, and `--help` covers every command."""

import subprocess
import sys

import pytest

from lldfast.__main__ import build_parser, main


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


def test_every_command_is_documented(capsys):
    for action in build_parser()._subparsers._group_actions[0]._choices_actions:
        assert action.help


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
        (scored / "model", [*data, str(scored)], "not the name of a file to write"),
        (scored / "model", [*data, str(scored / "one.parquet" / "x")], "cannot write"),
        ("package:numpy", [*data, str(scored / "x")], "expected package:NAME/FILE"),
        ("package:numpy//etc/passwd", [*data, str(scored / "x")], "expected package:NAME/FILE"),
        ("package:none.sub/x", [*data, str(scored / "x")], "expected package:NAME/FILE"),
        ("", [*data, str(scored / "x")], "an empty string is neither a path nor a model id"),
    ]:
        assert main(["score", str(model), *rest]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (scored / "x").exists()


def test_kl_names_the_vector_of_other_texts(scored, capsys):
    assert main(["kl", str(scored / "one-scored.parquet"), str(scored / "two-scored.parquet")]) == 1
    err = capsys.readouterr().err
    assert "two-scored.parquet against " in err and "different texts" in err


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -c 'import sys; from lldfast.__main__ import main; sys.exit(main([\"env\"]))' | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
