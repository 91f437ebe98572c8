"""The checker, on small histories that were made by real shards, ledgers and snapshots; and on the
same with something in them that cannot be."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from distbelief.chaos.checker import Checker
from distbelief.chaos.gradients import gradient
from distbelief.chaos.standing import Standing
from distbelief.job import Job
from distbelief.param_server import ledger as ledgers
from distbelief.param_server.history import History
from distbelief.param_server.layout import Group
from distbelief.param_server.ledger import Ledger, recall
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.snapshot import SnapshotStore
from tests.param_server.jobs import RUN, TOKEN, Peer, make_contract, make_layout

LAYOUT = make_layout(("flat", (187,), 0), groups=(Group(lr=1.0),))
CONTRACT = make_contract(LAYOUT)
WORKERS = 2


class Drama:
    """A run of one shard, acted out on one thread and written down as real processes do."""

    def __init__(self, folder):
        self.folder = folder
        self.store = SnapshotStore(folder / "snapshots" / "shard0")
        self.epoch = 0
        self.ledger: Ledger = None  # type: ignore[assignment]
        self.peers = {}
        self.histories = {}
        self.sent = {}
        self.faults = []
        folder.mkdir()
        (folder / "config.toml").write_text(Job().to_toml())
        self.begin()
        self.join("w0").init(torch.zeros(LAYOUT.total))
        self.join("w1")
        self.save()

    def begin(self):
        if self.ledger is not None:
            self.ledger.close()
        self.epoch += 1
        self.store.claim(self.epoch)
        found = self.store.latest()
        image = None if found is None else found[0]
        self.ledger = Ledger(self.store.folder, self.epoch, keeps_all=True)
        config = ShardConfig(run=RUN, token=TOKEN, num_workers=WORKERS, epoch=self.epoch)
        self.shard = Shard(config, image, on_push=self.ledger.write)
        if image is not None:
            recall(self.shard, image, self.store.folder)
        self.ledger.begin(image)
        for (w, inc), peer in self.peers.items():
            self.peers[w, inc] = replace(peer, shard=self.shard, ep=self.epoch)

    def join(self, w, inc=1):
        peer = self.peers[w, inc] = Peer(self.shard, w, inc, self.epoch)
        self.histories[w, inc] = History(self.folder / "history", w, inc)
        peer.hello(CONTRACT, first=0)
        return peer

    def push(self, w, inc=1, seq=None, again=False):
        seq = seq or self.sent.get((w, inc), 0) + 1
        self.sent[w, inc] = max(seq, self.sent.get((w, inc), 0))
        if not again:
            self.histories[w, inc].push(seq, 1)
        grad = gradient(LAYOUT.total, WORKERS, int(w[1:]), inc, seq)
        ack = self.peers[w, inc].push_all(grad, seq)
        self.histories[w, inc].ack(0, ack, again=again)
        return ack

    def save(self):
        image = self.shard.image()
        start = self.ledger.turn()
        self.store.save(image)
        image.release()
        self.shard.mark_durable(image)
        self.ledger.forget(start, self.store.keep)

    def kill(self, **first):
        """Kill the shard; the next one hears of each living worker what it can still send."""
        at = json.loads(self.lines("w0", 1)[-1])["at"]
        self.faults.append({"kind": "kill", "target": "shard0", "pid": 1, "at": at, "until": at})
        self.begin()
        for (name, inc), peer in self.peers.items():
            if name in first:
                peer.hello(CONTRACT, first=first[name], inc=inc, ep=self.epoch - 1)

    def end(self):
        self.save()
        report = {**self.shard.stats(), "epoch": self.epoch}
        (self.folder / "shards.json").write_text(json.dumps([report]))
        text = "".join(json.dumps(fault) + "\n" for fault in self.faults)
        (self.folder / "faults.jsonl").write_text(text)
        return self

    def lines(self, w, inc):
        return (self.folder / f"history/{w}-{inc:06d}.jsonl").read_text().splitlines()

    def check(self):
        return Checker(self.folder).check(gradients=True)


@pytest.fixture
def drama(tmp_path):
    made = Drama(tmp_path / "run")
    yield made
    made.ledger.close()
    for history in made.histories.values():
        history.close()


def rules(violations):
    return sorted({text.partition(":")[0] for text in violations})


def test_a_quiet_run_is_as_it_should_be(drama):
    for _ in range(4):
        drama.push("w0")
        drama.push("w1")
    verdict = drama.end().check()
    assert verdict.violations == []
    assert (verdict.acked, verdict.lost, verdict.kills) == (8 * 3, 0, 0)


def test_what_is_sent_again_after_a_kill_is_no_loss(drama):
    drama.push("w0")
    drama.save()
    drama.push("w0")
    drama.kill(w0=2, w1=1)
    drama.push("w0", seq=2, again=True)
    drama.push("w0")
    drama.push("w1")
    verdict = drama.end().check()
    assert verdict.violations == []
    assert (verdict.lost, verdict.undone, verdict.kills) == (0, 3, 1)
    assert len(verdict.recovery_s) == 1


def test_a_double_fault_is_counted_the_same_by_shard_and_checker(drama):
    drama.push("w0")
    drama.push("w1")
    drama.kill(w1=1)
    drama.push("w1", seq=1, again=True)
    drama.join("w0", inc=2)  # what its first incarnation had pushed is nobody's now
    drama.push("w0", inc=2)
    verdict = drama.end().check()
    assert verdict.violations == []
    assert verdict.lost == verdict.lost_double_fault == 3


def test_a_loss_that_no_shard_counts_is_found(drama):
    drama.push("w0")
    drama.push("w0")
    for name in ledgers.names(drama.store.folder):  # it forgets, and the checker does not
        (drama.store.folder / name).rename(drama.folder / name)
    drama.kill(w0=3, w1=1)
    for name in ledgers.names(drama.folder):
        shutil.copy(drama.folder / name, drama.store.folder / name)
    drama.push("w0", seq=3)
    drama.push("w1")
    verdict = drama.end().check()
    assert rules(verdict.violations) == ["I1"]
    assert "are lost, the shards count 0" in verdict.violations[0]


def test_values_that_are_not_what_was_pushed_are_found(drama):
    drama.push("w0")
    next(iter(drama.shard.parts.values())).values[40] += 1
    verdict = drama.end().check()
    assert rules(verdict.violations) == ["I2"]


def test_a_push_that_was_applied_twice_is_found(drama):
    drama.push("w0")
    for part in drama.shard.parts.values():
        part.table.clear()
    drama.push("w0", seq=1, again=True)
    assert "I1" in rules(drama.end().check().violations)


def test_an_answer_that_no_ledger_has_is_found(drama):
    ack = drama.push("w0")
    drama.histories["w0", 1].push(2, 1)
    drama.histories["w0", 1].ack(0, replace(ack, seq=2), again=False)
    found = rules(drama.end().check().violations)
    assert found == ["I1", "I9"]


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"ep": 0}, "I4"),
        ({"version": (0, 0, 0)}, "I4"),
        ({"durable": (9, 9, 9)}, "I4"),
    ],
)
def test_a_client_that_sees_time_go_back_is_found(drama, changed, rule):
    drama.push("w0")
    ack = drama.push("w0")
    drama.histories["w0", 1].ack(0, replace(ack, **changed), again=True)
    assert rule in rules(drama.end().check().violations)


def test_a_ghost_that_was_heard_is_found(drama):
    drama.push("w0")
    drama.join("w0", inc=2)
    drama.push("w0", inc=2)
    drama.shard._incarnations.clear()
    for part in drama.shard.parts.values():
        part.table["w0"] = part.table["w0"]._replace(inc=1, seq=1)
    drama.peers["w0", 1].hello(CONTRACT, first=0)
    drama.push("w0", inc=1)
    assert "I5" in rules(drama.end().check().violations)


def test_a_worker_that_was_left_without_an_answer_is_found(drama):
    drama.push("w0")
    drama.push("w1")
    at = json.loads(drama.lines("w1", 1)[-1])["at"]
    drama.faults.append({"kind": "pause", "target": "w0", "pid": 1, "at": at, "until": at + 1})
    assert rules(drama.end().check().violations) == ["I7"]


def test_memory_over_its_limit_is_found(drama):
    budget = Job().net.budget_mb * 2**20
    lines = [
        {"name": "base", "anon": 1000},
        {"name": "shard0", "anon": 1000 + budget + 64 * 2**20},
        {"name": "shard0", "anon": 1000 + budget + 65 * 2**20, "at": 1.0},
    ]
    drama.push("w0")
    (drama.folder / "memory.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    verdict = drama.end().check()
    assert rules(verdict.violations) == ["I6"]
    assert len(verdict.violations) == 1


def test_an_epoch_that_begins_twice_is_found(drama):
    drama.push("w0")
    drama.ledger.begin(None)
    assert "I5" in rules(drama.end().check().violations)


def test_a_run_without_a_whole_snapshot_has_lost_everything(drama):
    drama.push("w0")
    drama.end()
    for file in drama.store.folder.glob("e*/manifest.json"):
        file.write_text("")
    violations = drama.check().violations
    assert any("all that shard0 had is lost" in text for text in violations)


def test_a_line_that_was_cut_off_by_a_kill_is_no_mistake(drama):
    drama.push("w0")
    drama.end()
    with (drama.folder / "history/w0-000001.jsonl").open("a") as file:
        file.write('{"op": "push", "se')
    assert drama.check().violations == []


def test_standing_tells_what_is_on_disk_and_what_would_be_lost(drama):
    drama.push("w0")
    drama.save()
    drama.push("w0")
    now = Standing(drama.store.folder)
    assert not now.is_saved("w0", 1)
    assert now.has_all("w0", 1)
    assert now.is_saved("w1", 1)
    drama.begin()
    restarted = Standing(drama.store.folder)
    assert not restarted.has_all("w0", 1)
    drama.peers["w0", 1].hello(CONTRACT, first=2, ep=1)
    drama.push("w0", seq=2, again=True)
    assert Standing(drama.store.folder).has_all("w0", 1)
    drama.save()
    assert Standing(drama.store.folder).is_saved("w0", 1)
