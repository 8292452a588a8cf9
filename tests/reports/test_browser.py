from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_run import write_run

from reports.build import build_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=2000",
]
HOSTILE = (
    "</pre></script><script>document.title='owned'</script>"
    "<img src=x onerror=\"document.title='owned'\"><svg onload=\"document.title='owned'\">"
    "\"'><style>body{display:none}</style>{{ 7 * 7 }}\u202egnp.exe\u2066\x00\x1b[31m\ud800&lt;"
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (apt-get install chromium)"),
]


def load(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and what it wrote to the console."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    console = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return done.stdout.decode(), console


def title(dom: str) -> str:
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found is not None
    return found.group(1)


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    return build_report([write_run(folder / "run", items=4, completion=HOSTILE).path], folder / "report.html")


def test_hostile_completions_are_inert(hostile_report: Path, tmp_path: Path) -> None:
    dom, console = load(hostile_report, tmp_path)
    assert title(dom) == "run"
    assert console == []
    assert dom.count("<script>") == 1
    assert "<img" not in dom
    assert "onload=\"document.title='owned'\"&gt;" in dom  # the text itself is shown
    assert "⟨U+202E⟩gnp.exe⟨U+2066⟩⟨U+0000⟩⟨U+001B⟩[31m⟨U+D800⟩&amp;lt;" in dom
    assert "{{ 7 * 7 }}" in dom


def test_the_content_policy_would_stop_what_escaping_missed(hostile_report: Path, tmp_path: Path) -> None:
    payload = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    source = hostile_report.read_text(encoding="utf-8")
    unescaped = tmp_path / "unescaped.html"
    unescaped.write_text(source.replace("<main", payload + "<main", 1), encoding="utf-8")
    dom, console = load(unescaped, tmp_path / "profile")
    assert title(dom) == "run"
    assert any("Content Security Policy" in line for line in console)

    without_policy = tmp_path / "without.html"
    stripped = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", unescaped.read_text(encoding="utf-8"))
    without_policy.write_text(stripped, encoding="utf-8")
    assert title(load(without_policy, tmp_path / "profile")[0]) == "owned"  # so the canary does sing


def test_everything_opens_for_the_printer(hostile_report: Path, tmp_path: Path) -> None:
    source = hostile_report.read_text(encoding="utf-8")
    probe = "<script>dispatchEvent(new Event('beforeprint'))</script></body>"
    printing = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source).replace("</body>", probe)
    page = tmp_path / "printing.html"
    page.write_text(printing, encoding="utf-8")
    body = load(page, tmp_path / "profile")[0].partition("<script>")[0]
    assert body.count("<details") == body.count('open=""') > 10
