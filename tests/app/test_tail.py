"""Tail: the lines that a file gets, as a terminal would show them."""

import pytest

from distbelief import tail
from distbelief.tail import Tail


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w0.out"


def add(path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_a_file_that_is_not_there_yet_has_no_lines(path):
    tail = Tail(path)
    assert tail.lines() == []
    add(path, b"one\ntwo\n")
    assert tail.lines() == ["one", "two"]
    assert tail.lines() == []


def test_what_was_there_before_is_not_read(path):
    """As of a run that is resumed."""
    add(path, b"old\n")
    tail = Tail(path)
    add(path, b"new\n")
    assert tail.lines() == ["new"]


def test_half_a_line_waits_for_its_end(path):
    tail = Tail(path)
    add(path, b"epoch 1: lo")
    assert tail.lines() == []
    add(path, b"ss 0.5\nepoch 2")
    assert tail.lines() == ["epoch 1: loss 0.5"]
    assert tail.lines(last=True) == ["epoch 2"]
    assert tail.lines(last=True) == []


def test_a_character_of_several_bytes_may_come_in_pieces(path):
    tail = Tail(path)
    data = "größe ✓\n".encode()
    for index in range(len(data)):
        add(path, data[index : index + 1])
        lines = tail.lines()
    assert lines == ["größe ✓"]


def test_bytes_that_are_no_text_are_shown_somehow(path):
    tail = Tail(path)
    add(path, b"\xff\xfe ok\n")
    assert tail.lines() == ["\ufffd\ufffd ok"]


def test_lines_may_end_as_on_windows(path):
    tail = Tail(path)
    for piece in (b"one\r", b"\ntwo\r\n"):
        add(path, piece)
    assert tail.lines() == ["one", "two"]


def test_of_a_progress_bar_its_last_state_is_shown(path):
    tail = Tail(path)
    for percent in range(101):
        add(path, f"\r{percent:3d}%|####".encode())
        assert tail.lines() == []
    assert len(tail._rest) < 20  # it does not grow as long as the bar runs
    add(path, b"\ndone\n")
    assert tail.lines() == ["100%|####", "done"]


def test_much_at_once_is_taken_piece_by_piece_and_at_the_end_whole(path, monkeypatch):
    monkeypatch.setattr(tail, "READ_MAX", 10)
    reader = Tail(path)
    add(path, b"line 1\nline 2\nline 3\nline 4\n")
    assert reader.lines() == ["line 1"]
    assert reader.lines() == ["line 2"]
    assert reader.lines(last=True) == ["line 3", "line 4"]


def test_a_line_without_an_end_is_cut(path, monkeypatch):
    monkeypatch.setattr(tail, "READ_MAX", 10)
    reader = Tail(path)
    add(path, b"x" * 25 + b"\n")
    shown = [line for _ in range(5) for line in reader.lines()]
    assert "".join(shown) == "x" * 25


def test_a_file_that_is_gone_has_no_more_lines(path):
    tail = Tail(path)
    add(path, b"one\n")
    path.unlink()
    assert tail.lines(last=True) == []
