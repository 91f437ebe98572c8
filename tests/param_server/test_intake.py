"""Which connections are ended for what they bring beyond whole messages. No socket."""

from distbelief.param_server.intake import STRANGER_BYTES, STRANGERS_BYTES, Ahead, to_end


def ahead(fd, size, peer=None):
    return Ahead(fd, 1000 + fd, peer, size)


def ended(*found, allowed=0):
    return [one.fd for one in to_end(list(found), lambda _: allowed)]


def test_a_connection_within_its_bound_stays():
    assert ended(ahead(1, STRANGER_BYTES), ahead(2, 5, b"a")) == []


def test_a_stranger_that_is_far_ahead_is_ended_and_a_worker_is_not():
    size = 10 * STRANGER_BYTES
    assert ended(ahead(1, size), ahead(2, size, b"a"), allowed=size) == [1]


def test_a_worker_that_is_ahead_of_its_allowance_is_ended():
    assert ended(ahead(2, 10 * STRANGER_BYTES + 1, b"a"), allowed=10 * STRANGER_BYTES) == [2]


def test_many_strangers_are_ended_from_the_largest_on_until_the_others_fit():
    strangers = [ahead(fd, STRANGER_BYTES - 100 + fd) for fd in range(20)]
    gone = ended(*strangers)
    assert gone == [19, 18, 17, 16]
    assert sum(one.size for one in strangers[:16]) <= STRANGERS_BYTES


def test_one_that_has_spoken_and_that_nobody_vouches_for_is_a_stranger_too():
    assert ended(ahead(1, 2 * STRANGER_BYTES, b"a")) == [1]
