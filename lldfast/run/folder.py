"""The folder of a run: where each of its files is, what is finished, and the guard against mixing two runs in it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import yaml

from lldfast.errors import InputError
from lldfast.files import atomic_path, folder_lock, read_json
from lldfast.run.config import Config
from lldfast.run.parsing import with_defaults
from lldfast.weights.recompute import REPLICATES

# Configuration that may change between two calls on one run folder without making its results incomparable.
FREE_SETTINGS = ("out", "methods", "log", "recipe", "measure.allow_differences")


class MethodFolder:
    """OUT/methods/<name>: what one training run of the comparison wrote."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.name

    @property
    def weights(self) -> Path:
        return self.path / "weights.json"

    @property
    def replicates(self) -> Path:
        """Bootstrap replicates of Delta_t, beside the weights file whose error bars they are."""
        return self.path / REPLICATES

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """The trained model."""
        return self.path / "final"

    @property
    def result(self) -> Path:
        """Written last: the method is finished."""
        return self.path / "result.json"

    @property
    def finished(self) -> bool:
        return self.result.exists()

    def loglik(self, step: int) -> Path:
        """The base's log-likelihood vector at a measured step."""
        return self.path / "loglik" / f"step-{step:06d}.parquet"

    def remove_checkpoints(self) -> None:
        shutil.rmtree(self.checkpoints, ignore_errors=True)


class RunFolder:
    """OUT. Make one of any path: nothing is read or written until a method does."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def experiment(self) -> Path:
        return self.path / "experiment.json"

    @property
    def target(self) -> Path:
        """The target's log-likelihoods of the whole evaluation corpus."""
        return self.path / "target.parquet"

    @property
    def data(self) -> Path:
        """Prepared data, where the run made its own."""
        return self.path / "data"

    @property
    def target_mixture(self) -> Path:
        """Weights file of the mixture that the run trains its target on, where it does."""
        return self.path / "target-mixture.json"

    @property
    def target_run(self) -> RunFolder:
        return RunFolder(self.path / "target-run")

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def method(self, name: str) -> MethodFolder:
        return MethodFolder(self.path / "methods" / name)

    def methods(self) -> list[MethodFolder]:
        """All that have a folder, by name, finished or not."""
        return [MethodFolder(path) for path in sorted(self.path.glob("methods/*")) if path.is_dir()]

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the writer's lock; see `folder_lock`."""
        return folder_lock(self.path)

    def with_finished(self, names: list[str]) -> list[str]:
        """`names` after those that an earlier call on this folder finished: they stay in its summary and report."""
        before = read_json(self.experiment)["methods"] if self.experiment.exists() else []
        return [name for name in before if name not in names and self.method(name).finished] + names

    @property
    def trained(self) -> bool:
        """A method has begun here."""
        return any(self.path.glob("methods/*/*"))

    def check_same(self, config: Config) -> None:
        """Refuse to mix two configurations in one folder.

        Raises:
            InputError: naming the first setting that differs.
        """
        trained = self.trained
        if not self.config.exists() or not (self.target.exists() or trained):
            return  # a start that failed before any result binds nobody
        before = _flatten(with_defaults(yaml.safe_load(self.config.read_text(encoding="utf-8"))))
        now = _flatten(yaml.safe_load(config.to_yaml()))
        for key in sorted(before.keys() | now.keys()):
            section, was, is_now = key.split(".")[0], before.get(key), now.get(key)
            if not trained and section not in ("data", "target"):
                continue  # nothing but the target's scores is there: they depend on no other setting
            if section not in FREE_SETTINGS and key not in FREE_SETTINGS and was != is_now:
                raise InputError(f"{self} was made with {key} = {was!r}, now it is {is_now!r}: use another --out")

    def write_config(self, config: Config) -> None:
        with atomic_path(self.config) as temporary:
            temporary.write_text(config.to_yaml(), encoding="utf-8")


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
