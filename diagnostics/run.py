"""python -m diagnostics.run: how far each policy of a run, or any two checkpoints, drifted apart.

For every pair (earlier, later) of the lineage the two models read the same held-out expert responses (teacher-forced),
and every metric is taken at every response token, end token included. A pair's file holds per sequence the number of
tokens, the sum and the sum of squares of each metric, which is what clustered intervals are rebuilt from.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diagnostics import distribution, representation
from diagnostics.states import States, collect, encode_alike
from evals.stats import clustered_mean
from gift.batches import Encoded
from gift.cli import UserError, positive, progress, run_command, say
from gift.data import Example, fingerprint, read_examples
from gift.models import (
    DTYPES,
    check_checkpoint,
    device,
    lm_head,
    load_config,
    load_model,
    logit_map,
    quiet_transformers,
)
from gift.records import RunDir, read_table, sha256_file, sha256_json, sha256_weights, utc_now, write_table

SLAB_TOKENS = 16384  # tokens between two updates of the progress bar

DEFINITIONS: dict[str, str] = {
    "cos": "cosine similarity of the two post-final-norm states that predict a token",
    "l2": "Euclidean distance of the two post-final-norm states, in the units of the states",
    "l2_rel": "Euclidean distance of the two states over the norm of the earlier one",
    "kl_new_old": "KL(later || earlier) of the next-token distributions at temperature 1, nats per token",
    "kl_old_new": "KL(earlier || later) of the next-token distributions at temperature 1, nats per token",
    "js": "Jensen-Shannon divergence of the next-token distributions, nats per token, at most log 2",
    "tv": "total variation distance of the next-token distributions, in [0, 1]",
    **{
        f"topk_overlap_{k}": f"share of the earlier model's {k} likeliest next tokens also among the later model's {k}"
        for k in distribution.TOP_K
    },
    "nll_a": "surprisal of the expert's token under the earlier model, nats",
    "nll_b": "surprisal of the expert's token under the later model, nats",
    "entropy_a": "entropy of the earlier model's next-token distribution, nats",
    "entropy_b": "entropy of the later model's next-token distribution, nats",
}
DIRECTION_NOTE = "The paper states no direction for its KL; both are measured, KL(new||old) is that of its Eq. 2-3."

Pair = tuple[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure_run(
    run: RunDir, *, sequences: int | None, batch_size: int, max_length: int, dtype: str = "float32"
) -> None:
    """Measures every lineage pair of a run on the first `sequences` (None: all) of its data/validation.jsonl.

    Sequences are cut at `max_length` tokens and read `batch_size` at a time; models run in `dtype`. Writes
    drift/<a>..<b>.parquet and the manifest's entry `drift`. A pair already measured on the same tokens with the same
    weights is kept. Raises UserError for a run with one policy, for missing or damaged checkpoints, and where two
    checkpoints differ in tokenizer, chat template, vocabulary or width.
    """
    examples = held_out(run.path / "data" / "validation.jsonl", sequences)
    measure(run, examples, batch_size=batch_size, max_length=max_length, dtype=dtype)


def measure(run: RunDir, examples: Sequence[Example], *, batch_size: int, max_length: int, dtype: str) -> None:
    """What `measure_run` does, on any examples."""
    pairs = lineage_pairs(run)
    if not pairs:
        raise UserError(f"{run.path}: this run has fewer than two policies, so there is no drift to measure")
    checkpoints = {policy: run.checkpoint(policy) for pair in pairs for policy in pair}
    for path in checkpoints.values():
        check_checkpoint(path)
    encoded = encode_alike(checkpoints, examples, max_length)
    weights = {policy: sha256_weights(path) for policy, path in checkpoints.items()}
    open_ledger(
        run,
        {
            "definitions": DEFINITIONS,
            "sequences": len(encoded),
            "tokens": sum(len(example.ids) - example.prompt_length for example in encoded),
            "data_sha256": fingerprint(examples),
            "encoded_sha256": sha256_json([asdict(example) for example in encoded]),
            "max_length": max_length,
            "dtype": dtype,
        },
    )
    missing = [pair for pair in pairs if not is_measured(run, pair, weights)]
    if len(missing) < len(pairs):
        say(f"{len(pairs) - len(missing)} of {len(pairs)} pairs are already measured")
    sides: dict[str, Side] = {}
    for done, (a, b) in enumerate(missing):
        for policy in (a, b):
            if policy not in sides:
                say(f"states of {policy} ({checkpoints[policy]})")
                sides[policy] = load_side(checkpoints[policy], encoded, batch_size, dtype)
        measure_pair(run, (a, b), sides, weights)
        still_needed = {policy for pair in missing[done + 1 :] for policy in pair}
        sides = {policy: side for policy, side in sides.items() if policy in still_needed}


@dataclass(frozen=True)
class Side:
    """One checkpoint's part of a comparison: its states, and its LM head on the compute device."""

    states: States
    weight: torch.Tensor
    bias: torch.Tensor | None


def load_side(checkpoint: Path, encoded: Sequence[Encoded], batch_size: int, dtype: str) -> Side:
    """States and LM head of a checkpoint; the rest of the model is freed on return."""
    model = load_model(checkpoint, dtype=dtype).to(device())
    try:
        states = collect(model, encoded, batch_size=batch_size)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    if logit_map(model):
        raise UserError(f"{checkpoint}: drift of models that change logits after the LM head cannot be measured yet")
    weight, bias = lm_head(model)
    return Side(states, weight.detach(), None if bias is None else bias.detach())


def measure_pair(run: RunDir, pair: Pair, sides: Mapping[str, Side], weights: Mapping[str, str]) -> None:
    """Measures one pair, writes its file and enters it in the manifest."""
    a, b = pair
    try:
        columns = per_sequence(sides[a], sides[b], description=f"{a}..{b}")
    except UserError as error:
        raise UserError(f"{run.path}: {a}..{b}: {error}") from None
    file = pair_file(run, f"{a}..{b}")
    write_table(file, columns)
    entry = {
        "weights_sha256": [weights[a], weights[b]],
        "file": file.relative_to(run.path).as_posix(),
        "sha256": sha256_file(file),
    }
    drift = run.manifest["drift"]
    run.update(drift={**drift, "pairs": {**drift["pairs"], f"{a}..{b}": entry}})


def per_sequence(a: Side, b: Side, *, description: str) -> dict[str, list[Any]]:
    """Every metric, summed over each sequence's tokens: columns metric, sequence, n, sum and sum_sq."""
    labels, sequence, ids = a.states.labels, a.states.sequence.numpy(), a.states.ids
    sums: dict[str, np.ndarray] = {}
    with progress(len(labels), description, unit="tok") as bar:
        for start in range(0, len(labels), SLAB_TOKENS):
            rows = slice(start, start + SLAB_TOKENS)
            hidden_a, hidden_b = a.states.hidden[rows], b.states.hidden[rows]
            values = representation.compare(hidden_a, hidden_b) | distribution.compare(
                hidden_a, a.weight, hidden_b, b.weight, labels[rows], bias_a=a.bias, bias_b=b.bias
            )
            for metric, value in values.items():
                per_token = value.numpy()
                totals = sums.setdefault(metric, np.zeros((2, len(ids))))
                for total, summand in zip(totals, (per_token, per_token**2), strict=True):
                    total += np.bincount(sequence[rows], weights=summand, minlength=len(ids))
            bar.update(len(labels[rows]))
    tokens = np.bincount(sequence, minlength=len(ids)).tolist()
    return {
        "metric": [metric for metric in sums for _ in ids],
        "sequence": ids * len(sums),
        "n": tokens * len(sums),
        "sum": [value for totals in sums.values() for value in totals[0].tolist()],
        "sum_sq": [value for totals in sums.values() for value in totals[1].tolist()],
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is measured, and what is already there


def lineage_pairs(run: RunDir) -> list[Pair]:
    """(earlier, later) for every policy and its parent, and for every RL policy and the root it comes from."""
    pairs = []
    for node in run.manifest["lineage"]:
        if node["parent"] is None:
            continue
        pairs.append((node["parent"], node["id"]))
        root = run.node(node["parent"])
        while root["parent"] is not None:
            root = run.node(root["parent"])
        if node["stage"] == "rl" and root["id"] != node["parent"]:
            pairs.append((root["id"], node["id"]))
    return pairs


def held_out(path: Path, sequences: int | None, *, answer: str = "answer") -> list[Example]:
    """The first `sequences` examples (None: all) of a file. Raises UserError if it has none or cannot be read."""
    if sequences is not None and sequences < 1:
        raise UserError(f"the number of sequences is {sequences}; give at least 1")
    examples = read_examples(path, answer=answer)[:sequences]
    if not examples:
        raise UserError(f"{path}: no examples in this file; drift needs held-out prompts and responses")
    return examples


def open_ledger(run: RunDir, conditions: Mapping[str, Any]) -> None:
    """Makes the manifest's entry `drift` one of these conditions; pairs measured under others are deleted."""
    drift = run.manifest["drift"]
    if all(drift.get(name) == value for name, value in conditions.items()):
        return
    for file in [pair_file(run, pair) for pair in drift.get("pairs", {})]:
        file.unlink(missing_ok=True)
    run.update(drift={**conditions, "pairs": {}})


def pair_file(run: RunDir, pair: str) -> Path:
    """The file of a pair '<a>..<b>'. Raises UserError for an id that would lead out of the folder drift.

    The manifest's `file` is for other readers: a manifest from elsewhere must not say what is overwritten or deleted.
    """
    for policy in pair.split("..", maxsplit=1):
        if "/" in policy or policy.startswith("."):
            raise UserError(f"{run.path / 'manifest.json'}: {policy!r} cannot name a policy: no '/', no leading '.'")
    return run.path / "drift" / f"{pair}.parquet"


def is_measured(run: RunDir, pair: Pair, weights: Mapping[str, str]) -> bool:
    """Whether the pair's file is there, undamaged, and of these weights."""
    name = "..".join(pair)
    path, entry = pair_file(run, name), run.manifest["drift"]["pairs"].get(name)
    if entry is None or entry["weights_sha256"] != [weights[policy] for policy in pair]:
        return False
    return path.is_file() and sha256_file(path) == entry["sha256"]


# ---------------------------------------------------------------------------------------------------------------------
# Summary


def summary(run: RunDir) -> str:
    """The measured pairs as a table: mean over tokens, plus or minus half the 95% interval clustered by sequence."""
    drift = run.manifest["drift"]
    rows: list[list[str]] = []
    columns = ["cos", "l2", "kl_new_old", "kl_old_new"]
    for pair in drift["pairs"]:
        table = read_table(pair_file(run, pair))
        if not rows:
            columns.append(nearest_overlap(table["metric"]))
        rows.append([pair, *(show_mean(table, metric) for metric in columns)])
    titles = ["pair", "cos", "L2", "KL(new||old)", "KL(old||new)", f"top-{columns[-1].rpartition('_')[2]} overlap"]
    widths = [max(map(len, cells)) for cells in zip(titles, *rows, strict=True)]
    lines = [
        f"Drift on {drift['sequences']} held-out sequences, {drift['tokens']} response tokens:"
        " mean over tokens ± half the 95% interval, clustered by sequence",
        "",
        *("  ".join(map(str.ljust, row, widths)).rstrip() for row in [titles, *rows]),
        "",
        *(f"{title}: {DEFINITIONS[metric]}" for title, metric in zip(titles[1:], columns, strict=True)),
        DIRECTION_NOTE,
        "",
        f"wrote {run.path / 'manifest.json'} (entry drift: these and all other definitions)",
        *(f"wrote {pair_file(run, pair)}" for pair in drift["pairs"]),
    ]
    return "\n".join(lines)


def nearest_overlap(metrics: Iterable[str]) -> str:
    """The overlap metric whose K is nearest to 10: small vocabularies lack the larger ones."""
    overlaps = {metric for metric in metrics if metric.startswith("topk_overlap_")}
    return min(overlaps, key=lambda metric: abs(int(metric.rpartition("_")[2]) - 10))


def show_mean(table: Mapping[str, Sequence[Any]], metric: str) -> str:
    """A metric's mean with its interval from the columns of a pair's file."""
    chosen = np.array([name == metric for name in table["metric"]])
    interval = clustered_mean(np.array(table["n"])[chosen], np.array(table["sum"])[chosen])
    return f"{interval.estimate:.4g} ± {(interval.high - interval.low) / 2:.1g}"


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv: list[str]) -> int:
    """The command line; see --help."""
    arguments = parse(argv)
    quiet_transformers()
    sequences, max_length = arguments.sequences, arguments.max_length
    settings = {"batch_size": arguments.batch_size, "dtype": arguments.dtype}
    if arguments.run is not None:
        run = RunDir.open(arguments.run)
        with run.lock():
            before = run.manifest["drift"]
            sequences, max_length = sequences or before.get("sequences"), max_length or before.get("max_length")
            examples = held_out(run.path / "data" / "validation.jsonl", sequences)
            measure(run, examples, max_length=max_length or context_length(run), **settings)
    else:
        examples = held_out(arguments.data, sequences, answer="response")  # drift needs no answer, so any text will do
        with opened_pair(arguments.pair, arguments.data, len(examples), arguments.out) as run:
            measure(run, examples, max_length=max_length or context_length(run), **settings)
            run.update(status="complete", finished=utc_now())
    print(summary(run))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command's arguments. Exits with a usage message if they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m diagnostics.run",
        description="Measures how far checkpoints drifted apart on held-out expert responses: base -> init, init -> RL"
        " and base -> RL for every policy of a run, or any two checkpoints. Start it again to go on after a kill.",
        epilog="metrics, each a mean over response tokens:\n"
        + "\n".join(f"  {metric:<17} {text}" for metric, text in DEFINITIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="run directory whose lineage is measured")
    what.add_argument(
        "--pair", type=Path, nargs=2, metavar=("CKPT_A", "CKPT_B"), help="two checkpoint folders, the earlier one first"
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="with --pair: JSONL or Parquet with columns prompt and response")
    add("--out", type=Path, metavar="DIR", help="with --pair: run directory to write (default: runs/drift-<a>-<b>)")
    add("--sequences", type=positive, metavar="N", help="use the first N (default: as measured before, else all)")
    add(
        "--max-length",
        type=positive,
        metavar="N",
        help="cut prompt plus response at N tokens (default: as measured before, else the models' context length)",
    )
    add("--batch-size", type=positive, default=8, metavar="B", help="sequences per forward pass (default: 8)")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="precision of the forward passes (default: float32)")
    arguments = parser.parse_args(argv)
    if arguments.pair and not arguments.data:
        parser.error("--pair needs --data FILE, the held-out prompts and responses to compare on")
    if arguments.run and (arguments.data or arguments.out):
        parser.error("--data and --out go with --pair; a run brings its own data and keeps its own results")
    return arguments


@contextmanager
def opened_pair(pair: Sequence[Path], data: Path, rows: int, out: Path | None) -> Iterator[RunDir]:
    """Yields the run directory, of kind 'drift', for two checkpoints, held for this process.

    It is made now, or found as an earlier start left it. Raises UserError if a checkpoint is unusable, if another
    process is working on the directory, or if that belongs to something else.
    """
    paths = {"a": pair[0].resolve(), "b": pair[1].resolve()}
    for path in paths.values():
        check_checkpoint(path)
    out = out or Path("runs") / f"drift-{paths['a'].name}-{paths['b'].name}"
    lineage = [
        {
            "id": policy,
            "label": path.name,
            "parent": parent,
            "stage": stage,
            "method": None,
            "checkpoint": str(path),
            "weights_sha256": sha256_weights(path),
        }
        for (policy, path), parent, stage in zip(paths.items(), (None, "a"), ("base", "init"), strict=True)
    ]
    source = {"name": str(data), "revision": None, "sha256": sha256_file(data), "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    with RunDir(out, {}).lock():
        if (out / "manifest.json").exists():
            run = RunDir.open(out)
            held = {node["id"]: Path(node["checkpoint"]) for node in run.manifest["lineage"]}
            if run.manifest["kind"] != "drift" or held not in ({}, paths):
                raise UserError(f"{out}: this directory holds something other than this pair; give another with --out")
        else:
            run = RunDir.create(out, kind="drift", recipe={})
        run.update(lineage=lineage, data={"validation": source}, status="running", finished=None)
        yield run


def context_length(run: RunDir) -> int:
    """The longest sequence that every policy's model can read, in tokens."""
    checkpoints = [run.checkpoint(node["id"]) for node in run.manifest["lineage"]]
    for path in checkpoints:
        check_checkpoint(path)
    return min(load_config(path).max_position_embeddings for path in checkpoints)


if __name__ == "__main__":
    run_command(main)
