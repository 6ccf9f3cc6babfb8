import numpy as np
import pytest
import torch

from lldfast.errors import CorruptError, InputError, TrainingError
from lldfast.run.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint


def made(width=8, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def steps(model, optimizer, n, seed):
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        model(torch.randn(5, 4, generator=g)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_going_on_gives_the_same_bits(tmp_path):
    model, optimizer = made()
    steps(model, optimizer, 3, seed=1)
    save_checkpoint(tmp_path, step=3, model=model, optimizer=optimizer, state={"x": [1]}, arrays={"a": np.arange(3.0)})
    steps(model, optimizer, 4, seed=2)
    other, again = made(seed=9)
    step, state, arrays = load_checkpoint(list_checkpoints(tmp_path)[-1], model=other, optimizer=again)
    assert (step, state) == (3, {"x": [1]}) and arrays["a"].tolist() == [0, 1, 2]
    steps(other, again, 4, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = made()
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step=step, model=model, optimizer=optimizer, state={})
    (tmp_path / ".step-0000200.1-ab.tmp").mkdir()  # what a kill while writing leaves
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000010", "step-0000100"]


def test_damage_and_strangers_are_named(tmp_path):
    model, optimizer = made()
    path = save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer, state={})
    with pytest.raises(InputError, match=r"0\.weight is \[8, 4\]"):
        load_checkpoint(path, model=made(width=16)[0], optimizer=optimizer)
    with pytest.raises(InputError, match="another model"):
        load_checkpoint(path, model=torch.nn.Linear(2, 2), optimizer=optimizer)
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CorruptError, match="damaged"):
        load_checkpoint(path, model=model, optimizer=optimizer)
    (path / "model.safetensors").write_bytes(raw)
    whole = (path / "arrays.npz").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"PK" + whole[2:-30]):
        (path / "arrays.npz").write_bytes(damaged)
        with pytest.raises(CorruptError, match="damaged"):
            load_checkpoint(path, model=model, optimizer=optimizer)
    (path / "state.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"state\.json"):
        load_checkpoint(path, model=model, optimizer=optimizer)


def test_a_checkpoint_of_another_shape_changes_nothing(tmp_path):
    """The first parameter fits, the last does not."""
    model, optimizer = made()
    path = save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer, state={})
    other = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(InputError, match=r"2\.weight is \[3, 8\]"):
        load_checkpoint(path, model=other, optimizer=torch.optim.AdamW(other.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(before, other.parameters(), strict=True))


def test_weights_that_are_not_finite_are_not_checkpointed(tmp_path):
    model, optimizer = made()
    save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer, state={})
    with torch.no_grad():
        model[0].bias[0] = float("inf")
    with pytest.raises(TrainingError, match=r"step-0000002 was not written: parameter '0\.bias' is not finite"):
        save_checkpoint(tmp_path, step=2, model=model, optimizer=optimizer, state={})
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000001"]
