from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lldfast.backends import extension
from lldfast.data.mixture import DomainMixture, permute
from lldfast.data.shards import TokenShards
from lldfast.errors import CorruptError, InputError

EQUAL = {"Prose": 0.25, "Code (Python)": 0.25, "DM/Maths": 0.25, "Ελληνικά": 0.25}
SKEWED = {"Prose": 0.1, "Code (Python)": 0.7, "DM/Maths": 0.2, "Ελληνικά": 0.0}


def mixture(shards, weights=EQUAL, **options):
    return DomainMixture(shards, weights, **{"block_size": 16, "batch_size": 12, "seed": 3, **options})


def sequences(mix, steps):
    """The rows each domain gave, in order."""
    rows = {domain: [] for domain in mix.domains}
    for _ in range(steps):
        batch = mix.next_batch()
        for x, k in zip(batch.x.tolist(), batch.domain.tolist()):
            rows[mix.domains[k]].append(x)
    return rows


def test_rows_are_text_of_their_domain(shards):
    mix = mixture(shards)
    batch = mix.next_batch()
    assert batch.x.shape == batch.y.shape == (12, 16) and batch.x.dtype == batch.y.dtype == torch.int64
    assert batch.domain.shape == (12,) and batch.domain.dtype == np.int64
    assert torch.equal(batch.x[:, 1:], batch.y[:, :-1])
    for x, y, k in zip(batch.x.tolist(), batch.y.tolist(), batch.domain.tolist()):
        tokens = shards.tokens(mix.domains[k]).tolist()
        ring = tokens + tokens[:16]
        window = [*x, y[-1]]
        assert any(ring[i : i + 17] == window for i in range(len(tokens)))


def test_order_does_not_depend_on_the_weights(shards):
    one, two = sequences(mixture(shards, EQUAL), 40), sequences(mixture(shards, SKEWED), 40)
    moving = mixture(shards, EQUAL)
    three = sequences(moving, 20)
    moving.set_weights(SKEWED)
    for domain, rows in sequences(moving, 20).items():
        three[domain] += rows
    for domain in EQUAL:
        n = min(len(one[domain]), len(two[domain]))
        assert one[domain][:n] == two[domain][:n]
        n = min(len(one[domain]), len(three[domain]))
        assert one[domain][:n] == three[domain][:n]
    assert len(one["Prose"]) > 100 and len(two["Prose"]) > 40 and not two["Ελληνικά"]


def test_order_depends_on_seed_and_name_only(tmp_path, make_shards):
    text = np.random.default_rng(0).integers(0, 256, 4000)
    one = make_shards(tmp_path / "one", {"a": [text], "b": [text]})
    two = make_shards(tmp_path / "two", {"b": [text], "c": [text[:50]], "a": [text]})
    first = sequences(mixture(one, {"a": 0.5, "b": 0.5}), 10)
    second = sequences(mixture(two, {"a": 0.5, "b": 0.5, "c": 0.0}), 10)
    assert first["a"] == second["a"] and first["b"] == second["b"]
    assert first["a"] != first["b"]
    assert sequences(mixture(one, {"a": 0.5, "b": 0.5}, seed=4), 10)["a"] != first["a"]


def test_draws_do_not_depend_on_the_order_of_the_manifest(tmp_path, make_shards):
    text = np.random.default_rng(0).integers(0, 256, 4000)
    names = ["a", "b", "c"]
    weights = {"a": 0.2, "b": 0.5, "c": 0.3}
    one = mixture(make_shards(tmp_path / "one", {name: [text] for name in names}), weights)
    two = mixture(make_shards(tmp_path / "two", {name: [text] for name in reversed(names)}), weights)
    for _ in range(5):
        a, b = one.next_batch(), two.next_batch()
        assert [one.domains[k] for k in a.domain] == [two.domains[k] for k in b.domain]
        assert torch.equal(a.x, b.x)


def test_an_epoch_visits_every_token_once(tmp_path, make_shards):
    # Distinct tokens show what was read: 1000 of them and EOT make 1001 tokens, 62 windows of 16 and 9 tokens left over.
    shards = make_shards(tmp_path, {"a": [np.arange(1000)]}, vocab_size=1001, eot=1000)
    mix = mixture(shards, {"a": 1.0}, batch_size=31)
    epochs = [[token for _ in range(2) for token in mix.next_batch().x.flatten().tolist()] for _ in range(3)]
    for tokens in epochs:
        assert len(tokens) == len(set(tokens)) == 62 * 16
    assert mix.epochs == {"a": 3.0} and mix.consumed == {"a": 186}
    assert epochs[0] != epochs[1] != epochs[2]
    starts = [sorted(tokens[::16]) for tokens in epochs]
    assert starts[0] != starts[1]  # another offset, not only another order


def test_changing_weights_loses_and_repeats_nothing(tmp_path, make_shards):
    shards = make_shards(tmp_path, {"a": [np.arange(1000)], "b": [np.arange(500)]}, vocab_size=1001, eot=1000)
    mix = mixture(shards, {"a": 0.5, "b": 0.5}, batch_size=4)
    rng = np.random.default_rng(1)
    seen = Counter()
    while mix.consumed["a"] < 58:
        batch = mix.next_batch()
        seen.update(x[0] for x, k in zip(batch.x.tolist(), batch.domain) if mix.domains[k] == "a")
        w = rng.random()
        mix.set_weights({"a": w, "b": 1 - w})
    assert sum(seen.values()) == mix.consumed["a"] <= 62 and set(seen.values()) == {1}


def test_a_domain_of_just_one_window(tmp_path, make_shards):
    shards = make_shards(tmp_path, {"a": [np.arange(16)]})
    batch = mixture(shards, {"a": 1.0}).next_batch()
    ring = [*range(16), 256]
    for x, y in zip(batch.x.tolist(), batch.y.tolist()):
        i = ring.index(x[0])
        assert [*x, y[-1]] == (ring[i:] + ring[:i])


@pytest.mark.parametrize("draw", ["sequence", "micro_batch", "step"])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_exact_resume(shards, draw, stop):
    options = {"draw": draw, "micro_batch_size": 4}
    straight, broken = mixture(shards, SKEWED, **options), mixture(shards, SKEWED, **options)
    for step in range(stop):
        for mix in (straight, broken):
            mix.next_batch()
            if step == 3:
                mix.set_weights({"Prose": 1 / 3, "Code (Python)": 1 / 3, "DM/Maths": 0.0, "Ελληνικά": 1 / 3})
    state = json.loads(json.dumps(broken.state_dict()))
    resumed = mixture(shards, EQUAL, **options)
    resumed.load_state_dict(state)
    assert np.array_equal(resumed.weights, straight.weights)
    for _ in range(30):  # goes through several epochs of the smallest domain
        a, b = straight.next_batch(), resumed.next_batch()
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and np.array_equal(a.domain, b.domain)
    assert straight.consumed == resumed.consumed and straight.step == resumed.step == stop + 30


def test_resume_refuses_another_corpus(shards, tmp_path, make_shards):
    state = mixture(shards).state_dict()
    with pytest.raises(InputError, match="seed was 3 and is now 4"):
        mixture(shards, seed=4).load_state_dict(state)
    with pytest.raises(InputError, match="block_size was 16 and is now 8"):
        mixture(shards, block_size=8).load_state_dict(state)
    other = make_shards(tmp_path, {domain: [np.arange(200)] for domain in EQUAL})
    with pytest.raises(InputError, match="corpus_hash was"):
        mixture(other).load_state_dict(state)
    mix = mixture(shards)
    with pytest.raises(InputError, match="lack the domain 'Prose'"):
        mix.load_state_dict({**state, "weights": {k: v for k, v in state["weights"].items() if k != "Prose"}})
    with pytest.raises(InputError, match="the cursors are of"):
        mix.load_state_dict({**state, "cursors": {"Prose": 1}})
    before = mix.state_dict()
    with pytest.raises(InputError, match="the step is 'x'"):  # the last that is read: nothing has changed by then
        mix.load_state_dict({**state, "step": "x"})
    assert mix.state_dict() == before
    assert mix.step == 0 and sum(mix.consumed.values()) == 0


@given(
    st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda w: sum(w) > 0.01), st.integers(0, 2**64), st.integers(1, 40)
)
@settings(max_examples=60, deadline=None)
def test_systematic_counts(shards, raw, seed, batch_size):
    weights = dict(zip(EQUAL, np.array(raw) / sum(raw)))
    mix = mixture(shards, weights, seed=seed, batch_size=batch_size, block_size=4)
    for _ in range(3):
        counts = np.bincount(mix.next_batch().domain, minlength=4)
        assert counts.sum() == batch_size
        for domain, count in zip(mix.domains, counts):
            assert abs(count - batch_size * weights[domain]) < 1 + 1e-9
            assert count == 0 or weights[domain] > 0


@pytest.mark.parametrize("steps", [800, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("draw", ["sequence", "micro_batch", "step"])
def test_distribution(shards, draw, steps):
    mix = mixture(shards, SKEWED, draw=draw, batch_size=4, micro_batch_size=1, block_size=4)
    counts = np.zeros(4)
    for _ in range(steps):
        domain = mix.next_batch().domain
        counts += np.bincount(domain, minlength=4)
        if draw == "step":
            assert len(set(domain.tolist())) == 1
    draws = steps if draw == "step" else 4 * steps
    for domain, count in zip(mix.domains, counts):
        w = SKEWED[domain]
        assert abs(count / (4 * steps) - w) <= 5 * np.sqrt(w * (1 - w) / draws)
    assert counts[mix.domains.index("Ελληνικά")] == 0


def test_micro_batches(shards):
    mix = mixture(shards, draw="micro_batch", micro_batch_size=3)
    kinds = set()
    for _ in range(20):
        domain = mix.next_batch().domain.reshape(4, 3)
        assert (domain == domain[:, :1]).all()
        kinds.add(len(set(domain[:, 0].tolist())))
    assert kinds & {2, 3, 4}  # the micro-batches of one step are drawn apart


def test_sequences_are_shuffled_over_the_step(shards):
    mix = mixture(shards, batch_size=16)
    mixed = sum(len(set(mix.next_batch().domain[:4].tolist())) > 1 for _ in range(20))
    assert mixed >= 18


@pytest.mark.parametrize("draw", ["sequence", "micro_batch", "step"])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_rank_slices_equal_the_whole(shards, draw, world_size):
    options = {"draw": draw, "micro_batch_size": 2}
    whole = mixture(shards, SKEWED, **options)
    ranks = [mixture(shards, SKEWED, rank=r, world_size=world_size, **options) for r in range(world_size)]
    for step in range(12):
        batch, parts = whole.next_batch(), [mix.next_batch() for mix in ranks]
        assert torch.equal(batch.x, torch.cat([part.x for part in parts]))
        assert torch.equal(batch.y, torch.cat([part.y for part in parts]))
        assert np.array_equal(batch.domain, np.concatenate([part.domain for part in parts]))
        if step == 5:
            for mix in (whole, *ranks):
                mix.set_weights(EQUAL)
    assert all(mix.state_dict() == whole.state_dict() for mix in ranks)


def test_same_uniforms_for_every_method(shards):
    # Nearly equal weights draw nearly the same domains: the randomness is common, not fresh.
    near = {"Prose": 0.26, "Code (Python)": 0.24, "DM/Maths": 0.25, "Ελληνικά": 0.25}
    one, two = mixture(shards, EQUAL, draw="step"), mixture(shards, near, draw="step")
    same = sum(one.next_batch().domain[0] == two.next_batch().domain[0] for _ in range(300))
    assert same >= 285


@pytest.mark.skipif(extension() is None, reason="lldfast._C is not built here")
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_cpp_equals_numpy(tmp_path, make_shards, dtype):
    rng = np.random.default_rng(5)
    documents = {"a": [rng.integers(0, 256, n) for n in (30, 1, 700)], "b": [rng.integers(0, 256, 40)]}
    shards = make_shards(tmp_path, documents, dtype=dtype)
    for block_size in (1, 2, 16, 40):
        one = mixture(shards, {"a": 0.5, "b": 0.5}, backend="cpp", block_size=block_size)
        two = mixture(shards, {"a": 0.5, "b": 0.5}, backend="numpy", block_size=block_size)
        for _ in range(10):
            a, b = one.next_batch(), two.next_batch()
            assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and np.array_equal(a.domain, b.domain)


@pytest.mark.parametrize("backend", ["numpy", "cpp"])
@pytest.mark.parametrize("at", [0, 50, 99])
def test_token_over_the_vocabulary(tmp_path, make_shards, backend, at):
    if backend == "cpp" and extension() is None:
        pytest.skip("lldfast._C is not built here")
    make_shards(tmp_path, {"good": [np.arange(99)], "bad": [np.arange(99)]})
    path = tmp_path / "shards" / "bad.bin"
    tokens = np.fromfile(path, dtype="<u2")
    tokens[at] = 999
    tokens.tofile(path)
    mix = mixture(TokenShards(tmp_path), {"good": 0.5, "bad": 0.5}, backend=backend)
    with pytest.raises(CorruptError, match=rf"bad\.bin: token id 999 at position {at} of domain 'bad' .* vocabulary of 257"):
        for _ in range(20):
            mix.next_batch()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"Prose": 1.0}, "lack the domain 'Code \\(Python\\)'"),
        ({**EQUAL, "Pile-CC": 0.0}, "unknown domain 'Pile-CC'"),
        ({**EQUAL, "Prose": float("nan")}, "domain 'Prose' is nan"),
        ({**EQUAL, "Prose": float("inf")}, "domain 'Prose' is inf"),
        ({**EQUAL, "Prose": -0.25, "DM/Maths": 0.75}, "domain 'Prose' is -0.25"),
        (dict.fromkeys(EQUAL, 0.0), "sum to 0"),
        (dict.fromkeys(EQUAL, 0.3), "sum to 1.2"),
        ([0.5, 0.5], "shape \\(2,\\)"),
    ],
)
def test_wrong_weights(shards, weights, message):
    with pytest.raises(InputError, match=message):
        mixture(shards, weights)
    mix = mixture(shards, SKEWED)
    before = mix.weights.copy()
    with pytest.raises(InputError, match=message):
        mix.set_weights(weights)
    assert np.array_equal(mix.weights, before)


def test_weights_by_array_and_slightly_off(shards):
    mix = mixture(shards, np.array([0.2503, 0.25, 0.25, 0.25]))
    assert mix.weights.sum() == pytest.approx(1, abs=1e-15)
    mix.set_weights([0.0, 0.0, 1.0, 0.0])
    assert set(mix.next_batch().domain.tolist()) == {2}


def test_too_few_tokens(tmp_path, make_shards):
    shards = make_shards(tmp_path, {"a": [np.arange(100)], "tiny": [np.arange(15)]})
    with pytest.raises(InputError, match=r"domain 'tiny' has weight 0\.5 but only 16 tokens"):
        mixture(shards, {"a": 0.5, "tiny": 0.5})
    mix = mixture(shards, {"a": 1.0, "tiny": 0.0})
    mix.next_batch()
    assert mix.epochs["tiny"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer of at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"world_size": 5}, "not a multiple of world_size 5"),
        ({"rank": 2, "world_size": 2}, "rank 2 is not one of 2 ranks"),
        ({"micro_batch_size": 5}, "does not divide"),
        ({"draw": "token"}, "choose sequence, micro_batch, step"),
        ({"backend": "cuda"}, "gather has no backend 'cuda'"),
    ],
)
def test_wrong_options(shards, options, message):
    with pytest.raises(InputError, match=message):
        mixture(shards, **options)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=80, deadline=None)
def test_permutation_is_a_bijection(size, key):
    out = permute(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert np.array_equal(np.sort(out), np.arange(size))


def test_permutation_has_no_bias():
    keys = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    for size in (2, 5, 30):
        for position in (0, size - 1):
            out = permute(np.full(len(keys), position), np.full(len(keys), size), keys)
            counts = np.bincount(out, minlength=size)
            expected = len(keys) / size
            # chi-square, size - 1 degrees of freedom; 6 standard deviations
            assert ((counts - expected) ** 2 / expected).sum() < size - 1 + 6 * np.sqrt(2 * (size - 1))


def test_permutation_of_a_huge_domain():
    size = 2**41 + 12345
    out = permute(np.arange(10_000), np.full(10_000, size), np.full(10_000, 9, dtype=np.uint64))
    assert len(set(out.tolist())) == 10_000 and out.min() >= 0 and out.max() < size
    assert abs(out.mean() / size - 0.5) < 0.02


def test_states_and_weights_that_are_none(shards):
    def mixture(weights=None, **options):
        even = {domain: 1 / len(shards.domains) for domain in shards.domains}
        return DomainMixture(shards, even if weights is None else weights, **{"block_size": 8, "batch_size": 4, **options})

    for weights in ("abc", ["x"] * len(shards.domains), dict.fromkeys(shards.domains, "x")):
        with pytest.raises(InputError, match="weights must be numbers"):
            mixture(weights)
    with pytest.raises(InputError, match="there are 4 domains"):
        mixture([0.5, 0.5])
    for wrong in (8.5, "8"):
        with pytest.raises(InputError, match=f"block_size must be an integer of at least 1, not {wrong!r}"):
            mixture(block_size=wrong)
    state = mixture().state_dict()
    with pytest.raises(InputError, match="the state has no 'corpus_hash'"):
        mixture().load_state_dict({})
    name = shards.domains[0]
    with pytest.raises(InputError, match=r"the cursor of domain .* is -5"):
        mixture().load_state_dict({**state, "cursors": {**state["cursors"], name: -5}})


def test_start_is_where_a_row_begins(shards):
    for aligned in (False, True):
        batch = (mix := mixture(shards, aligned=aligned)).next_batch()
        assert batch.start.shape == (12,) and batch.start.dtype == np.int64
        for x, y, k, first in zip(batch.x, batch.y, batch.domain, batch.start):
            ring = np.take(shards.tokens(mix.domains[k]), np.arange(first, first + 17), mode="wrap")
            assert x.tolist() == ring[:-1].tolist() and y.tolist() == ring[1:].tolist()
    ranks = [mixture(shards, rank=rank, world_size=3).next_batch().start for rank in range(3)]
    assert np.array_equal(np.concatenate(ranks), mixture(shards).next_batch().start)


@pytest.mark.parametrize("windows", [None, {"a": 20}])
def test_aligned_epochs_visit_every_window_once(tmp_path, make_shards, windows):
    shards = make_shards(tmp_path, {"a": [np.arange(1000)], "b": [np.arange(50)]}, vocab_size=1001, eot=1000)
    n = 62 if windows is None else 20
    mix = mixture(shards, {"a": 1.0, "b": 0.0}, batch_size=n, aligned=True, windows=windows)
    epochs = [mix.next_batch() for _ in range(3)]
    for batch in epochs:
        assert sorted(batch.start.tolist()) == [16 * w for w in range(n)]
        assert batch.x[:, 0].tolist() == batch.start.tolist()  # the tokens are their own positions
    assert len({tuple(batch.start.tolist()) for batch in epochs}) == 3  # the order is new in each
    assert mix.epochs == {"a": 3.0, "b": 0.0}


def test_the_last_aligned_window_wraps(tmp_path, make_shards):
    shards = make_shards(tmp_path, {"a": [np.arange(31)]})
    batch = mixture(shards, {"a": 1.0}, batch_size=2, aligned=True).next_batch()
    last = batch.y[batch.start.tolist().index(16)]
    assert last.tolist() == [*range(17, 31), 256, 0]


def test_aligned_resume(shards):
    limit = {"Prose": 5, "Code (Python)": 3, "DM/Maths": 2, "Ελληνικά": 1}
    for options in ({"aligned": True}, {"aligned": True, "windows": limit}):
        straight, broken = mixture(shards, **options), mixture(shards, **options)
        for mix in (straight, broken):
            mix.next_batch()
        state = json.loads(json.dumps(broken.state_dict()))
        resumed = mixture(shards, **options)
        resumed.load_state_dict(state)
        for _ in range(20):
            a, b = straight.next_batch(), resumed.next_batch()
            assert torch.equal(a.x, b.x) and np.array_equal(a.start, b.start)
        with pytest.raises(InputError, match="cannot resume: aligned was True and is now False"):
            mixture(shards).load_state_dict(state)
        with pytest.raises(InputError, match="cannot resume: aligned was False and is now True"):
            mixture(shards, **options).load_state_dict(mixture(shards).state_dict())
    with pytest.raises(InputError, match=r"cannot resume: windows were \{'Prose': 5, .* and are now all"):
        mixture(shards, aligned=True).load_state_dict(state)
    with pytest.raises(InputError, match=r"cannot resume: windows were .* and are now .*'Prose': 4"):
        mixture(shards, aligned=True, windows={**limit, "Prose": 4}).load_state_dict(state)
    every = {domain: n // 16 for domain, n in shards.n_tokens.items()}
    mixture(shards, aligned=True, windows=every).load_state_dict(mixture(shards, aligned=True).state_dict())


def test_a_state_from_before_alignment(shards):
    old = mixture(shards)
    old.next_batch()
    state = {key: value for key, value in old.state_dict().items() if key not in ("aligned", "windows")}
    resumed = mixture(shards)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.next_batch().x, old.next_batch().x)
    with pytest.raises(InputError, match="aligned was False and is now True"):
        mixture(shards, aligned=True).load_state_dict(state)


def test_alignment_changes_no_bit_of_the_default(tmp_path, make_shards):
    shards = make_shards(tmp_path, {"a": [np.arange(200)], "b": [np.arange(100)]})
    batch = mixture(shards, {"a": 0.5, "b": 0.5}, batch_size=6).next_batch()
    assert batch.domain.tolist() == [0, 1, 0, 1, 1, 0] and batch.start.tolist() == [131, 91, 35, 75, 27, 3]
    assert [row[0] for row in batch.x.tolist()] == [131, 91, 35, 75, 27, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": {"Prose": 1}}, "it needs aligned=True"),
        ({"aligned": True, "windows": {"Pile-CC": 1}}, "windows name the unknown domain 'Pile-CC'"),
        ({"aligned": True, "windows": {"Prose": -1}}, r"windows of domain 'Prose' must be an integer in \[0, \d+\], not -1"),
        ({"aligned": True, "windows": {"Prose": 10**6}}, "windows of domain 'Prose' must be .* not 1000000"),
        ({"aligned": True, "windows": {"Prose": 1.0}}, "windows of domain 'Prose' must be .* not 1.0"),
        ({"aligned": True, "windows": {"Prose": 1}}, r"domain 'Code \(Python\)' has weight 0\.25, but windows= leaves it none"),
    ],
)
def test_wrong_windows(shards, options, message):
    with pytest.raises(InputError, match=message):
        mixture(shards, **options)
