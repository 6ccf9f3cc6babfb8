"""Distillation in the training loop: running and recorded teachers, every objective, resume, refusals."""

import dataclasses
import functools
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lldfast.data.making.prepare import prepare
from lldfast.data.mixture import DomainMixture
from lldfast.data.shards import TokenShards
from lldfast.data.tokenizer import load_tokenizer
from lldfast.distill.cache import TeacherCache
from lldfast.distill.objective import Distillation, Rows
from lldfast.distill.teach import teach
from lldfast.errors import InputError
from lldfast.files import read_json
from lldfast.models.gpt import GPT, PRESETS, GPTConfig
from lldfast.models.language_model import LanguageModel
from lldfast.models.loading import load_model
from lldfast.ops.distill.oracle import reference
from lldfast.run.config import Config, ModelConfig, TargetConfig, TrainConfig
from lldfast.run.distill import DistillConfig
from lldfast.run.experiment import Experiment
from lldfast.run.log import read_jsonl
from lldfast.run.methods import parse_method
from lldfast.train import run

STEPS = 12
BLOCK = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("distill")
    with (root / "docs.jsonl").open("w", encoding="utf-8") as file:
        for domain, words in {
            "numbers": "{i} plus {j} makes {k}; ",
            "tales": "day {i}: {j} boats, then {k} more on the river. ",
        }.items():
            for n in range(14):
                text = "".join(words.format(i=n * 5 + j, j=j * 3 + n, k=n * j) for j in range(40))
                file.write(json.dumps({"text": text, "set": domain}) + "\n")
    return prepare(
        [str(root / "docs.jsonl")],
        root / "data",
        domain_field="set",
        tokenizer="bytes",
        eval_per_domain=8,
        workers=1,
        progress=False,
    )


def config(out, corpus, methods, **changes):
    base = Config(out=str(out), methods=methods, model=ModelConfig(preset="test-tiny"))
    t = TrainConfig(
        steps=STEPS,
        batch_size=4,
        micro_batch_size=2,
        learning_rate=3e-3,
        min_lr=3e-4,
        threads=1,
        checkpoint_every=5,
        device="cpu",
    )
    log = dataclasses.replace(base.log, progress=False, report=False, every=1)
    data, lld = dataclasses.replace(base.data, path=str(corpus)), dataclasses.replace(base.lld, bootstrap=10)
    few = dataclasses.replace(base.measure, times=3)
    return dataclasses.replace(base, data=data, lld=lld, train=t, log=log, measure=few, **changes)


@pytest.fixture(scope="module")
def target(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("target")
    run(dataclasses.replace(config(out, corpus, ["uniform"], seed=77)))
    return out / "methods" / "uniform" / "final"


@pytest.fixture(scope="module")
def cache(corpus, target, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "all"
    return teach(str(target), corpus, out, device="cpu", k=257, block_size=BLOCK, progress=False)


@pytest.fixture(scope="module")
def finished(corpus, target, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    methods = ["uniform", "distill", "distill+ce", "distill-amid", "aggregated+distill-skl+ce", "mirror+distill"]
    c = config(out, corpus, methods, target=TargetConfig(model=str(target)))
    run(dataclasses.replace(c, log=dataclasses.replace(c.log, report=True)))
    return out


def test_every_objective_ends_with_a_row_and_says_what_it_was(finished):
    rows = {row["method"]: row for row in read_json(finished / "summary.json")["rows"]}
    assert list(rows) == [
        "uniform", "distill", "distill+ce", "distill-amid", "iterative", "aggregated+distill-skl+ce", "mirror+distill",
    ]  # fmt: skip
    assert all(np.isfinite(row["true_kl"]) and row["true_kl"] > 0 for row in rows.values())
    file = read_json(finished / "methods" / "aggregated+distill-skl+ce" / "weights.json")
    assert (
        file["objective"] == "distill+ce" and file["distillation"]["preset"] == "skl" and file["distillation"]["ce_weight"] == 1
    )
    assert file["distillation"]["teacher"]["hash"] and "teacher" in file["disclosure"] and file["rule"] == "iterative"
    assert read_json(finished / "methods" / "uniform" / "weights.json")["objective"] == "ce"
    assert "teacher" in read_json(finished / "experiment.json")["disclosure"]
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert "Fig. 7" in html and "distributions: distill, distill+ce" in html


def test_the_loss_at_step_0_is_that_of_the_formula(finished, corpus, target):
    """KL of the untrained student from the teacher on the first batch, from the models themselves in fp64."""
    log = read_jsonl(finished / "methods" / "distill" / "log.jsonl")
    batch = DomainMixture(
        TokenShards(corpus), {"numbers": 0.5, "tales": 0.5}, block_size=BLOCK, batch_size=4, micro_batch_size=2
    ).next_batch()
    padded = dataclasses.replace(PRESETS["test-tiny"], vocab_size=320)  # as the loop makes it
    student, teacher = GPT(padded, seed=0), GPT.load(target)
    with torch.no_grad():
        pair = [model.double().logits(batch.x) for model in (student, teacher)]
    assert log[0]["loss"] == pytest.approx(float(reference(*pair, preset="kl")), rel=1e-5)
    both = read_jsonl(finished / "methods" / "distill+ce" / "log.jsonl")[0]["loss"]
    assert both == pytest.approx(float(reference(*pair, batch.y, preset="kl+ce")), rel=1e-5)


def test_distillation_needs_no_estimates_and_its_mixture_is_anyones(finished):
    assert read_json(finished / "methods" / "distill" / "weights.json")["trajectory"] == []
    moved = read_json(finished / "methods" / "mirror+distill" / "weights.json")
    assert len(moved["trajectory"]) > 1 and moved["rule"] == "mirror"


def weights_of(out, method):
    return load_file(out / "methods" / method / "final" / "model.safetensors")


@pytest.mark.parametrize("recorded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_interrupted_run_ends_with_the_same_bits(corpus, target, cache, tmp_path, monkeypatch, recorded):
    distill = DistillConfig(cache=str(cache) if recorded else None, preset="srkl", lam_end=0.5)
    make = {"target": TargetConfig(model=str(target)), "distill": distill}
    run(config(tmp_path / "whole", corpus, ["distill+ce"], **make))
    real, calls = Distillation.__call__, []

    def failing(self, step, *rest):
        calls.append(step)
        if step == 8:
            raise KeyboardInterrupt
        return real(self, step, *rest)

    monkeypatch.setattr(Distillation, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path / "cut", corpus, ["distill+ce"], **make))
    monkeypatch.setattr(Distillation, "__call__", real)
    run(config(tmp_path / "cut", corpus, ["distill+ce"], **make))
    a, b = weights_of(tmp_path / "whole", "distill+ce"), weights_of(tmp_path / "cut", "distill+ce")
    assert all(torch.equal(a[name], b[name]) for name in a)


def rows_of(shards, start, domain):
    tokens = np.stack(
        [shards.tokens(shards.domains[d])[s : s + BLOCK + 1].astype(np.int64) for d, s in zip(domain, start, strict=True)]
    )
    return Rows(torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:]), np.array(domain), np.array(start))


def options(method, **settings):
    """step -> the loss that a method minimises."""
    return functools.partial(DistillConfig(**settings).options, parse_method(method), steps=9)


@pytest.mark.parametrize("preset", ["kl", "rkl", "skl", "jsd", "amid"])
def test_a_whole_record_is_the_running_teacher(corpus, target, cache, preset):
    """k = V: the same loss and the same gradient."""
    shards, student = TokenShards(corpus), GPT("test-tiny", seed=3)
    rows = rows_of(shards, [0, 3 * BLOCK, BLOCK], [0, 0, 1])
    found = []
    for teacher in (load_model(str(target), device="cpu"), TeacherCache(cache)):
        objective = Distillation(options("distill+ce", preset=preset), teacher, domains=shards.domains)
        loss, tokens = objective(0, student(rows.x), student.head_weight, 257, rows)
        student.zero_grad()
        loss.backward()
        assert tokens.shape == rows.x.shape and float(tokens.mean()) == pytest.approx(float(loss.detach()), rel=1e-5)
        found.append((float(loss.detach()), student.wte.weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 1e-5


def test_training_on_a_record_of_a_few_ids_comes_nearer_too(corpus, target, tmp_path):
    cached = teach(str(target), corpus, tmp_path / "k8", device="cpu", k=8, block_size=BLOCK, max_windows=20, progress=False)
    out = tmp_path / "run"
    run(config(out, corpus, ["distill"], target=TargetConfig(model=str(target)), distill=DistillConfig(cache=str(cached))))
    summary = read_json(out / "summary.json")
    assert summary["rows"][0]["true_kl"] < 0.9 * summary["base_row"]["true_kl"]
    assert read_json(out / "methods" / "distill" / "weights.json")["distillation"]["teacher"]["hash"]


def test_another_tokenizer_is_refused_by_both_names(corpus, tmp_path):
    texts = [f"{i} words of another vocabulary, number {i * 7}" for i in range(300)]
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": t * 20, "set": "a"}) for t in texts))
    other = prepare(
        [str(tmp_path / "docs.jsonl")], tmp_path / "data", domain_field="set", tokenizer="bpe", vocab_size=257, eval_per_domain=4,
        workers=1, progress=False,
    )  # fmt: skip
    tokenizer = TokenShards(other).load_tokenizer()
    GPT("test-tiny", seed=0).save(tmp_path / "teacher", tokenizer)
    with pytest.raises(InputError) as error:
        run(config(tmp_path / "run", corpus, ["distill"], distill=DistillConfig(teacher=str(tmp_path / "teacher"))))
    assert tokenizer.name in str(error.value) and "bytes" in str(error.value) and "teacher" in str(error.value)


def test_a_teacher_that_sees_less_than_the_student_is_refused(corpus, tmp_path):
    small = GPTConfig(257, 257, 32, 1, 1, 16)
    GPT(small, seed=0).save(tmp_path / "teacher", load_tokenizer("bytes"))
    with pytest.raises(InputError, match="context of 32"):
        run(config(tmp_path / "run", corpus, ["distill"], distill=DistillConfig(teacher=str(tmp_path / "teacher"))))


def test_a_record_of_other_data_is_refused(corpus, cache, tmp_path):
    with pytest.raises(InputError, match="windows of 64 tokens, not of 32"):
        c = config(tmp_path / "run", corpus, ["distill"], distill=DistillConfig(cache=str(cache)))
        run(dataclasses.replace(c, model=ModelConfig(preset="test-tiny", block_size=32)))


def test_a_refused_teacher_is_refused_again(corpus, cache, tmp_path):
    """What was asked for once and refused must not be there the second time."""
    c = config(tmp_path / "run", corpus, ["distill"], distill=DistillConfig(cache=str(cache)))
    exp = Experiment.open(dataclasses.replace(c, model=ModelConfig(preset="test-tiny", block_size=BLOCK // 2)))
    for _ in range(2):
        with pytest.raises(InputError, match="windows of 64 tokens, not of 32"):
            exp.teacher()


def test_a_hugging_face_teacher_with_a_padded_head(corpus, tmp_path):
    """Its surplus rows, however large their logits, are no part of the vocabulary; other widths and dtypes are its own affair."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    shape = transformers.LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape)
    with torch.no_grad():
        model.lm_head.weight[257:] = 50.0
    teacher = load_model(model.to(torch.bfloat16), tokenizer="bytes")
    shards, student = TokenShards(corpus), GPT("test-tiny", seed=3)
    rows = rows_of(shards, [0, BLOCK], [0, 1])
    objective = Distillation(options("distill"), teacher, domains=shards.domains)
    loss, _ = objective(0, student(rows.x), student.head_weight, 257, rows)
    with torch.no_grad():
        hidden = model.model(input_ids=rows.x).last_hidden_state.double()
        pair = student.double().logits(rows.x), hidden @ model.lm_head.weight[:257].double().T
    assert float(loss.detach()) == pytest.approx(float(reference(*pair, preset="kl")), rel=1e-4)


def test_a_teacher_whose_head_cannot_be_taken_apart(corpus, target):
    shards, student = TokenShards(corpus), GPT("test-tiny", seed=3)
    rows = rows_of(shards, [0, BLOCK], [0, 1])
    whole = load_model(str(target), device="cpu")
    values = []
    for apart in (True, False):
        teacher = whole if apart else _logits_only(whole)
        objective = Distillation(options("distill+ce", preset="skl"), teacher, domains=shards.domains)
        values.append(float(objective(0, student(rows.x), student.head_weight, 257, rows)[0].detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def _logits_only(scorer: LanguageModel) -> LanguageModel:
    import copy

    other = copy.copy(scorer)
    other.separate_head = False
    return other


def test_lam_of_the_run_reaches_its_end(corpus, target, tmp_path):
    """TAID's interpolation: at lam = 1 the assistant is the teacher, whose KL to the student is what the last step minimised."""
    distill = DistillConfig(preset="taid", lam=0.1, lam_end=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # taid is no collapsing order
        run(config(tmp_path / "run", corpus, ["distill"], target=TargetConfig(model=str(target)), distill=distill))
    log = read_jsonl(tmp_path / "run" / "methods" / "distill" / "log.jsonl")
    assert log[0]["loss"] < 0.3 * log[-1]["loss"]


def test_infinite_alpha_ends_in_a_weights_file(corpus, target, tmp_path):
    distill = DistillConfig(divergence="kl", alpha=-float("inf"), lam=0.5)
    run(config(tmp_path / "run", corpus, ["distill"], target=TargetConfig(model=str(target)), distill=distill))
    assert read_json(tmp_path / "run" / "methods" / "distill" / "weights.json")["distillation"]["alpha"] == "-inf"


def test_another_teacher_in_the_same_place_is_noticed(corpus, target, tmp_path, monkeypatch):
    shutil.copytree(target, tmp_path / "teacher")
    c = config(tmp_path / "run", corpus, ["distill"], distill=DistillConfig(teacher=str(tmp_path / "teacher")))
    real = Distillation.__call__

    def failing(self, step, *rest):
        if step == 8:
            raise KeyboardInterrupt
        return real(self, step, *rest)

    monkeypatch.setattr(Distillation, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        run(c)
    monkeypatch.undo()
    GPT("test-tiny", seed=9).save(tmp_path / "teacher", load_tokenizer("bytes"))
    with pytest.raises(InputError, match="was trained against the teacher"):
        run(c)


def test_a_finished_run_needs_its_record_no_more(corpus, target, tmp_path):
    cached = teach(str(target), corpus, tmp_path / "k8", device="cpu", k=8, block_size=BLOCK, max_windows=20, progress=False)
    make = {"target": TargetConfig(model=str(target)), "distill": DistillConfig(cache=str(cached))}
    run(config(tmp_path / "run", corpus, ["distill"], **make))
    shutil.rmtree(cached)
    run(config(tmp_path / "run", corpus, ["distill", "uniform"], **make))
    assert "teacher" in read_json(tmp_path / "run" / "experiment.json")["disclosure"]
