import pytest

from distbelief.supervisor import BACK_OFF_MAX_S, Supervisor


def test_the_first_restart_is_at_once_and_the_next_ones_wait_longer():
    supervisor = Supervisor(limit=5)
    delays = []
    for _ in range(6):
        delays.append(supervisor.lose("w0", "killed by signal 9", 100.0))
        supervisor.due(1000.0)
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0, None]


def test_it_never_waits_longer_than_the_most():
    supervisor = Supervisor(limit=100)
    delays = [supervisor.lose("w0", "", 0.0) for _ in range(50)]
    assert max(delay for delay in delays if delay is not None) == BACK_OFF_MAX_S


def test_a_process_is_due_when_its_time_has_come_and_once():
    supervisor = Supervisor(limit=5)
    supervisor.lose("w0", "", 10.0)
    supervisor.due(10.0)
    supervisor.lose("w0", "", 10.0)
    assert supervisor.is_waiting("w0")
    assert supervisor.due(10.4) == []
    assert supervisor.due(10.5) == ["w0"]
    assert not supervisor.is_waiting("w0")
    assert supervisor.due(11.0) == []


def test_one_that_has_done_something_begins_a_new_row():
    supervisor = Supervisor(limit=1)
    assert supervisor.lose("w0", "first", 0.0) == 0.0
    supervisor.prove("w0")  # it waits to be started: this can only be of the one before
    assert supervisor.due(0.0) == ["w0"]
    supervisor.prove("w0")
    assert supervisor.lose("w0", "second", 1.0) == 0.0
    assert supervisor.cause("w0") == "second"
    supervisor.due(1.0)
    assert supervisor.lose("w0", "third", 2.0) is None
    assert supervisor.cause("w0") == "second"
    assert supervisor.num_lost("w0") == 3


def test_what_is_given_up_stays_so():
    supervisor = Supervisor(limit=0)
    assert supervisor.lose("w0", "", 0.0) is None
    supervisor.prove("w0")
    assert supervisor.lose("w0", "", 0.0) is None
    assert supervisor.due(100.0) == []


def test_each_has_a_row_of_its_own_and_all_can_be_forgotten():
    supervisor = Supervisor(limit=1)
    assert supervisor.lose("w0", "", 0.0) == 0.0
    assert supervisor.lose("w1", "", 0.0) == 0.0
    assert supervisor.num_lost("shard0") == 0
    supervisor.forget()
    assert supervisor.due(1.0) == []


@pytest.mark.parametrize("name", ["w0", "shard0"])
def test_nobody_waits_who_was_never_lost(name):
    assert not Supervisor(limit=5).is_waiting(name)


def test_one_that_was_asked_to_end_is_started_again_and_that_is_no_loss():
    supervisor = Supervisor(0)
    supervisor.again("shard0", 5.0)
    assert supervisor.is_waiting("shard0")
    assert supervisor.due(5.0) == ["shard0"]
    assert supervisor.num_lost("shard0") == 0


def test_a_seat_that_was_given_up_may_be_filled_anew():
    supervisor = Supervisor(0)
    assert supervisor.lose("w0", "", 0.0) is None
    supervisor.renew("w0")
    assert supervisor.num_lost("w0") == 0
