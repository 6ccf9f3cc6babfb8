"""The run folder as the report reads it: every part that is there, and one plain line for every part that is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from lldfast.errors import CorruptError, InputError
from lldfast.files import read_json
from lldfast.run.log import read_jsonl
from lldfast.weights.equations import effective_domains

if TYPE_CHECKING:
    from lldfast.measure.loglik import LoglikVector


@dataclass
class Method:
    """One training run of the comparison. `weights` is None when its weights file is absent."""

    name: str
    folder: Path
    domains: list[str]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, float] | None = None
    weights_se: dict[str, float] | None = None
    rule: str = ""
    stages: list[dict[str, Any]] = field(default_factory=list)
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    gram_domains: list[str] = field(default_factory=list)
    objective: str = "ce"

    @property
    def distilled(self) -> bool:
        """Trained on a teacher's distributions, not on its data alone."""
        return self.objective != "ce"

    @property
    def uniform(self) -> bool:
        """Plain training on equal weights for every domain, without any estimate."""
        if self.distilled:
            return False
        if self.estimated or not self.weights:
            return self.name == "uniform"
        return bool(np.ptp(list(self.weights.values())) < 1e-6)

    @property
    def estimated(self) -> bool:
        """Its weights come from a target model: estimated in this run, or in the pass 1 it stands on."""
        return bool(self.trajectory or self.rule)

    @property
    def steps(self) -> list[int]:
        """Steps at which weights were estimated."""
        return [int(point["step"]) for point in self.trajectory]

    def series(self, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps and values of one measured quantity of metrics.jsonl; steps without it are left out."""
        points = [(row["step"], row[key]) for row in self.metrics if row.get(key) is not None]
        table = np.array(points, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def trajectory_of(self, key: str) -> NDArray[np.float64] | None:
        """`delta`, `delta_se` or `weights` over the estimates, [S, K] in the order of `domains`; None if any step lacks it."""
        if not self.trajectory or any(not point.get(key) for point in self.trajectory):
            return None
        return np.array([[point[key][domain] for domain in self.domains] for point in self.trajectory], dtype=np.float64)

    def grams(self) -> list[tuple[int, NDArray[np.float64]]]:
        """Step and Gram matrix [K, K] (order of `gram_domains`) of every estimate that stored one."""
        kept = [point for point in self.trajectory if point.get("gram") is not None]
        return [(int(point["step"]), np.array(point["gram"], dtype=np.float64)) for point in kept]


@dataclass
class Run:
    """A run folder. `notes` says, one line each, what is absent or incomplete."""

    path: Path
    experiment: dict[str, Any]
    domains: list[str]
    truth: dict[str, float] | None
    methods: list[Method]
    rows: list[dict[str, Any]]
    base_row: dict[str, Any] | None
    warnings: list[str]
    config: str | None
    notes: list[str]

    def is_oracle(self, method: Method) -> bool:
        """Trained on the target's own (ground-truth) weights: a reference, not a result of the method."""
        if method.name == "ground-truth":
            return True
        if self.truth is None or method.weights is None or method.estimated or method.uniform:
            return False
        return all(abs(method.weights[name] - self.truth[name]) < 1e-4 for name in self.domains)

    def setting(self, *keys: str) -> Any:
        """A value of config.yaml by its keys; None when the file or the key is absent."""
        value = yaml.safe_load(self.config) if self.config else None
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def target_vector(self) -> LoglikVector | None:
        """The target's log-likelihoods on the texts that measure (part "measure"), or None when the file is absent."""
        path = self.path / "target.parquet"
        if not path.exists():
            return None
        from lldfast.measure.loglik import LoglikVector

        vector = LoglikVector.load(path)
        return vector.select("measure") if "measure" in set(vector.part) else vector

    def checkpoint_vectors(self, method: Method) -> list[tuple[int, LoglikVector]]:
        """Step and log-likelihoods of every measured step whose file is there."""
        from lldfast.measure.loglik import LoglikVector

        found = []
        for row in method.metrics:
            path = method.folder / str(row.get("loglik") or "")
            if row.get("loglik") and path.exists():
                found.append((int(row["step"]), LoglikVector.load(path)))
        return found


def load_run(run_dir: str | Path) -> Run:
    """Read a run folder.

    Raises:
        InputError: `run_dir` is not a run folder (it has no experiment.json).
        CorruptError: a file is there but is not what its name says; the message names it.
    """
    path = Path(run_dir)
    if not (path / "experiment.json").exists():
        raise InputError(f"{path} is not a run folder: it has no experiment.json")
    experiment = read_json(path / "experiment.json")
    if not isinstance(experiment, dict) or experiment.get("format") != "lldfast-run":
        raise CorruptError(f"{path / 'experiment.json'} is not the description of an lldfast run")
    domains = [str(name) for name in experiment.get("domains") or []]
    if not domains:
        raise CorruptError(f"{path / 'experiment.json'} names no domain")
    notes: list[str] = []
    truth = experiment.get("ground_truth") or None
    if truth is not None:
        _check_names(truth, domains, path / "experiment.json", "ground_truth")
    names = [str(name) for name in experiment.get("methods") or []]
    has_target = bool(experiment.get("target"))
    methods = [_load_method(path / "methods" / name, name, domains, has_target, notes) for name in names]
    rows, base_row, warnings = _load_summary(path, methods, notes)
    config = (path / "config.yaml").read_text(encoding="utf-8") if (path / "config.yaml").exists() else None
    return Run(path, experiment, domains, truth, methods, rows, base_row, warnings, config, notes)


def _load_method(folder: Path, name: str, domains: list[str], has_target: bool, notes: list[str]) -> Method:
    method = Method(name, folder, domains)
    method.metrics = sorted(_read_lines(folder / "metrics.jsonl"), key=lambda row: int(row["step"]))
    method.log = _read_lines(folder / "log.jsonl")
    if not method.metrics and has_target:
        notes.append(f"{name}: no measured step (methods/{name}/metrics.jsonl is absent or empty)")
    path = folder / "weights.json"
    if not path.exists():
        notes.append(f"{name}: no weights file (methods/{name}/weights.json is absent)")
        return method
    file = read_json(path)
    if not isinstance(file, dict) or file.get("format") != "lldfast-weights":
        raise CorruptError(f"{path} is not an lldfast weights file")
    method.weights = _check_names(file.get("weights"), domains, path, "weights")
    if file.get("weights_se"):
        method.weights_se = _check_names(file["weights_se"], domains, path, "weights_se")
    method.rule = str(file.get("rule") or "")
    method.objective = str(file.get("objective") or "ce")
    for stage in file.get("stages") or []:
        mixture = _check_names(stage.get("weights"), domains, path, f"the stage from step {stage.get('from_step')}")
        method.stages.append({"from_step": int(stage["from_step"]), "weights": mixture})
    method.trajectory = sorted(file.get("trajectory") or [], key=lambda point: int(point["step"]))
    method.gram_domains = [str(domain) for domain in file.get("domains") or domains]
    for point in method.trajectory:
        for key in ("delta", "delta_se", "weights"):
            if point.get(key):
                _check_names(point[key], domains, path, f"{key} at step {point['step']}")
        size = len(method.gram_domains)
        if point.get("gram") is not None and np.shape(point["gram"]) != (size, size):
            raise CorruptError(f"{path}: the Gram matrix at step {point['step']} is not {size} by {size}")
    return method


def _load_summary(
    path: Path, methods: list[Method], notes: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None, list[str]]:
    """Rows, base row and warnings of summary.json; without that file, rows from the last measured step of each method."""
    if (path / "summary.json").exists():
        summary = read_json(path / "summary.json")
        if not isinstance(summary, dict) or not isinstance(summary.get("rows"), list):
            raise CorruptError(f"{path / 'summary.json'} has no rows")
        rows = summary["rows"]
        done = {row["method"] for row in rows}
        notes += [f"{method.name} is not in the table: it has not finished" for method in methods if method.name not in done]
        return rows, summary.get("base_row"), [str(text) for text in summary.get("warnings") or []]
    notes.append("summary.json is absent (the run has not finished): the table shows the last measured step of each method")
    rows = []
    for method in methods:
        if method.metrics:
            effective = effective_domains(method.weights) if method.weights else None
            loss = method.log[-1].get("loss") if method.log else None
            rows.append(method.metrics[-1] | {"method": method.name, "effective_domains": effective, "final_loss": loss})
    return rows, None, []


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file, each with its step; none when the file is absent."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise CorruptError(f"{path}: record {number} has no step")
    return rows


def _check_names(values: Any, domains: list[str], path: Path, what: str) -> dict[str, float]:
    """The mapping itself, after checking that it names exactly the run's domains."""
    if not isinstance(values, Mapping):
        raise CorruptError(f"{path}: {what} is not a mapping of domains")
    for name in domains:
        if name not in values:
            raise CorruptError(f"{path}: {what} lacks the domain {name!r}")
    for name in values:
        if name not in domains:
            raise CorruptError(f"{path}: {what} names the domain {name!r}, which is not one of the run's")
    return {name: float(values[name]) for name in domains}
