"""The judge against a server on loopback that fails in every way a judge's server does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from judge_server import SECRET, JudgeServer, Reply, asked_text, completion, is_trial, own_rating, prompts, rated

from evals.judge import Budget, Judge, JudgePrompt, Key, judge_from_environment, pause_asked_for
from gift.cli import UserError


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    yield server
    server.close()


def own_ratings(count):
    return {number: own_rating(prompt.user) for number, prompt in enumerate(prompts(count))}


# ---------------------------------------------------------------------------------------------------------------------
# What is sent, and where


def test_a_request_is_fschats(server):
    [(number, verdict)] = server.judge().rate([JudgePrompt("single-v1", "Be fair.", "Rate é.")])
    assert (number, verdict.status, verdict.method) == (0, "rated", "single-v1")
    assert verdict.score == own_rating("Rate é.")
    assert verdict.extracted == f"[[{own_rating('Rate é.')}]]"
    assert verdict.note == f"Good enough. Rating: [[{own_rating('Rate é.')}]]"
    assert server.ratings_asked() == [
        {
            "model": "stub",
            "messages": [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Rate é."}],
            "temperature": 0.0,
            "max_tokens": 2048,
        }
    ]
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/v1", "/v1/chat/completions"),
        ("/api/v1/", "/api/v1/chat/completions"),
        ("/v1beta/openai", "/v1beta/openai/chat/completions"),
    ],
)
def test_the_url_is_what_openais_client_takes(server, base, path):
    assert len(list(Judge(server.url + base, "stub").rate(prompts(1)))) == 1
    assert set(server.paths) == {path}
    assert all("Authorization" not in headers for headers in server.headers)  # no key, no header


def test_nothing_to_rate_is_nothing_asked(server):
    assert list(server.judge().rate([])) == []
    assert server.asked == []


# ---------------------------------------------------------------------------------------------------------------------
# Failures that pass

HOPELESS = re.compile("answer (7|31|88)")  # their replies never hold a rating


def flaky(body, nth):
    """Three in ten requests fail, in one of eight ways; which ones depends on the text and on how often it came."""
    draw = random.Random(f"{asked_text(body)}/{nth}")
    if is_trial(body) or draw.random() > 0.3:
        return completion("Who knows?") if HOPELESS.fullmatch(asked_text(body)) else rated(body)
    fault = draw.randrange(8)
    if fault == 0:
        time.sleep(0.8)
        return rated(body)
    return [
        Reply({"error": {"message": "overloaded"}}, 500),
        Reply({"error": "slow down"}, 429, {"Retry-After": "0.02"}),
        Reply(b'{"choices": [{"message"'),
        Reply({"error": {"message": "upstream"}}),
        None,
        completion(None),
        completion("I rate it [[eleven]]"),
    ][fault - 1]


def test_every_verdict_arrives_or_is_an_error_and_nothing_is_scored_that_was_not_rated(server):
    server.reply = flaky
    found = dict(server.judge(timeout_s=0.4).rate(prompts(100)))
    assert set(found) == set(range(100))
    hopeless = {7, 31, 88}
    assert {number for number, verdict in found.items() if verdict.status == "error"} == hopeless
    assert all(
        verdict.score == 0 and "3 replies without a rating" in verdict.note for n in hopeless for verdict in [found[n]]
    )
    expected = {number: rating for number, rating in own_ratings(100).items() if number not in hopeless}
    assert {number: verdict.score for number, verdict in found.items() if verdict.status == "rated"} == expected
    assert len(server.asked) > 125  # it did fail
    assert SECRET not in repr(found)


def test_verdicts_depend_on_neither_order_nor_concurrency(server):
    asked = prompts(30)
    alone = dict(server.judge(concurrency=1).rate(asked))
    server.reply = lambda body, _: time.sleep(random.random() / 50) or rated(body)
    together = dict(server.judge(concurrency=6).rate(asked[::-1]))
    assert {29 - number: verdict for number, verdict in together.items()} == alone
    assert 1 < server.most_at_once <= 6


def test_a_reply_without_a_rating_is_asked_for_warmer(server):
    server.reply = lambda body, nth: rated(body) if is_trial(body) or nth == 2 else completion("hm", usage={})
    [(_, verdict)] = server.judge().rate(prompts(1))
    assert verdict.score == own_rating("answer 0")
    assert [body["temperature"] for body in server.ratings_asked()] == [0.0, 0.3, 0.3]


@pytest.mark.parametrize("dated", [False, True])
def test_the_pause_that_a_server_asks_for_is_made(server, dated):
    times = []

    def reply(body, nth):
        if is_trial(body):
            return rated(body)
        times.append(time.monotonic())
        until = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        return Reply({}, 429, {"Retry-After": until if dated else "0.5"}) if nth == 0 else rated(body)

    server.reply = reply
    assert len(list(server.judge().rate(prompts(1)))) == 1
    assert times[1] - times[0] >= 0.5  # a date has whole seconds


def test_pauses_in_headers():
    assert [pause_asked_for(text) for text in (None, "", "7", " 2.5 ", "soon", "-3", "1e9")] == [0, 0, 7, 2.5, 0, 0, 0]
    assert pause_asked_for(format_datetime(datetime.now(UTC) - timedelta(hours=1))) == 0
    hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    assert 3500 < pause_asked_for(hour) <= 3600


# ---------------------------------------------------------------------------------------------------------------------
# Failures that stay


def test_a_refused_prompt_is_an_error_and_the_rest_is_rated(server):
    too_long = Reply({"error": {"message": "maximum context length is 4 tokens"}}, 400)
    server.reply = lambda body, _: too_long if asked_text(body) == "answer 3" else rated(body)
    found = dict(server.judge().rate(prompts(6)))
    assert (found[3].status, found[3].score, found[3].extracted) == ("error", 0.0, None)
    assert "maximum context length" in found[3].note
    assert {number: found[number].score for number in (0, 1, 2, 4, 5)} == {
        number: rating for number, rating in own_ratings(6).items() if number != 3
    }
    assert len(server.ratings_asked()) == 6  # not asked again


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_judge_that_refuses_everything_gives_no_verdict(server, status):
    server.reply = lambda *_: Reply({"error": {"message": f"no: {SECRET}"}}, status)
    with pytest.raises(UserError, match=rf"HTTP {status}.*no: \[key\]; 9 of 9 answers have no rating yet"):
        list(server.judge().rate(prompts(9)))
    assert len(server.asked) == 1


def test_where_nothing_listens(server):
    judge = server.judge()
    server.close()
    with pytest.raises(
        UserError, match=r"no server answers there.*2 of 2 answers have no rating yet.*same command again"
    ):
        list(judge.rate(prompts(2)))


def test_a_server_that_goes_down_is_noticed_before_all_have_waited_for_it(server):
    server.reply = lambda body, _: rated(body) if is_trial(body) or asked_text(body) == "answer 0" else Reply({}, 503)
    found = {}
    with pytest.raises(UserError, match=r"HTTP 503.*99 of 100 answers have no rating yet"):
        found.update(server.judge(concurrency=2, tries=2).rate(prompts(100)))
    assert {number: verdict.score for number, verdict in found.items()} == {0: own_rating("answer 0")}
    assert len(server.asked) < 20


def test_one_request_that_keeps_failing_leaves_its_answer_for_later(server):
    server.reply = lambda body, _: Reply({}, 500) if asked_text(body) == "answer 4" else rated(body)
    found = {}
    with pytest.raises(UserError, match=r"HTTP 500.*1 of 20 answers have no rating yet"):
        found.update(server.judge(tries=3).rate(prompts(20)))
    assert {number: verdict.score for number, verdict in found.items()} == {
        number: rating for number, rating in own_ratings(20).items() if number != 4
    }


def test_a_wait_of_hours_is_not_made(server):
    server.reply = lambda body, _: rated(body) if is_trial(body) else Reply({}, 429, {"Retry-After": "86400"})
    started = time.monotonic()
    with pytest.raises(UserError, match="HTTP 429"):
        list(server.judge().rate(prompts(1)))
    assert time.monotonic() - started < 5


def test_a_reply_without_end_is_cut_off(server):
    server.reply = lambda body, _: rated(body) if is_trial(body) else completion("x" * (5 << 20))
    with pytest.raises(UserError, match="longer than 4194304 bytes"):
        list(server.judge(tries=2).rate(prompts(1)))


def test_a_reply_that_trickles_is_given_up():
    def trickle(listener):
        with contextlib.suppress(OSError):  # closed: the test is over
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                    for _ in range(100):
                        connection.sendall(b" ")
                        time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=trickle, args=(listener,), daemon=True).start()
        judge = Judge(f"http://127.0.0.1:{listener.getsockname()[1]}", "m", timeout_s=0.3, pause_s=0.001)
        started = time.monotonic()
        with pytest.raises(UserError, match="no reply"):
            list(judge.rate(prompts(1)))
        assert time.monotonic() - started < 4


def hang(body, _):
    if not is_trial(body):
        time.sleep(20)
    return rated(body)


def test_abandoned_grading_cuts_off_what_is_under_way(server):
    server.reply = lambda body, nth: rated(body) if asked_text(body) == "answer 0" else hang(body, nth)
    verdicts = server.judge(concurrency=3).rate(prompts(40))
    assert next(verdicts)[0] == 0
    started = time.monotonic()
    verdicts.close()
    assert time.monotonic() - started < 3
    assert len(server.ratings_asked()) <= 5


def test_ctrl_c_stops_at_once(server):
    server.reply = hang
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(server.judge().rate(prompts(20)))
    assert time.monotonic() - started < 5


# ---------------------------------------------------------------------------------------------------------------------
# The budget


def test_a_spent_budget_stops_and_the_same_again_goes_on(server):
    pending = dict(enumerate(prompts(23)))
    scores, rounds = {}, 0
    while pending:
        numbers = list(pending)
        judge = server.judge(budget=Budget(max_requests=9), concurrency=3)  # as each command makes one
        rounds += 1
        left = None
        try:
            for index, verdict in judge.rate([pending[number] for number in numbers]):
                scores[numbers[index]] = verdict.score
        except UserError as error:
            left = str(error)
        for number in scores:
            pending.pop(number, None)
        if pending:
            assert left is not None
            assert f"(9 of 9 requests): {len(pending)} of {len(numbers)} answers have no rating yet" in left
        else:
            assert left is None
        assert judge.budget.requests <= 9
    assert scores == own_ratings(23)
    assert rounds == 3  # 8 + 8 + 7, and a trial each
    assert len(server.asked) == 26


def test_a_budget_of_tokens(server):  # 100 each
    judge = server.judge(budget=Budget(max_tokens=450), concurrency=1)
    found = []
    with pytest.raises(UserError, match=r"budget is spent \(500 of 450 tokens\): 6 of 10 answers"):
        found.extend(judge.rate(prompts(10)))
    assert len(server.asked) == 5
    assert judge.budget.tokens == 500


def test_tokens_are_estimated_where_the_server_does_not_count(server):
    server.reply = lambda *_: completion("[[5]]" + "x" * 295, usage={"total_tokens": "many"})
    judge = server.judge(budget=Budget(max_tokens=300), concurrency=1)
    with pytest.raises(UserError, match="budget is spent"):
        list(judge.rate(prompts(10)))
    assert 300 <= judge.budget.tokens < 420


# ---------------------------------------------------------------------------------------------------------------------
# The key


def test_the_key_is_in_no_message_verdict_or_traceback(server):
    judge = server.judge(tries=2)
    assert SECRET not in repr(judge) + str(judge) + str(judge.key) + judge.version
    server.reply = lambda *_: completion(f"Your header was Bearer {SECRET}. [[4]]")
    [(_, verdict)] = judge.rate(prompts(1))
    assert verdict.score == 4
    assert verdict.note == "Your header was Bearer [key]. [[4]]"
    for padding in range(200, 320, 7):  # messages are cut at 300 characters, maybe inside of the key
        server.reply = lambda *_, padding=padding: Reply({"error": "x" * padding + SECRET}, 401)
        with pytest.raises(UserError) as caught:
            list(judge.rate(prompts(1)))
        told = "".join(traceback.format_exception(caught.value))
        assert SECRET[:6] not in told
        assert "HTTP 401" in told
    server.reply = lambda body, _: rated(body) if is_trial(body) else Reply({"error": f"{SECRET} is too long"}, 400)
    [(_, verdict)] = judge.rate(prompts(1))
    assert (verdict.status, SECRET in str(verdict)) == ("error", False)


def test_the_key_does_not_follow_a_redirect(server):
    elsewhere = JudgeServer()
    server.reply = lambda *_: Reply(b"", 302, {"Location": f"{elsewhere.url}/v1/chat/completions"})
    with pytest.raises(UserError):
        list(server.judge().rate(prompts(1)))
    assert elsewhere.asked == []
    elsewhere.close()


def test_a_proxy_is_shown_its_own_password_only(monkeypatch):
    seen = []

    def refuse(listener):
        with contextlib.suppress(OSError):  # closed: the test is over
            while True:
                connection, _ = listener.accept()
                with connection:
                    seen.append(connection.recv(65536).decode())
                    connection.sendall(b"HTTP/1.1 407 Who are you?\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=refuse, args=(listener,), daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://me:pass%77ord@127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with pytest.raises(UserError, match="407") as caught:
            list(Judge("https://judge.invalid/v1", "m", Key(SECRET), pause_s=0.001).rate(prompts(1)))
    assert seen[0].startswith("CONNECT judge.invalid:443 ")
    assert "Proxy-Authorization: Basic bWU6cGFzc3dvcmQ=" in seen[0]  # me:password
    assert SECRET not in "".join(seen)
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize("key", ["two words", "sk-é", "sk\nX-Other: header"])
def test_a_key_that_cannot_be_sent_is_not_repeated(key):
    with pytest.raises(UserError, match="GIFT_JUDGE_KEY") as caught:
        Key(key)
    assert key not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Settings

SET = {"GIFT_JUDGE_URL": "http://127.0.0.1:9", "GIFT_JUDGE_MODEL": "gpt-4"}


def test_the_environment_names_a_judge():
    judge = judge_from_environment(SET)
    assert judge == Judge("http://127.0.0.1:9", "gpt-4")
    assert judge.version == "gpt-4, fschat single-answer, evals.judge 1"
    more = {"KEY": f"{SECRET}\n", "BUDGET": "70", "TOKENS": "9000", "CONCURRENCY": "2", "TIMEOUT": "30"}
    judge = judge_from_environment({**SET, **{f"GIFT_JUDGE_{name}": value for name, value in more.items()}})
    assert (judge.concurrency, judge.timeout_s, judge.budget.max_requests, judge.budget.max_tokens) == (2, 30, 70, 9000)
    assert judge.key.headers() == {"Authorization": f"Bearer {SECRET}"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"GIFT_JUDGE_URL": ""}, "no judge: set GIFT_JUDGE_URL"),
        ({"GIFT_JUDGE_MODEL": " "}, "no judge: set GIFT_JUDGE_URL"),
        ({"GIFT_JUDGE_URL": "ftp://a/v1"}, "GIFT_JUDGE_URL: 'ftp://a/v1' is not an address"),
        ({"GIFT_JUDGE_URL": "file:///etc/passwd"}, "GIFT_JUDGE_URL"),
        ({"GIFT_JUDGE_URL": "http://a:port/v1"}, "GIFT_JUDGE_URL"),
        ({"GIFT_JUDGE_URL": "http://[::1/v1"}, "GIFT_JUDGE_URL"),
        ({"GIFT_JUDGE_URL": f"https://me:{SECRET}@a/v1"}, "give the key in GIFT_JUDGE_KEY"),
        ({"GIFT_JUDGE_URL": f"https://a/v1?key={SECRET}"}, "give the key in GIFT_JUDGE_KEY"),
        ({"GIFT_JUDGE_BUDGET": "0"}, "GIFT_JUDGE_BUDGET: '0' is not a whole number of at least 1"),
        ({"GIFT_JUDGE_TOKENS": "1e6"}, "GIFT_JUDGE_TOKENS: '1e6' is not"),
        ({"GIFT_JUDGE_CONCURRENCY": "-1"}, "GIFT_JUDGE_CONCURRENCY: '-1' is not"),
    ],
)
def test_an_unusable_environment(change, message):
    with pytest.raises(UserError) as caught:
        judge_from_environment({**SET, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Notes


def test_a_long_reply_is_noted_with_both_ends(server):
    server.reply = lambda *_: completion("begin " + json.dumps(["x" * 9000]) + " [[7]]")
    [(_, verdict)] = server.judge().rate(prompts(1))
    assert verdict.score == 7
    assert len(verdict.note) < 4100
    assert verdict.note.startswith("begin ")
    assert verdict.note.endswith(" [[7]]")


# ---------------------------------------------------------------------------------------------------------------------
# A real server


@pytest.mark.vllm
@pytest.mark.slow
def test_a_model_that_talks_nonsense_rates_nothing(shared_vllm_server):
    server = shared_vllm_server
    judge = Judge(f"{server.url}/v1", server.model, max_tokens=24, asks=2, budget=Budget(max_requests=100))
    found = dict(judge.rate(prompts(6)))
    assert {number: verdict.status for number, verdict in found.items()} == dict.fromkeys(range(6), "error")
    assert all("2 replies without a rating" in verdict.note for verdict in found.values())
    assert judge.budget.requests == 13
    assert judge.budget.tokens > 13 * 24
    with pytest.raises(UserError, match=r"HTTP 404.*does not exist"):
        list(Judge(server.url, "another-model").rate(prompts(1)))
