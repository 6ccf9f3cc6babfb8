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
        (["weights", "no/such/run"], "0 methods"),
        (["weights", "no/such/run", "--method", "iterative"], "no finished method"),
        (["report", "no/such/run"], "no such file"),
        (["score", "no/such/model", "--data", "none.parquet", "--out", "x.parquet"], "none.parquet"),
        (["train", "--recipe", "nothing"], "unknown recipe"),
    ],
)
def test_user_errors_are_one_line(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err


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
