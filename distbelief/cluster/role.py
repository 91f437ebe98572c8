"""Role: what a host is for, and the custom resource by which Ray knows it.

A file of a cluster gives its hosts these resources; whoever places processes asks for them.
"""

PS = "ps"
"""Hosts of shards: memory and network."""

WORKER = "worker"
"""Hosts of model replicas: GPUs, and spot machines may do."""

ROLES = (PS, WORKER)
STANDARD = ("CPU", "GPU", "TPU", "memory", "object_store_memory")
"""Resources that Ray itself knows."""
