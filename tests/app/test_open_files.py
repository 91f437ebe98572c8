"""The limit of open files is raised as far as it has to be, or said to be too low."""

import resource

import pytest

from distbelief.open_files import allow_files, files_needed
from distbelief.problem import Problem


class Limits:
    """RLIMIT_NOFILE of a process that is not this one."""

    def __init__(self, soft, hard):
        self.pair = soft, hard

    def getrlimit(self, which):
        assert which == resource.RLIMIT_NOFILE
        return self.pair

    def setrlimit(self, which, pair):
        assert which == resource.RLIMIT_NOFILE
        self.pair = pair


@pytest.mark.parametrize(
    ("soft", "hard", "after"),
    [(1024, 4096, 2200), (1024, -1, 2200), (4000, 4096, 4000), (-1, -1, -1)],
)
def test_the_limit_is_raised_where_it_is_too_low(monkeypatch, soft, hard, after):
    limits = Limits(soft, hard)
    for name in ("getrlimit", "setrlimit"):
        monkeypatch.setattr(f"distbelief.open_files.resource.{name}", getattr(limits, name))
    allow_files(1000)
    assert limits.pair == (after, hard)


def test_a_limit_that_cannot_be_raised_is_said(monkeypatch):
    monkeypatch.setattr("distbelief.open_files.resource.getrlimit", Limits(256, 1024).getrlimit)
    with pytest.raises(Problem, match="1000 workers may need 2200 open files") as caught:
        allow_files(1000)
    assert caught.value.code == "DB-ENV-007"
    assert "ulimit -Hn 2200" in caught.value.fix


def test_two_workers_need_what_every_system_allows():
    assert files_needed(2) < 256
