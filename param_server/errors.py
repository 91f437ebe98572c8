"""Error families, grouped by what the caller can do about them.

Bad input of a user is a `ValueError`; a bug of ours is an `assert`.
"""


class DistBeliefError(Exception):
    """Root of every error this package raises on purpose."""


class RemoteProtocolError(DistBeliefError):
    """The peer sent something that is not our protocol: drop it and count it."""


class Refused(DistBeliefError):
    """A shard understood the message and refused it; its state is unchanged.

    `code` is one of the words of `protocol.REFUSALS`, `text` says what happened and what to do.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{text} [{code}]")
        self.code = code
        self.text = text


class ShardUnavailable(DistBeliefError):
    """A shard did not answer in time: retry, or fail over."""


class SnapshotCorrupt(DistBeliefError):
    """A snapshot does not hold what its manifest says: use the older one."""


class SnapshotFailed(DistBeliefError):
    """A snapshot could not be written (disk full, no permission): the previous one stands."""


class SnapshotFenced(SnapshotFailed):
    """A later epoch of the shard saves here now: this process is not the shard any more."""


class LocalError(DistBeliefError):
    """This side was set up wrongly, for example with endpoints in another order."""
