"""Accumulator, Collector, AdamW's preconditioner and fidelity, on models and gradients of one's own."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from lldfast import gram
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer
from lldfast.errors import CorruptError, InputError, TrainingError
from lldfast.gram.estimation import _token_counts, _Work, split_groups
from lldfast.gram.precondition import of_optimizer
from lldfast.models.gpt import GPT
from lldfast.models.language_model import LanguageModel

P, K = 50_000, 2**13
DOMAINS = ["a", "b", "c"]


def integers(n=P):
    return torch.randint(-500, 500, (n,)).float()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def filled(gradients, pieces=((0, P),), seed=7):
    acc = gram.Accumulator(P, DOMAINS, K, seed)
    for (domain, group), g in gradients.items():
        for begin, end in pieces:
            acc.add(domain, group, begin, g[begin:end])
    return acc


def same_sketches(one, two):
    assert one.groups() == two.groups()
    return all(torch.equal(one.sketches[key], two.sketches[key]) for key in one.groups())


@pytest.fixture
def gradients():
    return {(d, b): integers() for d in DOMAINS for b in range(3)}


def test_bits_do_not_depend_on_shards_micro_batches_and_order(gradients):
    whole = filled(gradients)
    for n in (2, 4):
        edges = [0, *sorted(torch.randint(1, P, (n - 1,)).tolist()), P]
        shards = [filled(gradients, [piece]) for piece in itertools.pairwise(edges)]
        merged = shards[-1]
        for shard in shards[-2::-1]:
            merged.merge(shard)
        assert same_sketches(whole, merged)
        np.testing.assert_allclose(merged.gram(), whole.gram(), rtol=1e-12)
    parts = gram.Accumulator(P, DOMAINS, K, 7)
    for key, g in gradients.items():  # micro-batches: summands of the same gradient, in any order
        first = integers()
        for summand in (g - first, first):
            parts.add(*key, 0, summand)
    assert same_sketches(whole, parts)
    backwards = filled(dict(reversed(gradients.items())), [(P // 2, P), (0, P // 2)])
    assert same_sketches(whole, backwards)


def test_gram_against_unsketched_products(gradients):
    J = torch.stack([sum(gradients[d, b] for b in range(3)) for d in DOMAINS]).double()
    J[1:] += J[0]
    for b in range(3):
        for d in "bc":
            gradients[d, b] = gradients[d, b] + gradients["a", b]
    exact = (J @ J.T).numpy()
    draws = np.stack([filled(gradients, seed=s).gram() for s in range(60)])
    z = (draws.mean(0) - exact) / (draws.std(0, ddof=1) / np.sqrt(60))
    assert np.abs(z).max() < 4, z
    assert (np.abs(draws[0] - exact) / np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))).max() < 6 / np.sqrt(K)


def test_norms_are_exact_where_a_gradient_came_once(gradients):
    acc = filled(gradients, [(0, 100), (100, P)])
    table, domain, tokens = acc.products()
    exact = [float(gradients[key].double().square().sum()) for key in acc.groups()]
    np.testing.assert_allclose(table.diagonal(), exact, rtol=1e-7)
    assert domain.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and tokens.tolist() == [1] * 9
    acc.add("a", 0, 50, torch.ones(100))  # a second summand: |g|^2 is no sum of squares any more
    both = gradients["a", 0].clone()
    both[50:150] += 1
    want, got = float(both.double().square().sum()), acc.products()[0][0, 0]
    assert got != acc.squares["a", 0] and abs(got / want - 1) < 6 * np.sqrt(2 / K)


def test_tokens_make_gradients_per_token_and_debias(gradients):
    acc = filled(gradients)
    plain = acc.gram()
    for key in acc.groups():
        acc.count(*key, tokens=10)
    np.testing.assert_allclose(acc.gram(), plain / 30**2)
    got = acc.gram(debias=True)  # independent groups: nothing but noise on the diagonal
    assert np.all(got.diagonal() <= acc.gram().diagonal())
    with pytest.raises(InputError, match="needs the tokens"):
        filled(gradients).gram(debias=True)
    empty = gram.Accumulator(P, ["a"], K, 7)
    empty.add("a", 0, 0, gradients["a", 0])
    for group in (0, 1):
        empty.count("a", group, tokens=10)  # the second group's gradient is 0, and its tokens count
    assert empty.gram()[0, 0] == pytest.approx(empty.squares["a", 0] / 20**2)
    with pytest.raises(InputError, match="fp32"):
        empty.add("a", 5, 0, torch.ones(3).long())
    assert ("a", 5) not in empty.sketches
    half = filled(gradients)
    half.count("a", 0, tokens=3)
    with pytest.raises(InputError, match="group 1 of domain 'a' has no token count"):
        half.gram()


def test_merge_of_other_texts_and_of_shards(gradients):
    one, two = filled(gradients), filled(gradients)
    for acc in (one, two):
        acc.count("a", 0, tokens=5)
    one.merge(two)  # two processes with texts of their own for the same groups
    assert one.tokens["a", 0] == 10 and not one._exact(("a", 0))
    left, right = filled(gradients, [(0, 9)]), filled(gradients, [(9, P)])
    for acc in (left, right):
        acc.count("a", 0, tokens=5)
    assert left.merge(right).tokens["a", 0] == 5 and left._exact(("a", 0))
    shards = [filled({}), filled({})]
    for i, shard in enumerate(shards):  # shards of the parameters, each in two micro-batches
        for _ in range(2):
            shard.add("a", 0, i * 100, torch.ones(100))
        shard.count("a", 0, tokens=5)
    assert shards[0].merge(shards[1]).tokens["a", 0] == 5
    other = filled(gradients)
    with pytest.raises(InputError, match="counted on one side only"):
        left.merge(other)
    before = copy.deepcopy(left.sketches)
    for other, message in [
        (gram.Accumulator(P, DOMAINS, 2 * K, 7), "k is 8192 here, 16384 there"),
        (gram.Accumulator(P, DOMAINS, K, 8), "seed"),
        (gram.Accumulator(P + 1, DOMAINS, K, 7), "n_params"),
        (gram.Accumulator(P, DOMAINS[::-1], K, 7), "domains"),
        (gram.Accumulator(P, DOMAINS, K, 7, layout="other"), "layout"),
    ]:
        with pytest.raises(InputError, match=message):
            left.merge(other)
    assert all(torch.equal(before[key], left.sketches[key]) for key in before)


def test_save_and_load(gradients, tmp_path):
    acc = filled(gradients, [(0, 10), (10, P)])
    for key in acc.groups():
        acc.count(*key, tokens=4)
    path = tmp_path / "sketch.npz"
    acc.save(path, meta={"model": "mine"})
    back = gram.Accumulator.load(path)
    assert same_sketches(acc, back) and back.tokens == acc.tokens and back.squares == acc.squares
    np.testing.assert_array_equal(back.gram(debias=True), acc.gram(debias=True))
    back.merge(acc)
    empty = gram.Accumulator(P, DOMAINS, K, 7)
    empty.save(tmp_path / "empty.npz")
    assert gram.Accumulator.load(tmp_path / "empty.npz").groups() == []
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CorruptError, match=r"sketch\.npz"):
        gram.Accumulator.load(path)
    with pytest.raises(InputError, match="no such file"):
        gram.Accumulator.load(tmp_path / "none.npz")
    gram_file = tmp_path / "gram.npz"
    np.savez(gram_file, header=np.array('{"format": "lldfast-gram", "version": 1}'))
    with pytest.raises(InputError, match="lldfast-gram'"):
        gram.Accumulator.load(gram_file)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda acc: acc.add("z", 0, 0, torch.ones(3)), "unknown domain 'z'"),
        (lambda acc: acc.add("a", -1, 0, torch.ones(3)), "group"),
        (lambda acc: acc.add("a", True, 0, torch.ones(3)), "group"),
        (lambda acc: acc.add("a", 0, P - 2, torch.ones(3)), "not within"),
        (lambda acc: acc.add("a", 0, -1, torch.ones(3)), "not within"),
        (lambda acc: acc.add("a", 0, 0, torch.ones(3).long()), "fp32"),
        (lambda acc: acc.add("a", 0, 0, torch.ones(3), scale=torch.ones(4)), "scale has 4"),
        (lambda acc: acc.add("a", 0, 0, torch.ones(3), dot=torch.ones(4)), "dots has 4"),
        (lambda acc: acc.count("a", 0, 0), "tokens"),
        (lambda acc: acc.count("a", 0, float("nan")), "tokens"),
        (lambda acc: acc.gram(), "domain 'a' has no gradient"),
        (lambda acc: gram.Accumulator(0, ["a"], 4), "n_params"),
        (lambda acc: gram.Accumulator(1, [], 4), "domains"),
        (lambda acc: gram.Accumulator(1, "ab", 4), "domains"),
        (lambda acc: gram.Accumulator(1, ["a", "a"], 4), "domains"),
        (lambda acc: gram.Accumulator(1, ["a"], 6), "power of two"),
        (lambda acc: gram.Accumulator(1, ["a"], 4, seed=2**64), "seed"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(InputError, match=message):
        call(gram.Accumulator(P, DOMAINS, K, 0))


class Tied(nn.Module):
    """Any torch model: an embedding tied to the output, a shared layer used twice, a buffer, a frozen and an unused parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(5))
        self.conv = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, ids):
        x = torch.tanh(self.shared(self.embed(ids))) * self.frozen
        x = self.conv(self.shared(x).transpose(1, 2)).transpose(1, 2)
        return F.log_softmax(self.head(x), -1)


def test_collector_takes_any_model_and_any_number_of_backward_passes():
    model = Tied()
    ids = {key: [torch.randint(11, (2, 9)) for _ in range(3)] for key in [("a", 0), ("a", 1), ("b", 0)]}

    def loss(x):
        return model(x)[:, :-1].gather(2, x[:, 1:, None]).sum()

    layout = gram.Layout.of(model)
    assert layout.names == ("unused", "embed.weight", "shared.weight", "shared.bias", "conv.weight", "conv.bias")
    acc = gram.Accumulator(layout.size, ["a", "b"], 2**12, 3, layout=layout.hash)
    collector = gram.Collector(model, acc)
    for (domain, index), batches in ids.items():
        with collector.group(domain, index, tokens=48) as group:
            for i, x in enumerate(batches):
                if i == 2:
                    group.final()
                loss(x).backward()
                assert i < 2 or all(p.grad is None for p in model.parameters())  # folded and freed as it came
    rows = []
    for name in "ab":
        total = sum(loss(x) for (domain, _), xs in ids.items() if domain == name for x in xs)
        grads = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        tokens = 48 * sum(domain == name for domain, _ in ids)
        rows.append(torch.cat([torch.zeros(5) if g is None else g.flatten() for g in grads]).double() / tokens)
    J = torch.stack(rows)
    np.testing.assert_allclose(acc.gram(), (J @ J.T).numpy(), rtol=1e-5)  # k > P: no two entries meet
    assert layout.hash != gram.Layout.of(GPT("test-tiny", seed=0)).hash


def test_a_group_that_is_not_finite_or_fails_leaves_nothing():
    model = Tied()
    acc = gram.Accumulator(gram.Layout.of(model).size, ["a"], 64)
    collector = gram.Collector(model, acc)
    with pytest.raises(TrainingError, match="domain 'a', group 4"), collector.group("a", 4, tokens=1):
        (model(torch.randint(11, (1, 4))).sum() * float("inf")).backward()
    assert acc.groups() == [] and all(p.grad is None for p in model.parameters())
    with pytest.raises(ZeroDivisionError), collector.group("a", 0):
        model(torch.randint(11, (1, 4))).sum().backward()
        raise ZeroDivisionError
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters() if p.requires_grad)
    with collector.group("a", 0, tokens=2):
        pass  # no text of the group touched a parameter: a gradient of 0
    assert acc.groups() == [("a", 0)] and acc.gram() == 0
    with pytest.raises(InputError, match="has a gradient already"), collector.group("a", 0):
        pass
    with collector.group("a", 1), pytest.raises(InputError, match="still open"), collector.group("a", 2):
        pass
    with pytest.raises(KeyboardInterrupt), collector.group("a", 3) as group:
        group.final()
        model(torch.randint(11, (1, 4))).sum().backward()  # folded already
        raise KeyboardInterrupt
    assert ("a", 3) not in acc.sketches
    with collector.group("a", 4), pytest.raises(InputError, match="another collector"):
        gram.Collector(model, acc)
    model.unused.requires_grad_(False)
    with pytest.raises(InputError, match="frozen"), collector.group("a", 5):
        pass
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    with pytest.raises(InputError, match="the accumulator is of"):
        gram.Collector(model, acc)
    with pytest.raises(InputError, match="the accumulator is of"):
        gram.Collector(model, gram.Accumulator(gram.Layout.of(model).size, ["a"], 64, layout="another"))


# ---- AdamW

LETTERS = ["abcdefgh ", "01234567+", "XYZ(){};="]
rng = np.random.default_rng(0)


def texts(n):
    return ["".join(rng.choice(list(LETTERS[i % 3]), 60)) for i in range(n)]


@pytest.fixture(scope="module")
def trained():
    """A model that AdamW has trained for a while on the domains' texts, its optimiser, and texts to evaluate on."""
    scorer = LanguageModel.from_gpt(GPT("test-tiny", seed=0), load_tokenizer("bytes"))
    optimizer = torch.optim.AdamW(scorer.module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    data = [torch.tensor(list(t.encode())) for t in texts(60)]
    for i in range(60):
        x = torch.stack([data[(5 * i + j) % 60] for j in range(6)])
        optimizer.zero_grad()
        scorer.module.loss(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return scorer, optimizer, EvalSet.from_texts(texts(24), ["words", "numbers", "code"] * 8)


def test_the_preconditioned_gram_matrix_is_the_explicit_one(trained):
    scorer, optimizer, evalset = trained
    raw = gram.estimate(scorer, evalset, debias=False)
    got = gram.estimate(scorer, evalset, debias=False, precondition=optimizer, mode="fold", k=2**16)
    rows = {}

    class Keep:
        def add(self, domain, group, offset, tensor, scale=None, dot=None):
            rows.setdefault(domain, torch.zeros(raw.extra["n_params"], dtype=torch.float64))[
                offset : offset + tensor.numel()
            ] += tensor.flatten().double()
            return 0.0

    segments = scorer.tokenize(evalset)
    tokens = _token_counts(segments, len(evalset))
    split = {name: split_groups(evalset, name, 8) for name in evalset.domains}
    _Work(scorer, evalset, segments, split, tokens, 4096).run(gram.Collector(scorer.module, Keep()))
    J = torch.stack([rows[name] / tokens[evalset.domain == name].sum() for name in evalset.domains])
    own = J.square().mean(0)
    scale = of_optimizer(scorer.module, optimizer, own.float())
    names = [name for name, _ in scorer.module.named_parameters()]
    root = torch.cat([scale.scale[name] for name in names]).double()
    np.testing.assert_allclose(got.gram, ((J * root) @ (J * root).T).numpy(), rtol=1e-4)
    state = {name: optimizer.state[p] for name, p in scorer.module.named_parameters()}
    v = 0.95 * torch.cat([state[n]["exp_avg_sq"].flatten() for n in names]).double() + 0.05 * own
    inverse = 1 / ((v / (1 - 0.95**61)).sqrt() + 1e-8)
    np.testing.assert_allclose((root**2).numpy(), inverse.numpy(), rtol=1e-4)
    m = torch.cat([state[n]["exp_avg"].flatten() for n in names]).double()
    theta = torch.cat([p.detach().flatten() for p in scorer.module.parameters()]).double()
    drift = -(J @ (0.9 / 0.1 * inverse * m + 0.1 * (1 - 0.9**61) / 0.1 * theta))
    np.testing.assert_allclose(got.drift, drift.numpy(), rtol=1e-3)
    assert got.extra["preconditioner"] == "optimiser state" and raw.drift is None


def test_fidelity_prefers_the_preconditioned_matrix(trained):
    scorer, optimizer, evalset = trained
    before = copy.deepcopy(scorer.module.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    plain = gram.estimate(scorer, evalset, debias=False)
    adam = gram.estimate(scorer, evalset, debias=False, precondition=optimizer)
    of_plain, of_adam = (gram.fidelity(scorer, optimizer, g, evalset, lr=1e-5) for g in (plain, adam))
    assert of_adam.cosine.mean() > 0.9 and of_adam.cosine.mean() > of_plain.cosine.mean()
    assert of_adam.measured.shape == (4, 3) and "cosine" in str(of_adam)
    sgd = torch.optim.SGD(scorer.module.parameters(), lr=1e-4)
    of_sgd = gram.fidelity(scorer, sgd, plain)
    assert of_sgd.cosine.min() > 0.999 and of_sgd.cosine_centred.min() > 0.99
    np.testing.assert_allclose(of_sgd.scale, 1e-4, rtol=0.05)
    chosen = gram.fidelity(scorer, sgd, plain, evalset, weights=[{"code": 1.0, "words": 0.0, "numbers": 3.0}])
    np.testing.assert_allclose(chosen.weights, [[0, 0.75, 0.25]])
    assert all(torch.equal(before[k], v) for k, v in scorer.module.state_dict().items())
    after = optimizer.state_dict()
    assert all(torch.equal(state["state"][i][k], v) for i, s in after["state"].items() for k, v in s.items())
    assert [g["lr"] for g in after["param_groups"]] == [g["lr"] for g in state["param_groups"]]


def test_before_the_first_step_the_evaluation_gradients_stand_in(trained):
    scorer, _, evalset = trained
    fresh = torch.optim.AdamW(scorer.module.parameters(), lr=1e-5)
    adam = gram.estimate(scorer, evalset, debias=False, precondition=fresh)
    plain = gram.estimate(scorer, evalset, debias=False)
    assert adam.extra["preconditioner"] == "evaluation gradients"
    of_plain, of_adam = (gram.fidelity(scorer, fresh, g, evalset) for g in (plain, adam))
    assert of_adam.cosine.mean() > of_plain.cosine.mean() and of_adam.cosine.mean() > 0.95
    assert not fresh.state  # nothing was stepped


@pytest.mark.parametrize("kind", ["groups", "adam with decay", "maximize", "one domain only"])
def test_steps_of_other_adams_are_predicted_too(trained, kind):
    """Learning rates and betas by group, decay in the gradient, ascent, and a state that has seen one domain only."""
    model = copy.deepcopy(trained[0].module)
    scorer, evalset = LanguageModel.from_gpt(model, load_tokenizer("bytes")), trained[2]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    if kind == "groups":
        parts = [{"params": matrices, "lr": 1e-5, "betas": (0.9, 0.95)}, {"params": vectors, "lr": 3e-5, "betas": (0.0, 0.9)}]
        optimizer = torch.optim.AdamW(parts)
    elif kind == "adam with decay":
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, weight_decay=0.3, betas=(0.5, 0.95))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.5, 0.95), maximize=kind == "maximize")
    letters = LETTERS[:1] if kind == "one domain only" else LETTERS
    for i in range(20):
        data = ["".join(rng.choice(list(letters[(i + j) % len(letters)]), 60)) for j in range(6)]
        x = torch.stack([torch.tensor(list(t.encode())) for t in data])
        optimizer.zero_grad()
        loss = model.loss(x[:, :-1], x[:, 1:])
        (-loss if kind == "maximize" else loss).backward()
        optimizer.step()
    found = gram.estimate(scorer, evalset, debias=False, precondition=optimizer)
    measured = gram.fidelity(scorer, optimizer, found)
    # a single domain's own gradient squared is not the mean over domains that M holds: what is left of the error
    assert measured.cosine.min() > 0.9 and measured.cosine.mean() > 0.97, measured
    assert 0.5 < measured.scale.mean() / found.extra["eta"] < 1.6, (measured.scale, found.extra["eta"])


def test_bad_optimisers_and_calls(trained):
    scorer, optimizer, evalset = trained
    plain = gram.estimate(scorer, evalset, debias=False)
    part = torch.optim.AdamW([scorer.module.wpe.weight], lr=1e-3)
    with pytest.raises(InputError, match=r"wte\.weight"):
        gram.estimate(scorer, evalset, precondition=part)
    for kwargs, message in [
        ({"lr": 0.0}, "lr"),
        ({"lr": "x"}, "lr"),
        ({"weights": []}, "weights is empty"),
        ({"optimizer": None}, "torch optimiser"),
        ({"weights": [{"code": 1.0}]}, "words"),
        ({"optimizer": part}, "every trainable parameter"),
        ({"optimizer": torch.optim.AdamW(scorer.module.parameters(), lr=0.0)}, "learning rate"),
        ({"evalset": evalset.select(domains="code")}, "domains"),
    ]:
        call = {"optimizer": optimizer, "evalset": evalset, **kwargs}
        with pytest.raises(InputError, match=message):
            gram.fidelity(scorer, call.pop("optimizer"), plain, call.pop("evalset"), **call)


def test_as_many_numbers_as_parameters_keep_the_gradients(tmp_path):
    size = 300
    assert size & (size - 1)
    acc, half = (gram.Accumulator(size, ["a", "b"], size, 7) for _ in range(2))
    g = {key: torch.randn(size, dtype=torch.float64) for key in (("a", 0), ("a", 1), ("b", 0))}
    scale, dot = torch.rand(size), torch.randn(size)
    for key, values in g.items():
        for begin, end in ((0, 100), (100, size)):
            to = acc if begin == 0 else half
            square = to.add(*key, begin, values[begin:end].float(), scale[begin:end], dot[begin:end])
            assert square == pytest.approx(float((values.float() * scale)[begin:end].double().square().sum()), rel=1e-6)
    acc.merge(half)
    for key, values in g.items():
        torch.testing.assert_close(acc.sketches[key], (values.float() * scale).double())
        assert acc.dots[key] == pytest.approx(float(values.float().double() @ dot.double()), rel=1e-6)
        assert acc.squares[key] == pytest.approx(float((values.float() * scale).double().square().sum()), rel=1e-6)
    acc.save(tmp_path / "sketches.npz")
    back = gram.Accumulator.load(tmp_path / "sketches.npz")
    assert back.k == size and same_sketches(acc, back)
    with pytest.raises(InputError, match="k is 300 here, 256 there"):
        acc.merge(gram.Accumulator(size, ["a", "b"], 256, 7))
    for k in (True, 301, 299):
        with pytest.raises(InputError, match="power of two"):
            gram.Accumulator(1 if k is True else size, ["a"], k)
    with pytest.raises(InputError, match="expected floating point"):
        acc.add("a", 0, 0, torch.ones(3, dtype=torch.int64))
    with pytest.raises(InputError, match="as many in scale"):
        acc.add("a", 0, 0, torch.ones(3), torch.ones(2))


def test_products_do_not_stack_all_sketches_of_many_groups(monkeypatch):
    monkeypatch.setattr("lldfast.gram.accumulator.TOGETHER", 64)
    acc = gram.Accumulator(5000, [str(i) for i in range(8)], 1024, 7)
    for i in range(8):
        acc.add(str(i), 0, 0, torch.randn(5000))
    original, largest = torch.stack, []
    monkeypatch.setattr(torch, "stack", lambda parts, *a: largest.append(sum(p.numel() for p in parts)) or original(parts, *a))
    table, _, _ = acc.products()
    assert max(largest) == 64
    sketches = original([acc.sketches[str(i), 0] for i in range(8)])
    want = (sketches @ sketches.T).numpy()
    np.fill_diagonal(want, table.diagonal())
    np.testing.assert_allclose(table, want, rtol=1e-9, atol=1e-9 * want.max())
