"""Algorithm 1 for one method: estimate weights where S says so, measure, draw a batch from the mixture, take an AdamW step.

`train_method` reads top to bottom. A method trains in OUT/methods/<name>; an interrupted one goes on from its last checkpoint,
bit for bit on a CPU. Where the weights come from is the plan's affair (run/plan.py), what a step minimises the objective's
(distill/objective.py), what is written about the run that of run/record.py.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import numpy as np
import torch

from lldfast.data.mixture import Batch, DomainMixture
from lldfast.distill.cache import TeacherCache
from lldfast.distill.objective import Distillation, Objective, Rows, check_same_teacher, cross_entropy, fingerprint
from lldfast.errors import TrainingError, listed
from lldfast.models.language_model import LanguageModel
from lldfast.run.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from lldfast.run.experiment import Experiment
from lldfast.run.log import JsonlLog, RunLog
from lldfast.run.measurements import measure, measured_steps
from lldfast.run.methods import Method
from lldfast.run.optimizer import make_optimizer
from lldfast.run.plan import Weights, make_plan
from lldfast.run.record import method_weights, write_result
from lldfast.schedule import learning_rate


def train_method(exp: Experiment, method: Method) -> None:
    """Train one method to its end, or resume it. Writes OUT/methods/<name>/, result.json last.

    Raises:
        TrainingError: a loss or a gradient is not finite (the last checkpoint stands).
    """
    t = exp.config.train
    training = Training(exp, method)
    plan, mixture = training.plan, training.mixture
    measure_at = measured_steps(exp)
    for step in range(training.start, t.steps):
        # 1. weights: Algorithm 1 estimates them where step is in S; a recipe of two stages changes them once
        weights = plan.at(step)
        if weights is not None:
            mixture.set_weights(weights)
        if step in measure_at:
            training.measure(step)

        # 2. one AdamW step over micro-batches of the mixture
        batch = mixture.next_batch()
        lr = training.set_learning_rate(step)
        loss = training.backward(step, batch)  # [batch_size] nats per token
        grad_norm = float(torch.nn.utils.clip_grad_norm_(training.model.parameters(), t.grad_clip or math.inf))
        if not (math.isfinite(loss.mean()) and math.isfinite(grad_norm)):
            raise TrainingError(training.not_finite(step, loss, batch, grad_norm))
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)

        # 3. log and checkpoint
        last = step + 1 == t.steps
        training.log_step(step, loss, batch, lr=lr, grad_norm=grad_norm, last=last)
        if (step + 1) % t.checkpoint_every == 0 or last:
            training.checkpoint(step + 1)
    training.finish()


def make_objective(exp: Experiment, method: Method) -> Objective:
    """What the method minimises; opens the teacher."""
    if not method.distilled:
        return cross_entropy
    distill, steps = exp.config.distill, exp.config.train.steps
    return Distillation(lambda step: distill.options(method, step, steps), exp.teacher(), domains=exp.domains)


class Training:
    """A method in training: the model at its step, and all that a step needs or moves.

    Attributes:
        start: the step to begin at; 0, or what the last checkpoint had done.
        model, optimizer, mixture, plan: what a checkpoint holds.
    """

    def __init__(self, exp: Experiment, method: Method) -> None:
        config, t = exp.config, exp.config.train
        self.exp, self.method, self.folder = exp, method, exp.folder.method(method.name)
        self.plan = make_plan(exp, method)
        self.objective = make_objective(exp, method)
        teacher = exp.teacher() if method.distilled else None
        self.taught = fingerprint(teacher)
        windows = teacher.windows if isinstance(teacher, TeacherCache) else None  # a recorded teacher knows these alone
        self.model = exp.new_model()
        self.forward: Any = torch.compile(self.model) if t.compile else self.model
        self.language_model = LanguageModel.from_gpt(self.model, exp.tokenizer, name=f"{method.name}, seed {config.seed}")
        self.optimizer = make_optimizer(self.model, t)
        self.mixture = DomainMixture(
            exp.shards,
            self.plan.initial,
            block_size=self.model.config.block_size,
            batch_size=t.batch_size,
            micro_batch_size=t.micro_batch_size,
            draw=t.draw,
            seed=config.seed,
            aligned=windows is not None,
            windows=windows,
        )
        self.start, self.seconds = 0, 0.0  # wall seconds of earlier calls
        torch.manual_seed(config.seed)
        self._resume()
        self.log = RunLog(
            self.folder,
            total=t.steps,
            start=self.start,
            progress=config.log.progress,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=dataclasses.asdict(config),
        )
        if self.start:
            self.log.say(f"resumed at step {self.start}")
        self.metrics = JsonlLog(self.folder.metrics, keep=lambda record: record["step"] < self.start)
        self.plan.bind(self.language_model, self.optimizer, self.log.say)
        self._began = time.perf_counter()
        self._start_window()

    def _resume(self) -> None:
        """Go on from the last checkpoint, where there is one."""
        checkpoints = list_checkpoints(self.folder.checkpoints)
        if not checkpoints:
            return
        self.start, state, arrays = load_checkpoint(checkpoints[-1], model=self.model, optimizer=self.optimizer)
        self.mixture.load_state_dict(state["mixture"])
        check_same_teacher(self.method.name, state.get("teacher"), self.taught)
        self.seconds = state["seconds"]
        self.exp.place.set_rng_state(arrays)
        self.plan.load_state_dict(arrays)

    def checkpoint(self, done: int) -> None:
        """Write a checkpoint after `done` steps."""
        save_checkpoint(
            self.folder.checkpoints,
            step=done,
            model=self.model,
            optimizer=self.optimizer,
            state={"mixture": self.mixture.state_dict(), "seconds": self.elapsed(), "teacher": self.taught},
            arrays=self.exp.place.rng_state() | self.plan.state_dict(),
        )

    def _start_window(self) -> None:
        """Begin to count the tokens per second of the next record."""
        self._window_began, self._window_tokens = time.perf_counter(), 0

    def elapsed(self) -> float:
        """Wall seconds of the method, those of earlier calls included."""
        return self.seconds + time.perf_counter() - self._began

    def weights_in_force(self) -> Weights:
        return dict(zip(self.mixture.domains, self.mixture.weights.tolist(), strict=True))

    def measure(self, step: int) -> dict[str, Any]:
        """One record of metrics.jsonl; empty without a target."""
        record = measure(self.exp, self.language_model, step, self.folder, self.weights_in_force())
        if record is not None:
            self.metrics.write(record)
            self.log.measured(record)
        self._start_window()  # measuring is not training
        return record or {}

    def set_learning_rate(self, step: int) -> float:
        t = self.exp.config.train
        lr = learning_rate(step, t.steps, peak=t.learning_rate, final=t.min_lr, warmup=round(t.warmup * t.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def backward(self, step: int, batch: Batch) -> np.ndarray:
        """Add the gradient of the batch's mean loss, in micro-batches; the mean loss of each sequence [batch_size]."""
        place, size = self.exp.place, self.exp.config.train.micro_batch_size
        losses = []
        for first in range(0, len(batch.x), size):
            part = slice(first, first + size)
            rows = Rows(place.put(batch.x[part]), place.put(batch.y[part]), batch.domain[part], batch.start[part])
            with place.autocast():  # the mean gives the gradient, the tokens' losses [B, T] only report domains apart
                hidden = self.forward(rows.x)
                mean, token_loss = self.objective(step, hidden, self.model.head_weight, self.model.config.valid_vocab, rows)
            (mean / (len(batch.x) // size)).backward()
            losses.append(token_loss.mean(dim=1))
        self._window_tokens += batch.x.numel()
        return torch.cat(losses).double().cpu().numpy()

    def log_step(self, step: int, loss: np.ndarray, batch: Batch, *, lr: float, grad_norm: float, last: bool) -> None:
        """Move the progress bar; one record of log.jsonl every `log.every` steps and at the last."""
        every = self.exp.config.log.every
        self.log.advance()
        if step % every and not last:
            return
        self.log.step(
            {
                "step": step,
                "loss": float(loss.mean()),
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens_per_s": self._window_tokens / max(time.perf_counter() - self._window_began, 1e-9),
                "loss_by_domain": self._by_domain(loss, batch),
                "weights": self.weights_in_force(),
            },
            line=step % (10 * every) == 0 or last,
        )
        self._start_window()

    def _by_domain(self, loss: np.ndarray, batch: Batch) -> Weights:
        """Mean loss of each domain in the batch, nats per token; domains not drawn are left out."""
        domains = self.mixture.domains
        return {domains[k]: float(loss[batch.domain == k].mean()) for k in np.unique(batch.domain).tolist()}

    def not_finite(self, step: int, loss: np.ndarray, batch: Batch, grad_norm: float) -> str:
        """What to tell a user whose loss or gradient is not finite."""
        bad = sorted({self.mixture.domains[k] for k in batch.domain[~np.isfinite(loss)].tolist()})
        where = f"the loss is not finite on {listed(bad)}" if bad else f"the gradient norm is {grad_norm}"
        kept = list_checkpoints(self.folder.checkpoints)
        after = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint before it"
        return (
            f"method {self.method.name!r}, step {step}: {where}; nothing was updated, {after}. Lower train.learning_rate or "
            "check the data"
        )

    def finish(self) -> None:
        """The last measurement, the weights file, the model, and result.json; checkpoints go when all stand."""
        seconds = self.elapsed()
        measured = self.measure(self.exp.config.train.steps)
        method_weights(self.exp, self.method, self.plan, self.folder).save(self.folder.weights)
        self.model.save(
            self.folder.final,
            tokenizer_describe=self.exp.tokenizer,
            extra={"domain_weights": self.plan.trained_on(self.mixture.consumed), "name": self.method.name},
        )
        self.log.close()
        self.metrics.close()
        write_result(self.exp, self.method, seconds=seconds, measured=measured)
        self.folder.remove_checkpoints()  # final/ and result.json stand: nothing is left to resume
