"""List what GPUs can do, with the source of each figure, and read `16xH100-80G`."""

import difflib
import re
from dataclasses import dataclass

from rlqwen.errors import ConfigError

MIB = 2**20
NODE = 8
"""GPUs of a node."""
MOST_GPUS = 1024


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, in a node of eight."""

    name: str
    flops: float
    """Peak FLOP/s of dense bfloat16 products that add up in float32, without sparsity."""
    memory: float
    """Bytes, as nvidia-smi shows them."""
    bandwidth: float
    """Bytes per second of its own memory."""
    link: float
    """Bytes per second and direction to the other GPUs of the node."""
    network: float
    """Bytes per second and direction to other nodes, per GPU."""
    has_peer_link: bool = True
    """Whether GPUs of a node are connected directly, and not through the CPU."""


# flops, bandwidth and link: NVIDIA's data sheets, "without sparsity" (half of what they print with sparsity). They print
# NVLink in both directions together; link is half of it. memory: MiB of nvidia-smi. network: what NVIDIA's own node (DGX)
# has per GPU, 200 Gb/s with A100 and 400 Gb/s from H100 on; cloud nodes may have less.
_KINDS = (
    # "NVIDIA A100 Tensor Core GPU" data sheet (2022): 312 TFLOP/s; 40 GB at 1,555 GB/s; NVLink 600 GB/s.
    Gpu("A100-40G", 312e12, 40_960 * MIB, 1.555e12, 300e9, 25e9),
    # The same: 80 GB SXM at 2,039 GB/s.
    Gpu("A100-80G", 312e12, 81_920 * MIB, 2.039e12, 300e9, 25e9),
    # A800 is A100 with NVLink at 400 GB/s (Reuters, 2022-11-08; resellers' "A800 80GB SXM" data sheets).
    Gpu("A800-80G", 312e12, 81_920 * MIB, 2.039e12, 200e9, 25e9),
    # "NVIDIA H100 Tensor Core GPU" data sheet, SXM: 1,979 TFLOP/s with sparsity; 3.35 TB/s; NVLink 900 GB/s.
    Gpu("H100-80G", 989.4e12, 81_559 * MIB, 3.35e12, 450e9, 50e9),
    # "NVIDIA H200 Tensor Core GPU" data sheet: as H100, with 141 GB at 4.8 TB/s.
    Gpu("H200-141G", 989.4e12, 143_771 * MIB, 4.8e12, 450e9, 50e9),
    # H800 is H100 with NVLink at 400 GB/s (DeepSeek-V3 report, arXiv 2412.19437, section 3.1; arXiv 2505.09343).
    Gpu("H800-80G", 989.4e12, 81_559 * MIB, 3.35e12, 200e9, 50e9),
    # H20: 148 TFLOP/s, 96 GB at 4.0 TB/s, NVLink 900 GB/s (NVIDIA's table for H20, SemiAnalysis 2023-11-09).
    Gpu("H20-96G", 148e12, 97_871 * MIB, 4.0e12, 450e9, 50e9),
    # "NVIDIA L40S" data sheet: 362.05 TFLOP/s, 864 GB/s, PCIe 4.0 x16 (64 GB/s in both directions), no NVLink.
    Gpu("L40S-48G", 362.05e12, 46_068 * MIB, 864e9, 32e9, 12.5e9, has_peer_link=False),
    # "NVIDIA DGX B200" data sheet: 8 GPUs with 1,440 GB at 64 TB/s, 14.4 TB/s of NVLink; B200: 4.5 PFLOP/s with sparsity.
    Gpu("B200-180G", 2250e12, 183_359 * MIB, 8.0e12, 900e9, 50e9),
    # "NVIDIA Ada GPU architecture" white paper, appendix A: 165.2 TFLOP/s with float32 sums, 1,008 GB/s; PCIe 4.0 x16 without
    # peer-to-peer.
    Gpu("RTX4090-24G", 165.2e12, 24_564 * MIB, 1.008e12, 32e9, 12.5e9, has_peer_link=False),
)  # fmt: skip
GPUS = {gpu.name: gpu for gpu in _KINDS}
_SHORT = {"A100": "A100-80G"} | {name.partition("-")[0]: name for name in GPUS if not name.startswith("A100")}
"""The kind that is meant by a name without its memory."""


@dataclass(frozen=True)
class Cluster:
    """A number of equal GPUs, in nodes of eight."""

    gpu: Gpu
    count: int

    @classmethod
    def parse(cls, text: str) -> "Cluster":
        """Read `16xH100-80G`, `16xH100` or `H100`; raise ConfigError with the known kinds for anything else."""
        found = re.fullmatch(r"(?:(\d{1,6})\s*[xX*]\s*)?(.+)", text.strip())
        given = found[2] if found else text
        name = given.upper().replace(" ", "").replace("_", "-").removesuffix("B")
        name = _SHORT.get(name, name)
        if found is None or name not in GPUS:
            near = difflib.get_close_matches(name, [*GPUS, *_SHORT], n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"--gpus {text[:200]!r}: no such GPU; {hint}write for example 16xH100-80G, with one of {', '.join(GPUS)}"
            )
        count = int(found[1] or 1)
        if not 1 <= count <= MOST_GPUS or (count > NODE and count % NODE):
            raise ConfigError(
                f"--gpus {text[:200]!r}: {count} GPUs are not 1 to {NODE}, nor whole nodes of {NODE} up to {MOST_GPUS} GPUs"
            )
        return cls(GPUS[name], count)

    @property
    def nodes(self) -> int:
        return -(-self.count // NODE)

    def link(self, ranks: int, stride: int = 1) -> float:
        """Return bytes per second and direction of each GPU in a group of `ranks`, every `stride`-th GPU."""
        return self.gpu.link if ranks * stride <= NODE else min(self.gpu.link, self.gpu.network)

    def __str__(self) -> str:
        return f"{self.count}x{self.gpu.name}"
