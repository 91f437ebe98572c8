"""Secret: nobody sees it who only looks; whoever sends it has it."""

import copy
import json
import logging

from distbelief.param_server.secret import HIDDEN, Secret
from distbelief.param_server.wire import Codec, encode
from distbelief.workers.notes import Find

TEXT = "o7rs4eT-whatever"
SECRET = Secret(TEXT)


def test_it_is_not_shown():
    shown = [str(SECRET), repr(SECRET), f"{SECRET}", f"{SECRET:>9}", f"{[SECRET]}", f"{SECRET!s}"]
    assert not any(TEXT in text for text in shown)
    assert all(HIDDEN in text for text in shown)


def test_a_logger_and_an_error_do_not_show_it(caplog):
    with caplog.at_level(logging.INFO):
        logging.getLogger("x").info("token=%s of %r", SECRET, {"token": SECRET})
    assert TEXT not in caplog.text
    assert TEXT not in repr(ValueError(SECRET))


def test_it_is_a_text_to_whoever_sends_it():
    assert SECRET == TEXT
    assert SECRET.encode() == TEXT.encode()
    assert json.loads(json.dumps({"token": SECRET})) == {"token": TEXT}
    copied = copy.deepcopy(SECRET)
    assert (type(copied), copied) == (Secret, TEXT)


def test_a_secret_of_a_secret_is_the_same():
    assert Secret(SECRET) == TEXT


def test_it_crosses_the_wire():
    note = Find(run="job", token=SECRET, name="w0", inc=1)
    heard = Codec(Find).decode(encode(note))
    assert heard == note
    assert TEXT not in repr(note) + repr(heard)
