"""What /metrics costs the monitor: python -m tests.bench.scrape WORKERS. Run by hand."""

import sys
from time import process_time

from distbelief.monitor.metrics import Metrics
from distbelief.monitor.simulate import Simulation
from distbelief.monitor.store import Store
from distbelief.param_server.report import WorkerReport

SECONDS = 30


def main() -> None:
    simulation = Simulation(int(sys.argv[1]), 4)
    metrics, store = Metrics(), Store()
    told = [list(simulation.until(float(second))) for second in range(1, SECONDS + 1)]
    began = process_time()
    for messages in told:
        for message in messages:
            metrics.take(message)
    spent_s = process_time() - began
    num = sum(isinstance(one, WorkerReport) for messages in told for one in messages)
    print(f"take: {1e6 * spent_s / num:.1f} us a worker's report, {100 * spent_s / SECONDS:.2f} %")
    for messages in told:
        for message in messages:
            store.take(message, message.at)
        store.advance(message.at)
    for accept in ("", "application/openmetrics-text; version=1.0.0"):
        costs_s = []
        for _ in range(9):
            began = process_time()
            body, content_type = metrics.render(store, accept)
            costs_s.append(process_time() - began)
        cost_ms = 1000 * sorted(costs_s)[4]
        lines = body.count(b"\n")
        print(f"{content_type}: {lines} lines, {len(body)} bytes, {cost_ms:.1f} ms")


if __name__ == "__main__":
    main()
