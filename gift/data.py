"""Prompt/response data: where it comes from, its three disjoint subsets, and its way into token batches."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gift.batches import Encoded
from gift.cli import UserError, nearest, progress
from gift.models import first_line, is_local
from gift.recipe import Data
from gift.records import sha256_json, write_text

FILES = (".jsonl", ".json", ".parquet")
ROLES = ("system", "user", "assistant")
TURNS = "prompt_turns"  # the column in which write_examples keeps the turns of a conversation
UNUSABLE = 0.01  # the share of a data set's rows that may be left out because they lack a text
DROPPED = 0.1  # the share of examples that may be left out because their prompts are too long
CHUNK = 256  # examples tokenized at once
DATE = "26 Jul 2024"  # the "today" of Llama 3's chat templates: their own default, where they would ask the clock


@dataclass(frozen=True)
class Example:
    """A problem with an expert's solution: what stage 1 imitates, stage 2 samples anew and evaluation grades."""

    id: str
    prompt: str
    response: str
    answer: str  # '' where the data have none
    turns: tuple[tuple[str, str], ...] = ()
    """Where the prompt is a conversation: its (role, content) pairs. `prompt` is then all of it as text, to read."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns an example is made of; `messages`, where given, holds prompt and response."""

    prompt: str = "prompt"
    response: str = "response"
    answer: str | None = "answer"  # None: every answer is ''
    messages: str | None = None
    unanswered: bool = False  # whether an answer may be '', as where `write_examples` wrote data without answers

    def required(self) -> list[str]:
        """Those that every row must have."""
        texts = [self.messages] if self.messages else [self.prompt, self.response]
        return texts if self.answer is None else [*texts, self.answer]

    def among(self, available: Sequence[str], where: str) -> list[str]:
        """The columns to read of those available. Raises UserError naming one that is not there."""
        for column in self.required():
            if column not in available:
                known = ", ".join(available) + "; without answers set data.answer=null" * (column == self.answer)
                raise UserError(f"{where}: no column {column!r}{nearest(column, available)}; it has: {known}")
        return [name for name in dict.fromkeys((*self.required(), "id", TURNS)) if name in available]


@dataclass(frozen=True)
class Loaded:
    """What a source held: its usable rows, the commit they are of (None outside the Hub), and rows left out."""

    examples: list[Example]
    revision: str | None = None
    unusable: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_examples(data: Data) -> Loaded:
    """The examples of a recipe's source: a .jsonl or .parquet file, or a data set's folder or Hub repository.

    Every row needs a prompt, a response and (unless `data.answer` is None) an answer that are text. In a file, a row
    that lacks one is an error, which names it; a data set cannot be mended here, so up to 1% of such rows are left out.
    Raises UserError saying what to do where the source, its split or a column is not to be had. 'nano' is no source of
    this function: gift.nano makes those problems.
    """
    columns = Columns(data.prompt, data.response, data.answer, data.messages)
    path = Path(data.source).expanduser()
    if path.suffix in FILES or path.is_file():
        return Loaded(read_file(path, columns))
    if not is_local(data.source):
        return read_dataset(data.source, hub_revision(data.source, data.revision), data, columns)
    if not path.is_dir():
        raise UserError(f"{path}: no such data folder")
    return read_dataset(str(path), None, data, columns)


def read_examples(path: Path, *, answer: str | None = "answer") -> list[Example]:
    """Examples that `write_examples` wrote, or of a file with the same columns; rows without an `id` are numbered.

    An answer may be '', and is, where `answer`, its column, is None. Raises UserError naming the file, and the row and
    column where a value is missing or not text.
    """
    return read_file(path, Columns(answer=answer, unanswered=True))


def read_file(path: Path, columns: Columns) -> list[Example]:
    """The examples of a JSONL or Parquet file with these columns. Errors: see `read_examples`."""
    if not path.exists():
        raise UserError(f"{path}: no such data file")
    if path.suffix not in FILES:
        raise UserError(f"{path}: unknown kind of data file; use .jsonl or .parquet")
    rows = read_parquet(path, columns) if path.suffix == ".parquet" else read_rows(path)
    # Without the folder: an id enters seeds and hashes, which must not depend on where the file lies.
    return [to_example(row, f"{path}:{n}", f"{path.stem}-{n}", columns) for n, row in enumerate(rows, start=1)]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. Raises UserError naming the file and line of one that cannot be read."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: malformed row: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: malformed row: expected a JSON object, got {type(row).__name__}")
            yield row


def read_parquet(path: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, with no more columns than needed. Raises UserError naming a damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024, columns=columns.among(file.schema_arrow.names, str(path))):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {first_line(error)}") from None


def read_dataset(source: str, revision: str | None, data: Data, columns: Columns) -> Loaded:
    """One split of a data set, by the `datasets` library, from the Hub or a folder. Errors: see `load_examples`."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: needs the datasets package; pip install 'gift-suite[hub]'") from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(source, data.config, split=data.split, revision=revision)
    except Exception as error:  # the library raises a dozen unrelated kinds
        why = f"{first_line(error).rstrip('.')}; {remedy(error)}"
        raise UserError(f"{source}: cannot load this data set: {why}") from error
    table = table.select_columns(columns.among(table.column_names, source))
    name = Path(source).name
    examples: list[Example] = []
    errors: list[UserError] = []
    with progress(len(table), f"reading {name}", unit="row") as bar:
        for number, row in enumerate(table, start=1):
            try:
                examples.append(to_example(row, f"{source}:{number}", f"{name}-{number}", columns))
            except UserError as error:
                errors.append(error)
            bar.update()
    if len(errors) > UNUSABLE * len(table):
        raise UserError(f"{errors[0]} (and {len(errors) - 1} more of {len(table)} rows are of no use)")
    return Loaded(examples, revision, len(errors))


def hub_revision(source: str, revision: str | None) -> str | None:
    """The commit that a Hub data set's revision (its newest, where None) means now; as given if the Hub is away."""
    from huggingface_hub import HfApi

    try:
        commit: str | None = HfApi().dataset_info(source, revision=revision, timeout=10).sha
    except Exception:  # offline, absent, gated: loading it will say so, or find a copy on this machine
        return revision
    return commit


def remedy(error: Exception) -> str:
    """What to do about an error of `datasets.load_dataset`."""
    if isinstance(error, ConnectionError):
        return "download it where the Hub can be reached, and give its folder or a .parquet file as data.source"
    if "gated" in str(error):
        return "accept its terms on its page and log in with `hf auth login`"
    if configs := str(error).partition("available configs: ")[2]:
        return f"set data.config to one of {configs.splitlines()[0]}"
    return "check data.source, data.config, data.split and data.revision, or give a .jsonl or .parquet file"


def to_example(row: Mapping[str, Any], where: str, name: str, columns: Columns) -> Example:
    """An Example from a row's columns; `name` is its id where it has none. Raises UserError naming `where` and why."""
    columns.among(list(row), where)

    def text(column: str) -> str:
        return checked_text(row[column], f"{where}: column {column!r}")

    if columns.messages is None:
        prompt, response = text(columns.prompt), text(columns.response)
        turns = to_turns(row[TURNS], f"{where}: column {TURNS!r}") if row.get(TURNS) else []
    else:
        prompt, turns, response = split_messages(row[columns.messages], f"{where}: column {columns.messages!r}")
    own_id, column = row.get("id"), columns.answer
    answer = "" if column is None or (columns.unanswered and row[column] == "") else text(column)
    return Example(name if own_id is None else str(own_id), prompt, response, answer, tuple(turns))


def checked_text(value: Any, what: str) -> str:
    """`value`, which must be text with something in it. Raises UserError naming `what`."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what} is not text: {value!r:.60}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{what} has half of a surrogate pair, which is not Unicode text")
    return value


def split_messages(value: Any, what: str) -> tuple[str, list[tuple[str, str]], str]:
    """Prompt, its turns (none where it is one user message) and response, of a column of chat messages."""
    turns = to_turns(value, what)
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        raise UserError(f"{what}: its last two messages must be the user's and then the assistant's")
    *prompt, (_, response) = turns
    if len(prompt) == 1:
        return prompt[0][1], [], response
    return "\n\n".join(f"{role}: {content}" for role, content in prompt), prompt, response


def to_turns(value: Any, what: str) -> list[tuple[str, str]]:
    """(role, content) pairs of chat messages. Raises UserError naming the message and what is wrong with it."""
    if not isinstance(value, list):
        raise UserError(f"{what} is not a list of messages: {value!r:.60}")
    turns = []
    for number, message in enumerate(value, start=1):
        place = f"{what}: message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UserError(f"{place} is not an object with role and content: {message!r:.60}")
        if message["role"] not in ROLES:
            raise UserError(f"{place}: the role {message['role']!r} is not one of {', '.join(ROLES)}")
        turns.append((message["role"], checked_text(message["content"], f"{place}: its content")))
    return turns


def as_row(example: Example) -> dict[str, Any]:
    """An example as the object that a file keeps of it."""
    row = asdict(example)
    if turns := row.pop("turns"):
        row[TURNS] = [{"role": role, "content": content} for role, content in turns]
    return row


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Writes examples as JSONL, atomically; `read_examples` reads them back."""
    write_text(path, "".join(json.dumps(as_row(example), ensure_ascii=False) + "\n" for example in examples))


def fingerprint(examples: Sequence[Example]) -> str:
    """Hex SHA-256 of the examples' content, in order."""
    return sha256_json([as_row(example) for example in examples])


# ---------------------------------------------------------------------------------------------------------------------
# Subsets


def split(examples: Sequence[Example], sizes: Mapping[str, int], seed: int) -> dict[str, list[Example]]:
    """Disjoint random subsets of the given sizes. Of examples with the same prompt, the first is used.

    Raises UserError if there are too few distinct prompts, or if two of them share an id.
    """
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(normalize(example.prompt), example)
    distinct = list(first.values())
    by_id: dict[str, Example] = {}
    for example in distinct:  # an id seeds the samples of its prompt, and names them in the logs
        if by_id.setdefault(example.id, example) is not example:
            raise UserError(f"two prompts of the data share the id {example.id!r}; make ids unique, or leave them out")
    wanted = sum(sizes.values())
    if len(distinct) < wanted:
        raise UserError(f"the data has {len(distinct)} distinct prompts, but {wanted} are asked for ({dict(sizes)})")
    random.Random(seed).shuffle(distinct)
    rest = iter(distinct)
    return {name: list(itertools.islice(rest, size)) for name, size in sizes.items()}


def normalize(prompt: str) -> str:
    """A prompt up to case and white space: what counts as the same problem."""
    return " ".join(prompt.lower().split())


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@dataclass(frozen=True)
class Truncation:
    """What `max_length` took: of `rows` examples, `cut` ones lost `tokens_lost` tokens (end tokens included) on their
    right, and `dropped` ones went altogether, because their prompts leave no room for a response."""

    max_length: int
    rows: int
    cut: int = 0
    tokens_lost: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        return (
            f"{self.cut} of {self.rows} examples cut at {self.max_length} tokens ({self.tokens_lost} tokens lost),"
            f" {self.dropped} left out for their long prompts"
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Example) -> list[int]:
    """Token ids of a prompt and the assistant's header, by the tokenizer's chat template (the bare text if none).

    `prompt` is a user turn or an example. Raises UserError where it is a conversation that the template refuses.
    """
    text = prompt_text(tokenizer, prompt)
    return list(tokenizer.encode(text, add_special_tokens=tokenizer.chat_template is None))


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str | Example) -> str:
    """What `encode_prompt` tokenizes. A chat template writes the begin token itself, so none is added to its text.

    Templates come with checkpoints; transformers runs them in Jinja's immutable sandbox.
    """
    text, turns = (prompt.prompt, prompt.turns) if isinstance(prompt, Example) else (prompt, ())
    name = prompt.id if isinstance(prompt, Example) else repr(f"{prompt:.40}")
    if tokenizer.chat_template is None:
        if turns:
            raise UserError(f"{name}: a conversation, but the tokenizer has no chat template; set data.template")
        return text
    messages = [{"role": role, "content": content} for role, content in turns or [("user", text)]]
    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, date_string=DATE)
    except TemplateError as error:
        raise UserError(f"{name}: the chat template refuses this prompt: {first_line(error)}") from error
    assert isinstance(rendered, str)
    return rendered


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> Encoded:
    """Prompt, then response and end token, tokenized apart and joined as verl does; cut on the right at `max_length`.

    Raises UserError if the prompt alone leaves no room for a response.
    """
    prompt = encode_prompt(tokenizer, example)
    if len(prompt) >= max_length:
        raise UserError(f"{example.id}: the prompt has {len(prompt)} tokens, max_length is {max_length}")
    response = tokenizer.encode(example.response, add_special_tokens=False)
    return joined(example.id, prompt, [*response, tokenizer.eos_token_id], max_length)


def joined(name: str, prompt: Sequence[int], response: Sequence[int], max_length: int) -> Encoded:
    """Prompt and response as one example, cut on the right."""
    ids = (*prompt, *response)
    return Encoded(name, ids[:max_length], len(prompt), truncated=len(ids) > max_length)


def encode_all(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> tuple[list[Encoded], Truncation]:
    """Every example as `encode` makes it, many at a time, and what `max_length` took from them.

    A response that was cut has no end token. An example whose prompt leaves no room for a response is left out; raises
    UserError if those are more than 10%.
    """
    encoded: list[Encoded] = []
    tokens = 0
    known: dict[int, int] = {}  # one int object per token id instead of one per token: a quarter of the memory

    def tokenized(texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        batch = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False)["input_ids"]
        return [[known.setdefault(token, token) for token in ids] for ids in batch]

    with progress(len(examples), "tokenizing", unit="example") as bar:
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            prompts = tokenized([prompt_text(tokenizer, e) for e in chunk], tokenizer.chat_template is None)
            responses = tokenized([example.response for example in chunk], False)
            for example, prompt, response in zip(chunk, prompts, responses, strict=True):
                if len(prompt) < max_length:
                    tokens += len(prompt) + len(response) + 1
                    encoded.append(joined(example.id, prompt, [*response, tokenizer.eos_token_id], max_length))
            bar.update(len(chunk))
    cut = sum(example.truncated for example in encoded)
    lost = tokens - sum(len(example.ids) for example in encoded)
    taken = Truncation(max_length, len(examples), cut, lost, dropped=len(examples) - len(encoded))
    if taken.dropped > DROPPED * taken.rows:
        raise UserError(
            f"data.max_length: {taken.dropped} of {taken.rows} prompts have {max_length} tokens or more and leave no"
            " room for a response; raise it, or leave these examples out of the data"
        )
    return encoded, taken
