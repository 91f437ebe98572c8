"""TensorBoard: event files under RUN/tensorboard, by the package `tensorboard` alone.

No torch and no tensorflow. A file each time the monitor starts; TensorBoard shows those of one
folder as one run. Written and flushed by whoever calls, so that a full disk is heard of here.
"""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from distbelief.chronicle import Begin, Event
from distbelief.monitor.logger import package

FOLDER = "tensorboard"


class TensorBoard:
    """A Logger (logger.py)."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._path: Path | None = None
        # Any: the package ships no types.
        self._writer: Any = None
        self._proto: Any = None
        self._summary: Any = None
        self._tensor: Any = None

    def start(self, begin: Begin) -> None:
        record = package("tensorboard.summary.writer.record_writer", self.name)
        self._proto = package("tensorboard.compat.proto.event_pb2", self.name)
        self._summary = package("tensorboard.compat.proto.summary_pb2", self.name)
        self._tensor = package("tensorboard.compat.proto.tensor_pb2", self.name)
        folder = Path(begin.run_path) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()  # two in one second are two files
        name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now}"
        self._writer = record.RecordWriter((folder / name).open("wb"))
        self._write(self._proto.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        value = self._summary.Summary.Value
        self._add([value(tag=tag, simple_value=number) for tag, number in values.items()], step)

    def histogram(
        self, name: str, edges: Sequence[float], counts: Sequence[int], step: int
    ) -> None:
        # Values are whole, and an edge is the first that is no more in its bin.
        middles = [(low + high - 1) / 2 for low, high in pairwise(edges)]
        histo = self._summary.HistogramProto(
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(m * n for m, n in zip(middles, counts, strict=True)),
            sum_squares=sum(m * m * n for m, n in zip(middles, counts, strict=True)),
            bucket_limit=list(edges[1:]),
            bucket=list(counts),
        )
        self._add([self._summary.Summary.Value(tag=name, histo=histo)], step)

    def event(self, event: Event, step: int) -> None:
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        tensor = self._tensor.TensorProto(
            dtype=7,  # DT_STRING
            string_val=[f"`{event.who or 'run'}` {_plain(event.text)}".encode()],
        )
        tensor.tensor_shape.dim.add(size=1)
        value = self._summary.Summary.Value(
            tag=f"events/{event.kind}",
            metadata=self._summary.SummaryMetadata(plugin_data=plugin),
            tensor=tensor,
        )
        self._add([value], step, event.at)

    def finish(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, values: list[Any], step: int, at: float | None = None) -> None:
        summary = self._summary.Summary(value=values)
        wall = time.time() if at is None else at
        self._write(self._proto.Event(wall_time=wall, step=step, summary=summary))

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def _plain(text: str) -> str:
    """TensorBoard reads texts as Markdown: what a worker has said is shown as it is."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-.!|&" else c for c in text)
