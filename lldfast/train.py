"""Train with a designed domain mixture: every method of a configuration, one after the other, and a report.

    python -m lldfast.train                              the demo: real text, four methods, a report
    python -m lldfast.train --recipe pile-sample
    python -m lldfast.train --recipe paper --data.path PILE --target.model MODEL --method iterative,aggregated

One method is one training run in OUT/methods/<method>; loop.py has it. A finished method is never run again, an interrupted one
goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path

import torch

from lldfast.loop import make_objective, train_method
from lldfast.report.page import write_report
from lldfast.report.summary import summarise, table
from lldfast.run.config import Config, TargetConfig
from lldfast.run.experiment import Experiment, open_data
from lldfast.run.folder import RunFolder
from lldfast.run.methods import Method, parse_method
from lldfast.run.parsing import parse_config
from lldfast.run.plan import make_plan
from lldfast.run.record import write_experiment
from lldfast.terminal import exit_status
from lldfast.weights.file import save_weights


def run(config: Config) -> Path:
    """Run every method of `config` and write summary.json and report.html. Returns the run folder.

    Raises:
        BusyError: another process is writing config.out.
        InputError: config.out was made with another configuration.
    """
    config.check()
    folder = RunFolder(config.out)
    with contextlib.ExitStack() as restore, folder.lock():
        # settings of the process, which a caller's own code gets back as they were
        restore.callback(torch.set_num_threads, torch.get_num_threads())
        restore.callback(torch.set_flush_denormal, False)
        methods = with_first_passes(config)
        if config.target.mixture:
            config = with_trained_target(config)
        torch.set_flush_denormal(True)  # denormal AdamW moments of rare tokens slow a CPU step down several times
        exp = Experiment.open(config)
        write_experiment(exp, methods)
        check_methods(exp, methods)
        for method in methods:
            if folder.method(method.name).finished:
                print(f"[{method.name}] finished earlier, kept", file=sys.stderr)
                continue
            train_method(exp, method)
        print(table(summarise(folder.path)))
        if config.log.report:
            print(f"report: {write_report(folder.path).resolve()}")
    return folder.path


def with_first_passes(config: Config) -> list[Method]:
    """The methods to run in order, with the pass 1 that an aggregated or two-stage method stands on before it."""
    order: dict[str, Method] = {}
    for method in config.parsed_methods():
        if method.passes == 2 and not config.lld.pass1 and method.rule:
            order.setdefault(method.rule, parse_method(method.rule))
        order.setdefault(method.name, method)
    return list(order.values())


def check_methods(exp: Experiment, methods: list[Method]) -> None:
    """Wrong weights, and a teacher that does not fit, are told now, not after the methods before them."""
    for method in methods:
        if exp.folder.method(method.name).finished:
            continue
        if method.passes == 1 or exp.config.lld.pass1:  # another pass 2 stands on weights that are not there yet
            make_plan(exp, method)
        make_objective(exp, method)


def with_trained_target(config: Config) -> Config:
    """Train the target of `target.mixture` in OUT/target-run (once), and return the configuration that points to it."""
    assert config.target.mixture is not None
    folder = RunFolder(config.out)
    shards, _, _ = open_data(config)
    save_weights(folder.target_mixture, config.target.mixture, rule=None, trajectory=[])
    steps = config.target.steps or config.train.steps
    made = dataclasses.replace(
        config,
        out=str(folder.target_run),
        methods=["fixed"],
        seed=config.seed + 1000,  # another initialisation and data order than any base of this run
        data=dataclasses.replace(config.data, path=str(shards.path)),
        target=TargetConfig(),
        lld=dataclasses.replace(config.lld, weights=str(folder.target_mixture)),
        train=dataclasses.replace(config.train, steps=steps),
        log=dataclasses.replace(config.log, report=False),
    )
    run(made)
    model = folder.target_run.method("fixed").final
    return dataclasses.replace(config, target=dataclasses.replace(config.target, model=str(model), mixture=None))


def main(argv: list[str] | None = None) -> None:
    run(parse_config(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(exit_status(main))
