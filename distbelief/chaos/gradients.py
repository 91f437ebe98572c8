"""Gradients: whole numbers that worker, incarnation and seq decide, so that anybody can make them
again. It is also the script that the workers of a chaos run are: each pushes them, one after the
other, at a rate of 1 and without momentum. Whatever the order, the parameters are then minus the
sum of all applied pushes, to the bit: every sum stays far below 2**24, where float32 is exact.

The first coordinates are a ledger of their own: of worker i, coordinate 2 i counts pushes and the
next one sums their seqs. They name a culprit.
"""

import sys
import time
from functools import lru_cache

import torch
from torch import Tensor

TOTAL = 2**21
"""Elements: 8 MiB, which two shards hold."""
KINDS = 7


@lru_cache(maxsize=1)
def _patterns(total: int) -> list[Tensor]:
    ramp = torch.arange(total)
    return [((ramp * (kind + 2) + kind) % KINDS - KINDS // 2).float() for kind in range(KINDS)]


def gradient(
    total: int, num_workers: int, index: int, inc: int, seq: int, start: int = 0, stop: int = 0
) -> Tensor:
    """Elements start to stop (0: the end) of a gradient of `total`: 1-D float32, whole numbers.

    It may be a view of something that others share: not to be written to.
    """
    stop = stop or total
    pattern = _patterns(total)[(3 * index + 5 * inc + seq) % KINDS][start:stop]
    if start >= 2 * num_workers:
        return pattern
    made = pattern.clone()
    head = torch.zeros(max(stop, 2 * num_workers))
    head[2 * index], head[2 * index + 1] = 1, seq
    made[: 2 * num_workers - start] = head[start : min(stop, 2 * num_workers)]
    return made


def main() -> None:
    """Entry of the script: `gradients.py TOTAL PAUSE_S`. It ends when the run is stopped."""
    import distbelief

    total, pause_s = int(sys.argv[1]), float(sys.argv[2])
    me = distbelief.worker()
    flat = torch.nn.Parameter(torch.zeros(total))
    optimizer = distbelief.Downpour([("flat", flat)], lr=1.0)
    seq = 0
    while True:
        seq += 1
        optimizer.zero_grad()
        flat.grad = gradient(total, me.count, me.index, me.incarnation, seq).clone()
        optimizer.step(samples=1)
        time.sleep(pause_s)


if __name__ == "__main__":
    main()
