"""`write_report`: one HTML file that shows a run, readable without a network, on a phone as on a desktop.

The page says first what came out, in one sentence, then shows every measure beside the others: eq. (2) alone can mislead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lldfast.errors import InputError
from lldfast.files import atomic_path
from lldfast.report import sections as parts
from lldfast.report.html import Section, absent, key_values, page, table, text
from lldfast.report.reading import ReportedRun, load_run
from lldfast.report.sections import View
from lldfast.report.style import number

# key in summary.json, heading, unit, and which value is best: "low", "zero" (nearest to it) or "" (no order)
COLUMNS = [
    ("kl", "KL, eq. (2)", "bits/byte", "low"),
    ("kl_between", "between domains", "bits/byte", "low"),
    ("kl_within", "within domains", "bits/byte", "low"),
    ("true_kl", "true KL", "bits/byte", "low"),
    ("nll_gap", "mean gap", "bits/byte", "zero"),
    ("weight_kl", "KL of weights to truth", "nats", "low"),
    ("effective_domains", "effective domains", "number", ""),
    ("final_loss", "final loss", "nats/token", ""),
    ("wall_s", "time", "", ""),
]


def write_report(run_dir: str | Path, out: str | Path | None = None, *, map_method: str | None = None) -> Path:
    """Write the report of a run folder as one self-contained HTML file, and return its path.

    Parts the folder lacks (no ground truth, no Gram matrices, a single method, a run that has not finished) are named in one
    line each where they would stand. The same folder gives the same bytes.

    Args:
        run_dir: a run folder.
        out: the file to write, atomically; `run_dir`/report.html by default.
        map_method: "pca" or "tsne" (needs scikit-learn), see `lldfast.measure.modelmap.model_map`; by default what `log.map`
            of the run's settings says, else "pca".

    Raises:
        InputError: `run_dir` is not a run folder, or `map_method` is unknown.
        CorruptError: a file of the folder is damaged; the message names it.
        WriteError: the file cannot be written.
    """
    if map_method not in (None, "pca", "tsne"):
        raise InputError(f"report: unknown map method {map_method!r}; known: pca, tsne")
    run = load_run(run_dir)
    view = View.of(run)
    distance = Section(
        "distance",
        "Distance to the target during training",
        "Lower is closer. Eq. (2) is half the variance over texts of the log-likelihood difference, so it does not see a shift "
        "that all texts share: the mean gap shows that one. True KL compares the next-token distributions themselves.",
    )
    parts.add_divergence(distance, view)
    parts.add_map(distance, view, map_method or run.setting("log", "map") or "pca")
    parts.add_loss(distance, view)
    weights = Section("weights", "Domain weights")
    parts.add_weights(weights, view)
    parts.add_trajectories(weights, view)
    inside = Section("estimates", "Inside the estimates", "How the weights change and may be averaged, and how domains interact.")
    parts.add_stability(inside, view)
    parts.add_gram(inside, view)
    content = [summary_section(run), distance, weights, inside, disclosure_section(run), provenance_section(run)]
    path = Path(out) if out is not None else run.folder.report
    html = page(f"{_name(run)}: lldfast report", _header(run), content)
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def headline(run: ReportedRun) -> str:
    """The answer in one sentence of plain text: best method by eq. (2), before and after, against uniform weights.

    Training on the ground truth's weights is a reference and never the answer.
    """
    oracles = {method.name for method in run.methods if run.is_oracle(method)}
    uniforms = {method.name for method in run.methods if method.uniform}
    rows = [row for row in run.rows if row.get("kl") is not None and row["method"] not in oracles]
    if not rows:
        return "Nothing has been measured yet." if run.experiment.get("target") else "Trained without a target."
    best = min(rows, key=lambda row: row["kl"])
    uniform = next((row for row in rows if row["method"] in uniforms), None)
    target = _identity_name(run.experiment.get("target")) or "the target"
    before = _start(run, best["method"])
    went = f"from {number(before)} to {number(best['kl'])}" if before is not None else f"to {number(best['kl'])}"
    change = f"KL by eq. (2) went {went} bits per byte in {_steps(run)}"
    if uniform is None:
        return f"{best['method']} came closest to {target}: {change}; there is no run with uniform weights to compare with."
    if len(rows) == 1:
        return f"Only uniform weights were trained: their {change}, towards {target}."
    if best is uniform:
        other = min((row for row in rows if row is not uniform), key=lambda row: row["kl"])
        return (
            f"No mixture came closer to {target} than uniform weights: their {change}, "
            f"against {number(other['kl'])} with the best other one ({other['method']})."
        )
    saved = 1 - best["kl"] / uniform["kl"] if uniform["kl"] > 0 else 0.0
    return (
        f"{best['method']} came closest to {target}: {change}, "
        f"{saved:.0%} less than with uniform weights ({number(uniform['kl'])})."
    )


def summary_section(run: ReportedRun) -> Section:
    """Warnings and the table of all measures."""
    section = Section("summary", "Summary")
    if run.warnings:
        section.body.append('<ul class="warnings">' + "".join(f"<li>{text(line)}</li>" for line in run.warnings) + "</ul>")
    section.body += [f'<p class="absent">{text(note)}.</p>' for note in run.notes]
    if not run.rows:
        section.body.append(absent("Table of measures", "no method has been measured"))
        return section
    oracles = {method.name for method in run.methods if run.is_oracle(method)}
    best = {key: _best([row for row in run.rows if row["method"] not in oracles], key, order) for key, _, _, order in COLUMNS}
    shown = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in run.rows)]
    head = ["method", *[f"{text(title)}<small>{unit}</small>" for _, title, unit, _ in shown]]
    body = []
    for row in run.rows:
        name = text(row["method"]) + (" <small>(reference)</small>" if row["method"] in oracles else "")
        cells = []
        for key, _, _, _ in shown:
            value = duration(row.get(key)) if key == "wall_s" else number(row.get(key))
            if key == "kl" and row.get("kl_se") is not None:
                value += f" \N{PLUS-MINUS SIGN} {number(row['kl_se'], 2)}"
            cells.append(f'<span class="best">{value}</span>' if row["method"] in best[key] else value)
        body.append([name, *cells])
    if run.base_row:
        before = [duration(None) if key == "wall_s" else number(run.base_row.get(key)) for key, _, _, _ in shown]
        body.append([text(run.base_row.get("method") or "base (step 0)"), *before])
    section.body.append(table(head, body, "Measures of every method after its last step"))
    hidden = [title for key, title, _, _ in COLUMNS if all(row.get(key) is None for row in run.rows)]
    note = "Shaded: the best of the column. " if any(best.values()) else ""
    note += "The gap is target minus model, best at zero. Losses are on each method's own mixture."
    if any(row.get("kl_se") is not None for row in run.rows):
        note += " \N{PLUS-MINUS SIGN}: one standard error over texts, for one training run."
    if oracles:
        note += " Reference: trained on the target's own weights, which a real use does not know."
    if hidden:
        note += f" Not measured: {', '.join(hidden)}."
    section.body.append(f'<p class="aside">{text(note)}</p>')
    return section


def disclosure_section(run: ReportedRun) -> Section:
    """Whether a target model shaped the weights, and under which licence: what must be said with a recipe that is passed on."""
    section = Section("disclosure", "Disclosure")
    target: Mapping[str, Any] = run.experiment.get("target") or {}
    used = [method.name for method in run.methods if method.estimated]
    fixed = [method.name for method in run.methods if not method.estimated]
    lines = [str(run.experiment["disclosure"])] if run.experiment.get("disclosure") else []
    if used:
        lines.append(f"Weights estimated with the target model: {', '.join(used)}.")
    if fixed:
        lines.append(f"Weights that owe nothing to an estimate: {', '.join(fixed)}.")
    distilled = [method.name for method in run.methods if method.distilled]
    if distilled:
        lines.append(f"Models trained on a teacher's distributions: {', '.join(distilled)}.")
    if target:
        licence = target.get("licence") or "not recorded; look it up before you publish weights or a model trained on them"
        lines.append(f"Target: {_identity_name(target) or 'without a recorded name'}. Its licence: {licence}.")
    elif used:
        lines.append("The run does not record which target model that was.")
    section.body.append('<div class="disclosure">' + "".join(f"<p>{text(line)}</p>" for line in lines) + "</div>")
    return section


def provenance_section(run: ReportedRun) -> Section:
    """Settings, and everything needed to make the run again."""
    section = Section("provenance", "Settings and provenance")
    elsewhere = ("ground_truth", "disclosure", "domains", "format")
    known = {key: value for key, value in run.experiment.items() if key not in elsewhere}
    rules = {method.name: f"{method.rule}, {len(method.trajectory)} estimates" for method in run.methods if method.rule}
    origin = key_values({**known, "domains": run.domains, **({"rule": rules} if rules else {})}, "Provenance")
    section.body.append(f"<details><summary>Provenance: models, corpus, versions</summary>{origin}</details>")
    if run.config is None:
        section.body.append(absent("Settings", "config.yaml is absent"))
    else:
        section.body.append(f"<details><summary>Settings (config.yaml)</summary><pre>{text(run.config)}</pre></details>")
    return section


def duration(seconds: float | None) -> str:
    """Wall time for people: 48 s, 12 min 3 s, 5 h 2 min."""
    if seconds is None:
        return "\N{EN DASH}"
    whole = round(seconds)
    if whole < 60:
        return f"{number(seconds, 2) if seconds < 10 else whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _header(run: ReportedRun) -> str:
    experiment = run.experiment
    facts = {
        "base": _identity_name(experiment.get("base")),
        "target": _identity_name(experiment.get("target")),
        "steps": experiment.get("steps"),
        "tokens per step": f"{experiment['tokens_per_step']:,}" if isinstance(experiment.get("tokens_per_step"), int) else None,
        "domains": len(run.domains),
        "evaluation texts": (experiment.get("corpus") or {}).get("n_texts"),
        "seed": experiment.get("seed"),
        "made": str(experiment.get("created") or "")[:10],
    }
    items = "".join(f"<li>{text(key)} <b>{text(value)}</b></li>" for key, value in facts.items() if value not in (None, ""))
    asides = "".join(f'<p class="aside">{text(line)}</p>' for line in _second_thoughts(run))
    return f'<h1>{text(_name(run))}</h1><p class="answer">{text(headline(run))}</p>{asides}<ul class="facts">{items}</ul>'


def _second_thoughts(run: ReportedRun) -> list[str]:
    """What qualifies the headline: another order by true KL, the reference run, a single seed."""
    oracles = {method.name for method in run.methods if run.is_oracle(method)}
    rows = [row for row in run.rows if row["method"] not in oracles]
    lines = []
    by_kl, by_true = _best(rows, "kl", "low"), _best(rows, "true_kl", "low")
    if by_true and len(rows) > 1:
        values = ", ".join(f"{row['method']} {number(row['true_kl'])}" for row in rows if row.get("true_kl") is not None)
        agree = "agrees" if by_true & by_kl else "does not agree"
        lines.append(f"True token-level KL {agree} on the best method (bits per byte: {values}).")
    reference = next((row for row in run.rows if row["method"] in oracles and row.get("kl") is not None), None)
    if reference:
        lines.append(f"For reference, training on the target's own weights ends at {number(reference['kl'])} bits per byte.")
    if len(rows) > 1:
        lines.append("One training run per method: repeat it with other seeds before trusting a small difference.")
    return lines


def _best(rows: list[dict[str, Any]], key: str, order: str) -> set[str]:
    """Names of the methods with the best value of a column; none when the column has no order or all values are equal."""
    values = {row["method"]: abs(row[key]) if order == "zero" else row[key] for row in rows if row.get(key) is not None}
    if not order or len(set(values.values())) < 2:
        return set()
    return {name for name, value in values.items() if value == min(values.values())}


def _start(run: ReportedRun, name: str) -> float | None:
    """KL before training: of the base row, else of the method's own step 0."""
    if run.base_row and run.base_row.get("kl") is not None:
        return float(run.base_row["kl"])
    method = next((method for method in run.methods if method.name == name), None)
    first = method.metrics[0] if method and method.metrics else {}
    return float(first["kl"]) if first.get("step") == 0 and first.get("kl") is not None else None


def _identity_name(identity: Any) -> str:
    if isinstance(identity, Mapping):
        return str(identity.get("name") or identity.get("source") or "")
    return str(identity or "")


def _name(run: ReportedRun) -> str:
    return str(run.experiment.get("name") or run.folder.path.resolve().name)


def _steps(run: ReportedRun) -> str:
    steps = run.experiment.get("steps")
    return f"{steps:,} steps" if isinstance(steps, int) else "this run"
