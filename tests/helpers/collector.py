"""pyzmq's own thread, started before a leak check looks for what a test has started."""

import zmq


def start_collector() -> None:
    """pyzmq keeps one thread from the first zero-copy send on until the process ends."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as two:
        one.bind("inproc://collector")
        two.connect("inproc://collector")
        one.send(bytes(100_000), copy=False)
        two.recv()
    context.term()
