"""Every causal-LM class of the installed transformers against plain fp64 loops: is any number of lldfast wrong silently?

    python bench/sweep_models.py --out sweep.jsonl                     all classes, about half an hour on one core
    python bench/sweep_models.py --classes kinds                       one class of each of two dozen kinds, as the tests do
    python bench/sweep_models.py falcon_h1 bert --dtypes bf16 --parts score gram
    python bench/sweep_models.py --table sweep.jsonl                   the tables of an earlier run

tiny_models.py makes a tiny random model of each class, sweep_cases.py judges it: log-likelihoods in fp32 and bf16, with the head
as made, zero or scaled down when it is loaded, and replaced afterwards, padded in a batch and alone; the Gram matrix, the true KL
and a teacher's top log-probabilities. What came out of a class is

    right                  by its hidden states and output matrix
    right by full logits   noted, with the reason
    refused                an error of lldfast says why: right for a model that is not causal
    WRONG                  a number that is not the model's, or any number of a model that is not causal
    CRASH                  an exception that is none of lldfast's, or the process died or hung

Every class has a process of its own and a time limit. Exit status 1 where anything is WRONG or a CRASH.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from sweep_cases import DTYPES, HEADS, OUTCOMES, PARTS, cases, short
from tiny_models import KINDS, Kind, every_kind

Record = dict[str, Any]
LIMIT = 120.0  # seconds of a class


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types, as in config.json; default: all")
    parser.add_argument("--classes", choices=("all", "kinds"), default="all", help="where no names are given")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a class")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="JSON lines to write, one a case")
    parser.add_argument("--table", help="print the tables of this file and run nothing")
    o = parser.parse_args()
    if o.table:
        records = [json.loads(line) for line in Path(o.table).read_text().splitlines()]
        print(tables(records))
        return status(records)
    silence()
    torch.set_num_threads(o.threads)
    records = []
    for kind in chosen(o.names, o.classes):
        found = list(judged(kind, tuple(o.parts), tuple(o.dtypes), tuple(o.heads), o.limit))
        records += found
        if o.out:
            Path(o.out).parent.mkdir(parents=True, exist_ok=True)
            with Path(o.out).open("a") as handle:
                handle.writelines(json.dumps(record) + "\n" for record in found)
        print(f"{kind.name}: {line(found)}", file=sys.stderr, flush=True)
    print(tables(records))
    return status(records)


def chosen(names: list[str], classes: str) -> list[Kind]:
    if names:
        known = {kind.name: kind for kind in (*every_kind(), *KINDS)}
        return [known.get(name) or Kind(name) for name in names]
    return list(KINDS) if classes == "kinds" else every_kind()


def silence() -> None:
    """transformers remarks on every tiny configuration."""
    import transformers
    from transformers import AutoModelForCausalLM  # noqa: F401 - imported once, before processes are forked

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def judged(kind: Kind, parts: tuple[str, ...], dtypes: tuple[str, ...], heads: tuple[str, ...], limit: float) -> Iterator[Record]:
    """The cases of a class, from a process of its own; a last one says so where that dies or takes too long."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_judge, args=(kind, parts, dtypes, heads, there), daemon=True)
    process.start()
    there.close()
    began, last = time.monotonic(), "building"
    try:
        while here.poll(max(0.0, limit - (time.monotonic() - began))):
            record = here.recv()
            last = f"{record['part']}, {record['dtype']}, head {record['head']}"
            yield {"name": kind.name, **record}
        process.kill()
        yield _ended(kind, f"still running after {limit:g} seconds (last: {last})")
    except EOFError:
        process.join()
        if process.exitcode:
            yield _ended(kind, f"the process died with {process.exitcode} (last: {last})")
    finally:
        process.join()
        here.close()


def _ended(kind: Kind, why: str) -> Record:
    return {"name": kind.name, "part": "run", "dtype": "", "head": "", "batch": "", "outcome": "CRASH", "note": why}


def _judge(kind: Kind, parts: tuple[str, ...], dtypes: tuple[str, ...], heads: tuple[str, ...], pipe: Connection) -> None:
    silence()  # again where the process was not forked
    sys.stderr = io.StringIO()  # lldfast's notes are in the cases
    try:
        kind.build()
    except Exception as error:  # noqa: BLE001 - the class cannot be made tiny: that is what is recorded
        why = f"{type(error).__name__}: {short(error)}"
        pipe.send({"part": "build", "dtype": "", "head": "", "batch": "", "outcome": "not built", "note": why})
        return
    for case in cases(kind.build, parts, dtypes, heads):
        pipe.send(case.record())


def by_name(records: list[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record["name"]].append(record)
    return found


def verdict(records: list[Record]) -> str:
    """The worst outcome of a class."""
    seen = [record["outcome"] for record in records]
    for outcome in ("CRASH", "WRONG", "not built"):
        if outcome in seen:
            return outcome
    if "refused" in seen:
        return "refused" if set(seen) == {"refused"} else "refused in part"
    return max(seen, key=OUTCOMES.index)


def line(records: list[Record]) -> str:
    """A class in a line: its outcome, in how many cases and which, and why."""
    outcome = verdict(records)
    worst = [r for r in records if outcome.startswith(r["outcome"])]
    where = "" if len(worst) == len(records) else f" ({len(worst)} of {len(records)} cases: {places(worst)})"
    notes = [re.sub(r"^(\w+): \1 ", "it ", r["note"]) for r in worst if r["note"]]  # a class says its name twice
    gaps = [r["gap"] for r in worst if r.get("gap") is not None]
    gap = f" by up to {max(gaps):.2g}" if outcome == "WRONG" and gaps else ""
    return outcome + gap + where + (f": {notes[0]}" if notes else "")


def places(records: list[Record]) -> str:
    """Which cases, in few words."""
    fields = ("part", "dtype", "head", "batch")
    return "; ".join(", ".join(sorted({r[name] for r in records if r[name]})) for name in fields)


def status(records: list[Record]) -> int:
    return int(any(record["outcome"] in ("WRONG", "CRASH") for record in records))


def tables(records: list[Record]) -> str:
    """Markdown: how many classes of each outcome, the largest gaps that were right, and every class that is not simply right."""
    classes = by_name(records)
    verdicts = {name: verdict(found) for name, found in classes.items()}
    lines = ["| outcome | classes |", "|---|---|"]
    for outcome in (*OUTCOMES[:3], "refused in part", *OUTCOMES[3:], "not built"):
        lines.append(f"| {outcome} | {sum(v == outcome for v in verdicts.values())} |")
    lines += [
        "",
        "| part | dtype | right | by the floor | largest gap | the plain loop's own, there | class |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in PARTS:
        for dtype in DTYPES:
            rows = [r for r in records if (r["part"], r["dtype"]) == (part, dtype) and r["outcome"].startswith("right")]
            if rows:
                worst = max(rows, key=lambda r: r["gap"])
                gaps = f"{worst['gap']:.1e} | " + ("-" if worst["own"] is None else f"{worst['own']:.1e}")
                floor = sum(r["own"] is None for r in rows)
                lines.append(f"| {part} | {dtype} | {len(rows)} | {floor} | {gaps} | {worst['name']} |")
    lines += ["", "| outcome | what | classes |", "|---|---|---|"]
    for outcome in ("CRASH", "WRONG", "refused", "refused in part", "right by full logits", "not built"):
        alike: dict[str, list[str]] = defaultdict(list)
        for name in sorted(name for name, v in verdicts.items() if v == outcome):
            alike[line(classes[name]).removeprefix(outcome).strip(" :").replace("|", "/")].append(name)
        lines += [f"| {outcome} | {what} | {', '.join(names)} |" for what, names in alike.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
