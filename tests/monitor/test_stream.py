import json

import pytest

from distbelief.monitor.stream import RING_BYTES, RING_MAX, Message, Ring, Stream, TooOld, Viewer
from tests.helpers.watched import Watched


def ring_of(*kinds):
    """Numbers 1, 2, 3 ..., a second apart."""
    ring = Ring()
    for seq, kind in enumerate(kinds, 1):
        ring.add(Message.of(kind, seq, {"seq": seq}, float(seq)))
    return ring


def seqs(found):
    return [m.seq for m in found]


def told(viewer):
    """(kind, id) of what a viewer is sent."""
    found = []
    for block in b"".join(viewer.take()).decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        if "event" in lines:
            found.append((lines["event"], int(lines["id"]) if "id" in lines else None))
    return found


def test_a_message_is_one_server_sent_event():
    message = Message.of("tick", 7, {"text": "a\nb\r\x85 é"})
    head, event, data, *end = message.wire.decode().split("\n")
    assert (head, event, end) == ("id: 7", "event: tick", ["", ""])
    assert json.loads(data.removeprefix("data: ")) == {"text": "a\nb\r\x85 é"}
    assert json.loads(message.data) == {"text": "a\nb\r\x85 é"}
    assert b"id:" not in Message.of("meta", 7, {}, has_id=False).wire


def test_the_ring_goes_on_after_any_number_that_it_has():
    ring = ring_of(*["tick"] * 5)
    for after in range(6):
        assert seqs(ring.after(after)) == list(range(after + 1, 6))


def test_the_ring_says_that_a_number_is_too_old_or_of_another_process():
    ring = ring_of(*["tick"] * 200)
    assert (ring.floor, ring.newest) == (79, 200)
    assert seqs(ring.after(79))[0] == 80
    for after in (78, 0, -1, 201):
        with pytest.raises(TooOld):
            ring.after(after)


def test_a_new_ring_knows_nothing_before_its_beginning():
    with pytest.raises(TooOld):
        Ring(50).after(49)
    assert Ring(50).after(50) == []


def test_the_ring_is_bounded_in_messages_and_bytes():
    ring = Ring()
    for seq in range(1, RING_MAX + 100):
        ring.add(Message.of("event", seq, {}))
    assert len(ring) == RING_MAX
    for seq in range(10_000, 10_030):
        ring.add(Message.of("event", seq, {"text": "x" * 2**20}))
    assert sum(len(m.wire) for m in ring.after(ring.floor)) <= RING_BYTES
    assert ring.floor > 10_000


def test_who_is_slow_gets_the_newest_tick_and_all_events():
    ring = ring_of("tick", "event", "tick", "meta", "tick", "event", "tick")
    assert [(m.kind, m.seq) for m in ring.later(0)] == [
        ("event", 2),
        ("meta", 4),
        ("event", 6),
        ("tick", 7),
    ]


def test_a_new_viewer_is_told_meta_and_the_newest_tick_and_then_what_comes():
    watched = Watched()
    viewer = Viewer(watched.stream, None)
    tick = watched.store.tick()
    assert told(viewer) == [("meta", None), ("tick", tick["seq"])]
    assert told(viewer) == []
    watched.go_on()
    assert told(viewer)[-1] == ("tick", tick["seq"] + 1)


def test_who_comes_back_gets_all_it_missed_with_no_gap():
    watched = Watched()
    seq = watched.store.seq
    watched.go_on()
    watched.happen("first")
    watched.happen("second")
    watched.go_on()
    found = [one for one in told(Viewer(watched.stream, seq)) if one[1] is not None]
    assert found == [("tick", seq + 1), ("event", seq + 2), ("event", seq + 3), ("tick", seq + 4)]
    between = [one for one in told(Viewer(watched.stream, seq + 2)) if one[1] is not None]
    assert between == found[2:]


def test_who_comes_back_too_late_begins_anew_and_is_told_so():
    watched = Watched()
    viewer = Viewer(watched.stream, watched.store.seq + 1000)
    blocks = b"".join(viewer.take()).decode().split("\n\n")
    meta = json.loads(blocks[1].partition("data: ")[2])
    assert meta["resync"] is True
    assert "resync" not in watched.store.meta()
    watched.go_on()
    assert told(viewer)[-1] == ("tick", watched.store.seq)


def test_a_viewer_that_slept_longer_than_the_ring_begins_anew():
    watched = Watched(num_workers=1, seconds=2)
    viewer = Viewer(watched.stream, None)
    viewer.take()
    for _ in range(130):
        watched.go_on()
    data = b"".join(viewer.take())
    assert b'"resync":true' in data
    assert data.count(b"event: tick") == 1


def test_a_slow_viewer_is_sent_no_more_however_long_it_waits():
    watched = Watched(num_workers=2, seconds=5)
    viewer = Viewer(watched.stream, None)
    viewer.take()
    for _ in range(50):
        watched.go_on()
    data = b"".join(viewer.take())
    assert data.count(b"event: tick") == 1


def test_one_tick_is_made_into_bytes_once_for_all_viewers():
    watched = Watched()
    viewers = [Viewer(watched.stream, None) for _ in range(3)]
    for viewer in viewers:
        viewer.take()
    watched.go_on()
    first, *others = [viewer.take() for viewer in viewers]
    for other in others:
        assert all(a is b for a, b in zip(first, other, strict=True))


def test_meta_is_told_when_it_changes_and_findings_when_they_do():
    watched = Watched(seconds=0)
    for _ in range(12):
        watched.go_on()
    after = watched.stream.ring.newest
    watched.go_on()
    kinds = [m.kind for m in watched.stream.ring.after(after)]
    assert kinds == ["tick"]
    metas = [m for m in watched.stream.ring.after(0) if m.kind == "meta"]
    assert json.loads(metas[-1].data)["worker_order"] == watched.store.meta()["worker_order"]
    assert any(m.kind == "finding" for m in watched.stream.ring.after(0))


def test_delta_has_the_same_objects():
    watched = Watched()
    seq = watched.store.seq
    watched.happen("first")
    watched.go_on()
    items = json.loads(watched.stream.delta(seq))
    assert [(item["event"], item["seq"]) for item in items] == [
        ("event", seq + 1),
        ("tick", seq + 2),
    ]
    assert items[0]["data"]["text"] == "first"
    assert json.loads(watched.stream.delta(seq + 2)) == []


def test_the_last_words_come_once():
    watched = Watched()
    viewer = Viewer(watched.stream, None)
    viewer.take()
    watched.stream.end("ended", watched.now)
    watched.stream.end("ended", watched.now)
    assert watched.stream.is_over
    assert [kind for kind, _ in told(viewer)] == ["bye"]


def test_a_stream_of_a_recording_has_one_tick_to_show():
    watched = Watched()
    stream = Stream(watched.store)
    viewer = Viewer(stream, None)
    assert [kind for kind, _ in told(viewer)] == ["meta", "tick"]
    assert told(viewer) == []
    assert told(Viewer(stream, watched.store.seq)) == []
