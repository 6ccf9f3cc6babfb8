"""Algorithm 1 and pass 2: the training loop.

    python -m lldfast.train                              the demo: real text, four methods, a report
    python -m lldfast.train --recipe pile-sample
    python -m lldfast.train --recipe paper --data.path PILE --target.model MODEL --method iterative,aggregated

One method is one training run in OUT/methods/<method>. `train_method` reads top to bottom: estimate weights where S says so,
measure, draw a batch from the mixture, take an AdamW step, log, checkpoint. A finished method is never run again; an
interrupted one goes on from its last checkpoint, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lldfast.controller import LLDController
from lldfast.data.mixture import DomainMixture
from lldfast.distill.cache import TeacherCache
from lldfast.distill.objective import (
    Distillation,
    Objective,
    Rows,
    check_same_teacher,
    cross_entropy,
    fingerprint,
    teacher_identity,
)
from lldfast.errors import InputError, TrainingError
from lldfast.files import folder_lock, write_json
from lldfast.models.scorer import Scorer
from lldfast.run.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from lldfast.run.config import Config, TargetConfig, parse_config
from lldfast.run.experiment import Experiment, open_data
from lldfast.run.log import JsonlLog, RunLog
from lldfast.run.methods import Method, parse_method
from lldfast.run.optimizer import make_optimizer
from lldfast.run.place import resolve_location
from lldfast.schedule import estimation_steps, learning_rate
from lldfast.terminal import exit_status
from lldfast.weights.equations import with_floor
from lldfast.weights.file import (
    combine,
    default_step_weights,
    disclosure,
    distillation_disclosure,
    load_weights,
    read_weights_file,
    rule_fields,
    rule_of,
    save_weights,
)
from lldfast.weights.rules import Rule, aggregation

Weights = dict[str, float]


@dataclasses.dataclass
class Source:
    """Where a method's weights come from: fixed stages [(first step, weights)], or a controller that estimates them."""

    stages: list[tuple[int, Weights]]
    controller: LLDController | None = None
    origin: dict[str, Any] | None = None  # the pass-1 weights file that the stages were computed from

    def at(self, step: int, scorer: Scorer, optimizer: torch.optim.Optimizer) -> Weights | None:
        """New weights before optimiser step `step`, or None to keep those in force."""
        if self.controller is not None:
            return self.controller.step(step, scorer, optimizer)
        return next((weights for first, weights in self.stages if first == step), None)


def make_rule(exp: Experiment, name: str, domains: list[str]) -> Rule:
    """The named rule with the options of the configuration, its prior in the order of `domains`."""
    lld = exp.config.lld
    prior = None
    if lld.prior == "proportional":
        prior = exp.shards.proportions()
    elif lld.prior != "uniform":
        prior = load_weights(lld.prior, exp.domains)
    with_floor(np.full(len(domains), 1 / len(domains)), lld.floor)  # raises where it is too much for so many domains
    return lld.rule(name, None if prior is None else tuple(prior[domain] for domain in domains))


def make_source(exp: Experiment, method: Method) -> Source:
    """Fixed weights, a controller for pass 1, or the recipe of a finished pass 1 for pass 2.

    Raises:
        InputError: no ground truth is known, a weights file names other domains.
    """
    config = exp.config
    uniform = {domain: 1 / len(exp.domains) for domain in exp.domains}
    if method.mixture == "uniform":
        return Source([(0, uniform)])
    if method.mixture == "proportional":
        return Source([(0, exp.shards.proportions())])
    if method.mixture == "fixed":
        return Source([(0, load_weights(resolve_location(str(config.lld.weights)), exp.domains))])
    if method.mixture == "ground-truth":
        if exp.ground_truth is None:
            raise InputError(f"method {method.name!r}: the target's own mixture is not known; give target.weights")
        return Source([(0, exp.ground_truth)])
    assert method.rule is not None
    if method.passes == 1:
        evalset, target = exp.estimation()
        at = estimation_steps(config.train.steps, every=config.lld.every, dense_until=config.lld.dense_until)
        return Source(
            [],
            LLDController(
                evalset,
                target,
                steps=config.train.steps,
                rule=make_rule(exp, method.rule, evalset.domains),
                normalize=config.lld.normalize,
                at=at,
                bootstrap=config.lld.bootstrap,
                seed=config.seed,
                batch_tokens=config.measure.batch_tokens,
                gram_options=config.gram.options(),
            ),
        )
    path = Path(config.lld.pass1) if config.lld.pass1 else exp.out / "methods" / method.rule / "weights.json"
    file = read_weights_file(path)
    one = load_weights(path, exp.domains)  # checks the names for both kinds
    if method.stages == 1:
        return Source([(0, one)], origin=file)
    steps, weights = [e["step"] for e in file["trajectory"]], [e["weights"] for e in file["trajectory"]]
    if not steps:
        raise InputError(f"{path} holds no trajectory of weights: a two-stage recipe cannot be made from it")
    total = int(file["total_steps"])
    array = np.array([[w[name] for name in exp.domains] for w in weights])
    how = config.lld.step_weights or default_step_weights(method.rule, stages=2)
    mean = aggregation(file.get("rule"), config.lld.aggregate)
    plan = combine(steps, total, array, aggregate=mean, step_weights=how, stages=2, split=config.lld.split)
    scale = config.train.steps / total  # a pass 1 of another length is stretched to this run
    named = [(round(step * scale), dict(zip(exp.domains, w.tolist(), strict=True))) for step, w in plan]
    return Source(named, origin=file)


def make_objective(exp: Experiment, method: Method) -> Objective:
    """What the method minimises; opens the teacher."""
    if not method.distilled:
        return cross_entropy
    return Distillation(method, exp.config.distill, exp.teacher(), domains=exp.domains, steps=exp.config.train.steps)


def train_method(exp: Experiment, name: str) -> None:
    """Train one method to its end, or resume it. Writes OUT/methods/<name>/, result.json last.

    Raises:
        TrainingError: a loss or a gradient is not finite (the last checkpoint stands).
    """
    config, t = exp.config, exp.config.train
    method = parse_method(name)
    folder = exp.out / "methods" / name
    source = make_source(exp, method)
    objective = make_objective(exp, method)
    teacher = exp.teacher() if method.distilled else None
    taught = fingerprint(teacher)
    windows = teacher.windows if isinstance(teacher, TeacherCache) else None  # a recorded teacher knows these alone
    model = exp.new_model()
    forward = torch.compile(model) if t.compile else model
    scorer = Scorer.from_gpt(model, exp.tokenizer, name=f"{name}, seed {config.seed}")
    optimizer = make_optimizer(model, t)
    mixture = DomainMixture(
        exp.shards,
        source.stages[0][1] if source.stages else {domain: 1 / len(exp.domains) for domain in exp.domains},
        block_size=model.config.block_size,
        batch_size=t.batch_size,
        micro_batch_size=t.micro_batch_size,
        draw=t.draw,
        seed=config.seed,
        aligned=windows is not None,
        windows=windows,
    )
    start, seconds = 0, 0.0
    torch.manual_seed(config.seed)
    checkpoints = list_checkpoints(folder / "checkpoints")
    if checkpoints:
        start, state, arrays = load_checkpoint(checkpoints[-1], model=model, optimizer=optimizer)
        mixture.load_state_dict(state["mixture"])
        check_same_teacher(name, state.get("teacher"), taught)
        seconds = state["seconds"]
        torch.set_rng_state(torch.from_numpy(arrays.pop("torch_rng")))
        if exp.device.type == "cuda" and "cuda_rng" in arrays:
            torch.cuda.set_rng_state(torch.from_numpy(arrays.pop("cuda_rng")), exp.device)
        if source.controller is not None:
            source.controller.load_state_dict(arrays)
    log = RunLog(
        folder,
        name=name,
        total=t.steps,
        start=start,
        progress=config.log.progress,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        config=dataclasses.asdict(config),
    )
    if start:
        log.say(f"resumed at step {start}")
    metrics = JsonlLog(folder / "metrics.jsonl", keep=lambda record: record["step"] < start)
    measure_at = exp.measured_steps()
    micro_batches = t.batch_size // t.micro_batch_size
    warmup = round(t.warmup * t.steps)
    began, window_began, window_tokens = time.perf_counter(), time.perf_counter(), 0

    for step in range(start, t.steps):
        # 1. weights: Algorithm 1 estimates where step is in S; pass 2 switches stages
        weights = source.at(step, scorer, optimizer)
        if weights is not None:
            mixture.set_weights(weights)
            if source.controller is not None and source.controller.rule.needs_gram:
                log.say(source.controller.gram_line())
        if step in measure_at:
            measure(exp, scorer, step, folder, mixture, metrics, log)
            window_began, window_tokens = time.perf_counter(), 0  # measuring is not training

        # 2. one AdamW step over micro-batches of the mixture
        batch = mixture.next_batch()
        lr = learning_rate(step, t.steps, peak=t.learning_rate, final=t.min_lr, warmup=warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for i in range(micro_batches):
            part = slice(i * t.micro_batch_size, (i + 1) * t.micro_batch_size)
            rows = Rows(exp.to_device(batch.x[part]), exp.to_device(batch.y[part]), batch.domain[part], batch.start[part])
            with exp.autocast():  # the mean gives the gradient, the tokens' losses [B, T] only report domains apart
                mean, token_loss = objective(step, forward(rows.x), model.head_weight, model.config.valid_vocab, rows)
            (mean / micro_batches).backward()
            losses.append(token_loss.mean(dim=1))
        sequence_loss = torch.cat(losses).double().cpu().numpy()  # [batch_size]
        grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), t.grad_clip or math.inf))
        loss = float(sequence_loss.mean())
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(not_finite(name, step, sequence_loss, batch.domain, mixture.domains, grad_norm, folder))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window_tokens += batch.x.numel()

        # 3. log and checkpoint
        log.advance()
        last = step + 1 == t.steps
        if step % config.log.every == 0 or last:
            now = time.perf_counter()
            log.step(
                {
                    "step": step,
                    "loss": loss,
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "tokens_per_s": window_tokens / max(now - window_began, 1e-9),
                    "loss_by_domain": by_domain(sequence_loss, batch.domain, mixture.domains),
                    "weights": in_force(mixture),
                },
                line=step % (10 * config.log.every) == 0 or last,
            )
            window_began, window_tokens = now, 0
        if (step + 1) % t.checkpoint_every == 0 or last:
            arrays = {"torch_rng": torch.get_rng_state().numpy()}
            if exp.device.type == "cuda":  # dropout draws there
                arrays["cuda_rng"] = torch.cuda.get_rng_state(exp.device).numpy()
            if source.controller is not None:
                arrays |= source.controller.state_dict()
            state = {"mixture": mixture.state_dict(), "seconds": seconds + time.perf_counter() - began, "teacher": taught}
            save_checkpoint(folder / "checkpoints", step=step + 1, model=model, optimizer=optimizer, state=state, arrays=arrays)

    seconds += time.perf_counter() - began
    record = measure(exp, scorer, t.steps, folder, mixture, metrics, log)
    write_method_weights(exp, method, source, folder)
    model.save(
        folder / "final", tokenizer_describe=exp.tokenizer, extra={"domain_weights": trained_on(source, mixture), "name": name}
    )
    log.close()
    metrics.close()
    write_json(folder / "result.json", {"method": name, "seconds": seconds, "tokens": t.steps * exp.tokens_per_step, **record})
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # final/ and result.json stand: nothing is left to resume


def trained_on(source: Source, mixture: DomainMixture) -> Weights:
    """The mixture a model was trained on: its fixed weights, or where they moved the share of sequences from each domain."""
    if len(source.stages) == 1:
        return source.stages[0][1]
    drawn = mixture.consumed
    return {name: n / sum(drawn.values()) for name, n in drawn.items()}


def measure(
    exp: Experiment, scorer: Scorer, step: int, folder: Path, mixture: DomainMixture, metrics: JsonlLog, log: RunLog
) -> dict[str, Any]:
    """One line of metrics.jsonl; nothing without a target."""
    record = exp.measure(scorer, step, folder, in_force(mixture))
    if record is None:
        return {}
    metrics.write(record)
    log.measured(record)
    return record


def in_force(mixture: DomainMixture) -> Weights:
    return dict(zip(mixture.domains, mixture.weights.tolist(), strict=True))


def by_domain(sequence_loss: np.ndarray, domain: np.ndarray, domains: list[str]) -> Weights:
    """Mean loss of each domain in the batch, nats per token; domains not drawn are left out."""
    return {domains[k]: float(sequence_loss[domain == k].mean()) for k in np.unique(domain).tolist()}


def not_finite(
    name: str, step: int, loss: np.ndarray, domain: np.ndarray, domains: list[str], grad_norm: float, folder: Path
) -> str:
    bad = sorted({domains[k] for k in domain[~np.isfinite(loss)].tolist()})
    where = f"the loss is not finite on {', '.join(bad)}" if bad else f"the gradient norm is {grad_norm}"
    kept = list_checkpoints(folder / "checkpoints")
    after = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint before it"
    return f"method {name!r}, step {step}: {where}; nothing was updated, {after}. Lower train.learning_rate or check the data"


def write_method_weights(exp: Experiment, method: Method, source: Source, folder: Path) -> None:
    """weights.json of a finished method: for pass 1 the fixed recipe of eq. (8) with its trajectory, else what was used."""
    lld = exp.config.lld
    fields: dict[str, Any] = {
        "method": method.name,
        "rule": None,
        "trajectory": [],
        "weights_se": None,
        "total_steps": exp.config.train.steps,
        "normalize": lld.normalize,
        "objective": method.objective,
        **exp.provenance(),
    }
    controller = source.controller
    if controller is not None:
        # a mirror run's recipe is weighted by time in force: its logits grow with time (METHOD, last section)
        how = lld.step_weights or default_step_weights(controller.rule.name)
        mean = aggregation(controller.rule.name, lld.aggregate)
        weights = controller.aggregate(method=mean, step_weights=how)
        fields |= rule_fields(controller.rule, controller.domains) | {
            "aggregate": mean,
            "step_weights": how,
            "trajectory": controller.trajectory(),
            "weights_se": controller.aggregate_errors(method=mean, step_weights=how),
            "last_weights": dict(zip(controller.domains, controller.weights[-1].tolist(), strict=True)),
            "last_weights_se": controller.last_errors(),
        }
        controller.save_replicates(folder / "delta_bootstrap.npz")
    else:
        weights = source.stages[0][1]
        if len(source.stages) > 1:
            fields["stages"] = [{"from_step": step, "weights": w} for step, w in source.stages]
        if source.origin is not None:
            origin = source.origin
            fields |= rule_fields(rule_of(origin), origin["domains"]) if origin.get("rule") else {}
            # pass 1's errors are of its one recipe, not of a stage's
            fields["weights_se"] = origin.get("weights_se") if method.stages == 1 else None
            fields["pass1"] = {key: origin.get(key) for key in ("method", "rule", "total_steps", "target", "base", "seed")}
            fields["target"] = origin.get("target") or fields.get("target")
    target = fields.get("target") if fields["rule"] else None
    fields["disclosure"] = disclosure(fields["rule"], target)
    if method.distilled:
        taught = teacher_identity(exp.teacher())
        fields["distillation"] = exp.config.distill.record(method) | {"teacher": taught}
        fields["disclosure"] += distillation_disclosure(taught)
    save_weights(folder / "weights.json", weights, **fields)


def with_first_passes(config: Config) -> list[str]:
    """The methods to run in order, with the pass 1 that an aggregated or two-stage method stands on before it."""
    order: list[str] = []
    for name in config.methods:
        method = parse_method(name)
        if method.passes == 2 and not config.lld.pass1 and method.rule and method.rule not in order:
            order.append(method.rule)
        if name not in order:
            order.append(name)
    return order


def with_trained_target(config: Config) -> Config:
    """Train the target of `target.mixture` in OUT/target-run (once), and return the configuration that points to it."""
    assert config.target.mixture is not None
    out = Path(config.out)
    folder, _, _ = open_data(config)
    weights = out / "target-mixture.json"
    save_weights(weights, config.target.mixture, rule=None, trajectory=[])
    steps = config.target.steps or config.train.steps
    made = dataclasses.replace(
        config,
        out=str(out / "target-run"),
        methods=["fixed"],
        seed=config.seed + 1000,  # another initialisation and data order than any base of this run
        data=dataclasses.replace(config.data, path=str(folder.path)),
        target=TargetConfig(),
        lld=dataclasses.replace(config.lld, weights=str(weights)),
        train=dataclasses.replace(config.train, steps=steps),
        log=dataclasses.replace(config.log, report=False),
    )
    run(made)
    model = out / "target-run" / "methods" / "fixed" / "final"
    return dataclasses.replace(config, target=dataclasses.replace(config.target, model=str(model), mixture=None))


def run(config: Config) -> Path:
    """Run every method of `config` and write summary.json and report.html. Returns the run folder.

    Raises:
        BusyError: another process is writing config.out.
        InputError: config.out was made with another configuration.
    """
    from lldfast.report.page import write_report
    from lldfast.report.summary import summarise, table

    config.check()
    out = Path(config.out)
    with contextlib.ExitStack() as restore, folder_lock(out):
        # settings of the process, which a caller's own code gets back as they were
        restore.callback(torch.set_num_threads, torch.get_num_threads())
        restore.callback(torch.set_flush_denormal, False)
        methods = with_first_passes(config)
        if config.target.mixture:
            config = with_trained_target(config)
        torch.set_flush_denormal(True)  # denormal AdamW moments of rare tokens slow a CPU step down several times
        exp = Experiment.open(config, methods)
        for method in map(parse_method, methods):  # wrong weights are told now, not after the methods before them
            finished = (out / "methods" / method.name / "result.json").exists()
            if not finished and (method.passes == 1 or config.lld.pass1):
                make_source(exp, method)
            if not finished:
                make_objective(exp, method)  # and so is a teacher that does not fit
        for name in methods:
            done = out / "methods" / name / "result.json"
            if done.exists():
                print(f"[{name}] finished earlier, kept", file=sys.stderr)
                continue
            train_method(exp, name)
        summary = summarise(out)
        print(table(summary))
        if config.log.report:
            print(f"report: {write_report(out).resolve()}")
    return out


def main(argv: list[str] | None = None) -> None:
    run(parse_config(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(exit_status(main))
