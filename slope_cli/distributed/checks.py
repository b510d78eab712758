"""What each process of a run runs on, and whether they fit together."""

import os
import socket
from collections.abc import Sequence
from typing import Any

import torch

from slope_cli.distributed.launch import Ranks
from slope_cli.errors import SlopeError, UsageError, first_line
from slope_cli.utils.environment import driver, package_version, source_version

ALIKE = {
    "gpu": "GPU models",
    "torch": "versions of torch",
    "cuda": "versions of CUDA",
    "nccl": "versions of NCCL",
    "transformers": "versions of transformers",
    "source": "versions of slope",
}
"""What must be the same on all ranks."""
LEAST_MEMORY = 0.9
"""The share of a GPU's memory that must be free at the start, or another process is on it."""


def describe(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """The host, versions and device of this rank; `fault` is empty if the device works.

    Sizes are in bytes; for a CPU `gpu` and what belongs to it are None.
    """
    gpu = device.type == "cuda"
    about: dict[str, Any] = {
        "rank": ranks.rank,
        "host": ranks.host,
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
        "source": source_version()["sha256"],
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        "driver": driver() if gpu else None,
        "gpu": None,
        "uuid": None,
        "fault": "",
    }
    try:
        if gpu:
            properties = torch.cuda.get_device_properties(device)
            free, total = torch.cuda.mem_get_info(device)
            about |= {"gpu": properties.name, "uuid": str(properties.uuid), "memory": total, "free_memory": free}
            if free < LEAST_MEMORY * total:
                sizes = f"only {free / 1e9:.1f} of {total / 1e9:.1f} GB"
                about["fault"] = f"{sizes} of the GPU's memory are free: another process uses it"
        ones_88 = torch.ones(8, 8, device=device)
        if float((ones_88 @ ones_88).sum()) != 512:
            about["fault"] = "a product of matrices of ones is wrong"
    except RuntimeError as error:
        about["fault"] = first_line(error)
    return about


def require_alike(members: Sequence[dict[str, Any]]) -> None:
    """Check what `describe` returned on all ranks.

    Raises:
        UsageError: they differ in GPU model or versions, or two share a GPU.
        SlopeError: a rank's device does not work.
    """
    if faults := [f"rank {m['rank']} on {m['host']}: {m['fault']}" for m in members if m["fault"]]:
        raise SlopeError("; ".join(faults))
    for key, what in ALIKE.items():
        hosts: dict[Any, set[str]] = {}
        for member in members:
            hosts.setdefault(member[key], set()).add(member["host"])
        if len(hosts) > 1:
            each = "; ".join(f"{value} on {', '.join(sorted(names))}" for value, names in hosts.items())
            raise UsageError(f"the ranks have different {what}: {each}")
    owners: dict[Any, int] = {}
    for member in members:
        if member["uuid"] is not None and owners.setdefault(member["uuid"], member["rank"]) != member["rank"]:
            both = f"ranks {owners[member['uuid']]} and {member['rank']} on {member['host']}"
            raise UsageError(f"{both} share a GPU: start one task for each GPU")


def require_interfaces() -> None:
    """UsageError if a variable says to use a network interface that this host does not have."""
    present = [name for _, name in socket.if_nameindex()]
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(key, "")
        if not value or value.startswith("^"):
            continue
        exact = value.startswith("=") or key.startswith("GLOO")
        for name in value.removeprefix("=").split(","):
            if name not in present if exact else not any(own.startswith(name) for own in present):
                raise UsageError(f"{key}={value}: this host has only {', '.join(present)}")
