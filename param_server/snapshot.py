"""Snapshot: one shard's image on disk, and the checkpoint that names one snapshot per shard.

    <folder>/e<epoch>-v<version>/tensors.safetensors    part.<index>.<values or slot>, float32 [n]
                                                        buffers.<worker>.<floats or integers>
    <folder>/e<epoch>-v<version>/manifest.json          {"body": {...}, "sha256": of the body}
    <folder>/e<epoch>-v<version>-<n>/...                the n-th of that version that differs
    <folder>/epoch                                      the epoch that saves here now

The version in the name is that of the part furthest behind; others may have moved meanwhile.

The body has the format's number, what the image is of, version, samples and table of each part,
and size and SHA-256 of the tensor file (safetensors itself has no checksum: a flipped bit would
load silently). A snapshot is written beside its place, synced, and renamed: it is there whole or
not at all. The newest two are kept, and the older one is used where the newest is damaged.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distbelief.param_server.buffers import Contribution
from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import (
    RemoteProtocolError,
    SnapshotCorrupt,
    SnapshotFailed,
    SnapshotFenced,
)
from distbelief.param_server.image import PartImage, ShardImage
from distbelief.param_server.part import Applied, Owed
from distbelief.param_server.place import inside
from distbelief.param_server.staleness import Staleness

FORMAT = 2
TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"
EPOCH = "epoch"
_NAME = re.compile(r"e\d{6,}-v\d{12,}(-\d{6})?")


class SnapshotStore:
    """The snapshots of one shard in one folder. Its methods may run in any one thread."""

    def __init__(
        self, folder: Path, keep: int = 2, held: Callable[[], Collection[str]] = tuple
    ) -> None:
        """keep: how many to leave on disk; at least 2, or a damaged newest one is the end.
        held: others that may not go now, by name."""
        if keep < 2:
            raise ValueError(f"keep must be at least 2, got {keep}")
        self.folder = folder
        self.keep = keep
        self.held = held

    @property
    def epoch(self) -> int:
        """The latest epoch that has claimed this folder; 0 if none has."""
        try:
            return int((self.folder / EPOCH).read_text(encoding="ascii"))
        except (OSError, ValueError):
            names = self.names()
            return int(names[-1][1:].partition("-")[0]) if names else 0

    def claim(self, epoch: int) -> None:
        """Say for good, before the shard serves, that this epoch saves here: no earlier one may.

        Raises: SnapshotFenced if this one or a later one has been here; SnapshotFailed.
        """
        if self.epoch >= epoch:
            raise SnapshotFenced(f"{self.folder} is epoch {self.epoch}'s, this one is {epoch}")
        working = self.folder / f".{EPOCH}.{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            working.write_text(str(epoch), encoding="ascii")
            _sync(working)
            working.rename(self.folder / EPOCH)
            _sync(self.folder)
        except OSError as error:
            raise SnapshotFailed(f"{self.folder} cannot be claimed: {error}") from error

    def save(self, image: ShardImage) -> Path:
        """Write an image whole, make it durable, and drop the oldest ones.

        Raises: SnapshotFailed; what was there before still is. SnapshotFenced.
        """
        if self.epoch > image.epoch:
            raise SnapshotFenced(
                f"{self.folder} is epoch {self.epoch}'s, the image is of epoch {image.epoch}"
            )
        head = _head(image)
        final = self._place(image, head)
        working = self.folder / f".{final.name}.{os.getpid()}"
        try:
            if final.exists():
                _sync(self.folder)  # its writer may have failed in just this
                return final
            self.folder.mkdir(parents=True, exist_ok=True)
            for abandoned in self.folder.glob(".e*-v*"):  # by a process that was killed
                shutil.rmtree(abandoned, ignore_errors=True)
            working.mkdir()
            save_file(_tensors(image), working / TENSORS)
            _sync(working / TENSORS)
            body = {**head, "file": _file(working / TENSORS)}
            text = json.dumps({"body": body, "sha256": _digest(body)})
            (working / MANIFEST).write_text(text, encoding="utf-8")
            _sync(working / MANIFEST)
            _sync(working)
            working.rename(final)
            _sync(self.folder)
            self._prune()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(working, ignore_errors=True)
            raise SnapshotFailed(
                f"could not write snapshot {final}: {error}. Training goes on; the snapshot "
                "before this one stands. Free space or mend the folder's permissions"
            ) from error
        return final

    def names(self) -> list[str]:
        """Snapshots on disk, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if _NAME.fullmatch(p.name))

    def load(self, name: str) -> ShardImage:
        """Raises: SnapshotCorrupt, naming the file, if anything in it is not as it was written."""
        try:
            return _load(inside(self.folder, name))
        except ValueError as error:
            raise SnapshotCorrupt(str(error)) from error

    def adopt(self, name: str, fill: Callable[[Path], None]) -> ShardImage:
        """Take in a snapshot that another host has written, in place of one of that name.

        fill: puts its files into a folder.
        Raises: SnapshotCorrupt if it is not as it was written; SnapshotFailed. What `fill` raises.
        """
        working = self.folder / f".{name}.{os.getpid()}"
        try:
            shutil.rmtree(working, ignore_errors=True)  # of one that had the same number
            working.mkdir(parents=True)
            fill(working)
            image = _load(working)
            _sync(working / TENSORS)
            _sync(working / MANIFEST)
            shutil.rmtree(self.folder / name, ignore_errors=True)
            working.rename(self.folder / name)
            _sync(self.folder)
        except OSError as error:
            raise SnapshotFailed(f"{self.folder / name} cannot be written: {error}") from error
        finally:
            shutil.rmtree(working, ignore_errors=True)
        return image

    def latest(self) -> tuple[ShardImage, list[str]] | None:
        """The newest snapshot that is whole, and what was wrong with newer ones; None if none.

        Raises: SnapshotCorrupt if there are snapshots and not one of them is whole.
        """
        wrong: list[str] = []
        for name in reversed(self.names()):
            try:
                return self.load(name), wrong
            except SnapshotCorrupt as error:
                wrong.append(str(error))
        if wrong:
            raise SnapshotCorrupt(f"no snapshot in {self.folder} is whole: " + "; ".join(wrong))
        return None

    def _place(self, image: ShardImage, head: Mapping[str, Any]) -> Path:  # Any: JSON
        """A folder not yet there, or the newest of this version if it holds just this."""
        base = f"e{image.epoch:06d}-v{image.version:012d}"
        there = [name for name in self.names() if name.startswith(base)]
        if not there:
            return self.folder / base
        if _holds(self.folder / there[-1], head):
            return self.folder / there[-1]
        number = int(there[-1][len(base) + 1 :] or 0) + 1
        return self.folder / f"{base}-{number:06d}"

    def _prune(self) -> None:
        held = self.held()
        for name in self.names()[: -self.keep]:
            if name in held:
                continue
            shutil.rmtree(self.folder / name, ignore_errors=True)


def _tensors(image: ShardImage) -> dict[str, torch.Tensor]:
    tensors = {
        f"part.{part.index}.{name}": tensor
        for part in image.parts
        for name, tensor in part.tensors.items()
    }
    for w, contribution in image.buffers.items():
        tensors[f"buffers.{w}.floats"] = contribution.floats
        tensors[f"buffers.{w}.integers"] = contribution.integers
    return tensors


def _file(tensors: Path) -> dict[str, Any]:  # Any: JSON
    with tensors.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": TENSORS, "size": tensors.stat().st_size, "sha256": digest}


def _holds(folder: Path, head: Mapping[str, Any]) -> bool:  # Any: JSON
    """The snapshot there was taken at the same versions, tables and buffers."""
    try:
        body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["body"]
        del body["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(body == json.loads(json.dumps(head)))


def _head(image: ShardImage) -> dict[str, Any]:  # Any: JSON
    return {
        "format": FORMAT,
        "run": image.run,
        "shard": image.index,
        "num_shards": image.num_shards,
        "epoch": image.epoch,
        "contract": image.contract.to_json().decode(),
        "parts": [
            {
                "index": part.index,
                "version": part.version,
                "samples": part.samples,
                "table": {w: row._asdict() for w, row in part.table.items()},
                "tensors": sorted(part.tensors),
                "owed": {w: list(owed) for w, owed in part.owed.items()},
                "lost": part.lost,
                "averaged": part.averaged,
            }
            for part in image.parts
        ],
        "staleness": image.staleness.as_dict(),
        "buffers": {w: {"samples": c.samples, "at": c.at} for w, c in image.buffers.items()},
        "incarnations": dict(image.incarnations),
    }


def _load(folder: Path) -> ShardImage:
    file = folder
    try:
        file = inside(folder, MANIFEST)
        manifest = json.loads(file.read_text(encoding="utf-8"))
        body: Mapping[str, Any] = manifest["body"]  # Any: JSON
        if _digest(body) != manifest["sha256"]:
            raise SnapshotCorrupt(f"{file}: its digest does not match")
        if body["format"] != FORMAT:
            raise SnapshotCorrupt(f"{file}: format {body['format']}, this version reads {FORMAT}")
        file = inside(folder, body["file"]["name"])
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != body["file"]["sha256"]:
            raise SnapshotCorrupt(
                f"{file}: SHA-256 {digest[:12]}..., the manifest says "
                f"{body['file']['sha256'][:12]}... (size {file.stat().st_size}, "
                f"written {body['file']['size']})"
            )
        return _image(body, load_file(file))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RemoteProtocolError) as e:
        raise SnapshotCorrupt(f"{file}: {type(e).__name__}: {e}") from e


def _image(body: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> ShardImage:  # Any: JSON
    return ShardImage(
        run=body["run"],
        index=body["shard"],
        num_shards=body["num_shards"],
        epoch=body["epoch"],
        contract=Contract.from_json(body["contract"].encode()),
        parts=tuple(
            PartImage(
                part["index"],
                part["version"],
                part["samples"],
                {w: _row(row) for w, row in part["table"].items()},
                {name: tensors[f"part.{part['index']}.{name}"] for name in part["tensors"]},
                {w: Owed(*owed) for w, owed in part["owed"].items()},
                part["lost"],
                part.get("averaged", 0),  # snapshots of an earlier version have no average
            )
            for part in body["parts"]
        ),
        staleness=Staleness.from_dict(body["staleness"]),
        buffers={
            w: Contribution(
                c["samples"],
                tensors[f"buffers.{w}.floats"],
                tensors[f"buffers.{w}.integers"],
                c["at"],
            )
            for w, c in body["buffers"].items()
        },
        incarnations=body["incarnations"],
    )


def _row(data: Mapping[str, Any]) -> Applied:  # Any: JSON
    return Applied(
        data["inc"],
        data["seq"],
        data["crc"],
        tuple(data["refused"]),
        data.get("samples", 0),  # snapshots of an earlier version do not count them
        data.get("refused_samples", 0),
    )


def _digest(body: Mapping[str, Any]) -> str:  # Any: JSON
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """fsync a file or folder: a rename is durable only when the folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
