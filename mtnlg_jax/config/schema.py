"""What a run is: frozen dataclasses. Each default, range and choice of a single field stands here,
once.

A run file in ``configs/`` defines ``get_config() -> Config``; the command line changes single
values: ``--config=configs/tiny.py --set=train.steps=10 --set=mesh.tensor=2``.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple


class Range(NamedTuple):
    """The values that a field may have, from ``low`` to ``high``; an open end is not among them."""

    low: float
    high: float = 2**31
    low_open: bool = False
    high_open: bool = False


Count = Annotated[int, Range(1)]
OptionalCount = Annotated[int | None, Range(1)]
Number = Annotated[int, Range(0)]  # 0 mostly turns something off
AxisSize = Annotated[int, Range(1, 2**20)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, high_open=True)]
ShareAbove0 = Annotated[float, Range(0, 1, low_open=True)]
Positive = Annotated[float, Range(0, math.inf, low_open=True, high_open=True)]
NotNegative = Annotated[float, Range(0, math.inf, high_open=True)]
Finite = Annotated[float, Range(-math.inf, math.inf, low_open=True, high_open=True)]

# Metadata of a field whose texts name files or folders: `map_paths` finds them by it.
PATH = {"path": True}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the Transformer. The defaults are the block of MT-NLG (pre-LayerNorm, learned
    positions, tanh-GELU MLP of four widths, biases, tied embeddings); names follow Megatron-LM."""

    num_layers: Count = 12
    hidden_size: Count = 768
    num_attention_heads: Count = 12
    num_query_groups: OptionalCount = None  # key/value heads; None: one for each attention head
    kv_channels: OptionalCount = None  # width of one head; None: hidden_size / num_attention_heads
    ffn_hidden_size: OptionalCount = None  # None: 4 x hidden_size
    vocab_size: OptionalCount = None  # None: the tokenizer's, rounded up to vocab_size_divisible_by
    vocab_size_divisible_by: Count = 128
    max_position_embeddings: Count = 2048  # longest sequence, in tokens
    position_embedding_type: Literal["learned", "rotary"] = "learned"
    rotary_base: Positive = 10000.0
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: ShareAbove0 = 1e-5
    activation: Literal["gelu", "gelu_exact", "relu", "silu", "swiglu"] = (
        "gelu"  # gelu: its tanh form
    )
    add_bias: bool = True
    tie_embeddings: bool = True
    dropout_rate: ShareBelow1 = 0.0  # on the embedding and on what each half block adds
    init_method_std: Annotated[float, Range(0, 10, low_open=True)] = 0.02
    # auto: the fastest that serves the call; the others are the keys of
    # mtnlg_jax.model.attention.SUPPORT.
    attention_impl: Literal["auto", "pallas_tpu", "pallas_gpu", "cudnn", "xla_blockwise", "xla"] = (
        "auto"
    )

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def mlp_width(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    def parameter_count(self) -> int:
        """Exact number of parameters; for the default block this is Narayanan 2021 (2),
        12 l h^2 (1 + 13/(12 h) + (V + s)/(12 l h)), plus the 2h of the final LayerNorm."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not known yet: set it, or give data.path")
        hidden = self.hidden_size
        mlp = self.mlp_width
        query = self.num_attention_heads * self.head_width
        kv = self.kv_heads * self.head_width
        norm = hidden * (2 if self.normalization == "layernorm" else 1)
        inputs = 2 if self.activation == "swiglu" else 1
        block = 2 * norm + hidden * (2 * query + 2 * kv) + (inputs + 1) * hidden * mlp
        if self.add_bias:
            block += query + 2 * kv + hidden + inputs * mlp + hidden
        embeddings = self.vocab_size * hidden * (1 if self.tie_embeddings else 2)
        if self.position_embedding_type == "learned":
            embeddings += self.max_position_embeddings * hidden
        return self.num_layers * block + embeddings + norm


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, slowest network first; -1 takes the devices that the others leave."""

    pipe: AxisSize = 1
    data: int = -1
    context: AxisSize = 1
    tensor: AxisSize = 1
    # 0: replicate over data. 1: shard masters and optimizer state, gather weights once a step. 3:
    # per layer.
    zero: Literal[0, 1, 3] = 1
    # Of the pipeline. 1f1b holds at most 2 pipe - 1 activations.
    schedule: Literal["circular", "1f1b"] = "circular"
    virtual_pipe: AxisSize = (
        1  # chunks of layers a stage holds; more make the circular schedule's bubble smaller
    )
    flush: OptionalCount = (
        None  # micro-batches a circular pipeline takes at a time, None: all; a ramp counts in these
    )
    # Attention over context. auto: ulysses where heads divide.
    context_mode: Literal["auto", "ulysses", "gather", "ring"] = "auto"


@dataclass(frozen=True)
class MaskingConfig:
    """Whole-word masking for the masked objective (Devlin 2018, whole-word variant)."""

    word_share: ShareAbove0 = 0.10  # share of the words of a sequence that are predicted
    mask_share: Share = 0.80  # of those, replaced by <mask>
    random_share: Share = 0.10  # of those, replaced by another random word; the rest is kept


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from: one prepared folder, or Megatron's PREFIX of .bin and .idx, or a
    weighted blend."""

    path: str = field(default="", metadata=PATH)
    blend: tuple[tuple[str, float], ...] = field(
        default=(), metadata=PATH
    )  # ((folder, weight), ...) instead of path
    tokenizer: str = field(
        default="", metadata=PATH
    )  # of Megatron's files: folder of the tokenizer that made them
    # Of Megatron's files: share of each source's last documents, or a PREFIX.
    heldout: Annotated[float | str, Range(0, 0.5)] = field(default=0.01, metadata=PATH)
    sequence_length: OptionalCount = None  # tokens in a row; None: model.max_position_embeddings
    masking: MaskingConfig = field(default_factory=MaskingConfig)

    @property
    def sources(self) -> tuple[tuple[str, float], ...]:
        return self.blend or (((self.path, 1.0),) if self.path else ())


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with linear warm-up and cosine decay, in samples: so a batch ramp does not bend
    it."""

    # muon: orthogonal updates of the blocks' matrices, AdamW for all other parameters.
    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 3e-4  # peak
    min_learning_rate_ratio: Share = 0.1  # floor, as a share of the peak
    warmup_fraction: ShareBelow1 = 0.01  # of the run's samples
    decay_fraction: Positive = (
        1.0  # the cosine reaches its floor after this share of the run; may exceed 1
    )
    b1: ShareBelow1 = 0.9
    b2: ShareBelow1 = 0.95
    muon_momentum: ShareBelow1 = 0.95
    eps: ShareAbove0 = 1e-8
    weight_decay: NotNegative = 0.1  # on matrices only: not on norms, biases
    clip_grad_norm: NotNegative = 1.0  # 0: off
    # Above 0: parameters are frozen, and lora_targets learn a product of this rank (Hu 2021).
    lora_rank: Number = 0
    lora_alpha: Positive = 16.0  # the product counts lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = ("q", "v")  # of q, k, v, o (attention), in, gate, out (MLP)


@dataclass(frozen=True)
class StageConfig:
    """One stage of a run: its share of the steps and what is learnt in it."""

    name: str = "causal"
    fraction: Positive = 1.0  # share of train.steps, relative to the other stages
    masked: Share = (
        0.0  # share of the steps with the masked objective: 0 causal, 1 masked, between: a mix
    )
    learning_rate_scale: NotNegative = 1.0
    blend: tuple[tuple[str, float], ...] = field(
        default=(), metadata=PATH
    )  # of this stage; empty: the run's data
    # Folder of a run with the same vocabulary: its distributions are trained on as well (Hinton
    # 2015).
    distill: str = field(default="", metadata=PATH)
    distill_temperature: Positive = (
        1.0  # of both distributions; above 1 what is unlikely counts more
    )
    distill_weight: Share = (
        0.5  # of the teacher's distributions; the text's tokens count 1 - distill_weight
    )


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: Count = 1000
    global_batch_size: Count = 32  # sequences a step
    micro_batch_size: OptionalCount = (
        None  # sequences a device takes at once; None: all of its share
    )
    rampup_batch_size: tuple[int, int, int] | None = (
        None  # (start, increment, samples), as Megatron-LM
    )
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    # Folder of a run, or of a converted model, whose parameters this run starts from.
    init: str = field(default="", metadata=PATH)
    seed: Number = 0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # masters and sums are float32
    # What the backward pass computes again: see model.transformer.RECOMPUTE.
    recompute: Literal["none", "elementwise", "mlp", "projections", "full"] = "elementwise"
    # What gradients are summed in between devices. On one device the sum is float32.
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    loss_chunk: Count = 1024  # tokens of logits in memory at once
    # Of each target, spread evenly over the vocabulary. The held-out loss has none.
    label_smoothing: ShareBelow1 = 0.0
    log_every: Count = 1
    eval_every: Number = 200  # 0: only at the end
    eval_batches: Count = (
        16  # of 16 held-out sequences each, spread over the held-out text, whatever the batch
    )
    save_every: Number = 200  # 0: only at the end
    keep_last: Count = 2
    keep_best: bool = (
        True  # and save whenever an evaluation is the best so far, also between two saves
    )
    max_bad_steps: Count = 5  # non-finite steps in a row that stop the run
    watchdog_seconds: NotNegative = (
        300.0  # a step that takes longer, and 10 times the median, ends its process; 0: off
    )
    # The same limit for every phase other than a step: compiling, restoring, evaluating, saving.
    phase_seconds: Annotated[float, Range(1, math.inf, high_open=True)] = 3600.0
    # A process that is silent for this long counts as dead and ends the others.
    heartbeat_seconds: Annotated[int, Range(1, 2**20)] = 100
    # Peak of one device, FLOP/s, for MFU. None: by the table of its kind.
    device_flops: Annotated[float | None, Range(0, math.inf, low_open=True, high_open=True)] = None
    compare_every: Number = (
        100  # steps until all processes compare config, step, data, program; 0: only at the end
    )


@dataclass(frozen=True)
class DecodeConfig:
    """How text is written; names and meanings follow Hugging Face's GenerationConfig, and OpenAI's
    for logit_bias and the presence and frequency penalties. Off by default: top_k is 0 here, not
    50. Lists and dicts become tuples."""

    max_new_tokens: Count = 128
    min_new_tokens: Number = 0
    min_length: Annotated[int, Range(0, high_open=True)] = 0  # of prompt and continuation
    # A draw, or with num_beams above 1 stochastic beams: distinct sequences, drawn without
    # replacement (Kool 2019).
    temperature: NotNegative = 0.0  # 0: greedy
    top_k: Number = 0  # 0: off
    top_p: ShareAbove0 = 1.0  # 1: off
    min_p: ShareBelow1 = 0.0  # 0: off
    typical_p: ShareAbove0 = 1.0  # 1: off
    epsilon_cutoff: ShareBelow1 = 0.0  # 0: off
    eta_cutoff: ShareBelow1 = 0.0  # 0: off
    repetition_penalty: Positive = 1.0  # 1: off; counts the prompt
    presence_penalty: Finite = 0.0  # counts generated tokens only
    frequency_penalty: Finite = 0.0  # counts generated tokens only
    no_repeat_ngram_size: Number = 0  # 0: off
    logit_bias: tuple[
        tuple[int, float], ...
    ] = ()  # (token, what is added to its logit); -inf: never
    sequence_bias: tuple[
        tuple[tuple[int, ...], float], ...
    ] = ()  # (tokens, added to the last one after the others)
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that are never completed
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()  # not as the first new token
    forced_bos_token_id: int | None = None  # the first new token
    forced_eos_token_id: int | None = (
        None  # the last, where max_new_tokens or the context ends the row
    )
    forced_tokens: tuple[tuple[int, int], ...] = ()  # (which new token, from 0; its id)
    eos_token_id: tuple[int, ...] = ()  # ends, not part of the result; none: the tokenizer's
    stop_token_ids: tuple[int, ...] = ()  # ends, kept in the tokens and left out of the text
    stop_sequences: tuple[tuple[int, ...], ...] = ()  # the same for several tokens in a row
    stop_strings: tuple[str, ...] = ()  # looked for in the new text alone: the prompt may hold them
    max_time: Annotated[float | None, Range(0, math.inf, low_open=True)] = None  # seconds
    seed: Annotated[int, Range(0, 2**32, high_open=True)] = 0
    num_return_sequences: Annotated[int, Range(1, 2**20)] = 1
    # Speculative decoding: so many tokens are guessed and verified at once. What is written stays
    # the same, or drawn from the same distribution.
    # Guessed by what followed the last tokens where they stood before. 0: off.
    prompt_lookup_num_tokens: Annotated[int, Range(0, 2**8)] = 0
    # Longest suffix to match. Shorter ones are tried next.
    max_matching_ngram_size: Annotated[int, Range(1, 2**5)] = 2
    num_assistant_tokens: Annotated[int, Range(1, 2**8)] = (
        5  # guessed by a draft model, where there is one
    )
    num_beams: Annotated[int, Range(1, 2**10)] = 1  # 1: no beam search
    length_penalty: Finite = (
        1.0  # scores are divided by length ** length_penalty; above 0 long ones gain
    )
    length_penalty_type: Literal["hf", "gnmt"] = (
        "hf"  # gnmt: ((5 + length) / 6) ** length_penalty (Wu 2016)
    )
    # True: stop at num_beams ended beams. False: when a better one is unlikely. "never": when it is
    # impossible.
    early_stopping: Literal[False, True, "never"] = False
    num_beam_groups: Annotated[int, Range(1, 2**10)] = 1  # diverse beams (Vijayakumar 2016)
    # Subtracted for each beam of an earlier group that wrote the token in this step.
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
