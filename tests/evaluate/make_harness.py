"""Ask the harness's own class `hf` about two tiny random models, for fixtures/harness.json.

    PEER_PYTHON tests/evaluate/make_harness.py [--output=FILE] [--shared=FOLDER]

needs torch, transformers and lm-eval. The models and requests below need none of them: the tests
make the same ones. With --shared, also about real weights and rows of real tasks.
"""

import argparse
import json
import runpy
from pathlib import Path

import numpy as np

WIDTH = 32
LAYERS = 2
HEADS = 4
CONTEXT = 64
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ a", "i n", "Ġ s", "a t", "o n", "Ġc at", "Ġ c", "e r"]
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ bos_token }}<<{{ m['content'] }}>>"
    "{% else %}{% if loop.first %}{{ bos_token }}{% endif %}[{{ m['role'] }}] {{ m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
LONG = "the cat sat on a mat and then it ran after another cat in the street; " * 3
# (context, continuation)
PAIRS = [
    ("the cat sat on", " the mat"),
    ("the cat sat on", " a mat"),
    ("the cat sat on", " the mat"),
    ("the cat sat on", " the"),
    ("the cat sat on ", "the mat"),
    ("the cat   ", "sat"),
    ("then\n\n", "he sat"),
    ("then\n", "\nhe sat"),
    ("in the", "re"),
    ("", "the cat"),
    ("", " <s>the cat"),
    ("<s>the cat", " sat"),
    ("<|endoftext|>the cat", " sat"),
    ("the </s> cat", " s</s>at"),
    ("naïve 天地", " 玄 cat 🙂"),
    (LONG, " the end"),
    (LONG, " the mat in the street, " * 2),
    ("the cat", LONG[:55]),
    ("the cat sat on the", " cat"),
    ("the cat sat on the", " c"),
    ("Q: a\nA:", " at"),
    ("Q: a\nA:", " on"),
]
TEXTS = ["the cat", "a", LONG, LONG * 2, "", "天地玄黄 in the street", "<s>the cat"]
STOPS = {"until": ["\n", "er"], "max_gen_toks": 12}
# (context, settings)
PROMPTS = [
    ("the cat sat on", STOPS),
    ("a cat", STOPS),
    (LONG, STOPS),
    ("in the street", {"until": "a", "max_gen_toks": 20, "do_sample": False, "temperature": 0.7}),
    ("then he", {"until": [], "max_new_tokens": 6}),
]
STORIES = "data/weights/stories260K_llama"
ROWS = 12  # of each real task
STORY_PROMPTS = [
    ("Once upon a time, there was a", {"until": ["\n", "."], "max_gen_toks": 40}),
    ("Lily and Ben went to the", {"until": ["."], "max_gen_toks": 40}),
    ("One day, a girl named Lily", {"until": ["Q:"], "max_gen_toks": 100}),
    ("The dog said,", {"until": [".", "!"], "max_gen_toks": 30}),
]
STORY_TEXTS = ["Once upon a time there was a dog.", "One day, Lily went to the park. " * 60]
CONVERSATIONS = [
    ([{"role": "user", "content": "the cat?"}], True),
    ([{"role": "system", "content": "be a cat"}, {"role": "user", "content": " hi "}], True),
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the"}], False),
]


def letters() -> list[str]:
    """Return the characters by which GPT-2's tokenizer spells the bytes 0 to 255."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [each for each in range(256) if each not in shown]
    names = {each: chr(each) for each in shown}
    names |= {each: chr(256 + number) for number, each in enumerate(hidden)}
    return [names[each] for each in range(256)]


def tokenizer(kind: str) -> tuple[dict, dict]:
    """Return tokenizer.json and tokenizer_config.json: bytes, a few merges, special tokens."""
    begin, end = ("<|endoftext|>",) * 2 if kind == "gpt2" else ("<s>", "</s>")
    names = [*letters(), *("".join(each.split()) for each in MERGES)]
    special = dict.fromkeys([begin, end])
    vocabulary = {name: number for number, name in enumerate([*names, *special])}
    added = [
        {
            "id": vocabulary[name],
            "content": name,
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for name in special
    ]
    bytes_ = {"add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    first = {"SpecialToken": {"id": begin, "type_id": 0}}
    one, two = ({"Sequence": {"id": each, "type_id": 0}} for each in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, two],
        "special_tokens": {begin: {"id": begin, "ids": [vocabulary[begin]], "tokens": [begin]}},
    }
    whole = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", **bytes_},
        "decoder": {"type": "ByteLevel", **bytes_},
        "post_processor": template if kind == "llama" else {"type": "ByteLevel", **bytes_},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": MERGES},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "model_max_length": CONTEXT,
    }
    return whole, settings | ({"chat_template": CHAT} if kind == "llama" else {})


def shapes(kind: str, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by its name in transformers."""
    found: dict[str, tuple[int, ...]] = {}
    if kind == "gpt2":
        found |= {"wte.weight": (vocabulary, WIDTH), "wpe.weight": (CONTEXT, WIDTH)}
        for layer in range(LAYERS):
            for name, inputs, outputs in (
                ("attn.c_attn", WIDTH, 3 * WIDTH),
                ("attn.c_proj", WIDTH, WIDTH),
                ("mlp.c_fc", WIDTH, 4 * WIDTH),
                ("mlp.c_proj", 4 * WIDTH, WIDTH),
            ):
                found[f"h.{layer}.{name}.weight"] = (inputs, outputs)
                found[f"h.{layer}.{name}.bias"] = (outputs,)
            for name in ("ln_1", "ln_2"):
                found |= {f"h.{layer}.{name}.{each}": (WIDTH,) for each in ("weight", "bias")}
        found |= {f"ln_f.{each}": (WIDTH,) for each in ("weight", "bias")}
        return {f"transformer.{name}": shape for name, shape in found.items()}
    found |= {"model.embed_tokens.weight": (vocabulary, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        for name, outputs, inputs in (
            ("self_attn.q_proj", WIDTH, WIDTH),
            ("self_attn.k_proj", WIDTH // 2, WIDTH),
            ("self_attn.v_proj", WIDTH // 2, WIDTH),
            ("self_attn.o_proj", WIDTH, WIDTH),
            ("mlp.gate_proj", 2 * WIDTH, WIDTH),
            ("mlp.up_proj", 2 * WIDTH, WIDTH),
            ("mlp.down_proj", WIDTH, 2 * WIDTH),
        ):
            found[f"model.layers.{layer}.{name}.weight"] = (outputs, inputs)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = (WIDTH,)
    return found | {"lm_head.weight": (vocabulary, WIDTH)}


def write_model(kind: str, folder: Path) -> Path:
    """Write a random model of ``kind`` ("gpt2" or "llama") as a folder of transformers."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    whole, settings = tokenizer(kind)
    vocabulary = len(whole["model"]["vocab"])
    config = {"vocab_size": vocabulary, "torch_dtype": "float32"}
    config |= {"bos_token_id": vocabulary - 1, "eos_token_id": vocabulary - 1}
    if kind == "gpt2":
        config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        config |= {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_positions": CONTEXT}
    else:
        config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        config |= {
            "num_hidden_layers": LAYERS,
            "hidden_size": WIDTH,
            "bos_token_id": vocabulary - 2,
        }
        config |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2}
        config |= {"intermediate_size": 2 * WIDTH, "max_position_embeddings": CONTEXT}
        config |= {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}
    rng = np.random.default_rng(7)
    params = {
        # Large, so that the tokens are far from equally likely.
        name: rng.normal("ln" in name or "norm" in name, 0.3, shape).astype(np.float32)
        for name, shape in shapes(kind, vocabulary).items()
    }
    # Bytes that are no character by themselves are not the most likely, nor is <bos>, which
    # `generate` never writes.
    never = [*range(32), *range(127, 256)]
    if kind == "gpt2":
        params["transformer.wte.weight"][never] = 0
    else:
        params["lm_head.weight"][[*never, config["bos_token_id"]]] = 0
    save_file(params, folder / "model.safetensors", {"format": "pt"})
    for name, content in (
        ("config.json", config),
        ("tokenizer.json", whole),
        ("tokenizer_config.json", settings),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False))
    return folder


def instances(kind: str, arguments: list) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def answers(model, chat: bool) -> dict:
    """Return what a class of the harness answers to all requests."""
    pairs = model.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    rolling = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    until = instances("generate_until", PROMPTS)
    texts = model.generate_until(until, disable_tqdm=True)
    written = [(context, text) for (context, _), text in zip(PROMPTS, texts, strict=True) if text]
    again = model.loglikelihood(instances("loglikelihood", written), disable_tqdm=True)
    found = {
        "written": [[value, bool(greedy)] for value, greedy in again],
        "loglikelihood": [[value, bool(greedy)] for value, greedy in pairs],
        "loglikelihood_rolling": model.loglikelihood_rolling(rolling, disable_tqdm=True),
        "generate_until": texts,
        "tokens": [model.tok_encode(context) for context, _ in PAIRS if context],
    }
    if chat:
        found["chat"] = [
            model.apply_chat_template(messages, add_generation_prompt=added)
            for messages, added in CONVERSATIONS
        ]
        found["chat_tokens"] = [model.tok_encode(each) for each in found["chat"]]
    return found


def real_pairs(shared: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the requests of the first ROWS of each real task, as the benchmark makes them."""
    benchmark = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/harness.py"))
    found = {}
    for case, name in benchmark["FILES"].items():
        with open(shared / "data/eval" / name, encoding="utf-8") as file:
            rows = [json.loads(line) for _, line in zip(range(ROWS), file, strict=False)]
        found[case] = [pair for row in rows for pair in benchmark["pairs_of"](case, row)]
    return found


def real_answers(model, shared: Path) -> dict:
    found: dict = {}
    for case, pairs in real_pairs(shared).items():
        scored = model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
        found[case] = [[value, bool(greedy)] for value, greedy in scored]
    until = instances("generate_until", STORY_PROMPTS)
    found["generate_until"] = model.generate_until(until, disable_tqdm=True)
    rolling = instances("loglikelihood_rolling", [(text,) for text in STORY_TEXTS])
    found["loglikelihood_rolling"] = model.loglikelihood_rolling(rolling, disable_tqdm=True)
    return found


def main() -> None:
    import tempfile

    import lm_eval
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent / "fixtures" / "harness.json"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--shared", type=Path)
    args = parser.parse_args()
    result: dict = {
        "versions": {each.__name__: each.__version__ for each in (torch, transformers)}
        | {"lm_eval": lm_eval.__version__}
    }
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("gpt2", "llama"):
            path = write_model(kind, Path(folder) / kind)
            model = HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=4)
            result[kind] = answers(model, chat=kind == "llama")
    if args.shared:
        model = HFLM(
            pretrained=str(args.shared / STORIES), device="cpu", dtype="float32", batch_size=4
        )
        result["stories"] = real_answers(model, args.shared)
    args.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
