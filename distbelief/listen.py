"""Listen: where a shard or the controller takes connections."""

import logging

import zmq

from distbelief.param_server.curve import DoorkeeperFailed, Keys
from distbelief.param_server.transport import ZmqServer
from distbelief.problem import Problem

logger = logging.getLogger(__name__)


def listen(
    context: "zmq.Context[zmq.Socket[bytes]]",
    host: str,
    port: int = 0,
    wish: int = 0,
    keys: Keys | None = None,
    is_encrypted: bool = False,
) -> ZmqServer:
    """Listen at an address of this machine.

    port: 0 for any free one; wish: which would be best then. keys: who may come in.
    is_encrypted: the job says that connections are.
    Raises: Problem if somebody else listens there; DoorkeeperFailed if strangers would be let in.
    """
    if is_encrypted and keys is None:
        raise DoorkeeperFailed("the job says that connections are encrypted, and there are no keys")
    if wish and not port:
        try:
            return ZmqServer(context, host, wish, keys)
        except OSError as error:
            logger.warning("port %d is taken (%s): another one is used", wish, error.strerror)
    try:
        return ZmqServer(context, host, port, keys)
    except OSError as error:
        raise Problem(
            "DB-ENV-005",
            f"cannot listen at {host} port {port or 'any'}: {error.strerror}",
            why="another run, or another program, may be using it",
            fix="choose another --set net.port=..., or leave net.port out for free ports",
        ) from error
