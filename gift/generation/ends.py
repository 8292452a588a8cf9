"""Where a response ends before its limit: stop strings and repetition, checked for a batch one token a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from gift.generation import RepetitionGuard

CONTEXT = 8  # tokens decoded before those that can belong to a stop string: a decoder alters the first of a text


class StopStrings:
    """Finds stop strings at the end of growing responses, decoding only their last tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = strings
        # A token that adds to a text adds at least a byte to it.
        self.reach = max(len(string.encode()) for string in strings) + CONTEXT

    def find(self, responses: Sequence[list[int]]) -> list[str | None]:
        """For each response, the stop string that its last token completed, the earliest in the text if several."""
        texts = self.tokenizer.decode(
            [ids[-self.reach :] for ids in responses], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return [self._first(text) for text in texts]

    def _first(self, text: str) -> str | None:
        ends = {text.find(string) + len(string): string for string in reversed(self.strings) if string in text}
        return ends[min(ends)] if ends else None


class Repetitions:
    """RepetitionGuard.fires for rows that grow by a token a step, at a cost that does not depend on the count.

    For each length of pattern, `run` counts how many of a row's last tokens equal the token that far before them: n
    copies of a pattern of `size` tokens are a run of (n - 1) * size.
    """

    def __init__(self, guard: RepetitionGuard) -> None:
        self.needed = (guard.count - 1) * np.arange(1, guard.max_pattern + 1)
        self.recent: NDArray[np.int64] = np.empty((0, guard.max_pattern), dtype=np.int64)  # the latest first
        self.run = np.zeros_like(self.recent)

    def add(self, rows: int) -> None:
        """New rows, still empty, behind the others."""
        self.recent = np.pad(self.recent, ((0, rows), (0, 0)), constant_values=-1)
        self.run = np.pad(self.run, ((0, rows), (0, 0)))

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order."""
        self.recent, self.run = self.recent[rows], self.run[rows]

    def step(self, first: int, tokens: Sequence[int]) -> list[bool]:
        """Whether the guard fires for the rows from `first` on after these tokens, one for each."""
        recent, run = self.recent[first:], self.run[first:]
        new = np.array(tokens)[:, None]
        run += 1
        run *= recent == new
        recent[:, 1:] = recent[:, :-1].copy()
        recent[:, :1] = new
        return list(map(bool, np.any(run >= self.needed, axis=1)))
