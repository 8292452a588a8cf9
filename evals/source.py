"""Where the rows of a benchmark come from: a file under the data folder, or the Hub."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gift.cli import UserError
from gift.data import read_rows
from gift.models import first_line
from gift.records import read_table, sha256_file, sha256_json

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """A benchmark's rows in file order, what names a row in messages, and their origin as a manifest records it."""

    rows: Sequence[Row]
    names: Sequence[str]
    source: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A benchmark's file, relative to the data folder, and its Hub dataset.

    The file may as well be a .csv or .parquet file of the same name. `parts` names the parts of a dataset that is
    divided into several: `{part}` in `file` and `config` stands for each in turn, and a row says by "part" and "row"
    where it is from. `gated` says how to be let in by the authors of a dataset that is not open to all.
    """

    label: str
    file: str
    hub: str
    config: str | None
    split: str
    revision: str | None = None
    parts: tuple[str, ...] = ()
    gated: str = ""

    @property
    def origin(self) -> str:
        """Where `load` looks, for people."""
        return f"DATA_DIR/{self.file}, or {self.hub} ({self.split}) on the Hub"

    def load(self, data_dir: Path | None) -> Rows:
        """All rows of the file, or of the Hub dataset if `data_dir` is None.

        Raises UserError that says what to do where there are none.
        """
        found = self._hub_rows() if data_dir is None else self._file_rows(data_dir)
        if not found.rows:
            raise UserError(f"{found.source['name']}: no rows; get the {self.label} test set again (Hub: {self.hub})")
        return found

    def _file_rows(self, folder: Path) -> Rows:
        paths = [self._file(folder / self.file.replace("{part}", part)) for part in self.parts or [""]]
        read = [list(read_file(path)) for path in paths]
        # A row of a JSONL file is a line; where others are, an editor does not say.
        names = [
            f"{path}:{number}" if path.suffix == ".jsonl" else f"{path}, row {number}"
            for path, rows in zip(paths, read, strict=True)
            for number in range(1, len(rows) + 1)
        ]
        digests = [[path.name, sha256_file(path)] for path in paths]
        sha256 = sha256_json(digests) if self.parts else digests[0][1]
        rows = self._joined(read)
        return Rows(rows, names, {"name": self.file, "revision": None, "sha256": sha256, "rows": len(rows)})

    def _file(self, path: Path) -> Path:
        """The file at `path`, or of another kind beside it."""
        for candidate in (path, *(path.with_suffix(kind) for kind in READERS)):
            if candidate.is_file():
                return candidate
        raise UserError(f"{path}: no such file; put the {self.label} test set there (Hub: {self.hub}){self._gate}")

    def _joined(self, read: Sequence[Sequence[Row]]) -> list[Row]:
        """The rows of all parts, each with its part and its number there."""
        if not self.parts:
            return list(read[0])
        return [
            {**row, "part": part, "row": number}
            for part, rows in zip(self.parts, read, strict=True)
            for number, row in enumerate(rows, start=1)
        ]

    def _hub_rows(self) -> Rows:
        """Every row of the Hub dataset, and its source with the commit it was read at (None where that is unknown)."""
        instead = f"put its test set at DIR/{self.file} and give --data-dir DIR"
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{self.label}: reading {self.hub} from the Hub needs the `datasets` package:"
                f" pip install 'gift-suite[hub]', or {instead}"
            ) from None
        configs = [self.config.replace("{part}", part) if self.config else None for part in self.parts or [""]]
        try:
            loaded = [
                datasets.load_dataset(self.hub, config, split=self.split, revision=self.revision) for config in configs
            ]
        except Exception as error:  # the Hub's clients raise a dozen unrelated kinds here
            raise UserError(
                f"{self.label}: cannot read {self.hub} from the Hub ({first_line(error)}); {instead}{self._gate}"
            ) from error
        rows = self._joined([[dict(row) for row in dataset] for dataset in loaded])
        urls = [url for dataset in loaded for url in dataset.info.download_checksums or {}]
        commits = {match[1] for url in urls if (match := re.search(r"@(\w{40})/", url))}
        revision = commits.pop() if len(commits) == 1 else self.revision
        source = {"name": self.hub, "revision": revision, "sha256": sha256_json(rows), "rows": len(rows)}
        names = [
            f"{self.hub} ({config or self.split}), row {number}"
            for config, dataset in zip(configs if self.parts else [None], loaded, strict=True)
            for number in range(1, len(dataset) + 1)
        ]
        return Rows(rows, names, source)

    @property
    def _gate(self) -> str:
        return f"; {self.gated}" if self.gated else ""


def read_csv(path: Path) -> Iterator[Row]:
    """The rows of a CSV file with a header, its cells as text: commas or semicolons, UTF-8 or Mac Roman.

    Raises UserError naming the file and row of one that has not as many cells as the header.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("mac_roman")  # a spreadsheet saved on a Mac; every byte is a character there
    header = text.partition("\n")[0]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;", key=header.count), strict=True)
    number = 0
    try:
        columns = next(lines, [])
        for number, cells in enumerate(filter(None, lines), start=1):
            if len(cells) != len(columns):
                raise UserError(f"{path}, row {number}: {len(cells)} cells, but the header has {len(columns)}")
            yield dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, row {number + 1}: malformed: {error}") from None


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file. Raises UserError naming a damaged one."""
    columns = read_table(path)
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


READERS = {".jsonl": read_rows, ".csv": read_csv, ".parquet": read_parquet}


def read_file(path: Path) -> Iterable[Row]:
    """The rows of a file, by the ending of its name."""
    return READERS.get(path.suffix, read_rows)(path)


def check_ids(ids: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError where two rows have the same id."""
    first_with: dict[str, str] = {}
    for id_, name in zip(ids, names, strict=True):
        if first_with.setdefault(id_, name) != name:
            raise UserError(f"{name}: id {id_!r} is already that of {first_with[id_]}")


def present(row: Row, columns: Sequence[str]) -> str | None:
    """The first of `columns` that the row has."""
    return next((name for name in columns if name in row), None)


def column(row: Row, columns: Sequence[str], where: str) -> str:
    """The row's value in the first of `columns` it has, as text. Raises UserError naming `where` and the column."""
    name = present(row, columns)
    if name is None:
        raise UserError(f"{where}: no column {' or '.join(map(repr, columns))}; the row has: {', '.join(row)}")
    value = row[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: column {name!r} is neither text nor a whole number: {value!r:.60}")
    return value
