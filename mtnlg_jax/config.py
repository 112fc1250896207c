"""What a run is: frozen dataclasses, one check of the whole, one way to change a value.

A run file in ``configs/`` defines ``get_config() -> Config``; the command line changes single values:
``--config=configs/tiny.py --set=train.steps=10 --set=mesh.tensor=2``. Every default stands here, once.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import os
import re
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mtnlg_jax import command

# Metadata of a field whose texts name files or folders: `map_paths` finds them by it.
PATH = {"path": True}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the Transformer. The defaults are the block of MT-NLG (pre-LayerNorm, learned positions,
    tanh-GELU MLP of four widths, biases, tied embeddings); names follow Megatron-LM."""

    num_layers: int = 12
    hidden_size: int = 768
    num_attention_heads: int = 12
    num_query_groups: int | None = None  # key/value heads; None: one for each attention head
    kv_channels: int | None = None  # width of one head; None: hidden_size / num_attention_heads
    ffn_hidden_size: int | None = None  # None: 4 x hidden_size
    vocab_size: int | None = None  # None: the tokenizer's, rounded up to vocab_size_divisible_by
    vocab_size_divisible_by: int = 128
    max_position_embeddings: int = 2048  # longest sequence, in tokens
    position_embedding_type: str = "learned"  # learned | rotary
    rotary_base: float = 10000.0
    normalization: str = "layernorm"  # layernorm | rmsnorm
    norm_epsilon: float = 1e-5
    activation: str = "gelu"  # gelu (tanh form) | gelu_exact | relu | silu | swiglu
    add_bias: bool = True
    tie_embeddings: bool = True
    dropout_rate: float = 0.0  # on the embedding and on what each half block adds
    init_method_std: float = 0.02
    attention_impl: str = "auto"  # or a key of mtnlg_jax.model.attention.SUPPORT

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
        hidden, mlp = self.hidden_size, self.mlp_width
        query, kv = self.num_attention_heads * self.head_width, self.kv_heads * self.head_width
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

    pipe: int = 1
    data: int = -1
    context: int = 1
    tensor: int = 1
    zero: int = 1  # 0: replicate over data; 1: shard masters and optimizer, gather once a step; 3: per layer
    schedule: str = "circular"  # of the pipeline: circular | 1f1b, which holds 2 pipe - 1 activations
    virtual_pipe: int = 1  # chunks of layers a stage holds; more make the circular schedule's bubble smaller
    flush: int | None = None  # micro-batches a circular pipeline takes at a time, None: all; a ramp counts in these
    context_mode: str = "auto"  # attention over context: ulysses | gather | ring; auto: ulysses where heads divide


@dataclass(frozen=True)
class MaskingConfig:
    """Whole-word masking for the masked objective (Devlin 2018, whole-word variant)."""

    word_share: float = 0.10  # share of the words of a sequence that are predicted
    mask_share: float = 0.80  # of those, replaced by <mask>
    random_share: float = 0.10  # of those, replaced by another random word; the rest is kept


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from: one prepared folder, or Megatron's PREFIX of .bin and .idx, or a weighted blend."""

    path: str = field(default="", metadata=PATH)
    blend: tuple[tuple[str, float], ...] = field(default=(), metadata=PATH)  # ((folder, weight), ...) instead of path
    tokenizer: str = field(default="", metadata=PATH)  # of Megatron's files: folder of the tokenizer that made them
    # Of Megatron's files: share of each source's last documents, or a PREFIX.
    heldout: float | str = field(default=0.01, metadata=PATH)
    sequence_length: int | None = None  # tokens in a row; None: model.max_position_embeddings
    masking: MaskingConfig = field(default_factory=MaskingConfig)

    @property
    def sources(self) -> tuple[tuple[str, float], ...]:
        return self.blend or (((self.path, 1.0),) if self.path else ())


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with linear warm-up and cosine decay, in samples: so a batch ramp does not bend it."""

    name: str = "adamw"  # adamw | muon: orthogonal updates of the blocks' matrices, AdamW for all else
    learning_rate: float = 3e-4  # peak
    min_learning_rate_ratio: float = 0.1  # floor, as a share of the peak
    warmup_fraction: float = 0.01  # of the run's samples
    decay_fraction: float = 1.0  # the cosine reaches its floor after this share of the run; may exceed 1
    b1: float = 0.9
    b2: float = 0.95
    muon_momentum: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only: not on norms, biases
    clip_grad_norm: float = 1.0  # 0: off
    lora_rank: int = 0  # above 0: all parameters stay as they are, lora_targets learn a product of this rank (Hu 2021)
    lora_alpha: float = 16.0  # the product counts lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = ("q", "v")  # of q, k, v, o (attention), in, gate, out (MLP)


@dataclass(frozen=True)
class StageConfig:
    """One stage of a run: its share of the steps and what is learnt in it."""

    name: str = "causal"
    fraction: float = 1.0  # share of train.steps, relative to the other stages
    masked: float = 0.0  # share of the steps with the masked objective: 0 causal, 1 masked, between: a mix
    learning_rate_scale: float = 1.0
    blend: tuple[tuple[str, float], ...] = field(default=(), metadata=PATH)  # of this stage; empty: the run's data
    # Folder of a run with the same vocabulary: its distributions are trained on as well (Hinton 2015).
    distill: str = field(default="", metadata=PATH)
    distill_temperature: float = 1.0  # of both distributions; above 1 what is unlikely counts more
    distill_weight: float = 0.5  # of the teacher's distributions; the text's tokens count 1 - distill_weight


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    global_batch_size: int = 32  # sequences a step
    micro_batch_size: int | None = None  # sequences a device takes at once; None: all of its share
    rampup_batch_size: tuple[int, int, int] | None = None  # (start, increment, samples), as Megatron-LM
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    # Folder of a run, or of a converted model, whose parameters this run starts from.
    init: str = field(default="", metadata=PATH)
    seed: int = 0
    compute_dtype: str = "bfloat16"  # bfloat16 | float32; masters and sums are float32
    recompute: str = "elementwise"  # none | elementwise | mlp | projections | full: model.transformer.RECOMPUTE
    reduce_dtype: str = "float32"  # float32 | bfloat16: what gradients are summed in between devices; on one, float32
    loss_chunk: int = 1024  # tokens of logits in memory at once
    label_smoothing: float = 0.0  # [0, 1): of each target, spread evenly; in training alone, not in the held-out loss
    log_every: int = 1
    eval_every: int = 200  # 0: only at the end
    eval_batches: int = 16  # of 16 held-out sequences each, spread over the held-out text, whatever the batch
    save_every: int = 200  # 0: only at the end
    keep_last: int = 2
    keep_best: bool = True  # and save whenever an evaluation is the best so far, also between two saves
    max_bad_steps: int = 5  # non-finite steps in a row that stop the run
    watchdog_seconds: float = 300.0  # a step that takes longer, and 10 times the median, ends its process; 0: off
    phase_seconds: float = 3600.0  # the same for all that is no step: compiling, restoring, evaluating, saving
    heartbeat_seconds: int = 100  # a process that is silent for so long counts as dead, and ends the others
    device_flops: float | None = None  # peak of one device, FLOP/s, for MFU; None: by the table of its kind
    compare_every: int = 100  # steps until all processes compare config, step, data, program; 0: only at the end


@dataclass(frozen=True)
class DecodeConfig:
    """How text is written; names and meanings follow Hugging Face's GenerationConfig, and OpenAI's for logit_bias and
    the presence and frequency penalties. Off by default: top_k is 0 here, not 50. Lists and dicts become tuples."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    min_length: int = 0  # of prompt and continuation
    # A draw, or with num_beams above 1 stochastic beams: distinct sequences, drawn without replacement (Kool 2019).
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # (0, 1]; 1: off
    min_p: float = 0.0  # [0, 1); 0: off
    typical_p: float = 1.0  # (0, 1]; 1: off
    epsilon_cutoff: float = 0.0  # [0, 1); 0: off
    eta_cutoff: float = 0.0  # [0, 1); 0: off
    repetition_penalty: float = 1.0  # > 0; 1: off; counts the prompt
    presence_penalty: float = 0.0  # counts generated tokens only
    frequency_penalty: float = 0.0  # counts generated tokens only
    no_repeat_ngram_size: int = 0  # 0: off
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit); -inf: never
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()  # (tokens, added to the last one after the others)
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that are never completed
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()  # not as the first new token
    forced_bos_token_id: int | None = None  # the first new token
    forced_eos_token_id: int | None = None  # the last, where max_new_tokens or the context ends the row
    forced_tokens: tuple[tuple[int, int], ...] = ()  # (which new token, from 0; its id)
    eos_token_id: tuple[int, ...] = ()  # ends, not part of the result; none: the tokenizer's
    stop_token_ids: tuple[int, ...] = ()  # ends, kept in the tokens and left out of the text
    stop_sequences: tuple[tuple[int, ...], ...] = ()  # the same for several tokens in a row
    stop_strings: tuple[str, ...] = ()  # looked for in the new text alone: the prompt may hold them
    max_time: float | None = None  # seconds
    seed: int = 0
    num_return_sequences: int = 1
    # Speculative decoding: so many tokens are guessed and verified at once. What is written stays the same, or drawn
    # from the same distribution.
    prompt_lookup_num_tokens: int = 0  # guessed by what followed the last tokens where they stood before; 0: off
    max_matching_ngram_size: int = 2  # so many last tokens are looked up, fewer where so many are not found
    num_assistant_tokens: int = 5  # guessed by a draft model, where there is one
    num_beams: int = 1  # 1: no beam search
    length_penalty: float = 1.0  # scores are divided by length ** length_penalty; above 0 long ones gain
    length_penalty_type: str = "hf"  # hf | gnmt: ((5 + length) / 6) ** length_penalty (Wu 2016)
    early_stopping: bool | str = False  # True: at num_beams ended ones; False: no better one likely; "never": possible
    num_beam_groups: int = 1  # diverse beams (Vijayakumar 2016)
    diversity_penalty: float = 0.0  # taken off for each beam of an earlier group that wrote the token in this step

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


# --- reading and changing -------------------------------------------------------------------------------


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Runs ``get_config()`` of the Python file ``path``, applies ``overrides`` ("train.steps=10") and
    validates. "FILE.py:TEXT" calls ``get_config("TEXT")``. Raises FileNotFoundError or ValueError."""
    config = load_object(path, Config, overrides)
    validate(config)
    return config


def load_object(path: str, kind: type, overrides: Iterable[str] = ()):
    """The same for a file that gives a dataclass of another ``kind``; not validated. Fields marked with PATH have
    their ~ expanded. What fails in the file is a ValueError of one line, with the file's line."""
    given, path, arguments = path, *split_argument(path)
    if not os.path.isfile(path):
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        there = os.path.join(root, path)
        hint = f"did you mean {there}?" if os.path.isfile(there) else "give one of configs/*.py"
        raise FileNotFoundError(f"config {path!r} is not a file; {hint}")
    spec = importlib.util.spec_from_file_location("mtnlg_config", path)
    if spec is None:
        raise ValueError(f"config {path!r} is not a Python file; give one of configs/*.py")
    module = importlib.util.module_from_spec(spec)
    get_config = None
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if callable(get_config):
            _check_arguments(given, get_config, arguments)
            config = get_config(*arguments)
    except (Exception, SystemExit) as error:
        raise ValueError(f"config {path!r} does not load: {describe_failure(error, path, get_config)}") from error
    if not callable(get_config):
        raise ValueError(f"config {path!r} defines no get_config(); see configs/tiny.py")
    if not isinstance(config, kind):
        raise ValueError(f"get_config() of {path!r} gives a {type(config).__name__}; it must return a {kind.__name__}")
    try:
        config = _coerce(_plain(config, "config"), kind, "config")  # lists, where the file wrote them, become tuples
    except ValueError as error:
        raise ValueError(f"config {path!r}: {error}") from None
    return map_paths(override(config, *overrides), command.expand)


def split_argument(path: str) -> tuple[str, list[str]]:
    """"FILE.py:TEXT" as ("FILE.py", ["TEXT"]); a path without TEXT as (path, [])."""
    found = None if os.path.isfile(path) else re.fullmatch(r"(.+\.py):([^/]*)", path)
    return (found[1], [found[2]]) if found else (path, [])


def _check_arguments(given: str, get_config: Callable, arguments: list[str]) -> None:
    needed = [each for each in inspect.signature(get_config).parameters.values() if each.default is each.empty]
    taken = len(inspect.signature(get_config).parameters)
    if len(needed) > len(arguments):
        raise ValueError(f"get_config() needs {needed[0].name!r}; give it behind a colon, as {given}:{needed[0].name}")
    if taken < len(arguments):
        raise ValueError(f"get_config() takes no argument, and {arguments[0]!r} stands behind the colon; leave it out")


def describe_failure(error: BaseException, path: str, called: Callable | None = None) -> str:
    """"line 7: TypeError: ..." in one line: what the Python file ``path`` raised, and where in it; where it could not
    even enter ``called``, that function's line."""
    whole = os.path.abspath(path)
    numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
               if os.path.abspath(frame.filename) == whole]
    if isinstance(error, SyntaxError) and error.filename and os.path.abspath(error.filename) == whole:
        numbers.append(error.lineno)
    if not numbers and hasattr(called, "__code__"):
        numbers.append(called.__code__.co_firstlineno)
    line = f"line {numbers[-1]}: " if numbers else ""
    text = " ".join(str(error).split())
    return f"{line}{type(error).__name__}{f': {text}' if text else ''}{_nearest_field(text)}"


def _nearest_field(text: str) -> str:
    """What was meant where a dataclass of this module was given a field that it lacks; "" where that is unknown."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    kind = globals().get(found[1]) if found else None
    if not dataclasses.is_dataclass(kind):
        return ""
    names = [each.name for each in dataclasses.fields(kind)]
    close = difflib.get_close_matches(found[2], names, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(names)}"


def _plain(value, path: str):
    """``value`` as JSON holds it, to be coerced: NumPy's scalars and arrays as Python's, path objects as text. Raises
    ValueError, naming ``path``, where it is none of these."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name), f"{path}.{each.name}")
                for each in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(each, path) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each, f"{path}.{key}") for key, each in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy, JAX
        return value.tolist()
    raise ValueError(f"{path}={value!r} is a {type(value).__name__}; write a number, a text, a list or None")


def map_paths(config, change: Callable[[str], str], prefix: str = ""):
    """``config``, a dataclass, with each text that names a file or folder replaced by what ``change`` makes of it."""
    changed = {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if each.metadata.get("path"):
            try:
                changed[each.name] = _map_texts(value, change)
            except ValueError as error:
                raise ValueError(f"{prefix}{each.name}: {error}") from None
        elif dataclasses.is_dataclass(value):
            changed[each.name] = map_paths(value, change, f"{prefix}{each.name}.")
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            changed[each.name] = tuple(map_paths(one, change, f"{prefix}{each.name}.") if dataclasses.is_dataclass(one)
                                       else one for one in value)
    return dataclasses.replace(config, **changed) if changed else config


def _map_texts(value, change: Callable[[str], str]):
    if isinstance(value, str):
        return change(value) if value else value
    return tuple(_map_texts(each, change) for each in value) if isinstance(value, list | tuple) else value


def override(config: Config, *assignments: str) -> Config:
    """A copy of ``config`` with each "section.key=value" applied; the value is read as the field's type.

    Of data.path and data.blend, which exclude each other, the one given here replaces the file's other one."""
    given = dict(map(str.strip, assignment.partition("=")[::2]) for assignment in assignments)
    for key, other, empty in (("path", "blend", ()), ("blend", "path", "")):
        filled = given.get(f"data.{key}", "") not in ("", "()", "[]")
        if isinstance(config, Config) and filled and f"data.{other}" not in given:
            data = dataclasses.replace(config.data, **{other: empty})
            config = dataclasses.replace(config, data=data)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set={assignment!r} has no '='; write it as --set=train.steps=10")
        config = _replace(config, path.strip().split("."), text.strip(), path.strip())
    return config


def _replace(node, keys: list[str], text: str, path: str):
    names = [f.name for f in dataclasses.fields(node)]
    if keys[0] not in names:
        close = difflib.get_close_matches(keys[0], names, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"{path}: {type(node).__name__} has no {keys[0]!r}; {hint}it has {', '.join(names)}")
    value = getattr(node, keys[0])
    if dataclasses.is_dataclass(value):
        if len(keys) == 1:
            inner = ", ".join(f.name for f in dataclasses.fields(value))
            raise ValueError(f"{path} is a section; set one of its keys: {inner}")
        return dataclasses.replace(node, **{keys[0]: _replace(value, keys[1:], text, path)})
    if len(keys) > 1:
        raise ValueError(f"{path}: {keys[0]} is a value, not a section; nothing lies below it")
    kind = typing.get_type_hints(type(node))[keys[0]]
    return dataclasses.replace(node, **{keys[0]: _parse(text, kind, path)})


def _parse(text: str, kind, path: str):
    if kind is str:
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval raises
        if isinstance(kind, types.UnionType) and str in kind.__args__:
            return text
        raise ValueError(f"{path}={text!r} is not a value of type {_kind_name(kind)}") from None
    return _coerce(value, kind, path)


def _coerce(value, kind, path: str):
    """``value`` as an instance of the annotation ``kind``: what JSON and literals lose is put back."""
    if isinstance(kind, types.UnionType):
        if value is None and type(None) in kind.__args__:
            return None
        kinds = [k for k in kind.__args__ if k is not type(None)]
        kind = next((k for k in kinds if k is type(value)), kinds[0])
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            return tuple(_coerce(v, kinds[0], path) for v in value)
        if len(kinds) == len(value):
            return tuple(_coerce(v, k, path) for v, k in zip(value, kinds, strict=True))
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _from_dict(kind, value, path)
    elif origin is None and not dataclasses.is_dataclass(kind):
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(str(value))  # float(value) raises above 1e308; this gives inf, for validate()
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    raise ValueError(f"{path}={value!r} is {type(value).__name__}; it must be {_kind_name(kind)}")


def _kind_name(kind) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _from_dict(kind, tree: dict, path: str):
    hints = typing.get_type_hints(kind)
    unknown = sorted(map(str, set(tree) - set(hints)))
    if unknown:
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; it has {', '.join(hints)}")
    return kind(**{key: _coerce(value, hints[key], f"{path}.{key}") for key, value in tree.items()})


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_json(text: str) -> Config:
    return _coerce(json.loads(text), Config, "config")


# --- checks -----------------------------------------------------------------------------------------------


def divisors(number: int) -> list[int]:
    """From 1 up to ``number`` itself."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def near_divisors(number: int, size: int) -> str:
    """The two divisors of ``number`` nearest to ``size``, for a message: "4 or 8"."""
    near = sorted(sorted(divisors(number), key=lambda d: abs(d - size))[:2])
    return " or ".join(map(str, near))


def _must_divide(what: str, number: int, axis: str, size: int) -> None:
    if number % size:
        raise ValueError(
            f"{what}={number} does not divide by {axis}={size}; try {axis}={near_divisors(number, size)}"
        )


def _within(what: str, value: float, low: float, high: float, *, low_open=False, high_open=False) -> None:
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(f"{what}={value} lies outside {left}{low}, {high}{right}")


def _one_of(what: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{what}={value!r} is not known; choose one of {', '.join(map(str, allowed))}")


def validate(config: Config) -> None:
    """Raises ValueError, naming both numbers and a way out, where the parts of ``config`` do not fit."""
    _coerce(dataclasses.asdict(config), Config, "config")  # a config file can put anything anywhere
    validate_model(config.model)
    validate_decode(config.decode, standing_by=True)
    model, mesh, train, data = config.model, config.mesh, config.train, config.data
    for axis in ("pipe", "context", "tensor"):
        _within(f"mesh.{axis}", getattr(mesh, axis), 1, 2**20)
    if mesh.data != -1:
        _within("mesh.data", mesh.data, 1, 2**20)
    _one_of("mesh.zero", mesh.zero, (0, 1, 3))
    _must_divide("model.num_attention_heads", model.num_attention_heads, "mesh.tensor", mesh.tensor)
    _must_divide("model.num_query_groups", model.kv_heads, "mesh.tensor", mesh.tensor)
    _must_divide("model.ffn_hidden_size", model.mlp_width, "mesh.tensor", mesh.tensor)
    if model.vocab_size is not None:
        _must_divide("model.vocab_size", model.vocab_size, "mesh.tensor", mesh.tensor)
    _within("mesh.virtual_pipe", mesh.virtual_pipe, 1, 2**20)
    _one_of("mesh.schedule", mesh.schedule, ("circular", "1f1b"))
    _one_of("mesh.context_mode", mesh.context_mode, ("auto", "ulysses", "gather", "ring"))
    if mesh.schedule == "1f1b" and mesh.virtual_pipe > 1:
        raise ValueError(f"mesh.schedule=1f1b passes each stage once, not mesh.virtual_pipe={mesh.virtual_pipe} "
                         "times; set it to 1, or mesh.schedule=circular")
    name = "mesh.pipe x mesh.virtual_pipe" if mesh.virtual_pipe > 1 else "mesh.pipe"
    _must_divide("model.num_layers", model.num_layers, name, mesh.pipe * mesh.virtual_pipe)
    if mesh.flush is not None:
        _within("mesh.flush", mesh.flush, 1, 2**31)
        _must_divide("mesh.flush", mesh.flush, "mesh.pipe", mesh.pipe)
    if mesh.context_mode == "ulysses":
        _must_divide("model.num_query_groups / mesh.tensor", model.kv_heads // mesh.tensor, "mesh.context",
                     mesh.context)
    if mesh.pipe > 1 and train.micro_batch_size is None:
        raise ValueError(f"mesh.pipe={mesh.pipe} needs train.micro_batch_size: a pipeline is fed micro-batches; set it "
                         f"so that each data shard has {mesh.pipe} or more")

    if mesh.pipe > 1 and mesh.schedule == "circular" and mesh.flush is None and train.rampup_batch_size:
        raise ValueError("train.rampup_batch_size with mesh.schedule=circular needs mesh.flush, the micro-batches "
                         f"taken at a time, a multiple of mesh.pipe={mesh.pipe}; without it small batches cost as much "
                         "as the largest. Or set mesh.schedule=1f1b")

    if data.sequence_length is not None:
        _within("data.sequence_length", data.sequence_length, 1, 2**31)
    if model.position_embedding_type == "learned" and config.sequence_length > model.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length={config.sequence_length} is longer than "
            f"model.max_position_embeddings={model.max_position_embeddings}; raise that, shorten the "
            f"sequence, or set model.position_embedding_type=rotary"
        )
    places, name = mesh.context * mesh.tensor, "mesh.context x mesh.tensor"
    if mesh.context > 1 and mesh.tensor % 2:  # two chunks a device
        places, name = 2 * places, "2 x " + name
    _must_divide("data.sequence_length", config.sequence_length, name, places)
    if data.path and data.blend:
        raise ValueError("data.path and data.blend are both set; keep one of them")
    for blend in (data.blend, *(stage.blend for stage in train.stages)):
        for path, weight in blend:
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(
                    f"blend weight {weight} of {path!r} must be above 0; leave the source out instead"
                )
    if not isinstance(data.heldout, str):
        _within("data.heldout", data.heldout, 0, 0.5)
    masking = data.masking
    _within("data.masking.word_share", masking.word_share, 0, 1, low_open=True)
    _within("data.masking.mask_share", masking.mask_share, 0, 1)
    _within("data.masking.random_share", masking.random_share, 0, 1)
    if masking.mask_share + masking.random_share > 1 + 1e-9:
        raise ValueError(
            f"data.masking.mask_share={masking.mask_share} and random_share={masking.random_share} add up to "
            f"more than 1; lower one of them"
        )

    optimizer = config.optimizer
    _within("optimizer.learning_rate", optimizer.learning_rate, 0, math.inf, low_open=True, high_open=True)
    _within("optimizer.min_learning_rate_ratio", optimizer.min_learning_rate_ratio, 0, 1)
    _within("optimizer.warmup_fraction", optimizer.warmup_fraction, 0, 1, high_open=True)
    _within("optimizer.decay_fraction", optimizer.decay_fraction, optimizer.warmup_fraction, math.inf,
            low_open=True, high_open=True)
    _one_of("optimizer.name", optimizer.name, ("adamw", "muon"))
    for key in ("b1", "b2", "muon_momentum"):
        _within(f"optimizer.{key}", getattr(optimizer, key), 0, 1, high_open=True)
    _within("optimizer.eps", optimizer.eps, 0, 1, low_open=True)
    _within("optimizer.weight_decay", optimizer.weight_decay, 0, math.inf, high_open=True)
    _within("optimizer.clip_grad_norm", optimizer.clip_grad_norm, 0, math.inf, high_open=True)

    _within("train.steps", train.steps, 1, 2**31)
    for key in ("global_batch_size", "loss_chunk", "log_every", "max_bad_steps", "keep_last", "eval_batches"):
        _within(f"train.{key}", getattr(train, key), 1, 2**31)
    _within("train.watchdog_seconds", train.watchdog_seconds, 0, math.inf, high_open=True)
    _within("train.phase_seconds", train.phase_seconds, 1, math.inf, high_open=True)
    _within("train.heartbeat_seconds", train.heartbeat_seconds, 1, 2**20)
    if train.device_flops is not None:
        _within("train.device_flops", train.device_flops, 0, math.inf, low_open=True, high_open=True)
    for key in ("eval_every", "save_every", "compare_every"):
        _within(f"train.{key}", getattr(train, key), 0, 2**31)
    _within("train.label_smoothing", train.label_smoothing, 0, 1, high_open=True)
    _within("train.seed", train.seed, 0, 2**31)
    _one_of("train.compute_dtype", train.compute_dtype, ("bfloat16", "float32"))
    _one_of("train.recompute", train.recompute, ("none", "elementwise", "mlp", "projections", "full"))
    _one_of("train.reduce_dtype", train.reduce_dtype, ("float32", "bfloat16"))
    if not train.stages:
        raise ValueError("train.stages is empty; give at least one StageConfig")
    for stage in train.stages:
        name = f"stage {stage.name!r}:"
        _within(f"{name} masked", stage.masked, 0, 1)
        _within(f"{name} fraction", stage.fraction, 0, math.inf, low_open=True, high_open=True)
        _within(f"{name} learning_rate_scale", stage.learning_rate_scale, 0, math.inf, high_open=True)
        _validate_distillation(name, stage, mesh)
    _validate_lora(optimizer, model, train)
    validate_batch(config, 1 if mesh.data == -1 else mesh.data)


def _validate_distillation(name: str, stage: StageConfig, mesh: MeshConfig) -> None:
    _within(f"{name} distill_temperature", stage.distill_temperature, 0, math.inf, low_open=True, high_open=True)
    _within(f"{name} distill_weight", stage.distill_weight, 0, 1)
    for key in ("distill_temperature", "distill_weight"):
        if not stage.distill and getattr(stage, key) != getattr(StageConfig, key):
            raise ValueError(f"{name} {key}={getattr(stage, key)} is for a teacher, and distill names none; set it to "
                             "the folder of a run, or leave this out")
    if stage.distill and mesh.pipe > 1:
        raise ValueError(f"{name} distill={stage.distill} with mesh.pipe={mesh.pipe}: the teacher's layers pass "
                         "through no pipeline; set mesh.pipe=1 and raise mesh.data, mesh.tensor or mesh.zero")


def _validate_lora(optimizer: OptimizerConfig, model: ModelConfig, train: TrainConfig) -> None:
    rank = optimizer.lora_rank
    _within("optimizer.lora_rank", rank, 0, 2**31)
    _within("optimizer.lora_alpha", optimizer.lora_alpha, 0, math.inf, low_open=True, high_open=True)
    query, kv, mlp = model.num_attention_heads * model.head_width, model.kv_heads * model.head_width, model.mlp_width
    widths = {"q": query, "k": kv, "v": kv, "o": query, "in": mlp, "gate": mlp, "out": mlp}
    if model.activation != "swiglu":
        del widths["gate"]
    for target in optimizer.lora_targets:
        _one_of("optimizer.lora_targets", target, tuple(widths))
    if rank == 0:
        for key in ("lora_targets", "lora_alpha"):
            if getattr(optimizer, key) != getattr(OptimizerConfig, key):
                raise ValueError(f"optimizer.{key}={getattr(optimizer, key)} is for low-rank adaptation, and "
                                 "optimizer.lora_rank=0 is none; set that to 8, or leave this out")
        return
    if not optimizer.lora_targets:
        raise ValueError(f"optimizer.lora_rank={rank} with no optimizer.lora_targets would learn nothing; name some of "
                         f"{', '.join(widths)}")
    for target in optimizer.lora_targets:
        narrow = min(model.hidden_size, widths[target])
        if rank > narrow:
            raise ValueError(f"optimizer.lora_rank={rank} is above the rank of matrix {target!r}, "
                             f"{model.hidden_size} x {widths[target]}; set it to {narrow} or less, mostly 4 to 64")
    if optimizer.name != "adamw":
        raise ValueError(f"optimizer.name={optimizer.name} is for whole matrices, and optimizer.lora_rank={rank} "
                         "learns factors; set optimizer.name=adamw")
    if not train.init:
        raise ValueError(f"optimizer.lora_rank={rank} without a start would freeze parameters that know nothing; give "
                         "--init=RUN, or optimizer.lora_rank=0")


def validate_batch(config: Config, data_size: int) -> None:
    """The batch against a data axis of ``data_size``: every batch of the ramp must split evenly."""
    train = config.train
    micro = train.micro_batch_size
    if micro is not None:
        _within("train.micro_batch_size", micro, 1, 2**31)
    unit, name = (micro or 1) * data_size, "train.micro_batch_size x mesh.data" if micro else "mesh.data"
    sizes = {"train.global_batch_size": train.global_batch_size}
    if train.rampup_batch_size:
        start, increment, samples = train.rampup_batch_size
        _within("train.rampup_batch_size start", start, 1, train.global_batch_size)
        _within("train.rampup_batch_size increment", increment, 1, train.global_batch_size)
        _within("train.rampup_batch_size samples", samples, 0, 2**62)
        growth = train.global_batch_size - start
        _must_divide("train.global_batch_size - start", growth, "increment", increment)
        if micro is None:
            raise ValueError(
                "train.rampup_batch_size needs train.micro_batch_size: the ramp adds micro-batches; set it"
            )
        sizes |= {"train.rampup_batch_size start": start, "train.rampup_batch_size increment": increment}
    for what, size in sizes.items():
        if size % unit:
            near = [str(rounds * unit) for rounds in (size // unit, size // unit + 1) if rounds]
            raise ValueError(f"{what}={size} does not divide by {name}={unit}; try {' or '.join(near)}")


def validate_model(model: ModelConfig) -> None:
    for key in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings",
                "vocab_size_divisible_by"):
        _within(f"model.{key}", getattr(model, key), 1, 2**31)
    for key in ("num_query_groups", "kv_channels", "ffn_hidden_size", "vocab_size"):
        if getattr(model, key) is not None:
            _within(f"model.{key}", getattr(model, key), 1, 2**31)
    heads = model.num_attention_heads
    if model.kv_channels is None:
        _must_divide("model.hidden_size", model.hidden_size, "model.num_attention_heads", heads)
    _must_divide("model.num_attention_heads", heads, "model.num_query_groups", model.kv_heads)
    _one_of("model.position_embedding_type", model.position_embedding_type, ("learned", "rotary"))
    if model.position_embedding_type == "rotary" and model.head_width % 2:
        raise ValueError(
            f"rotary positions need an even head width, not {model.head_width}; set model.kv_channels"
        )
    _within("model.rotary_base", model.rotary_base, 0, math.inf, low_open=True, high_open=True)
    _one_of("model.normalization", model.normalization, ("layernorm", "rmsnorm"))
    _one_of("model.attention_impl", model.attention_impl,
            ("auto", "pallas_tpu", "pallas_gpu", "cudnn", "xla_blockwise", "xla"))
    _one_of("model.activation", model.activation, ("gelu", "gelu_exact", "relu", "silu", "swiglu"))
    _within("model.dropout_rate", model.dropout_rate, 0, 1, high_open=True)
    _within("model.norm_epsilon", model.norm_epsilon, 0, 1, low_open=True)
    _within("model.init_method_std", model.init_method_std, 0, 10, low_open=True)


def validate_decode(decode: DecodeConfig, standing_by: bool = False) -> None:
    """Raises ValueError on a setting that is out of range, contradicts another one, or cannot act beside the others;
    with ``standing_by``, for the settings of a run, the last of these may wait until others let them act: ``acting``.
    """
    hints = typing.get_type_hints(DecodeConfig)
    for key, kind in hints.items():
        if typing.get_origin(kind) is tuple:
            _coerce(getattr(decode, key), kind, key)
    _within("max_new_tokens", decode.max_new_tokens, 1, 2**31)
    _within("min_new_tokens", decode.min_new_tokens, 0, decode.max_new_tokens)
    _within("min_length", decode.min_length, 0, 2**31, high_open=True)
    _within("temperature", decode.temperature, 0, math.inf, high_open=True)
    _within("top_k", decode.top_k, 0, 2**31)
    for key in ("top_p", "typical_p"):
        _within(key, getattr(decode, key), 0, 1, low_open=True)
    for key in ("min_p", "epsilon_cutoff", "eta_cutoff"):
        _within(key, getattr(decode, key), 0, 1, high_open=True)
    _within("repetition_penalty", decode.repetition_penalty, 0, math.inf, low_open=True, high_open=True)
    for key in ("presence_penalty", "frequency_penalty", "length_penalty"):
        _within(key, getattr(decode, key), -math.inf, math.inf, low_open=True, high_open=True)
    _within("no_repeat_ngram_size", decode.no_repeat_ngram_size, 0, 2**31)
    _within("num_return_sequences", decode.num_return_sequences, 1, 2**20)
    _within("seed", decode.seed, 0, 2**32, high_open=True)
    _within("prompt_lookup_num_tokens", decode.prompt_lookup_num_tokens, 0, 2**8)
    _within("max_matching_ngram_size", decode.max_matching_ngram_size, 1, 2**5)
    _within("num_assistant_tokens", decode.num_assistant_tokens, 1, 2**8)
    if decode.max_time is not None:
        _within("max_time", decode.max_time, 0, math.inf, low_open=True)
    if "" in decode.stop_strings:
        raise ValueError("a stop string is empty; leave it out")
    for key in ("bad_words_ids", "stop_sequences"):
        if () in getattr(decode, key):
            raise ValueError(f"{key} has a sequence without tokens; leave it out")
    if any(not tokens for tokens, _ in decode.sequence_bias):
        raise ValueError("sequence_bias has a sequence without tokens; leave it out")
    for what, bias in (*decode.logit_bias, *decode.sequence_bias):
        _within(f"the bias of {what}", bias, -math.inf, math.inf, high_open=True)
    for index, _ in decode.forced_tokens:
        _within("forced_tokens, which new token", index, 0, decode.max_new_tokens, high_open=True)
    forced = {decode.forced_bos_token_id, decode.forced_eos_token_id, *(token for _, token in decode.forced_tokens)}
    if both := sorted(forced & set(decode.suppress_tokens)):
        raise ValueError(f"token {both[0]} is both forced and in suppress_tokens; take it out of one of them")
    _within("num_beams", decode.num_beams, 1, 2**10)
    _within("num_beam_groups", decode.num_beam_groups, 1, 2**10)
    _within("diversity_penalty", decode.diversity_penalty, 0, math.inf, high_open=True)
    _one_of("length_penalty_type", decode.length_penalty_type, ("hf", "gnmt"))
    _one_of("early_stopping", decode.early_stopping, (False, True, "never"))
    if standing_by:
        decode = acting(decode)
    _validate_beams(decode)
    _validate_rows(decode)


# What only draws, and what only orders beams.
SAMPLING_LIMITS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAM_ORDER = ("length_penalty", "length_penalty_type", "early_stopping", "num_beam_groups", "diversity_penalty")


def acting(decode: DecodeConfig, kept: Iterable[str] = ()) -> DecodeConfig:
    """``decode`` with the defaults in place of what cannot act, as top_k=50 beside temperature=0; such settings of a
    run, or of a generation_config.json, wait for a temperature. ``kept`` names settings that stay as they are, since
    somebody asked for them: ``validate_decode`` then refuses those that cannot act."""
    idle = set()
    if decode.temperature == 0:
        idle |= {*SAMPLING_LIMITS, "seed"}
        if decode.num_beams == 1:
            idle.add("num_return_sequences")
    if decode.num_beams == 1 or decode.temperature > 0:
        idle |= set(BEAM_ORDER)
    if decode.num_beams > 1:
        idle.add("prompt_lookup_num_tokens")
    if decode.num_beams > 1 or decode.prompt_lookup_num_tokens == 0:
        idle.add("max_matching_ngram_size")
    return dataclasses.replace(decode, **{name: getattr(DecodeConfig, name) for name in idle - set(kept)})


def _validate_rows(decode: DecodeConfig) -> None:
    """What cannot act on rows, or guess for them."""
    if decode.temperature == 0:
        what = "greedy decoding" if decode.num_beams == 1 else "beam search"
        for key in (*SAMPLING_LIMITS, "seed"):
            if getattr(decode, key) != getattr(DecodeConfig, key):
                raise ValueError(f"{key}={getattr(decode, key)} acts on what is drawn, and {what} at temperature=0 "
                                 f"draws nothing; set temperature above 0 to sample, or leave {key} out")
        if decode.num_beams == 1 and decode.num_return_sequences > 1:
            raise ValueError(f"num_return_sequences={decode.num_return_sequences} (--n) at temperature=0 would write "
                             "the same text that many times; set temperature above 0 to sample, or num_beams, or ask "
                             "for 1")
    if decode.prompt_lookup_num_tokens == 0 and decode.max_matching_ngram_size != DecodeConfig.max_matching_ngram_size:
        raise ValueError(f"max_matching_ngram_size={decode.max_matching_ngram_size} is what is looked up to guess "
                         "tokens, and prompt_lookup_num_tokens=0 guesses none; set that to 5, or leave this out")


def _validate_beams(decode: DecodeConfig) -> None:
    beams, groups = decode.num_beams, decode.num_beam_groups
    _must_divide("num_beams", beams, "num_beam_groups", groups)
    if groups > 1 and decode.diversity_penalty == 0:
        raise ValueError(f"num_beam_groups={groups} with diversity_penalty=0 would write the same {groups} times; set "
                         "diversity_penalty above 0, or num_beam_groups=1")
    if groups == 1 and decode.diversity_penalty > 0:
        raise ValueError(f"diversity_penalty={decode.diversity_penalty} acts between groups, and num_beam_groups=1; "
                         "set num_beam_groups to a divisor of num_beams above 1, or diversity_penalty=0")
    off = DecodeConfig
    changed = [f"{key}={getattr(decode, key)}" for key in BEAM_ORDER if getattr(decode, key) != getattr(off, key)]
    if beams == 1:
        if changed:
            raise ValueError(f"{changed[0]} acts on beams alone, and num_beams=1; set num_beams above 1, or "
                             "leave it out")
        return
    if decode.prompt_lookup_num_tokens:
        raise ValueError(f"prompt_lookup_num_tokens={decode.prompt_lookup_num_tokens} guesses how one row goes on, "
                         f"and num_beams={beams} beams go on in several ways; set one of them to its default (0, 1)")
    if decode.num_return_sequences > beams:
        raise ValueError(f"num_return_sequences={decode.num_return_sequences} is above num_beams={beams}; raise "
                         f"num_beams, or ask for at most {beams}")
    if decode.stop_strings:
        raise ValueError(f"stop_strings are not known while num_beams={beams} beams are chosen; give stop_sequences "
                         "(tokens), or num_beams=1")
    limits = [f"{key}={getattr(decode, key)}" for key in SAMPLING_LIMITS if getattr(decode, key) != getattr(off, key)]
    if decode.temperature == 0 and limits:
        raise ValueError(f"{limits[0]} limits what is drawn, and beam search at temperature=0 draws nothing; leave it "
                         "out, or set temperature above 0 for stochastic beams")
    if decode.temperature > 0 and changed:
        raise ValueError(f"{changed[0]} orders the beams of a search, and temperature={decode.temperature} draws them; "
                         "leave it out, or set temperature=0")
