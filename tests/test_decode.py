"""models/decode.py: cached decoding equals a full forward pass, and tokens are drawn from the distribution asked for."""

import math

import pytest
import torch

from lldfast.errors import InputError
from lldfast.models.decode import GPTDecoder, HFDecoder, choose_token, decoder_of, draw, draw_levels, probabilities
from lldfast.models.gpt import GPT, GPTConfig
from lldfast.models.loading import load_model

TINY = GPTConfig(vocab_size=128, valid_vocab=101, block_size=24, n_layer=2, n_head=2, n_embd=16, dropout=0.3)
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "Llama": {**LAYERS, "intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 1},
    # layers that see all and layers that see 6 tokens, by turns
    "Gemma2": {**LAYERS, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 6},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def ids(*shape, vocab=101, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def scatter(module, seed=0):
    """Weights large enough that every position matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() >= 2:
                p.normal_(0, 0.2, generator=generator)
    return module


def tiny(family, vocab=101):
    transformers = pytest.importorskip("transformers")
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab, bos_token_id=0, eos_token_id=0, pad_token_id=0, **FAMILIES[family]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return scatter(getattr(transformers, name)(config).eval())


@pytest.fixture(scope="module")
def gpt():
    return scatter(GPT(TINY, seed=0)).train()  # decoding takes no notice of dropout


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, *[1] * 19], [3, 7, 1, 13]])
def test_decoding_equals_a_full_forward_pass(gpt, chunks):
    x = ids(3, 24)
    want = gpt.eval().logits(x)
    gpt.train()
    decoder, at = GPTDecoder(gpt, 3, 24), 0
    for n in chunks:
        got = decoder.step(x[:, at : at + n])
        at += n
        assert got.shape == (3, 101) and got.dtype == torch.float32
        torch.testing.assert_close(got, want[:, at - 1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_fewer_sequences_go_on_where_they_were(gpt):
    x = ids(4, 12)
    want = gpt.eval().logits(x)
    decoder = GPTDecoder(gpt, 4, 12)
    decoder.step(x[:, :6])
    rows = torch.tensor([2, 0])
    assert decoder.keep(rows)
    for at in range(6, 12):
        torch.testing.assert_close(decoder.step(x[rows, at : at + 1]), want[rows, at], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bfloat16_and_a_cut_vocabulary(gpt):
    model = GPT(TINY, seed=0).to(torch.bfloat16)
    got = GPTDecoder(model, 2, 8, vocab=50).step(ids(2, 8))
    assert got.dtype == torch.float32 and got.shape == (2, 50)
    torch.testing.assert_close(got, model.eval().logits(ids(2, 8))[:, -1, :50].float(), rtol=0.02, atol=0.02)
    assert GPTDecoder(gpt, 2, 8, vocab=120).step(ids(2, 8)).shape == (2, 101)  # never the padding


def test_a_decoder_has_a_length(gpt):
    with pytest.raises(InputError, match="25 tokens do not fit a block_size of 24"):
        GPTDecoder(gpt, 1, 25)
    decoder = GPTDecoder(gpt, 1, 4)
    decoder.step(ids(1, 3))
    with pytest.raises(InputError, match="5 tokens do not fit a decoder of 4"):
        decoder.step(ids(1, 2))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Mamba")
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_models_decode_as_they_score(family):
    model, x = tiny(family), ids(4, 14)
    want = model(input_ids=x, use_cache=False).logits
    decoder = HFDecoder(model, vocab=90)
    torch.testing.assert_close(decoder.step(x[:, :5]), want[:, 4, :90], rtol=1e-4, atol=1e-4)
    rows = torch.arange(4)
    for at in range(5, 14):
        if at == 9:
            kept = torch.tensor([3, 1])
            assert decoder.keep(kept)
            rows = rows[kept]
        torch.testing.assert_close(decoder.step(x[rows, at : at + 1]), want[rows, at, :90], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_sequence_that_grows_beyond_a_bound_is_seen_anew():
    """Rope of type longrope turns all positions otherwise from there on."""
    transformers = pytest.importorskip("transformers")
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [float(1 + i) for i in range(8)],
        "rope_theta": 1e4,
    }
    sizes = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.Phi3Config(
        **sizes, num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=8, rope_parameters=rope,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    lm, x = load_model(transformers.Phi3ForCausalLM(config).eval(), tokenizer="bytes", bos="none"), ids(2, 14)
    decoder = decoder_of(lm, 2, 14)
    decoder.step(x[:, :4])
    for at in range(4, 14):
        got = decoder.step(x[:, at : at + 1])
        torch.testing.assert_close(got, lm.logits(x[:, : at + 1])[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_learnt_prompt_stands_before_the_whole_text():
    peft = pytest.importorskip("peft")
    for config in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        model = peft.get_peft_model(tiny("Llama"), config(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
        lm, x = load_model(model, tokenizer="bytes", bos="none"), ids(2, 9)
        decoder = decoder_of(lm, 2, 9)
        with pytest.warns(UserWarning, match="puts a learnt prompt before a text"):
            decoder.step(x[:, :5])
        for at in range(5, 9):
            got = decoder.step(x[:, at : at + 1])
            torch.testing.assert_close(got, lm.logits(x[:, : at + 1])[:, -1], rtol=1e-4, atol=1e-4)


def test_a_model_without_past_key_values_says_so():
    with pytest.warns(UserWarning, match="MambaForCausalLM returns no past_key_values"):
        HFDecoder(tiny("Mamba")).step(ids(1, 3))


def numbers(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frequencies_are_those_of_the_distribution():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -30.0, 0.5])
    n = 40_000
    uniform = numbers(n, draw_levels(6))
    for temperature in (1.0, 0.5, 3.0):
        counts = choose_token(logits.expand(n, -1), uniform, temperature).bincount(minlength=6)
        p = (logits.double() / temperature).softmax(0)
        assert ((counts - n * p).abs() <= 4 * (n * p * (1 - p)).sqrt() + 1e-6).all()


def test_temperature_zero_is_the_argmax():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    logits[0, [4, 9]] = 10.0
    got = choose_token(logits, numbers(50, 5), temperature=0)
    assert torch.equal(got, logits.argmax(-1)) and got[0] == 4
    assert torch.equal(choose_token(logits[1:], numbers(49, 5), temperature=1e-9), got[1:])


def test_top_k_and_top_p_restrict_exactly():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.05, 0.25]])
    kept = lambda **options: probabilities(p.log(), **options)[0].nonzero()[:, 0].tolist()  # noqa: E731
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == [1] and kept(top_k=3) == [1, 2, 4] and kept(top_k=99) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.39) == [1] and kept(top_p=0.41) == [1, 4] and kept(top_p=0.66) == [1, 2, 4]
    assert kept(top_p=1e-9) == [1] and kept(top_p=0.96) == [0, 1, 2, 3, 4]
    # the share is that of the k tokens: 0.4 / 0.85 = 0.47
    assert kept(top_k=3, top_p=0.46) == [1] and kept(top_k=3, top_p=0.48) == [1, 4]
    assert (probabilities(torch.zeros(1, 7), top_k=3) > 0).sum() == 3  # whatever the ties
    counts = choose_token(p.log().expand(2000, -1), numbers(2000, 3), top_k=3).bincount(minlength=5)
    assert counts[0] == counts[3] == 0
    assert ((counts / 2000 - torch.tensor([0, 0.4, 0.2, 0, 0.25]) / 0.85).abs() < 4 * 0.5 / 2000**0.5).all()


@pytest.mark.parametrize("vocab", [1, 2, 5, 8, 257])
def test_a_token_without_weight_is_never_drawn(vocab):
    levels = draw_levels(vocab)
    edges = torch.tensor([0.0, 0.5, math.nextafter(0.5, 0), 1 - 2.0**-53, 1.0], dtype=torch.float64)
    uniform = edges[torch.randint(5, (500, levels), generator=torch.Generator().manual_seed(0))]
    for token in {0, vocab // 2, vocab - 1}:
        weights = torch.zeros(1, vocab, dtype=torch.float64)
        weights[0, token] = 5e-324  # the least there is
        assert (draw(weights.expand(500, -1), uniform) == token).all()


def test_roundings_hardly_move_a_draw():
    # A vocabulary of mostly unlikely tokens: by the distribution function of all ids, one in a hundred would move.
    logits = 3 * torch.randn(1, 50_257, generator=torch.Generator().manual_seed(0)).double()
    weights = probabilities(logits)
    noise = 1e-5 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)).double()
    uniform = numbers(100, draw_levels(50_257))
    assert torch.equal(draw(weights.expand(100, -1), uniform), draw((weights * (1 + noise)).expand(100, -1), uniform))
