"""Checker: reads what the processes of a run have written down, and says whether it can be true.

    python -m distbelief.chaos.checker RUN_FOLDER [--gradients]

A program of its own: it shares no state with the run, and works everything out anew from
the shards' ledgers, their last snapshots, the workers' histories and the list of faults.

The lineage of a shard is what its last epoch has applied, before that what the snapshot it began
from had of the epoch before, and so on to the first. What else was applied is undone.

    I1  exactly once: in the lineage every worker's seqs are each there once, in order, without a
        hole but for counted losses; what was acknowledged and is not there is counted as lost
    I2  the parameters are the lineage's pushes applied again, to the bit        (--gradients)
    I3  they are minus the sum of its pushes, in whatever order, to the bit      (--gradients)
    I4  no client sees (epoch, version) of a part fall, nor what is durable
    I5  no client takes an ack of an earlier epoch after one of a later, and no part takes a push
        of an incarnation after one of a later incarnation of that worker
    I6  no shard takes more memory than its budget
    I7  every live worker is answered within 5 s of the last fault, nobody waits more than 30 s
    I8  the staleness that was told of each push is the number of pushes of others in between
    I9  the shards' own counters say the same as their ledgers
"""

import argparse
import json
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distbelief.chaos.gradients import gradient
from distbelief.chaos.verdict import Verdict
from distbelief.param_server import ledger
from distbelief.param_server.errors import SnapshotCorrupt
from distbelief.param_server.image import ShardImage
from distbelief.param_server.ledger import Begun, Record
from distbelief.param_server.snapshot import SnapshotStore

ANSWER_S = 5.0
WAIT_S = 30.0
SPARE = 64 * 2**20
"""Bytes that a shard may take beside its budget and twice its state."""
TOLD_MAX = 10
"""Violations of one kind that are told one by one."""

Line = Mapping[str, Any]  # Any: JSON


class Push(NamedTuple):
    """A part of a push, as a shard applied it."""

    w: str
    inc: int
    seq: int
    part: int


@dataclass(slots=True)
class Applied:
    """One application to one part."""

    push: Push
    epoch: int
    version: int
    base: int
    bseq: int
    staleness: int
    at: float


class _Violations:
    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.texts: list[str] = []

    def add(self, rule: str, text: str) -> None:
        self._counts[rule] += 1
        if self._counts[rule] <= TOLD_MAX:
            self.texts.append(f"{rule}: {text}")

    def end(self) -> list[str]:
        more = [
            f"{rule}: {count - TOLD_MAX} more of these"
            for rule, count in self._counts.items()
            if count > TOLD_MAX
        ]
        return self.texts + more


class ShardHistory:
    """What one shard has done, over all its epochs."""

    def __init__(self, folder: Path) -> None:
        """folder: of its snapshots and ledgers.

        Raises: SnapshotCorrupt if no snapshot is whole; ValueError if there is none.
        """
        found = SnapshotStore(folder).latest()
        if found is None:
            raise ValueError(f"{folder} holds no snapshot")
        self.name = folder.name
        self.image: ShardImage = found[0]
        self.begun: dict[int, Begun] = {}
        self.records: dict[int, list[Record]] = defaultdict(list)
        self.again: list[int] = []
        """Epochs that began although they, or later ones, had begun before."""
        for entry in ledger.read(folder):
            if isinstance(entry, Begun):
                if entry.epoch <= max(self.begun, default=0):
                    self.again.append(entry.epoch)
                else:
                    self.begun[entry.epoch] = entry
            else:
                self.records[entry.epoch].append(entry)
        self._applied: dict[tuple[int, int], list[Applied]] = defaultdict(list)
        """By epoch and part, in their order."""
        for epoch, records in self.records.items():
            for record in records:
                for one in _applied(record):
                    self._applied[epoch, one.push.part].append(one)

    @property
    def parts(self) -> list[int]:
        return [part.index for part in self.image.parts]

    def lineage(self, part: int) -> list[Applied]:
        """What the part's values are made of, in its order."""
        return self._until(max(self.begun, default=1), part, None)

    def before(self, epoch: int, part: int) -> list[Applied]:
        """What the part had taken when an epoch began."""
        begun = self.begun.get(epoch)
        if begun is None or not begun.of_epoch:
            return []
        version = dict(zip(begun.part, begun.version, strict=True))[part]
        return self._until(begun.of_epoch, part, version)

    def all_applied(self, part: int) -> Iterator[Applied]:
        """Everything that was ever applied to a part, undone or not."""
        for epoch in sorted(self.records):
            yield from self._applied.get((epoch, part), [])

    def of_epoch(self, epoch: int, part: int) -> list[Applied]:
        return self._applied.get((epoch, part), [])

    def _until(self, epoch: int, part: int, version: int | None) -> list[Applied]:
        found = [
            one
            for one in self._applied.get((epoch, part), [])
            if version is None or one.version <= version
        ]
        return [*self.before(epoch, part), *found]


def _applied(record: Record) -> Iterator[Applied]:
    for column, part in enumerate(record.part):
        if record.status[column] == "applied":
            yield Applied(
                Push(record.w, record.inc, record.seq, part),
                record.epoch,
                record.version[column],
                record.base[column],
                record.bseq[column],
                record.staleness[column],
                record.at,
            )


class Checker:
    """Checks one run; see the top of this file."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._wrong = _Violations()
        self.shards: list[ShardHistory] = []
        for folder in sorted((run / "snapshots").glob("shard*")):
            try:
                self.shards.append(ShardHistory(folder))
            except (SnapshotCorrupt, ValueError) as error:
                self._wrong.add("I1", f"all that {folder.name} had is lost: {error}")
        self.workers = {
            (path.stem.rpartition("-")[0], int(path.stem.rpartition("-")[2])): _lines(path)
            for path in sorted((run / "history").glob("*.jsonl"))
        }
        self.faults = _lines(run / "faults.jsonl")
        self.reports: list[Line] = _json(run / "shards.json") or []
        self._budget = _budget(run)
        self.verdict = Verdict()

    def check(self, *, gradients: bool) -> Verdict:
        """gradients: of gradients.py; without it the values cannot be worked out again."""
        verdict = self.verdict
        verdict.kills = sum(fault["kind"] == "kill" for fault in self.faults)
        self._exactly_once()
        if gradients:
            self._values()
            verdict.checked += ["I2", "I3"]
        self._monotone()
        self._fencing()
        self._memory()
        self._liveness()
        self._staleness()
        self._accounting()
        self._recoveries()
        verdict.checked += ["I1", "I4", "I5", "I6", "I7", "I8", "I9"]
        verdict.checked.sort()
        verdict.violations = self._wrong.end()
        return verdict

    # The rules

    def _exactly_once(self) -> None:
        """I1."""
        verdict = self.verdict
        acked: set[Push] = set()
        intents: dict[tuple[str, int], int] = {}
        for (w, inc), lines in self.workers.items():
            intents[w, inc] = max((one["seq"] for one in lines if one["op"] == "push"), default=0)
            for line in _acks(lines):
                for part, status in zip(line["part"], line["status"], strict=True):
                    verdict.dups += status == "dup"
                    if status in ("applied", "dup"):
                        acked.add(Push(w, inc, line["seq"], part))
        verdict.acked = len(acked)
        lost: set[Push] = set()
        there: set[Push] = set()
        refused = self._refused()
        for shard in self.shards:
            tables = {part.index: part for part in shard.image.parts}
            for part in shard.parts:
                line_of_part = shard.lineage(part)
                there_here = {one.push for one in line_of_part}
                there |= there_here
                gone = {one.push for one in shard.all_applied(part)} - there_here
                lost |= gone
                verdict.applied += len(line_of_part)
                verdict.undone += sum(1 for _ in shard.all_applied(part)) - len(line_of_part)
                if tables[part].version != len(line_of_part):
                    self._wrong.add(
                        "I1",
                        f"{shard.name} part {part} is at version {tables[part].version}, its "
                        f"lineage has {len(line_of_part)} pushes",
                    )
                last: dict[tuple[str, int], int] = {}
                for one in line_of_part:
                    w, inc, seq, _ = one.push
                    missing = range(last.get((w, inc), 0) + 1, seq)
                    if seq <= last.get((w, inc), 0):
                        self._wrong.add("I1", f"{one.push} was applied again: {one}")
                    for hole in missing:
                        push = Push(w, inc, hole, part)
                        if push not in refused and push not in gone:
                            self._wrong.add("I1", f"{push} was passed over before seq {seq}")
                    last[w, inc] = seq
                    if seq > intents.get((w, inc), 0):
                        self._wrong.add("I1", f"{one.push} was applied and never pushed")
                for w, row in tables[part].table.items():
                    if row.seq < last.get((w, row.inc), 0):
                        self._wrong.add("I1", f"{shard.name} part {part}: {w} is at {row}")
        for push in sorted(acked - there - lost):
            self._wrong.add("I1", f"{push} was acknowledged and never applied")
        verdict.lost = len(lost)
        verdict.lost_double_fault = sum(report["lost_double_fault"] for report in self.reports)
        if verdict.lost != verdict.lost_double_fault:
            self._wrong.add(
                "I1",
                f"{verdict.lost} parts of acknowledged pushes are lost, the shards count "
                f"{verdict.lost_double_fault}; the first: {sorted(lost)[:3]}",
            )

    def _refused(self) -> set[Push]:
        return {
            Push(record.w, record.inc, record.seq, part)
            for shard in self.shards
            for records in shard.records.values()
            for record in records
            for part, status in zip(record.part, record.status, strict=True)
            if status not in ("applied", "dup", "gap", "conflict", "spent")
        }

    def _values(self) -> None:
        """I2 and I3."""
        names = {w for w, _ in self.workers}
        for shard in self.shards:
            layout = shard.image.contract.layout
            total, count = layout.total, len(names)
            for image in shard.image.parts:
                where = layout.parts[image.index]
                values = torch.zeros(where.numel)
                for one in shard.lineage(image.index):
                    w, inc, seq, _ = one.push
                    index = int(w.removeprefix("w"))
                    values -= gradient(total, count, index, inc, seq, where.start, where.stop)
                if not torch.equal(values, image.tensors["values"]):
                    wrong = torch.nonzero(values != image.tensors["values"])
                    at = int(wrong[0])
                    self._wrong.add(
                        "I2",
                        f"{shard.name} part {image.index}: {len(wrong)} values differ; element "
                        f"{where.start + at} is {float(image.tensors['values'][at])}, the lineage "
                        f"makes {float(values[at])}",
                    )

    def _monotone(self) -> None:
        """I4."""
        for (w, inc), lines in self.workers.items():
            seen: dict[int, tuple[int, int]] = {}
            durable: dict[int, int] = {}
            pushed = 0
            for line in lines:
                if line["op"] == "push":
                    pushed = line["seq"]
                    continue
                for part, version in zip(line["part"], line["version"], strict=True):
                    now = (line["ep"], version)
                    if now < seen.get(part, (0, 0)):
                        self._wrong.add("I4", f"{w}/{inc} part {part}: {now} after {seen[part]}")
                    seen[part] = now
                if line["op"] != "ack":
                    continue
                for part, seq in zip(line["part"], line["durable"], strict=True):
                    if seq < durable.get(part, 0):
                        self._wrong.add(
                            "I4", f"{w}/{inc} part {part}: durable {seq} after {durable[part]}"
                        )
                    if seq > pushed:
                        self._wrong.add("I4", f"{w}/{inc} part {part}: durable {seq} of {pushed}")
                    durable[part] = seq

    def _fencing(self) -> None:
        """I5."""
        for (w, inc), lines in self.workers.items():
            newest: dict[int, int] = {}
            for line in _acks(lines):
                if line["ep"] < newest.get(line["shard"], 0):
                    self._wrong.add(
                        "I5",
                        f"{w}/{inc} took an ack of shard {line['shard']} epoch {line['ep']} after "
                        f"one of {newest[line['shard']]}",
                    )
                newest[line["shard"]] = line["ep"]
        for shard in self.shards:
            for epoch in shard.again:
                self._wrong.add("I5", f"{shard.name} began epoch {epoch} again")
            for part in shard.parts:
                incs: dict[str, int] = {}
                for one in shard.lineage(part):
                    if one.push.inc < incs.get(one.push.w, 0):
                        self._wrong.add(
                            "I5", f"{one.push} was applied after incarnation {incs[one.push.w]}"
                        )
                    incs[one.push.w] = max(one.push.inc, incs.get(one.push.w, 0))

    def _memory(self) -> None:
        """I6: what whoever broke the run has seen of its memory; what is shared is not counted."""
        lines = _lines(self.run / "memory.jsonl")
        base = next((line["anon"] for line in lines if line["name"] == "base"), None)
        if base is None:
            return
        states = {
            shard.name: sum(t.nbytes for part in shard.image.parts for t in part.tensors.values())
            for shard in self.shards
        }
        for line in lines:
            limit = base + self._budget + 2 * states.get(line["name"], 0) + SPARE
            if line["anon"] > limit:
                self._wrong.add(
                    "I6",
                    f"{line['name']} had {line['anon'] / 2**20:.0f} MiB, its limit is "
                    f"{limit / 2**20:.0f} MiB",
                )

    def _liveness(self) -> None:
        """I7."""
        last_fault = max((fault["until"] for fault in self.faults), default=None)
        newest = {w: max(i for v, i in self.workers if v == w) for w, _ in self.workers}
        for (w, inc), lines in self.workers.items():
            open_since: dict[int, float] = {}
            acked_after: float | None = None
            longest = 0.0
            for line in lines:
                if line["op"] == "push":
                    open_since[line["seq"]] = line["at"]
                elif line["op"] == "ack":
                    waited = line["at"] - open_since.get(line["seq"], line["at"])
                    longest = max(longest, 0.0 if line["again"] else waited)
                    if last_fault is not None and line["at"] >= last_fault and acked_after is None:
                        acked_after = line["at"]
            if longest > WAIT_S:
                self._wrong.add("I7", f"{w}/{inc} waited {longest:.1f} s for an answer")
            if last_fault is None or newest[w] != inc:
                continue
            late_s = ANSWER_S if acked_after is None else acked_after - last_fault
            if late_s >= ANSWER_S:
                self._wrong.add("I7", f"{w}/{inc} had no answer for {late_s:.1f} s after faults")

    def _staleness(self) -> None:
        """I8."""
        for shard in self.shards:
            for part in shard.parts:
                for epoch in shard.records:
                    before = shard.before(epoch, part)
                    begins = len(before)
                    line_of_part = [*before, *shard.of_epoch(epoch, part)]
                    for one in line_of_part[begins:]:
                        between = line_of_part[one.base : one.version - 1]
                        me = one.push.w, one.push.inc
                        own = sum(
                            (other.push.w, other.push.inc) == me and other.push.seq > one.bseq
                            for other in between
                        )
                        if one.staleness != len(between) - own:
                            self._wrong.add(
                                "I8",
                                f"{one.push}: staleness {one.staleness} was told, {len(between)} "
                                f"pushes of which {own} its own came between: {one}",
                            )

    def _accounting(self) -> None:
        """I9."""
        for shard, report in zip(self.shards, self.reports, strict=False):
            records = shard.records.get(report["epoch"], [])
            counted = Counter(status for record in records for status in record.status)
            told = {s: n for s, n in report["counts"].items() if s in counted or s == "applied"}
            if {s: n for s, n in counted.items()} != told and counted:
                self._wrong.add("I9", f"{shard.name} counts {told}, its ledger {dict(counted)}")
        written = {
            (record.w, record.inc, record.seq, part, record.epoch, status)
            for shard in self.shards
            for records in shard.records.values()
            for record in records
            for part, status in zip(record.part, record.status, strict=True)
        }
        for (w, inc), lines in self.workers.items():
            for line in _acks(lines):
                for part, status in zip(line["part"], line["status"], strict=True):
                    if (w, inc, line["seq"], part, line["ep"], status) not in written:
                        self._wrong.add(
                            "I9", f"{w}/{inc} seq {line['seq']} part {part}: {status} in no ledger"
                        )

    def _recoveries(self) -> None:
        """From each kill of a shard to its next applied push."""
        for shard in self.shards:
            kills = [f for f in self.faults if f["kind"] == "kill" and f["target"] == shard.name]
            times = sorted(
                record.at
                for records in shard.records.values()
                for record in records
                if "applied" in record.status
            )
            for i, kill in enumerate(kills):
                following = kills[i + 1]["at"] if i + 1 < len(kills) else float("inf")
                after = next((at for at in times if at > kill["at"]), None)
                if after is None or after > following:
                    self.verdict.unrecovered += 1
                else:
                    self.verdict.recovery_s.append(after - kill["at"])


def _acks(lines: Iterable[Line]) -> Iterator[Line]:
    return (line for line in lines if line["op"] == "ack")


def _lines(path: Path) -> list[Line]:
    """The lines of a file; one that is torn at its end was not finished."""
    found: list[Line] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
    return found


def _budget(run: Path) -> int:
    """Bytes that a shard of the run may have under way."""
    job: Any = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))  # Any: TOML
    return int(job["net"]["budget_mb"]) * 2**20


def _json(path: Path) -> Any:  # Any: JSON
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def main() -> None:
    """Entry of the program: one line of JSON; exit code 1 where something is violated."""
    parser = argparse.ArgumentParser(prog="python -m distbelief.chaos.checker")
    parser.add_argument("run", type=Path)
    parser.add_argument("--gradients", action="store_true", help="they are of gradients.py")
    args = parser.parse_args()
    verdict = Checker(args.run).check(gradients=args.gradients)
    sys.stdout.write(verdict.to_json() + "\n")
    sys.exit(bool(verdict.violations))


if __name__ == "__main__":
    main()
