"""RayCheck: what Ray says of a cluster file. Beside ray_engine.py the only file that imports it.

Nothing is started, no network and no cloud's library is needed. Ray prints and exits on some errors
and raises others; all become findings here. `prepare_config` must come before `validate_config`.
"""

import contextlib
import copy
import io
import logging
import re
from collections.abc import Iterator

import click
import jsonschema
from ray.autoscaler._private.util import prepare_config, validate_config

from distbelief.cluster.document import Document
from distbelief.cluster.finding import Finding, Path_, nearest

_COLORS = re.compile(r"\x1b\[[0-9;]*m")


def check(document: Document) -> list[Finding]:
    """What Ray refuses; the first thing only, as it stops there."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _quiet():
            validate_config(prepare_config(copy.deepcopy(document.data)))
    except jsonschema.ValidationError as error:
        return [_of_schema(document, error)]
    except (click.ClickException, SystemExit) as error:
        text = _COLORS.sub("", said.getvalue()).strip().splitlines()
        return [document.say("error", (), f"Ray: {text[-1] if text else error}")]
    except KeyError as error:  # Ray takes the keys it needs without looking for them
        return [document.say("error", (), f"Ray needs the key {error}")]
    except Exception as error:  # noqa: BLE001 - it raises what it likes, of users' files
        text = str(error).strip().splitlines()
        return [document.say("error", (), text[0] if text else repr(error))]
    return []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray logs what it fills in, which the user did not ask."""
    logger = logging.getLogger("ray.autoscaler")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _of_schema(document: Document, error: jsonschema.ValidationError) -> Finding:
    path: Path_ = tuple(error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = set(error.schema.get("properties", {}))
        odd = sorted(set(map(str, error.instance)) - known)
        if odd and known:
            what = f"Ray knows no key {odd[0]!r} here"
            return document.say("error", (*path, odd[0]), what, nearest(odd[0], known))
    return document.say("error", path, f"Ray: {error.message}")
