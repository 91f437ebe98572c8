"""Cost: what one piece of a push takes of each station that it passes, in seconds."""

from dataclasses import dataclass

from distbelief.simulation.cluster import Cluster, Piece
from distbelief.simulation.constants import LOCAL, SHRINK, Constants


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one piece, on one way."""

    is_local: bool
    """Worker and shard are on one host."""
    shard_s: float
    """Of the shard's thread, there and back."""
    net_s: float
    """Of a network thread at either end, one way; 0 in shared memory."""
    link_s: float
    """Of each of the two hosts' links, one way; 0 on one host."""
    worker_s: float
    """Of the worker's comm thread, one way."""
    hop_s: float
    """That nobody is busy with: from the end of one's work to the beginning of the next's."""

    @classmethod
    def of(cls, piece: Piece, cluster: Cluster, constants: Constants, *, is_local: bool) -> "Cost":
        size = 4.0 * piece.numel
        form = LOCAL if is_local else cluster.form
        wire = size / (1.0 if is_local else SHRINK[form])
        encrypts = cluster.is_encrypted and not is_local
        net = constants.curve_gb_per_s if encrypts else constants.tcp_gb_per_s
        overhead_s = 1e-6 * (piece.parts * constants.part_us + constants.message_us)
        return cls(
            is_local=is_local,
            shard_s=1e-9 * size / constants.shard_gb_per_s[form] + overhead_s,
            net_s=0.0 if is_local and cluster.shares_memory else 1e-9 * wire / net,
            link_s=0.0 if is_local else wire / cluster.link_bytes_per_s,
            # The client's figure is of both ways.
            worker_s=1e-9 * size / constants.worker_gb_per_s[form] / 2,
            hop_s=5e-7 * constants.round_trip_us + (0.0 if is_local else cluster.latency_s),
        )
