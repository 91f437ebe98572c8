import json
import stat
from dataclasses import replace

import pytest

from distbelief.monitor.line import Lines
from distbelief.monitor.link import NAME, Link, read_link

URL = "http://127.0.0.1:1/?k=secret"


def test_the_link_is_for_its_owner_alone_and_says_where_it_serves(tmp_path):
    link = Link.of_this_process(URL, "tcp://127.0.0.1:2")
    link.write(tmp_path)
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600
    assert read_link(tmp_path) == link
    assert link.is_alive
    assert "secret" not in repr(link)
    link.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_of_a_process_that_is_gone_is_not_alive(tmp_path):
    gone = replace(Link.of_this_process(URL, ""), began="1")
    assert not gone.is_alive
    assert replace(gone, host="another").is_alive, "nobody can see that from here"


def test_the_link_of_another_monitor_is_left_there(tmp_path):
    mine = Link.of_this_process(URL, "")
    other = replace(mine, pid=1)
    other.write(tmp_path)
    mine.remove(tmp_path)
    assert read_link(tmp_path) == other


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"url": 1}', "\xff"])
def test_a_damaged_link_is_none(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    assert read_link(tmp_path) is None


def test_a_link_of_wrong_types_is_none(tmp_path):
    data = {"url": "x", "pid": "1", "feed": "", "host": "", "began": ""}
    (tmp_path / NAME).write_text(json.dumps(data))
    assert read_link(tmp_path) is None


# Lines


def test_lines_come_whole_however_they_are_cut():
    lines, data = Lines(), b"one\n\ntwo\nthree"
    found = [line for i in range(len(data)) for line in lines.feed(data[i : i + 1])]
    assert found == [b"one", b"", b"two"]
    assert lines.feed(b"\n") == [b"three"]


def test_a_line_that_does_not_end_is_passed_over_and_the_next_one_is_read():
    lines = Lines(longest=10)
    assert lines.feed(b"12345") == []
    assert lines.feed(b"67890x") == []
    assert lines.feed(b"y" * 100) == []
    assert lines.feed(b"z\nnext\n") == [b"next"]
    assert lines.feed(b"12345678901\n1234567890\n") == [b"1234567890"]
    assert lines.num_long == 2
