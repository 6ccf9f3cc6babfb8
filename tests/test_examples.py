"""The examples run, and give what plain torch gives."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F


def run(repository, name):
    done = subprocess.run([sys.executable, repository / "examples" / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_training_loss(repository):
    torch.manual_seed(0)
    trunk, head = torch.nn.Linear(64, 64), torch.nn.Linear(64, 1000, bias=False)
    optimizer = torch.optim.AdamW([*trunk.parameters(), *head.parameters()], lr=1e-3)
    x, y = torch.randn(512, 64), torch.randint(1000, (512,))
    for _ in range(20):
        loss = F.cross_entropy(torch.tanh(trunk(x)) @ head.weight.T, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(run(repository, "training_loss.py").split()[1]) == pytest.approx(loss.item(), abs=2e-4)


def test_token_scores(repository):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 16, 64), torch.randn(1000, 64) / 8
    labels = torch.randint(1000, (2, 16))
    logs = torch.log_softmax(hidden @ weight.T, -1)
    first = logs[0].gather(-1, labels[0, :, None]).sum()
    out = run(repository, "token_scores.py").splitlines()
    assert len(out) == 2 and float(out[0].split()[2]) == pytest.approx(float(first), abs=2e-3)
