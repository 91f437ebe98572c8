"""Alert rules, the Grafana dashboard and the docs' table against what is really exported."""

import json
import re
from pathlib import Path

import pytest

from distbelief.monitor.metrics import FAMILIES
from tests.helpers.metrics import full_run, labels_by_name, samples_of
from tests.helpers.queries import GRAFANA, NAME, QUERIES, RULES, TARGET, check_query, panels

DOCS = Path(__file__).parents[2] / "docs" / "observability.md"
IDS = [f"{i}-{where}" for i, (where, _) in enumerate(QUERIES)]


@pytest.fixture(scope="module")
def exported():
    metrics, store, _ = full_run()
    return labels_by_name(metrics.render(store)[0].decode())


@pytest.mark.parametrize(("where", "expr"), QUERIES, ids=IDS)
def test_each_query_asks_for_what_is_exported(where, expr, exported):
    check_query(expr, exported)


@pytest.mark.parametrize(
    "expr",
    [
        "rate(distbelief_staleness_ratios_bucket[5m])",
        'distbelief_workers{state="stalled"}',
        "sum by (node) (distbelief_workers)",
        "1 > 0",
    ],
)
def test_the_check_finds_a_wrong_name_and_a_wrong_label(expr, exported):
    with pytest.raises(AssertionError):
        check_query(expr, exported)


@pytest.mark.parametrize(("where", "expr"), QUERIES, ids=IDS)
def test_each_query_is_in_prometheus_grammar(where, expr):
    """And rates are of counters, or of the parts of a histogram."""
    promql = pytest.importorskip("promql_parser", reason="of the extra `dev`")
    tree = promql.parse(expr)
    counted = []

    def look(node):
        if isinstance(node, promql.Call) and node.func.name in ("rate", "increase"):
            counted.append(node.args[0].vector_selector.name)

    promql.walk(tree, look)
    for name in counted:
        base = re.sub("_(bucket|sum|count)$", "", name)
        kind = FAMILIES[name if name in FAMILIES else base].kind
        assert kind == ("counter" if name in FAMILIES else "histogram"), name


def test_a_wrong_query_is_not_in_the_grammar():
    promql = pytest.importorskip("promql_parser", reason="of the extra `dev`")
    for expr in ("sum by (le (a_bucket)", "rate(distbelief_updates_total)", "a and on b"):
        with pytest.raises(ValueError):  # noqa: PT011 - each message is another
            promql.parse(expr)


def test_each_metric_is_in_a_panel_or_an_alert():
    seen = {name for _, expr in QUERIES for name in NAME.findall(expr)}
    seen |= {re.sub("_(bucket|sum|count)$", "", name) for name in seen}
    assert set(FAMILIES) - seen == set()


# Alerts.


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_means_and_what_to_do(rule, exported):
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+[smh]", rule["for"])
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description", "action"}
    assert all(len(text) > 30 for text in rule["annotations"].values())
    known = set().union(*(exported[name] for name in NAME.findall(rule["expr"]))) | TARGET
    for text in rule["annotations"].values():
        for label in re.findall(r"\$labels\.(\w+)", text):
            assert label in known, label


def test_alerts_have_names_of_their_own():
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)


# Grafana.


def test_the_dashboard_can_be_imported_anywhere():
    assert GRAFANA["schemaVersion"] >= 39
    assert "uid" not in GRAFANA
    assert "id" not in GRAFANA
    variables = {one["name"]: one for one in GRAFANA["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["definition"] == "label_values(distbelief_run_info, run)"
    uids = re.findall(r'"uid": "([^"]*)"', json.dumps(GRAFANA))
    assert set(uids) == {"${datasource}", "-- Grafana --"}


def test_the_dashboard_has_its_rows_and_no_panel_lies_on_another():
    rows = [panel["title"] for panel in GRAFANA["panels"] if panel["type"] == "row"]
    assert rows == ["Overview", "Staleness", "Phases", "Shards", "Events"]
    taken: set[tuple[int, int]] = set()
    for panel in GRAFANA["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in GRAFANA["panels"]]
    assert len(set(ids)) == len(ids)
    heat = [panel for panel in panels() if panel["type"] == "heatmap"]
    assert [panel["targets"][0]["format"] for panel in heat] == ["heatmap"]
    notes = [one["name"] for one in GRAFANA["annotations"]["list"] if not one.get("builtIn")]
    assert notes == ["Losses", "Joins and returns", "Checkpoints"]


def test_each_query_of_the_dashboard_is_of_the_chosen_run():
    for panel in panels():
        for target in panel["targets"]:
            assert 'distbelief_run_info{run=~"$run"}' in target["expr"], panel["title"]


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: f"{panel['id']}-{panel['title']}")
def test_a_legend_names_labels_that_there_are(panel, exported):
    for target in panel["targets"]:
        known = set().union(*(exported[name] for name in NAME.findall(target["expr"])))
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert label in known | {"le"}, label


# Docs.


def test_the_docs_have_a_row_for_each_metric_and_no_more():
    rows = re.findall(r"^\| `(distbelief_\w+)` \| (\w+) \| ([^|]*) \| ", DOCS.read_text(), re.M)
    told = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(told) == len(rows)
    assert told == {
        family.name: ("gauge" if family.kind == "info" else family.kind, family.labels)
        for family in FAMILIES.values()
    }


def test_the_docs_have_a_row_for_each_alert():
    text = DOCS.read_text()
    assert [rule["alert"] for rule in RULES if f"`{rule['alert']}`" not in text] == []


def test_samples_are_read_as_prometheus_reads_them():
    assert samples_of('a_total{b="1",a="2"} 3\n') == {("a_total", "2", "1"): 3.0}
