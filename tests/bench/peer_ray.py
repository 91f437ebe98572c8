"""PeerRay: the asynchronous parameter server of Ray's documentation.

A ParameterServer actor with torch.optim.SGD; workers compute gradients on weights they are
given; a driver waits for whichever gradients are there, hands them to `apply_gradients`, and gives
what that returns to the worker for its next `compute_gradients`. Source: Ray documentation,
"Parameter Server", asynchronous training. Several servers share the tensors.
"""

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from distbelief.bench.board import HOLD_S, Board, Order
from distbelief.bench.station import Station
from distbelief.bench.system import System
from distbelief.bench.work import LR, MOMENTUM, Work
from tests.bench.peer_rpc import shares

RAY = System(
    name="ray documented",
    transport="its own",
    worker="tests.bench.peer_ray:drive",
    has_folder=True,
    is_one_process=True,
)
STORE_BYTES = 2 * 2**30
TIMEOUT_S = 60.0


class ParameterServer:
    """One actor: some of the tensors."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        torch.set_num_threads(1)
        self.parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        self.optimizer = torch.optim.SGD(self.parameters, lr=LR, momentum=MOMENTUM, fused=True)

    def pid(self) -> int:
        return os.getpid()

    def apply_gradients(self, *gradients: list[Any]) -> list[Any]:
        """Any: numpy arrays; Ray's are read only, hence the copy that `sum` makes."""
        summed = [np.stack(one).sum(axis=0) for one in zip(*gradients, strict=True)]
        self.optimizer.zero_grad()
        for parameter, gradient in zip(self.parameters, summed, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        self.optimizer.step()
        return self.get_weights()

    def get_weights(self) -> list[Any]:
        return [parameter.detach().numpy() for parameter in self.parameters]


class DataWorker:
    """One actor: a replica whose gradients are there already."""

    def __init__(self, by_server: Sequence[Sequence[tuple[int, ...]]]) -> None:
        torch.set_num_threads(1)
        self.gradients = [[np.ones(shape, np.float32) for shape in shapes] for shapes in by_server]
        self.weights = [[np.zeros(shape, np.float32) for shape in shapes] for shapes in by_server]

    def compute_gradients(self, *weights: list[Any]) -> Any:
        """Any: one list of arrays for each server; with one server that list itself."""
        for mine, new in zip(self.weights, weights, strict=True):
            for target, source in zip(mine, new, strict=True):
                np.copyto(target, source)
        return self.gradients[0] if len(self.gradients) == 1 else tuple(self.gradients)


def drive(station: Station) -> None:
    """Play all workers' seats."""
    spec = station.spec
    station.hear()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        address="local",
        num_cpus=spec["workers"] + spec["shards"],
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=STORE_BYTES,
        _node_ip_address="127.0.0.1",
        _temp_dir=spec["folder"],
    )
    try:
        _Loop(station).run()
    finally:
        ray.shutdown()


class _Loop:
    def __init__(self, station: Station) -> None:
        spec = station.spec
        board = Board.open(spec["board"])
        by_server = shares(Work.from_dict(spec["work"]), spec["shards"])
        self._seats = [board.seat(index) for index in range(spec["workers"])]
        server = ray.remote(num_cpus=1)(ParameterServer)
        worker = ray.remote(num_cpus=1)(DataWorker)
        # Any: what ray makes of a method has no type of its own.
        self._servers: list[Any] = [server.remote(shapes) for shapes in by_server]
        self._workers: list[Any] = [worker.remote(by_server) for _ in self._seats]
        self._current = [server.get_weights.remote() for server in self._servers]
        self._pending: dict[Any, tuple[int, list[Any]]] = {}
        pids = ray.get([server.pid.remote() for server in self._servers])
        for index in range(len(self._workers)):  # all actors are up after that
            self._ask(index)
        while self._pending:
            self._take_one()
        station.say(server_pids=pids)

    def run(self) -> None:
        """Rounds as ordered. All seats have one order, but where one of them steps alone."""
        done = -1
        while True:
            words = [seat.word for seat in self._seats]
            orders = [seat.follow(word) for seat, word in zip(self._seats, words, strict=True)]
            if Order.STOP in orders:
                return
            if orders[0] is Order.STEP and words[0] != done:
                done = words[0]
                self._ask(0)
                self._take_one()
                self._publish()
            elif orders[0] in (Order.RUN, Order.CHECK):
                self._rounds(words[0], orders[0])
            else:
                time.sleep(HOLD_S)

    def _rounds(self, word: int, order: Order) -> None:
        for index in range(len(self._workers)):
            self._ask(index)
        while self._pending:
            index = self._take_one()
            if order is Order.CHECK:
                self._look(index)
            if self._seats[0].word == word:
                self._ask(index)
        ray.wait(self._current, num_returns=len(self._current), timeout=TIMEOUT_S)

    def _ask(self, index: int) -> None:
        method = self._workers[index].compute_gradients.options(num_returns=len(self._servers))
        refs = method.remote(*self._current)
        refs = refs if isinstance(refs, list) else [refs]
        self._pending[refs[0]] = index, refs

    def _take_one(self) -> int:
        """Apply whichever gradients are there first. Returns: whose they were."""
        ready, _ = ray.wait(list(self._pending), timeout=TIMEOUT_S)
        index, refs = self._pending.pop(ready[0])
        self._current = [
            server.apply_gradients.remote(ref)
            for server, ref in zip(self._servers, refs, strict=True)
        ]
        self._seats[index].tick()
        return index

    def _look(self, index: int) -> None:
        arrays = [array for part in ray.get(self._current, timeout=TIMEOUT_S) for array in part]
        self._seats[index].look(len(arrays), sum(bool(np.ptp(array)) for array in arrays))

    def _publish(self) -> None:
        arrays = [array for part in ray.get(self._current, timeout=TIMEOUT_S) for array in part]
        low, high = min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays)
        self._seats[0].publish(low, high)
