"""What the launcher says is kept in the run folder, and bothers nobody else's logging."""

import io
import logging
import shutil

import pytest

from distbelief.launcher_log import launcher_log
from distbelief.live import LiveLine
from tests.helpers.folders import make_run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, "aa")


class Kept(logging.Handler):
    """What a handler of the calling program is given."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def callers():
    """The handler of a program that logs everything."""
    root, handler = logging.getLogger(), Kept()
    level = root.level
    root.setLevel(logging.DEBUG)
    root.addHandler(handler)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


def test_events_and_warnings_are_kept_and_events_go_nowhere_else(run, callers):
    line = LiveLine(io.StringIO(), plain=True)
    line.say("before")
    with launcher_log(run):
        line.say("worker w1 is lost")
        logging.getLogger("distbelief.run").warning("something odd")
    line.say("after")
    first, second = (run.logs / "launcher.log").read_text().splitlines()
    assert first.endswith(" INFO distbelief.launcher worker w1 is lost")
    assert second.endswith(" WARNING distbelief.run something odd")
    assert callers.messages == ["something odd"]


def test_a_folder_that_takes_no_log_does_not_hold_up_the_run(run, caplog):
    shutil.rmtree(run.logs)
    with launcher_log(run):
        LiveLine(io.StringIO(), plain=True).say("hello")
    assert "launcher.log cannot be written" in caplog.text
