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


def inspect(file: Path, crds: Crds | None = None, *, asks_ray: bool = True) -> Inspection:
    """Read a file and look at it: no network, no account, nothing is started.

    asks_ray: what it says too, for which it has to be imported.

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
            ours, others = kuberay.check(document), [] if crds is None else crds.check(document)
        else:
            ours, others = cluster_file.check(document), _ray_says(document) if asks_ray else []
        # They look at some of the same things; ours say how to mend them.
        said = {(finding.level, finding.path) for finding in ours}
        findings += ours
        findings += [one for one in others if (one.level, one.path) not in said]
    if kind == "ray" and len(documents) > 1:
        what = "a cluster file has one document, and Ray reads no other"
        findings.append(documents[1].say("error", (), what))
    findings.sort(key=lambda finding: (finding.line or 0, LEVELS.index(finding.level)))
    return Inspection(file=file, kind=kind, documents=documents, findings=findings)


def _ray_says(document: Document) -> list[Finding]:
    """Here and not at the top: Ray takes half a second to import, which manifests do not need."""
    try:
        from distbelief.cluster import ray_check
    except ImportError as error:
        raise Problem(
            "DB-CLUSTER-010", f"Ray cannot be imported: {error}", fix="pip install 'ray[default]'"
        ) from error
    return ray_check.check(document)
