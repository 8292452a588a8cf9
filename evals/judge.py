"""A language model as judge: asks any OpenAI-compatible chat endpoint for ratings of 1 to 10, and reads its replies.

A request that fails in passing (no connection, a timeout, HTTP 408, 409, 425, 429 or 5xx, a reply that is no
completion) is sent again after a pause that doubles each time, or that the server names. A reply without a rating is
asked for again at a temperature above zero, then stands as an 'error' with the reply in the verdict's note. A request
that keeps failing gives no verdict at all: its answer stays to be graded by the next command.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import random
import re
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from gift.cli import UserError
from gift.generation import GenerationError
from gift.generation.client import Calls, Client, RefusedRequestError, in_parallel, one_line
from gift.rewards import Verdict

JUDGE_VERSION = "evals.judge 1"  # raised whenever a rating can change: those of different versions are not comparable

AGAIN_TEMPERATURE = 0.3  # at least, where a reply without a rating is asked for again: at 0 it would be the same one
LONGEST_PAUSE_S = 60.0  # between two tries
LONGEST_RETRY_AFTER_S = 300.0  # a server that asks for more is out of service, or out of quota, for today
MAX_REPLY_BYTES = 4 << 20
NOTE_CHARS = 4000
CHARS_PER_TOKEN = 3  # for servers that do not say what a request used; few texts have less
PASSING = {408, 409, 425, 429}  # and all from 500
OF_THE_PROMPT = {400, 413, 422}  # too long, or against the provider's policy
TRIAL = ({"role": "user", "content": "Reply with these two words only: Rating: [[5]]"},)
TRIAL_TRIES = 3
LEAST_KEY_CHARS = 8  # of a key's beginning that give it away


class Key:
    """An API key that is neither printed nor serialised by accident, and knows how to take itself out of a text.

    Raises UserError, without the key, for what cannot be sent in a header.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.strip()
        if not re.fullmatch(r"[!-~]*", self._secret):
            raise UserError("GIFT_JUDGE_KEY: a key has no spaces, line breaks or letters outside ASCII; set it again")

    def headers(self) -> dict[str, str]:
        """What a request shows the server; nothing for an empty key."""
        return {"Authorization": f"Bearer {self._secret}"} if self._secret else {}

    def redact(self, text: str) -> str:
        """The text, in which a server may have quoted the key, without it, also where the quotation was cut short."""
        if not self._secret:
            return text
        for end in range(len(self._secret), min(len(self._secret), LEAST_KEY_CHARS) - 1, -1):
            text = text.replace(self._secret[:end], "[key]")
        return text

    def __repr__(self) -> str:
        return "Key(...)"


class BudgetSpentError(Exception):
    """No further request may be sent."""


class Budget:
    """How many requests may be sent and how many tokens they may use (None: any number), and what was. Thread-safe.

    No request begins past either limit; those under way then may still add tokens.
    """

    def __init__(self, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = 0
        self._lock = threading.Lock()

    def take(self) -> None:
        """Counts a request that is about to be sent. Raises BudgetSpentError where there is no more."""
        with self._lock:
            if (self.max_requests is not None and self.requests >= self.max_requests) or (
                self.max_tokens is not None and self.tokens >= self.max_tokens
            ):
                raise BudgetSpentError
            self.requests += 1

    def use(self, tokens: int) -> None:
        """Counts the tokens of a request that was answered."""
        with self._lock:
            self.tokens += tokens

    def __str__(self) -> str:
        limits = {"requests": (self.requests, self.max_requests), "tokens": (self.tokens, self.max_tokens)}
        return ", ".join(f"{used} of {most} {unit}" for unit, (used, most) in limits.items() if most is not None)


@dataclass(frozen=True)
class JudgePrompt:
    """What the judge is told and asked of one answer; `name` is the prompt's, for the verdict."""

    name: str
    system: str
    user: str


@dataclass(frozen=True)
class Unanswered:
    """Why there is no verdict: the budget is spent, or the request failed every time."""

    why: str
    spent: bool = False


@dataclass(frozen=True)
class Judge:
    """A judge and how it is asked. Raises UserError for an unusable url.

    `url` is the base url that OpenAI's client takes, such as https://api.openai.com/v1; /v1 is added where it has no
    path. `temperature` and `max_tokens` are fschat's. `asks` is how often one rating is asked for until the reply has
    one, `tries` how often one request is sent until it is answered, with pauses from `pause_s` seconds on. `timeout_s`
    bounds each reply. The budget is this object's: it covers all that is graded by it.
    """

    url: str
    model: str
    key: Key = field(default=Key(""), compare=False)
    temperature: float = 0.0
    max_tokens: int = 2048
    concurrency: int = 8
    asks: int = 3
    tries: int = 8
    pause_s: float = 1.0
    timeout_s: float = 300.0
    budget: Budget = field(default_factory=Budget, compare=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
        except ValueError:
            raise UserError("GIFT_JUDGE_URL: not an address such as https://api.openai.com/v1") from None
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError("GIFT_JUDGE_URL: give the key in GIFT_JUDGE_KEY; nothing in the url, which is logged")
        self._client()

    @property
    def version(self) -> str:
        """What verdicts are recorded under; those of another model, temperature or version do not compare."""
        warmth = f" at temperature {self.temperature:g}" if self.temperature else ""
        return f"{self.model}{warmth}, fschat single-answer, {JUDGE_VERSION}"

    def rate(self, prompts: Sequence[JudgePrompt]) -> Iterator[tuple[int, Verdict]]:
        """The numbers and verdicts of the prompts as the judge's replies come, `concurrency` at once.

        A verdict is 'rated' with the rating as its score, or an 'error': no reply had a rating, or the server refused
        this prompt. Abandoning the iterator cuts off what is under way. Raises UserError where the judge refuses all
        requests, and once the rest has its verdicts if the budget or a server's failures left some without.
        """
        if not prompts:
            return
        client = self._client()
        self._try_out(client, len(prompts))
        left: list[Unanswered] = []
        failed_in_a_row = rated = 0
        with contextlib.closing(
            in_parallel(lambda prompt, calls: self._rate(client, prompt, calls), prompts, self.concurrency)
        ) as outcomes:
            for number, outcome in outcomes:
                if isinstance(outcome, Verdict):
                    failed_in_a_row, rated = 0, rated + 1
                    yield number, outcome
                    continue
                left.append(outcome)
                failed_in_a_row += not outcome.spent
                if failed_in_a_row > self.concurrency:  # the server is down: do not wait for all others to learn it
                    break
        if left:
            raise self._stopped(left, len(prompts) - rated, len(prompts))

    # -----------------------------------------------------------------------------------------------------------------

    def _client(self) -> Client:
        url = self.url.rstrip("/")
        host = urlsplit(url).hostname or ""
        return Client(
            url,
            setting="GIFT_JUDGE_URL",
            headers=self.key.headers(),
            reply_s=self.timeout_s,
            max_bytes=MAX_REPLY_BYTES,
            proxy=None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get("https"),
        )

    def _path(self) -> str:
        """Behind the client's url, which is without /v1."""
        path = urlsplit(self.url).path.rstrip("/")
        return ("/v1" if not path or path.endswith("/v1") else "") + "/chat/completions"

    def _try_out(self, client: Client, wanted: int) -> None:
        """Asks for nothing much, so that a refusal later is known to be about a prompt. Raises UserError."""
        with Calls() as calls:
            try:
                outcome = self._reply(client, TRIAL, self.temperature, calls, TRIAL_TRIES)
            except RefusedRequestError as error:
                outcome = Unanswered(self._said(error))
        if isinstance(outcome, Unanswered):
            raise self._stopped([outcome], wanted, wanted)

    def _stopped(self, left: Sequence[Unanswered], count: int, wanted: int) -> UserError:
        rest = f"{count} of {wanted} answers have no rating yet"
        if all(outcome.spent for outcome in left):
            return UserError(
                f"the judge's budget is spent ({self.budget}): {rest}; run the same command again to go on with as much"
            )
        why = next(outcome.why for outcome in reversed(left) if not outcome.spent)
        return UserError(f"{why}; {rest}: mend this and run the same command again")

    def _rate(self, client: Client, prompt: JudgePrompt, calls: Calls) -> Verdict | Unanswered:
        messages = ({"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user})
        reply = ""
        for ask in range(self.asks):
            temperature = self.temperature if ask == 0 else max(self.temperature, AGAIN_TEMPERATURE)
            try:
                outcome = self._reply(client, messages, temperature, calls, self.tries)
            except RefusedRequestError as error:
                if error.status not in OF_THE_PROMPT:
                    return Unanswered(self._said(error))
                return self._error(prompt, self._said(error))
            if isinstance(outcome, Unanswered):
                return outcome
            reply = outcome
            if (rating := find_rating(reply)) is not None:
                return Verdict(rating[0], "rated", rating[1], prompt.name, self._note(reply))
        return self._error(prompt, f"{self.asks} replies without a rating; the last: {reply}")

    def _reply(
        self, client: Client, messages: Sequence[Mapping[str, str]], temperature: float, calls: Calls, tries: int
    ) -> str | Unanswered:
        """What the judge says. Raises RefusedRequestError where asking again would not help."""
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": self.max_tokens,
        }
        why = ""
        for number in range(tries):
            try:
                self.budget.take()
            except BudgetSpentError:
                return Unanswered("", spent=True)
            pause = min(self.pause_s * 2**number, LONGEST_PAUSE_S) * random.uniform(0.5, 1)
            try:
                reply = client.call(self._path(), body, calls)
                text = content(reply, client.url)
                self.budget.use(used_tokens(reply, sum(len(turn["content"]) for turn in messages) + len(text)))
                return text
            except RefusedRequestError as error:
                if error.status not in PASSING and error.status < 500:
                    raise
                pause = max(pause, pause_asked_for(error.retry_after))
                why = self._said(error)
            except GenerationError as error:
                why = self._said(error)
            if number + 1 == tries or pause > LONGEST_RETRY_AFTER_S or calls.over.wait(pause):
                break
        return Unanswered(why)

    def _said(self, error: Exception) -> str:
        return self.key.redact(str(error))

    def _error(self, prompt: JudgePrompt, why: str) -> Verdict:
        return Verdict(0.0, "error", None, prompt.name, self._note(why))

    def _note(self, text: str) -> str:
        return shortened(self.key.redact(text))


def judge_from_environment(environment: Mapping[str, str] = os.environ) -> Judge:
    """The judge that GIFT_JUDGE_URL and GIFT_JUDGE_MODEL name, with GIFT_JUDGE_KEY if it asks for one.

    GIFT_JUDGE_BUDGET is the most requests, GIFT_JUDGE_TOKENS the most tokens that may be spent; GIFT_JUDGE_CONCURRENCY
    the requests at once, GIFT_JUDGE_TIMEOUT the seconds to wait for a reply. Raises UserError naming what is missing or
    is no such number.
    """
    url, model = (environment.get(name, "").strip() for name in ("GIFT_JUDGE_URL", "GIFT_JUDGE_MODEL"))
    if not url or not model:
        raise UserError(
            "no judge: set GIFT_JUDGE_URL (such as https://api.openai.com/v1), GIFT_JUDGE_MODEL (such as gpt-4) and,"
            " where the server asks for one, GIFT_JUDGE_KEY; any OpenAI-compatible chat endpoint will do"
        )

    def number(name: str, default: int | None) -> int | None:
        text = environment.get(name, "").strip()
        if not text:
            return default
        if not re.fullmatch("[0-9]{1,12}", text) or int(text) == 0:
            raise UserError(f"{name}: {text!r} is not a whole number of at least 1")
        return int(text)

    return Judge(
        url,
        model,
        Key(environment.get("GIFT_JUDGE_KEY", "")),
        concurrency=number("GIFT_JUDGE_CONCURRENCY", None) or Judge.concurrency,
        timeout_s=number("GIFT_JUDGE_TIMEOUT", None) or Judge.timeout_s,
        budget=Budget(number("GIFT_JUDGE_BUDGET", None), number("GIFT_JUDGE_TOKENS", None)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a reply holds

_MARKUP = r"[*_`\s]{0,6}"
_RATING = rf"(?P<rating>[0-9]{{1,3}}\.?[0-9]{{0,3}})(?:{_MARKUP}(?:/|out of){_MARKUP}(?P<scale>[0-9]{{1,4}}))?"
_DOUBLE_BRACKETS = re.compile(
    rf"\[\s?\[{_MARKUP}(?:rating{_MARKUP}[:=]?)?{_MARKUP}{_RATING}{_MARKUP}\]\s?\]"
    rf"(?:{_MARKUP}(?:/|out of)\s?(?P<bracket>\[\[)?(?P<scale_behind>[0-9]{{1,4}})(?(bracket)\]\]))?",
    re.IGNORECASE,
)
_SAID = re.compile(  # but not "Rating: 7-8", nor "Rating: 80%"
    rf"\brating{_MARKUP}[:=]{_MARKUP}\[?{_MARKUP}{_RATING}(?![0-9%]|\.[0-9]|\s?[-–/]\s?[0-9]|\s(?:to|or|out)\s)",
    re.IGNORECASE,
)
_BRACKETS = re.compile(rf"(?<![\w\])])\[{_MARKUP}{_RATING}{_MARKUP}\](?![\[(])")  # no index, no link


def find_rating(reply: str) -> tuple[float, str] | None:
    """The rating of 1 to 10 that a judge settles on and the text that says it, or None.

    It is the last in double brackets; without any, the last behind "Rating:"; without that, the last in brackets on
    the last line. One out of range, or on a scale that does not end at 10, is none, and no other is looked for.
    """
    last_line = reply.rstrip().rpartition("\n")[2]
    for pattern, text in ((_DOUBLE_BRACKETS, reply), (_SAID, reply), (_BRACKETS, last_line)):
        if matches := list(pattern.finditer(text)):
            found = matches[-1].groupdict()
            scales = {found["scale"], found.get("scale_behind")} - {None, "10"}
            rating = float(found["rating"])
            return (rating, matches[-1][0].strip()) if 1 <= rating <= 10 and not scales else None
    return None


def content(reply: Mapping[str, Any], url: str) -> str:
    """The text of a chat completion, '' where it has none. Raises GenerationError where the reply is no completion."""
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise GenerationError(f"{url}: the reply is no chat completion: {one_line(reply)}") from None
    return text if isinstance(text, str) else ""


def used_tokens(reply: Mapping[str, Any], characters: int) -> int:
    """The tokens that the server says a request used, prompt and reply; an estimate where it says nothing."""
    usage = reply.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if type(total) is int and total >= 0 else characters // CHARS_PER_TOKEN + 1


def pause_asked_for(retry_after: str | None) -> float:
    """The seconds that a Retry-After header asks for, as a number or as a date; 0 where it says nothing."""
    if retry_after is None:
        return 0.0
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", retry_after.strip()):
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max((date - dt.datetime.now(date.tzinfo)).total_seconds(), 0.0)


def shortened(text: str) -> str:
    """The text, without its middle where it has more than NOTE_CHARS characters: a rating stands at the end."""
    half = NOTE_CHARS // 2
    return text if len(text) <= NOTE_CHARS else f"{text[:half]} [...] {text[-half:]}"
