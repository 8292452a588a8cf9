import json
import shutil

import numpy as np
import pytest
import scipy.special
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from diagnostics import run as drift
from gift.cli import UserError
from gift.records import RunDir, read_table, sha256_file, sha256_weights

WORDS = ["<pad>", "<end>", "<user>", "<assistant>", *map(str, range(20)), "+", "="]
TEMPLATE = "<user> {{ messages[0]['content'] }} <assistant>"
LINEAGE = [  # id, parent, stage
    ("base", None, "base"),
    ("sft", "base", "init"),
    ("sft-rl", "sft", "rl"),
    ("gift", "base", "init"),
    ("gift-rl", "gift", "rl"),
    ("direct-rl", "base", "rl"),
]
PAIRS = ["base..sft", "sft..sft-rl", "base..sft-rl", "base..gift", "gift..gift-rl", "base..gift-rl", "base..direct-rl"]
ROWS = [("one", "1 + 2", "= 3"), ("two", "4 + 5 + 6", "4 + 5 = 9 9 + 6 = 15"), ("three", "2", "2 = 2")]


def save_checkpoint(folder, *, seed=0, drift_by=0.0, words=WORDS, template=TEMPLATE, head_rows=None, width=16):
    """A random two-layer Llama with a word-level tokenizer; `drift_by` adds that much noise to each of its weights."""
    shape = {"hidden_size": width, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model(head_rows or len(words), "llama", initializer_range=0.4, tie_word_embeddings=False, **shape)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += drift_by * torch.randn_like(weight)
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", chat_template=template
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of six policies; those named gift are the base's weights untouched."""
    root = tmp_path_factory.mktemp("checkpoints")
    noise = {"base": 0.0, "sft": 0.05, "sft-rl": 0.06, "gift": 0.0, "gift-rl": 0.0, "direct-rl": 0.01}
    return {
        policy: save_checkpoint(root / policy, seed=seed, drift_by=size)
        for seed, (policy, size) in enumerate(noise.items())
    }


def make_run(path, checkpoints, policies=tuple(policy for policy, _, _ in LINEAGE)):
    """A training run's directory as it is when its policies are trained, with its own copies of the checkpoints."""
    run = RunDir.create(path, kind="train", recipe={})
    for policy, parent, stage in LINEAGE:
        if policy not in policies:
            continue
        folder = shutil.copytree(checkpoints[policy], path / "checkpoints" / policy)
        run.add_node(
            {
                "id": policy,
                "label": policy.upper(),
                "parent": parent,
                "stage": stage,
                "method": None if stage == "base" else policy.partition("-")[0],
                "checkpoint": f"checkpoints/{policy}",
                "weights_sha256": sha256_weights(folder),
            }
        )
    write_rows(path / "data" / "validation.jsonl")
    return run


def write_rows(path, **more):
    path.parent.mkdir(exist_ok=True)
    rows = [{"id": name, "prompt": prompt, "response": response, "answer": "-"} for name, prompt, response in ROWS]
    path.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path, checkpoints):
    return make_run(tmp_path / "run", checkpoints)


@pytest.fixture
def small_run(tmp_path, checkpoints):
    return make_run(tmp_path / "run", checkpoints, policies=("base", "sft", "sft-rl"))


@pytest.fixture
def measured(monkeypatch):
    """The pairs that are measured from here on, in order."""
    pairs = []
    original = drift.measure_pair

    def recorded(run, pair, *rest):
        pairs.append("..".join(pair))
        original(run, pair, *rest)

    monkeypatch.setattr(drift, "measure_pair", recorded)
    return pairs


def sums(run, pair, metric):
    """(n, sum, sum of squares) by sequence."""
    table = read_table(run.path / "drift" / f"{pair}.parquet")
    rows = zip(*(table[name] for name in ("metric", "sequence", "n", "sum", "sum_sq")), strict=True)
    return {sequence: tuple(numbers) for name, sequence, *numbers in rows if name == metric}


@torch.no_grad()
def read_alone(folder):
    """Per sequence, by the whole model and no batch: states, log-probabilities and ids at the response, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {}
    for name, prompt, response in ROWS:
        before = ["<user>", *prompt.split(), "<assistant>"]
        ids = [WORDS.index(word) for word in [*before, *response.split(), "<end>"]]
        output = model(torch.tensor([ids]), output_hidden_states=True)
        rows = slice(len(before) - 1, len(ids) - 1)
        logp = scipy.special.log_softmax(output.logits[0, rows].double().numpy(), -1)
        found[name] = (output.hidden_states[-1][0, rows].double().numpy(), logp, ids[len(before) :])
    return found


def test_measures_every_pair_of_the_lineage(run, capsys):
    assert drift.main(["--run", str(run.path), "--batch-size", "2"]) == 0
    assert sorted(path.stem for path in (run.path / "drift").iterdir()) == sorted(PAIRS)

    entry = RunDir.open(run.path).manifest["drift"]
    assert list(entry["pairs"]) == PAIRS
    assert (entry["sequences"], entry["tokens"]) == (3, 3 + 11 + 4)
    assert entry["definitions"] == drift.DEFINITIONS
    weights = {policy: sha256_weights(run.checkpoint(policy)) for policy, _, _ in LINEAGE}
    for pair in PAIRS:
        assert entry["pairs"][pair] == {
            "weights_sha256": [weights[policy] for policy in pair.split("..")],
            "file": f"drift/{pair}.parquet",
            "sha256": sha256_file(run.path / "drift" / f"{pair}.parquet"),
        }

    printed = capsys.readouterr().out
    assert drift.DIRECTION_NOTE in printed
    for metric in ("cos", "l2", "kl_new_old", "kl_old_new", "topk_overlap_10"):
        assert drift.DEFINITIONS[metric] in printed
    for pair in PAIRS:
        assert str(run.path / "drift" / f"{pair}.parquet") in printed
    lines = {line.split()[0]: line for line in printed.splitlines() if ".." in line and "±" in line}
    for metric in ("cos", "l2", "kl_new_old", "kl_old_new", "topk_overlap_10"):
        tokens, total, _ = np.sum([*sums(run, "sft..sft-rl", metric).values()], axis=0)
        assert f" {total / tokens:.4g} ± " in lines["sft..sft-rl"], metric
    assert " ".join(lines["base..gift"].split()) == "base..gift 1 ± 0 0 ± 0 0 ± 0 0 ± 0 1 ± 0"


def test_sums_are_those_of_the_whole_models_read_one_sequence_at_a_time(small_run):
    drift.measure_run(small_run, sequences=None, batch_size=3, max_length=64)
    a, b = (read_alone(small_run.checkpoint(policy)) for policy in ("base", "sft"))
    expected = {
        name: {} for name in ("cos", "l2", "kl_new_old", "kl_old_new", "js", "nll_a", "nll_b", "topk_overlap_1")
    }
    for name in a:
        (hidden_a, logp_a, labels), (hidden_b, logp_b, _) = a[name], b[name]
        p_a, p_b, positions = np.exp(logp_a), np.exp(logp_b), np.arange(len(labels))
        per_token = {
            "cos": (hidden_a * hidden_b).sum(-1)
            / np.linalg.norm(hidden_a, axis=-1)
            / np.linalg.norm(hidden_b, axis=-1),
            "l2": np.linalg.norm(hidden_a - hidden_b, axis=-1),
            "kl_new_old": scipy.special.rel_entr(p_b, p_a).sum(-1),
            "kl_old_new": scipy.special.rel_entr(p_a, p_b).sum(-1),
            "js": sum(scipy.special.rel_entr(p, (p_a + p_b) / 2).sum(-1) / 2 for p in (p_a, p_b)),
            "nll_a": -logp_a[positions, labels],
            "nll_b": -logp_b[positions, labels],
            "topk_overlap_1": (logp_a.argmax(-1) == logp_b.argmax(-1)).astype(float),
        }
        for metric, values in per_token.items():
            expected[metric][name] = (len(labels), values.sum(), (values**2).sum())
    for metric, by_sequence in expected.items():
        found = sums(small_run, "base..sft", metric)
        assert found.keys() == by_sequence.keys()
        for name, numbers in by_sequence.items():
            assert found[name] == pytest.approx(numbers, rel=2e-4), (metric, name)


def test_overlaps_beyond_the_vocabulary_are_left_out(small_run):
    drift.measure_run(small_run, sequences=1, batch_size=1, max_length=64)
    metrics = set(read_table(small_run.path / "drift" / "base..sft.parquet")["metric"])
    assert metrics == set(drift.DEFINITIONS) - {"topk_overlap_50", "topk_overlap_100"}


def test_unchanged_weights_have_not_drifted(run):
    drift.measure_run(run, sequences=None, batch_size=2, max_length=64)
    for metric in ("l2", "l2_rel", "kl_new_old", "kl_old_new", "js", "tv"):
        assert {numbers[1:] for numbers in sums(run, "base..gift", metric).values()} == {(0.0, 0.0)}
    for metric in ("cos", "topk_overlap_10"):
        assert all(n == total == squares for n, total, squares in sums(run, "base..gift", metric).values())


def test_slabs_change_nothing(small_run, monkeypatch):
    drift.measure_run(small_run, sequences=None, batch_size=2, max_length=64)
    whole = sums(small_run, "base..sft", "kl_new_old")
    monkeypatch.setattr(drift, "SLAB_TOKENS", 4)
    small_run.update(drift={})
    drift.measure_run(small_run, sequences=None, batch_size=2, max_length=64)
    for name, numbers in sums(small_run, "base..sft", "kl_new_old").items():
        assert numbers == pytest.approx(whole[name], rel=1e-5)


def test_a_second_start_measures_nothing_again(small_run, measured, monkeypatch, capsys):
    drift.main(["--run", str(small_run.path), "--sequences", "2", "--max-length", "9"])
    first = capsys.readouterr().out
    assert measured == ["base..sft", "sft..sft-rl", "base..sft-rl"]
    monkeypatch.setattr(drift, "load_side", lambda *_: pytest.fail("a model was loaded"))
    drift.main(["--run", str(small_run.path)])  # sequences and length as before, unless said otherwise
    second = capsys.readouterr().out
    assert "3 of 3 pairs are already measured" in second
    assert first[first.index("Drift on 2") :] == second[second.index("Drift on 2") :]
    assert len(measured) == 3


def test_a_kill_costs_only_the_pair_at_work(small_run, measured, monkeypatch):
    write_table = drift.write_table

    def killed(path, columns):
        if path.name == "sft..sft-rl.parquet":
            raise KeyboardInterrupt
        write_table(path, columns)

    with monkeypatch.context() as patch:
        patch.setattr(drift, "write_table", killed)
        with pytest.raises(KeyboardInterrupt):
            drift.main(["--run", str(small_run.path)])
    measured.clear()
    drift.main(["--run", str(small_run.path)])
    assert measured == ["sft..sft-rl", "base..sft-rl"]


def test_what_changed_is_measured_again(small_run, measured):
    arguments = ["--run", str(small_run.path), "--batch-size", "2"]
    drift.main(arguments)

    measured.clear()
    save_checkpoint(small_run.checkpoint("sft"), seed=9, drift_by=0.1)
    before = sums(small_run, "base..sft", "l2")
    drift.main(arguments)
    assert measured == ["base..sft", "sft..sft-rl"]
    assert sums(small_run, "base..sft", "l2") != before

    measured.clear()
    (small_run.path / "drift" / "base..sft-rl.parquet").write_bytes(b"torn")
    drift.main(arguments)
    assert measured == ["base..sft-rl"]

    measured.clear()
    drift.main([*arguments, "--sequences", "2"])
    assert measured == ["base..sft", "sft..sft-rl", "base..sft-rl"]
    assert set(sums(small_run, "base..sft", "l2")) == {"one", "two"}


def test_a_manifest_cannot_say_what_is_deleted(tmp_path, small_run):
    command = ["--run", str(small_run.path)]
    drift.main([*command, "--sequences", "1"])
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").touch()
    entry = small_run.path / "drift" / "base..sft.parquet"
    planted = RunDir.open(small_run.path)
    planted.manifest["drift"]["pairs"]["base..sft"]["file"] = "../victim"
    planted.save()
    drift.main([*command, "--sequences", "2"])
    assert set(sums(small_run, "base..sft", "l2")) == {"one", "two"}
    assert entry.is_file()
    for name in ("../victim", "base../../victim", "base...victim"):
        run = RunDir.open(small_run.path)
        run.update(drift={**run.manifest["drift"], "pairs": {name: {}}})
        with pytest.raises(UserError, match=r"manifest\.json: '.*' cannot name a policy"):
            drift.main([*command, "--sequences", "1"])
    assert (tmp_path / "victim" / "file").exists()


def test_responses_are_cut_at_the_length_given(small_run):
    drift.measure_run(small_run, sequences=None, batch_size=2, max_length=8)
    assert {name: n for name, (n, *_) in sums(small_run, "base..sft", "l2").items()} == {"one": 3, "two": 1, "three": 4}
    with pytest.raises(UserError, match="1 of 3 prompts have 7 tokens or more"):
        drift.measure_run(small_run, sequences=None, batch_size=2, max_length=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": TEMPLATE + " "}, "tokenizer of sft differs from that of base .* chat templates are not the same"),
        ({"words": [*WORDS[:-1], "-"]}, "token '-' has id 25 instead of None"),
        ({"head_rows": len(WORDS) + 6}, r"base\.\.sft: .*26 rows \(a\) and 32 rows \(b\)"),
        ({"width": 32}, r"base\.\.sft: .*widths: 16 \(a\) and 32 \(b\)"),
        ({"drift_by": float("nan")}, "checkpoints/sft: .*states are not finite"),
    ],
)
def test_checkpoints_that_cannot_be_compared_are_named(small_run, change, message):
    save_checkpoint(small_run.checkpoint("sft"), **change)
    with pytest.raises(UserError, match=message):
        drift.main(["--run", str(small_run.path)])


def test_equal_vocabularies_that_split_text_otherwise_are_told_apart(small_run):
    file = small_run.checkpoint("sft") / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": "15"}, "content": "1 5"}
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="split example 'two' into different tokens"):
        drift.main(["--run", str(small_run.path)])


def test_incomplete_runs_are_named(tmp_path, small_run, checkpoints):
    shutil.rmtree(small_run.checkpoint("sft-rl"))
    with pytest.raises(UserError, match="checkpoints/sft-rl: no such checkpoint folder"):
        drift.main(["--run", str(small_run.path)])
    only_base = make_run(tmp_path / "only-base", checkpoints, policies=("base",))
    with pytest.raises(UserError, match="fewer than two policies"):
        drift.main(["--run", str(only_base.path)])
    (small_run.path / "data" / "validation.jsonl").write_text("")
    with pytest.raises(UserError, match=r"validation\.jsonl: no examples"):
        drift.main(["--run", str(small_run.path)])
    with pytest.raises(UserError, match="not a run directory"):
        drift.main(["--run", str(tmp_path)])


def test_any_two_checkpoints(tmp_path, checkpoints, small_run, measured, capsys):
    data = write_rows(tmp_path / "held-out.jsonl", answer=None)
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), "--max-length", "64"]
    command = ["--pair", str(checkpoints["base"]), str(checkpoints["sft"]), *arguments]
    assert drift.main(command) == 0
    assert str(tmp_path / "out" / "drift" / "a..b.parquet") in capsys.readouterr().out
    assert drift.main(command) == 0
    assert measured == ["a..b"]

    out = RunDir.open(tmp_path / "out")
    assert (out.manifest["kind"], out.manifest["status"]) == ("drift", "complete")
    assert [(node["label"], node["parent"]) for node in out.manifest["lineage"]] == [("base", None), ("sft", "a")]
    assert out.checkpoint("b") == checkpoints["sft"].resolve()
    assert out.manifest["data"]["validation"]["sha256"] == sha256_file(data)
    drift.measure_run(small_run, sequences=None, batch_size=8, max_length=64)
    assert sums(out, "a..b", "kl_new_old") == sums(small_run, "base..sft", "kl_new_old")

    with pytest.raises(UserError, match="holds something other than this pair"):
        drift.main(["--pair", str(checkpoints["base"]), str(checkpoints["direct-rl"]), *arguments])


def test_a_directory_that_another_process_holds_is_left_alone(tmp_path, checkpoints):
    data = write_rows(tmp_path / "held-out.jsonl")
    command = ["--pair", str(checkpoints["base"]), str(checkpoints["sft"]), "--data", str(data)]
    run = RunDir.create(tmp_path / "out", kind="drift", recipe={})
    before = (run.path / "manifest.json").read_bytes()
    with run.lock(), pytest.raises(UserError, match="another process is working on this run"):
        drift.main([*command, "--out", str(run.path)])
    assert (run.path / "manifest.json").read_bytes() == before


def test_no_bar_of_transformers_is_shown(small_run, capfd):
    logging.enable_progress_bar()
    drift.main(["--run", str(small_run.path), "--sequences", "1"])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--pair", "a", "b"],
        ["--run", "r", "--data", "d.jsonl"],
        ["--run", "r", "--pair", "a", "b"],
        ["--run", "r", "--sequences", "0"],
        ["--run", "r", "--batch-size", "two"],
    ],
)
def test_usage_errors_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        drift.main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_defines_every_metric(capsys):
    with pytest.raises(SystemExit):
        drift.main(["--help"])
    printed = capsys.readouterr().out
    assert all(metric in printed and text in printed for metric, text in drift.DEFINITIONS.items())
