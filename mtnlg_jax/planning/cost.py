"""Predict memory and time of a run's step on a layout by arithmetic.

The time of a step is the sum of what each device does: products at a share of the chip's peak,
collectives over the links of their axis (traffic.py), and the ticks in which a pipeline waits.
Latency of messages is not counted. So a prediction has the right order of magnitude and ranks
layouts of large models; a run of your own calibrates it (search.measured_efficiency).

The compiler's schedule is known for v5e, v5p and v6e (hardware.Chip, docs/predicted_step.md):
- attention kernels reach a share of the peak of their own, over the scores below the diagonal;
- operations outside products count by the bytes of activations that they read and write;
- of ZeRO-3's traffic v6e hides gathers and scatters behind products, v5e gathers alone, v5p
  scatters and, where only rows are split, gathers;
- v5p runs collectives over tensor beside the backward pass, if tensor lies on one dim of the torus.
On other chips all products run at EFFICIENCY, and only ZeRO-3 overlaps: inside a layer it can move
later weights during earlier products. The other collectives feed the very next product.

Formulas: Narayanan 2021 (bubble, FLOPs), Korthikanti 2022 (activation bytes), Jacobs 2023 and Llama
Team 2024 (context traffic). Experts count as visited equally often. Collectives a layer and
recomputed FLOPs are counted in this repository's step.
"""

import functools
import math
from typing import NamedTuple

from mtnlg_jax.config import Config
from mtnlg_jax.config.memory_rules import offloads_activations
from mtnlg_jax.hardware import Chip, flops_per_token, layer_flops
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import AXES, ROWS, plan_table
from mtnlg_jax.planning import activations, adapters, moments, traffic
from mtnlg_jax.planning.estimate import Estimate, Stage
from mtnlg_jax.planning.layout import POLICIES, Layout
from mtnlg_jax.planning.tiles import padded_size
from mtnlg_jax.planning.tpu_costs import MEMORY_SHARE as STREAMED
from mtnlg_jax.train import lora

# Share of peak that products reach while a stage is busy, where that of the chip (Chip.products) is
# not known: there it is the one constant of the model. It comes from MT-NLG on A100s: the paper's
# 60.1, 50.2 and 44.4 s a step on 2,240, 2,800 and 3,360 of them are predicted within 3 %. That was
# software of 2021 with unfused kernels; Megatron-LM of 2022 reached 1.3 times as much on the same
# card.
EFFICIENCY = 0.50

# Share of the chip's memory to fill. XLA's workspace, network buffers and the runtime take the
# rest.
MEMORY_SHARE = 0.9
# Stage inputs held for each one that the circular schedule needs. Measured: 530 B compiled for v5p;
# for H100 it is 1.0.
CIRCULAR_COPIES = 1.25
# Bytes in units of s b h that the backward pass of one layer holds (Korthikanti 2022, equation 4).
LAYER_BYTES = 34
# Bytes moved in a micro-batch for each whole gradient: 4 into the stack of layers, 10 to its sum.
SUM_BYTES = 14


class _Held(NamedTuple):
    """Numbers that a device holds."""

    blocks: int  # of the blocks' parameters
    rest: int  # of the other parameters
    experts: int  # of the weights of experts, which are among those of the blocks


def known_share(config: Config, chip: Chip | None) -> float:
    """Return the share of peak that products of ``config`` reach on ``chip``; 0 if not known, as
    for the products of experts."""
    return 0.0 if chip is None or config.model.moe.num_moe_experts else chip.products


class Job:
    """A config's model and batch on a kind of chip: everything an estimate needs except the layout.
    Without a chip only ``memory`` is available."""

    def __init__(self, config: Config, chip: Chip | None, efficiency: float | None = None):
        self.config = config
        self.chip = chip
        known = known_share(config, chip)
        self.efficiency = efficiency or known or EFFICIENCY
        self.scheduled = known > 0  # whether what a schedule shows beside products is counted
        model = config.model
        self.sequence = config.sequence_length
        self.batch = config.train.global_batch_size
        self.item = activations.item_of(config)
        self.reduced = 2 if config.train.reduce_dtype == "bfloat16" else 4
        self.layer = layer_flops(model, self.sequence)
        self.forward = sum(self.layer.values())
        weights = {name: part for name, part in self.layer.items() if name != "scores"}
        # Share of the weights that can move during products: all but the first, qkv.
        self.behind = 1 - weights["qkv"] / sum(weights.values())
        # Forward and backward together, since cross_entropy computes both at once.
        self.head = 6 * model.vocabulary * model.hidden_size
        self.flops = flops_per_token(model, self.sequence)
        self.params = abstract_model(model)[1]
        self.state = functools.cache(self._state)
        self.adapters = functools.cache(self._adapters)
        self.moments = functools.cache(self._moments)
        self.room = MEMORY_SHARE * chip.memory if chip else math.inf

    def held(self, layout: Layout, gathered: bool = False) -> _Held:
        """Count what a device holds of the masters, or of the weights ``gathered`` over data.
        Raises ValueError if a dim is not divisible."""
        zero = layout.zero > 0 and not gathered
        return self.state(layout.pipe, layout.data, layout.tensor, layout.expert, zero)

    def _state(
        self, pipe: int, data: int, tensor: int, expert: int = 1, zero: bool = True
    ) -> _Held:
        """Count what a device holds with D split over ``data`` and ``expert``, or whole."""
        sizes = (pipe, data, expert, 1, tensor)
        of_axes = dict(zip(AXES, sizes, strict=True))
        rows = plan_table(self.params, of_axes, zero=int(zero))
        size = padded_size if self.chip and self.chip.tpu else math.prod
        blocks = 0
        rest = 0
        experts = 0
        for row in rows:
            numbers = size(row.local)
            if row.path.startswith("blocks."):
                blocks += numbers
            else:
                rest += numbers
            if "E" in row.dims[:-1]:
                experts += numbers
        return _Held(blocks, rest, experts)

    def _adapters(self, sizes: tuple[int, ...], zero: int) -> adapters.Adapters:
        size = padded_size if self.chip and self.chip.tpu else math.prod
        return adapters.adapters_of(self.config, dict(zip(AXES, sizes, strict=True)), zero, size)

    def _moments(self, sizes: tuple[int, ...], zero: int) -> moments.Moments:
        size = padded_size if self.chip and self.chip.tpu else math.prod
        on = dict(zip(AXES, sizes, strict=True))
        return moments.moments_of(self.config, on, zero, size)

    def host(self, layout: Layout) -> dict[str, float]:
        """Bytes of the host's memory that a device takes, by content (train.offload)."""
        held = {"moments": float(self.moments(layout.sizes, layout.zero).host)}
        if offloads_activations(self.config):
            held["activations"] = activations.kept(self.config, layout)
        return held

    @property
    def _known_chip(self) -> Chip:
        if self.chip is None:
            raise ValueError("without a chip a job has no times")
        return self.chip

    @functools.cached_property
    def network(self) -> traffic.Network:
        return traffic.Network(self._known_chip)

    def micro_batches(self, layout: Layout) -> tuple[int, int, int]:
        """Return (micro-batches of a step, those plus the empty ones that fill the last flush of a
        pipeline, micro-batches of a flush)."""
        used = self.batch // (layout.rows * layout.micro_batch_size)
        if layout.pipe == 1 or layout.schedule == "1f1b":
            return used, used, used
        unit = layout.flush or layout.pipe
        taken = -(-used // unit) * unit
        return used, taken, min(layout.flush or taken, taken)

    def memory(self, layout: Layout) -> dict[str, float]:
        """Bytes of a device, by content. Raises ValueError if a tensor is not divisible."""
        pipe, data, context, tensor = layout.mesh
        model = self.config.model
        blocks, rest, _ = self.held(layout)
        all_blocks, all_rest, _ = self.held(layout, gathered=True)
        layers = model.num_layers // pipe
        used, taken, flush = self.micro_batches(layout)
        if layout.zero == 3:
            weights = self.item * (2 * all_blocks / layers + all_rest)
            gradients = 4 * (blocks + rest + 2 * all_blocks / layers + all_rest)
        else:
            weights = self.item * (all_blocks + all_rest)
            # The sums; the result of the reduction over data; the gradients of the present
            # micro-batch or flush.
            gradients = 4 * (all_blocks + all_rest)
            if layout.rows > 1 and layout.zero:
                gradients += 4 * (blocks + rest)
            if pipe == 1 or layout.schedule == "1f1b":
                gradients += self.item * all_blocks
            elif flush < taken:
                gradients += 4 * all_blocks
        tokens = layout.micro_batch_size * self.sequence / context
        x = activations.stage_input(self.config, layout)
        if pipe == 1:
            inputs = 2 * x
        elif layout.schedule == "1f1b":
            inputs = (2 * pipe + 2) * x
        else:
            held = CIRCULAR_COPIES * (layout.virtual_pipe * flush + pipe - 1)
            inputs = (held + 4 * flush / pipe) * x
        kept = activations.kept(self.config, layout)
        if offloads_activations(self.config):  # those of one layer go while those of the next come
            kept *= min(1, 2 * pipe * layout.virtual_pipe / model.num_layers)
        layer = LAYER_BYTES / 2 * x + activations.visits(self.config, layout)
        if tensor > 1:  # the sequence, gathered for products
            layer += 4 * x * tensor
        if context > 1 and traffic.context_mode(self.config, layout) == "gather":
            layer += 2 * self.item * tokens * context * model.kv_heads * model.head_width / tensor
        chunk = min(self.config.train.loss_chunk, tokens)
        head = model.vocabulary / tensor * (10 * chunk + 4 * model.hidden_size)
        of_moments = self.moments(layout.sizes, layout.zero)
        # Moments come from the host when what only the passes need is free again.
        coming = max(0.0, of_moments.coming - (weights + inputs + kept + layer + head))
        parameters = {
            "masters": (8 if self.config.train.ema_decay else 4) * (blocks + rest),
            "moments": 0.0,  # for its place among the others
            "weights": weights,
            "gradients": gradients,
        }
        if lora.used(self.config):
            of_run = self.adapters(layout.sizes, layout.zero)
            parameters = adapters.memory(
                self.config, of_run, layers, all_blocks, all_rest, self.item, layout.zero
            )
        return parameters | {
            "moments": of_moments.device + coming,
            "stage inputs": inputs,
            "layers": kept + layer,
            "logits": head,
        }

    def seconds(self, layout: Layout) -> tuple[dict[str, float], float, float]:
        """Return the seconds of a step by purpose, the FLOPs of all devices with recomputation, and
        the seconds of traffic that products hide."""
        model = self.config.model
        pipe = layout.pipe
        chip = self._known_chip
        used = self.micro_batches(layout)[0]
        blocks, rest, *_ = self.held(layout)
        of_moments = self.moments(layout.sizes, layout.zero)
        stage = self._stage(layout)
        bubble, passing = self._pipeline(layout, stage)
        seconds = {
            "compute": used * (stage.compute + stage.head / pipe),
            "recompute": used * stage.recompute,
            "element-wise": used * stage.elementwise,
            "tensor": used * (stage.tensor + stage.head_tensor / pipe),
            "context": used * stage.context,
            "expert": used * stage.expert,
            "pipe": passing,
            "bubble": bubble,
            "data": self._reduction(layout, stage),
            "update": (12 * (blocks + rest) + 2 * sum(of_moments[:2])) / chip.memory_speed,
        }
        # Moments cross the link to the host while nothing is computed; activations while products
        # are, and take longer than these or not at all. A micro-batch passes each chunk of a stage.
        crossing = (
            2 * activations.kept(self.config, layout) * layout.virtual_pipe * used
            if offloads_activations(self.config)
            else 0.0
        )
        passes = seconds["compute"] + seconds["recompute"]
        seconds["host"] = 2 * of_moments.host / chip.host + max(0, crossing / chip.host - passes)
        flops = self.flops + model.num_layers * stage.again * self.forward
        return seconds, self.batch * self.sequence * flops, used * stage.hidden

    def _stage(self, layout: Layout) -> Stage:
        chip = self._known_chip
        pipe, _, context, tensor = layout.mesh
        model = self.config.model
        piped = pipe > 1
        all_blocks, all_rest, experts = self.held(layout, gathered=True)
        layers = model.num_layers // pipe
        tokens = layout.micro_batch_size * self.sequence / context
        x = self.item * tokens * model.hidden_size / tensor
        rate = tensor * chip.flops * self.efficiency

        # A pipeline recomputes each stage as a whole, in addition to what its layers recompute. If
        # a stage is one layer, XLA merges the two recomputations.
        policy = POLICIES[layout.recompute]
        twice = piped and layers > layout.virtual_pipe
        if piped and not twice:
            policy = POLICIES["full"]
        repeated = set(policy.again)
        if model.moe.num_moe_experts:
            # No policy keeps the visits to experts, of which a token has several.
            repeated |= {"fc1", "fc2"}
        again = sum(self.layer[name] for name in repeated) / self.forward + twice
        by_memory = self.item * all_blocks / layers / chip.memory_speed
        kernels = 0.0
        forward = layers * max(tokens * self.forward / rate, by_memory)
        recompute = again * forward
        if self.scheduled:
            # Scores are those below the diagonal, and the kernels' backward pass has 5 products for
            # the 2 of the forward pass.
            below = model.attended(self.sequence, causal=True) / model.attended(self.sequence)
            kernel = layers * tokens * below * self.layer["scores"] / (tensor * chip.flops)
            kernel /= chip.kernels
            matrices = self.forward - self.layer["scores"]
            forward = layers * max(tokens * matrices / rate, by_memory)
            done = sum(self.layer[name] for name in repeated - {"scores"}) / matrices + twice
            recompute = done * forward + (twice + ("scores" in repeated)) * kernel
            kernels = 3.5 * kernel
        compute = 3 * forward + kernels

        by_tensor, beside = self.network.over_tensor(layout.sizes, self.scheduled)
        by_tensor *= x * tensor
        collectives = (policy.collectives + 4 * twice) * layers
        beside *= (collectives - 4 * layers) * by_tensor  # four of a layer's are forward
        beside = min(beside, 2 * forward + recompute)
        sent = (
            (3 + piped) * layers * self.item * tokens * traffic.context_width(self.config, layout)
        )
        by_expert = layers * self.item * tokens * traffic.expert_width(self.config, layout, twice)
        fetch = 0.0
        hidden = 0.0
        if layout.zero == 3:
            fetch, hidden = self._fetched(layout, all_blocks, experts, forward, compute + recompute)
            fetch += self._moved(layout, all_rest) * 2 * (self.item + self.reduced)
        return Stage(
            compute=compute,
            recompute=recompute,
            elementwise=self._elementwise(layout, layers * x, all_blocks),
            tensor=collectives * by_tensor - beside,
            context=sent * traffic.context_seconds(self.config, self.network, layout),
            expert=by_expert / self.network.speed(layout.sizes, "expert"),
            fetch=fetch,
            hidden=hidden + beside,
            head=tokens * self.head / rate,
            head_tensor=4 * by_tensor,
            passed=x,
            again=again,
        )

    def _elementwise(self, layout: Layout, inputs: float, blocks: int) -> float:
        """Seconds of one micro-batch outside products, by the bytes that they read and write;
        ``inputs``: bytes of the inputs of a stage's layers, which have ``blocks`` numbers."""
        if not self.scheduled:
            return 0.0
        model = self.config.model
        each = LAYER_BYTES + 2 * POLICIES[layout.recompute].kept
        if model.gated:  # 11 passes over the width of the MLP
            each += 22 * model.mlp_width / model.hidden_size
        moved = each / 2 * inputs
        if layout.zero < 3 and self.micro_batches(layout)[0] > 1:
            moved += SUM_BYTES * blocks
        return moved / (STREAMED * self._known_chip.memory_speed)

    def _fetched(
        self, layout: Layout, numbers: int, experts: int, forward: float, work: float
    ) -> tuple[float, float]:
        """Return the seconds in which one micro-batch waits for the weights and gradients of layers
        with ZeRO-3, and those that its ``work`` hides; ``forward``: of the forward products.

        All but the first weight of a layer can move during its products; by the schedules behind
        half of them in the mean, those that follow in the layer. v5p hides all where only rows are
        split. Otherwise its gathers are synchronous, as are the scatters of v5e.
        """
        chip = self._known_chip
        gathers = (2 + (layout.pipe > 1)) * self.item * self._moved(layout, numbers, experts)
        scatters = self.reduced * self._moved(layout, numbers, experts)
        if not self.scheduled:
            hidden = min((gathers + scatters) * self.behind, work)
        elif chip.staged:
            moving = gathers + chip.sparse * scatters
            hidden = min(moving * self.behind, work / 2)
        elif layout.data == layout.devices:
            hidden = min(gathers + scatters, work)
        else:
            scatters = self.reduced * self._moved(layout, numbers, experts, rings=1)
            hidden = min(scatters * self.behind, forward)  # half of the backward products
        return gathers + scatters - hidden, hidden

    def _moved(self, layout: Layout, numbers: float, experts: float = 0, rings: int = 3) -> float:
        """Seconds to move one byte of each of ``numbers`` between the devices that share them.
        ``experts`` of them belong to experts, which only devices along data share."""
        others = ROWS if layout.expert > 1 else ("data",)
        seconds = (numbers - experts) * self.network.seconds(layout.sizes, others, rings)
        return seconds + experts * self.network.seconds(layout.sizes, ("data",), rings)

    def _pipeline(self, layout: Layout, stage: Stage) -> tuple[float, float]:
        """Return the seconds of a step that a device waits for its pipeline, and that activations,
        gradients and parameters take between stages."""
        pipe = layout.pipe
        if pipe == 1:
            return 0.0, 0.0
        chip = self._known_chip
        rounds = layout.virtual_pipe
        used, taken, flush = self.micro_batches(layout)
        bubble = 0.0
        if layout.schedule == "1f1b":
            # On TPU and around a ring the bubble is computed instead of skipped; only the last
            # stage has the head.
            computed = chip.tpu or (
                layout.context > 1 and traffic.context_mode(self.config, layout) == "ring"
            )
            ticks: float = used + (2 if computed else 1) * (pipe - 1)
            hops: float = ticks
            waited = (ticks if computed else used) - used / pipe
            bubble = waited * (stage.head + stage.head_tensor)
        else:
            hops = taken // flush * (rounds * flush + pipe - 1)
            ticks = hops / rounds
        bubble += (ticks - used) * stage.total
        hop = self.network.hop(layout.sizes)
        passing = 2 * hops * stage.passed * hop  # the activation forward, its gradient back
        if rounds > 1:  # from layers in natural order to the stages' chunks, and gradients back
            blocks = self.held(layout).blocks
            passing += 8 * blocks * hop
        return bubble, passing

    def _reduction(self, layout: Layout, stage: Stage) -> float:
        """Seconds of a step in which weights and gradients move between replicas of parameters."""
        pipe, _, context, _ = layout.mesh
        used = self.micro_batches(layout)[0]
        blocks, rest, *_ = self.held(layout)
        all_blocks, all_rest, experts = self.held(layout, gathered=True)
        moved = self._moved(layout, all_blocks + all_rest, experts)
        if layout.zero == 3:
            seconds = used * stage.fetch
        elif layout.zero:  # weights there, gradients back
            seconds = (self.item + self.reduced) * moved
        else:
            seconds = 2 * self.reduced * moved
        both = 2 * self.reduced  # a sum sends everything twice
        by_context = both * (blocks + rest) * (context - 1) / context
        seconds += by_context / self.network.speed(layout.sizes, "context")
        seconds += both * rest * (pipe - 1) / pipe / self.network.speed(layout.sizes, "pipe")
        return seconds

    def estimate(self, layout: Layout) -> Estimate:
        """Raises ValueError if a tensor is not divisible."""
        seconds, done, hidden = self.seconds(layout)
        tokens = self.batch * self.sequence
        return Estimate(
            layout=layout,
            seconds=seconds,
            memory=self.memory(layout),
            tokens=tokens,
            model_flops=tokens * self.flops,
            done_flops=done,
            hidden=hidden,
            chip=self._known_chip,
            host=sum(self.host(layout).values()),
        )

    def bytes(self, layout: Layout) -> float:
        """Bytes of a device. Raises ValueError if a tensor is not divisible."""
        return sum(self.memory(layout).values())

    def fits(self, layout: Layout) -> bool:
        return self.bytes(layout) <= self.room
