"""What a real run tells Prometheus and TensorBoard, by its monitor over HTTP."""

import json
import time
import urllib.request
from urllib.parse import parse_qs, urlsplit

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics

from distbelief.launcher import launch
from distbelief.monitor.metrics import FAMILIES
from tests.helpers.metrics import labels_by_name, samples_of
from tests.helpers.queries import QUERIES, check_query
from tests.helpers.runs import Watch, tiny_job

pytestmark = pytest.mark.integration

NOT_HERE = {
    "distbelief_validation_loss",  # measured when training is over
    "distbelief_checkpoint_last_success_timestamp_seconds",  # nor is it saved before
    "distbelief_checkpoint_duration_seconds",
    "distbelief_fetch_duration_seconds",  # answers to pushes bring the parameters
}
"""A short run has none of these, or has them only at its end."""


class Scraper:
    """Reads /metrics every half second."""

    def __init__(self, runs):
        self.runs, self.texts, self.read_at = runs, [], 0.0

    def __call__(self, progress):
        files = list(self.runs.glob("*/monitor.json"))
        if not files or progress.samples < 200 or time.monotonic() - self.read_at < 0.5:
            return
        self.read_at = time.monotonic()
        link = urlsplit(json.loads(files[0].read_text())["url"])
        (key,) = parse_qs(link.query)["k"]
        headers = {"Authorization": f"Bearer {key}", "Accept": "application/openmetrics-text"}
        for accept in ("application/openmetrics-text; version=1.0.0", "text/plain"):
            request = urllib.request.Request(
                f"{link.scheme}://{link.netloc}/metrics", headers=headers | {"Accept": accept}
            )
            with urllib.request.urlopen(request, timeout=10) as reply:
                self.texts.append(reply.read().decode())


def test_a_live_run_has_every_metric_that_alerts_and_grafana_ask_for(user_folder):
    pytest.importorskip("tensorboard")
    runs = user_folder / "runs"
    scraper = Scraper(runs)
    changes = {
        "model.factory": "tiny:Slow",
        "train.batch_size": 16,
        "workers": 2,
        "shards": 2,
        "until": "4s",
        "train.log_grad_norm": True,
        "monitor.on": True,
        "monitor.log": ["tensorboard"],
    }
    result = launch(tiny_job(runs, **changes), live=Watch(scraper))
    assert result.exit == "done", result.error
    openmetrics, text = scraper.texts[-2:]
    assert openmetrics.endswith("# EOF\n")
    seen = {
        family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        for family in read_openmetrics(openmetrics)
    }
    assert set(FAMILIES) - seen - NOT_HERE == set()
    exported = labels_by_name(text)
    for _, expr in QUERIES:
        if not any(name in expr for name in NOT_HERE):
            check_query(expr, exported)
    got = samples_of(text)
    workers = {key[-1] for key in got if key[0] == "distbelief_worker_last_push_timestamp_seconds"}
    assert workers == {"w0", "w1"}
    updates = max(value for key, value in got.items() if key[0] == "distbelief_updates_total")
    assert 0 < updates <= result.updates
    assert 0 < got["distbelief_samples_total",] <= result.samples
    assert got["distbelief_staleness_updates_count",] > 0
    assert got["distbelief_logger_errors_total", "tensorboard"] == 0.0
    # Counters only rise from one scrape to the next.
    before = samples_of(scraper.texts[1])
    for key, value in before.items():
        if key[0].endswith(("_total", "_count", "_bucket")):
            assert got[key] >= value, key

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = runs.glob("*/tensorboard")
    board = EventAccumulator(str(folder)).Reload()
    losses = board.Scalars("train/loss")
    assert losses
    assert [one.step for one in losses] == sorted({one.step for one in losses})
    assert losses[-1].step <= result.updates
