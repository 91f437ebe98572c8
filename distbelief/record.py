"""Record: a run in lines of JSON, for programs: `--json` of launch, resume and top. Pure.

Every line has "type" and "v"; fields have the names of the monitor's API. docs/cli.md has the
schema, which is these classes. The last line is the result, as in result.json.
"""

from typing import Any

import msgspec

from distbelief.sight import Finding, Happened, Kpi, Number, Sight

VERSION = 1


class Tick(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="tick"):
    """How the run is, about once a second."""

    v: int = VERSION
    run: str
    seq: int | None
    """The monitor's; null where no monitor answers. Then kpi has what the controller knows."""
    t: float
    age_s: Number
    state: str
    kpi: Kpi
    unknown: str
    """Why the monitor's part is missing; empty where it is there."""


class EventRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="event"):
    """Something happened, as the monitor has it."""

    v: int = VERSION
    run: str
    seq: int
    at: float
    kind: str
    who: str
    node: str | None
    text: str
    detail: dict[str, Any]  # Any: JSON


class FindingRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="finding"):
    """A finding has come up, or become worse or better. An event of kind `well` ends it."""

    v: int = VERSION
    run: str
    id: str
    severity: str
    who: str | None
    scope: str | None
    phase: str | None
    ratio: Number
    factor: Number
    since: Number
    text: str
    action: str | None
    short: str | None


AnyRecord = Tick | EventRecord | FindingRecord


def tick_of(sight: Sight) -> Tick:
    return Tick(
        run=sight.run,
        seq=sight.seq,
        t=sight.t,
        age_s=sight.age_s,
        state=sight.state,
        kpi=sight.kpi,
        unknown=sight.unknown,
    )


def event_of(run: str, event: Happened) -> EventRecord:
    return EventRecord(run=run, **msgspec.structs.asdict(event))


def finding_of(run: str, finding: Finding) -> FindingRecord:
    return FindingRecord(run=run, **msgspec.structs.asdict(finding))


def line(record: AnyRecord) -> str:
    """Without its end."""
    return msgspec.json.encode(record).decode()


class Findings:
    """Tells which findings are new."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def new(self, found: list[Finding]) -> list[Finding]:
        """Those that were not there at the last call, or with another severity."""
        fresh = [finding for finding in found if self._told.get(finding.id) != finding.severity]
        self._told = {finding.id: finding.severity for finding in found}
        return fresh
