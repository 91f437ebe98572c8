"""Environment: whether the libraries here are ones that this version works with.

Looked at before any of them is imported, for an import may fail in its own words.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version

from distbelief.problem import Problem

PYTHON_MIN = (3, 11)
OLDEST = {"torch": (2, 6), "pyzmq": (26,), "msgpack": (1, 0, 8), "click": (8, 1), "ray": (2, 40)}
"""As in pyproject.toml; tests/app/test_environment.py compares the two."""


def check_environment(*, engine: str) -> None:
    """See that Python and the libraries are recent enough; Ray only where it is the engine.

    Raises: Problem naming what is here and what is needed.
    """
    if sys.version_info[:2] < PYTHON_MIN:
        raise Problem(
            "DB-ENV-004",
            f"this is Python {sys.version_info.major}.{sys.version_info.minor}, distbelief needs "
            f"{_text(PYTHON_MIN)} or newer",
        )
    for name, oldest in OLDEST.items():
        if name == "ray" and engine != "ray":
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            if name == "ray":
                raise Problem(
                    "DB-ENV-001",
                    "Ray is not installed",
                    fix="pip install ray, or use --engine local",
                ) from None
            raise Problem(
                "DB-ENV-004", f"{name} is not installed", fix="pip install distbelief"
            ) from None
        if numbers(found) < oldest:
            raise Problem(
                "DB-ENV-004",
                f"{name} {found} is installed, distbelief needs {_text(oldest)} or newer",
                fix=f"pip install '{name}>={_text(oldest)}'"
                + (", or use --engine local" if name == "ray" else ""),
            )


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu gives (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
