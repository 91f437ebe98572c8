"""Workers: the replicas that compute gradients, and their side of the conversation with shards."""

if __name__ != "distbelief.workers":  # pragma: no cover
    raise ImportError("import distbelief.workers, not workers: the top-level folder is the source")
