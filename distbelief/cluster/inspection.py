"""Inspection: a file of a cluster that was read, what it is, and all that is to be said of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distbelief.cluster import cluster_file, kuberay
from distbelief.cluster.crd import Crds
from distbelief.cluster.document import Document, parse
from distbelief.cluster.finding import LEVELS, Finding, Level
from distbelief.problem import Problem

Kind = Literal["ray", "kuberay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """`kind`: of Ray's cluster launcher, or manifests for Kubernetes."""

    file: Path
    kind: Kind
    documents: Sequence[Document]
    findings: Sequence[Finding]

    @property
    def cluster(self) -> Document:
        """The document of Ray's cluster launcher."""
        return self.documents[0]

    def of(self, *levels: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level in levels]


def inspect(file: Path, crds: Crds | None = None) -> Inspection:
    """Read a file and look at it: no network, no account, nothing is started.

    Raises: Problem if it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise Problem("DB-CLUSTER-002", f"{file} cannot be read: {why}") from error
    documents, findings = parse(text, str(file))
    kind: Kind = "kuberay" if any(map(kuberay.is_manifest, documents)) else "ray"
    for document in documents:
        if kind == "kuberay":
            findings += kuberay.check(document)
            findings += [] if crds is None else crds.check(document)
        else:
            findings += cluster_file.check(document)
            findings += _ray_says(document)
    if kind == "ray" and len(documents) > 1:
        what = "a cluster file has one document, and Ray reads no other"
        findings.append(documents[1].say("error", (), what))
    return Inspection(file=file, kind=kind, documents=documents, findings=_once(findings))


def _ray_says(document: Document) -> list[Finding]:
    """Here and not at the top: Ray takes half a second to import, which manifests do not need."""
    try:
        from distbelief.cluster import ray_check
    except ImportError as error:
        raise Problem(
            "DB-CLUSTER-010", f"Ray cannot be imported: {error}", fix="pip install 'ray[default]'"
        ) from error
    return ray_check.check(document)


def _once(findings: list[Finding]) -> list[Finding]:
    """In the order of the lines; of two of one place and level, the one that says how to mend it.

    Ray, a CRD and our own rules look at some of the same things.
    """
    kept: dict[object, Finding] = {}
    for finding in findings:
        key = (finding.level, finding.path) if finding.path else finding
        before = kept.get(key)
        if before is None or (finding.fix and not before.fix):
            kept[key] = finding
    return sorted(kept.values(), key=lambda f: (f.line or 0, LEVELS.index(f.level)))
