"""Load a server with requests of all kinds, and check what each of them is told.

    python benchmarks/serve_load.py --workdir=RUN                     all parts
    python benchmarks/serve_load.py --workdir=RUN --parts soak --spread

It starts launch/serve.py for each part. The parts:

    equal   200 mixed requests alone, staggered and in a burst: equal text, tokens and reasons; no
            program is compiled after /ready
    soak    requests of all kinds, good, bad, cancelled, slow and half-closed, for --seconds or
            until --requests are done: each answered or refused as it should; memory stays flat
    idle    --connections idle connections, and then as many streams that wait: all are served
    flood   ten times as many requests as can be answered: the time to the first token of those
            that are accepted, and how soon the others are refused
    drain   SIGTERM while requests run: they finish, new ones get 503, the process ends with 0

Exit code 1 if a check fails.
"""

import argparse
import asyncio
import collections
import datetime
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from serve_clients import Answer, Server, ask, get, metrics, read_answer, request_of, until_idle

WORDS = (
    "the cat sat on a mat and saw an old dog by the sea 天地 日月 naïve über 12 3.5 ( ) \n".split(
        " "
    )
)
BAD: list[tuple[str, Any]] = [
    ("/v1/completions", {"prompt": "a", "temperature": -1}),
    ("/v1/completions", {"prompt": "a", "n": 1000}),
    ("/v1/completions", {"prompt": "a", "colour": "red"}),
    ("/v1/completions", {"prompt": "the cat " * 5000}),
    ("/v1/completions", {"prompt": [10**9]}),
    ("/v1/completions", b'{"prompt": "a"'),
    ("/v1/completions", b"\xff\x00"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "(["}}),
    ("/v1/completions", {"prompt": "a", "use_beam_search": True}),
    ("/v1/rank", {"prompt": "a", "candidates": []}),
    ("/v1/rank", {"prompt": "a", "candidates": ["b", ""]}),
    ("/v1/rerank", {"query": " ", "documents": ["a"]}),
    ("/detokenize", {"tokens": [-1]}),
]


class Kinds:
    """Random requests that a model of this context can answer."""

    def __init__(self, seed: int, context: int):
        self.random = random.Random(seed)
        self.context = context

    def text(self, most: int) -> str:
        """Return a text of a number of words that is mostly small."""
        count = min(1 + int(self.random.expovariate(1 / 6)), most)
        return " ".join(self.random.choices(WORDS, k=count))

    def completion(self) -> dict[str, Any]:
        """Return a body of /v1/completions."""
        draw = self.random
        body: dict[str, Any] = {
            "prompt": self.text(self.context // 8),
            "max_tokens": draw.choice([1, 2, 5, 8, 16, self.context]),
            "seed": draw.randrange(2**31),
            "logprobs": draw.choice([0, 1, 3]),
        }
        more: list[dict[str, Any]] = [
            {"temperature": 0},
            {"temperature": 0.8},
            {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
            {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5},
            {"temperature": 0, "no_repeat_ngram_size": 2, "frequency_penalty": 0.3},
            {"temperature": 1.0, "stop": ["e", "the"]},
            {"temperature": 1.0, "n": 3},
            {"temperature": 1.0, "logit_bias": {"20": 5, "30": -100}},
            {"temperature": 1.0, "ignore_eos": True},
            {"temperature": 1.0, "structured_outputs": {"regex": "[a-z ]{1,20}"}},
        ]
        return body | draw.choice(more)


async def equal(args, kinds: Kinds) -> dict:
    room = [f"--waiting={4 * args.mixed}", f"--waiting_tokens={args.mixed * kinds.context}"]
    server = Server(args.port, [*args.flags, *room])
    bodies = [kinds.completion() for _ in range(args.mixed)]
    try:
        await server.wait_ready()
        before = await metrics(args.port)

        async def one(body: dict, wait: float = 0.0) -> list:
            await asyncio.sleep(wait)
            answer = await ask(args.port, request_of("/v1/completions", body, Connection="close"))
            if answer.status != 200:
                return [answer.status, answer.body.decode()]
            return answer.json()["choices"]

        alone = [await one(body) for body in bodies]
        order = list(range(len(bodies)))
        kinds.random.shuffle(order)
        ways = {"burst": 0.0, "staggered": 0.03}
        told: dict[str, list] = {}
        for way, every in ways.items():
            found = await asyncio.gather(
                *(one(bodies[index], every * at) for at, index in enumerate(order))
            )
            told[way] = [answer for _, answer in sorted(zip(order, found, strict=True))]
        after = await metrics(args.port)
    finally:
        server.stop()
    result: dict[str, Any] = {"requests": len(bodies)}
    for way, answers in told.items():
        pairs = list(zip(alone, answers, strict=True))
        different = [at for at, (a, b) in enumerate(pairs) if _told(a) != _told(b)]
        result[f"{way}_different"] = len(different)
        result[f"{way}_largest_difference"] = max((_distance(a, b) for a, b in pairs), default=0)
        for at in different[:3]:
            print("different:", json.dumps(bodies[at]), str(pairs[at])[:400], file=sys.stderr)
    name = "mtnlg_engine_compiles_serving_total"
    result["compiles_while_serving"] = after.get(name, 0) - before.get(name, 0)
    result["programs"] = [before["mtnlg_engine_programs"], after["mtnlg_engine_programs"]]
    failed = result["burst_different"] or result["staggered_different"]
    result["passed"] = not failed and not result["compiles_while_serving"]
    return result


def _told(choices: list) -> list:
    """Return text, reason and tokens of an answer."""
    if not isinstance(choices[0], dict):
        return choices
    return [(c["text"], c["finish_reason"], c["logprobs"]["tokens"]) for c in choices]


def _distance(one: list, other: list) -> float:
    """Return the largest difference of log-probabilities of two answers of equal text."""
    if not isinstance(one[0], dict) or _told(one) != _told(other):
        return 0.0
    numbers = [
        zip(a["logprobs"]["token_logprobs"], b["logprobs"]["token_logprobs"], strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return max((abs(a - b) for pairs in numbers for a, b in pairs), default=0.0)


class Soak:
    """Clients of all kinds. Each method is one request, and returns whether it went as it should,
    or what was wrong."""

    def __init__(self, args, kinds: Kinds):
        self.port = args.port
        self.kinds = kinds
        self.weights = {
            self.whole: 24,
            self.stream: 20,
            self.chat: 6,
            self.rank: 4,
            self.rerank: 3,
            self.beams: 2,
            self.echo: 4,
            self.tokenize: 6,
            self.bad: 12,
            self.leave_stream: 6,
            self.leave_whole: 4,
            self.slow: 3,
            self.half_closed: 3,
            self.half_sent: 2,
            self.two_on_one: 3,
        }

    async def _post(self, path: str, body: Any, wanted: int = 200, pause: float = 0.0):
        """Return the answer, and what is wrong with it. 429 may always come, with Retry-After."""
        answer = await ask(self.port, request_of(path, body, Connection="close"), pause)
        if answer.status == 429 and int(answer.headers.get("retry-after", 0)) >= 1:
            return answer, "refused"
        if answer.status != wanted:
            return answer, f"{path} {answer.status} {answer.body[:200]!r} for {str(body)[:200]}"
        if wanted >= 400 and not answer.json()["error"]["message"]:
            return answer, f"{path} has no message for {str(body)[:200]}"
        return answer, ""

    async def whole(self) -> str:
        return (await self._post("/v1/completions", self.kinds.completion()))[1]

    async def stream(self, pause: float = 0.0) -> str:
        body = self.kinds.completion() | {"stream": True}
        answer, wrong = await self._post("/v1/completions", body, pause=pause)
        if not wrong and (answer.events[-1:] != ["[DONE]"] or "error" in answer.events[-2]):
            return f"a stream ended with {answer.events[-2:]} for {body}"
        return wrong

    async def chat(self) -> str:
        body = self.kinds.completion()
        body |= {"messages": [{"role": "user", "content": body.pop("prompt")[:40]}]}
        body["logprobs"] = bool(body["logprobs"])
        return (await self._post("/v1/chat/completions", body))[1]

    async def rank(self) -> str:
        body: dict[str, Any] = {"prompt": self.kinds.text(4)}
        if self.kinds.random.random() < 0.5:
            same = " " + self.kinds.text(3)
            body["candidates"] = [same, same, " " + self.kinds.text(3)]
        else:
            body |= {"n": 3, "max_tokens": 5}
        return (await self._post("/v1/rank", body))[1]

    async def rerank(self) -> str:
        body = {"query": "the sea", "documents": [self.kinds.text(6) for _ in range(4)]}
        return (await self._post("/v1/rerank", body))[1]

    async def beams(self) -> str:
        body = {"prompt": self.kinds.text(4), "use_beam_search": True, "n": 3, "max_tokens": 8}
        return (await self._post("/v1/completions", body))[1]

    async def echo(self) -> str:
        body = {"prompt": self.kinds.text(8), "echo": True, "max_tokens": 0, "logprobs": 1}
        return (await self._post("/v1/completions", body))[1]

    async def tokenize(self) -> str:
        return (await self._post("/tokenize", {"prompt": self.kinds.text(20)}))[1]

    async def bad(self) -> str:
        path, body = self.kinds.random.choice(BAD)
        return (await self._post(path, body, wanted=400))[1]

    async def leave_stream(self) -> str:
        return await self._leave({"stream": True}, reads=self.kinds.random.randrange(3))

    async def leave_whole(self) -> str:
        return await self._leave({}, reads=0)

    async def _leave(self, more: dict, reads: int) -> str:
        """Send a request and go away while it is answered."""
        body = self.kinds.completion() | {"ignore_eos": True} | more
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request_of("/v1/completions", body))
        for _ in range(reads):
            await reader.read(512)
        await asyncio.sleep(self.kinds.random.random() * 0.1)
        # Half of them by a reset, as a process that is killed does.
        writer.transport.abort() if self.kinds.random.random() < 0.5 else writer.close()
        return ""

    async def slow(self) -> str:
        return await self.stream(pause=0.05)

    async def half_closed(self) -> str:
        """Close the sending half behind the request: the server may answer, or hang up."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request_of("/v1/completions", self.kinds.completion()))
        writer.write_eof()
        async with asyncio.timeout(120):
            answer = await read_answer(reader, 0.0)
            await reader.read()
        writer.close()
        return "" if answer.status in (0, 200, 429) else f"half closed: {answer}"

    async def half_sent(self) -> str:
        request = request_of("/v1/completions", self.kinds.completion())
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request[: self.kinds.random.randrange(len(request))])
        await asyncio.sleep(0.05)
        writer.close()
        return ""

    async def two_on_one(self) -> str:
        """Send two requests at once on one connection: they are answered in order."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request_of("/tokenize", {"prompt": "a"}) + request_of("/v1/models"))
        async with asyncio.timeout(120):
            first = await read_answer(reader, 0.0)
            second = await read_answer(reader, 0.0)
        writer.close()
        right = "tokens" in first.json() and "data" in second.json()
        return "" if right else f"two on one: {first}, {second}"


async def soak(args, kinds: Kinds) -> dict:
    server = Server(args.port, args.flags)
    clients = Soak(args, kinds)
    counts: dict[str, int] = {}
    wrong: list[str] = []
    memory: list[tuple[int, float]] = []
    done = 0
    begun = time.monotonic()

    async def worker() -> None:
        nonlocal done
        while done < args.requests and time.monotonic() - begun < args.seconds:
            done += 1
            number = done
            if args.spread:
                due = begun + number * args.seconds / args.requests
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            if number % 250 == 0:
                memory.append((number, round(server.memory(), 1)))
                print(f"{number} requests, {memory[-1][1]} MB, {len(wrong)} wrong", flush=True)
            kind = kinds.random.choices([*clients.weights], [*clients.weights.values()])[0]
            try:
                told = await kind()
            except Exception as error:
                told = f"{kind.__name__}: {error!r}"
            name = f"{kind.__name__}{' refused' if told == 'refused' else ''}"
            counts[name] = counts.get(name, 0) + 1
            if told not in ("", "refused"):
                wrong.append(told)
                if len(wrong) <= 10:
                    print("wrong:", told[:500], file=sys.stderr, flush=True)

    try:
        await server.wait_ready()
        files = server.files()
        before = await metrics(args.port)
        begun = time.monotonic()
        await asyncio.gather(*(worker() for _ in range(args.clients)))
        seconds = time.monotonic() - begun
        after = await until_idle(args.port)
        await asyncio.sleep(1)
        result = {
            "requests": done,
            "seconds": round(seconds),
            "clients": args.clients,
            "spread": args.spread,
            "counts": dict(sorted(counts.items())),
            "wrong": len(wrong),
            "memory_mb": memory,
            "requests_in_flight_after": after["mtnlg_requests_in_flight"],
            "files_before_and_after": [files, server.files()],
            "compiles_while_serving": after.get("mtnlg_engine_compiles_serving_total", 0)
            - before.get("mtnlg_engine_compiles_serving_total", 0),
            "errors_in_log": server.log().count("Traceback"),
        }
    finally:
        server.stop()
    print(server.log()[-3000:], file=sys.stderr)
    late = [megabytes for at, megabytes in memory if at >= 1000]
    result["memory_growth"] = round(max(late) / late[0] - 1, 4) if late else None
    result["passed"] = not (
        wrong
        or result["requests_in_flight_after"]
        or result["compiles_while_serving"]
        or result["errors_in_log"]
        or (late and result["memory_growth"] > 0.05)
    )
    return result


async def idle(args, kinds: Kinds) -> dict:
    """Hold idle connections, then streams that wait for their turn."""
    count = args.connections
    flags = [f"--waiting={count}", f"--waiting_tokens={64 * count}", "--request_seconds=3600"]
    server = Server(args.port, [*args.flags, *flags])
    body = {"prompt": "a", "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True}
    request = request_of("/v1/completions", body, Connection="close")
    try:
        await server.wait_ready()
        empty = server.memory()
        links = []
        for _ in range(count):
            links.append(await asyncio.open_connection("127.0.0.1", args.port))
        begun = time.monotonic()
        answered = await ask(args.port, request)
        beside = time.monotonic() - begun
        connected = server.memory()
        for _, writer in links:
            writer.close()
        await asyncio.sleep(1)

        opening = asyncio.Semaphore(200)

        async def one() -> Answer:
            # The request follows its connection at once, also where this process is slow.
            async with opening:
                reader, writer = await asyncio.open_connection("127.0.0.1", args.port)
                writer.write(request)
                await writer.drain()
            answer = await read_answer(reader, time.monotonic())
            writer.close()
            return answer

        begun = time.monotonic()
        waiting = [asyncio.ensure_future(one()) for _ in range(count)]
        most = 0.0
        while not all(each.done() for each in waiting):
            most = max(most, server.memory())
            await asyncio.sleep(0.5)
        told = await asyncio.gather(*waiting, return_exceptions=True)
        seconds = time.monotonic() - begun
        after = await until_idle(args.port)
    finally:
        server.stop()
    served = [a for a in told if isinstance(a, Answer) and a.events[-1:] == ["[DONE]"]]
    import resource

    result = {
        "connections": count,
        "open_files_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "memory_mb": {"empty": empty, "connected": connected, "streams": most},
        "seconds_of_a_request_beside_idle_connections": round(beside, 3),
        "streams_served": len(served),
        "others": collections.Counter(
            str(each.status) if isinstance(each, Answer) else repr(each)[:80]
            for each in told
            if not isinstance(each, Answer) or each.events[-1:] != ["[DONE]"]
        ),
        "streams_seconds": round(seconds, 1),
        "in_flight_after": after["mtnlg_requests_in_flight"],
    }
    result["passed"] = len(served) == count and answered.status == 200
    return result


async def flood(args, kinds: Kinds) -> dict:
    """Measure half load, and then ten times the requests that can be answered."""
    flags = [flag for flag in args.flags if not flag.startswith("--waiting")]
    server = Server(args.port, [*flags, f"--waiting={args.queue}", f"--slots={args.slots}"])
    # Different prompts, so that no keys are found in a slot.
    bodies = [
        kinds.completion()
        | {"prompt": kinds.text(6), "max_tokens": 24, "ignore_eos": True, "n": 1, "stream": True}
        for _ in range(256)
    ]

    async def one() -> Answer:
        body = kinds.random.choice(bodies)
        return await ask(args.port, request_of("/v1/completions", body, Connection="close"))

    async def closed(clients: int, seconds: float) -> list[Answer]:
        """Let each client send its next request when it has an answer."""
        told: list[Answer] = []
        end = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end:
                told.append(await one())

        await asyncio.gather(*(client() for _ in range(clients)))
        return told

    try:
        await server.wait_ready()
        await closed(args.slots, 3.0)
        half = await closed(max(args.slots // 2, 1), args.flood_seconds)
        full = await closed(args.slots, args.flood_seconds)
        rate = 10 * len(full) / args.flood_seconds
        begun = time.monotonic()
        sent = []
        while (now := time.monotonic() - begun) < args.flood_seconds:
            while len(sent) < now * rate:
                sent.append(asyncio.ensure_future(one()))
            await asyncio.sleep(0.005)
        told = await asyncio.gather(*sent, return_exceptions=True)
        await until_idle(args.port)
    finally:
        server.stop()
    answers = [each for each in told if isinstance(each, Answer)]
    accepted = [each for each in answers if each.status == 200]
    refused = [each for each in answers if each.status == 429]
    result = {
        "slots": args.slots,
        "waiting": args.queue,
        "half_load_first_token": _spread([a.first for a in half if a.status == 200]),
        "capacity_requests_per_second": round(len(full) / args.flood_seconds, 1),
        "sent_per_second": round(len(told) / args.flood_seconds, 1),
        "accepted": len(accepted),
        "accepted_first_token": _spread([a.first for a in accepted]),
        "refused": len(refused),
        "refused_seconds": _spread([a.seconds for a in refused]),
        "without_retry_after": sum("retry-after" not in a.headers for a in refused),
        "other": len(told) - len(accepted) - len(refused),
    }
    result["passed"] = not result["other"] and not result["without_retry_after"] and bool(refused)
    return result


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    values = sorted(values)
    return {
        "p50": round(statistics.median(values), 3),
        "p99": round(values[int(0.99 * (len(values) - 1))], 3),
        "max": round(values[-1], 3),
    }


async def drain(args, kinds: Kinds) -> dict:
    """Send SIGTERM while requests run and wait."""
    server = Server(args.port, args.flags)
    body = {"prompt": "the", "max_tokens": kinds.context, "ignore_eos": True, "stream": True}
    request = request_of("/v1/completions", body, Connection="close")
    try:
        await server.wait_ready()
        running = [asyncio.ensure_future(ask(args.port, request)) for _ in range(24)]
        await asyncio.sleep(0.1)
        before = await metrics(args.port)
        ending = asyncio.get_running_loop().run_in_executor(None, server.stop)
        await asyncio.sleep(0.1)
        late = [await get(args.port, "/ready"), await ask(args.port, request)]
        told = await asyncio.gather(*running)
        code, seconds = await ending
    finally:
        if server.process.poll() is None:
            server.stop()
    finished = sum(a.events[-1:] == ["[DONE]"] and "error" not in a.events[-2] for a in told)
    result = {
        "accepted": len(running),
        "in_flight_at_sigterm": before["mtnlg_requests_in_flight"],
        "finished": finished,
        "status_of_new_ones": [each.status for each in late],
        "exit_code": code,
        "seconds": round(seconds, 2),
    }
    result["passed"] = finished == 24 and code == 0 and {a.status for a in late} == {503}
    return result


PARTS = {"equal": equal, "soak": soak, "idle": idle, "flood": flood, "drain": drain}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--context", type=int, default=64, help="of the model, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed", type=int, default=200, help="requests of the part equal")
    parser.add_argument("--requests", type=int, default=10000, help="most of the part soak")
    parser.add_argument("--seconds", type=float, default=3600.0, help="longest of the part soak")
    parser.add_argument("--clients", type=int, default=24, help="at once in the part soak")
    parser.add_argument(
        "--spread", action="store_true", help="spread the requests of the part soak over --seconds"
    )
    parser.add_argument("--connections", type=int, default=10000, help="of the part idle")
    parser.add_argument("--slots", type=int, default=8, help="of the part flood")
    parser.add_argument("--queue", type=int, default=8, help="places that wait in the part flood")
    parser.add_argument("--flood_seconds", type=float, default=15.0)
    parser.add_argument("--output", help="a JSON file")
    parser.add_argument("flags", nargs="*", help="behind --: further flags of launch/serve.py")
    args = parser.parse_args()
    args.flags = [f"--workdir={args.workdir}", *args.flags]
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_before": os.getloadavg()[0],
    }
    for part in args.parts:
        results[part] = asyncio.run(PARTS[part](args, Kinds(args.seed, args.context)))
        print(part, json.dumps(results[part], indent=1), flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(results[part]["passed"] for part in args.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
