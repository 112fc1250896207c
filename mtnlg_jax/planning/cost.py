"""Memory and time of a run's step on a layout, from arithmetic.

A step is added up from what each device does: products at EFFICIENCY of the chip's peak,
collectives at the network speed of their axis, and the ticks in which a pipeline waits. Nothing
overlaps but ZeRO-3, which inside a layer can move the later weights while the earlier multiply; the
other collectives feed the very next product. A message takes no time to start. So a prediction is
of the right order and ranks layouts of large models; a run of your own corrects it
(search.measured_efficiency).

Formulas: Narayanan 2021 (bubble, FLOPs), Korthikanti 2022 (activation bytes), Jacobs 2023 and Llama
Team 2024 (context traffic). Collectives a layer and FLOPs recomputed are those of this repository's
step, counted.
"""

import functools
import math
from typing import NamedTuple

from mtnlg_jax.config import Config
from mtnlg_jax.hardware import Chip, flops_per_token, layer_flops
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import AXES, mesh_shape, plan_table

# Share of peak that products reach while a stage is busy. The one constant of the model, from
# MT-NLG on A100s: with it the paper's 60.1, 50.2 and 44.4 s a step on 2,240, 2,800 and 3,360 of
# them come out within 3 %. Software
# of 2021, kernels unfused: Megatron-LM of 2022 made 1.3 times as much of the same card.
EFFICIENCY = 0.50

MEMORY_SHARE = (
    0.9  # of the chip's memory; the rest is XLA's workspace, the networks' buffers, the runtime
)
# stage inputs held for each that the circular schedule needs; 530 B compiled for v5p, H100: 1.0
CIRCULAR_COPIES = 1.25
LAYER_BYTES = (
    34  # of s b h: what one layer's backward pass has at hand (Korthikanti 2022, equation 4)
)


class Policy(NamedTuple):
    """A value of train.recompute. ``kept``: bytes of s b h that a layer keeps in bf16 for the
    backward pass;
    ``again``: products computed a second time; ``collectives`` over tensor in a layer and
    micro-batch, forward and backward (each moves s b h once): the gathers before products are
    always made again."""

    kept: float
    again: tuple[str, ...]
    collectives: int


POLICIES = {  # model.transformer.RECOMPUTE; most kept first. The backward pass needs no second fc2
    "none": Policy(32, (), 10),
    "elementwise": Policy(20, (), 10),
    "mlp": Policy(12, ("fc1",), 10),
    "projections": Policy(6, ("qkv", "fc1"), 10),
    "full": Policy(2, ("qkv", "scores", "out", "fc1"), 11),
}


class Layout(NamedTuple):
    """What the planner chooses of a config."""

    pipe: int
    data: int
    context: int
    tensor: int
    zero: int
    schedule: str
    virtual_pipe: int
    flush: int | None
    micro_batch_size: int
    recompute: str

    @property
    def devices(self) -> int:
        return self.pipe * self.data * self.context * self.tensor

    @property
    def mesh(self) -> tuple[int, int, int, int]:
        return self[:4]


class Estimate(NamedTuple):
    """``seconds`` of a step by what they go to; ``memory`` of a device in bytes by what it
    holds."""

    layout: Layout
    seconds: dict[str, float]
    memory: dict[str, float]
    tokens: int
    model_flops: float  # of a step, PaLM's count: attention in full, nothing recomputed
    done_flops: float  # with what is recomputed
    # seconds in which ZeRO-3 moves weights and gradients behind products; not in ``seconds``
    hidden: float
    chip: Chip

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def mfu(self) -> float:
        return self.model_flops / self.step_seconds / (self.layout.devices * self.chip.flops)

    @property
    def hfu(self) -> float:
        return self.done_flops / self.step_seconds / (self.layout.devices * self.chip.flops)

    @property
    def bubble(self) -> float:
        """Share of the step in which a device waits for its pipeline."""
        return self.seconds["bubble"] / self.step_seconds

    @property
    def binds(self) -> str:
        """What to buy more of: compute where nothing else takes a fifth of the step; memory stands
        for what is recomputed for want of it."""
        losses = {
            "memory": self.seconds["recompute"],
            "tensor comm": self.seconds["tensor"],
            "context comm": self.seconds["context"],
            "pipeline bubble": self.seconds["bubble"],
            "pipeline comm": self.seconds["pipe"],
            "data comm": self.seconds["data"],
            "memory speed": self.seconds["update"],
        }
        worst = max(losses, key=losses.get)
        return worst if sum(losses.values()) > 0.2 * self.step_seconds else "compute"


def layout_of(config: Config, devices: int | None = None) -> Layout:
    """The layout that ``config`` chose; without ``devices`` its mesh.data must be known. Raises
    ValueError where the mesh does not multiply to ``devices``."""
    mesh = config.mesh
    train = config.train
    data = mesh.data if devices is None else mesh_shape(mesh, devices)["data"]
    micro = train.micro_batch_size or train.global_batch_size // data
    return Layout(
        mesh.pipe,
        data,
        mesh.context,
        mesh.tensor,
        mesh.zero,
        mesh.schedule,
        mesh.virtual_pipe,
        mesh.flush,
        micro,
        train.recompute,
    )


# --- memory and time of one layout
# ----------------------------------------------------------------------------


def padded_size(shape: tuple[int, ...]) -> int:
    """Numbers that a TPU stores for a tensor of ``shape``: tiles of 8 x 128, over the two dims for
    which that wastes least. XLA chooses the order of a parameter's dims so: (L, D, N, H) with H 160
    lies with D innermost, unpadded; compiled for v5p, libtpu 0.0.50."""
    if len(shape) < 2:
        return math.prod(shape)

    def tiles(size, tile):
        return -(-size // tile) * tile / size

    waste = min(
        tiles(inner, 128) * tiles(rows, min(8, 1 << (rows - 1).bit_length()))
        for i, inner in enumerate(shape)
        for j, rows in enumerate(shape)
        if i != j
    )
    return round(math.prod(shape) * waste)


class Job:
    """A config's model and batch on a kind of chip: what an estimate needs and a layout does not
    change. Without a chip there is ``memory`` alone."""

    def __init__(self, config: Config, chip: Chip | None, efficiency: float = EFFICIENCY):
        self.config = config
        self.chip = chip
        self.efficiency = efficiency
        model = config.model
        self.sequence = config.sequence_length
        self.batch = config.train.global_batch_size
        self.item = 2 if config.train.compute_dtype == "bfloat16" else 4
        self.reduced = 2 if config.train.reduce_dtype == "bfloat16" else 4
        self.layer = layer_flops(model, self.sequence)
        self.forward = sum(self.layer.values())
        weights = {name: part for name, part in self.layer.items() if name != "scores"}
        self.behind = 1 - weights["qkv"] / sum(weights.values())
        self.head = (
            6 * model.vocab_size * model.hidden_size
        )  # forward and backward: cross_entropy forms both at once
        self.flops = flops_per_token(model, self.sequence)
        self.params = abstract_model(model)[1]
        self.state = functools.cache(self._state)
        self.room = MEMORY_SHARE * chip.memory if chip else math.inf

    def _state(self, pipe: int, data: int, tensor: int) -> tuple[int, int, int]:
        """Numbers a device has of the blocks' parameters, of the rest, and of Adam's second moments
        (Muon keeps none for the blocks' matrices), D split over ``data``. Raises ValueError where a
        dim does not divide."""
        rows = plan_table(self.params, dict(pipe=pipe, data=data, context=1, tensor=tensor))
        size = padded_size if self.chip and self.chip.tpu else math.prod
        blocks = rest = second = 0
        for row in rows:
            numbers = size(row.local)
            inside = row.path.startswith("blocks.")
            blocks = blocks + inside * numbers
            rest = rest + (not inside) * numbers
            muon = (
                self.config.optimizer.name == "muon"
                and inside
                and len(row.dims) > 2
                and row.path.count("w_")
            )
            second += 0 if muon else numbers
        return blocks, rest, second

    def speed(self, layout: Layout, axis: str) -> float:
        """Bytes a second in and out of a device for a collective over ``axis``, tensor being
        innermost. Members within
        one domain share its ways out: a ring over the nodes enters each node once."""
        inner = layout.mesh[AXES.index(axis) + 1 :]
        size = getattr(layout, axis)
        stride = math.prod(inner)
        near = min(size, max(1, self.chip.domain // stride))
        return self.chip.fast if near == size else min(self.chip.fast, near * self.chip.slow)

    def micro_batches(self, layout: Layout) -> tuple[int, int, int]:
        """(micro-batches of a step, those that a pipeline takes with the empty ones, its flush)."""
        used = self.batch // (layout.data * layout.micro_batch_size)
        if layout.pipe == 1 or layout.schedule == "1f1b":
            return used, used, used
        unit = layout.flush or layout.pipe
        taken = -(-used // unit) * unit
        return used, taken, min(layout.flush or taken, taken)

    def memory(self, layout: Layout) -> dict[str, float]:
        """Bytes a device, by what they hold. Raises ValueError where a tensor does not divide."""
        pipe, data, context, tensor = layout.mesh
        model = self.config.model
        policy = POLICIES[layout.recompute]
        blocks, rest, second = self.state(pipe, data if layout.zero else 1, tensor)
        all_blocks, all_rest, _ = self.state(pipe, 1, tensor)
        layers = model.num_layers // pipe
        used, taken, flush = self.micro_batches(layout)
        if layout.zero == 3:
            weights = self.item * (2 * all_blocks / layers + all_rest)
            gradients = 4 * (blocks + rest + 2 * all_blocks / layers + all_rest)
        else:
            weights = self.item * (all_blocks + all_rest)
            # The sums, those of the micro-batch or flush at hand, and what the reduction over data
            # leaves.
            gradients = 4 * (all_blocks + all_rest) + (
                4 * (blocks + rest) if data > 1 and layout.zero else 0
            )
            if pipe == 1 or layout.schedule == "1f1b":
                gradients += self.item * all_blocks
            elif flush < taken:
                gradients += 4 * all_blocks
        tokens = layout.micro_batch_size * self.sequence / context
        x = self.item * tokens * model.hidden_size / tensor  # a stage's input
        if pipe == 1:
            inputs = 2 * x
        elif layout.schedule == "1f1b":
            inputs = (2 * pipe + 2) * x
        else:
            inputs = (
                CIRCULAR_COPIES * (layout.virtual_pipe * flush + pipe - 1) + 4 * flush / pipe
            ) * x
        kept = layers / layout.virtual_pipe * policy.kept / 2 * x
        layer = LAYER_BYTES / 2 * x + (
            4 * x * tensor if tensor > 1 else 0
        )  # with the sequence gathered for products
        if context > 1 and self.context_mode(layout) == "gather":
            layer += 2 * self.item * tokens * context * model.kv_heads * model.head_width / tensor
        head = (
            model.vocab_size
            / tensor
            * (10 * min(self.config.train.loss_chunk, tokens) + 4 * model.hidden_size)
        )
        return {
            "masters": 4 * (blocks + rest),
            "moments": 4 * (blocks + rest + second),
            "weights": weights,
            "gradients": gradients,
            "stage inputs": inputs,
            "layers": kept + layer,
            "logits": head,
        }

    def context_mode(self, layout: Layout) -> str:
        mode = self.config.mesh.context_mode
        if mode == "auto":
            return (
                "gather"
                if self.config.model.kv_heads // layout.tensor % layout.context
                else "ulysses"
            )
        return mode

    def seconds(self, layout: Layout) -> tuple[dict[str, float], float, float]:
        """Seconds of a step by what they go to; the FLOPs that all devices do, with what is
        recomputed; and the seconds of traffic that products hide."""
        pipe, data, context, tensor = layout.mesh
        model = self.config.model
        chip = self.chip
        policy = POLICIES[layout.recompute]
        piped = pipe > 1
        blocks, rest, _ = self.state(pipe, data if layout.zero else 1, tensor)
        all_blocks, all_rest, _ = self.state(pipe, 1, tensor)
        layers = model.num_layers // pipe
        rounds = layout.virtual_pipe
        used, taken, flush = self.micro_batches(layout)
        tokens = layout.micro_batch_size * self.sequence / context
        x = self.item * tokens * model.hidden_size / tensor
        rate = tensor * chip.flops * self.efficiency
        remote = (data - 1) / data / self.speed(layout, "data")

        # One micro-batch in one stage. A pipeline's stage is recomputed as a whole, besides what
        # its layers recompute; where it is one layer, XLA makes one recomputation of the two.
        twice = piped and layers > rounds
        if piped and not twice:
            policy = POLICIES["full"]
        again = sum(self.layer[name] for name in policy.again) / self.forward + twice
        forward = layers * max(
            tokens * self.forward / rate, self.item * all_blocks / layers / chip.memory_speed
        )
        compute = 3 * forward
        recompute = again * forward
        by_tensor = x * (tensor - 1) / self.speed(layout, "tensor")
        by_context = (
            (3 + piped)
            * layers
            * self._context_bytes(layout, tokens)
            / self.speed(layout, "context")
        )
        hidden = fetched = 0.0
        if layout.zero == 3:
            moved = remote * ((2 + piped) * self.item + self.reduced) * all_blocks
            hidden = min(moved * self.behind, compute + recompute)
            fetched = moved - hidden + remote * 2 * (self.item + self.reduced) * all_rest
        in_tensor = (policy.collectives + 4 * twice) * layers * by_tensor
        stage = compute + recompute + in_tensor + by_context + fetched
        head = tokens * self.head / rate
        seconds = {
            "compute": used * (compute + head / pipe),
            "recompute": used * recompute,
            "tensor": used * (in_tensor + 4 * by_tensor / pipe),
            "context": used * by_context,
            "pipe": 0.0,
            "bubble": 0.0,
        }

        if piped:
            if layout.schedule == "1f1b":
                # On TPU and around a ring the bubble is computed, not skipped; the last stage alone
                # has the head.
                computed = chip.tpu or (context > 1 and self.context_mode(layout) == "ring")
                ticks = hops = used + (2 if computed else 1) * (pipe - 1)
                seconds["bubble"] = ((ticks if computed else used) - used / pipe) * (
                    head + 4 * by_tensor
                )
            else:
                hops = taken // flush * (rounds * flush + pipe - 1)
                ticks = hops / rounds
            inside = pipe * data * context * tensor <= chip.domain
            link = (chip.fast / 2 if chip.tpu else chip.fast) if inside else chip.slow
            seconds["bubble"] += (ticks - used) * stage
            seconds["pipe"] = 2 * hops * x / link  # the activation forward, its gradient back
            if rounds > 1:  # layers in natural order to their stages' chunks, and gradients home
                seconds["pipe"] += 8 * blocks / link

        if layout.zero == 3:
            by_data = used * fetched
        elif layout.zero:
            by_data = (
                (self.item + self.reduced) * (all_blocks + all_rest) * remote
            )  # weights there, gradients back
        else:
            by_data = 2 * self.reduced * (all_blocks + all_rest) * remote
        by_data += (
            2
            * self.reduced
            * (blocks + rest)
            * (context - 1)
            / context
            / self.speed(layout, "context")
        )
        by_data += 2 * self.reduced * rest * (pipe - 1) / pipe / self.speed(layout, "pipe")
        seconds |= {"data": by_data, "update": 28 * (blocks + rest) / chip.memory_speed}
        done = self.batch * self.sequence * (self.flops + model.num_layers * again * self.forward)
        return seconds, done, used * hidden

    def _context_bytes(self, layout: Layout, tokens: float) -> float:
        """What a device sends in one layer's forward pass: queries, keys, values and outputs, or
        all keys and values. The backward pass sends as much; so does each recomputation, which
        every policy needs of keys and values."""
        model = self.config.model
        context = layout.context
        width, kv = (
            heads * model.head_width / layout.tensor
            for heads in (model.num_attention_heads, model.kv_heads)
        )
        if self.context_mode(layout) == "ulysses":
            return 2 * self.item * tokens * (width + kv) * (context - 1) / context
        return 2 * self.item * tokens * kv * (context - 1)

    def estimate(self, layout: Layout) -> Estimate:
        """Raises ValueError where a tensor does not divide."""
        seconds, done, hidden = self.seconds(layout)
        tokens = self.batch * self.sequence
        return Estimate(
            layout,
            seconds,
            self.memory(layout),
            tokens,
            tokens * self.flops,
            done,
            hidden,
            self.chip,
        )

    def fits(self, layout: Layout) -> bool:
        return sum(self.memory(layout).values()) <= self.room
