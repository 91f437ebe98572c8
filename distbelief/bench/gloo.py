"""Gloo: the synchronous alternative: all workers add up their gradients, then step as one.

There is no server; each worker keeps the parameters and the momentum. Everyone waits for the
slowest. A worker's step counts as a round, as with the others.
"""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from distbelief.bench.board import HOLD_S, Order
from distbelief.bench.floor import CHUNK
from distbelief.bench.station import Station
from distbelief.bench.system import System
from distbelief.bench.work import apply_

GLOO = System(
    name="gloo all-reduce",
    transport="tcp",
    worker="distbelief.bench.gloo:work",
    has_folder=True,
    is_synchronous=True,
    is_whole=True,
    tolerance=None,
)


def work(station: Station) -> None:
    """Be a worker; `sleeps`, if given, are the seconds that each one computes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    spec = station.spec
    station.hear()
    # A file, because a TCP store listens at every interface.
    store = FileStore(str(Path(spec["folder"]) / "gloo"), spec["workers"])
    dist.init_process_group("gloo", store=store, rank=spec["index"], world_size=spec["workers"])
    try:
        worker = _Worker(station)
        station.say()
        worker.run()
    finally:
        dist.destroy_process_group()


class _Worker:
    """Rounds in lock-step. That they end is agreed upon: by one more element of the vector."""

    def __init__(self, station: Station) -> None:
        spec = station.spec
        self._seat = station.seat
        self._num_workers = spec["workers"]
        self._compute_s = spec["sleeps"][spec["index"]] if "sleeps" in spec else 0.0
        self._batch = spec.get("batch", 1)
        self._samples = 0
        self._vector = torch.ones(spec["numel"] + 1)
        """The gradient, and at its end how many workers want another round."""
        self._grad = self._vector[:-1]
        self._values, self._momentum = torch.zeros(spec["numel"]), torch.zeros(spec["numel"])

    def run(self) -> None:
        seat = self._seat
        while (order := seat.follow(word := seat.word)) is not Order.STOP:
            if order is Order.HOLD:
                time.sleep(HOLD_S)
                continue
            while self._do_round(wants_more=order is not Order.STEP and seat.word == word):
                if order is Order.CHECK:
                    self._look()
            seat.publish(float(self._values.min()), float(self._values.max()))
            while seat.word == word:  # somebody saw another order: it comes here too
                time.sleep(HOLD_S)

    def _do_round(self, *, wants_more: bool) -> bool:
        """One round. Returns: all want another one."""
        if self._compute_s:
            time.sleep(self._compute_s)
        self._vector[-1] = float(wants_more)
        dist.all_reduce(self._vector)
        wanting = float(self._vector[-1])
        self._grad.div_(self._num_workers)  # 1 again
        apply_(self._values, self._grad, self._momentum)
        self._seat.tick()
        self._samples += self._batch
        self._seat.take_samples(self._samples)
        return bool(wanting == self._num_workers)

    def _look(self) -> None:
        pieces = torch.split(self._values, CHUNK)
        torn = sum(bool(piece.min() != piece.max()) for piece in pieces)
        self._seat.look(len(pieces), torn)
