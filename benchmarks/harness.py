"""Time lm-evaluation-harness over our class beside its own class `hf`, on the CPU, in one run.

    python benchmarks/harness.py --peer_python=PYTHON --data=FOLDER --tokenizer=FOLDER
    python benchmarks/harness.py --peer_python=PYTHON --data=FOLDER --tokenizer=FOLDER --small

PYTHON has torch, transformers and lm-eval. --data has the tasks as JSON lines
(lambada/lambada_openai_test.jsonl, piqa/, boolq/, winogrande/, arc/, other/), --tokenizer
GPT-2's vocab.bpe. --small takes a tiny model and few rows, to try the script out.

GPT-2 124M: random float32 weights, one folder for both sides. Each side stays in a process of its
own and answers `loglikelihood` of the same requests, with the stock prompts of the tasks,
tokenization included. `hf` first tries --batches on some of the requests of each case, and takes
the best. Then the sides alternate. Both use all cores; PyTorch's idle threads spin or sleep
(OMP_WAIT_POLICY=passive), and the faster of the two counts.

"ratio" is the median time of `hf` over ours. "worst" is the largest difference of a log-likelihood.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILES = {
    "lambada": "lambada/lambada_openai_test.jsonl",
    "piqa": "piqa/piqa_valid.jsonl",
    "winogrande": "winogrande/winogrande_xl_dev.jsonl",
    "boolq": "boolq/boolq_dev.jsonl",
    "arc_easy": "arc/arc_easy.jsonl",
    "arc_challenge": "arc/arc_challenge.jsonl",
    "openbookqa": "other/openbook_qa.jsonl",
}
SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 4}
PEERS = {"hf": {}, "hf_passive": {"OMP_WAIT_POLICY": "passive"}}
REST = 0.5  # seconds between the sides: PyTorch's threads spin for 0.2 s after their work


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer_python", help="a Python that has torch, transformers and lm-eval")
    parser.add_argument("--data", help="folder of the tasks")
    parser.add_argument("--tokenizer", help="folder of GPT-2's vocab.bpe")
    parser.add_argument("--cases", nargs="+", default=list(FILES), choices=FILES)
    parser.add_argument("--rows", type=int, default=100, help="documents of each case")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each side and case")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--small", action="store_true", help="a tiny model and few rows")
    parser.add_argument("--output", help="a JSON file; default results/harness.json, not if small")
    parser.add_argument("--make", help=argparse.SUPPRESS)  # writes the model, in the peer's Python
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # the model; answers in this process
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
    if args.make:
        make(Path(args.make), Path(args.tokenizer), SMALL if args.small else {})
    elif args.serve:
        serve(args.side, args.serve)
    else:
        for name in ("peer_python", "data", "tokenizer"):
            if getattr(args, name) is None:
                parser.error(f"--{name} is missing")
        write(args, compare(args))


def write(args: argparse.Namespace, result: dict) -> None:
    from mtnlg_jax import storage  # not in a peer's Python

    default = Path(__file__).parent / "results" / "harness.json"
    output = Path(args.output) if args.output else None if args.small else default
    text = json.dumps(result, indent=1) + "\n"
    if output is None:
        print(text)
    else:
        storage.write_file(output.parent, output.name, text.encode())
        print(f"written to {output}")


def pairs_of(case: str, row: dict) -> list[tuple[str, str]]:
    """Return (context, continuation) of each request that the stock task makes of a row."""
    if case == "lambada":
        return [(row["context"], " " + row["continuation"])]
    if case == "piqa":
        context = f"Question: {row['goal']}\nAnswer:"
        return [(context, f" {row[name]}") for name in ("sol1", "sol2")]
    if case == "winogrande":
        before, after = row["sentence"].split("_")
        return [(before + row[name], " " + after.strip()) for name in ("option1", "option2")]
    if case == "boolq":
        context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return [(context, " no"), (context, " yes")]
    context = row["query"] + ("\nAnswer:" if case.startswith("arc") else "")
    return [(context, f" {choice}") for choice in row["choices"]]


def compare(args: argparse.Namespace) -> dict:
    rows = 6 if args.small else args.rows
    requests = {}
    for case in args.cases:
        with open(Path(args.data) / FILES[case], encoding="utf-8") as file:
            read = [json.loads(line) for _, line in zip(range(rows), file, strict=False)]
        requests[case] = [pair for row in read for pair in pairs_of(case, row)]
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        command = [args.peer_python, __file__, f"--make={folder}", f"--tokenizer={args.tokenizer}"]
        subprocess.run(command + ["--small"] * args.small, check=True, stdout=subprocess.DEVNULL)
        sides = {}
        pythons = {"ours": (sys.executable, {})}
        pythons |= {name: (args.peer_python, extra) for name, extra in PEERS.items()}
        for name, (python, extra) in pythons.items():
            sides[name] = stack.enter_context(
                subprocess.Popen(
                    [python, __file__, f"--serve={folder}", f"--side={name}"],
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | extra,
                )
            )
        versions = {name: answer(side) for name, side in sides.items()}
        results = {case: time_case(args, case, sides, requests[case]) for case in requests}
        programs = ask(sides["ours"], {"programs": True})["programs"]
        for side in sides.values():
            side.stdin.close()
    shown = [each for each in sys.argv[1:] if not each.startswith(("--output", "--peer_python"))]
    shown = [
        each.split("=")[0] + "=..." if each.startswith(("--data=", "--tokenizer=")) else each
        for each in shown
    ]
    return {
        "what": "log-likelihoods of lm-evaluation-harness, GPT-2 124M shape, random float32 weights"
        if not args.small
        else "a tiny model, to try the script out",
        "command": " ".join(["python benchmarks/harness.py --peer_python=PYTHON", *shown]),
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": processor(),
        "cores": os.cpu_count(),
        "load_average": {"before": load[0], "after": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()} | versions["ours"] | versions["hf"],
        "programs": programs,
        "requests": sum(map(len, requests.values())),
        "cases": results,
    }


def time_case(args: argparse.Namespace, case: str, sides: dict, pairs: list) -> dict:
    """Return what the sides take for the requests of a case, and how they differ."""
    # Requests from all over the case.
    few = pairs[:: max(1, len(pairs) // 40)]
    best = {}
    tried = {}
    for name in PEERS:
        tried[name] = {}
        for batch in args.batches:
            given = {"pairs": few, "batch": batch}
            ask(sides[name], given)
            tried[name][batch] = round(ask(sides[name], given)["seconds"], 3)
            time.sleep(REST)
        best[name] = min(tried[name], key=tried[name].__getitem__)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found = {}
    ask(sides["ours"], {"pairs": pairs})  # compiles
    for turn in range(args.rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            found[name] = ask(sides[name], {"pairs": pairs, "batch": best.get(name)})
            seconds[name].append(round(found[name]["seconds"], 3))
            time.sleep(REST)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peer = min(PEERS, key=medians.__getitem__)
    answers = list(zip(found["ours"]["answers"], found[peer]["answers"], strict=True))
    result = {
        "requests": len(pairs),
        "ratio": round(medians[peer] / medians["ours"], 3),
        "faster_peer": peer,
        "batch": best[peer],
        "seconds": seconds,
        "batches_tried": tried,
        "worst": max(abs(a[0] - b[0]) for a, b in answers),
        "largest": max(abs(b[0]) for _, b in answers),
        "equal_flags": all(a[1] == b[1] for a, b in answers),
        "tokens": found["ours"]["tokens"],
        "tokens_read": found["ours"]["read"],
    }
    print(case, {key: result[key] for key in ("ratio", "seconds", "worst")}, flush=True)
    return result


def ask(side: subprocess.Popen, request: dict) -> dict:
    print(json.dumps(request), file=side.stdin, flush=True)
    return answer(side)


def answer(side: subprocess.Popen) -> dict:
    """Return the next JSON line of a side; other output of its libraries is skipped."""
    assert side.stdout is not None
    for line in side.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("a side ended before it answered; does --peer_python have all packages?")


def serve(side: str, folder: str) -> None:
    """Answer requests from standard input, one JSON line each."""
    import lm_eval
    from lm_eval.api.instance import Instance

    read = []
    shapes = set()
    if side == "ours":
        import jax

        from mtnlg_jax.decode import group_scoring
        from mtnlg_jax.evaluate.harness import MtnlgLM

        model = MtnlgLM(folder)
        versions = {"jax": jax.__version__}
        score = group_scoring._score

        def counted(params, tokens_BS, *arrays, **options):
            read.append(tokens_BS.size)
            shapes.add((tokens_BS.shape, options["branches"]))
            return score(params, tokens_BS, *arrays, **options)

        group_scoring._score = counted
    else:
        import torch
        import transformers
        from lm_eval.models.huggingface import HFLM

        torch.set_num_threads(os.cpu_count() or 1)
        model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
        versions = {each.__name__: each.__version__ for each in (torch, transformers)}
    print(json.dumps(versions | {"lm_eval": lm_eval.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "programs" in request:
            print(json.dumps({"programs": len(shapes)}), flush=True)
            continue
        pairs = [tuple(pair) for pair in request["pairs"]]
        instances = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
        if request.get("batch"):
            model.batch_size_per_gpu = request["batch"]
        read.clear()
        begin = time.perf_counter()
        found = model.loglikelihood(instances, disable_tqdm=True)
        seconds = time.perf_counter() - begin
        tokens = sum(len(model.tok_encode(context + more)) for context, more in pairs)
        reply = {"seconds": seconds, "tokens": tokens, "read": sum(read)}
        print(json.dumps(reply | {"answers": [[v, bool(g)] for v, g in found]}), flush=True)


def make(folder: Path, tokenizer: Path, shape: dict) -> None:
    """Write a random GPT-2 with its tokenizer as a folder of transformers."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [each for each in range(256) if each not in shown]
    # The order of GPT-2's first ids.
    names = [*map(chr, shown), *(chr(256 + number) for number in range(len(hidden)))]
    lines = (tokenizer / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines if line]
    vocabulary = {name: at for at, name in enumerate([*names, *map("".join, merges)])}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    whole = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens(["<|endoftext|>"])
    whole.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024}
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def processor() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"CPU, {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    main()
