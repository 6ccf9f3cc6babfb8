"""The report of a run folder. `build_run` writes a synthetic but realistic folder; the variants take parts of it away."""

from __future__ import annotations

import html
import html.parser
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lldfast.errors import CorruptError, InputError
from lldfast.files import read_json, write_json
from lldfast.measure.divergence import kl, nll_gap, weight_kl
from lldfast.measure.loglik import LoglikVector
from lldfast.report.page import duration, headline, write_report
from lldfast.report.reading import load_run
from lldfast.report.style import number
from lldfast.weights.equations import adjusted_lld_weights, aggregate_weights, lld_weights
from lldfast.weights.simplex import effective_domains

PILE = [
    "ArXiv", "DM Mathematics", "Enron Emails", "FreeLaw", "Github", "HackerNews", "NIH ExPorter", "PhilPapers", "Pile-CC",
    "PubMed Abstracts", "StackExchange", "Wikipedia (en)", "USPTO Backgrounds", "PubMed Central", "Gutenberg (PG-19)",
    "EuroParl", "Ubuntu IRC", "OpenSubtitles", "BookCorpus2", "YoutubeSubtitles", "OpenWebText2", "Books3",
]  # fmt: skip
STEPS = [0, 1, 2, 4, 8, 16, 64, 256, 512, 900]
METHODS = ["uniform", "iterative", "adjusted", "aggregated", "ground-truth"]
SPEED = {"uniform": 0.35, "iterative": 0.62, "adjusted": 0.8, "aggregated": 0.58, "ground-truth": 0.86}


def build_run(
    folder: Path,
    *,
    methods: list[str] | None = None,
    domains: list[str] | None = None,
    steps: list[int] | None = None,
    truth: bool = True,
    gram: bool = True,
    errors: bool = True,
    shared_tokenizer: bool = True,
    licence: str | None = "Apache-2.0",
    target_name: str = "code-gpt (demo)",
    texts_per_domain: int = 12,
) -> Path:
    """A run folder as `lldfast train` writes it: models drift from a base towards a code-heavy target, at a speed per method."""
    methods, domains, steps = methods or METHODS[:3], domains or PILE[:12], steps or STEPS
    rng = np.random.default_rng(7)
    count, k = texts_per_domain * len(domains), len(domains)
    domain = np.repeat(np.array(domains, dtype=object), texts_per_domain)
    n_bytes = rng.integers(300, 1024, count)
    n_tokens = (n_bytes * 0.3).astype(np.int64)
    part = np.array(["estimate", "measure"] * (count // 2), dtype=object)
    text_hash = np.arange(count, dtype=np.uint64)
    ease = rng.normal(0, 0.4, k)
    preference = np.array([2.2 if "Git" in d or "Stack" in d else rng.normal(0, 0.7) for d in domains])
    true_weights = np.exp(preference) / np.exp(preference).sum()
    spread = np.log(true_weights * k)

    def vector(progress: float, skew: float, noise: float, seed: int) -> LoglikVector:
        own = np.random.default_rng(seed)
        per_token = -10.8 + 6.5 * progress + ease + 0.55 * skew * spread
        logprob = np.repeat(per_token, texts_per_domain) * n_tokens + own.normal(0, noise, count) * np.sqrt(n_tokens)
        meta = {"model": {"name": "synthetic"}, "evalset_hash": "0"}
        return LoglikVector(logprob, domain, n_tokens, n_bytes, part, text_hash, meta)

    target = vector(1.0, 1.0, 1.2, 1)
    folder.mkdir(parents=True)
    target.save(folder / "target.parquet")
    config = {"out": "runs/demo", "methods": methods, "seed": 3, "lld": {"tau": 1.0}, "log": {"map": "pca"}}
    (folder / "config.yaml").write_text("# settings\n" + json.dumps(config, indent=1) + "\n", encoding="utf-8")
    named_truth = dict(zip(domains, true_weights.tolist(), strict=True)) if truth else None
    rows, base_row = [], None
    for method in methods:
        home = folder / "methods" / method
        (home / "loglik").mkdir(parents=True)
        estimated = method in ("iterative", "adjusted")
        metrics, trajectory = [], []
        for step in steps:
            progress = SPEED.get(method, 0.5) ** 0.2 * min(1.0, np.log1p(step) / np.log1p(STEPS[-1]))
            skew = SPEED.get(method, 0.5) * progress
            model = vector(0.97 * progress, skew, 1.2 + 1.5 * (1 - progress), step + 10)
            there, here = target.select("measure"), model.select("measure")
            name = f"loglik/step-{step:06d}.parquet"
            here.save(home / name)
            found = kl(there, here)
            metrics.append(
                {
                    "step": step, "kl": found.total, "kl_between": found.between, "kl_within": found.within, "kl_se": found.se,
                    "true_kl": 0.05 + 3.0 * (1 - progress) if shared_tokenizer else None, "nll_gap": nll_gap(there, here),
                    "weight_kl": None, "loglik": name,
                }
            )  # fmt: skip
            if estimated:
                delta = {d: float(x) for d, x in zip(domains, 6.5 * (1 - progress) + spread * (1 - skew), strict=True)}
                root = rng.normal(0, 1, (k, 4 * k)) / np.sqrt(4 * k) + 0.1
                g = (root @ root.T + 0.2 * np.eye(k)) * 50 if gram and method == "adjusted" else None
                w = lld_weights(delta) if g is None else adjusted_lld_weights(g, delta)
                trajectory.append(
                    {
                        "step": step, "delta": delta, "delta_se": dict.fromkeys(domains, 0.12) if errors else None, "weights": w,
                        "gram": None if g is None else g.tolist(), "effective_domains": effective_domains(w),
                    }
                )  # fmt: skip
        if estimated:
            recipe = aggregate_weights([point["weights"] for point in trajectory])
        elif method == "aggregated" and (folder / "methods" / "iterative" / "weights.json").exists():
            recipe = read_json(folder / "methods" / "iterative" / "weights.json")["weights"]
        elif method == "ground-truth" and named_truth:
            recipe = named_truth
        else:
            recipe = dict.fromkeys(domains, 1 / k)
        (home / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics), encoding="utf-8")
        slope = 6 * SPEED.get(method, 0.5) ** 0.2 / 6.9
        losses = [10.8 - slope * np.log1p(step) + rng.normal(0, 0.05) for step in range(0, 900, 3)]
        log = [{"step": 3 * i, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 2e4} for i, loss in enumerate(losses)]
        (home / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
        rule = method if estimated else "iterative" if method == "aggregated" else None
        write_json(
            home / "weights.json",
            {
                "format": "lldfast-weights", "version": 1, "weights": recipe, "domains": domains, "rule": rule,
                "tau": 1.0, "total_steps": 1000, "trajectory": trajectory,
                "weights_se": {d: 0.1 * w for d, w in recipe.items()} if errors and rule else None,
            },
        )  # fmt: skip
        last = {key: metrics[-1][key] for key in ("kl", "kl_se", "kl_between", "kl_within", "true_kl", "nll_gap")}
        to_truth = weight_kl(recipe, named_truth) if named_truth else None
        last |= {"weight_kl": to_truth, "effective_domains": effective_domains(recipe)}
        rows.append({"method": method, **last, "final_loss": losses[-1], "wall_s": 61.0 + len(rows)})
        if base_row is None and steps[0] == 0:
            base_row = {**metrics[0], "method": "base (step 0)", "final_loss": None, "wall_s": None}
    warnings = ["eq. (2) is 20 to 30 times the true KL here: it ranks, it does not measure"] if shared_tokenizer else []
    write_json(folder / "summary.json", {"rows": rows, "base_row": base_row, "warnings": warnings})
    write_json(
        folder / "experiment.json",
        {
            "format": "lldfast-run", "version": 1, "name": "demo run", "recipe": "demo", "seed": 3, "steps": steps[-1],
            "tokens_per_step": 1024, "domains": domains, "base": {"name": "demo-330k", "hash": "ab12"},
            "target": {"name": target_name, "kind": "lldfast", "licence": licence, "hash": "cd34"},
            "corpus": {"hash": "11ff", "evalset_hash": "0", "n_texts": count, "mean_bytes": float(n_bytes.mean()),
                       "sources": [{"name": "builtin", "licence": "various"}]},
            "ground_truth": named_truth, "shared_tokenizer": shared_tokenizer, "versions": {"lldfast": "0.1.0", "numpy": "2.4"},
            "created": "2025-11-22T10:00:00+00:00", "disclosure": "These domain weights were estimated with a target model.",
            "methods": methods, "delta_normalize": "base_tokens", "tau": 1.0,
        },
    )  # fmt: skip
    return folder


class Page(html.parser.HTMLParser):
    """What the tests look at: tags and attributes, ids, text by section, tables as rows of cells."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.section = "header"
        self.rows: list[list[str]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def read(path: Path) -> tuple[str, Page]:
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("report") / "run", methods=METHODS)


@pytest.fixture(scope="module")
def full_page(full: Path) -> tuple[str, Page]:
    path = write_report(full)
    assert path == full / "report.html"
    return read(path)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return build_run(tmp_path / "run", domains=PILE[:5], steps=[0, 4, 64], texts_per_domain=4)


@pytest.fixture(params=["words", pytest.param("figures", marks=pytest.mark.slow)])
def words(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that read what is around the figures. By default those are laid out but not drawn, most of a report's time."""

    def undrawn(figure: object, key: str, label: str) -> str:
        return f'<svg role="img" aria-label="{html.escape(label)}"></svg>'

    if request.param == "words":
        monkeypatch.setattr("lldfast.report.figures.to_svg", undrawn)


def edit(path: Path, **changes: Any) -> None:
    write_json(path, {**read_json(path), **changes})


def assert_self_contained(source: str, page: Page) -> None:
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "poster", "srcset", "data"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
    assert not set(page.tags) & {"script", "link", "iframe", "img", "object", "embed", "base", "foreignobject"}
    assert "@import" not in source and "@font-face" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", source))
    links = re.sub(r'xmlns(:\w+)?="[^"]*"', "", source)
    assert not re.search(r"https?://", links)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "an id is used twice: clip paths of one figure would cut another"
    for target in re.findall(r'(?:href="|url\()#([^")]+)', source):
        assert target in ids, target


def test_report_has_every_part_and_loads_nothing(full_page: tuple[str, Page]) -> None:
    source, page = full_page
    assert page.open == []
    assert_self_contained(source, page)
    for section in ("summary", "distance", "weights", "estimates", "disclosure", "provenance"):
        assert section in page.text
    for title in (
        "KL to the target, eq. (2)", "True token-level KL", "Mean gap", "What is left at the end", "Model map", "Training loss",
        "Weights by domain", "Weights over steps", "Delta over steps", "iterative: change between steps",
        "adjusted: two ways to average", "adjusted: |G\u207b\u00b9| at step 900",
    ):  # fmt: skip
        assert title in source, title
    # every figure can be heard, and says how to read it
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == page.tags.count("svg") and all(len(label) > 20 for label in labels)
    assert page.tags.count("figure") == page.tags.count("figcaption") >= 13
    assert "width=device-width" in source and "prefers-color-scheme: dark" in source
    assert "eq. (2) is 20 to 30 times the true KL" in page.text["summary"]
    assert "True token-level KL agrees on the best method" in page.text["header"]
    assert "aggregated has the estimates" not in source  # it stores none of its own
    assert "iterative, aggregated" in source  # one set of bars for the same mixture


def test_the_table_holds_the_numbers_of_the_summary(full: Path, full_page: tuple[str, Page]) -> None:
    _, page = full_page
    summary = read_json(full / "summary.json")
    table = {row[0]: row[1:] for row in page.rows[:7]}
    for row in summary["rows"]:
        cells = table[row["method"] + (" (reference)" if row["method"] == "ground-truth" else "")]
        assert cells[0] == f"{number(row['kl'])} \u00b1 {number(row['kl_se'], 2)}"
        keys = ("kl_between", "kl_within", "true_kl", "nll_gap", "weight_kl", "effective_domains", "final_loss")
        assert cells[1:8] == [number(row[key]) for key in keys]
        assert cells[8] == duration(row["wall_s"])
    assert table["base (step 0)"][0] == number(summary["base_row"]["kl"])
    weights = {row[0]: row[1:] for row in page.rows if row and row[0] in PILE}
    file = read_json(full / "methods" / "adjusted" / "weights.json")
    truth = read_json(full / "experiment.json")["ground_truth"]
    assert weights["Github"][0] == number(truth["Github"])
    assert weights["Github"][3] == f"{number(file['weights']['Github'])} \u00b1 {number(file['weights_se']['Github'], 2)}"


def test_the_best_of_a_column_is_marked_and_the_reference_never(full: Path, full_page: tuple[str, Page]) -> None:
    source, _ = full_page
    rows = read_json(full / "summary.json")["rows"]
    candidates = [row for row in rows if row["method"] != "ground-truth"]
    assert min(rows, key=lambda row: row["kl"])["method"] == "ground-truth"
    best = min(candidates, key=lambda row: row["kl"])
    marked = re.findall(r'<span class="best">([^<]*)</span>', source)
    assert f"{number(best['kl'])} \u00b1 {number(best['kl_se'], 2)}" in marked
    reference = re.search(r"<th scope=\"row\">ground-truth.*?</tr>", source)
    assert reference and "best" not in reference.group()


def test_duration() -> None:
    assert [duration(x) for x in (None, 3.21, 48, 723, 18120)] == ["\u2013", "3.2 s", "48 s", "12 min 3 s", "5 h 2 min"]


def test_headline(full: Path, tmp_path: Path) -> None:
    rows = {row["method"]: row for row in read_json(full / "summary.json")["rows"]}
    line = headline(load_run(full))
    before = read_json(full / "summary.json")["base_row"]["kl"]
    assert line.startswith("adjusted came closest to code-gpt (demo): ")
    assert f"from {number(before)} to {number(rows['adjusted']['kl'])} bits per byte in 900 steps" in line
    saved = 1 - rows["adjusted"]["kl"] / rows["uniform"]["kl"]
    assert f"{saved:.0%} less than with uniform weights ({number(rows['uniform']['kl'])})" in line

    folder = tmp_path / "run"
    shutil.copytree(full, folder)
    summary = read_json(folder / "summary.json")
    for row in summary["rows"]:
        if row["method"] == "uniform":
            row["kl"] = 0.5
    write_json(folder / "summary.json", summary)
    assert headline(load_run(folder)).startswith("No mixture came closer to code-gpt (demo) than uniform weights")
    kept = [row for row in summary["rows"] if row["method"] in ("adjusted", "ground-truth")]
    edit(folder / "summary.json", rows=kept)
    assert "there is no run with uniform weights to compare with" in headline(load_run(folder))
    edit(folder / "summary.json", rows=[row for row in kept if row["method"] == "ground-truth"])
    assert headline(load_run(folder)) == "Nothing has been measured yet."


@pytest.mark.usefixtures("words")
def test_disagreement_of_the_measures_is_said_at_the_top(small: Path) -> None:
    summary = read_json(small / "summary.json")
    for row in summary["rows"]:
        row["true_kl"] = {"uniform": 0.1, "iterative": 0.2, "adjusted": 0.3}[row["method"]]
    write_json(small / "summary.json", summary)
    text = read(write_report(small))[1].text["header"]
    assert "True token-level KL does not agree on the best method" in text
    assert "uniform 0.100, iterative 0.200, adjusted 0.300" in text


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> & \"q\" 'a' $x_1$ \x07 /\\ " + "long " * 12
    run = tmp_path / "run"
    domains = [evil, *PILE[4:8]]
    options: dict[str, Any] = {"target_name": "</title><b>t</b>", "texts_per_domain": 4}
    build_run(run, domains=domains, methods=["uniform", "iterative"], steps=[0, 4], **options)
    (run / "config.yaml").write_text("</pre><script>alert(3)</script>: 1\n", encoding="utf-8")
    odd = "<img src=x onerror=alert(2)>"
    (run / "methods" / "iterative").rename(run / "methods" / odd)
    rows = read_json(run / "summary.json")["rows"]
    edit(run / "summary.json", rows=[rows[0], {**rows[1], "method": odd}])
    edit(run / "summary.json", warnings=["</ul><script>alert(4)</script>"])
    edit(run / "experiment.json", methods=["uniform", odd], name="<h1>name</h1>", disclosure="<script>alert(5)</script>")
    source, page = read(write_report(run))
    assert_self_contained(source, page)
    assert page.open == []
    assert "<script" not in source.lower() and "onerror" not in page.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;q&quot;" in source
    assert "&lt;script&gt;alert(3)" in source and "&lt;script&gt;alert(4)" in source and "&lt;/title&gt;" in source
    assert "\x07" not in source


@pytest.mark.parametrize("domains", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_the_same_folder_gives_the_same_bytes(domains: int, tmp_path: Path) -> None:
    methods, steps = (["adjusted"], [0, 4]) if domains == 3 else (None, [0, 4, 64])
    small = build_run(tmp_path / "run", methods=methods, domains=PILE[:domains], steps=steps, texts_per_domain=4)
    first = write_report(small, tmp_path / "a.html").read_bytes()
    assert write_report(small, tmp_path / "sub" / "b.html").read_bytes() == first
    assert not (small / "report.html").exists()


@pytest.mark.usefixtures("words")
def test_parts_that_are_missing_say_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options: dict[str, Any] = {"truth": False, "shared_tokenizer": False, "texts_per_domain": 4}
    build_run(folder, methods=["uniform"], domains=PILE[:5], steps=[0, 4, 64], **options)
    source, page = read(write_report(folder))
    assert_self_contained(source, page)
    for line in (
        "True token-level KL: not shown, the target has another tokenizer.",
        "Estimated weights: not shown, every method of this run trained on weights known beforehand.",
        "Comparison with the target&#x27;s own weights: not shown",
        "Trajectories of Delta and of the weights: not shown, no method of this run estimated weights.",
        "Divergence between steps, and means over steps: not shown",
        "Inverse Gram matrix of the domain gradients: not shown, no method of this run stored a Gram matrix",
        "Not measured: true KL, KL of weights to truth.",
    ):
        assert line in source, line
    assert headline(load_run(folder)).startswith("Only uniform weights were trained: their KL by eq. (2) went from")
    assert "Weights that owe nothing to an estimate: uniform." in page.text["disclosure"]


@pytest.mark.usefixtures("words")
def test_one_measured_step_and_no_errors_or_gram(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    build_run(folder, domains=PILE[:5], steps=[0], gram=False, errors=False, texts_per_domain=4, licence=None)
    source, page = read(write_report(folder))
    assert_self_contained(source, page)
    assert "weights were estimated at one step only" in source
    assert "no method of this run stored a Gram matrix" in source
    assert "standard error over texts." not in page.text["weights"]
    assert "licence: not recorded; look it up before you publish" in page.text["disclosure"]


@pytest.mark.usefixtures("words")
def test_many_domains_are_split_over_figures(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    domains = [f"{name} {i}" for i in range(2) for name in PILE]
    build_run(folder, domains=domains, methods=["uniform", "adjusted"], steps=[0, 4], texts_per_domain=2)
    source, page = read(write_report(folder))
    assert_self_contained(source, page)
    assert "Weights by domain (3 of 3)" in source and "Delta over steps (3 of 3)" in source
    assert "The 8 domains with the smallest weights are in the table only." in source
    assert {row[0] for row in page.rows if row} >= set(domains)


@pytest.mark.usefixtures("words")
def test_a_run_that_has_not_finished(small: Path) -> None:
    (small / "summary.json").unlink()
    shutil.rmtree(small / "methods" / "adjusted")
    (small / "target.parquet").unlink()
    (small / "config.yaml").unlink()
    with (small / "methods" / "iterative" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 99, "kl": 1')
    source, page = read(write_report(small))
    assert_self_contained(source, page)
    assert "summary.json is absent (the run has not finished)" in page.text["summary"]
    assert "adjusted: no measured step" in page.text["summary"] and "adjusted: no weights file" in page.text["summary"]
    assert "Model map: not shown, target.parquet is absent." in page.text["distance"]
    assert "Settings: not shown, config.yaml is absent." in page.text["provenance"]
    last = json.loads((small / "methods" / "iterative" / "metrics.jsonl").read_text().splitlines()[2])
    assert next(row for row in page.rows if row and row[0] == "iterative")[1].startswith(number(last["kl"]))


@pytest.mark.usefixtures("words")
def test_missing_loglik_files_and_a_target_on_other_texts(small: Path) -> None:
    for path in (small / "methods" / "uniform" / "loglik").iterdir():
        path.unlink()
    source, _ = read(write_report(small))
    assert "3 measured steps: not shown, their log-likelihood files are absent." in source and "Model map with" in source
    other = LoglikVector.load(small / "target.parquet")
    other.text_hash = other.text_hash[::-1].copy()
    other.save(small / "target.parquet")
    source, _ = read(write_report(small))
    assert "Model map: not shown, iterative at step 0 was scored on other texts than the target." in source


@pytest.mark.usefixtures("words")
def test_no_target_at_all(small: Path) -> None:
    edit(small / "experiment.json", target=None, ground_truth=None, methods=["uniform"])
    (small / "methods" / "uniform" / "metrics.jsonl").write_text("", encoding="utf-8")
    edit(small / "summary.json", rows=[], base_row=None, warnings=[])
    source, page = read(write_report(small))
    assert_self_contained(source, page)
    assert "Trained without a target." in page.text["header"]
    assert "Distance to a target: not shown, this run has no target." in page.text["distance"]


@pytest.mark.usefixtures("words")
def test_two_stage_weights_and_a_singular_gram(small: Path) -> None:
    path, adjusted = (small / "methods" / name / "weights.json" for name in ("iterative", "adjusted"))
    trajectory = read_json(adjusted)["trajectory"]
    first = read_json(path)["weights"]
    second = dict(zip(first, reversed(first.values()), strict=True))
    for point in trajectory:
        point["gram"] = np.ones((5, 5)).tolist()
    edit(adjusted, trajectory=trajectory)
    edit(path, trajectory=[], stages=[{"from_step": 0, "weights": first}, {"from_step": 32, "weights": second}])
    _, page = read(write_report(small))
    head = next(row for row in page.rows if row[0] == "domain")
    assert "iterative (from step 0)" in head and "iterative (from step 32)" in head
    column = head.index("iterative (from step 32)")
    cells = {row[0]: row[column] for row in page.rows if row and row[0] in first}
    assert cells == {name: number(weight) for name, weight in second.items()}
    assert "Weights estimated with the target model: iterative, adjusted." in page.text["disclosure"]
    assert "G is singular to working precision" in page.text["estimates"]


@pytest.mark.slow
def test_the_map_follows_the_settings(tmp_path: Path) -> None:
    small = build_run(tmp_path / "run", methods=["uniform"], domains=PILE[:5], steps=[0, 4, 64], texts_per_domain=4)
    config = (small / "config.yaml").read_text(encoding="utf-8")
    (small / "config.yaml").write_text(config.replace('"pca"', '"tsne"'), encoding="utf-8")
    assert "t-SNE: neighbours are alike" in write_report(small).read_text(encoding="utf-8")
    assert "of the spread" in write_report(small, map_method="pca").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="umap"):
        write_report(small, map_method="umap")


def test_errors_name_the_file(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no experiment\.json"):
        write_report(tmp_path)
    weights = small / "methods" / "iterative" / "weights.json"
    good = read_json(weights)
    renamed = dict(zip(["Nowhere", *list(good["weights"])[1:]], good["weights"].values(), strict=True))
    edit(weights, weights=renamed)
    with pytest.raises(CorruptError, match=r"iterative/weights.json.*ArXiv"):
        write_report(small)
    edit(weights, weights={**good["weights"], "Nowhere": 0.1})
    with pytest.raises(CorruptError, match="Nowhere"):
        write_report(small)
    good["trajectory"][0]["gram"] = [[1.0, 2.0]]
    write_json(weights, good)
    with pytest.raises(CorruptError, match="gram of step 0 does not have a row and a column for each domain"):
        write_report(small)
    edit(small / "experiment.json", format="other")
    with pytest.raises(CorruptError, match=r"experiment\.json"):
        write_report(small)
