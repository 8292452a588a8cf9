"""What a model is told before it answers: an item's prompt, after the turns that come before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evals.tasks import Item, Message
from gift.cli import UserError
from gift.samples import SAMPLE_KEY


class Conversations:
    """The conversations of a task's items, which go on from the completions that the log has."""

    def __init__(self, items: Iterable[Item], system: str | None, rows: Iterable[Mapping[str, Any]]) -> None:
        self.items = {item.id: item for item in items}
        self.system = system
        self.continued = {item.after for item in self.items.values()}
        self.completions: dict[tuple[Any, ...], str] = {}
        self.note(rows)

    def note(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes notice of those completions in these rows of the log that another item goes on from."""
        for row in rows:
            if row["item"] in self.continued:
                self.completions[tuple(row[name] for name in SAMPLE_KEY)] = row["completion"]

    def messages(self, item: Item, run: int, sample: int) -> tuple[Message, ...]:
        """All turns up to and with the item's prompt; an earlier turn was answered in the same run and sample.

        Raises UserError where it was not.
        """
        if item.after is None:
            before: tuple[Message, ...] = ({"role": "system", "content": self.system},) if self.system else ()
        else:
            answer = self.completions.get((item.after, run, sample))
            if answer is None:
                raise UserError(
                    f"item {item.id!r}: nothing is recorded of {item.after!r}, whose conversation it continues"
                    f" (run {run}, sample {sample}); generate that first"
                )
            earlier = self.messages(self.items[item.after], run, sample)
            before = (*earlier, {"role": "assistant", "content": answer})
        return (*before, {"role": "user", "content": item.prompt})


def rounds(items: Sequence[Item]) -> list[list[Item]]:
    """The items by how many turns come before theirs: each round can be sampled once the one before it is."""
    by_id = {item.id: item for item in items}

    def depth(item: Item) -> int:
        return 0 if item.after is None else 1 + depth(by_id[item.after])

    depths = [depth(item) for item in items]
    return [
        [item for item, its in zip(items, depths, strict=True) if its == turn]
        for turn in range(max(depths, default=-1) + 1)
    ]
