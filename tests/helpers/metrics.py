"""A simulated run in which every metric has something to say, and how metrics are read."""

from dataclasses import replace

from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families

from distbelief.chronicle import Begin
from distbelief.monitor.metrics import Metrics
from distbelief.monitor.simulate import Fault, Simulation
from distbelief.monitor.store import Store
from distbelief.param_server.report import WorkerReport

START = 1e9


def full_run(num_workers=4, seconds=70, per_worker=256, **options):
    """(metrics, store, simulation) after some seconds in which a worker was lost and came back."""
    store = Store()
    metrics = Metrics(per_worker, loggers=lambda: {"tensorboard": (2, 7)})
    faults = [Fault(kind="crash", who="w1", start=8.0, end=15.0)]
    simulation = Simulation(num_workers, 2, start=START, faults=faults, **options)
    for second in range(1, seconds + 1):
        for message in simulation.until(float(second)):
            if isinstance(message, Begin):
                config = message.config | {"save": {"every_s": 60.0}}
                message = structs.replace(message, config=config)
            if isinstance(message, WorkerReport):
                # The simulation knows no fetch that is not the answer to a push.
                odd = tuple(i % 2 == 0 for i in range(len(message.trip_is_push)))
                message = replace(message, trip_is_push=odd)
            store.take(message, message.at)
            metrics.take(message)
        store.advance(START + second)
    end = simulation.end()
    end.result["eval"] = {"loss": 0.5, "top1": 0.75}
    store.take(end, end.at)
    metrics.take(end)
    return metrics, store, simulation


def samples(metrics, store):
    """(name, label values in the order of their names) -> value, by prometheus_client's parser."""
    text = metrics.render(store)[0].decode()
    return samples_of(text)


def samples_of(text):
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labels_by_name(text):
    """Every name of a sample, and the labels that it really has."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found
