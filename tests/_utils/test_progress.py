"""Progress: a bar on a terminal, lines without one."""

import re
import sys

import pytest

from featnorm._utils.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, in seconds."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def work(clock, seconds, **options):
    for _ in progress_bar(range(10), desc="features", unit=" images", **options):
        clock[0] += seconds


def test_without_a_terminal_there_is_a_line_every_half_minute(clock, capsys):
    work(clock, 10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in lines] == [f"features:  {n}0% {n}/10" for n in (3, 6, 9)]
    assert re.fullmatch(r"features:  60% 6/10 \[01:00<00:40, 10\.00s/ images\]", lines[1])


def test_short_work_writes_nothing(clock, capsys):
    work(clock, 2)
    with progress_bar(total=100, initial=50) as bar:
        for epoch in range(20):
            bar.set_description(f"epoch {epoch}")
            clock[0] += 1
            bar.update(1)
    assert capsys.readouterr().err == ""


def test_work_of_unknown_length(clock, capsys):
    with progress_bar(unit=" rows") as bar:
        clock[0] += 40
        bar.update(800)
    assert capsys.readouterr().err == "800 rows [00:40, 20.00 rows/s]\n"


def test_on_a_terminal_there_is_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    work(clock, 10)
    shown = capsys.readouterr().err
    assert "|" in shown
    assert "\n" not in shown


def test_a_bar_that_is_asked_for_needs_no_terminal(clock, capsys):
    work(clock, 1, progress=True)
    assert "10%|" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_it_can_be_hidden(clock, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    work(clock, 100, progress=False)
    assert capsys.readouterr().err == ""
