"""gram.per_text: every row against autograd on its text alone, whether hooks know the model's modules or not."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer
from lldfast.errors import InputError, TrainingError
from lldfast.gram import texts
from lldfast.gram.collector import Layout
from lldfast.gram.hooks import BatchRun
from lldfast.gram.texts import per_text
from lldfast.models.batches import batches, evaluating, token_logprobs
from lldfast.models.gpt import GPT, GPTConfig
from lldfast.models.language_model import LanguageModel
from lldfast.models.loading import load_model
from lldfast.ops.sketch.fold import fold

K, SEED = 512, 11
TEXTS = [
    "hello world, this is a text",
    "abc",
    "the river, the stone and the quiet light",
    "x",
    "a" * 30,
    "market data",
    "f(x) = 2x",
    "é" * 20,
]
EVALSET = EvalSet.from_texts(TEXTS, ["prose", "code", "prose", "code", "other", "prose", "code", "other"])


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture
def runs(monkeypatch):
    """Numbers of texts of the batches that were done, in order."""
    found = []

    class Counted(BatchRun):
        def __init__(self, setting, batch, n, projections):
            found.append(n)
            super().__init__(setting, batch, n, projections)

    monkeypatch.setattr(texts, "BatchRun", Counted)
    return found


def wiggle(model):
    """Values that are not 0, 1 or equal in all rows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)
    return model


def gpt(kind=GPT, **options):
    return wiggle(kind(GPTConfig(257, 257, 64, 2, 2, 32, **options), seed=0))


def alone(scorer, evalset=EVALSET, k=K, scale=None):
    """Each text's gradient by autograd, folded whole."""
    layout, parameters = Layout.of(scorer.module), dict(scorer.module.named_parameters())
    sketches = torch.zeros(len(evalset), k, dtype=torch.float64)
    squares = torch.zeros(len(evalset), dtype=torch.float64)
    segments = scorer.tokenize(evalset)
    with evaluating(scorer):
        for n in range(len(evalset)):
            own = [i for i, segment in enumerate(segments) if segment.text == n]
            flat = torch.zeros(layout.size, dtype=torch.float64)
            for batch in batches(segments, 1, own):
                total = token_logprobs(scorer, batch).sum()
                grads = torch.autograd.grad(total, [parameters[name] for name in layout.names], allow_unused=True)
                for g, offset in zip(grads, layout.offsets, strict=True):
                    if g is not None:
                        flat[offset : offset + g.numel()] += g.flatten().double()
            if scale is not None:
                every = [scale.get(name, torch.ones(shape)) for name, shape in zip(layout.names, layout.shapes, strict=True)]
                flat *= torch.cat([s.flatten() for s in every])
            squares[n] = fold(sketches[n], flat, offset=0, seed=SEED)[0]
    return sketches.numpy(), squares.numpy()


def same(found, wanted, limit=1e-4, square_limit=1e-5):
    sketches, squares = wanted
    norms = np.linalg.norm(sketches, axis=1)
    assert np.all(np.linalg.norm(found.sketches - sketches, axis=1) <= limit * norms)
    assert np.all(np.abs(found.squares - squares) <= square_limit * squares)
    assert norms.max() > 0


def compare(scorer, evalset=EVALSET, scale=None, **options):
    before = {name: (p, p.requires_grad) for name, p in scorer.module.named_parameters()}
    found = per_text(scorer, evalset, k=K, seed=SEED, scale=scale, **options)
    same(found, alone(scorer, evalset, scale=scale))
    assert {name: (p, p.requires_grad) for name, p in scorer.module.named_parameters()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in scorer.module.modules())
    return found


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_gpt(tokenizer, runs, batch_tokens, backend):
    scorer = LanguageModel.from_gpt(gpt(), tokenizer)
    found = compare(scorer, batch_tokens=batch_tokens, backend=backend)
    assert found.domain.tolist() == EVALSET.domain.tolist() and (found.k, found.seed) == (K, SEED)
    assert found.n_tokens.tolist() == [len(t.encode()) for t in TEXTS]
    assert sum(runs) == len(TEXTS)  # nothing was done again
    assert (max(runs) > 1) == (batch_tokens > 1)


def test_gpt_without_biases_and_with_padded_vocabulary(tokenizer, runs):
    model = wiggle(GPT(GPTConfig(320, 257, 64, 1, 2, 32, bias=False), seed=0))
    compare(LanguageModel.from_gpt(model, tokenizer))
    assert sum(runs) == len(TEXTS)


class Untied(GPT):
    def __init__(self, config, *, seed=None):
        super().__init__(config, seed=seed)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        return self.head.weight


def test_untied(tokenizer, runs):
    compare(LanguageModel.from_gpt(gpt(Untied), tokenizer))
    assert sum(runs) == len(TEXTS)


@pytest.mark.parametrize("context", [5, 16])
def test_texts_in_several_windows(tokenizer, context):
    scorer = load_model(gpt(), tokenizer=tokenizer, context_length=context)
    assert max(np.bincount([segment.text for segment in scorer.tokenize(EVALSET)])) > 2
    compare(scorer)
    compare(scorer, batch_tokens=60)


@pytest.mark.parametrize("trained", ["wte", "wpe", "ln_1", "ln_f", "blocks.1.up", "blocks.0.qkv.bias", "wte|down"])
def test_frozen_parameters(tokenizer, runs, trained):
    model = gpt()
    for name, p in model.named_parameters():
        p.requires_grad = any(part in name for part in trained.split("|"))
    compare(LanguageModel.from_gpt(model, tokenizer))
    assert sum(runs) == len(TEXTS)


def test_unused_parameters_have_a_place(tokenizer):
    model = gpt()
    model.blocks[0].never = nn.Linear(7, 11)
    compare(LanguageModel.from_gpt(model, tokenizer))


def test_scale(tokenizer):
    model = gpt()
    scale = {name: torch.rand(p.shape) + 0.5 for name, p in model.named_parameters() if "proj" not in name}
    compare(LanguageModel.from_gpt(model, tokenizer), scale=scale)
    compare(load_model(model, tokenizer=tokenizer, context_length=10), scale=scale)


def test_large_sketch_and_chunks_of_the_head(tokenizer, monkeypatch):
    from lldfast.gram import hooks

    monkeypatch.setattr(hooks, "LOGIT_ENTRIES", 1)  # 64 rows of the vocabulary at a time
    compare(LanguageModel.from_gpt(gpt(), tokenizer))


def test_a_text_without_scored_tokens(tokenizer):
    scorer = LanguageModel.from_gpt(gpt(), tokenizer, bos="none")
    found = compare(scorer)
    assert found.n_tokens[3] == 0 and not found.sketches[3].any() and found.squares[3] == 0


def test_gradients_and_mode_of_a_model_in_training_stay(tokenizer):
    model = gpt().train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in model.parameters()]
    per_text(LanguageModel.from_gpt(model, tokenizer), EVALSET, k=K)
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(model.parameters(), grads, strict=True)) and model.training


class Functional(GPT):
    """Uses parameters outside any module's forward: a matrix, a layer's weight a second time, and a norm."""

    def __init__(self, config, *, seed=None):
        super().__init__(config, seed=seed)
        self.extra = nn.Parameter(torch.zeros(config.n_embd, config.n_embd))

    def forward(self, ids):
        x = super().forward(ids)
        x = x + F.linear(x, self.extra) + F.linear(x, self.blocks[0].proj.weight)
        return F.layer_norm(x, x.shape[-1:], self.ln_f.weight, self.wte.weight[3])


def test_functional_uses_are_done_text_by_text(tokenizer, runs):
    compare(LanguageModel.from_gpt(gpt(Functional), tokenizer))
    assert runs[0] > 1 and set(runs[1:]) == {1} and len(runs) == 1 + len(TEXTS)
    compare(load_model(gpt(Functional), tokenizer=tokenizer, context_length=9))


class Twice(GPT):
    """Layers called twice, and an embedding that is also used as a table."""

    def forward(self, ids):
        x = super().forward(ids)
        x = self.ln_f(x + self.blocks[0].proj(x))
        return self.wpe(ids % 7) + self.blocks[1].proj(x)


def test_layers_called_twice(tokenizer, runs):
    compare(LanguageModel.from_gpt(gpt(Twice), tokenizer))
    assert set(runs[1:]) == {1}  # positions come as rows and, in GPT.forward, as a table


class Repeated(GPT):
    def forward(self, ids):
        x = super().forward(ids)
        return self.ln_f(x + self.blocks[0].proj(self.blocks[0].proj(x)))


def test_repeated_layers_stay_fused(tokenizer, runs):
    compare(LanguageModel.from_gpt(gpt(Repeated), tokenizer))
    assert sum(runs) == len(TEXTS)


class Flattened(GPT):
    """A layer that sees tokens without their text, in another order."""

    def forward(self, ids):
        x = super().forward(ids)
        flat = x.transpose(0, 1).reshape(-1, x.shape[-1])
        return x + self.blocks[0].proj(flat).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


class TimeFirst(GPT):
    def forward(self, ids):
        x = super().forward(ids)
        return x + self.blocks[0].proj(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("kind", [Flattened, TimeFirst])
def test_layouts_that_lose_the_text(tokenizer, runs, kind):
    compare(LanguageModel.from_gpt(gpt(kind), tokenizer))
    assert set(runs[1:]) == {1}


def test_as_many_texts_as_tokens(tokenizer, runs):
    """There a tensor of [T, texts] would look like one of [texts, T]."""
    evalset = EvalSet.from_texts(["abcd", "efgh", "ijkl", "mnop", "qrst", "uvwx"], ["d"] * 6)
    compare(LanguageModel.from_gpt(gpt(TimeFirst), tokenizer), evalset, batch_tokens=16)
    assert runs[0] == 3


class Averaged(GPT):
    """Positions of one row, which hooks take for rows that are added to every text, averaged over these rows."""

    def __init__(self, config, *, seed=None):
        super().__init__(config, seed=seed)
        self.more = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, ids):
        return super().forward(ids) + self.more(torch.arange(ids.shape[1])[None]).mean(0)


def test_a_model_that_hooks_misread_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"uses more\.weight in a way.*collector"):
        per_text(LanguageModel.from_gpt(gpt(Averaged), tokenizer), EVALSET, k=K)


class InPlace(GPT):
    def forward(self, ids):
        x = super().forward(ids)
        y = self.blocks[0].proj(x)
        x.mul_(2)
        return y + x


def test_inputs_changed_in_place_are_refused(tokenizer):
    model = gpt(InPlace)
    for name, p in model.named_parameters():
        p.requires_grad = name == "blocks.0.proj.weight"
    with pytest.raises(InputError, match="in place"):
        per_text(LanguageModel.from_gpt(model, tokenizer), EVALSET, k=K)
    assert model.blocks[0].proj.weight.requires_grad and model.blocks[0].proj.weight.grad is None


def test_errors_leave_the_model_as_it_was(tokenizer):
    model = gpt()

    def fail(*_):
        raise RuntimeError("no")

    handle = model.blocks[1].up.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        per_text(LanguageModel.from_gpt(model, tokenizer), EVALSET, k=K)
    handle.remove()
    assert all(p.requires_grad for p in model.parameters())
    compare(LanguageModel.from_gpt(model, tokenizer))


def test_the_text_of_a_nan_is_named(tokenizer):
    model = gpt()
    with torch.no_grad():
        model.wpe.weight[35] = float("nan")  # only texts 2 and 7 are so long
    with pytest.raises(TrainingError, match=r"text 2 of domain 'prose' is not finite"):
        per_text(LanguageModel.from_gpt(model, tokenizer), EVALSET, k=K)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"k": 100}, "power of two"),
        ({"seed": -1}, "seed"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"scale": {"nothing": torch.ones(1)}}, "nothing"),
        ({"scale": {"wpe.weight": torch.ones(3)}}, "wpe.weight"),
    ],
)
def test_refused(tokenizer, change, message):
    with pytest.raises(InputError, match=message):
        per_text(LanguageModel.from_gpt(gpt(), tokenizer), EVALSET, **{"k": K, **change})


def test_refused_models(tokenizer):
    frozen = gpt().requires_grad_(False)
    with pytest.raises(InputError, match="no parameter"):
        per_text(LanguageModel.from_gpt(frozen, tokenizer), EVALSET, k=K)
    stepping = gpt()
    stepping.wpe.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(InputError, match=r"wpe\.weight"):
        per_text(LanguageModel.from_gpt(stepping, tokenizer), EVALSET, k=K)


class Peak(TorchDispatchMode):
    """Most bytes of tensors alive at once, and the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = self.largest = 0
        self.known = weakref.WeakKeyDictionary()

    def freed(self, size):
        self.alive -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage, size = x.untyped_storage(), x.untyped_storage().nbytes()
                if storage not in self.known:
                    self.known[storage] = size
                    weakref.finalize(storage, self.freed, size)
                    self.alive += size
                    self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)
        return result


def test_memory_does_not_grow_with_the_number_of_texts(tokenizer):
    model = GPT(GPTConfig(257, 257, 64, 2, 4, 128), seed=0)
    size, peaks = model.num_params(), {}
    gc.collect()
    gc.disable()  # what only it would free counts
    try:
        for n in (8, 16, 48):
            evalset = EvalSet.from_texts([f"{i:02d} some words" for i in range(n)], ["d"] * n)
            with Peak() as peak:
                per_text(LanguageModel.from_gpt(model, tokenizer), evalset, k=64, batch_tokens=64)
            peaks[n] = peak.peak - n * 64 * 8  # the result itself
            assert peak.largest < 4 * size  # no text's gradient as a whole, much less all of them
    finally:
        gc.enable()
    assert max(peaks.values()) - min(peaks.values()) < 10_000


def test_bf16(tokenizer):
    scorer = LanguageModel.from_gpt(gpt().bfloat16(), tokenizer)
    same(per_text(scorer, EVALSET, k=K, seed=SEED), alone(scorer), 0.05, 0.05)


def test_fp64(tokenizer):
    scorer = LanguageModel.from_gpt(gpt().double(), tokenizer)
    same(per_text(scorer, EVALSET, k=K, seed=SEED), alone(scorer), 1e-10, 1e-10)


def hf(name, **options):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=257, bos_token_id=None, eos_token_id=None, pad_token_id=None, **options
    )
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return wiggle(getattr(transformers, kind)(config)).eval()


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}


@pytest.mark.parametrize("separate", [True, False])
def test_hugging_face_gpt2(tokenizer, runs, separate):
    scorer = load_model(hf("GPT2", **GPT2), tokenizer=tokenizer)
    scorer.separate_head = separate
    compare(scorer)
    assert sum(runs) == len(TEXTS)  # one table of positions for all texts, and Conv1D, are known
    compare(load_model(scorer.module, tokenizer=tokenizer, context_length=9))


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_llama(tokenizer, runs, tied, separate):
    scorer = load_model(hf("Llama", tie_word_embeddings=tied, attention_bias=True, **LLAMA), tokenizer=tokenizer)
    scorer.separate_head = separate
    compare(scorer)
    assert sum(runs) == len(TEXTS)


def test_heads_of_their_own(tokenizer, runs):
    """Norms of queries and keys, whose inputs have a dimension more."""
    compare(load_model(hf("Qwen3", head_dim=8, tie_word_embeddings=True, **LLAMA), tokenizer=tokenizer))
    assert sum(runs) == len(TEXTS)


def test_softcap_and_shifted_norms(tokenizer):
    """Norms of 1 + w; an embedding that is a class of its own, which goes text by text."""
    model = hf("Gemma2", head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0, sliding_window=64, **LLAMA)
    scorer = load_model(model, tokenizer=tokenizer)
    assert scorer.separate_head and scorer.head().softcap == 3.0
    compare(scorer)


def test_experts(tokenizer):
    """Some have no token of a text, and parameters of three dimensions."""
    model = hf("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None, **LLAMA)
    compare(load_model(model, tokenizer=tokenizer))
