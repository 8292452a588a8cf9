"""The cached reference against float64 softmax over whole matrices: exact where it stores, bounded where it does not,
as small as the bound allows, refused when stale, and whole or absent after an interruption."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_vocab import expectation
from tiny_models import tiny_model
from torch import Tensor

from gift.batches import IGNORED, Encoded, collate
from gift.cli import UserError
from gift.lora import add_adapters
from gift.models import load_tokenizer, states_at
from gift.objectives import OBJECTIVES
from gift.recipe import LoRA, load_recipe
from gift.records import read_json, write_json
from gift.reference import CachedReference, Demand, OnlineReference, scoring
from gift.reference.__main__ import main
from gift.reference.cache import META, cache_folder, cache_key, demands_of, find_cache, scored_subsets
from gift.reference.scoring import obtain, obtain_most, plan, score
from gift.vocab import DenseReference, SparseReference, vocab_loss
from gift.vocab.truncation import truncate

ROOT = Path(__file__).parents[2]
VOCAB = 60
KEY = {"weights": "a", "data": "b", "template": None}


# ---------------------------------------------------------------------------------------------------------------------
# Oracles


def gift_target(p: Tensor, labels: Tensor, beta: float) -> Tensor:
    """softmax(log p + beta onehot(y)), by its definition."""
    return torch.softmax(p.log() + beta * torch.nn.functional.one_hot(labels, p.shape[1]).to(p), -1)


def soft_share(p: Tensor, labels: Tensor, beta: float) -> Tensor:
    """1 - w = 1 / (1 + (e^beta - 1) p(y))."""
    return 1 / (1 + math.expm1(beta) * p.gather(1, labels[:, None])[:, 0])


def restored(sparse: SparseReference, labels: Tensor, vocab: int) -> Tensor:
    """The distribution p' [N, V] that a sparse reference stands for, by its definition."""
    p = torch.zeros(len(labels), vocab, dtype=torch.float64)
    p[sparse.rows, sparse.columns] = sparse.probs.double()
    assert (p.gather(1, labels[:, None]) == 0).all()  # never the label
    return p.scatter(1, labels[:, None], 1 - p.sum(-1, keepdim=True))


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1) / 2


def gift_demand(beta: float, tolerance: float) -> Demand:
    return Demand((("gift", {"beta": beta}),), tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Truncation


def distributions(seed: int, tokens: int, vocab: int, scale: float) -> tuple[DenseReference, Tensor, Tensor]:
    """A head that gives random logits, labels, and its probabilities [N, V], all float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 5, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocab, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    return DenseReference(hidden, weight, bias), labels, torch.softmax(hidden @ weight.T + bias, -1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.sampled_from([2, 3, 30, 700]),
    scale=st.sampled_from([0.0, 0.5, 3.0]),
    beta=st.floats(0, 12),
    more=st.floats(0, 12),
    tolerance=st.floats(-6, -0.01).map(lambda exponent: 10**exponent),
    chunk=st.sampled_from([None, 1, 4]),
)
def test_targets_stay_within_the_tolerance_with_as_few_entries_as_possible(
    seed, vocab, scale, beta, more, tolerance, chunk
):
    reference, labels, p = distributions(seed, 9, vocab, scale)
    demand = gift_demand(beta, tolerance)
    sparse, left_out = truncate(
        reference, labels, lambda logp: demand.share(logp, vocab), tolerance, chunk_tokens=chunk
    )

    torch.testing.assert_close(sparse.logp, p.log().gather(1, labels[:, None])[:, 0])
    torch.testing.assert_close(sparse.entropy, -expectation(p, p.log()))
    assert sparse.rows.tolist() == sorted(sparse.rows.tolist())
    torch.testing.assert_close(sparse.probs, p[sparse.rows, sparse.columns])
    kept = restored(sparse, labels, vocab)
    share, epsilon = soft_share(p, labels, beta), 1e-10
    for larger in (beta, beta + more):
        soft = soft_share(p, labels, larger)[:, None]
        cached = soft * kept + (1 - soft) * torch.nn.functional.one_hot(labels, vocab)
        assert (total_variation(gift_target(p, labels, larger), cached) <= tolerance + epsilon).all()
    torch.testing.assert_close(total_variation(p, kept), left_out, atol=epsilon, rtol=0)

    others = p.scatter(1, labels[:, None], 0)
    needed = share * others.sum(-1)
    for token in range(len(labels)):
        stored = sparse.probs[sparse.rows == token]
        if not len(stored):
            assert needed[token] <= tolerance + epsilon
            continue
        assert needed[token] > tolerance - epsilon
        largest = others[token].sort(descending=True).values
        torch.testing.assert_close(stored, largest[: len(stored)])
        assert share[token] * (left_out[token] + stored[-1]) > tolerance - epsilon  # one entry fewer would not do


@pytest.mark.parametrize("label_masked", [False, True])
def test_a_masked_vocabulary_is_not_stored(label_masked):
    reference, labels, _ = distributions(0, 6, 30, 1.0)
    bias = reference.bias.clone()
    bias[10:] = -math.inf
    labels = labels % 10 + (15 if label_masked else 0)
    p = torch.softmax(reference.hidden @ reference.weight.T + bias, -1)
    demand = Demand((("kd", {"alpha": 1.0}),), 1e-15)
    sparse, _ = truncate(
        DenseReference(reference.hidden, reference.weight, bias), labels, lambda logp: demand.share(logp, 10), 1e-15
    )
    assert sparse.columns.max() < 10
    assert len(sparse.rows) == 6 * (10 if label_masked else 9)
    torch.testing.assert_close(sparse.logp, p.log().gather(1, labels[:, None])[:, 0])
    torch.testing.assert_close(restored(sparse, labels, 30), p)
    torch.testing.assert_close(sparse.entropy, -expectation(p, p.log()))


def test_logits_are_scaled_and_capped_as_the_model_does():
    reference, labels, _ = distributions(1, 6, 30, 1.0)
    logits = reference.hidden @ reference.weight.T + reference.bias
    p = torch.softmax(2.0 * torch.tanh(0.5 * logits / 2.0), -1)
    sparse, _ = truncate(reference, labels, torch.ones_like, 1e-300, scale=0.5, softcap=2.0)
    torch.testing.assert_close(restored(sparse, labels, 30), p)


def test_nonsense_is_refused():
    reference, labels, _ = distributions(1, 6, 30, 1.0)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        truncate(reference, labels, torch.ones_like, 0.0)
    with pytest.raises(IndexError, match="labels"):
        truncate(reference, labels + 30, torch.ones_like, 0.1)


def test_without_tokens_there_is_nothing():
    reference, labels, _ = distributions(1, 6, 30, 1.0)
    sparse, left_out = truncate(
        DenseReference(reference.hidden[:0], reference.weight), labels[:0], torch.ones_like, 0.1
    )
    assert len(sparse.logp) == len(sparse.rows) == len(left_out) == 0


def test_the_share_is_the_largest_of_the_methods():
    logp = torch.tensor([-0.1, -5.0, -20.0], dtype=torch.float64)
    demand = Demand((("gift", {"beta": 5.0}), ("kd", {"alpha": 0.3}), ("asft", {"kl_weight": 0.05}), ("sft", {})), 0.1)
    gift = 1 / (1 + math.expm1(5.0) * logp.exp())
    torch.testing.assert_close(demand.share(logp, VOCAB), gift.clamp(min=0.3))
    assert not Demand((("sft", {}), ("gift", {"beta": math.inf})), 0.1).share(logp, VOCAB).any()


# ---------------------------------------------------------------------------------------------------------------------
# Caches


def base(seed: int = 0) -> Any:
    """A tiny model whose distributions are far from uniform."""
    model = tiny_model(VOCAB, seed=seed, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


def examples(count: int = 12, seed: int = 0) -> list[Encoded]:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        prompt, response = rng.randint(1, 6), rng.randint(1, 12)
        made.append(Encoded(f"e{number}", tuple(rng.randrange(VOCAB) for _ in range(prompt + response)), prompt))
    return made


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SHARD_TOKENS", 20)


def made(root: Path, demand: Demand, model: Any = None, data: list[Encoded] | None = None, **options: Any) -> Any:
    options = {"key": KEY, "budget_bytes": 1e9, "micro_tokens": 40, **options}
    return score(lambda: base() if model is None else model, data or examples(), demand, root=root, **options)


def exact(data: list[Encoded]) -> tuple[Tensor, Tensor]:
    """The base's probabilities [N, V] at the labelled positions in float64, one example after another, and labels."""
    model, rows, labels = base().double(), [], []
    for example in data:
        ids = torch.tensor([example.ids])
        logits = model(input_ids=ids).logits[0, example.prompt_length - 1 : -1]
        rows.append(torch.softmax(logits.detach(), -1))
        labels.append(ids[0, example.prompt_length :])
    return torch.cat(rows), torch.cat(labels)


@pytest.mark.parametrize("objective", [("gift", {"beta": 3.0}), ("kd", {"alpha": 0.2}), ("asft", {"kl_weight": 0.05})])
def test_a_cache_says_what_the_base_says_in_any_order(tmp_path, small_shards, objective):
    tolerance = 0.02
    cache = made(tmp_path, Demand((objective,), tolerance))
    assert len(list(cache.folder.glob("*.safetensors"))) > 2
    data = examples()
    tokens = entries = 0
    for batch in (data, data[::-1], random.Random(1).sample(data, 5), data[3:4]):
        sparse = cache.batch(batch)
        p, labels = exact(batch)
        selected = collate(batch, 0)["labels"]
        assert selected[selected != IGNORED].tolist() == labels.tolist()
        torch.testing.assert_close(sparse.logp.double(), p.log().gather(1, labels[:, None])[:, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sparse.entropy.double(), -expectation(p, p.log()), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sparse.probs.double(), p[sparse.rows, sparse.columns], atol=1e-4, rtol=1e-4)
        assert (sparse.rows.diff() >= 0).all()
        share = OBJECTIVES[objective[0]].reference_share(sparse.logp, **objective[1]).double()
        errors = share * total_variation(restored(sparse, labels, VOCAB), p)
        assert errors.max() <= tolerance + 1e-5
        if batch is data:
            tokens, entries = len(labels), len(sparse.rows)
            assert cache.info.max_error == pytest.approx(float(errors.max()), abs=1e-5)
            assert cache.info.mean_error == pytest.approx(float(errors.mean()), abs=1e-5)
            assert cache.info.soft_tokens == len(sparse.rows.unique())
    assert (cache.info.tokens, cache.info.entries) == (tokens, entries)
    assert cache.info.soft_tokens > 0
    assert cache.info.bytes == sum(file.stat().st_size for file in cache.folder.glob("*.safetensors"))
    nothing = cache.batch([])
    assert len(nothing.logp) == len(nothing.rows) == len(nothing.columns) == 0
    assert nothing.rows.dtype == nothing.columns.dtype == torch.int64


def test_a_model_that_scales_its_logits_is_scored_with_the_scale(tmp_path):
    model = base()
    model.config.logit_scale = 0.5
    p, labels = exact(examples())
    scaled = torch.log_softmax(p.log() / 2, -1).gather(1, labels[:, None])[:, 0]
    found = made(tmp_path, gift_demand(2.0, 0.01), model).batch(examples()).logp
    torch.testing.assert_close(found.double(), scaled, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", [("gift", {"beta": 3.0}), ("kd", {"alpha": 0.2})])
def test_gradients_differ_from_the_online_ones_by_twice_the_tolerance_at_most(tmp_path, objective):
    """With the identity as head, hidden states are logits and their gradient is target's."""
    name, options = objective
    cache, data = made(tmp_path, Demand((objective,), 0.05)), examples()
    p, labels = exact(data)
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for reference in (cache.batch(data), DenseReference(p.log().float(), torch.eye(VOCAB))):
        logits = torch.randn(len(labels), VOCAB, generator=generator.manual_seed(0)).requires_grad_()
        loss, _ = vocab_loss(
            logits, torch.eye(VOCAB), labels, lambda stats: OBJECTIVES[name](stats, **options), reference=reference
        )
        loss.backward()
        gradients.append(logits.grad)
    differences = (gradients[0] - gradients[1]).abs().sum(-1)
    assert 1e-3 < differences.max() <= 2 * 0.05 + 1e-4


def test_one_cache_serves_every_larger_beta(tmp_path):
    cache = made(tmp_path, gift_demand(2.0, 0.01))
    for beta in (2.0, 3.5, 20.0):
        found = find_cache(tmp_path, KEY, gift_demand(beta, 0.01))
        assert found is not None
        assert found.folder == cache.folder
        p, labels = exact(examples())
        errors = soft_share(p, labels, beta) * total_variation(restored(found.batch(examples()), labels, VOCAB), p)
        assert found.error(gift_demand(beta, 1.0)) == pytest.approx(
            (float(errors.max()), float(errors.mean())), abs=1e-5
        )
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / META).write_text("{}")
    assert find_cache(tmp_path, KEY, gift_demand(1.0, 0.01)) is None
    assert find_cache(tmp_path, KEY, gift_demand(2.0, 0.001)) is None
    assert find_cache(tmp_path, {**KEY, "weights": "other"}, gift_demand(3.0, 0.01)) is None


def test_what_is_there_is_not_scored_again(tmp_path):
    def refuse() -> Any:
        raise AssertionError("the model is not needed")

    settings = {"key": KEY, "budget_bytes": 1e9, "micro_tokens": 40, "root": tmp_path}
    first = obtain(base, examples(), gift_demand(2.0, 0.01), **settings)
    assert first is not None
    again = obtain(refuse, examples(), gift_demand(5.0, 0.01), **settings)
    assert again is not None
    assert again.folder == first.folder
    assert score(refuse, examples(), gift_demand(2.0, 0.01), **settings).folder == first.folder
    assert obtain(base, examples(), gift_demand(1.0, 0.01), **settings).folder != first.folder


def test_the_order_of_methods_does_not_matter(tmp_path):
    one, other = ("gift", {"beta": 3.0}), ("kd", {"alpha": 0.1})
    assert cache_folder(tmp_path, KEY, Demand((one, other), 0.1)) == cache_folder(
        tmp_path, KEY, Demand((other, one), 0.1)
    )
    assert cache_folder(tmp_path, KEY, gift_demand(math.inf, 0.1)) != cache_folder(tmp_path, KEY, gift_demand(3.0, 0.1))


def test_the_online_reference_of_an_adapted_policy_is_its_base():
    policy, batch = base(), collate(examples(), 0)
    selected = batch["labels"] != IGNORED
    expected = OnlineReference(base()).hidden(batch["input_ids"], batch["attention_mask"], selected)
    add_adapters(policy, LoRA(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    adapted = states_at(policy, batch["input_ids"], batch["attention_mask"], selected)
    reference = OnlineReference(policy, adapted=True)
    torch.testing.assert_close(reference.hidden(batch["input_ids"], batch["attention_mask"], selected), expected)
    again = states_at(policy, batch["input_ids"], batch["attention_mask"], selected)
    assert (again == adapted).all()
    assert (adapted - expected).abs().max() > 0.1
    assert trained == [name for name, parameter in policy.named_parameters() if parameter.requires_grad]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights": "other"}, r"base model \(sha256 of its weights\)"),
        ({"data": "other"}, r"data \(their sha256\)"),
        ({"template": "boxed"}, "data.template"),
        ({"max_length": 8}, "data.max_length"),
    ],
)
def test_a_stale_cache_is_refused(tmp_path, change, named):
    cache = made(tmp_path, gift_demand(2.0, 0.01))
    with pytest.raises(UserError, match=rf"stale: other {named}; score again"):
        CachedReference(cache.folder, {**KEY, **change})
    assert CachedReference(cache.folder, KEY).info == cache.info


def test_examples_that_were_not_scored_are_refused(tmp_path):
    cache = made(tmp_path, gift_demand(2.0, 0.01))
    known = examples()[0]
    with pytest.raises(UserError, match=r"no example 'new'.*score again"):
        cache.batch([Encoded("new", known.ids, known.prompt_length)])
    with pytest.raises(UserError, match=r"'e0' has \d+ response tokens, \d+ were scored; score again"):
        cache.batch([Encoded("e0", (*known.ids, 1), known.prompt_length)])


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "another sha256": lambda folder: flip_a_byte(folder / "00001.safetensors"),
    "not the file that was written": lambda folder: os.truncate(folder / "00001.safetensors", 100),
    "missing": lambda folder: (folder / "00001.safetensors").unlink(),
    "no finished reference cache": lambda folder: (folder / META).unlink(),
    "meta.json: damaged": lambda folder: os.truncate(folder / META, 100),
    "damaged": lambda folder: write_json(folder / META, {**read_json(folder / META), "info": {}}),
}


@pytest.mark.parametrize("message", list(DAMAGES))
def test_a_damaged_cache_is_refused_and_scored_again(tmp_path, small_shards, message):
    demand = gift_demand(2.0, 0.01)
    cache = made(tmp_path, demand)
    before = {file.name: file.read_bytes() for file in cache.folder.glob("*.safetensors")}
    DAMAGES[message](cache.folder)
    with pytest.raises(UserError, match=f"{message}.*score again"):
        CachedReference(cache.folder, KEY)
    if message != "no finished reference cache":
        with pytest.raises(UserError, match="score again"):
            find_cache(tmp_path, KEY, demand)
        # nor does a neighbour that nobody asked for stand in the way
        assert find_cache(tmp_path, KEY, gift_demand(4.0, 0.01)) is None
    made(tmp_path, demand)
    assert {file.name: file.read_bytes() for file in cache.folder.glob("*.safetensors")} == before


def test_an_existing_folder_without_a_cache_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no finished reference cache.*score again"):
        CachedReference(tmp_path / "nothing", KEY)


# ---------------------------------------------------------------------------------------------------------------------
# Budget and interruption


class Counter:
    """Counts the micro-batches a reference is asked for, and stops at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.calls = 0
        hidden = OnlineReference.hidden

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            if self.calls == stop_at:
                raise KeyboardInterrupt
            return hidden(*args, **kwargs)

        monkeypatch.setattr(OnlineReference, "hidden", counted)


@pytest.mark.parametrize("part", [0.01, 0.6])
def test_a_budget_that_does_not_suffice_is_noticed_early_and_leaves_nothing(
    tmp_path, small_shards, monkeypatch, capsys, part
):
    demand, data = Demand((("kd", {"alpha": 1.0}),), 1e-4), sorted(examples(60), key=lambda example: len(example.ids))
    full = made(tmp_path / "enough", demand, data=data).info.bytes
    counter = Counter(monkeypatch)
    assert made(tmp_path / "short", demand, data=data, budget_bytes=part * full) is None
    assert 0 < counter.calls < 8  # of more than sixty
    assert list((tmp_path / "short").iterdir()) == []
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "the online reference is used" in line
    needed = float(line.split("needs about ")[1].split(" GB")[0]) * 1e9
    assert needed == pytest.approx(full, rel=0.3)


def test_a_sweep_gives_up_its_smallest_betas_first(tmp_path, small_shards):
    """So that the larger ones, whose cache is small, still have theirs."""
    setting = {beta: ("gift", {"beta": beta}) for beta in (0.5, 3.0, 8.0)}
    sizes = {beta: made(tmp_path / str(beta), gift_demand(beta, 0.05)).info.bytes for beta in setting}
    assert sizes[0.5] > 1.02 * sizes[3.0]
    cache, served = obtain_most(
        base,
        examples(),
        Demand((setting[8.0], setting[0.5], setting[3.0]), 0.05),
        key=KEY,
        budget_bytes=(sizes[0.5] + sizes[3.0]) / 2,
        micro_tokens=40,
        root=tmp_path / "sweep",
    )
    assert served.objectives == (setting[8.0], setting[3.0])
    assert cache.serves(served)
    nothing = {"key": KEY, "budget_bytes": 1.0, "micro_tokens": 40, "root": tmp_path / "none"}
    assert obtain_most(base, examples(), gift_demand(8.0, 0.05), **nothing) == (None, Demand((), 0.05))


def test_a_single_shard_is_cut_short(tmp_path, monkeypatch):
    demand, data = Demand((("kd", {"alpha": 1.0}),), 1e-4), examples(60)
    counter = Counter(monkeypatch)
    full = made(tmp_path / "enough", demand, data=data).info.bytes
    needed, counter.calls = counter.calls, 0
    assert made(tmp_path / "short", demand, data=data, budget_bytes=full / 4) is None
    assert 0 < counter.calls < needed / 2


def test_the_first_shards_are_a_fair_sample(small_shards):
    data = sorted(examples(400), key=lambda example: len(example.ids))
    shards = plan(data)
    assert sorted((one for shard in shards for one in shard), key=data.index) == data
    first = [len(one.ids) for shard in shards[:20] for one in shard]
    assert sum(first) / len(first) == pytest.approx(sum(len(one.ids) for one in data) / len(data), rel=0.2)


def test_a_budget_that_just_suffices_is_enough(tmp_path, small_shards):
    demand, data = Demand((("kd", {"alpha": 1.0}),), 1e-4), examples(60)
    size = made(tmp_path / "one", demand, data=data).info.bytes
    assert made(tmp_path / "two", demand, data=data, budget_bytes=size) is not None


def test_an_interrupted_scoring_leaves_nothing_half_written_and_goes_on(tmp_path, small_shards, monkeypatch):
    demand = gift_demand(2.0, 0.01)
    whole = made(tmp_path / "whole", demand)
    total = len(list(whole.folder.glob("*.safetensors")))
    with monkeypatch.context() as patch:
        counter = Counter(patch, stop_at=4)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "cut", demand)
    folder = tmp_path / "cut" / whole.folder.name
    finished = sorted(file.name for file in folder.iterdir() if file.name != ".lock")
    assert 0 < len(finished) < total
    for name in finished:  # no scratch files, no meta.json; what is there is whole
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes()
    with pytest.raises(UserError, match="no finished reference cache"):
        CachedReference(folder, KEY)
    assert find_cache(tmp_path / "cut", KEY, demand) is None

    os.truncate(folder / finished[0], 100)  # what no kill leaves, but a full disk might
    counter = Counter(monkeypatch)
    again = made(tmp_path / "cut", demand)
    assert counter.calls > 0
    assert {file.name: file.read_bytes() for file in folder.glob("*.safetensors")} == {
        file.name: file.read_bytes() for file in whole.folder.glob("*.safetensors")
    }
    assert again.info.max_error == whole.info.max_error


# ---------------------------------------------------------------------------------------------------------------------
# Keys, recipes and the command


def test_the_key_follows_base_tokenizer_template_and_data(tiny_checkpoint):
    def key(data: list[Encoded] | None = None, **changes: Any) -> Mapping[str, Any]:
        tokenizer = load_tokenizer(tiny_checkpoint)
        tokenizer.chat_template = changes.pop("chat_template", tokenizer.chat_template)
        tokenizer.add_tokens(changes.pop("added", []))
        settings = {"weights_sha256": "w", "data_sha256": "d", "dtype": "float32", "template": None, "max_length": 64}
        return cache_key(tokenizer, data or examples(), **{**settings, **changes})

    def differing(other: Mapping[str, Any]) -> list[str]:
        return [name for name, value in key().items() if other[name] != value]

    first = examples()[0]
    assert differing(key()) == []
    assert differing(key(added=["new"])) == ["tokenizer"]
    assert differing(key(weights_sha256="x")) == ["weights"]
    assert differing(key(chat_template="{{ messages }}")) == ["chat_template"]
    assert differing(key(data=[Encoded(first.id, first.ids, first.prompt_length + 1), *examples()[1:]])) == ["tokens"]
    assert differing(key(data=[Encoded(first.id, (0, *first.ids[1:]), first.prompt_length)])) == ["tokens"]
    json.dumps(key())


@pytest.fixture
def recipe_file(tiny_checkpoint, tmp_path) -> Path:
    """A recipe of three methods on 40 generated problems and a tiny checkpoint."""
    rows = [
        {"prompt": f"{a} + {b}", "response": f"{a}+{b}={a + b}", "answer": str(a + b)}
        for a in range(8)
        for b in range(5)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "sums.yaml"
    recipe = {
        "base": {"model": str(tiny_checkpoint)},
        "data": {"source": str(data), "sft": 20, "rl": 8, "validation": 4, "max_length": 64},
        "engine": {"zero_stage": 0, "dtype": "float32"},
        "init": {"batch_size": 4},
        "rl": None,
        "methods": {
            "sft": {"label": "SFT", "objective": "sft"},
            "gift": {"label": "GIFT", "objective": "gift", "options": {"beta": 4.0}},
            "kd": {"label": "KD", "objective": "kd", "options": {"alpha": 0.1}},
        },
    }
    file.write_text(json.dumps(recipe))
    return file


def test_a_recipe_asks_for_what_its_methods_need(recipe_file):
    recipe = load_recipe(str(recipe_file))
    gift, kd = ("gift", {"beta": 4.0}), ("kd", {"alpha": 0.1})
    assert demands_of(recipe) == {"gift": Demand((gift,), 1e-3), "kd": Demand((kd,), 1e-3)}
    assert demands_of(recipe, beta=1.0, tolerance=0.1)["gift"] == Demand((gift, ("gift", {"beta": 1.0})), 0.1)
    assert scored_subsets(recipe) == ("sft",)
    assert scored_subsets(load_recipe(str(recipe_file), ["methods.sft.data=joint"])) == ("sft",)
    assert scored_subsets(load_recipe(str(recipe_file), ["methods.gift.data=joint"])) == ("sft", "rl")
    with pytest.raises(UserError, match="beta"):
        demands_of(recipe, beta=-1.0)


def test_the_command_scores_a_recipe(recipe_file, tmp_path, capsys):
    command = ["score", str(recipe_file), "--tolerance", "0.01", "--beta", "1", "--out", str(tmp_path / "caches")]
    assert main(command) == 0
    folders = sorted((tmp_path / "caches").iterdir())
    assert len(folders) == 2  # for GIFT and for KD
    printed, recipe = capsys.readouterr().out, load_recipe(str(recipe_file))
    exact, sharper = (demands_of(recipe, beta=1.0, tolerance=tolerance) for tolerance in (0.01, 0.009))
    for folder in folders:
        cache = CachedReference(folder)
        assert str(folder) in printed
        assert f"{cache.info.tokens:,}" in printed
        assert f"at most {cache.info.max_error:.3g}" in printed
        assert 0 < cache.info.max_error <= 0.01 * (1 + 1e-5)
        assert sum(len(shard["examples"]) for shard in read_json(folder / META)["shards"]) == 20
    for objective in exact:
        assert sum(CachedReference(folder).serves(exact[objective]) for folder in folders) >= 1
        assert not all(CachedReference(folder).serves(sharper[objective]) for folder in folders)

    assert main([*command, "reference.budget_gb=1e-6", "--tolerance", "0.001"]) == 1
    assert "the online reference is used" in capsys.readouterr().out
    assert sorted((tmp_path / "caches").iterdir()) == folders


def test_the_command_says_what_is_wrong(recipe_file, tmp_path):
    only_sft = json.loads(recipe_file.read_text())
    only_sft["methods"] = {"sft": only_sft["methods"]["sft"]}
    other = tmp_path / "only.yaml"
    other.write_text(json.dumps(only_sft))
    with pytest.raises(UserError, match="none of its methods needs the base model; give --beta"):
        main(["score", str(other)])
    with pytest.raises(SystemExit):
        main(["score", str(recipe_file), "--tolerance", "0"])


@pytest.mark.slow
def test_two_ranks_write_the_same_cache(recipe_file, tmp_path, monkeypatch):
    """Every shard by one of the ranks, with the same bytes as by a single one."""
    monkeypatch.setattr(scoring, "SHARD_TOKENS", 40)
    assert main(["score", str(recipe_file), "--out", str(tmp_path / "one")]) == 0
    script = tmp_path / "scored.py"
    script.write_text(
        "import sys\n"
        "from gift.reference import scoring\n"
        "from gift.reference.__main__ import main\n"
        "scoring.SHARD_TOKENS = 40\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(script), "score", str(recipe_file), "--out", str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=240, env=environment)
    folders = [next((tmp_path / name).iterdir()) for name in ("one", "two")]
    one, two = ({file.name: file.read_bytes() for file in folder.glob("*.safetensors")} for folder in folders)
    assert len(one) > 2
    assert one == two
    assert CachedReference(folders[1]).info.max_error == CachedReference(folders[0]).info.max_error
