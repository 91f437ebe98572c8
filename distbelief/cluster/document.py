"""Document: one YAML document, with the line of every value in it.

Plain YAML is read, without tags that would make objects. A key that is there twice is an error:
YAML's readers take the last one without a word.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from distbelief.cluster.finding import Finding, Level, Path_

MAX_DEPTH, MAX_VALUES = 60, 100_000
PLACEHOLDER = re.compile(r"\bYOUR-[A-Z0-9-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """`data` is what the YAML says; `lines` has the line of each path in it."""

    file: str
    data: dict[str, Any]  # Any: YAML
    lines: Mapping[Path_, int]

    def line(self, path: Path_) -> int | None:
        """Of a path, or of the nearest above it that is in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)

    def say(self, level: Level, path: Path_, what: str, fix: str = "") -> Finding:
        """A finding of this document."""
        line = self.line(path)
        return Finding(level=level, path=path, what=what, fix=fix, file=self.file, line=line)

    def texts(self) -> Iterator[tuple[Path_, str]]:
        """Every value that is text, with its path."""
        yield from _texts(self.data, ())


def placeholders(document: Document) -> Iterator[Finding]:
    """What a shipped file leaves to be filled in."""
    for path, text in document.texts():
        if match := PLACEHOLDER.search(text):
            yield document.say("todo", path, f"{match.group()} stands for a value of yours")


def parse(text: str, file: str) -> tuple[list[Document], list[Finding]]:
    """The documents of a file, and what is wrong with it as YAML."""
    documents: list[Document] = []
    findings: list[Finding] = []
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)
        while loader.check_node():
            node = loader.get_node()
            lines: dict[Path_, int] = {}
            findings += _walk(node, (), lines, file)
            data = loader.construct_document(node)
            if data is None:
                continue
            if not isinstance(data, dict):
                what = f"this is a {type(data).__name__}, not a mapping"
                findings.append(_error(file, (), what, node.start_mark.line + 1))
                continue
            documents.append(Document(file=file, data=data, lines=lines))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        what = " ".join(filter(None, (error.context, error.problem)))
        findings.append(_error(file, (), f"not YAML: {what}", line))
    except yaml.YAMLError as error:  # a character that YAML does not have
        findings.append(_error(file, (), f"not YAML: {str(error).splitlines()[0]}", None))
    finally:
        if loader is not None:
            loader.dispose()
    if not documents and not findings:
        findings.append(_error(file, (), "there is nothing in it", None))
    return documents, findings


def _texts(value: object, path: Path_) -> Iterator[tuple[Path_, str]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _texts(one, (*path, str(key)))
    elif isinstance(value, list):
        for position, one in enumerate(value):
            yield from _texts(one, (*path, position))
    elif isinstance(value, str):
        yield path, value


def _error(file: str, path: Path_, what: str, line: int | None) -> Finding:
    return Finding(level="error", path=path, what=what, file=file, line=line)


def _walk(node: yaml.Node, path: Path_, lines: dict[Path_, int], file: str) -> list[Finding]:
    """Write down the lines of a node and all below it; returns the keys that are there twice."""
    if len(path) > MAX_DEPTH or len(lines) > MAX_VALUES:
        raise yaml.YAMLError("it is too deep, or repeats itself by aliases without end")
    lines.setdefault(path, node.start_mark.line + 1)
    found: list[Finding] = []
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen and name != "<<":
                what = f"the key is there already, in line {seen[name]}"
                found.append(_error(file, (*path, name), what, line))
            seen[name] = line
            lines[*path, name] = line
            found += _walk(value, (*path, name), lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            found += _walk(value, (*path, position), lines, file)
    return found
