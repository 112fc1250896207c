"""The vendors' figures for each chip, and the FLOPs of a token.

`CHIPS` are the chips that the planner supports; `dense_flops` knows the speed of more kinds, for
MFU.

Network figures are for one device and one direction, in bytes per second. ``fast`` is the network
inside a domain: a GPU's NVLink inside its node, or a TPU's ICI (both directions of the ring of the
torus that a mesh axis gets). ``slow`` is the network between domains: a GPU's InfiniBand card, or a
TPU's share of its host's network.
"""

import re
from dataclasses import dataclass

from mtnlg_jax.config import ModelConfig

GB = 1e9
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One JAX device of a kind; a chip with ``devices`` 2 appears as two of them."""

    kinds: tuple[str, ...]  # JAX's device_kind, for TPUs
    flops: float  # dense bf16 peak, FLOP/s
    memory: float  # bytes
    memory_speed: float  # bytes/s
    domain: int  # devices joined by the fast network
    fast: float  # bytes/s, see above
    slow: float
    source: str
    date: str  # of the source
    devices: int = 1
    tpu: bool = False
    # Of a TPU, to simulate its schedule: cycles/s, which are the peak over the FLOPs of a cycle of
    # its matrix units, and bytes/s of one ICI link in one direction. 0: not known.
    clock: float = 0.0
    link: float = 0.0
    # Shares of the peak that products and attention kernels reach in this package's compiled steps,
    # by the compiler's estimates: means over rows of benchmarks/results/planner.json. 0: not known.
    products: float = 0.0
    kernels: float = 0.0
    staged: bool = False  # collectives over data run along one dim of the torus after another
    sparse: bool = False  # SparseCores run collectives beside products
    # Bytes/s of the link to the host in one direction, for train.offload. Of GPUs: PCIe 5.0 with 16
    # lanes. Of TPUs: assumed, four fifths of PCIe 3.0 with 16 lanes.
    host: float = 64 * GB


_BOOK = "JAX scaling book, TPU table"
_CLOUD = "Google Cloud, TPU7x page"
CHIPS = {
    "A100-80": Chip(
        (),
        312e12,
        80 * GB,
        2.0e12,
        8,
        300 * GB,
        25 * GB,
        "NVIDIA data sheet; a node with 8 x HDR200, Narayanan 2021, section 5",
        "2021-04",
        host=32 * GB,  # PCIe 4.0
    ),
    "H100": Chip(
        (),
        989e12,
        80 * GB,
        3.35e12,
        8,
        450 * GB,
        50 * GB,
        "NVIDIA data sheet, SXM; one NDR400 a card",
        "2026-02",
    ),
    "H200": Chip(
        (),
        989e12,
        141 * GB,
        4.8e12,
        8,
        450 * GB,
        50 * GB,
        "NVIDIA data sheet, SXM; one NDR400 a card",
        "2026-02",
    ),
    "B200": Chip(
        (),
        2250e12,
        180 * GB,
        8.0e12,
        8,
        900 * GB,
        50 * GB,
        "NVIDIA data sheet, HGX; one NDR400 a card is assumed",
        "2026-03",
    ),
    "v4": Chip(
        ("TPU v4",),
        275e12,
        32 * GIB,
        1.2e12,
        4096,
        90 * GB,
        6.25 * GB,
        _BOOK,
        "2025-02",
        tpu=True,
        host=12.5 * GB,
        clock=1.05e9,
        link=45 * GB,
    ),
    "v5e": Chip(
        ("TPU v5 lite", "TPU v5e"),
        197e12,
        16 * GIB,
        0.81e12,
        256,
        90 * GB,
        3.1 * GB,
        _BOOK,
        "2025-02",
        tpu=True,
        host=12.5 * GB,
        clock=1.5e9,
        link=45 * GB,
        products=0.88,
        kernels=0.58,
        staged=True,
    ),
    "v5p": Chip(
        ("TPU v5p", "TPU v5"),
        459e12,
        95 * GIB,
        2.765e12,
        8960,
        200 * GB,
        6.25 * GB,
        _CLOUD,
        "2026",
        tpu=True,
        host=12.5 * GB,
        clock=1.75e9,
        link=90 * GB,
        products=0.85,
        kernels=0.63,
        sparse=True,
    ),
    "v6e": Chip(
        ("TPU v6 lite", "TPU v6e"),
        918e12,
        32 * GIB,
        1.638e12,
        256,
        200 * GB,
        12.5 * GB,
        _CLOUD,
        "2026",
        tpu=True,
        host=12.5 * GB,
        clock=1.75e9,
        link=90 * GB,
        products=0.79,
        kernels=0.24,
        staged=True,
        sparse=True,
    ),
    # Its two cores are two devices that share the chip's memory and network.
    "TPU7x": Chip(
        ("TPU7x",),
        2307e12 / 2,
        96 * GIB,
        7.38e12 / 2,
        2 * 9216,
        100 * GB,
        6.25 * GB,
        _CLOUD,
        "2026",
        devices=2,
        tpu=True,
        host=12.5 * GB,
    ),
}


# Dense bf16 FLOP/s with float32 sums, by JAX's device_kind without the vendor. A pattern must match
# the whole name: an H100 on PCIe is slower than one on SXM, and a slice of a card (MIG) or a laptop
# card is neither. Where a data sheet states the figure with sparsity, this is half of it.
_SHEET = "NVIDIA data sheet"
_BF16_FLOPS = (
    (r"A(100|800)([- ](SXM4?|PCIE|PCIe))?[- ](40|80)GB( PCIe)?", 312e12, _SHEET),
    (r"A30", 165e12, _SHEET),
    (r"A40", 149.7e12, _SHEET),
    (r"A10", 125e12, _SHEET),
    (r"L4", 121e12, _SHEET),
    (r"L40", 181.05e12, _SHEET),
    (r"L40S", 362.05e12, _SHEET),
    (r"H(100|800)( \d+GB HBM3)?", 989e12, _SHEET + ", SXM"),
    (r"H(100|800) PCIe", 756e12, _SHEET),
    (r"H100 NVL", 835e12, _SHEET),
    (r"H20", 148e12, _SHEET),
    (r"H200", 989e12, _SHEET + ", SXM"),
    (r"H200 NVL", 835.5e12, _SHEET),
    (r"GH200 (120|144|480)GB", 989e12, _SHEET),
    (r"B200( .*)?", 2250e12, _SHEET + ", HGX"),
    (r"GB200( .*)?", 2500e12, _SHEET + ", NVL72"),
    (r"GeForce RTX 3090", 71e12, "NVIDIA, GA102 white paper"),
    (r"GeForce RTX 4090", 165.2e12, "NVIDIA, Ada white paper"),
    (r"GeForce RTX 5090", 209.5e12, "NVIDIA, RTX Blackwell white paper"),
    (r"RTX A6000", 154.8e12, _SHEET),
    (r"RTX 6000 Ada Generation", 364.2e12, _SHEET),
    (r"Instinct MI300X( .*)?", 1307.4e12, "AMD data sheet"),
)


# Watts of one device by JAX's device_kind without the vendor: the most that the card or chip draws,
# without its host and its cooling. A pattern must match the whole name. Google has not published
# the power of its chips after v4, and where a vendor's figure is a range nothing is listed.
_WATTS = (
    (r"A100[- ]SXM4?[- ](40|80)GB", 400.0, _SHEET),
    (r"A100[- ]PCI[Ee][- ]40GB", 250.0, _SHEET),
    (r"A100[- ]PCI[Ee][- ]80GB|A100 80GB PCIe", 300.0, _SHEET),
    (r"A30", 165.0, _SHEET),
    (r"A40", 300.0, _SHEET),
    (r"A10", 150.0, _SHEET),
    (r"L4", 72.0, _SHEET),
    (r"L40", 300.0, _SHEET),
    (r"L40S", 350.0, _SHEET),
    (r"H100( \d+GB HBM3)?", 700.0, _SHEET + ", SXM"),
    (r"H100 PCIe", 350.0, "NVIDIA product brief PB-11133"),
    (r"H200", 700.0, _SHEET + ", SXM"),
    (r"H200 NVL", 600.0, _SHEET),
    (r"RTX A6000|RTX 6000 Ada Generation", 300.0, _SHEET),
    (r"Instinct MI300X( .*)?", 750.0, "AMD data sheet"),
    (r"TPU v4", 192.0, "Google Cloud, TPU v4 page"),
)


def _without_vendor(device_kind: str) -> str:
    return re.sub(r"^(NVIDIA|AMD|Tesla) ", "", device_kind)


def watts_of(device_kind: str) -> tuple[float, str] | None:
    """Return (most watts of one device of ``device_kind``, the source); None if unknown.

    It is None of CPUs, and of a slice of a card.
    """
    name = _without_vendor(device_kind)
    return next(
        ((watts, source) for kind, watts, source in _WATTS if re.fullmatch(kind, name)), None
    )


def dense_flops(device_kind: str) -> float | None:
    """Return the dense bf16 peak, FLOP/s, of one device of ``device_kind``; None if unknown."""
    for chip in CHIPS.values():
        if device_kind in chip.kinds:
            return chip.flops
    name = _without_vendor(device_kind)
    if "MIG" in name.split():
        return None
    return next((flops for kind, flops, _ in _BF16_FLOPS if re.fullmatch(kind, name)), None)


def size_of(size: float) -> str:
    """Format bytes in the largest unit that fits, such as 15.64 GiB."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def parse_chips(text: str) -> tuple[str, int]:
    """Parse "H100:1024" to ("H100", 1024). Raise ValueError naming the known chips otherwise."""
    name, _, number = text.partition(":")
    known = {chip.lower(): chip for chip in CHIPS}
    if name.lower() not in known:
        raise ValueError(f"unknown chip {name!r}; choose one of {', '.join(CHIPS)}")
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= 2**20):
        raise ValueError(
            f"--chips={text!r} needs a number of chips from 1 to {2**20}; write it as "
            f"--chips={known[name.lower()]}:1024"
        )
    return known[name.lower()], int(number)


def flops_per_token(
    model: ModelConfig, sequence_length: int, frozen: bool = False, head: bool = True
) -> float:
    """Return forward and backward FLOPs per token, 6 N + 12 L H Q T (PaLM, appendix B).

    Attention counts in full, not halved for causality; T is at most the window of a layer. N
    excludes the input embeddings, which are looked up, and the experts that a token does not visit.
    It includes the output embedding, unless ``head`` is False. ``frozen``: 4 N, since frozen
    matrices have no gradient.
    """
    products = model.active_parameter_count()  # raises where the vocabulary is not known
    if model.position_embedding_type == "learned":
        products -= model.max_position_embeddings * model.hidden_size
    if not model.tie_embeddings:
        products -= model.vocabulary * model.hidden_size
    if not head:
        products -= model.vocabulary * model.hidden_size
    width = model.num_attention_heads * model.head_width
    each = 4 if frozen else 6
    return each * products + 12 * model.num_layers * width * model.attended(sequence_length)


def layer_flops(model: ModelConfig, sequence_length: int) -> dict[str, float]:
    """Return the forward FLOPs per token of each product of one layer, in the mean over layers.

    For MT-NLG's block they sum to 24 h^2 (1 + s / (6 h)) (Narayanan 2021, appendix A).
    """
    hidden = model.hidden_size
    heads = model.num_attention_heads
    head = model.head_width
    inputs = 2 if model.gated else 1
    visits = model.moe.moe_router_topk if model.moe.num_moe_experts else 1
    mlp = visits * model.mlp_width + model.moe.moe_shared_expert_intermediate_size
    return {
        "qkv": 2 * hidden * head * (heads + 2 * model.kv_heads),
        "scores": 4 * model.attended(sequence_length) * heads * head,
        "out": 2 * hidden * heads * head,
        "fc1": 2 * inputs * hidden * mlp,
        "fc2": 2 * hidden * mlp,
    }
