"""The run folder as the report reads it: every part that is there, and one plain line for every part that is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from lldfast.errors import CorruptError, InputError
from lldfast.files import read_json
from lldfast.measure.loglik import LoglikVector
from lldfast.run.folder import MethodFolder, RunFolder
from lldfast.run.log import read_jsonl
from lldfast.weights.file import Estimate, Stage, WeightsFile
from lldfast.weights.simplex import effective_domains


@dataclass
class ReportedMethod:
    """One training run of the comparison. `weights` is None when its weights file is absent."""

    name: str
    folder: MethodFolder
    domains: list[str]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, float] | None = None
    weights_se: dict[str, float] | None = None
    rule: str = ""
    stages: list[Stage] = field(default_factory=list)
    trajectory: list[Estimate] = field(default_factory=list)
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
        return [estimate.step for estimate in self.trajectory]

    def series(self, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps and values of one measured quantity of metrics.jsonl; steps without it are left out."""
        points = [(row["step"], row[key]) for row in self.metrics if row.get(key) is not None]
        table = np.array(points, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def trajectory_of(self, key: str) -> NDArray[np.float64] | None:
        """`delta`, `delta_se` or `weights` over the estimates, [S, K] in the order of `domains`; None if any step lacks it."""
        found = [getattr(estimate, key) for estimate in self.trajectory]
        if not found or any(not values for values in found):
            return None
        return np.array([[values[domain] for domain in self.domains] for values in found], dtype=np.float64)

    def grams(self) -> list[tuple[int, NDArray[np.float64]]]:
        """Step and Gram matrix [K, K] (order of `gram_domains`) of every estimate that stored one."""
        return [(e.step, np.array(e.gram, dtype=np.float64)) for e in self.trajectory if e.gram is not None]


@dataclass
class ReportedRun:
    """A run folder. `notes` says, one line each, what is absent or incomplete."""

    folder: RunFolder
    experiment: dict[str, Any]
    domains: list[str]
    truth: dict[str, float] | None
    methods: list[ReportedMethod]
    rows: list[dict[str, Any]]
    base_row: dict[str, Any] | None
    warnings: list[str]
    config: str | None
    notes: list[str]

    def is_oracle(self, method: ReportedMethod) -> bool:
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
        if not self.folder.target.exists():
            return None
        vector = LoglikVector.load(self.folder.target)
        return vector.select("measure") if "measure" in set(vector.part) else vector

    def checkpoint_vectors(self, method: ReportedMethod) -> list[tuple[int, LoglikVector]]:
        """Step and log-likelihoods of every measured step whose file is there."""
        found = []
        for row in method.metrics:
            path = method.folder.path / str(row.get("loglik") or "")
            if row.get("loglik") and path.exists():
                found.append((int(row["step"]), LoglikVector.load(path)))
        return found


def load_run(run_dir: str | Path) -> ReportedRun:
    """Read a run folder.

    Raises:
        InputError: `run_dir` is not a run folder (it has no experiment.json).
        CorruptError: a file is there but is not what its name says; the message names it.
    """
    folder = RunFolder(run_dir)
    if not folder.experiment.exists():
        raise InputError(f"{folder} is not a run folder: it has no experiment.json")
    experiment = read_json(folder.experiment)
    if not isinstance(experiment, dict) or experiment.get("format") != "lldfast-run":
        raise CorruptError(f"{folder.experiment} is not the description of an lldfast run")
    domains = [str(name) for name in experiment.get("domains") or []]
    if not domains:
        raise CorruptError(f"{folder.experiment} names no domain")
    notes: list[str] = []
    truth = experiment.get("ground_truth") or None
    if truth is not None:
        truth = _in_order(truth, domains, folder.experiment, "ground_truth")
    names = [str(name) for name in experiment.get("methods") or []]
    has_target = bool(experiment.get("target"))
    methods = [_load_method(folder.method(name), domains, has_target, notes) for name in names]
    rows, base_row, warnings = _load_summary(folder, methods, notes)
    config = folder.config.read_text(encoding="utf-8") if folder.config.exists() else None
    return ReportedRun(folder, experiment, domains, truth, methods, rows, base_row, warnings, config, notes)


def _load_method(folder: MethodFolder, domains: list[str], has_target: bool, notes: list[str]) -> ReportedMethod:
    name = folder.name
    method = ReportedMethod(name, folder, domains)
    method.metrics = sorted(_read_lines(folder.metrics), key=lambda row: int(row["step"]))
    method.log = _read_lines(folder.log)
    if not method.metrics and has_target:
        notes.append(f"{name}: no measured step (methods/{name}/metrics.jsonl is absent or empty)")
    if not folder.weights.exists():
        notes.append(f"{name}: no weights file (methods/{name}/weights.json is absent)")
        return method
    file = WeightsFile.load(folder.weights)
    method.weights = _in_order(file.weights, domains, folder.weights, "weights")
    method.weights_se, method.rule, method.objective = file.weights_se, file.rule or "", file.objective or "ce"
    method.stages, method.trajectory, method.gram_domains = file.stages, file.trajectory, file.domains
    return method


def _load_summary(
    folder: RunFolder, methods: list[ReportedMethod], notes: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None, list[str]]:
    """Rows, base row and warnings of summary.json; without that file, rows from the last measured step of each method."""
    if folder.summary.exists():
        summary = read_json(folder.summary)
        if not isinstance(summary, dict) or not isinstance(summary.get("rows"), list):
            raise CorruptError(f"{folder.summary} has no rows")
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


def _in_order(values: Any, domains: list[str], path: Path, what: str) -> dict[str, float]:
    """The mapping in the order of the run's domains, after checking that it names exactly those."""
    if not isinstance(values, Mapping):
        raise CorruptError(f"{path}: {what} is not a mapping of domains")
    for name in domains:
        if name not in values:
            raise CorruptError(f"{path}: {what} lacks the domain {name!r}")
    for name in values:
        if name not in domains:
            raise CorruptError(f"{path}: {what} names the domain {name!r}, which is not one of the run's")
    return {name: float(values[name]) for name in domains}
