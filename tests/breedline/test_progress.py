import io
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console

from breedline.progress import SECONDS_BETWEEN_LINES, progress


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal shows."""
    screen = io.StringIO()
    monkeypatch.setattr("breedline.progress.console", Console(file=screen, force_terminal=True, width=100))
    return screen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> SimpleNamespace:
    """No terminal, and a clock whose `now` stands where a test puts it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("breedline.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("breedline.progress.console", Console(file=io.StringIO(), force_terminal=False))
    caplog.set_level(logging.INFO, "breedline")
    return clock


@pytest.mark.parametrize(
    ("total", "in_bytes", "line"),
    [
        (3000000, False, "pack: 1500000 of 3000000"),
        (None, False, "pack: 1500000"),
        (3000000, True, "pack: 2 of 3 MB"),
        (None, True, "pack: 2 MB"),
    ],
)
def test_without_a_terminal_a_line_says_how_far_it_is(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture, total: int | None, in_bytes: bool, line: str
) -> None:
    with progress("pack", total, in_bytes=in_bytes) as advance:
        advance(1000000)
        clock.now += SECONDS_BETWEEN_LINES
        advance(500000)
    assert caplog.messages == [line]


def test_without_a_terminal_lines_are_seconds_apart(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with progress("pack", None) as advance:
        for _ in range(100):
            clock.now += SECONDS_BETWEEN_LINES / 20
            advance(1)
    assert caplog.messages == [f"pack: {count}" for count in (20, 40, 60, 80, 100)]


@pytest.mark.parametrize(
    ("total", "in_bytes", "shown"),
    [(10, False, "3/10"), (None, False, "3/?"), (10, True, "3/10 bytes"), (None, True, "3/? bytes")],
)
def test_on_a_terminal_a_bar_shows_how_far_it_is(
    screen: io.StringIO, total: int | None, in_bytes: bool, shown: str
) -> None:
    with progress("pack", total, in_bytes=in_bytes) as advance:
        advance(1)
        advance(2)
    assert "pack" in screen.getvalue()
    assert shown in screen.getvalue()


@pytest.mark.parametrize(
    "what", ["download [bold]cat[/].tgz", "download cat[/red].tgz", "a[link=x]", "{task.id}", "[", "\\["]
)
def test_on_a_terminal_text_is_text(screen: io.StringIO, what: str) -> None:
    with progress(what, 10) as advance:
        advance(1)
    assert what in screen.getvalue()


def test_a_failure_passes_through_and_gives_the_terminal_back(screen: io.StringIO) -> None:
    with pytest.raises(KeyboardInterrupt), progress("pack", 10):
        raise KeyboardInterrupt
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert screen.getvalue().rfind(show) > screen.getvalue().find(hide) >= 0
