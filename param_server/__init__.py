"""The parameter server: pure rules (layout to shard) beside their I/O (transport to snapshot)."""

if __name__ != "distbelief.param_server":  # pragma: no cover
    raise ImportError(
        "import distbelief.param_server, not param_server: the top-level folder is the source"
    )
