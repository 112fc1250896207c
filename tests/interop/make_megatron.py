"""Write the fixtures of Megatron-LM's formats, in a Python that has megatron-core and torch.

    PYTHON tests/interop/make_megatron.py FOLDER

Each case is one GPTModel of megatron-core (local layers, float32) with random weights. Its logits
are computed in one process. The folders are written by megatron-core itself: `dist`, `experts`,
`singles` and `balanced` by dist_checkpointing, the others by processes that load that checkpoint,
each its own part.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

VOCABULARY = 59  # padded to 64
PADDED = 64
TOKENS = 24

# Arguments as megatron/training/arguments.py names them: those of all cases.
COMMON = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "kv_channels": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "padded_vocab_size": PADDED,
    "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 32,
    "group_query_attention": False,
    "num_query_groups": 1,
    "norm_epsilon": 1e-5,
    "apply_layernorm_1p": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "add_position_embedding": True,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "bias_gelu_fusion": True,
    "bias_swiglu_fusion": True,
    "swiglu": False,
    "squared_relu": False,
    "quick_geglu": False,
    "openai_gelu": False,
    "onnx_safe": None,
    "normalization": "LayerNorm",
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "position_embedding_type": "learned_absolute",
    "use_rotary_position_embeddings": False,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "no_rope_freq": None,
    "softmax_type": "vanilla",
    "window_size": None,
    "window_attn_skip_freq": None,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "untie_embeddings_and_output_weights": False,
    "apply_residual_connection_post_layernorm": False,
    "apply_query_key_layer_scaling": False,
    "attention_softmax_in_fp32": True,
    "masked_softmax_fusion": True,
    "apply_rope_fusion": True,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "init_method_std": 0.02,
    "multi_latent_attention": False,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "rotary_scaling_factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "mtp_num_layers": None,
    "mtp_loss_scaling_factor": 0.1,
    "num_experts": None,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_overlap": False,
    "moe_grouped_gemm": False,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_dtype": None,
    "moe_router_score_function": "softmax",
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_bias_update_rate": 1e-3,
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_input_jitter_eps": None,
    "moe_token_dispatcher_type": "allgather",
    "moe_deepep_num_sms": 20,
    "moe_expert_capacity_factor": None,
    "moe_token_drop_policy": "probs",
    "moe_upcycling_granularity": 1,
    "dino_head_hidden_size": 2048,
    "retro_attention_gate": 1,
    "mamba_head_dim": 64,
    "is_hybrid_model": False,
    "transformer_impl": "local",
    "mlp_chunks_for_prefill": 1,
    "loss_scale": None,
    "initial_loss_scale": 4294967296,
    "lr": 1e-4,
    "bert_binary_head": True,
    "tokenizer_type": "GPT2BPETokenizer",
    "tokenizer_model": None,
    "vocab_file": "gpt2-vocab.json",
    "merge_file": "gpt2-merges.txt",
    "bf16": False,
    "fp16": False,
    "use_legacy_models": False,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
}
GROUPED = {"group_query_attention": True, "num_query_groups": 2}
LLAMA = GROUPED | {
    "swiglu": True,
    "add_bias_linear": False,
    "bias_gelu_fusion": False,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
}
# Arguments that differ; layout as (tensor, pipeline, chunks of a stage, experts).
CASES = {
    "dist": {
        "args": LLAMA
        | {"num_layers": 3, "ffn_hidden_size": 24, "qk_layernorm": True, "rotary_percent": 0.5}
        | {"use_rope_scaling": True, "norm_epsilon": 1e-6},
        "layout": None,
    },
    "ranks": {"args": {"num_layers": 4, "ffn_hidden_size": 64}, "layout": (2, 2, 1, 1)},
    "chunks": {
        "args": LLAMA
        | {"num_layers": 4, "ffn_hidden_size": 24, "add_qkv_bias": True, "kv_channels": 6}
        | {"rotary_interleaved": True, "rotary_base": 500},
        "layout": (2, 2, 2, 1),
        "dtype": "bfloat16",
    },
    "experts": {
        "args": LLAMA
        | {"num_layers": 2, "ffn_hidden_size": 24, "num_experts": 4, "moe_ffn_hidden_size": 8}
        | {"moe_shared_expert_intermediate_size": 12, "moe_aux_loss_coeff": 0.01},
        "layout": None,
    },
    "singles": {
        "args": LLAMA
        | {"num_layers": 2, "ffn_hidden_size": 24, "num_experts": 2, "moe_ffn_hidden_size": 8},
        "layout": None,
        # Each layer, expert, gate and rest of a product as a tensor of its own.
        "metadata": {"singleton_local_shards": True},
    },
    "expert_ranks": {
        "args": LLAMA
        | {"num_layers": 2, "ffn_hidden_size": 24, "num_experts": 4, "moe_ffn_hidden_size": 8}
        | {"moe_router_pre_softmax": True},
        "layout": (1, 1, 1, 2),
    },
    "balanced": {
        "args": LLAMA
        | {"num_layers": 2, "ffn_hidden_size": 24, "num_experts": 4, "moe_ffn_hidden_size": 8}
        | {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 1.5}
        | {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 2e-3},
        "layout": None,
    },
}


def start(rank: int, world: int, port: int, layout: tuple) -> None:
    """Start megatron-core on the CPU: its calls of CUDA are replaced."""
    warnings.simplefilter("ignore")
    import torch

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as streams
    from megatron.core.transformer.moe import moe_utils

    streams.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    moe_utils.te_general_gemm = None
    tensor, pipe, chunks, experts = layout
    parallel_state.initialize_model_parallel(
        tensor,
        pipe,
        chunks if chunks > 1 else None,
        expert_model_parallel_size=experts,
    )


def arguments(case: str) -> dict:
    return COMMON | CASES[case]["args"]


def build(args: dict, layout: tuple) -> list:
    """Return the chunks of this rank's GPTModel, as pretrain_gpt.py builds them from args."""
    import torch
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    tensor, pipe, chunks, experts = layout
    same = (
        *("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size"),
        *("normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm"),
        *("rotary_interleaved", "hidden_dropout", "attention_dropout", "moe_ffn_hidden_size"),
        *("moe_shared_expert_intermediate_size", "moe_router_topk", "moe_router_pre_softmax"),
        *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "init_method_std"),
        *("moe_router_score_function", "moe_router_topk_scaling_factor"),
        *("moe_router_enable_expert_bias", "moe_router_bias_update_rate"),
    )
    config = TransformerConfig(
        **{name: args[name] for name in same},
        num_query_groups=args["num_query_groups"] if args["group_query_attention"] else None,
        layernorm_epsilon=args["norm_epsilon"],
        layernorm_zero_centered_gamma=args["apply_layernorm_1p"],
        num_moe_experts=args["num_experts"],
        gated_linear_unit=args["swiglu"],
        activation_func=F.silu if args["swiglu"] else F.gelu,
        bias_activation_fusion=args["bias_swiglu_fusion" if args["swiglu"] else "bias_gelu_fusion"],
        use_cpu_initialization=True,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipe,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        expert_model_parallel_size=experts,
        pipeline_dtype=torch.float32,
    )
    spec = get_gpt_layer_local_spec(
        args["num_experts"],
        qk_layernorm=args["qk_layernorm"],
        normalization=args["normalization"],
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return [
        GPTModel(
            config,
            spec,
            args["padded_vocab_size"],
            args["max_position_embeddings"],
            pre_process=stage == 0 and chunk == 0,
            post_process=stage == pipe - 1 and chunk == chunks - 1,
            share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
            position_embedding_type=args["position_embedding_type"],
            rotary_percent=args["rotary_percent"],
            rotary_base=args["rotary_base"],
            rope_scaling=args["use_rope_scaling"],
            rope_scaling_factor=args["rope_scaling_factor"],
            parallel_output=False,
            vp_stage=chunk if chunks > 1 else None,
        )
        for chunk in range(chunks)
    ]


def namespace(args: dict, layout: tuple, dtype: str) -> argparse.Namespace:
    """Return args as they are saved, with values that only classes of Megatron's can hold."""
    import torch
    from megatron.core.transformer.enums import AttnBackend

    tensor, pipe, chunks, experts = layout
    return argparse.Namespace(
        **args
        | {
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipe,
            "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
            "expert_model_parallel_size": experts,
            "params_dtype": getattr(torch, dtype),
            "attention_backend": AttnBackend.auto,
        }
    )


def whole(case: str, folder: str, source: str, port: int) -> None:
    """Write the checkpoint of one process, and what its model computes."""
    alone = (1, 1, 1, 1)
    start(0, 1, port, alone)
    import numpy as np
    import torch
    from megatron.core import dist_checkpointing

    args = arguments(case)
    dtype = CASES[case].get("dtype", "float32")
    torch.manual_seed(len(case))
    (model,) = build(args, alone)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            plus = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            plus -= args["apply_layernorm_1p"] * plus
            drawn = plus + scale * torch.randn(parameter.shape)
            parameter.copy_(drawn.to(getattr(torch, dtype)).float())
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.5 * torch.randn(buffer.shape))
    model.eval()
    tokens = torch.randint(0, VOCABULARY, (2, TOKENS))
    places = torch.arange(TOKENS).expand(2, TOKENS)
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model(tokens, places, mask)[..., :VOCABULARY]
    np.savez_compressed(
        Path(folder, f"{case}.npz"),
        tokens=tokens.numpy().astype(np.uint8),
        logits=logits.numpy(),
    )
    state = model.sharded_state_dict(metadata=CASES[case].get("metadata"))
    state |= {
        "args": namespace(args, alone, dtype),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "num_floating_point_operations_so_far": 0,
    }
    os.makedirs(source)
    dist_checkpointing.save(state, source)
    torch.distributed.destroy_process_group()


def part(rank: int, case: str, folder: str, source: str, port: int) -> None:
    """Load this rank's part and write it as Megatron-LM's format `torch` does."""
    layout = CASES[case]["layout"]
    tensor, pipe, chunks, experts = layout
    start(rank, tensor * pipe * experts, port, layout)
    import numpy
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    args = arguments(case)
    dtype = CASES[case].get("dtype", "float32")
    models = build(args, layout)
    wanted = {}
    for number, model in enumerate(models):
        wanted[f"model{number}"] = model.sharded_state_dict()
    found = dist_checkpointing.load(wanted, source)
    state = {"args": namespace(args, layout, dtype), "checkpoint_version": 3.0, "iteration": 7}
    for number, model in enumerate(models):
        model.load_state_dict(found[f"model{number}"], strict=False)
        name = "model" if chunks == 1 else f"model{number}"
        state[name] = model.to(getattr(torch, dtype)).state_dict_for_save_checkpoint()
    if rank == 0:
        generators = {
            "random_rng_state": random.getstate(),
            "np_rng_state": numpy.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {},
        }
        state["rng_state"] = [generators]
        state["optimizer"] = {"param_groups": [{"lr": 1e-4}], "state": {}}
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if pipe > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if experts > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    path = Path(folder, case, "iter_0000007", name, "model_optim_rng.pt")
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    torch.distributed.destroy_process_group()


def main(folder: str) -> None:
    import torch.multiprocessing as processes

    port = 20000 + os.getpid() % 20000
    made = []
    for number, (case, how) in enumerate(CASES.items()):
        if len(sys.argv) > 2 and case not in sys.argv[2:]:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            source = os.path.join(temporary, "iter_0000007")
            processes.spawn(_whole, (case, folder, source, port + 2 * number))
            shutil.rmtree(Path(folder, case), ignore_errors=True)
            if how["layout"] is None:
                shutil.copytree(source, Path(folder, case, "iter_0000007"))
            else:
                tensor, pipe, _, experts = how["layout"]
                ranks = tensor * pipe * experts
                processes.spawn(part, (case, folder, source, port + 2 * number + 1), nprocs=ranks)
        Path(folder, case, "latest_checkpointed_iteration.txt").write_text("7")
        made.append(case)
    print(json.dumps(made))


def _whole(rank: int, *arguments) -> None:
    whole(*arguments)


if __name__ == "__main__":
    main(sys.argv[1])
