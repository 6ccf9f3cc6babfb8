"""What a Hugging Face model does, asked of itself on a few tokens before any text is scored by it.

- Its head (head.py), or why that cannot be told apart.
- Causal: tokens after a position must not reach it. They are changed, and the gradient of an earlier position by them must be 0:
  the gradient shows a path that is lost in rounding, the change one that cannot be differentiated. Both look at what enters the
  output layer, so that a head of zeros hides nothing.
- The same again: a model that draws random numbers in evaluation mode has no log-likelihood.
- Neighbours: a row must have the values that it has alone beside a longer row, with padding, or at least beside one as long.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from lldfast.errors import InputError
from lldfast.models.forward import MODEL_ERRORS, full_logits, head_input, in_short, wrapped
from lldfast.models.head import Measured, NotApart, measure
from lldfast.models.hf_config import config_int, context_length_of, scalars, text_config
from lldfast.models.modes import evaluation_mode
from lldfast.models.together import ALONE, ANY, EQUAL, Together, rule_of_config

LENGTH = 12  # tokens of a probe, in which every position is asked whether it sees a later one
LONG = 4 * LENGTH  # of one in which two are
# Models that work on pieces of a text show what they do between pieces only on a probe that is longer than one.
PIECES = ("chunk_size", "chunk_length", "block_size", "window", "window_size")
LONGEST_PIECE = 128
# Largest change of a position's values, relative to their norm, that is rounding: of sums in another order, through all layers.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
HALF_ROUNDING = 0.15
HALF_SAME_SHAPE = 0.02
# Gradients that no path leads to are 0, but for what cancels in sums of a whole chunk of positions.
NO_GRADIENT = 1e-5


class Findings(NamedTuple):
    """
    Attributes:
        measured: what follows the output matrix; None where the model must make its logits itself.
        reason: why it must.
        vocab: logits per token.
        together: which texts may share a batch.
        decided: whether the probe could show a model that is not causal: tokens do reach each other.
    """

    measured: Measured | None
    reason: str
    vocab: int
    together: Together
    decided: bool


def fingerprint(module: Any, deep: bool = False) -> tuple[Any, ...]:
    """What findings depend on, for `==`: configuration, output layer and its hooks, what the module itself holds.

    Args:
        deep: also the kinds of all submodules, their hooks, and whether they say that they are causal.
    """
    layer = getattr(module, "get_output_embeddings", lambda: None)()
    of_layer: tuple[Any, ...] = ()
    if isinstance(layer, nn.Module):
        weight = getattr(layer, "weight", None)
        about = () if not isinstance(weight, Tensor) else (type(weight), weight.shape, weight.dtype, weight.device.type)
        of_layer = (id(layer), type(layer), "forward" in vars(layer), _hooks(layer), *about)
    found: tuple[Any, ...] = (of_layer, *scalars(getattr(module, "config", None)))
    for part in wrapped(module):
        tensors = [t for t in (*part._parameters.values(), *part._buffers.values()) if t is not None]
        found += tuple((id(t), -1 if t.is_inference() else t._version) for t in tensors)
        plain = ((key, value) for key, value in vars(part).items() if isinstance(value, (bool, int, float, str)))
        found += tuple(item for item in plain if item[0] != "training")  # evaluation mode is the probe's own affair
        found += (id(vars(part).get("forward")), _hooks(part))
    if deep:
        parts = module.modules()
        found += tuple((type(p), vars(p).get("is_causal"), "forward" in vars(p), _hooks(p)) for p in parts)
    return found


def _hooks(part: nn.Module) -> tuple[int | None, ...]:
    """Their numbers, which are never given twice."""
    return (*part._forward_hooks, None, *part._forward_pre_hooks)


def probe(module: Any) -> Findings:
    """Findings of now, whatever mode the module is in; it is as it was afterwards, and so is the random number generator.

    Raises:
        InputError: the module is not causal, gives other values each time, or does not run on token ids alone.
    """
    device = next(module.parameters()).device
    with evaluation_mode(module), _plainly(device):
        return _probe(module, device)


@contextlib.contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """No autocast, no inference mode, no gradients but where asked for; random numbers come again afterwards."""
    devices = [device] if device.type == "cuda" else []
    plain = torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False)
    with plain[0], plain[1], plain[2], torch.random.fork_rng(devices):
        yield


def _probe(module: Any, device: torch.device) -> Findings:
    name = type(module).__name__
    ids = _ids(module).to(device)
    few = ids[None, :3]
    try:
        vocab = full_logits(module, few).shape[-1]
    except MODEL_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} does not run on token ids alone: {in_short(error)}") from error
    measured, reason = None, ""
    try:
        measured = measure(module, few)
        _check_caught(module, few)
    except NotApart as why:
        measured, reason = None, str(why)
    values = functools.partial(full_logits if measured is None else head_input, module)
    rule = rule_of_config(text_config(module))
    try:
        longest = len(ids) if measured is not None else LONG  # no logits of many rows
        finite = all(_check_settled(name, values, ids[:n]) for n in (LENGTH, longest))
        together = rule.and_also(_neighbours(values, ids[: 2 * LENGTH], rule))
        decided = finite and _check_causal(module, values, ids[:LENGTH], range(1, LENGTH), together)
        for n in {min(LONG, len(ids)), min(longest, len(ids))}:
            if finite and n > LENGTH:
                _check_causal(module, values, ids[:n], (n // 2, n // 2 + 1), together)
    except InputError:
        raise
    except MODEL_ERRORS as error:  # some run on a few tokens and not on more
        raise InputError(f"{name} does not run on {len(ids)} token ids: {in_short(error)}") from error
    return Findings(measured, reason, vocab, together, decided)


def _check_caught(module: Any, ids: Tensor) -> None:
    try:
        head_input(module, ids)
    except MODEL_ERRORS as error:
        raise NotApart(f"its hidden states cannot be caught: {in_short(error)}") from None


def _ids(module: Any) -> Tensor:
    """Ordinary token ids, none that the configuration gives a meaning of its own, for a long probe or for one of some pieces."""
    config = text_config(module)
    table = getattr(getattr(module, "get_input_embeddings", lambda: None)(), "weight", None)
    rows = config_int(config, ("vocab_size",), 0) or (0 if table is None else len(table)) or 2
    special = {v for key, v in scalars(config) if isinstance(v, int) and key.split(".")[-1].endswith(("_id", "_ids", "_index"))}
    ordinary = [i for i in range(min(rows, 4096)) if i not in special] or [0]
    pieces = [v for key, v in scalars(config) if key.endswith(PIECES) and type(v) is int and LENGTH < v <= LONGEST_PIECE]
    n = min(max([LONG, *(2 * v + LENGTH for v in pieces)]), context_length_of(module))
    step = max(1, len(ordinary) // (n + 1))
    return torch.tensor([ordinary[(step * (i + 1)) % len(ordinary)] for i in range(n)])


def _other(ids: Tensor) -> Tensor:
    """Another ordinary id in every place, where there is one."""
    return ids.roll(len(ids) // 2 + 1) if len(ids.unique()) > 1 else ids


def _moved(found: Tensor, want: Tensor) -> Tensor:
    """[T]: by how much each position's values differ, relative to their norm."""
    found, want = found.detach().cpu().double(), want.detach().cpu().double()
    return (found - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def _differ(found: Tensor, want: Tensor, half: float = HALF_ROUNDING) -> bool:
    """Whether positions' values [T, d] differ by more than rounding does.

    In 16 bits rounding may send a token to another expert, which changes it altogether: there most positions must differ.

    Args:
        half: what rounding of 16 bits may be: less between runs of one shape, whose sums have one order.
    """
    moved = _moved(found, want)
    most = moved.max() if want.dtype.itemsize >= 4 else moved.median()
    return bool(most > ROUNDING.get(want.dtype, half))


def _check_settled(name: str, values: Callable[[Tensor], Tensor], ids: Tensor) -> bool:
    """Whether the values are finite; where they are not, scoring names the text.

    Raises:
        InputError: they are others each time.
    """
    first = values(ids[None])[0]
    if not bool(first.isfinite().all()):
        return False
    if _differ(values(ids[None])[0], first, HALF_SAME_SHAPE):
        raise InputError(
            f"{name} gives other values for the same tokens each time, in evaluation mode too: it draws random numbers, so a "
            "text has no log-likelihood under it"
        )
    return True


def _check_causal(module: Any, values: Callable[[Tensor], Tensor], ids: Tensor, cuts: Iterable[int], together: Together) -> bool:
    """Change what comes after each of the cuts, and see whether anything before it moves.

    Returns whether that could be decided: whether anything after a cut moves with what is before it.

    Raises:
        InputError: the module is not causal.
    """
    cuts = [cut for cut in cuts if cut < len(ids)]
    if not cuts:
        return True
    other, middle = _other(ids), cuts[len(cuts) // 2]
    # First: some modules keep what a run leaves, and nothing of a graph should stay in them.
    gradients = [_gradients(module, values, ids, cut) for cut in cuts if cut in (middle, middle + 1)]
    rows = torch.stack([ids, *(torch.cat((ids[:cut], other[cut:])) for cut in cuts)])
    found = torch.cat([values(row[None]) for row in rows]) if together.alone else values(rows)
    moved = any(_differ(row[:cut], found[0, :cut], HALF_SAME_SHAPE) for cut, row in zip(cuts, found[1:], strict=True))
    if moved or any(after > NO_GRADIENT for _, after in gradients):
        raise InputError(
            f"{type(module).__name__} is not causal: tokens change the values at positions before them{_remedy(module)}"
        )
    if any(before > 0 for before, _ in gradients):
        return True
    changed = values(torch.cat((other[:middle], ids[middle:]))[None])[0]
    return bool((_moved(changed, values(ids[None])[0])[middle:] > 0).any())


def _remedy(module: Any) -> str:
    """What the configuration offers."""
    config = text_config(module)
    for key in ("is_decoder", "causal", "is_causal"):
        if getattr(config, key, None) is False:
            return f"; its configuration has {key}=False, and a model that was trained causally needs {key}=True"
    return ", so a text has no log-likelihood under it"


def _gradients(module: Any, values: Callable[[Tensor], Tensor], ids: Tensor, cut: int) -> tuple[float, float]:
    """Norms of the gradient of position cut - 1 by the embeddings before it, and by those after it, relative to the whole.

    0 and 0 where the model cannot be differentiated.
    """
    embeddings = getattr(module, "get_input_embeddings", lambda: None)()
    if not isinstance(embeddings, nn.Module):
        return 0.0, 0.0
    leaves: list[Tensor] = []

    def leaf(_: nn.Module, __: Any, output: Any) -> Any:
        # [1, T, d], which some turn around, or longer than the text where the model puts a prompt of its own before it
        rows = output.shape[:-1] if isinstance(output, Tensor) else torch.Size((0,))
        if rows.numel() < len(ids) or rows.numel() != max(rows):
            return None
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # the model may work in place

    handle = embeddings.register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            row = values(ids[None])[0, cut - 1]
            if not leaves or not row.requires_grad:
                return 0.0, 0.0
            weights = torch.randn(row.shape, generator=torch.Generator().manual_seed(0)).to(row)
            found = torch.autograd.grad((row * weights).sum(), leaves, allow_unused=True)
    except MODEL_ERRORS:  # kernels without a backward pass
        return 0.0, 0.0
    finally:
        handle.remove()
    norms = sum(g.cpu().double().reshape(-1, g.shape[-1])[-len(ids) :].square().sum(-1) for g in found if g is not None)
    if not isinstance(norms, Tensor) or not float(norms.sum()) > 0:
        return 0.0, 0.0
    before, after = norms[: cut - 1].sum(), norms[cut:].sum()
    return float((before / norms.sum()).sqrt()), float((after / norms.sum()).sqrt())


def _neighbours(values: Callable[[Tensor], Tensor], ids: Tensor, rule: Together) -> Together:
    """What rows in a batch ask for, of lengths that may share one according to `rule`."""
    long = max((n for n in range(1, len(ids) + 1) if rule.group(n) == rule.group(1)), default=0)
    n = (long + 1) // 2
    if n == long or rule.alone:
        return ANY
    short = ids[:n]
    alone = values(short[None])[0]

    def same(*neighbours: Tensor) -> bool:
        """Whether `short` has the values that it has alone as the last row, after these, which are of one length."""
        rows = torch.zeros(len(neighbours) + 1, len(neighbours[0]), dtype=ids.dtype, device=ids.device)
        rows[:-1], rows[-1, :n] = torch.stack(neighbours), short
        return not _differ(values(rows)[-1, :n], alone)

    # Other tokens in the same places: a row that begins as this one does would have its values, and mixing would not show.
    longer = ids[:long]
    if same(_other(longer), longer.flip(0), longer.roll(1)):
        return ANY
    return EQUAL if same(_other(short), short.flip(0), short.roll(1)) else ALONE
