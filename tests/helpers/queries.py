"""The queries of alert rules and of the Grafana dashboard, and the check of one."""

import json
import re
from importlib.resources import files

import yaml

FOLDER = files("distbelief.monitor") / "observability"
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())
GRAFANA = json.loads((FOLDER / "grafana.json").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]

TARGET = {"job", "instance"}
"""Labels that Prometheus adds to whatever it scrapes."""
VARIABLES = {"$__rate_interval": "1m", "$__interval": "1m", "$run": "7f3ac1"}
NAME = re.compile(r"\bdistbelief_[a-z_]+")
SELECTOR = re.compile(r"\b(distbelief_[a-z_]+)\{([^}]*)\}")
GROUPING = re.compile(r"\b(?:by|on|without|group_left) \(([^)]*)\)")


def panels():
    return [panel for panel in GRAFANA["panels"] if panel["type"] != "row"]


def queries():
    """(where, expression with its variables filled in)"""
    found = [(rule["alert"], rule["expr"]) for rule in RULES]
    for panel in panels():
        found += [(panel["title"], target["expr"]) for target in panel["targets"]]
    for note in GRAFANA["annotations"]["list"]:
        if not note.get("builtIn"):
            found.append((f"annotation {note['name']}", note["expr"]))
    for i, (where, expr) in enumerate(found):
        for variable, value in VARIABLES.items():
            expr = expr.replace(variable, value)
        found[i] = where, expr
    return found


QUERIES = queries()


def check_query(expr, exported):
    """That all its names are exported, and have the labels that are asked for."""
    names = set(NAME.findall(expr))
    assert names
    assert names <= set(exported), names - set(exported)
    for name, matchers in SELECTOR.findall(expr):
        asked = {part.strip() for part in re.findall(r"([^,=!~]+)(?:=|!=|=~|!~)\"", matchers)}
        assert asked <= exported[name] | TARGET, (name, asked)
    known = set().union(*(exported[name] for name in names)) | TARGET
    for words in GROUPING.findall(expr):
        asked = {word.strip() for word in words.split(",") if word.strip()}
        assert asked <= known, asked
