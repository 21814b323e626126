"""What GPUs, links and software do in a second: the one table that predictions of time rest on, with sources.

A ``Share`` is of what a data sheet promises, as low, expected and high; ``source`` says where the three come from, and
"assumed" where nothing published says it. Nothing here was measured with this project: it has not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

GIGA, TERA, GIB = 1e9, 1e12, 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node of eight, by its vendor's data sheet."""

    name: str
    memory_gib: float
    """What the driver reports, which is less than the name says."""
    tflops: float
    """Dense bfloat16, 1e12 a second."""
    hbm_tb: float
    """1e12 bytes a second of its memory."""
    nvlink_gb: float
    """1e9 bytes a second to GPUs of its node, in one direction."""
    network_gb: float
    """1e9 bytes a second to other nodes, in one direction, of its node's usual network cards."""
    pcie_gb: float
    """1e9 bytes a second to host memory, in one direction."""
    source: str

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.memory_gib * GIB)


_H100 = "NVIDIA H100 data sheet (SXM), DGX H100 data sheet (eight ConnectX-7 of 400 Gb/s)"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-80", 80.0, 312, 2.039, 300, 25, 32, "NVIDIA A100 data sheet (SXM 80 GB), DGX A100 (200 Gb/s each)"),
        Gpu("h100-80", 79.6, 989, 3.35, 450, 50, 64, _H100),
        Gpu("h800-80", 79.6, 989, 3.35, 200, 50, 64, "as H100, NVLink of 400 GB/s (DeepSeek-V3, arXiv 2412.19437)"),
        Gpu("h20-96", 95.6, 148, 4.0, 450, 50, 64, "NVIDIA HGX H20 product brief; network as DGX H100"),
        Gpu("h200-141", 140.4, 989, 4.8, 450, 50, 64, "NVIDIA H200 data sheet (SXM), DGX H200"),
        Gpu("b200-180", 179.0, 2250, 8.0, 900, 50, 64, "NVIDIA DGX B200 data sheet, an eighth of the system each"),
    )
}
"""Name -> GPU."""


@dataclass(frozen=True)
class Share:
    """Of a promised rate: what is reached at worst, as expected, at best."""

    low: float
    mid: float
    high: float
    source: str


TRAIN_EXPERTS = Share(
    0.10,
    0.18,
    0.45,
    "of the bfloat16 peak, recomputed FLOPs counted and exchanges not, mixtures of experts. High: NeMo AutoModel, "
    "Qwen3-30B-A3B on 8 H100 with DeepEP and balanced tokens, 277 model TFLOP/s with full recompute = 0.37 with its "
    "exchanges. Expected: lower by what packed sequences of uneven length and uneven experts take, so that steps come "
    "near those of NeMo RL",
)
TRAIN_DENSE = Share(
    0.28,
    0.38,
    0.50,
    "the same for dense models. High: NeMo AutoModel on H100, 389 model TFLOP/s (Llama3 70B pre-training), 277 to 423 "
    "(fine-tuning up to 70B). Expected and low: assumed",
)
FORWARD = Share(0.9, 1.1, 1.4, "a forward pass's share relative to a training step's: assumed")
NVLINK = Share(0.5, 0.7, 0.85, "of NVLink in collectives of large tensors: assumed")
NETWORK = Share(0.5, 0.7, 0.9, "of the network cards in collectives of large tensors: assumed")
PCIE = Share(0.4, 0.7, 0.85, "of PCIe, copies from pinned host memory by all GPUs of a node at once: assumed")
HBM = Share(0.5, 0.7, 0.85, "of memory in elementwise passes (AdamW): assumed")
SYNC_GB = Share(
    10.0,
    23.0,
    28.0,
    "1e9 bytes a second of weights to all servers. High: 61 GB in 2.16 s (miles, Qwen3-30B-A3B, H100); expected: 2.67; "
    "low: 4.4 s on H20 (verl) and less for a path that nobody has run yet",
)
LAYER_S = Share(5e-4, 2e-4, 1e-4, "seconds a layer a micro-batch that a host keeps a GPU waiting, forward: assumed")

FITTED_ON = "h100-80"
DECODE_WEIGHTS = 0.85
"""Of memory bandwidth, when a decoding step reads weights. This and the next four are fitted to published points in
bfloat16 on one to eight H100 (ml.energy leaderboard, commit 0cd52da, task lm-arena-chat: Qwen3 8B, 14B, 32B, 30B-A3B,
235B-A22B, batches of 8 to 1,019), whose prompts were taken as 200 tokens."""
DECODE_CACHE = 0.9
"""When keys and values are: likewise."""
DECODE_FLOPS = 0.6
"""Of the peak, for a batch's products: likewise."""
DECODE_LAYER_S = 7e-5
"""Seconds a layer a step, whatever the batch: likewise."""
DECODE_SEQUENCE_S = 6e-5
"""Seconds a step for each sequence of a server's batch, whatever its GPUs (scheduling, sampling): likewise."""
DECODE = Share(
    0.8,
    1.0,
    1.3,
    "times on H100: measured are 0.87 to 1.31 of the fit's where it was fitted (57 points), 0.81 to 1.23 on the same "
    "leaderboard's task gpqa (24 points), with vLLM",
)
DECODE_ELSEWHERE = Share(
    0.7, 1.0, 2.0, "times on other GPUs: Qwen3's speed benchmark on H20 takes 1.0 to 2.0 of the fit's"
)
PREFILL = Share(0.3, 0.45, 0.6, "of the peak, prompts: assumed")
REST = Share(
    0.1,
    0.3,
    0.6,
    "of an outer step's other parts: rewards, planning, waiting for the slowest rank, flushing servers. Expected: what "
    "NeMo RL's published steps take more than the parts here; the others assumed",
)

HEADROOM = 0.1
"""Of a card, what no plan uses: experts that get more tokens than others, fragments. Assumed."""
CONTEXT = int(3.0 * GIB)
"""Bytes of a card beside what is counted: CUDA's context, NCCL's buffers, what the allocator cannot use. Assumed."""
ASLEEP = int(2.0 * GIB)
"""Of a sleeping server on its card: context, CUDA graphs. Assumed."""
SERVER_WORK = int(6.0 * GIB)
"""Of a waking server beside weights and cache: its activations, logits, CUDA graphs. Assumed."""
HOST_RANK, HOST_SERVER = int(4 * GIB), int(8 * GIB)
"""Host memory of a process on a GPU. Assumed."""
HOST_NODE = int(1.8e12)
"""Host memory of a node: a DGX H100 has 2 TB, and the system some of it."""
