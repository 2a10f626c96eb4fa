"""Profiles computed from datasheets: no measurement, only a bound with two efficiencies.

    seconds = max(bytes / (0.8 x bandwidth), 2 x parameters x rows / (0.6 x flops)) + launches x 2 us

`bytes` are the weights that the part reads, for a layer with its keys and values of `context` tokens, for a draft with
the rows of the target's head that the drafter borrows. A recurrent layer has no keys and values: each row reads its
state and writes the next one, since a rejected token needs the one before. Of a mixture's experts `rows` rows read as
many as they are routed to, where all are equally likely: 1 - (1 - share)^rows of them. Weights count in the target's
dtype, also those that lie in 8 bits in a drafter's file. A layer takes one launch (its kernels are replayed from a
graph), as do the head and a draft's level. A message takes the link's latency and bytes / (0.8 x its bandwidth). Source
of the form: S. Williams, A. Waterman, D. Patterson, "Roofline" (CACM 2009). The efficiencies are what well-made kernels
reach at batch 1; the launch is what a node of a CUDA graph takes.

Bandwidths and dense 16-bit tensor flops are the vendors' (NVIDIA's datasheets of each card). Datasheets state no
latency: 5 us for a message over NVLink and 15 us over PCIe are what NCCL's small sends take.
"""

from __future__ import annotations

from dataclasses import dataclass

from spdbench.profiles.profile import make_key

BANDWIDTH_SHARE, FLOPS_SHARE, LAUNCH_S = 0.8, 0.6, 2e-6
CONTEXTS = (128, 1024, 4096)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MESSAGE_ROWS = (1, 64)
STATE_PASSES = 2
"""A row of a recurrent layer reads the state before it and writes the one behind it."""
VERIFY_S, HOST_S = 20e-6, 20e-6
"""A verdict is an id's way to the host and its comparison there; the host's share is Python between two launches."""


@dataclass(frozen=True)
class Datasheet:
    """Bytes/s of memory, dense 16-bit flops/s, a message's latency in s and the link's bytes/s in one direction."""

    name: str
    bandwidth: float
    flops: float
    latency_s: float
    link: float


NVLINK_S, PCIE_S = 5e-6, 15e-6
DEVICES = {
    "h200-sxm": Datasheet("NVIDIA H200 SXM", 4.8e12, 989e12, NVLINK_S, 450e9),
    "h100-sxm": Datasheet("NVIDIA H100 SXM", 3.35e12, 989e12, NVLINK_S, 450e9),
    "h100-pcie": Datasheet("NVIDIA H100 PCIe", 2.0e12, 756e12, PCIE_S, 64e9),
    "a100-80": Datasheet("NVIDIA A100 80GB SXM", 2.039e12, 312e12, NVLINK_S, 300e9),
    "a100-40": Datasheet("NVIDIA A100 40GB SXM", 1.555e12, 312e12, NVLINK_S, 300e9),
    "l40s": Datasheet("NVIDIA L40S", 864e9, 362e12, PCIE_S, 32e9),
    "l4": Datasheet("NVIDIA L4", 300e9, 121e12, PCIE_S, 32e9),
    "rtx4090": Datasheet("NVIDIA RTX 4090", 1008e9, 165e12, PCIE_S, 32e9),
    "rtx3090": Datasheet("NVIDIA RTX 3090", 936e9, 71e12, PCIE_S, 32e9),
}


@dataclass(frozen=True)
class Sizes:
    """Of a model, in bytes: one layer's weights, the head's, a layer's keys and values of one token, a row of hidden
    states, and a layer's recurrent state. Of layers these are means over all: those of one kind have no share in the
    other's. `experts` are those of `layer` among which a router chooses, and `routed` the share that a token passes."""

    layer: float
    head: float
    kv: float
    row: int
    itemsize: int
    state: float = 0.0
    experts: float = 0.0
    routed: float = 1.0

    def layer_read(self, rows: int) -> float:
        """Bytes of a layer's weights that a forward of so many rows reads."""
        return self.layer - self.experts * (1 - self.routed) ** rows


@dataclass(frozen=True)
class DrafterSize:
    """The weights in bytes that one draft (of one level, in trees) reads, a borrowed output head among them, with the
    fields of its key; `once_bytes` are those that a draft reads once for all levels."""

    method: str
    sha256: str
    num_bytes: float
    fields: tuple[tuple[str, object], ...] = ()
    once_bytes: float = 0.0


def computed_seconds(device: Datasheet, sizes: Sizes, drafters: tuple[DrafterSize, ...]) -> dict[str, float]:
    """All entries of the profile of a model on `device`."""

    def seconds(weights: float, rows: int, others: float = 0.0) -> float:
        """Of `weights` that each row is multiplied with, and `others` that are only read."""
        memory_s = (weights + others) / (BANDWIDTH_SHARE * device.bandwidth)
        return max(memory_s, 2 * weights / sizes.itemsize * rows / (FLOPS_SHARE * device.flops)) + LAUNCH_S

    found, each_row = {make_key("verify"): VERIFY_S, make_key("host"): HOST_S}, sizes.layer_read(1)
    for rows in ROWS:
        found[make_key("head", rows=rows)] = seconds(sizes.head, rows)
        for context in CONTEXTS:
            key = make_key("layer", context=context, rows=rows)
            others = sizes.layer_read(rows) - each_row + context * sizes.kv + STATE_PASSES * rows * sizes.state
            found[key] = seconds(each_row, rows, others)
    for drafter in drafters:
        fields = dict(drafter.fields)
        for levels in (1, 4) if "tree" in fields else (None,):
            more = {} if levels is None else {"levels": levels}
            key = make_key("draft", method=drafter.method, drafter=drafter.sha256[:12], **fields, **more)
            once_s = drafter.once_bytes / (BANDWIDTH_SHARE * device.bandwidth)
            found[key] = (levels or 1) * seconds(drafter.num_bytes, 1) + once_s
    for num_bytes in (rows * sizes.row for rows in MESSAGE_ROWS):
        key = make_key("message", bytes=num_bytes)
        found[key] = device.latency_s + num_bytes / (BANDWIDTH_SHARE * device.link)
    return found
