"""The steps that benchmarks/predicted_step.py compares: model, chips, batch, and settings of both
sides.

A row is SHAPE/ours/SETTING or SHAPE/maxtext/SETTING. ``+NAME`` behind a setting adds the compiler
flags FLAGS[NAME] to those of that side.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from calibration import V5E, V5P_SPARSECORE, V6E, Point

FLAGS = {
    # Gathers over planes of the torus on SparseCore, which MaxText's guide of benchmarks has.
    "planes": "--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true "
    "--xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true",
    # What mtnlg_jax/xla_flags.py adds for data alone on v5p, taken back.
    "no-planes": "--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=false "
    "--xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=false",
    # Larger windows of products. No point of the calibration on v5p or v5e uses it.
    "vmem": "--xla_tpu_scoped_vmem_limit_kib=65536",
}


@dataclass(frozen=True)
class Shape:
    """A model and a batch on a slice. ``ours``, ``maxtext``: the arguments of all settings;
    ``our_settings``, ``their_settings``: name -> the further ones."""

    about: str
    described: str  # the slice by our name
    slice: str  # and by MaxText's: chips x cores
    ours: str
    our_settings: dict[str, str]
    length: int = 2048  # tokens of a sequence
    maxtext: str = ""
    their_settings: dict[str, str] | None = None
    their_flags: str = V5P_SPARSECORE

    def point(self, setting: str) -> Point:
        name, *added = setting.split("+")
        assert self.their_settings is not None
        arguments = f"{self.maxtext} {self.their_settings[name]}"
        flags = " ".join([self.their_flags, *(FLAGS[each] for each in added)])
        return Point(self.slice, self.described, arguments, flags, "", 1, length=self.length)


def _ours(
    data: int, micro: int, recompute: str, tensor: int = 1, context: int = 1, rest: str = ""
) -> str:
    axes = f"--set=mesh.data={data}"
    axes += f" --set=mesh.tensor={tensor}" if tensor > 1 else ""
    axes += f" --set=mesh.context={context}" if context > 1 else ""
    return (
        f"{axes} --set=train.micro_batch_size={micro} --set=train.recompute={recompute} {rest}"
    ).strip()


def _theirs(fsdp: int, policy: str, tensor: int = 1, rest: str = "") -> str:
    return (
        f"remat_policy={policy} ici_fsdp_parallelism={fsdp} ici_tensor_parallelism={tensor} {rest}"
    ).strip()


# MaxText sums gradients of bfloat16 weights in bfloat16.
_SUMS = "--set=train.reduce_dtype=bfloat16"
_OVERLAP = "--set=mesh.tp_comm_overlap=True"
_LLAMA = (
    "--config=configs/ladder.py:7.5b --set=mesh.pipe=1 --set=mesh.zero=3 --set=mesh.tensor=1 "
    "--set=model.add_bias=False --set=model.position_embedding_type=rotary "
    "--set=model.normalization=rmsnorm --set=model.activation=swiglu "
    "--set=model.tie_embeddings=False --set=model.vocab_size=32000"
)
_LADDER = "--config=configs/ladder.py:7.5b --set=mesh.pipe=1 --set=mesh.zero=3 --set=mesh.tensor=1"
_THEIR_LADDER = (
    "model_name=gpt3-175b override_model_config=true opt_type=adamw base_emb_dim=4096 "
    "base_num_query_heads=32 base_num_kv_heads=32 base_mlp_dim=16384 base_num_decoder_layers=36 "
    "vocab_size=51200 trainable_position_size=2048"
)
_LLAMA_70B = (
    f"{_LLAMA} --set=model.num_layers=80 --set=model.hidden_size=8192 "
    "--set=model.num_attention_heads=64 --set=model.num_query_groups=8 "
    "--set=model.ffn_hidden_size=28672 --set=model.max_position_embeddings=4096"
)
_SPLIT = "allow_split_physical_axes=true"
_BLOCKS = (
    "sa_block_q=2048 sa_block_kv=2048 sa_block_kv_compute=2048 sa_block_q_dkv=2048 "
    "sa_block_kv_dkv=2048 sa_block_kv_dkv_compute=2048 sa_use_fused_bwd_kernel=true"
)
_ULYSSES = (
    "context_parallel_strategy=ulysses context_parallel_load_balance=false use_tokamax_splash=true"
)
_OFFLOAD = (
    f"decoder_layer_input=offload query_proj=offload key_proj=offload value_proj=offload {_BLOCKS}"
)

SHAPES = {
    "32b-v5p": Shape(
        "32 billion parameters, of the shape of MaxText's 32b.sh: 384 sequences of 2,048",
        "v5p:4x4x4",
        "v5p-128",
        f"{_LLAMA} --set=model.num_layers=32 --set=model.hidden_size=8192 "
        "--set=model.num_attention_heads=64 --set=model.ffn_hidden_size=28672 "
        "--set=train.global_batch_size=384",
        {
            "data16": _ours(16, 12, "elementwise", tensor=4),
            "data16-none": _ours(16, 12, "none", tensor=4),
            "data64": _ours(64, 3, "elementwise"),
            "data64+no-planes": "",
            "data64-none": _ours(64, 3, "none"),
            "data64-none+no-planes": "",
            "data16-overlap": _ours(16, 12, "elementwise", tensor=4, rest=_OVERLAP),
        },
        2048,
        "per_device_batch_size=6 global_parameter_scale=32",
        {
            "fsdp16": _theirs(16, "minimal", 4),  # 32b.sh
            "fsdp64": _theirs(64, "minimal"),
            "fsdp64-full": _theirs(64, "full"),
            "fsdp64-qkv": _theirs(64, "save_qkv_proj"),
            "fsdp16-full": _theirs(16, "full", 4),
            "fsdp16-qkv": _theirs(16, "save_qkv_proj", 4),
            "fsdp16+planes": "",
            "fsdp64+planes": "",
        },
    ),
    "7.5b-v5p": Shape(
        "the ladder's row of 7.5 billion parameters: 512 sequences of 2,048",
        "v5p:4x4x4",
        "v5p-128",
        _LADDER,
        {
            "data64": _ours(64, 8, "elementwise"),
            "data64-none": _ours(64, 8, "none"),
            "data64-micro4": _ours(64, 4, "elementwise"),
            "data64-zero1": _ours(64, 2, "elementwise", rest="--set=mesh.zero=1"),
            "data16-overlap": _ours(16, 16, "elementwise", tensor=4, rest=_OVERLAP),
            "data64+no-planes": "",
        },
        2048,
        f"per_device_batch_size=8 {_THEIR_LADDER}",
        {
            "fsdp64": _theirs(64, "minimal"),
            "fsdp64-context": _theirs(64, "minimal_with_context"),
            "fsdp64-qkv": _theirs(64, "save_qkv_proj"),
            "fsdp64-full": _theirs(64, "full"),
            "fsdp16": _theirs(16, "minimal", 4),
            "fsdp64+planes": "",
        },
    ),
    "7.5b-v5e": Shape(
        "the ladder's row of 7.5 billion parameters: 512 sequences of 2,048",
        "v5e:16x16",
        "v5e-256",
        _LADDER,
        {
            "data256-full": _ours(256, 2, "full"),
            "data256-full-bfloat16": _ours(256, 2, "full", rest=_SUMS),
            "data256-projections-bfloat16": _ours(256, 2, "projections", rest=_SUMS),
            "data256-mlp-bfloat16": _ours(256, 2, "mlp", rest=_SUMS),
            "data256-elementwise-bfloat16": _ours(256, 2, "elementwise", rest=_SUMS),
            "data64-overlap": _ours(64, 8, "full", tensor=4, rest=_OVERLAP),
        },
        2048,
        f"per_device_batch_size=2 {_THEIR_LADDER}",
        {
            "fsdp256-full": _theirs(256, "full"),
            "fsdp256-qkv": _theirs(256, "save_qkv_proj"),
            "fsdp256": _theirs(256, "minimal"),
            "fsdp256-out": _theirs(256, "save_out_proj"),
            "fsdp256-offloaded": _theirs(256, "qkv_proj_offloaded"),
            "fsdp16": _theirs(16, "full", 16),
        },
        V5E,
    ),
    "70b-v5p": Shape(
        "70 billion parameters, of the shape of Llama 2: 2,048 sequences of 4,096",
        "v5p:8x8x8",
        "v5p-1024",
        f"{_LLAMA_70B} --set=train.global_batch_size=2048",
        {
            "data512": _ours(512, 4, "elementwise"),
            "data512-none": _ours(512, 4, "none"),
            "data512-mlp": _ours(512, 4, "mlp"),
            "data512-micro2": _ours(512, 2, "elementwise"),
            "data512-micro2-mlp": _ours(512, 2, "mlp"),
            "data512-projections": _ours(512, 4, "projections"),
            "data512-micro2+no-planes": "",
            "data128-overlap": _ours(128, 16, "mlp", tensor=4, rest=_OVERLAP),
            "data64-overlap": _ours(64, 16, "elementwise", tensor=8, rest=_OVERLAP),
            "data512-mlp+no-planes": "",
        },
        4096,
        "per_device_batch_size=4 model_name=llama2-70b",
        {
            "fsdp512-mlpwi": _theirs(512, "save_dot_except_mlpwi"),  # llama2_70b.sh
            "fsdp512": _theirs(512, "minimal"),
            "fsdp512-qkv": _theirs(512, "save_qkv_proj"),
            "fsdp512-full": _theirs(512, "full"),
            "fsdp128-mlpwi": _theirs(128, "save_dot_except_mlpwi", 4, _SPLIT),
            "fsdp64": _theirs(64, "minimal", 8),
            "fsdp512-mlpwi+planes": "",
        },
    ),
    "70b-v6e": Shape(
        "70 billion parameters, of the shape of Llama 2: 1,024 sequences of 4,096",
        "v6e:16x16",
        "v6e-256",
        f"{_LLAMA_70B} --set=train.global_batch_size=1024",
        {
            "data256-full": _ours(256, 4, "full"),
            "data256-micro2": _ours(256, 2, "full"),
            "data256-projections": _ours(256, 1, "projections"),
            "data256-full-bfloat16": _ours(256, 4, "full", rest=_SUMS),
            "data64-full": _ours(64, 8, "full", tensor=4),
            "data64-overlap": _ours(64, 8, "full", tensor=4, rest=_OVERLAP),
        },
        4096,
        "per_device_batch_size=4 model_name=llama2-70b",
        {
            "fsdp256-full": _theirs(256, "full"),
            "fsdp256-offload": _theirs(256, "custom", 1, _OFFLOAD),
            "fsdp256-qkv": _theirs(256, "save_qkv_proj"),
            "fsdp256-offloaded": _theirs(256, "qkv_proj_offloaded"),
            "fsdp64-full": _theirs(64, "full", 4, _SPLIT),
            "fsdp16-full": _theirs(16, "full", 16),
        },
        V6E,
    ),
    "175b-v5p": Shape(
        "GPT-3, 175 billion parameters: 2,048 sequences of 2,048",
        "v5p:8x8x16",
        "v5p-2048",
        "--config=configs/ladder.py:145.6b --set=mesh.pipe=1 --set=mesh.zero=3 "
        "--set=mesh.tensor=1 --set=model.num_layers=96 --set=model.vocab_size=50304 "
        "--set=train.global_batch_size=2048",
        {
            "data128": _ours(128, 16, "elementwise", tensor=8),
            "data128-micro8": _ours(128, 8, "elementwise", tensor=8),
            "data128-micro8-overlap": _ours(128, 8, "elementwise", tensor=8, rest=_OVERLAP),
            "data128-mlp": _ours(128, 16, "mlp", tensor=8),
            "data256-micro4": _ours(256, 4, "elementwise", tensor=4),
            "data512-micro2": _ours(512, 2, "elementwise", tensor=2),
            "data1024-mlp": _ours(1024, 2, "mlp"),
        },
        2048,
        "per_device_batch_size=2 model_name=gpt3-175b opt_type=adamw "
        "override_model_config=true trainable_position_size=2048",
        {
            "fsdp128": _theirs(128, "minimal", 8),
            "fsdp128-qkv": _theirs(128, "save_qkv_proj", 8),
            "fsdp128-full": _theirs(128, "full", 8),
            "fsdp256": _theirs(256, "minimal", 4, _SPLIT),
            "fsdp1024": _theirs(1024, "minimal"),
            "fsdp1024-full": _theirs(1024, "full"),
            "fsdp128+planes": "",
        },
    ),
    "7b-131k": Shape(
        "7 billion parameters, of the shape of Llama 2: 16 sequences of 131,072",
        "v5p:4x4x4",
        "v5p-128",
        f"{_LLAMA} --set=model.num_layers=32 --set=model.ffn_hidden_size=11008 "
        "--set=model.max_position_embeddings=131072 --set=train.global_batch_size=16",
        {
            "ulysses-full": _ours(8, 2, "full", context=8),
            "ulysses-mlp": _ours(8, 1, "mlp", context=8),
            "ulysses": _ours(8, 1, "elementwise", context=8),
            "gather": _ours(8, 1, "mlp", context=8, rest="--set=mesh.context_mode=gather"),
            "ring": _ours(8, 1, "mlp", context=8, rest="--set=mesh.context_mode=ring"),
            "ulysses-none": _ours(8, 1, "none", context=8),
        },
        131072,
        "per_device_batch_size=0.25 model_name=llama2-7b ici_context_parallelism=8 " + _SPLIT,
        {
            "gather-full": _theirs(8, "full"),
            "gather": _theirs(8, "minimal"),
            "gather-context": _theirs(8, "minimal_with_context"),
            "gather-qkv": _theirs(8, "save_qkv_proj"),
            "gather-blocks": _theirs(8, "full", 1, _BLOCKS),
            "ulysses-full": _theirs(8, "full", 1, _ULYSSES),
        },
    ),
    "mtnlg": Shape(
        "MT-NLG, 530 billion parameters: the paper's 1,920 sequences of 2,048",
        "v5p:8x8x16",
        "v5p-2048",
        "--config=configs/mtnlg_530b.py --set=mesh.pipe=1 --set=mesh.zero=3 "
        "--set=train.rampup_batch_size=none",
        {
            "micro1": "--set=mesh.data=128",
            "micro5": "--set=mesh.data=128 --set=train.micro_batch_size=5",
            "micro5-overlap": "--set=mesh.data=128 --set=train.micro_batch_size=5 " + _OVERLAP,
        },
    ),
}


# Shape -> MFU to reach.
GOALS = {
    "32b-v5p": 0.74,
    "7.5b-v5p": 0.65,
    "7.5b-v5e": 0.65,
    "70b-v5p": 0.65,
    "70b-v6e": 0.65,
    "175b-v5p": 0.68,
    "mtnlg": 0.68,
    "7b-131k": 0.50,
}


def rows() -> Iterator[str]:
    """Yield the names of all rows."""
    for name, shape in SHAPES.items():
        for setting in shape.our_settings:
            yield f"{name}/ours/{setting}"
        for setting in shape.their_settings or {}:
            yield f"{name}/maxtext/{setting}"
