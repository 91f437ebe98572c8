"""Signals: to the run's loop while there is one, an interrupt otherwise."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from distbelief.signals import HUNG_UP, Signals, heeding, take_news
from distbelief.stop import Stop

OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def raise_signal(number):
    signal.raise_signal(number)


def test_a_loop_that_heeds_is_asked_and_not_interrupted():
    stop = Stop()
    with heeding(stop):
        raise_signal(signal.SIGINT)
        assert stop.level == 1
        raise_signal(signal.SIGTERM)
        assert stop.level == 2


def test_outside_the_loop_a_signal_interrupts():
    with Signals() as signals:
        with pytest.raises(KeyboardInterrupt):
            raise_signal(signal.SIGTERM)
        assert signals.first == signal.SIGTERM
        with heeding(stop := Stop()):
            raise_signal(signal.SIGINT)
        assert stop.level == 1
        assert signals.first == signal.SIGTERM


def test_the_handlers_are_given_back():
    before = [signal.getsignal(number) for number in OURS]
    with heeding(Stop()):
        assert [signal.getsignal(number) for number in OURS] != before
    assert [signal.getsignal(number) for number in OURS] == before
    with pytest.raises(ZeroDivisionError), heeding(Stop()):
        _ = 1 / 0
    assert [signal.getsignal(number) for number in OURS] == before


def test_a_closed_terminal_is_news_and_no_reason_to_stop():
    stop = Stop()
    with heeding(stop):
        assert take_news() == []
        raise_signal(signal.SIGHUP)
        assert stop.level == 0
        assert take_news() == [HUNG_UP]
        assert take_news() == []
    assert take_news() == []


def test_a_thread_that_may_not_take_signals_leaves_them_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with heeding(Stop()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_third_signal_ends_the_process_on_the_spot(number, code):
    program = (
        "import os\n"
        "from distbelief.signals import heeding\n"
        "class Stop:\n"
        "    def ask(self): pass\n"
        "try:\n"
        "    with heeding(Stop()):\n"
        f"        for _ in range(3): os.kill(os.getpid(), {int(number)})\n"
        "finally: print('this is not reached')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")


def test_signals_load_nothing_heavy():
    program = "import sys, distbelief.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=os.environ).returncode == 0
