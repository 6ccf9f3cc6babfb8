"""Heads that are measured: every model against a plain loop over itself, one text at a time, in fp64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from lldfast import gram, true_kl
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer
from lldfast.distill.objective import TeacherHead
from lldfast.errors import InputError
from lldfast.measure.score import score
from lldfast.models import language_model
from lldfast.models.head import Head, fit
from lldfast.models.loading import load_model

transformers = pytest.importorskip("transformers")

BYTES = load_tokenizer("bytes")  # 257 ids, the last goes before a text
TEXTS = ["Hi", "The quick brown fox jumps over the dog.", "naïve café", "x" * 30]
EVALSET = EvalSet.from_texts(TEXTS, ["a", "a", "b", "b"])
SIZES = {
    "vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "intermediate_size": 24, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8}
RECURRENT = {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8}
# What the layers of each say of the products of the output layer: (class, its sizes, scale, soft cap).
FAMILIES = {
    "Llama": ({}, 1.0, None),
    "FalconH1": ({**MAMBA, "lm_head_multiplier": 0.15}, 0.15, None),
    "RecurrentGemma": ({**RECURRENT, "logits_soft_cap": 2.0}, 1.0, 2.0),
    "Gemma2": ({"final_logit_softcapping": 2.5}, 1.0, 2.5),
    "Granite": ({"logits_scaling": 7.0}, 1 / 7, None),
    "Cohere": ({"logit_scale": 0.3}, 0.3, None),
}


def tiny(family: str, seed: int = 0, **options):
    own = FAMILIES[family][0] if family in FAMILIES else {}
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **own, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() >= 2:
                    p.normal_(0, 0.3)
    return model


def untied(model):
    """The model with an output matrix of its own."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return head


def loop(model, texts=TEXTS) -> np.ndarray:
    """Log-likelihoods [N]: the model's own logits of each text, run alone and whole, in fp64."""
    model, found = copy.deepcopy(model).double().eval(), []
    for text in texts:
        ids = torch.tensor([[256, *text.encode()]])
        with torch.no_grad():
            logprob = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].double(), -1)
        found.append(float(logprob.gather(-1, ids[0, 1:, None]).sum()))
    return np.array(found)


def check(scorer, model, tolerance: float = 1e-5) -> None:
    want = loop(model)
    np.testing.assert_allclose(score(scorer, EVALSET).logprob, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_and_cap_are_measured_in_every_dtype(family):
    model = tiny(family)
    check(load_model(model, tokenizer=BYTES), model)
    for dtype in (torch.float16, torch.bfloat16):
        lm = load_model(model.to(dtype), tokenizer=BYTES)
        assert lm.identity["head"] == "weight"
        options = lm.head().options()
        assert (options["logit_scale"], options["softcap"]) == (pytest.approx(FAMILIES[family][1]), FAMILIES[family][2])
        # The layers in 16 bits are the model's own affair; what follows them must add nothing.
        ids = torch.tensor([[256, *TEXTS[1].encode()]])
        with torch.no_grad():
            own = torch.log_softmax(lm.logits(ids)[0].float(), -1)
            ours = torch.log_softmax(lm.head().logits(lm.hidden(ids)[0].float()), -1)
        assert (own - ours).abs().max() < 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "family", ["RecurrentGemma", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "RecurrentGemma")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_says_nothing_when_it_is_loaded(family, dtype):
    """Zero, or so small that no cap shows, and trained afterwards."""
    model = tiny(family).to(dtype)
    head = untied(model)
    kept = head.weight.detach().clone()
    for factor in (0.0, 1e-3):
        with torch.no_grad():
            head.weight.copy_(kept * factor)
        lm = load_model(model, tokenizer=BYTES)
        with torch.no_grad():
            head.weight.copy_(3 * kept)
        want = score(load_model(model, tokenizer=BYTES), EVALSET).logprob
        assert np.array_equal(score(lm, EVALSET).logprob, want)
        if dtype == torch.float32:
            check(lm, model)


def test_the_head_of_now_is_scored():
    model = tiny("Granite")
    lm = load_model(model, tokenizer=BYTES)
    seen = [score(lm, EVALSET).logprob]

    def differs() -> None:
        check(lm, model)
        seen.append(score(lm, EVALSET).logprob)
        assert np.abs(seen[-1] - seen[-2]).max() > 0.1

    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach())  # and so no longer tied
    differs()
    model.config.logits_scaling = 2.0
    differs()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(260, generator=torch.Generator().manual_seed(0)))
    differs()
    model.lm_head = torch.nn.Linear(16, 260)
    differs()
    model.lm_head.register_forward_hook(lambda layer, args, output: 3 * output)
    differs()
    model.lm_head.register_forward_pre_hook(lambda layer, args: (args[0].flip(-1),))
    differs()
    assert lm.identity["head"] == "weight"


def test_the_vocabulary_follows_resized_embeddings():
    model = tiny("Llama", vocab_size=300, tie_word_embeddings=False)
    lm = load_model(model, tokenizer=BYTES)
    assert lm.vocab_size == 300
    for rows in (280, 400):
        model.resize_token_embeddings(rows, mean_resizing=False)
        check(lm, model)
        assert lm.vocab_size == rows and len(lm.head().weight) == rows
    model.resize_token_embeddings(200)
    with pytest.raises(InputError, match="the vocabulary of 200"):
        score(lm, EVALSET)


class Odd(transformers.LlamaForCausalLM):
    """Logits that are no scale and cap of the output layer's products."""

    def forward(self, **kwargs):
        out = super().forward(**kwargs)
        out.logits = out.logits + 0.1 * out.logits.mean(-1, keepdim=True).abs() * torch.arange(260) / 260
        return out


class Learnt(transformers.LlamaForCausalLM):
    """A scale that is learnt, whose gradient a head apart would not have."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, **kwargs):
        out = super().forward(**kwargs)
        out.logits = out.logits * self.temperature
        return out


class Fixed(Learnt):
    def __init__(self, config):
        super().__init__(config)
        self.temperature.requires_grad_(False)


@pytest.mark.parametrize("kind,why", [(Odd, "not a scale and a soft cap"), (Learnt, "trainable parameters stand behind")])
def test_what_cannot_be_told_apart_is_scored_whole_with_a_note(kind, why, capsys):
    torch.manual_seed(0)
    model = kind(transformers.LlamaConfig(**SIZES, initializer_range=0.3)).eval()
    lm = load_model(model, tokenizer=BYTES)
    check(lm, model)
    check(lm, model)
    said = capsys.readouterr().err
    assert said.count("scored through its full logits") == 1 and why in said and "16 MiB for 16,384 tokens x 260 ids" in said
    assert why in lm.identity["head"]


def test_a_fixed_scale_that_changes_is_measured_again():
    torch.manual_seed(0)
    model = Fixed(transformers.LlamaConfig(**SIZES, initializer_range=0.3)).eval()
    lm = load_model(model, tokenizer=BYTES)
    for factor in (1.0, 2.0, 0.37):
        with torch.no_grad():
            model.temperature.fill_(factor)
        check(lm, model)
        assert lm.head().logit_scale == pytest.approx(factor, rel=1e-6)


def test_adapters():
    peft = pytest.importorskip("peft")
    for targets, apart in ((["q_proj", "down_proj"], True), (["q_proj", "lm_head"], False)):
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny("Llama", tie_word_embeddings=False), config).eval()
        lm = load_model(model, tokenizer=BYTES)
        assert lm.separate_head == apart, lm.identity["head"]
        check(lm, model)
    # added later, to a model that is loaded already
    model = tiny("Llama", tie_word_embeddings=False)
    lm = load_model(model, tokenizer=BYTES)
    assert lm.separate_head
    model.add_adapter(config)
    check(lm, model)
    assert not lm.separate_head
    # Its rows come before those of the text.
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("Llama"), config).eval()
    want = []
    for text in TEXTS:
        ids = torch.tensor([[256, *text.encode()]])
        with torch.no_grad():
            logprob = torch.log_softmax(model(input_ids=ids[:, :-1]).logits[0, 3:].double(), -1)
        want.append(float(logprob.gather(-1, ids[0, 1:, None]).sum()))
    np.testing.assert_allclose(score(load_model(model, tokenizer=BYTES), EVALSET).logprob, want, rtol=1e-5)


def bert(**options):
    sizes = {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(**sizes, max_position_embeddings=64, **options)
    torch.manual_seed(0)
    return transformers.BertLMHeadModel(config).eval()


def xlnet():
    torch.manual_seed(0)
    return transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=260, d_model=16, n_layer=2, n_head=2, d_inner=24)
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make,remedy",
    [(lambda: bert(is_decoder=False), "is_decoder=True"), (xlnet, "no log-likelihood")],
)
@pytest.mark.parametrize("zero", [False, True])
def test_a_model_that_is_not_causal_is_refused(make, remedy, dtype, zero):
    model = make().to(dtype)
    if zero:
        torch.nn.init.zeros_(untied(model).weight)
    with pytest.raises(InputError, match=rf"{type(model).__name__} is not causal.*{remedy}"):
        load_model(model, tokenizer=BYTES)


def test_bert_as_a_decoder():
    model = bert(is_decoder=True, initializer_range=0.3)
    lm = load_model(model, tokenizer=BYTES)
    check(lm, model)
    for part in model.modules():
        part.is_causal = False
    model.config.is_decoder = False
    with pytest.raises(InputError, match=r"BertLMHeadModel is not causal.*is_decoder=True"):
        score(lm, EVALSET)


def test_layers_without_weights_hide_what_is_not_causal_only_until_they_have_some():
    model = bert(is_decoder=False)
    parts = [part.attention.output.dense for part in model.bert.encoder.layer]
    for part in parts:
        torch.nn.init.zeros_(part.weight)
    lm = load_model(model, tokenizer=BYTES)
    score(lm, EVALSET)
    for part in parts:
        torch.nn.init.normal_(part.weight)
    with pytest.raises(InputError, match="BertLMHeadModel is not causal"):
        score(lm, EVALSET)


class Noisy(transformers.LlamaForCausalLM):
    def forward(self, **kwargs):
        out = super().forward(**kwargs)
        out.logits = out.logits + torch.rand_like(out.logits)
        return out


def test_random_numbers_in_evaluation_mode_are_refused_and_none_is_drawn():
    model = Noisy(transformers.LlamaConfig(**SIZES)).eval()
    state = torch.random.get_rng_state()
    with pytest.raises(InputError, match="Noisy gives other values for the same tokens each time"):
        load_model(model, tokenizer=BYTES)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_longrope_of_one_set_of_frequencies_needs_no_rule():
    rope = {"rope_type": "longrope", "short_factor": [1.0, 2.0] * 2, "long_factor": [1.0, 2.0] * 2, "rope_theta": 10_000.0}
    model = tiny("Phi3", rope_parameters=rope, original_max_position_embeddings=16)
    lm = load_model(model, tokenizer=BYTES)
    assert str(lm.together) == "any texts in a batch"
    check(lm, model)


def test_longrope_scores_short_and_long_texts_apart(capsys):
    """Above 16 tokens a batch would get the long factors, its short texts too."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 6.0, 9.0], "rope_theta": 10_000.0}
    model = tiny("Phi3", rope_parameters=rope, original_max_position_embeddings=16)
    lm = load_model(model, tokenizer=BYTES)
    check(lm, model)
    assert "texts of up to 16 tokens and longer ones in batches of their own" in capsys.readouterr().err
    want = gram.estimate(lm, EVALSET, mode="exact", debias=False, groups=1, ridge=None, batch_tokens=1).gram
    got = gram.estimate(lm, EVALSET, mode="exact", debias=False, groups=1, ridge=None).gram
    np.testing.assert_allclose(got, want, rtol=1e-4)
    texts = gram.per_text(lm, EVALSET, k=64).sketches, gram.per_text(lm, EVALSET, k=64, batch_tokens=1).sketches
    np.testing.assert_allclose(*texts, rtol=1e-3, atol=1e-3 * np.abs(texts[1]).max())
    other = load_model(tiny("Llama", seed=1), tokenizer=BYTES)
    assert true_kl(other, lm, EVALSET) == pytest.approx(true_kl(other, lm, EVALSET, batch_tokens=1), rel=1e-5)


def test_dynamic_rope_forgets_longer_texts():
    """Frequencies grow with the longest text so far; a text that comes after it must not see them."""
    rope = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10_000.0}
    model = tiny("Llama", rope_parameters=rope, max_position_embeddings=8)
    lm = load_model(model, tokenizer=BYTES)
    lm.context_length = 64  # beyond the length that the model is made for
    want = [loop(model, [text])[0] for text in TEXTS]  # every time a model that has seen nothing
    np.testing.assert_allclose(score(lm, EVALSET).logprob, want, rtol=1e-5)
    np.testing.assert_allclose(score(lm, EVALSET).logprob, want, rtol=1e-5)


def sparse(**options):
    """Each query attends to the 4 keys that an indexer chooses."""
    config = transformers.DeepseekV32Config(**{
        **SIZES, "moe_intermediate_size": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2, "index_head_dim": 8, "index_n_heads": 2,
        "index_topk": 4, "initializer_range": 0.3, **options,
    })  # fmt: skip
    torch.manual_seed(0)
    return transformers.DeepseekV32ForCausalLM(config).eval()


@pytest.mark.skipif(not hasattr(transformers, "DeepseekV32Config"), reason="this transformers has no sparse attention of it")
def test_keys_that_are_chosen_by_an_indexer():
    """Of many keys with the same score, 0, it chooses others when there are more behind them: also padding that no query sees."""
    model = sparse()
    lm = load_model(model, tokenizer=BYTES)
    assert (lm.together.equal_above, lm.together.alone) == (4, False)
    check(lm, model)


class Together(transformers.LlamaForCausalLM):
    """Values that depend on what else is in the batch: on its rows, or on its length."""

    rows, length = 0.0, 0.0

    def forward(self, input_ids, **kwargs):
        self.model.norm.weight.data.fill_(1 + self.rows * (len(input_ids) - 1) + self.length * (input_ids.shape[1] - 1))
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("rows,length,rule", [(0.0, 0.02, "batches of equal length"), (0.5, 0.0, "one text in a batch")])
def test_neighbours_that_change_a_text_are_kept_away(rows, length, rule, capsys):
    torch.manual_seed(0)
    model = Together(transformers.LlamaConfig(**SIZES, initializer_range=0.3)).eval()
    model.rows, model.length = rows, length
    lm = load_model(model, tokenizer=BYTES)
    check(lm, model)
    assert capsys.readouterr().err.count(rule) == 1
    ids = torch.arange(24).view(3, 8)
    with torch.no_grad():
        alone = torch.cat([lm.hidden(row[None]) for row in ids])
        torch.testing.assert_close(lm.hidden(ids), alone)
    with pytest.raises(InputError, match="text 0 has several windows"):
        gram.per_text(lm, EvalSet.from_texts(["x" * 100], ["a"]), k=16)


def test_a_model_in_training_is_probed_once_and_keeps_every_modules_mode(monkeypatch):
    model = tiny("Llama").train()
    model.model.layers[0].eval()
    modes, probed = [part.training for part in model.modules()], []
    probe = language_model.probe
    monkeypatch.setattr(language_model, "probe", lambda module: probed.append(1) or probe(module))
    lm = load_model(model, tokenizer=BYTES)
    assert [part.training for part in model.modules()] == modes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        score(lm, EVALSET)
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        model.train()
    check(lm, model)
    gram.per_text(lm, EVALSET, k=16)
    assert len(probed) == 1


def test_a_running_teachers_head_is_copied_anew_when_it_changes():
    model, kept = tiny("Granite", tie_word_embeddings=False), TeacherHead()
    lm = load_model(model, tokenizer=BYTES)

    def options():
        return kept.options(lm.head(), torch.device("cpu"))

    first = options()["teacher_weight"]
    assert options()["teacher_weight"] is first
    model.lm_head.weight = torch.nn.Parameter(2 * first)
    model.config.logits_scaling = 2.0
    assert torch.equal(options()["teacher_weight"], 2 * first) and options()["teacher_logit_scale"] == 0.5
    second = options()["teacher_weight"]
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert options()["teacher_weight"] is not second and torch.equal(options()["teacher_weight"], 4 * first)


def test_fit_needs_every_value():
    z = torch.cat((torch.logspace(-6, 4, 200), -torch.logspace(-6, 4, 200))).double()
    assert fit(z, (0.7 * z).float().double(), torch.float32, [1.0]) == (pytest.approx(0.7, rel=1e-7), None)
    assert fit(z, (30 * torch.tanh(z / 30)).float().double(), torch.float32, [1.0, 30.0]) == (1.0, 30.0)
    assert fit(z, z.bfloat16().double(), torch.bfloat16, [1.0]) == (1.0, None)
    assert fit(z, (0.7 * z).bfloat16().double(), torch.bfloat16, [1.0, 0.7]) == (0.7, None)
    assert fit(z, (0.7 * z).bfloat16().double(), torch.bfloat16, [1.0]) is None  # no digits to read 0.7 by
    one_masked = z.clone()
    one_masked[77] = -3e38
    assert fit(z, one_masked, torch.float32, [1.0]) is None
    assert fit(z, torch.zeros_like(z), torch.float32, [1.0]) is None


def test_head_options():
    head = Head(torch.eye(3), torch.ones(3), 2.0, 0.5, 2)
    assert head.logits(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([2 * np.tanh(0.5), 2 * np.tanh(0.75)])


class Mixing(torch.nn.Module):
    """A layer of a Llama after which `mix` changes the hidden states [B, T, d]."""

    def __init__(self, layer, mix):
        super().__init__()
        self.layer, self.mix = layer, mix

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args, **kwargs):
        return self.mix(self.layer(*args, **kwargs))


def mixing(mix):
    model = tiny("Llama")
    model.model.layers[-1] = Mixing(model.model.layers[-1], mix)
    return model


def in_blocks(size):
    """Every position sees all of its block of `size` positions."""

    def mix(x):
        block = torch.arange(x.shape[1]) // size
        same = (block[:, None] == block).to(x.dtype)
        return x + (same / same.sum(1, keepdim=True)) @ x

    return mix


def sees_next(at):
    """Position `at` sees the one after it."""

    def mix(x):
        x = x.clone()
        if x.shape[1] > at + 1:
            x[:, at] += x[:, at + 1]
        return x

    return mix


@pytest.mark.parametrize("mix", [*(in_blocks(size) for size in (2, 3, 5, 6, 32)), sees_next(2), sees_next(9)])
def test_a_look_ahead_at_any_position_is_seen(mix):
    with pytest.raises(InputError, match="not causal"):
        load_model(mixing(mix), tokenizer=BYTES)


@pytest.mark.parametrize("mix", [lambda x: x + x.mean(0), lambda x: x * (1 if len(x) < 3 else 2) + 3 * x.roll(1, 0)])
def test_rows_that_mix_in_a_batch_are_run_alone(mix):
    lm = load_model(mixing(mix), tokenizer=BYTES)
    assert lm.together.alone
    check(lm, lm.module)


def test_hooks_and_data_count():
    model = tiny("Llama")
    lm = load_model(model, tokenizer=BYTES)
    check(lm, model)

    def double(module, args, out):
        out.logits = out.logits * 2
        return out

    handle = model.register_forward_hook(double)
    check(lm, model)
    handle.remove()
    check(lm, model)
    handle = model.model.layers[0].register_forward_hook(lambda module, args, out: out + out.flip(1))
    with pytest.raises(InputError, match="not causal"):
        score(lm, EVALSET)
    handle.remove()
    model = bert(is_decoder=False)
    weights = [layer.attention.output.dense.weight for layer in model.bert.encoder.layer]
    kept = [weight.data.clone() for weight in weights]
    for weight in weights:
        weight.data.zero_()
    lm = load_model(model, tokenizer=BYTES)
    for weight, value in zip(weights, kept, strict=True):
        weight.data.copy_(value)  # leaves no trace in the tensor's version
    with pytest.raises(InputError, match="not causal"):
        score(lm, EVALSET)


def test_positions_that_begin_after_the_paddings():
    """RoBERTa's table has rows for fewer tokens than its configuration says."""
    sizes = {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.RobertaConfig(**sizes, max_position_embeddings=20, pad_token_id=3, is_decoder=True)
    torch.manual_seed(0)
    model = transformers.RobertaForCausalLM(config).eval()
    lm = load_model(model, tokenizer=BYTES)
    assert lm.context_length == 16
    text = "x" * 16
    ids = torch.tensor([[256, *text.encode()]])
    with torch.no_grad():
        rows = model(input_ids=ids[:, :-1]).logits[0].double().log_softmax(-1)
    want = float(rows.gather(-1, ids[0, 1:, None]).sum())
    assert score(lm, EvalSet.from_texts([text], ["a"])).logprob[0] == pytest.approx(want, rel=1e-5)
    assert np.isfinite(score(lm, EvalSet.from_texts([text * 3], ["a"])).logprob).all()
