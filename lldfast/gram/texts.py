"""The gradient of every text's log-likelihood, as a sketch: one forward and backward pass per batch of texts.

Row n of the result is the signed XOR-fold (ops/sketch/fold.py) of g_n, the gradient of text n's TOTAL log-likelihood in nats,
over the collector's flat parameter space: trainable parameters in the order of `named_parameters`, tied ones once. No g_n is ever
stored, so memory depends on the batch and not on the number of texts:

- nn.Linear and Hugging Face's Conv1D: forward hooks keep the inputs a, tensor hooks bring the outputs' gradients b, and
  `fold_outer` folds sum_t b_t a_t^T. Autograd is told, while such a module runs, that its weights need no gradient.
- nn.Embedding: the rows that a text uses. nn.LayerNorm, nn.RMSNorm, biases: vectors.
- modules called *Norm whose parameters are vectors of the last dimension: they run on one copy of these per row of the batch,
  whose gradients are the rows' own.
- the head, where a model keeps it apart: the logits' gradients are made of the hidden states, some vocabulary rows at a time.

Whatever else uses a parameter leaves a gradient in autograd. In a batch of several texts that is their sum, of no use: the batch
is done again one text at a time, as all batches after it are, and there autograd's gradient is folded beside the rest. That costs
small batches and the memory of one gradient, but needs to know nothing about the module. And since hooks can be mistaken about
a model's code, one text of the first batch is compared with plain autograd, parameter by parameter, before anything is returned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lldfast.data.evalset import EvalSet
from lldfast.errors import InputError, TrainingError
from lldfast.gram.collector import Layout
from lldfast.gram.hooks import BatchRun, NotSeparable, Setting, Slot
from lldfast.models.batches import IGNORE, SegmentBatch, evaluating, layer_tokens, token_logprobs
from lldfast.models.language_model import LanguageModel, Segment
from lldfast.models.together import Together
from lldfast.ops.sketch.fold import check_k, fold
from lldfast.ops.sketch.philox import check_seed

PROJECTIONS = 4  # numbers that a parameter's part of a sketch is compared by
# Relative differences of a text in a batch from the same text alone: rounding stays far below, a mistake is of the order of 1.
# With the least norm that counts, in units of the whole gradient's: that of a key's bias is nothing but rounding.
TOLERANCE = {torch.float64: (1e-3, 1e-3), torch.float32: (1e-2, 1e-3)}
HALF_TOLERANCE = (0.25, 0.03)


@dataclass(frozen=True)
class PerTextSketches:
    """Sketches of the texts' gradients, in the order of the evaluation set.

    Attributes:
        sketches: fp64 [N, k]; their inner products estimate those of the gradients, in nats^2 per unit of parameter^2.
        squares: |g_n|^2 [N], fp64, not from the sketch.
        n_tokens: scored tokens [N]; a text without any has a gradient of 0.
        domain: names [N].
        k, seed: of the sketch.
    """

    sketches: NDArray[np.float64]
    squares: NDArray[np.float64]
    n_tokens: NDArray[np.int64]
    domain: NDArray[np.object_]
    k: int
    seed: int


def per_text(
    model: LanguageModel,
    evalset: EvalSet,
    *,
    k: int,
    seed: int = 0,
    batch_tokens: int = 4096,
    scale: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
) -> PerTextSketches:
    """Sketch the log-likelihood gradient of every text of `evalset`.

    Args:
        model: a LanguageModel; frozen parameters are left out, tied ones count once.
        k: buckets of a sketch, a power of two.
        seed: of the sketch, in [0, 2^64); sketches are comparable if k, seed and the parameters are the same.
        batch_tokens: tokens of a batch with padding. The windows of one text stay together, however long it is.
        scale: fp32 per parameter name (1 for those that it lacks): g_n * scale is sketched, and `squares` are of that.
        backend: of the folds: "auto", "cpp", "triton" or "torch".

    Raises:
        InputError: no trainable parameter, a wrong k, seed or scale, or the check of the first batch failed: the model uses the
            parameter it names in a way that hooks do not see (the collector, which takes any model, then serves).
        TrainingError: a gradient is not finite; text and domain named.
    """
    check_k(k)
    check_seed(seed)
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be positive, not {batch_tokens}")
    engine = _Engine(model, k, seed, scale, backend)
    n = len(evalset)
    sketches, squares, n_tokens = (
        torch.zeros(n, k, dtype=torch.float64),
        torch.zeros(n, dtype=torch.float64),
        np.zeros(n, np.int64),
    )
    texts: dict[int, list[Segment]] = defaultdict(list)
    for segment in model.tokenize(evalset):
        texts[segment.text].append(segment)
        n_tokens[segment.text] += len(segment) - segment.first
    with evaluating(model):
        most = layer_tokens(model, batch_tokens)
        for which, windows in _batches(texts, most, batch_tokens, model.device, model.together):
            _check_windows(model, which, windows)
            out, square = engine.batch(windows)
            bad = ~(torch.isfinite(square) & torch.isfinite(out.sum(1)))
            if bool(bad.any()):
                text = which[int(bad.nonzero()[0, 0])]
                raise TrainingError(f"per_text: the gradient of text {text} of domain {evalset.domain[text]!r} is not finite")
            sketches[which], squares[which] = out.to("cpu"), square.to("cpu")
    return PerTextSketches(sketches.numpy(), squares.numpy(), n_tokens, evalset.domain.copy(), k, seed)


def _batches(
    texts: dict[int, list[Segment]], tokens: int, most: int, device: torch.device, together: Together
) -> Iterator[tuple[list[int], list[list[Segment]]]]:
    """Numbers of texts, and their windows. Texts of a batch have as many windows each; longest first shows a lack of memory."""
    order = sorted(texts, key=lambda text: (-len(texts[text]), -len(texts[text][0]), text))

    def lengths(text: int) -> list[int]:
        return [together.inputs(len(w.ids)) for w in texts[text]]

    while order:
        windows = texts[order[0]]
        each = len(windows) * max(lengths(order[0]))
        # a CPU's threads have a text each
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        n = max(tokens // each, min(threads, most // each), 1)
        if n > 1 and n * len(windows) == each // len(windows):
            n -= 1  # as many rows as tokens in each, and another order of dimensions would pass for this one
        if together.alone:
            n = 1
        kind = [together.group(length) for length in lengths(order[0])]
        which = [text for text in order[:n] if [together.group(length) for length in lengths(text)] == kind]
        order = order[len(which) :]
        yield which, [texts[text] for text in which]


def _check_windows(model: LanguageModel, which: list[int], windows: list[list[Segment]]) -> None:
    """A text's own windows share a batch too."""
    together = model.together
    apart = len({together.group(together.inputs(len(w.ids))) for of_text in windows for w in of_text}) > 1
    if apart or (together.alone and any(len(of_text) > 1 for of_text in windows)):
        raise InputError(
            f"per_text: text {which[0]} has several windows, and {model.name} gives them other values in one batch than alone; "
            "use the collector for this model"
        )


def _batch(windows: Sequence[Sequence[Segment]], device: torch.device, together: Together) -> SegmentBatch:
    """ids and labels [texts * windows of each, T]."""
    rows = [segment for of_text in windows for segment in of_text]
    lengths = [together.inputs(len(segment.ids)) for segment in rows]
    time = max(lengths)
    ids, labels = np.zeros((len(rows), time), np.int64), np.full((len(rows), time), IGNORE, np.int64)
    for row, s in enumerate(rows):
        ids[row, : lengths[row]] = s.ids[: lengths[row]]
        labels[row, s.first : len(s)] = s.ids[1 + s.first :]
    return SegmentBatch(torch.from_numpy(ids), torch.from_numpy(labels), np.arange(len(rows))).to(device)


class _Engine:
    """A model, batch by batch."""

    def __init__(self, model: LanguageModel, k: int, seed: int, scale: Mapping[str, Tensor] | None, backend: str) -> None:
        layout, scale = Layout.of(model.module), scale or {}
        parameters = dict(model.module.named_parameters())
        unknown = set(scale) - set(layout.names)
        if unknown:
            raise InputError(f"scale: {model.name} has no trainable parameter {min(unknown)!r}")
        slots: dict[int, Slot] = {}
        for name, offset in zip(layout.names, layout.offsets, strict=True):
            p, factor = parameters[name], scale.get(name)
            if getattr(p, "_post_accumulate_grad_hooks", None):
                raise InputError(f"{name} has a post-accumulate-grad hook (an optimiser step?), which would change the model")
            if factor is not None and (factor.dtype != torch.float32 or factor.shape != p.shape or factor.device != p.device):
                raise InputError(f"scale of {name} must be fp32 {tuple(p.shape)} on {p.device}")
            slots[id(p)] = Slot(name, p, offset, None if factor is None else factor.detach().reshape(-1).contiguous())
        self.model, self.setting = model, Setting(model, slots, k, seed, backend)
        self.parameters = [slot.parameter for slot in slots.values()]
        self.one_by_one = self.checked = False

    def batch(self, windows: list[list[Segment]]) -> tuple[Tensor, Tensor]:
        """Sketches [n, k] and squares [n] of texts with as many windows each."""
        if len(windows) > 1 and not self.one_by_one:
            try:
                return self.together(windows)
            except NotSeparable:
                self.one_by_one = True
        found = [self.together([of_text]) for of_text in windows]
        return torch.cat([out for out, _ in found]), torch.cat([square for _, square in found])

    def together(self, windows: list[list[Segment]]) -> tuple[Tensor, Tensor]:
        run = BatchRun(
            self.setting,
            _batch(windows, self.model.device, self.model.together),
            len(windows),
            PROJECTIONS if not self.checked else 0,
        )
        kept = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        try:
            run.forward_backward()
            run.finish()
        finally:
            for p, grad in zip(self.parameters, kept, strict=True):
                p.grad = grad
        if not self.checked:
            self.check(run)
            self.checked = True
        run.clear()
        return run.out, run.squares

    def check(self, run: BatchRun) -> None:
        """The last text of a batch against autograd on this text alone, parameter by parameter."""
        rows = slice(len(run.batch.ids) - run.windows, None)
        alone = SegmentBatch(run.batch.ids[rows], run.batch.labels[rows], run.batch.segment[rows])
        with torch.enable_grad():
            total = token_logprobs(self.model, alone).sum()
            grads = torch.autograd.grad(total, self.parameters, allow_unused=True)
        slots, wanted = list(self.setting.slots.values()), []
        for slot, g in zip(slots, grads, strict=True):
            sketch = torch.zeros(run.out.shape[1], dtype=torch.float64, device=run.out.device)
            square = torch.zeros((), dtype=torch.float64, device=run.out.device)
            if g is not None:
                square = fold(sketch, g, offset=slot.offset, seed=self.setting.seed, scale=slot.scale)[0]
            wanted.append((square, run.probe @ sketch))
        total_norm = float(sum(square for square, _ in wanted)) ** 0.5
        if not np.isfinite(total_norm):
            return  # the caller names the text
        for slot, (square, projections) in zip(slots, wanted, strict=True):
            tolerance, floor = TOLERANCE.get(slot.parameter.dtype, HALF_TOLERANCE)
            norm = max(float(square) ** 0.5, floor * total_norm)
            got, probes = run.noted.get(slot, (torch.zeros_like(square), torch.zeros_like(projections)))
            off = max(abs(max(float(got), 0.0) ** 0.5 - float(square) ** 0.5), float((probes - projections).abs().max()))
            if not off <= tolerance * norm:
                raise InputError(
                    f"per_text: {self.model.name} uses {slot.name} in a way its hooks do not see: the gradient of a text in a "
                    f"batch is {off / norm:.1g} (relative) from the text's own; use the collector for this model"
                )
