"""The dataclasses of a run's config. The default, range and choices of each field are written here
and nowhere else.

A run file in ``configs/`` defines ``get_config() -> Config``. The command line changes single
values: ``--config=configs/tiny.py --set=train.steps=10 --set=mesh.tensor=2``.

The comment above a field is its description in docs/configuration.md.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mtnlg_jax.config.model import ModelConfig
from mtnlg_jax.config.optimizer import OptimizerConfig
from mtnlg_jax.config.ranges import (
    PATH,
    AxisSize,
    Count,
    CountFrom0,
    Finite,
    NotNegative,
    OptionalCount,
    OptionalCountFrom0,
    OptionalPositive,
    Positive,
    Range,
    Share,
    ShareAbove0,
    ShareBelow1,
)

Blend = tuple[tuple[str, float], ...]
Tokens = tuple[int, ...]

# Of fewer steps a median says little; the longest is the size of the history in a state.
SHORTEST_SPIKE_WINDOW = 16
LONGEST_SPIKE_WINDOW = 1024


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, from the slowest network to the fastest. Their product is the number
    of devices."""

    # Pipeline stages.
    pipe: AxisSize = 1
    # Data-parallel shards. -1: all devices that the other axes leave.
    data: int = -1
    # Parts into which attention splits the sequence.
    context: AxisSize = 1
    # Tensor-parallel shards of each matrix, with the sequence split between half blocks.
    tensor: AxisSize = 1
    # ZeRO stage over data. 0: replicate everything. 1: shard master weights and optimizer state and
    # gather weights once a step. 3: gather the weights of each layer when it runs.
    zero: Literal[0, 1, 3] = 1
    # Pipeline schedule. 1f1b holds at most 2 pipe - 1 stage inputs, whatever the batch.
    schedule: Literal["circular", "1f1b"] = "circular"
    # Chunks of layers on each stage of the circular schedule. More chunks make the bubble smaller.
    virtual_pipe: AxisSize = 1
    # Micro-batches that a circular pipeline takes at a time. None: all; a batch ramp grows in
    # multiples of this.
    flush: OptionalCount = None
    # How attention works over context. auto: ulysses where the key/value heads of a device divide,
    # else gather.
    context_mode: Literal["auto", "ulysses", "gather", "ring"] = "auto"
    # Multiply the sequence chunk by chunk over tensor, each while another one is sent, as
    # Megatron-LM's --tp-comm-overlap.
    tp_comm_overlap: bool = False
    # Parts into which the experts of each layer are split. Rows are split over data x expert.
    expert: AxisSize = 1


@dataclass(frozen=True)
class MaskingConfig:
    """Whole-word masking for the masked objective (Devlin 2018, whole-word variant)."""

    # Share of a sequence's words that the model must predict.
    word_share: ShareAbove0 = 0.10
    # Share of the predicted words that are replaced by <mask>. The default is BERT's.
    mask_share: Share = 0.80
    # Share of the predicted words that are replaced by random words; the rest stays unchanged. The
    # default is BERT's.
    random_share: Share = 0.10


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from: a prepared folder, the PREFIX of Megatron's .bin and .idx files, or a
    weighted blend of these."""

    # Prepared folder, or PREFIX of Megatron's files.
    path: str = field(default="", metadata=PATH)
    # ((folder, weight), ...) instead of path. Weights are relative to each other.
    blend: Blend = field(default=(), metadata=PATH)
    # Folder of the tokenizer that made Megatron's files, which do not record it.
    tokenizer: str = field(default="", metadata=PATH)
    # Held-out text of Megatron's files: the share of each source's last documents, or a PREFIX.
    heldout: Annotated[float | str, Range(0, 0.5)] = field(default=0.01, metadata=PATH)
    # Tokens in a row. None: model.max_position_embeddings.
    sequence_length: OptionalCount = None
    masking: MaskingConfig = field(default_factory=MaskingConfig)

    @property
    def sources(self) -> Blend:
        return self.blend or (((self.path, 1.0),) if self.path else ())


@dataclass(frozen=True)
class StageConfig:
    """One stage of a run: its share of the steps and its objective."""

    # Name in logs.
    name: str = "causal"
    # Share of train.steps, relative to the other stages.
    fraction: Positive = 1.0
    # Share of the steps with the masked objective. 0: causal; 1: masked; between: a mix of both.
    masked: Share = 0.0
    # Factor of the learning rate in this stage.
    learning_rate_scale: NotNegative = 1.0
    # ((folder, weight), ...) for this stage. Empty: the data of the run.
    blend: Blend = field(default=(), metadata=PATH)
    # Teacher: a run with the same vocabulary to distill from (Hinton 2015). Empty: none.
    distill: str = field(default="", metadata=PATH)
    # Temperature of both distributions in distillation. Above 1 unlikely tokens count more.
    distill_temperature: Positive = 1.0
    # Weight of the teacher's distribution in the loss. The tokens of the text have the rest.
    distill_weight: Share = 0.5


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    # Optimizer steps of the run.
    steps: Count = 1000
    # Sequences in a step, over all devices.
    global_batch_size: Count = 32
    # Sequences that a data shard takes at once. None: its whole share of the batch.
    micro_batch_size: OptionalCount = None
    # (start, increment, samples), as Megatron-LM: the batch grows from start to global_batch_size
    # over this number of samples. None: no ramp.
    rampup_batch_size: tuple[int, int, int] | None = None
    # Stages, one after the other.
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    # Run or converted model whose parameters this run starts from. Empty: random parameters.
    init: str = field(default="", metadata=PATH)
    # Seed of initialization, dropout, masking and the order of the data.
    seed: CountFrom0 = 0
    # Type of weights and activations in products. Master weights and sums are float32.
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # What the backward pass computes again to save memory; docs/parallelism.md compares the
    # choices. elementwise repeats no product.
    recompute: Literal["none", "elementwise", "mlp", "projections", "full"] = "elementwise"
    # Parts that wait in the memory of the host (docs/memory.md): moments, between steps;
    # activations, those that recompute keeps, from the forward to the backward pass.
    offload: Literal["none", "moments", "activations", "both"] = "none"
    # Type in which gradients travel between devices. bfloat16 halves the traffic; on one device the
    # sum is always float32.
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    # Tokens whose logits are held in memory at once.
    loss_chunk: Count = 1024
    # Share of each target that is spread evenly over the vocabulary. The held-out loss has no
    # smoothing.
    label_smoothing: ShareBelow1 = 0.0
    # Weight of the z-loss, the square of log Z of each token, which keeps logits from drifting
    # (Chowdhery 2022, PaLM, section 5: 1e-4). It adds to gradients, not to the reported loss.
    z_loss_coeff: NotNegative = 0.0
    # Decay of the exponential moving average of the weights, which checkpoints keep beside them
    # (--checkpoint=ema). The average follows faster at first: step t uses at most
    # (1 + t) / (10 + t). 0: off.
    ema_decay: ShareBelow1 = 0.0
    # Steps from one log line to the next.
    log_every: Count = 1
    # Steps from one record of statistics by layer to the next, which docs/statistics.md explains:
    # norms, activations, attention entropy, dead units, gradient noise scale. 0: none. With 200
    # they take less than 1 % of the time.
    stats_every: CountFrom0 = 0
    # Steps from one evaluation to the next. 0: evaluate at the end only.
    eval_every: CountFrom0 = 200
    # Batches of an evaluation, each of 16 held-out sequences whatever the batch of the run. They
    # are spread over the held-out text.
    eval_batches: Count = 16
    # Tasks of lm-evaluation-harness to score while the run trains: names of launch/evaluate.py
    # --tasks. Empty: none.
    eval_tasks: tuple[str, ...] = ()
    # Steps from one evaluation of the tasks to the next. 0: at the end only.
    eval_tasks_every: CountFrom0 = 400
    # Rows of each task, the first ones. None: all.
    eval_tasks_rows: OptionalCount = 100
    # Examples ahead of each question. None: as many as each task asks for.
    eval_tasks_fewshot: OptionalCountFrom0 = None
    # Folder of the rows of the tasks.
    eval_tasks_data: str = field(default="", metadata=PATH)
    # Steps from one checkpoint to the next. 0: save at the end only.
    save_every: CountFrom0 = 200
    # Newest checkpoints to keep. With 2 a damaged one still leaves a way back.
    keep_last: Count = 2
    # Steps from one near copy of the state to the next: written on the hosts themselves, beside the
    # checkpoints, so that a failure costs few steps (docs/recovery.md). 0: off.
    near_every: CountFrom0 = 0
    # Folder of near copies, local to each host. The default is host memory: it outlives processes
    # and is the fastest; a folder on a local disk also outlives a restart of the host.
    near_folder: str = field(default="/dev/shm/mtnlg_jax", metadata=PATH)
    # Also keep the checkpoint with the lowest held-out loss. Each new best evaluation is then saved
    # at once.
    keep_best: bool = True
    # Non-finite steps in a row that stop the run. Single ones are skipped.
    max_bad_steps: Count = 5
    # What a spike does, a step whose loss or gradient norm is far above those before it
    # (docs/spikes.md). skip: its update is not applied. rewind: the run goes back to its last
    # checkpoint and leaves the batch out, at most max_bad_steps times to the same parameters.
    spike_policy: Literal["none", "skip", "rewind"] = "none"
    # A spike is further above the median than this number of robust standard deviations.
    spike_deviations: Positive = 6.0
    # Accepted steps of the same objective whose median that is. The rule begins after half of them.
    spike_window: Annotated[int, Range(SHORTEST_SPIKE_WINDOW, LONGEST_SPIKE_WINDOW)] = 128
    # Batches that rewind leaves out: the spike's own, and those before it as far as the checkpoint.
    spike_leave_out: Count = 1
    # End a process whose step takes longer than this number of seconds and than 10 times the median
    # step. 0: off.
    watchdog_seconds: NotNegative = 300.0
    # The same limit, in seconds, for every phase other than a step: compiling, restoring,
    # evaluating, saving.
    phase_seconds: Annotated[float, Range(1, math.inf, high_open=True)] = 3600.0
    # Seconds of silence after which a process counts as dead and the others end.
    heartbeat_seconds: Annotated[int, Range(1, 2**20)] = 100
    # Peak of one device in FLOP/s, for MFU. None: the entry for this device in
    # mtnlg_jax/hardware.py, if there is one.
    device_flops: OptionalPositive = None
    # Steps from one check that all processes agree on config, step, data and program to the next.
    # Their speed is compared as well. 0: check at the end only.
    compare_every: CountFrom0 = 100
    # Steps from one check for silent corruption to the next: two data replicas compute the same
    # rows, and the bits are compared. Each checkpoint of save_every is preceded by one. 0: none.
    verify_every: CountFrom0 = 0
    # Where the numbers of the run are shown: tensorboard, wandb, trackio, or module:Class of an own
    # one. docs/tracking.md describes them.
    trackers: tuple[str, ...] = ("tensorboard",)
    # Project under which wandb and trackio list the run.
    tracker_project: str = "mtnlg_jax"
    # First and last step to record with the profiler, into RUN/profile. None: none.
    profile_steps: tuple[int, int] | None = None
    # Signal that records the next steps with the profiler instead of stopping the run. none: both
    # signals stop it, as schedulers expect that send them before they kill.
    profile_signal: Literal["none", "SIGUSR1", "SIGUSR2"] = "none"
    # Steps that train.profile_signal records.
    profile_signal_steps: Count = 5
    # Texts that the run continues while it trains, to show its progress. Empty: none.
    sample_prompts: tuple[str, ...] = ()
    # Steps from one continuation of train.sample_prompts to the next. 0: at the end only.
    sample_every: CountFrom0 = 200
    # Tokens of each continuation, at most.
    sample_tokens: Count = 48

    @property
    def spike_history(self) -> int:
        """The accepted steps of an objective before which no step is a spike."""
        return max(SHORTEST_SPIKE_WINDOW, self.spike_window // 2)


@dataclass(frozen=True)
class DecodeConfig:
    """How text is generated. Names and meanings follow Hugging Face's GenerationConfig; logit_bias
    and the presence and frequency penalties follow OpenAI's API. Everything is off by default:
    top_k is 0 here, not 50. Lists and dicts become tuples."""

    # Most tokens to generate.
    max_new_tokens: Count = 128
    # Fewest tokens to generate before the text may end.
    min_new_tokens: CountFrom0 = 0
    # Fewest tokens of prompt and continuation together.
    min_length: Annotated[int, Range(0, high_open=True)] = 0
    # 0: greedy, or beam search. Above 0: sample; with num_beams above 1 draw distinct sequences
    # without replacement (Kool 2019).
    temperature: NotNegative = 0.0
    # Sample from this number of most likely tokens. 0: off.
    top_k: CountFrom0 = 0
    # Sample from the most likely tokens whose probabilities add up to this. 1: off.
    top_p: ShareAbove0 = 1.0
    # Drop tokens with less than this share of the highest probability. 0: off.
    min_p: ShareBelow1 = 0.0
    # Sample from the most typical tokens whose probabilities add up to this (Meister 2022). 1: off.
    typical_p: ShareAbove0 = 1.0
    # Drop tokens below this probability (Hewitt 2022). 0: off.
    epsilon_cutoff: ShareBelow1 = 0.0
    # Drop tokens below a probability that depends on the entropy (Hewitt 2022). 0: off.
    eta_cutoff: ShareBelow1 = 0.0
    # Mirostat 2.0 (Basu 2021): mean surprise of a token in bits, to which sampling is steered. 0:
    # off.
    mirostat_tau: NotNegative = 0.0
    # Share of a token's error in surprise by which mirostat moves its limit.
    mirostat_eta: Positive = 0.1
    # Contrastive search (Su 2022) at temperature 0: weight of the similarity to earlier tokens,
    # against the probability, by which one of the top_k most likely tokens is chosen. 0: off.
    penalty_alpha: Share = 0.0
    # Divide positive logits of tokens in prompt or text by this and multiply negative ones. 1: off.
    repetition_penalty: Positive = 1.0
    # Subtracted once from the logit of each generated token.
    presence_penalty: Finite = 0.0
    # Subtracted from a token's logit for each time that it was generated.
    frequency_penalty: Finite = 0.0
    # Never repeat a sequence of this number of tokens. 0: off.
    no_repeat_ngram_size: CountFrom0 = 0
    # DRY: a token that would continue a repetition of n tokens, prompt included, loses
    # dry_multiplier * dry_base ** (n - dry_allowed_length) of its logit. 0: off.
    dry_multiplier: NotNegative = 0.0
    # Growth of the penalty of DRY with each token of the repetition.
    dry_base: Annotated[float, Range(1, math.inf, high_open=True)] = 1.75
    # Shortest repetition whose continuation DRY penalizes, in tokens.
    dry_allowed_length: Count = 2
    # Last tokens in which DRY looks for repetitions. -1: all.
    dry_penalty_last_n: Annotated[int, Range(-1)] = -1
    # A token whose text contains one of these strings ends a repetition and is not penalized.
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    # ((token, what is added to its logit), ...). -inf: never generate it.
    logit_bias: tuple[tuple[int, float], ...] = ()
    # ((tokens, what is added to the logit of the last one after the others), ...).
    sequence_bias: tuple[tuple[Tokens, float], ...] = ()
    # Sequences of tokens that are never completed.
    bad_words_ids: tuple[Tokens, ...] = ()
    # Tokens that are never generated.
    suppress_tokens: Tokens = ()
    # Tokens that are never the first new one.
    begin_suppress_tokens: Tokens = ()
    # The first new token.
    forced_bos_token_id: int | None = None
    # The last token where max_new_tokens or the context ends the text.
    forced_eos_token_id: int | None = None
    # ((position, token), ...): tokens forced at positions of the new text, counted from 0.
    forced_tokens: tuple[tuple[int, int], ...] = ()
    # Tokens that end the text and are not part of the result. Empty: the tokenizer's.
    eos_token_id: Tokens = ()
    # Tokens that end the text. They stay in the tokens of the result and are left out of its text.
    stop_token_ids: Tokens = ()
    # The same for sequences of several tokens.
    stop_sequences: tuple[Tokens, ...] = ()
    # Strings that end the text. Only the new text is searched: the prompt may contain them.
    stop_strings: tuple[str, ...] = ()
    # Most seconds to generate. None: no limit.
    max_time: Annotated[float | None, Range(0, math.inf, low_open=True)] = None
    # Seed of sampling. Each row has its own.
    seed: Annotated[int, Range(0, 2**32, high_open=True)] = 0
    # Continuations of each prompt.
    num_return_sequences: Annotated[int, Range(1, 2**20)] = 1
    # Speculative decoding by prompt lookup: guess this number of tokens from an earlier occurrence
    # of the last tokens and verify them at once. Greedy text and the distribution of samples stay
    # the same. 0: off.
    prompt_lookup_num_tokens: Annotated[int, Range(0, 2**8)] = 0
    # Longest suffix to look up, in tokens. Shorter ones are tried next.
    max_matching_ngram_size: Annotated[int, Range(1, 2**5)] = 2
    # Tokens that a draft model guesses at once. Used with a draft only.
    num_assistant_tokens: Annotated[int, Range(1, 2**8)] = 5
    # Beams. 1: no beam search.
    num_beams: Annotated[int, Range(1, 2**10)] = 1
    # A beam's score is divided by length ** length_penalty. Larger values favor long texts; 0
    # disables length normalization.
    length_penalty: Finite = 1.0
    # hf: length ** length_penalty. gnmt: divide by ((5 + length) / 6) ** length_penalty (Wu 2016).
    length_penalty_type: Literal["hf", "gnmt"] = "hf"
    # When to stop. True: when num_beams beams have ended. False: when a better one is unlikely.
    # never: when a better one is impossible.
    early_stopping: Literal[False, True, "never"] = False
    # Groups of beams that avoid each other's tokens (Vijayakumar 2016). 1: off.
    num_beam_groups: Annotated[int, Range(1, 2**10)] = 1
    # Subtracted from a token for each beam of an earlier group that chose it in this step.
    diversity_penalty: NotNegative = 0.0

    def __post_init__(self):
        for key in ("logit_bias", "sequence_bias"):
            if isinstance(getattr(self, key), dict):
                object.__setattr__(self, key, tuple(getattr(self, key).items()))
        if isinstance(self.eos_token_id, int):
            object.__setattr__(self, "eos_token_id", (self.eos_token_id,))
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, _tuples(getattr(self, each.name)))


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    @property
    def sequence_length(self) -> int:
        return self.data.sequence_length or self.model.max_position_embeddings
