"""Parts of the report that hold figures. Each adds to a section what the run has, and one line on why the rest is absent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lldfast.errors import InputError, MissingDependencyError
from lldfast.measure.divergence import jsd_matrix
from lldfast.measure.loglik import check_same_texts
from lldfast.measure.modelmap import model_map
from lldfast.report import figures
from lldfast.report.html import Section, absent, card, switch_card, table, text
from lldfast.report.reading import ReportedMethod, ReportedRun
from lldfast.report.style import Mark, method_marks, number, plain, short_labels
from lldfast.weights.equations import aggregate_weights

MOST_DOMAINS = 36  # three figures of 12; the table of weights has all

# How to read each figure, one line under it.
READ = {
    "kl": "Each line is one training run; the lower its right end, the closer it ended to the target.",
    "distilled": ' With "distill" in its name (paper Fig. 7): trained on the teacher\'s distribution of every token.',
    "true_kl": "Exact KL(target || model) per token. Where it orders the methods otherwise than eq. (2), trust this one.",
    "gap": "How much better the target predicts the texts on average; at zero both predict them equally well.",
    "split": "Solid: between domain means, the part that domain weights can steer. Pale: within domains.",
    "bars": "Bars past the dashed line were weighted up.",
    "truth": " Grey: the weights the target was trained on.",
    "errors": " Whiskers: one standard error over texts.",
    "mean": " For a method that estimates while it trains: its mean over the run.",
    "weights": "A panel per domain, on one scale: the weight each method gives it from that step on.",
    "delta": "Delta minus its mean over domains. Above the dashed line: farther behind the target than average, so weighted up.",
    "bands": " Bands: one standard error.",
    "jsd": "Dark: both steps ask for the same mixture. Dark blocks are phases that could each have their own mixture.",
    "means": "On the dashed line it does not matter which mean is used (plain means over steps); the largest are named.",
    "map": "Each trail runs from the base model to a trained one, a dot per measured step; closer to the star is better.",
    "pca": " A squared distance is about the KL of eq. (2); what the two axes leave out is not seen.",
    "tsne": " t-SNE: neighbours are alike, long distances mean nothing.",
    "gram": "Entries of the inverse Gram matrix, which adjusted-LLD applies to Delta; bright off the diagonal: linked domains. "
    "Condition number {}.",
    "loss": "Every loss is on the method's own mixture, so levels do not compare; look for spikes and for where it flattens.",
}

Floats = NDArray[np.float64]
Series = dict[str, tuple[Floats, Floats]]


@dataclass
class Mixture:
    """Weights to draw: of one method, or of several that share them (a pass 1 and the method that stands on it)."""

    label: str
    owner: str
    weights: dict[str, float]
    errors: dict[str, float] | None


@dataclass
class View:
    """What the sections share: the run, each method's mark, the domains worth a panel (largest weights first)."""

    run: ReportedRun
    marks: dict[str, Mark]
    shown: list[str]

    @classmethod
    def of(cls, run: ReportedRun) -> View:
        names = [method.name for method in run.methods]
        uniform = [method.name for method in run.methods if method.uniform]
        oracle = [method.name for method in run.methods if run.is_oracle(method)]
        size = dict.fromkeys(run.domains, 0.0)
        for mixture in [run.truth] if run.truth else [method.weights for method in run.methods]:
            for domain, weight in (mixture or {}).items():
                size[domain] += weight
        shown = sorted(run.domains, key=lambda domain: -size[domain])[:MOST_DOMAINS]
        return cls(run, method_marks(names, uniform, oracle), shown)

    def chunks(self, title: str) -> list[tuple[str, list[str]]]:
        """The shown domains in figures of nearly equal size, at most `PANELS` each, with the title of each figure."""
        count = -(-len(self.shown) // figures.PANELS)
        parts = [list(part) for part in np.array_split(np.array(self.shown, dtype=object), count)]
        return [(title + (f" ({i + 1} of {count})" if count > 1 else ""), part) for i, part in enumerate(parts)]

    def cut(self) -> str:
        """What to say when not every domain has a panel."""
        hidden = len(self.run.domains) - len(self.shown)
        return f" The {hidden} domains with the smallest weights are in the table only." if hidden else ""

    def series(self, key: str) -> Series:
        """Measured `key` over steps of every method that has it."""
        found = {method.name: method.series(key) for method in self.run.methods}
        return {name: points for name, points in found.items() if len(points[0])}

    def estimated(self) -> tuple[list[tuple[ReportedMethod, Floats]], list[str]]:
        """Methods with estimates of their own and their weights [S, K]; a line for each that repeats an earlier one's."""
        kept: list[tuple[ReportedMethod, Floats]] = []
        lines = []
        for method in self.run.methods:
            weights = method.trajectory_of("weights")
            if weights is None:
                continue
            twin = next((other for other, w in kept if other.steps == method.steps and np.array_equal(w, weights)), None)
            if twin is None:
                kept.append((method, weights))
            else:
                lines.append(f'<p class="absent">{text(f"{method.name} has the estimates of {twin.name}")}: drawn once.</p>')
        return kept, lines

    def mixtures(self) -> list[Mixture]:
        """Every mixture of the run once, uniform and reference runs included; a two-stage method has two."""
        found: list[Mixture] = []
        for method in self.run.methods:
            stages = [(f"{method.name} (from step {stage.from_step})", stage.weights) for stage in method.stages]
            for label, weights in stages or ([(method.name, method.weights)] if method.weights else []):
                twin = next((m for m in found if weights and _same(m.weights, weights)), None)
                if twin is not None:
                    twin.label += f", {label}"
                elif weights:
                    found.append(Mixture(label, method.name, weights, None if stages else method.weights_se))
        return found


def add_divergence(section: Section, view: View) -> None:
    """KL over steps (Fig. 5, and 7 with distilled runs), true KL, the gap eq. (2) does not see, the split of what is left."""
    read = READ["kl"] + (READ["distilled"] if any(method.distilled for method in view.run.methods) else "")
    kl, true, gap = view.series("kl"), view.series("true_kl"), view.series("nll_gap")
    if kl:
        label = _final("KL by eq. (2), bits per byte", kl)
        log = figures.curves(kl, view.marks, key="kl-log", label=label, ylabel="bits per byte")
        linear = figures.curves(kl, view.marks, key="kl-linear", label=label, ylabel="bits per byte", log_steps=False)
        choices = {"log steps": log, "linear steps": linear}
        section.cards.append(switch_card("KL to the target, eq. (2)", choices, read, "kl-switch"))
    if true:
        label = _final("True token-level KL, bits per byte", true)
        svg = figures.curves(true, view.marks, key="true-kl", label=label, ylabel="bits per byte")
        section.cards.append(card("True token-level KL to the target", svg, READ["true_kl"]))
    if gap:
        label = _final("Mean gap, bits per byte", gap)
        svg = figures.curves(gap, view.marks, key="gap", label=label, ylabel="bits per byte", may_log=False)
        section.cards.append(card("Mean gap, target minus model", svg, READ["gap"]))
    measured = [row for row in view.run.rows if row.get("kl_between") is not None and row.get("kl_within") is not None]
    split = [(row["method"], row["kl_between"], row["kl_within"]) for row in measured]
    if split:
        label = "; ".join(f"{name}: between {number(between)}, within {number(within)}" for name, between, within in split)
        svg = figures.split_bars(split, view.marks, key="split", label=label)
        section.cards.append(card("What is left at the end, eq. (2)", svg, READ["split"]))
    if not view.run.experiment.get("target"):
        section.body.append(absent("Distance to a target", "this run has no target"))
    elif not kl:
        section.body.append(absent("KL over steps", "no step has been measured"))
    elif not true:
        other = view.run.experiment.get("shared_tokenizer") is False
        why = "the target has another tokenizer" if other else "it was not measured"
        section.body.append(absent("True token-level KL", why))


def add_weights(section: Section, view: View) -> None:
    """Weights by domain against the ground truth (Fig. 4), and all of them as numbers."""
    run, truth = view.run, view.run.truth
    mixtures = view.mixtures()
    even = {method.name for method in run.methods if method.uniform or run.is_oracle(method)}
    drawn = [mixture for mixture in mixtures if mixture.owner not in even]
    if drawn or truth:
        tops = [m.weights[d] + (m.errors[d] if m.errors else 0.0) for m in drawn for d in run.domains]
        limit = 1.04 * max(tops + list((truth or {}).values()))
        caption = READ["bars"] + (READ["truth"] if truth else "")
        caption += READ["errors"] if any(m.errors for m in drawn) else ""
        caption += (READ["mean"] if any(m.trajectory for m in run.methods) else "") + view.cut()
        marks = {m.label: view.marks[m.owner] for m in drawn}
        for turn, (title, part) in enumerate(view.chunks("Weights by domain")):
            label = f"{title}: " + "; ".join(
                f"{d} " + ", ".join(f"{who} {number(w[d], 2)}" for who, w in _named(drawn, truth)) for d in part
            )
            svg = figures.weight_bars(
                part, {m.label: m.weights for m in drawn}, {m.label: m.errors for m in drawn}, truth, marks,
                limit=limit, uniform=1 / len(run.domains), key=f"bars-{turn}", label=label,
            )  # fmt: skip
            section.cards.append(card(title, svg, caption))
    if not drawn:
        why = "every method of this run trained on weights known beforehand" if mixtures else "no weights file is there"
        section.body.append(absent("Estimated weights", why))
    if not truth:
        why = "the run does not know what the target was trained on"
        section.body.append(absent("Comparison with the target's own weights", why))
    if mixtures:
        rows = []
        for domain in sorted(run.domains, key=lambda name: view.shown.index(name) if name in view.shown else len(view.shown)):
            cells = [number(truth[domain])] if truth else []
            for mixture in mixtures:
                error = f" \N{PLUS-MINUS SIGN} {number(mixture.errors[domain], 2)}" if mixture.errors else ""
                cells.append(number(mixture.weights[domain]) + error)
            rows.append([text(domain), *cells])
        head = ["domain", *(["ground truth"] if truth else []), *[text(mixture.label) for mixture in mixtures]]
        numbers = table(head, rows, "Weights by domain")
        section.body.append(f"<details><summary>All weights as numbers</summary>{numbers}</details>")


def add_trajectories(section: Section, view: View) -> None:
    """w and Delta over steps, a panel per domain. Of Delta the part that steers: what it is above its mean over domains."""
    methods, lines = view.estimated()
    if not methods:
        section.body.append(absent("Trajectories of Delta and of the weights", "no method of this run estimated weights"))
        return
    for key, title, unit in (("weights", "Weights over steps", "weight"), ("delta", "Delta over steps", "nats per token")):
        panels: dict[str, tuple[Floats, Floats, Floats | None]] = {}
        for method, _ in methods:
            values = method.trajectory_of(key)
            if values is not None:
                error = method.trajectory_of("delta_se") if key == "delta" else None
                values = values - values.mean(axis=1, keepdims=True) if key == "delta" else values
                panels[method.name] = (np.array(method.steps, dtype=np.float64), values, error)
        if not panels:
            section.body.append(absent(title, "the weights files do not store it"))
            continue
        reference = view.run.truth if key == "weights" else dict.fromkeys(view.run.domains, 0.0)
        every = np.array([*(reference or {}).values(), *(x for _, values, _ in panels.values() for x in values.flat)])
        low, high = float(every.min()), float(every.max())
        if key == "weights":
            low = max(low, high / 1000)  # a weight of almost nothing would flatten every panel
        banded = any(error is not None for _, _, error in panels.values())
        dashed = " Dashed: the target's own." if key == "weights" and reference else ""
        caption = READ[key] + dashed + (READ["bands"] if banded else "") + view.cut()
        for turn, (name, part) in enumerate(view.chunks(title)):
            index = [view.run.domains.index(domain) for domain in part]
            chosen = {who: (s, v[:, index], None if e is None else e[:, index]) for who, (s, v, e) in panels.items()}
            svg = figures.small_multiples(
                part, chosen, view.marks, reference, span=(low, high), ylabel=unit,
                reference_label="ground truth" if key == "weights" else "mean of all domains",
                key=f"multi-{key}-{turn}", label=f"{name}: a panel per domain, a line per method ({', '.join(chosen)})",
            )  # fmt: skip
            section.cards.append(card(name, svg, caption))
    section.body += lines


def add_stability(section: Section, view: View) -> None:
    """JSD between steps (Fig. 10) and geometric against arithmetic mean (Fig. 9)."""
    methods, _ = view.estimated()
    several = [(method, weights, jsd_matrix(weights)) for method, weights in methods if len(weights) > 1]
    if not several:
        why = "weights were estimated at one step only" if methods else "no method of this run estimated weights"
        section.body.append(absent("Divergence between steps, and means over steps", why))
        return
    top = max(float(matrix.max()) for _, _, matrix in several)
    for place, (method, weights, matrix) in enumerate(several):
        label = f"{method.name}: Jensen-Shannon divergence of the weights of every two steps, up to {number(matrix.max())} nats"
        ticks = [plain(step) for step in method.steps]
        svg = figures.heat_map(matrix, ticks, key=f"jsd-{place}", label=label, bar="JSD, nats", axis="training step", top=top)
        section.cards.append(card(f"{method.name}: change between steps", svg, READ["jsd"]))
        title = f"{method.name}: two ways to average"
        if ((weights == 0).any(axis=0) & (weights > 0).any(axis=0)).any():
            section.body.append(absent(title, "a domain's weight is exactly 0 at some steps, and its geometric mean with it"))
            continue
        geometric, arithmetic = (np.asarray(aggregate_weights(weights, method=kind)) for kind in ("geometric", "arithmetic"))
        largest = number(float(np.abs(geometric - arithmetic).max()), 2)
        label = f"{method.name}: geometric against arithmetic mean of the weights, largest difference {largest}"
        svg = figures.mean_scatter(geometric, arithmetic, view.run.domains, key=f"means-{place}", label=label)
        section.cards.append(card(title, svg, READ["means"]))


def add_map(section: Section, view: View, method: str = "pca") -> None:
    """Model map with training trails (Fig. 1)."""
    target = view.run.target_vector()
    if target is None:
        section.body.append(absent("Model map", "target.parquet is absent"))
        return
    vectors: list[Any] = [target]
    names: list[str] = ["target"]
    steps: list[int | None] = [None]
    missing = 0
    for run_method in view.run.methods:
        found = view.run.checkpoint_vectors(run_method)
        missing += len(run_method.metrics) - len(found)
        for step, vector in found:
            try:
                check_same_texts(vector, target)
            except InputError:
                why = f"{run_method.name} at step {step} was scored on other texts than the target"
                section.body.append(absent("Model map", why))
                return
            vectors.append(vector)
            names.append(f"method {run_method.name}")  # a method may be called "target"
            steps.append(step)
    if missing:
        section.body.append(absent(f"{missing} measured steps", "their log-likelihood files are absent"))
    if len(vectors) == 1:
        section.body.append(absent("Model map", "no log-likelihood file of a checkpoint is there"))
        return
    try:
        points = model_map(
            vectors, names, steps, method=method, mean_bytes=float(np.mean(target.n_bytes)), allow_differences=True
        )
    except (InputError, MissingDependencyError) as error:
        section.body.append(absent("Model map", str(error)))
        return
    trails = {m.name: points.trail(f"method {m.name}") for m in view.run.methods if f"method {m.name}" in names}
    ends = ", ".join(f"{name} {number(float(np.linalg.norm(xy[-1] - points.xy[0])))}" for name, (_, xy) in trails.items())
    label = f"Model map; distance of each run's end from the target: {ends}"
    svg = figures.map_figure(trails, points.xy[0], view.marks, points.explained, unit=points.unit, key="map", label=label)
    section.cards.append(card("Model map with training trails", svg, READ["map"] + READ[method]))


def add_gram(section: Section, view: View) -> None:
    """Absolute entries of G^-1 (Fig. 6), first and last stored estimate of each method."""
    stored = False
    for place, method in enumerate(view.run.methods):
        grams = method.grams()
        infos = {estimate.step: estimate.gram_info or {} for estimate in method.trajectory}
        ticks = [f"{name} {i + 1}" for i, name in enumerate(short_labels(method.gram_domains).values())]
        for step, gram in [grams[0], grams[-1]] if len(grams) > 1 else grams:
            condition = float(np.linalg.cond(gram))
            inverse = np.abs(np.linalg.pinv(gram, hermitian=True))
            label = f"{method.name}, step {step}: absolute inverse Gram matrix, condition number {number(condition)}"
            bar = "|entry|, log scale"
            svg = figures.heat_map(inverse, ticks, key=f"gram-{place}-{step}", label=label, bar=bar, decades=2.0)
            pseudo = "" if condition < 1e12 else " G is singular to working precision: this is its pseudo-inverse."
            title = f"{method.name}: |G\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT ONE}| at step {step}"
            caption = READ["gram"].format(number(condition)) + pseudo + _gram_note(infos[step])
            section.cards.append(card(title, svg, caption))
            stored = True
    if not stored:
        why = "no method of this run stored a Gram matrix (adjusted-LLD does)"
        section.body.append(absent("Inverse Gram matrix of the domain gradients", why))


def _gram_note(info: dict[str, Any]) -> str:
    """How G was estimated, and how far that puts v = G^-1 Delta off; "" in files that do not say."""
    if not info.get("mode"):
        return ""
    size = f" with {info['k']:,} numbers a row" if info.get("k") else ""
    error = "unknown" if info.get("expected_error") is None else f"about {number(100 * info['expected_error'], 2)} %"
    return f" Estimated in mode {info['mode']}{size}; what that puts the inverse's product with Delta off: {error}."


def add_loss(section: Section, view: View) -> None:
    """Training loss of every method."""
    series: Series = {}
    for method in view.run.methods:
        points = np.array([(row["step"], row["loss"]) for row in method.log if row.get("loss") is not None], dtype=np.float64)
        if len(points):
            series[method.name] = _thin(points)
    if not series:
        section.body.append(absent("Training loss", "no training log is there"))
        return
    label = _final("Training loss, nats per token", series)
    svg = figures.curves(series, view.marks, key="loss", label=label, ylabel="nats per token", log_steps=False, markers=False)
    section.cards.append(card("Training loss", svg, READ["loss"]))


def _thin(points: Floats, most: int = 250) -> tuple[Floats, Floats]:
    """At most `most` points: means over equal runs of records."""
    means = np.array([part.mean(axis=0) for part in np.array_split(points, min(most, len(points)))])
    return means[:, 0], means[:, 1]


def _final(what: str, series: Series) -> str:
    return f"{what}, at the last step: " + ", ".join(f"{name} {number(float(y[-1]))}" for name, (_, y) in series.items())


def _same(a: dict[str, float], b: dict[str, float]) -> bool:
    return all(abs(a[name] - b[name]) < 1e-9 for name in a)


def _named(mixtures: list[Mixture], truth: dict[str, float] | None) -> list[tuple[str, dict[str, float]]]:
    named = [(mixture.label, mixture.weights) for mixture in mixtures]
    return [("ground truth", truth), *named] if truth else named
