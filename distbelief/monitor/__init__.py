"""Monitor: a process of its own that watches a run and serves what it sees.

    workers, shards ──reports──► collector ┐
    launcher ──────chronicle──► stdin ─────┤► store ──► api ──► page, terminal
                                           ├► metrics ──► /metrics
                                           └► loggers ──► TensorBoard, W&B, MLflow, trackio

It is fed lossily and bounded; killing it, or stopping it for a while, changes nothing in training.
"""
