"""The answer of a run as a table: every method's distance to the target, and warnings where the measures disagree."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from lldfast.errors import CorruptError
from lldfast.files import read_json, write_json
from lldfast.measure.divergence import finite, weight_kl
from lldfast.run.folder import RunFolder
from lldfast.run.log import read_jsonl
from lldfast.terminal import aligned
from lldfast.weights.file import WeightsFile
from lldfast.weights.simplex import effective_domains

COLUMNS = [
    ("method", "method", "{}"),
    ("kl", "KL eq.(2)", "{:.2f}"),
    ("kl_se", "+- texts", "{:.2f}"),
    ("kl_between", "between", "{:.2f}"),
    ("kl_within", "within", "{:.2f}"),
    ("true_kl", "true KL", "{:.4f}"),
    ("nll_gap", "NLL gap", "{:+.4f}"),
    ("weight_kl", "KL(w||truth)", "{:.3f}"),
    ("effective_domains", "eff. domains", "{:.1f}"),
    ("wall_s", "wall s", "{:.0f}"),
]


def summarise(path: str | Path) -> dict[str, Any]:
    """Collect the finished methods of a run folder into rows, write summary.json, and return it.

    Raises:
        InputError: `path` is not a run folder.
        CorruptError: a file in it is damaged; it is named.
    """
    run = RunFolder(path)
    experiment = read_json(run.experiment)
    if not isinstance(experiment, dict) or not isinstance(experiment.get("methods"), list) or "ground_truth" not in experiment:
        raise CorruptError(f"{run.experiment} is not what a run writes: methods or ground_truth is missing")
    rows, base_row, unstable = [], None, []
    unlike: list[str] = []
    for name in experiment["methods"]:
        folder = run.method(name)
        if not folder.finished:
            continue
        result, weights = read_json(folder.result), WeightsFile.load(folder.weights).weights
        if not isinstance(result, dict) or "seconds" not in result:
            raise CorruptError(f"{folder.result} is not what a run writes: seconds is missing")
        log = read_jsonl(folder.log)
        truth = experiment["ground_truth"]
        row = {
            "method": name,
            **{key: result.get(key) for key in ("kl", "kl_se", "kl_between", "kl_within", "true_kl", "nll_gap")},
            # of the fixed recipe, which is what a user takes away (a pass 1 used moving weights)
            "weight_kl": None if truth is None else finite(weight_kl(weights, truth)),
            "effective_domains": effective_domains(weights),
            "final_loss": log[-1]["loss"] if log else None,
            "max_grad_norm": max((record["grad_norm"] for record in log), default=None),
            "wall_s": result["seconds"],
        }
        rows.append(row)
        unstable += instability(name, log)
        unlike = unlike or not_scored_alike(result)
        first = next(iter(read_jsonl(folder.metrics)), None)
        if base_row is None and first is not None and first["step"] == 0:
            base_row = {**dict.fromkeys(row), **first, "method": "base (step 0)", "weight_kl": None}
            for of_one_step in ("loglik", "conditions"):
                base_row.pop(of_one_step, None)
    summary = {"rows": rows, "base_row": base_row, "warnings": unlike + disagreements(rows) + unstable}
    write_json(run.summary, summary)
    return summary


def not_scored_alike(result: dict[str, Any]) -> list[str]:
    """A sentence when target and base were scored in different ways, with what that alone is worth in the unit of eq. (2)."""
    conditions = result.get("conditions")
    if not conditions:
        return []
    parts = []
    for difference in conditions:
        floor = "" if difference["floor"] is None else f" ({difference['floor']:g} nats per text for that alone)"
        parts.append(difference["sentence"] + floor)
    return [f"target and base were not scored alike: {'; '.join(parts)}; a smaller distance says nothing of the models"]


def disagreements(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences about pairs of methods that eq. (2) and the true KL put in opposite order, and about their scale."""
    warnings = []
    measured = [row for row in rows if row["kl"] is not None and row["true_kl"] is not None]
    for a, b in itertools.combinations(measured, 2):
        by_kl, by_true = a["kl"] - b["kl"], a["true_kl"] - b["true_kl"]
        clear = abs(by_kl) > math.hypot(a["kl_se"], b["kl_se"]) and abs(by_true) > 0.02 * min(a["true_kl"], b["true_kl"])
        if clear and by_kl * by_true < 0:
            near, far = (a, b) if by_kl < 0 else (b, a)
            warnings.append(
                f"the measures disagree: by eq. (2) {near['method']} is closer to the target than {far['method']} "
                f"({near['kl']:.2f} < {far['kl']:.2f} bits/byte), by true KL it is farther "
                f"({near['true_kl']:.3f} > {far['true_kl']:.3f})"
            )
    scale = [row["kl"] / row["true_kl"] for row in measured if row["true_kl"] > 0]
    if scale and max(scale) > 10:
        warnings.append(
            f"eq. (2) is {min(scale):.0f} to {max(scale):.0f} times the true KL here: between models this far apart it ranks, "
            "it does not measure; read it beside the true KL and the NLL gap"
        )
    if not measured and any(row["kl"] is not None for row in rows):
        warnings.append(
            "no true KL: the target does not share the base's tokenizer, or there is none. Eq. (2) is blind to a shift that "
            "is the same for all texts, so read it beside the NLL gap"
        )
    return warnings


def instability(name: str, log: list[dict[str, Any]]) -> list[str]:
    """A sentence when the loss rose for good, or the gradient spiked late in the run."""
    if len(log) < 20:
        return []
    tail = len(log) // 10
    best = min(sum(r["loss"] for r in log[i : i + tail]) / tail for i in range(len(log) - tail + 1))
    end = sum(r["loss"] for r in log[-tail:]) / tail
    late = sorted(r["grad_norm"] for r in log[len(log) // 2 :])
    found = []
    if late[-1] > 20 * late[len(late) // 2]:
        found.append(
            f"{name}: the gradient norm reached {late[-1]:.1f} late in the run (median {late[len(late) // 2]:.2f}): unstable"
        )
    if end > 1.5 * best and end > best + 1:
        found.append(
            f"{name}: the loss ended at {end:.2f} after it had been {best:.2f}: diverged, or the mixture moved to harder text"
        )
    return found


def table(summary: dict[str, Any]) -> str:
    """The summary as aligned plain text, columns nobody measured left out."""
    rows = ([summary["base_row"]] if summary["base_row"] else []) + summary["rows"]
    columns = [c for c in COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    cells = [[title for _, title, _ in columns]]
    for row in rows:
        cells.append(["-" if row.get(key) is None else form.format(row[key]) for key, _, form in columns])
    lines = aligned(cells)
    lines.insert(1, "-" * len(lines[0]))
    unit = "KL and NLL gap in bits/byte on texts that no weight was estimated on; KL(w||truth) in nats; closer to 0 is nearer"
    return "\n".join([*lines, unit, *(f"warning: {warning}" for warning in summary["warnings"])])
