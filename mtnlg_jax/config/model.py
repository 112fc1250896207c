"""The shape of the Transformer: MT-NLG's block by default, and the switches that turn it into the
blocks of today's open models. docs/models.md lists the families and what each one sets."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mtnlg_jax.config.ranges import (
    Count,
    CountFrom0,
    Finite,
    NotNegative,
    OptionalCount,
    OptionalPositive,
    Positive,
    Range,
    ShareAbove0,
    ShareBelow1,
)

# What may have a bias: queries, keys and values; the output of attention; the MLP; norms; the
# output embedding; the transform of a masked model before it.
BIASES = ("qkv", "out", "mlp", "norm", "head", "mlm")

GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_exact", "swiglu_oai")


@dataclass(frozen=True)
class RopeScaling:
    """Changes of the rotary frequencies for contexts longer than that of pretraining. Names follow
    Hugging Face's rope_scaling."""

    # linear: all wavelengths (Chen 2023). llama3: long ones only (Llama Team 2024). yarn: Peng
    # 2023. longrope: a factor for each (Ding 2024).
    rope_type: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    # How many times longer the context became.
    factor: Annotated[float, Range(1, math.inf, high_open=True)] = 1.0
    # Context of pretraining, in tokens. Used with llama3, yarn and longrope.
    original_max_position_embeddings: CountFrom0 = 0
    # llama3: wavelengths longer than the original context divided by this are stretched in full.
    low_freq_factor: Positive = 1.0
    # llama3: wavelengths shorter than the original context divided by this stay.
    high_freq_factor: Positive = 4.0
    # yarn: dims that turn more often than this over the original context stay.
    beta_fast: Positive = 32.0
    # yarn: dims that turn less often than this are stretched in full.
    beta_slow: Positive = 1.0
    # yarn: round the two bounds to whole dims.
    truncate: bool = True
    # Factor of cosines and sines. None: that of the method's paper.
    attention_factor: OptionalPositive = None
    # longrope: factors of the wavelengths up to the original context, one for each pair of dims.
    short_factor: tuple[float, ...] = ()
    # longrope: factors beyond the original context.
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the pattern that the layers repeat."""

    # Keys that a query sees, itself included. None: all. In a bidirectional model, keys on each
    # side, the query included.
    window: OptionalCount = None
    # Rotate queries and keys. False: a layer without positions (NoPE).
    rotary: bool = True
    # Base of the rotary wavelengths. None: model.rotary_base.
    rotary_base: OptionalPositive = None
    # Apply model.rope_scaling.
    rope_scaling: bool = True
    # Norm before attention. False: none (the first layer of ModernBERT).
    first_norm: bool = True


@dataclass(frozen=True)
class Multipliers:
    """Constant factors."""

    # Of the token embedding.
    embedding: Finite = 1.0
    # Of the attention scores. None: 1 / sqrt(head width).
    attention: OptionalPositive = None
    # Of what each half block adds.
    residual: Finite = 1.0
    # Of the logits.
    logits: Finite = 1.0


@dataclass(frozen=True)
class MoEConfig:
    """Experts in place of the MLP (Shazeer 2017). Every expert has the width
    model.ffn_hidden_size. Names follow Megatron-LM."""

    # Experts of a layer. 0: one MLP and no router.
    num_moe_experts: CountFrom0 = 0
    # Experts that each token visits.
    moe_router_topk: Count = 2
    # Scores of the experts from the router's logits.
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    # softmax over all experts before the best are taken; False: over the best only.
    moe_router_pre_softmax: bool = True
    # Divide the scores of the chosen experts by their sum.
    moe_router_norm: bool = True
    # Factor of the chosen experts' scores.
    moe_router_topk_scaling_factor: Positive = 1.0
    # Bias of the router's logits.
    moe_router_bias: bool = False
    # Width of an MLP that every token visits beside the experts. 0: none.
    moe_shared_expert_intermediate_size: CountFrom0 = 0
    # Scale the shared expert's output by a learned sigmoid gate (Qwen2-MoE).
    moe_shared_expert_gate: bool = False
    # Add a bias to the score of each expert when the best are chosen. It is moved after each step
    # toward even loads and has no gradient (Wang 2024, arXiv 2408.15664; DeepSeek-V3).
    moe_router_enable_expert_bias: bool = False
    # How far that bias moves in a step. The default is that of DeepSeek-V3.
    moe_router_bias_update_rate: NotNegative = 1e-3
    # Weight of the load-balancing loss (Fedus 2021, equation 4), computed for each sequence
    # (DeepSeek-V3, equation 17). It adds to gradients, not to the reported loss.
    moe_aux_loss_coeff: NotNegative = 0.0
    # Weight of the router's z-loss (Zoph 2022, equation 5), in the same way.
    moe_z_loss_coeff: NotNegative = 0.0


@dataclass(frozen=True)
class PrefixConfig:
    """What a row may have ahead of its tokens: an image, or features of an encoder outside of the
    model, such as one of vision or audio. A learned projector brings them to the width of the model
    (Liu 2023, LLaVA, section 4.1). docs/images.md."""

    # Positions that features take. 0: none; an image takes one for each patch.
    length: CountFrom0 = 0
    # Width of a feature, or of the patch encoder's output. 0: the model has no prefix.
    width: CountFrom0 = 0
    # Height and width of images, in pixels. 0: rows have features in place of an image.
    image_size: CountFrom0 = 0
    # Height and width of a patch of an image, in pixels.
    patch_size: Count = 8
    # Channels of an image: 3 for RGB, 1 for gray.
    image_channels: Literal[1, 3] = 3

    @property
    def positions(self) -> int:
        """Positions ahead of the tokens; 0 in a model of text alone."""
        return (self.image_size // self.patch_size) ** 2 if self.image_size else self.length

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the prefix of a row: (height, width, channels) of an image, (positions, width)
        of features; () in a model of text alone."""
        if self.image_size:
            return self.image_size, self.image_size, self.image_channels
        return (self.length, self.width) if self.length else ()

    @property
    def dtype(self) -> str:
        """Type of the numbers of a prefix."""
        return "uint8" if self.image_size else "float32"

    @property
    def patch_numbers(self) -> int:
        """Numbers of a patch of an image."""
        return self.patch_size**2 * self.image_channels

    def parameter_count(self, hidden: int) -> int:
        """Number of parameters of the projector to ``hidden``, and of the patch encoder."""
        if not self.positions:
            return 0
        count = (self.width + 1) * hidden
        if self.image_size:
            count += (self.patch_numbers + 1 + self.positions) * self.width
        return count


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the Transformer. The defaults are the block of MT-NLG: pre-LayerNorm, learned
    positions, an MLP of four widths with tanh-GELU, biases, tied embeddings. Names follow
    Megatron-LM."""

    # Transformer blocks.
    num_layers: Count = 12
    # Width of the residual stream.
    hidden_size: Count = 768
    # Query heads of each attention layer.
    num_attention_heads: Count = 12
    # Key/value heads. None: one for each query head.
    num_query_groups: OptionalCount = None
    # Width of one head. None: hidden_size / num_attention_heads.
    kv_channels: OptionalCount = None
    # Width of the MLP. None: 4 x hidden_size.
    ffn_hidden_size: OptionalCount = None
    # Rows of the embedding table. None: the tokenizer's size, rounded up to a multiple of
    # vocab_size_divisible_by.
    vocab_size: OptionalCount = None
    # The vocabulary is padded to a multiple of this, so that mesh.tensor divides it. The default is
    # Megatron-LM's.
    vocab_size_divisible_by: Count = 128
    # Rows behind vocab_size that no token has. They take no part in the softmax, and are cut off
    # where the model is exported. load_config sets this where mesh.tensor does not divide
    # vocab_size, such as GPT-2's 50,257.
    vocab_padding: CountFrom0 = 0
    # Longest sequence, in tokens. The default is MT-NLG's.
    max_position_embeddings: Count = 2048
    # How positions enter: a learned vector for each, rotations of queries and keys (RoPE), a
    # penalty of the scores by distance (ALiBi, Press 2021), or not at all.
    position_embedding_type: Literal["learned", "rotary", "alibi", "none"] = "learned"
    # Base of the rotary wavelengths. Used with rotary only.
    rotary_base: Positive = 10000.0
    # Share of the head width that rotates. Used with rotary only.
    rotary_percent: ShareAbove0 = 1.0
    # Rotary frequencies for a longer context. Used with rotary only.
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    # Norm of each half block and at the end.
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    # Position of the norms. pre: x + f(norm(x)). sandwich: x + norm(f(norm(x))) (Gemma 2). output:
    # x + norm(f(x)) (OLMo 2). post: norm(x + f(x)) (BERT).
    norm_placement: Literal["pre", "sandwich", "output", "post"] = "pre"
    # Added to the variance in each norm.
    norm_epsilon: ShareAbove0 = 1e-5
    # Norm of queries and keys: of each head (Henry 2020), or of all heads together (OLMo 2).
    qk_layernorm: Literal["none", "head", "full"] = "none"
    # Attention and MLP read the same x, each through its norm or both through one (GPT-J).
    parallel_residual: Literal["none", "one_norm", "two_norms"] = "none"
    # Norm of the embedding (BLOOM, BERT).
    embedding_norm: bool = False
    # Activation of the MLP. gelu is the tanh approximation, gelu_exact uses erf. The last four have
    # a gate and thus three matrices: silu, gelu, exact gelu, and gpt-oss's clipped sigmoid.
    activation: Literal[
        "gelu",
        "gelu_exact",
        "relu",
        "squared_relu",
        "silu",
        "swiglu",
        "geglu",
        "geglu_exact",
        "swiglu_oai",
    ] = "gelu"
    # Biases in attention and MLP, and those of layernorm.
    add_bias: bool = True
    # The biases that exist, in place of add_bias: some of qkv, out, mlp, norm, head, mlm. None: as
    # add_bias has it.
    bias: tuple[str, ...] | None = None
    # Use the embedding table as output head.
    tie_embeddings: bool = True
    # Dense layer, activation and norm before the output head (BERT).
    mlm_head: bool = False
    # What differs between layers. Layer i is element i modulo the length.
    layer_pattern: tuple[LayerSpec, ...] = (LayerSpec(),)
    # Attention scores become cap * tanh(score / cap) (Gemma 2). None: no cap.
    attn_logit_softcapping: OptionalPositive = None
    # The same for the logits.
    final_logit_softcapping: OptionalPositive = None
    # Constant factors.
    multipliers: Multipliers = field(default_factory=Multipliers)
    # A learned logit for each head that takes part in the softmax and has no value (Xiao 2023).
    attention_sink: bool = False
    # Experts.
    moe: MoEConfig = field(default_factory=MoEConfig)
    # An image or features ahead of the tokens.
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    # Dropout on the embedding and on the output of each half block. 0 suits large runs, which read
    # a text about once.
    dropout_rate: ShareBelow1 = 0.0
    # Standard deviation of the initial weights. The default is GPT-2's.
    init_method_std: Annotated[float, Range(0, 10, low_open=True)] = 0.02
    # muP (Yang 2022, Tensor Programs V): width of the base model at which the learning rate and the
    # other settings were found. All widths but that of a head are taken to be hidden_size /
    # mup_base_hidden_size times those of the base. None: off.
    mup_base_hidden_size: OptionalCount = None
    # Width of one head in the base model, where it grows with the model. None: this model's.
    mup_base_kv_channels: OptionalCount = None
    # Attention implementation. auto: the fastest one that supports the call; docs/attention.md
    # compares them.
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
    def mup_ratio(self) -> float:
        """Width of the model over that of the base model; 1 without muP."""
        return self.hidden_size / (self.mup_base_hidden_size or self.hidden_size)

    @property
    def attention_multiplier(self) -> float | None:
        """Factor of the attention scores; None: 1 / sqrt(head width). With muP it falls with the
        head width, from that of the base on (Yang 2022, definition 4.1)."""
        given = self.multipliers.attention
        if self.mup_base_kv_channels is None:
            return given
        base = self.mup_base_kv_channels
        return (base**-0.5 if given is None else given) * base / self.head_width

    @property
    def logits_multiplier(self) -> float:
        """Factor of the logits. With muP a table that is also the embedding keeps its size, so its
        logits are divided by the ratio of the widths (Yang 2022, appendix B.1)."""
        return self.multipliers.logits / (self.mup_ratio if self.tie_embeddings else 1.0)

    @property
    def rotary_width(self) -> int:
        """Dims of a head that rotate, an even number; 0 without rotary positions."""
        if self.position_embedding_type != "rotary":
            return 0
        return int(self.rotary_percent * self.head_width) // 2 * 2

    @property
    def mlp_width(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate, and thus three matrices."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table of a resolved model, padding included. Raises ValueError
        while ``vocab_size`` is None."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not known yet: set it, or give data.path")
        return self.vocab_size + self.vocab_padding

    def padded(self, parts: int) -> "ModelConfig":
        """Return this model with a vocabulary that ``parts`` devices can share: the padding that it
        has if that divides, else up to a multiple of ``vocab_size_divisible_by``."""
        if self.vocab_size is None or self.vocabulary % parts == 0:
            return self
        unit = math.lcm(parts, self.vocab_size_divisible_by)
        return dataclasses.replace(self, vocab_padding=-self.vocab_size % unit)

    def has_bias(self, where: str) -> bool:
        """Return whether ``where``, one of BIASES, has a bias."""
        if self.bias is not None:
            return where in self.bias
        if where == "norm":
            return self.normalization == "layernorm"
        return self.add_bias and where in ("qkv", "out", "mlp")

    def layer(self, number: int) -> LayerSpec:
        """Return the specification of layer ``number``."""
        return self.layer_pattern[number % len(self.layer_pattern)]

    def parameter_count(self) -> int:
        """Exact number of parameters. For the default block this is equation 2 of Narayanan 2021,
        12 l h^2 (1 + 13/(12 h) + (V + s)/(12 l h)), plus the 2h of the final LayerNorm."""
        hidden = self.hidden_size
        norm = hidden * (2 if self.has_bias("norm") else 1)
        norms = {"pre": 2, "sandwich": 4, "output": 2, "post": 2}[self.norm_placement]
        if self.parallel_residual == "one_norm":
            norms -= 1
        block = norms * norm + self._attention_count() + self._mlp_count()
        embeddings = self.vocabulary * hidden * (1 if self.tie_embeddings else 2)
        if self.has_bias("head"):
            embeddings += self.vocabulary
        if self.position_embedding_type == "learned":
            embeddings += self.max_position_embeddings * hidden
        outer = 0 if self.norm_placement == "post" else norm
        if self.embedding_norm:
            outer += norm
        if self.mlm_head:
            outer += hidden * hidden + norm + (hidden if self.has_bias("mlm") else 0)
        return self.num_layers * block + embeddings + outer + self.prefix.parameter_count(hidden)

    def _attention_count(self) -> int:
        query = self.num_attention_heads * self.head_width
        kv = self.kv_heads * self.head_width
        count = self.hidden_size * (2 * query + 2 * kv)
        if self.has_bias("qkv"):
            count += query + 2 * kv
        if self.has_bias("out"):
            count += self.hidden_size
        if self.qk_layernorm == "head":
            count += 2 * self.head_width
        elif self.qk_layernorm == "full":
            count += query + kv
        return count + (self.num_attention_heads if self.attention_sink else 0)

    def active_parameter_count(self) -> int:
        """Number of parameters that a token uses: of the experts, those that it visits."""
        moe = self.moe
        idle = max(0, moe.num_moe_experts - moe.moe_router_topk)
        return self.parameter_count() - self.num_layers * idle * self._one_mlp_count(self.mlp_width)

    def attended(self, sequence_length: int, causal: bool = False) -> float:
        """Return the keys that a query sees in the mean over layers and, if ``causal``, over the
        queries, of which the first see fewer."""
        seen: list[float] = [
            min(self.layer(number).window or sequence_length, sequence_length)
            for number in range(self.num_layers)
        ]
        if causal:
            seen = [keys - keys**2 / (2 * sequence_length) for keys in seen]
        return sum(seen) / len(seen)

    def _mlp_count(self) -> int:
        moe = self.moe
        if not moe.num_moe_experts:
            return self._one_mlp_count(self.mlp_width)
        # Of the router.
        per_expert = self.hidden_size + moe.moe_router_bias + moe.moe_router_enable_expert_bias
        count = moe.num_moe_experts * (self._one_mlp_count(self.mlp_width) + per_expert)
        if moe.moe_shared_expert_intermediate_size:
            count += self._one_mlp_count(moe.moe_shared_expert_intermediate_size)
            count += self.hidden_size if moe.moe_shared_expert_gate else 0
        return count

    def _one_mlp_count(self, width: int) -> int:
        inputs = 2 if self.gated else 1
        biases = inputs * width + self.hidden_size if self.has_bias("mlp") else 0
        return (inputs + 1) * self.hidden_size * width + biases
