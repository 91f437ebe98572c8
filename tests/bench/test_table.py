"""Tables and plots of rows."""

from dataclasses import replace

import pytest

from distbelief.bench.apply import ApplyConfig, apply
from distbelief.bench.plot import Bar, load, plot
from distbelief.bench.table import Column, share, show, spread
from distbelief.bench.window import Spread
from distbelief.bench.wire import Row, WireConfig, bars, columns, wire
from distbelief.bench.work import Work
from distbelief.problem import Problem
from tests.bench.peers import ours_to

ROW = Row(
    system="distbelief",
    transport="shm",
    workers=2,
    shards=1,
    rounds_per_s=100.0,
    rounds_per_s_min=90.0,
    rounds_per_s_max=120.0,
    gb_per_s=5.6,
    cpu_s_per_gb=0.25,
    server_rss_mb=300.4,
    server_mapped_mb=56.0,
    server_growth_mb=0.0,
    server_idle_rss_mb=200.0,
    faults_per_round=3.2,
    other_cpu=0.051,
    check="right",
    why="",
    looked=1000,
    torn=0,
    pushes=1234,
    windows=5,
    size=6_998_552,
    compress="float32",
    durability="none",
    ratios={"shm direct": Spread(0.9, 0.8, 1.1, 5)},
)
FLOOR = replace(ROW, system="shm direct", server_rss_mb=0.0, torn=3, ratios={})


def cells(row, found):
    return {column.head: column.cell(row) for column in found}


def test_a_row_says_its_figures_with_their_range():
    found = cells(ROW, columns([ROW, FLOOR]))
    assert found["system"] == "distbelief shm"
    assert found["rounds/s"] == "100.0 (90.0-120.0)"
    assert found["x shm direct"] == "0.90 (0.80-1.10)"
    assert found["server MB (idle)"] == "300 (200)"
    assert found["torn"] == "0/1000"
    assert "x zmq simple" not in found


def test_what_is_not_known_is_a_dash():
    found = cells(FLOOR, columns([ROW, FLOOR]))
    assert (found["system"], found["x shm direct"]) == ("shm direct", "-")
    assert found["server MB (idle)"] == "-"


def test_peers_are_compared_with_ours_of_the_same_size():
    other = replace(ROW, workers=4, ratios={"shm direct": Spread(9.0, 9.0, 9.0, 5)})
    column = ours_to([other, ROW, FLOOR], "shm")
    assert column.cell(FLOOR) == "0.90 (0.80-1.10)"
    assert column.cell(replace(FLOOR, shards=3)) == "-"
    assert ours_to([ROW], "tcp").cell(FLOOR) == "-"


def test_a_table_has_a_line_for_each_row_and_is_not_cut(capsys):
    show("title", columns([ROW, FLOOR]), [ROW, FLOOR])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].strip() == "title"
    assert lines[1].split()[:3] == ["system", "W", "S"]
    assert lines[2].rstrip().endswith("right")
    assert "…" not in "".join(lines)


def test_figures_are_short():
    assert spread(1.234, 1.0, 2.0, 2) == "1.23 (1.00-2.00)"
    assert share(0.256) == "26%"


def test_a_column_may_be_of_any_row(capsys):
    show("t", [Column("n", lambda n: str(n + 1))], [1])
    assert capsys.readouterr().out.split() == ["t", "n", "2"]


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """matplotlib keeps the files of its fonts open from its first plot on."""
    pytest.importorskip("matplotlib")
    plot(tmp_path_factory.mktemp("plots") / "first.png", "t", "u", [Bar("g", "l", 1.0, 1.0, 1.0)])


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")], ids=["png", "svg"]
)
def test_a_plot_is_drawn_with_a_bar_for_each_row(tmp_path, suffix, magic):
    path = tmp_path / f"plot{suffix}"
    plot(path, "title", "rounds/s", bars([ROW, FLOOR, replace(ROW, workers=4)]))
    assert path.read_bytes().startswith(magic)


@pytest.mark.usefixtures("drawing")
def test_a_plot_that_cannot_be_written_is_a_problem(tmp_path):
    with pytest.raises(Problem, match="cannot be written"):
        plot(tmp_path / "no" / "plot.png", "t", "u", [Bar("g", "l", 1.0, 1.0, 1.0)])


def test_without_matplotlib_a_plot_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(Problem) as caught:
        load()
    assert caught.value.code == "DB-ENV-004"
    assert "distbelief[bench]" in caught.value.fix


def test_more_shards_than_parts_are_refused_before_anything_starts():
    with pytest.raises(Problem, match="9 shards cannot share 100 parameters"):
        wire(WireConfig(shards=(1, 9), size=100))


def test_every_rule_through_parts_comes_to_what_torch_has():
    rows = apply(ApplyConfig(threads=(1,), size=3000, seconds=0.0))
    assert [row.check for row in rows] == ["right"] * 6
    assert {row.parts for row in rows} == {len(Work.of(3000).layout.parts)}
    assert all(row.last_part_size < row.full_part_size for row in rows)
    assert all(row.push_ms_min <= row.push_ms <= row.push_ms_max for row in rows)


def test_a_rule_that_computes_something_else_is_found_out(monkeypatch):
    from distbelief.param_server.part import Part

    def step_too_far(self, grad, samples, absent=b"", norm=0.0):
        self.values.sub_(grad, alpha=2e-4)
        self.version += 1

    monkeypatch.setattr(Part, "apply_", step_too_far)
    (row,) = apply(ApplyConfig(rules=("sgd",), threads=(1,), size=3000, seconds=0.0))
    assert row.check == "wrong"
