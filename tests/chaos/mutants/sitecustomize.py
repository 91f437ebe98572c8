"""Mutants: mistakes that a parameter server could make, put into every process of a run.

Python imports this file at its start where its folder is in PYTHONPATH. DISTBELIEF_TEST_MUTANT
names the mistake; `power` is none: it has a restarted shard find the disk as after a power cut.
"""

import os
from dataclasses import replace

from torch import Tensor

from distbelief import grants
from distbelief.param_server import part, shard, snapshot


def put(owner, name, made):
    """In place of what is there; a function of its own, as type checkers forbid it by name."""
    setattr(owner, name, made)


def no_dedup():
    """A push that comes again is applied again."""
    honest = shard.Shard._out_of_turn

    def out_of_turn(self, message, column, part, row, grad):
        if message.seq <= row.seq:
            return shard._GOOD
        return honest(self, message, column, part, row, grad)

    put(shard.Shard, "_out_of_turn", out_of_turn)


def no_gap_check():
    """A push is applied although one before it is missing."""
    honest = shard.Shard._out_of_turn

    def out_of_turn(self, message, column, part, row, grad):
        if message.seq > row.seq:
            return shard._GOOD
        return honest(self, message, column, part, row, grad)

    put(shard.Shard, "_out_of_turn", out_of_turn)


def ack_before_apply():
    """A push is acknowledged, and applied when the next one comes."""
    honest = part.Part.apply_
    waiting: dict[int, tuple[Tensor, int, bytes, float]] = {}

    def apply_(self, grad, samples, absent=b"", norm=0.0):
        before = waiting.pop(id(self), None)
        waiting[id(self)] = (grad.clone(), samples, absent, norm)
        if before is not None:
            honest(self, *before)

    put(part.Part, "apply_", apply_)


def table_apart():
    """The table of who has pushed what is saved with values of the snapshot before."""
    honest = shard.Shard.image
    before: dict[int, dict[str, Tensor]] = {}

    def image(self):
        now = honest(self)
        stale = [
            replace(one, tensors=before.get(one.index, one.tensors), version=one.version)
            for one in now.parts
        ]
        for one in now.parts:
            before[one.index] = {name: tensor.clone() for name, tensor in one.tensors.items()}
        return replace(now, parts=tuple(stale))

    put(shard.Shard, "image", image)


def durable_before_fsync():
    """What is saved is told as durable and was never synced; the power goes with the shard."""
    put(snapshot, "_sync", lambda path: None)
    power()


def epoch_not_raised():
    """A shard that is started again has the epoch it had."""
    honest = grants.Grants.next
    restore = shard.Shard._restore
    put(
        grants.Grants,
        "next",
        lambda self, name: 1 if name.startswith("shard") else honest(self, name),
    )
    put(snapshot.SnapshotStore, "claim", lambda self, epoch: None)
    put(shard.Shard, "_restore", lambda self, image: restore(self, replace(image, epoch=0)))


def power():
    """A shard that begins finds only what was synced. kill -9 would leave it the page cache."""
    honest, claim = snapshot._sync, snapshot.SnapshotStore.claim

    def sync(path):
        honest(path)
        if honest.__module__ == snapshot.__name__ and path.is_file():
            with (path.parent.parent / "synced").open("a") as file:
                file.write(f"{path.stat().st_ino}\n")

    def forget_and_claim(self, epoch):
        log = self.folder / "synced"
        synced = set(log.read_text().split()) if log.exists() else set()
        for file in self.folder.glob("e*-v*/*"):
            if str(file.stat().st_ino) not in synced:
                os.truncate(file, 0)
        claim(self, epoch)

    put(snapshot, "_sync", sync)
    put(snapshot.SnapshotStore, "claim", forget_and_claim)


MUTANTS = {
    made.__name__: made
    for made in (
        no_dedup,
        no_gap_check,
        ack_before_apply,
        table_apart,
        durable_before_fsync,
        epoch_not_raised,
        power,
    )
}
if "DISTBELIEF_TEST_MUTANT" in os.environ:
    MUTANTS[os.environ["DISTBELIEF_TEST_MUTANT"]]()
