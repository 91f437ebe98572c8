"""Provider: which keys Ray 2.60 reads of the `provider` of a cluster file, for each type.

Ray accepts any key there without a word, so a misspelt one has no effect. The lists follow what its
code asks for, of which ray-schema.json has a part. Keys that Ray writes itself are left out.
"""

from dataclasses import dataclass
from typing import Any

_ALL = frozenset(
    {
        "type",
        "use_internal_ips",
        "disable_node_updaters",
        "disable_launch_config_check",
        "foreground_node_launch",
        "worker_liveness_check",
    }
)

KEYS: dict[str, frozenset[str]] = {
    "aws": _ALL
    | {
        "region",
        "availability_zone",
        "cache_stopped_nodes",
        "aws_credentials",
        "key_pair",
        "security_group",
        "cloudwatch",
        "use_external_head_ip",
    },
    "gcp": _ALL
    | {
        "region",
        "availability_zone",
        "project_id",
        "gcp_credentials",
        "cache_stopped_nodes",
        "use_external_head_ip",
    },
    "azure": _ALL
    | {
        "location",
        "resource_group",
        "subscription_id",
        "tags",
        "unique_id",
        "subnet_mask",
        "msi_name",
        "msi_resource_group",
        "availability_zone",
        "cache_stopped_nodes",
        "use_external_head_ip",
    },
    "local": _ALL | {"head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
}

REQUIRED: dict[str, tuple[str, ...]] = {
    "aws": ("region",),
    "gcp": ("region", "availability_zone", "project_id"),
    "azure": ("location", "resource_group"),
    "local": (),  # Ray itself asks for addresses or a coordinator
}

MACHINE: dict[str, tuple[str, ...]] = {
    "aws": ("InstanceType",),
    "gcp": ("machineType",),
    "azure": ("azure_arm_parameters", "vmSize"),
}
"""Where in `node_config` the kind of machine stands."""


NODE_KEYS: dict[str, tuple[str, frozenset[str]]] = {
    "azure": (
        "azure_arm_parameters",
        frozenset(
            {
                "vmSize",
                "imagePublisher",
                "imageOffer",
                "imageSku",
                "imageVersion",
                "imageId",
                "osDiskSize",
                "priority",
                "evictionPolicy",
                "billingProfile",
                "enableAcceleratedNetworking",
                "availability_zone",
            }
        ),
    ),
}
"""A table in `node_config` whose keys are Ray's own, and not those of the cloud's interface."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a node_config asks for."""

    kind: str
    is_spot: bool


def machine(provider: str, node_config: dict[str, Any]) -> Machine:  # Any: YAML
    """Of a group. What is not said is `?`."""
    value: Any = node_config
    for key in MACHINE.get(provider, ("?",)):
        value = value.get(key) if isinstance(value, dict) else None
    return Machine(kind=str(value or "?"), is_spot=_is_spot(provider, node_config))


def _is_spot(provider: str, config: dict[str, Any]) -> bool:  # Any: YAML
    if provider == "aws":
        options = config.get("InstanceMarketOptions")
        return isinstance(options, dict) and options.get("MarketType") == "spot"
    if provider == "gcp":
        told = config.get("scheduling")
        items = told if isinstance(told, list) else [told]
        merged = {k: v for item in items if isinstance(item, dict) for k, v in item.items()}
        return merged.get("preemptible") is True or merged.get("provisioningModel") == "SPOT"
    if provider == "azure":
        told = config.get("azure_arm_parameters")
        return isinstance(told, dict) and told.get("priority") == "Spot"
    return False
