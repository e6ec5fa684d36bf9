"""Progress bars in logs and on terminals."""

from __future__ import annotations

import io
import sys
import time

import pytest

from nas.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_few_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for _ in progress_bar(range(500), desc="work"):
        time.sleep(0.0005)
    text = log.getvalue()
    assert 1 <= len(text.splitlines()) <= 3 and text.endswith("\n") and "\r" not in text
    assert text.splitlines()[-1].startswith("work: 100%")


def test_a_terminal_is_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(total=3, desc="work") as bar:
        bar.update(3)
    assert "\r" in screen.getvalue()
