"""LauncherLog: what the launcher said, kept beside the logs of the run's other processes.

A terminal may be closed while a run goes on; what was said since can be read here.
"""

import contextlib
import logging
from collections.abc import Iterator

from distbelief.folder import RunFolder

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
events = logging.getLogger("distbelief.launcher")
"""What is shown to a person; it goes into the log, and not to the handlers of whoever called us."""
events.propagate = False
events.addHandler(logging.NullHandler())  # or Python would print it where there is no log


@contextlib.contextmanager
def launcher_log(folder: RunFolder) -> Iterator[None]:
    """Inside, events and our warnings go to RUN/logs/launcher.log too."""
    ours = logging.getLogger("distbelief")
    try:
        handler = logging.FileHandler(folder.logs / "launcher.log", encoding="utf-8")
    except OSError as error:  # the run can do without
        ours.warning("%s/launcher.log cannot be written: %s", folder.logs, error)
        yield
        return
    handler.setFormatter(logging.Formatter(FORMAT))
    events.setLevel(logging.INFO)
    for logger in (ours, events):
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in (ours, events):
            logger.removeHandler(handler)
        handler.close()
