import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lldfast.errors import CorruptError, WriteError
from lldfast.run.folder import MethodFolder
from lldfast.run.log import JsonlLog, RunLog, read_jsonl


def test_a_kill_while_writing_costs_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert [r["step"] for r in read_jsonl(path)] == [0, 1]
    log = JsonlLog(path, keep=lambda r: r["step"] < 1)
    log.write({"step": 1, "again": True})
    log.close()
    assert read_jsonl(path) == [{"step": 0}, {"step": 1, "again": True}]


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(CorruptError, match=r"a\.jsonl, line 2"):
        read_jsonl(path)


def test_disk_full_names_the_log(tmp_path):
    log = JsonlLog(tmp_path / "a.jsonl")
    log._file.close()
    log._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(WriteError, match=r"a\.jsonl.*No space left"):
        log.write({"x": 1})


def test_wandb_gets_configuration_log_and_measurements(tmp_path, monkeypatch):
    sent = []
    fake = SimpleNamespace(init=lambda **options: sent.append(options) or fake)
    fake.log = lambda values, step: sent.append((step, values))
    fake.finish = lambda: None
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = RunLog(MethodFolder(tmp_path / "m"), total=3, progress=False, wandb="project", config={"seed": 7})
    log.step({"step": 0, "loss": 2.5, "grad_norm": 1.0, "lr": 0.1, "tokens_per_s": 9.0, "weights": {"a": 1.0}}, line=False)
    log.measured({"step": 0, "kl": 5.0, "true_kl": None, "nll_gap": 0.1, "loglik": "x.parquet"})
    log.close()
    assert sent[0]["config"] == {"seed": 7} and sent[1][1]["weights/a"] == 1.0
    assert sent[2] == (0, {"measure/kl": 5.0, "measure/nll_gap": 0.1})


def test_run_log_lines(tmp_path, capsys):
    log = RunLog(MethodFolder(tmp_path / "m"), total=3, progress=False)
    record = {"step": 0, "loss": 2.5, "grad_norm": 1.0, "lr": 0.1, "tokens_per_s": 1000.0, "weights": {"a": 1.0}}
    log.step(record, line=True)
    log.measured({"step": 0, "kl": 5.0, "true_kl": 0.5, "nll_gap": 0.1})
    log.close()
    err = capsys.readouterr().err
    assert "[m] step 0/3  loss 2.5000" in err and "true KL 0.500" in err
    assert json.loads((tmp_path / "m" / "log.jsonl").read_text()) == record
