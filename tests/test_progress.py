"""How far a computation is: silent in a library, told by a command, never in the way of the items."""

import io

from rich.console import Console

from triptych import progress
from triptych.progress import reporting


def told(items, total, each=1) -> tuple[list, str]:
    console = Console(file=io.StringIO(), force_terminal=False)
    with reporting(console):
        found = list(progress.progress(items, "images:", total, each=each))
    return found, console.file.getvalue()  # type: ignore[attr-defined]


def test_it_tells_how_many_are_done_and_how_long_the_rest_takes(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0)
    items, text = told(["a", "b"], total=5, each=3)
    assert items == ["a", "b"]
    assert "images: 3 of 5, 0:00 left" in text


def test_what_is_quick_is_not_worth_a_word():
    assert told(range(3), 3) == ([0, 1, 2], "")


def test_a_library_call_prints_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0)
    assert list(progress.progress([1, 2], "images:", 2)) == [1, 2]
    assert capsys.readouterr().out == ""


def test_a_terminal_has_one_live_line_whoever_asks_for_another():
    console = Console(file=io.StringIO(), force_terminal=True)
    with reporting(console):
        first = progress._line.get()
        with reporting(console):
            assert progress._line.get() is first is not None
        assert progress._line.get() is first
    assert progress._line.get() is None
