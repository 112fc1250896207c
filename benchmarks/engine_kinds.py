"""Hold one engine for engines.py, and answer each line of standard input, a JSON request.

    python engine_kinds.py ENGINE:TYPE FOLDER THREADS

FOLDER has a GPT-2 in Hugging Face's files, beside which an engine writes its own form. A request is
{"prompts", "new", "beams"}, answered with the new tokens of each row, or {"prompt", "candidates"},
answered with the log-probability of each candidate. It runs in a peer's Python, which needs only
the packages of that engine.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path

from decode import END, VOCABULARY, Ids, as_text


def serve(name: str, folder: str, threads: int) -> None:
    """Answer each line of standard input, a JSON request, with seconds and a result."""
    # What libraries print to standard output goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it may use cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    def attempt(call) -> dict:
        try:
            return call()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:500]}

    kind, _, held = name.partition(":")
    engine = None

    def start() -> dict:
        nonlocal engine
        engine = KINDS[kind](folder, held, threads)
        return {"versions": engine.versions}

    def answer(request: dict) -> dict:
        run = engine.score if "candidates" in request else engine.write
        begin = time.perf_counter()
        result = run(**request)
        return {"seconds": time.perf_counter() - begin, "result": result}

    print(json.dumps(attempt(start)), file=answers, flush=True)
    for line in sys.stdin:
        reply = attempt(functools.partial(answer, json.loads(line)))
        print(json.dumps(reply), file=answers, flush=True)


class Ours:
    def __init__(self, folder: str, held: str, threads: int):
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        from mtnlg_jax.decode.cache import unstack
        from mtnlg_jax.interop.huggingface import read_model

        config, params, _ = read_model(folder)
        options = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"weights": "int8"}}
        self.decoder = unstack(config, params, **options[held])
        self.tokenizer = Ids()
        self.versions = {"jax": jax.__version__}

    def write(self, prompts: list, new: int, beams: int) -> list:
        from mtnlg_jax.config import DecodeConfig
        from mtnlg_jax.decode.generate import generate

        decode = DecodeConfig(max_new_tokens=new, min_new_tokens=new, num_beams=beams)
        rows = generate(self.decoder, self.tokenizer, prompts, decode)
        return [list(row.tokens) for row in rows]

    def score(self, prompt: list, candidates: list) -> list:
        from mtnlg_jax.decode.rank import rank

        texts = [" " + as_text(each) for each in candidates]
        ranking = rank(self.decoder, self.tokenizer, as_text(prompt), texts)
        return [each.sum for each in sorted(ranking, key=lambda each: each.index)]


class Transformers:
    def __init__(self, folder: str, held: str, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        dtype = getattr(torch, held)
        self.model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}

    def write(self, prompts: list, new: int, beams: int) -> list:
        import torch

        given = torch.tensor(prompts)
        with torch.inference_mode():
            rows = self.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                num_beams=beams,
                eos_token_id=END,
                pad_token_id=END,
            )
        return rows[:, given.shape[1] :].tolist()

    def score(self, prompt: list, candidates: list) -> list:
        import torch
        import transformers

        rows = torch.tensor(candidates)
        cache = transformers.DynamicCache(config=self.model.config)
        with torch.inference_mode():
            before = self.model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(len(candidates))
            inside = self.model(rows[:, :-1], past_key_values=cache).logits
            logits = torch.cat([before.logits.expand(len(candidates), -1, -1), inside], 1).float()
            found = logits.log_softmax(-1).gather(-1, rows[..., None])
        return found.sum((1, 2)).tolist()


class CTranslate2:
    def __init__(self, folder: str, held: str, threads: int):
        import types

        import ctranslate2

        names = {str(index): index for index in range(VOCABULARY)}
        end = str(END)
        tokenizer = types.SimpleNamespace(
            get_vocab=lambda: names, bos_token=end, eos_token=end, unk_token=end
        )

        class Converter(ctranslate2.converters.TransformersConverter):
            def load_tokenizer(self, *_, **options):
                return tokenizer

        target = os.path.join(folder, f"ctranslate2_{held}")
        Converter(folder).convert(target, quantization=held)
        self.model = ctranslate2.Generator(
            target, compute_type=held, inter_threads=1, intra_threads=threads
        )
        self.versions = {"ctranslate2": ctranslate2.__version__}

    def write(self, prompts: list, new: int, beams: int) -> list:
        rows = self.model.generate_batch(
            [list(map(str, prompt)) for prompt in prompts],
            max_length=new,
            min_length=new,
            beam_size=beams,
            include_prompt_in_result=False,
        )
        return [row.sequences_ids[0] for row in rows]

    def score(self, prompt: list, candidates: list) -> list:
        rows = [list(map(str, prompt + each)) for each in candidates]
        return [sum(row.log_probs[len(prompt) - 1 :]) for row in self.model.score_batch(rows)]


class LlamaCpp:
    def __init__(self, folder: str, held: str, threads: int):
        import llama_cpp_py_sync
        from llama_cpp_py_sync import _cffi_bindings as bindings

        self.ffi = bindings.get_ffi()
        other = os.environ.get("LLAMA_CPP_LIB")
        self.lib = self.ffi.dlopen(other) if other else bindings.get_lib()
        self.lib.llama_backend_init()
        path = write_gguf(folder, held).encode()
        options = self.lib.llama_model_default_params()
        self.model = self.lib.llama_model_load_from_file(path, options)
        assert self.model != self.ffi.NULL, "llama.cpp does not load the file"
        self.held = held
        self.threads = threads
        self.contexts = {}
        built = self.ffi.string(self.lib.llama_print_system_info()).decode()
        self.versions = {
            "llama_cpp": llama_cpp_py_sync.__llama_cpp_tag__,
            "llama_cpp_built_with": " ".join(built.replace(" = 1", "").replace("|", "").split()),
        }

    def context(self, rows: int, length: int, tokens: int, shared: bool):
        """Return an empty context, and a batch that holds ``tokens``."""
        key = rows, length, tokens, shared
        if key not in self.contexts:
            options = self.lib.llama_context_default_params()
            options.n_ctx = rows * (length + -length % 256)
            options.n_batch = max(tokens, 32)
            options.n_ubatch = 512
            options.n_seq_max = rows
            options.n_threads = self.threads
            options.n_threads_batch = self.threads
            options.kv_unified = shared
            if self.held == "f32":  # an exact cache beside exact weights
                options.type_k = self.lib.GGML_TYPE_F32
                options.type_v = self.lib.GGML_TYPE_F32
            made = self.lib.llama_init_from_model(self.model, options)
            assert made != self.ffi.NULL, "llama.cpp makes no context"
            self.contexts[key] = made, self.lib.llama_batch_init(tokens, 0, 1)
        made, batch = self.contexts[key]
        self.lib.llama_memory_clear(self.lib.llama_get_memory(made), True)
        return made, batch

    def run(self, made, batch, items: list) -> None:
        """Read items of (token, position, row, whether its logits are wanted)."""
        batch.n_tokens = len(items)
        for at, (token, position, row, wanted) in enumerate(items):
            batch.token[at] = token
            batch.pos[at] = position
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = row
            batch.logits[at] = wanted
        assert self.lib.llama_decode(made, batch) == 0

    def logits(self, made, rows: int):
        """Return the wanted logits of the last run, in the order of its items."""
        import numpy as np

        found = self.ffi.buffer(self.lib.llama_get_logits(made), 4 * rows * VOCABULARY)
        return np.frombuffer(found, np.float32).reshape(rows, VOCABULARY)

    def write(self, prompts: list, new: int, beams: int) -> list:
        rows = len(prompts)
        length = len(prompts[0])
        made, batch = self.context(rows, length + new, rows * length, False)
        items = [
            (token, at, row, at == length - 1)
            for row, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        written = [[] for _ in prompts]
        for number in range(new):
            self.run(made, batch, items)
            best = self.logits(made, rows)[:, :END].argmax(1).tolist()
            for row, token in zip(written, best, strict=True):
                row.append(token)
            items = [(token, length + number, row, True) for row, token in enumerate(best)]
        return written

    def score(self, prompt: list, candidates: list) -> list:
        import numpy as np

        rows = len(candidates)
        length = len(prompt)
        new = len(candidates[0])
        made, batch = self.context(rows, length + new, max(length, rows * (new - 1)), True)
        self.run(made, batch, [(token, at, 0, at == length - 1) for at, token in enumerate(prompt)])
        first = log_probabilities(self.logits(made, 1), np.array(candidates)[:, 0])
        for row in range(1, rows):
            self.lib.llama_memory_seq_cp(self.lib.llama_get_memory(made), 0, row, -1, -1)
        items = [
            (token, length + at, row, True)
            for row, candidate in enumerate(candidates)
            for at, token in enumerate(candidate[:-1])
        ]
        self.run(made, batch, items)
        targets = np.array(candidates)[:, 1:].reshape(-1)
        rest = log_probabilities(self.logits(made, len(items)), targets)
        return (first + rest.reshape(rows, new - 1).sum(1)).tolist()


def log_probabilities(logits, targets):
    """Return the log-probability of each target, from logits of its row or of the only one."""
    import numpy as np

    totals = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    rows = np.arange(len(targets)) % len(logits)
    return logits[rows, targets] - totals[rows]


def write_gguf(folder: str, held: str) -> str:
    """Write the model as llama.cpp's own converter and quantizer do, and return the path."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads(Path(folder, "config.json").read_text())
    path = os.path.join(folder, f"{held}.gguf")
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    kind = getattr(gguf.GGMLQuantizationType, held.upper())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    for name, values in load_file(os.path.join(folder, "model.safetensors")).items():
        stem, _, end = name.rpartition(".")
        if stem.endswith(("c_attn", "c_proj", "c_fc")) and end == "weight":
            values = values.T.copy()  # GPT-2 stores inputs first
        matrix = values.ndim == 2 and not stem.endswith("wpe")
        own = kind if matrix else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(values, own)
        writer.add_tensor(f"{names.get_name(stem)}.{end}", stored, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class VLLM:
    def __init__(self, folder: str, held: str, threads: int):
        # All threads compute; by default one is kept for requests.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB, far more than all rows need
        import vllm

        self.model = vllm.LLM(
            folder, dtype=held, skip_tokenizer_init=True, enable_prefix_caching=False
        )
        self.versions = {"vllm": vllm.__version__}

    def write(self, prompts: list, new: int, beams: int) -> list:
        import vllm

        settings = vllm.SamplingParams(
            temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False
        )
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        rows = self.model.generate(given, settings, use_tqdm=False)
        return [list(row.outputs[0].token_ids) for row in rows]


KINDS = {
    "ours": Ours,
    "transformers": Transformers,
    "ctranslate2": CTranslate2,
    "llama_cpp": LlamaCpp,
    "vllm": VLLM,
}

if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
