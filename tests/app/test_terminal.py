"""Output that outlives its terminal, with a real one that is closed."""

import io
import os
import pty
import subprocess
import sys

import pytest

from distbelief.controller.pace import Progress
from distbelief.live import LiveLine
from distbelief.param_server.staleness import Staleness
from distbelief.terminal import outliving, outliving_output


@pytest.fixture
def closed_terminal():
    """A stream to a terminal whose other end is closed."""
    master, slave = pty.openpty()
    stream = os.fdopen(slave, "w", buffering=1)
    assert stream.isatty()
    os.close(master)
    yield stream
    stream.close()


def test_writing_to_a_closed_terminal_is_an_error_of_python(closed_terminal):
    with pytest.raises(OSError, match="Input/output error"):
        closed_terminal.write("a\n")
    with outliving_output():  # and its buffer is not tried again when it is closed
        outliving(closed_terminal).flush()


def test_a_closed_terminal_takes_what_is_written(closed_terminal):
    out = outliving(closed_terminal)
    assert out.write("a\n") == 2
    out.write("b\n")
    out.flush()
    assert out.isatty() is False  # it writes to nothing now


def test_a_closed_pipe_takes_what_is_written():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        out = outliving(stream)
        out.write("a\n")
        out.flush()
        out.write("b\n")
        out.flush()


def test_a_closed_file_takes_what_is_written():
    stream = io.StringIO()
    stream.close()
    out = outliving(stream)
    out.write("a")
    out.flush()
    assert not out.isatty()


def test_a_full_disk_loses_what_is_written_and_is_tried_again():
    with open("/dev/full", "w") as stream, open(os.devnull, "w") as nothing:
        out = outliving(stream)
        out.write("a")
        out.flush()
        assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == "/dev/full"
        os.dup2(nothing.fileno(), stream.fileno())


def test_a_stream_is_wrapped_once_and_is_else_what_it_was():
    stream = io.StringIO()
    out = outliving(stream)
    assert outliving(out) is out
    out.write("a")
    assert stream.getvalue() == "a"
    assert out.encoding == stream.encoding


def test_the_live_line_outlives_its_terminal():
    """With the thread that draws it, in a process of its own: a traceback would be seen."""
    program = """
import os, pty, sys, time
from distbelief.live import LiveLine
from tests.app.test_terminal import PROGRESS
master, slave = pty.openpty()
line = LiveLine(os.fdopen(slave, "w"), plain=False)
with line:
    line.say("before")
    line.update(PROGRESS)
    os.close(master)
    for _ in range(5):
        line.update(PROGRESS)
        line.say("after")
        time.sleep(0.3)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


PROGRESS = Progress(
    samples=1,
    total_samples=2,
    updates=3,
    loss=0.5,
    samples_per_s=1.0,
    num_workers=2,
    refused=0,
    staleness=Staleness(),
    eta_s=1.0,
)


def test_the_live_line_of_a_stream_shows_progress():
    out = io.StringIO()
    with LiveLine(out, plain=True) as line:
        line.update(PROGRESS)
    assert "samples=1/2 share=50.0%" in out.getvalue()
