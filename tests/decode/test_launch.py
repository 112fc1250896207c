"""Run launch/generate.py: three modes, text and JSON, and errors of one line with exit code 2."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "generate.py"


@pytest.fixture(scope="module")
def ask(answering, tokenizer, tmp_path_factory):
    """Return a function (*arguments, stdin bytes) -> (exit code, standard output, standard
    error)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    answer = answering("generate.py", folder, positions=32, new_tokens=6)
    tokenizer.save(folder / "tokenizer")  # where --mode=tokens looks for it
    answer.folder = folder
    return answer


def test_generative(ask, tmp_path):
    code, out, err = ask("--workdir=RUN", "--prompt=The cat")
    assert (code, err) == (0, "") and out.startswith("The cat") and len(out) > len("The cat\n")
    assert ask("--workdir=RUN", "--prompt=The cat", "--stream")[1] == out
    assert ask("--workdir=RUN", stdin=b"The cat\n")[1] == out
    (tmp_path / "prompt.txt").write_text("The cat\n")
    assert ask("--workdir=RUN", f"--input={tmp_path / 'prompt.txt'}")[1] == out
    record = json.loads(ask("--workdir=RUN", "--prompt=The cat", "--json")[1])
    assert record["prompt"] + record["sequences"][0]["text"] + "\n" == out
    assert (record["step"], len(record["sequences"][0]["tokens"])) == (7, 6)


def test_settings_reach_the_decoder(ask):
    arguments = [
        "--workdir=RUN",
        "--prompt=",
        "--json",
        "--temperature=1.5",
        "--n=2",
        "--max_new_tokens=4",
    ]
    first, again, other = (json.loads(ask(*arguments, f"--seed={seed}")[1]) for seed in (3, 3, 4))
    assert first == again and first["sequences"][1]["tokens"] == other["sequences"][0]["tokens"]
    assert [len(sequence["tokens"]) for sequence in first["sequences"]] == [4, 4]


def test_beams_and_lists_of_tokens_reach_the_decoder(ask):
    arguments = [
        "--workdir=RUN",
        "--prompt=The cat",
        "--num_beams=3",
        "--n=2",
        "--length_penalty=0.6",
        "--early_stopping=never",
        "--logit_bias=40:-2",
        "--logit_bias=41:0.5",
        "--sequence_bias=5,6:-1e9",
        "--bad_words_ids=7,8",
        "--bad_words_ids=9",
        "--suppress_tokens=10,11",
        "--stop_sequences=12,13",
        "--forced_tokens=0:50",
        "--forced_tokens=2:60",
        "--eos_token_id=3,14",
        "--max_time=1000",
    ]
    code, out, err = ask(*arguments, "--json")
    sequences = json.loads(out)["sequences"]
    assert (code, err, len(sequences)) == (0, "", 2)
    assert sequences[0]["score"] > sequences[1]["score"]
    assert all((sequence["tokens"][0], sequence["tokens"][2]) == (50, 60) for sequence in sequences)
    assert f"--- 1, score {sequences[0]['score']:.4f} ---\nThe cat" in ask(*arguments)[1]


@pytest.mark.parametrize(
    ("by_flag", "by_set"),
    [
        (["--num_beams=3", "--n=2"], ["num_beams=3", "num_return_sequences=2"]),
        (["--temperature=1.5", "--seed=3"], ["temperature=1.5", "seed=3"]),
        (["--early_stopping=true", "--num_beams=2"], ["early_stopping=true", "num_beams=2"]),
        (
            ["--bad_words_ids=7,8", "--bad_words_ids=9", "--suppress_tokens=10"],
            ["bad_words_ids=((7, 8), (9,))", "suppress_tokens=(10,)"],
        ),
    ],
)
def test_a_setting_by_flag_and_by_set_gives_the_same_text(ask, by_flag, by_set):
    arguments = ["--workdir=RUN", "--prompt=The cat", "--json"]
    expected = ask(*arguments, *by_flag)
    assert expected[0] == 0, expected[2]
    assigned = [f"--set=decode.{entry}" for entry in by_set]
    assert ask(*arguments, *assigned) == expected
    assert ask(*arguments, *by_flag, *assigned) == expected


def test_texts_and_ids_of_a_setting_add_up(ask):
    base = ["--workdir=RUN", "--prompt=The cat", "--json", "--bad_words=the"]
    assert ask(*base, "--set=decode.bad_words_ids=((7, 8),)") == ask(*base, "--bad_words_ids=7,8")


def test_several_texts_are_separated(ask):
    out = ask("--workdir=RUN", "--prompt=The", "--temperature=1", "--n=2")[1]
    assert out.startswith("--- 1 ---\nThe") and "\n--- 2 ---\nThe" in out


def test_reaching_the_end_of_the_context_is_reported(ask):
    code, out, err = ask(
        "--workdir=RUN", "--prompt=The cat sat on", "--max_new_tokens=99", "--min_new_tokens=99"
    )
    assert code == 0 and err == "(ended: the context of 32 tokens is full)\n"


def test_ranking(ask):
    code, out, err = ask(
        "--workdir=RUN",
        "--mode=ranking",
        "--prompt=The",
        "--candidates= cat",
        "--candidates= dog",
        "--candidates= cat",
        "--normalise=sum",
    )
    lines = out.splitlines()
    assert code == 0 and "sum" in lines[1] and "per_byte" in lines[1]
    assert lines[0] == "1 logprob, sum, natural logarithms; candidates: 3, duplicates: 1"
    assert sorted(line.split()[-2:] for line in lines[2:]) == [["cat'", "2"], ["dog'", "1"]]
    sums = [float(line.split()[1]) for line in lines[2:]]
    assert sums == sorted(sums, reverse=True)
    sampled = json.loads(
        ask("--workdir=RUN", "--mode=ranking", "--prompt=The", "--n=5", "--json")[1]
    )
    assert sum(candidate["count"] for candidate in sampled["candidates"]) == 5
    assert {"text", "sum", "per_token", "per_char", "per_byte", "score"} <= sampled["candidates"][
        0
    ].keys()


def test_scorers_are_mixed_and_their_table_is_aligned(ask):
    arguments = [
        "--workdir=RUN",
        "--mode=ranking",
        "--prompt=The",
        "--candidates= cat is 5",
        "--candidates=天地 5",
        "--candidates=玄",
        "--scorer=pmi=0.5",
        "--scorer=mbr",
        "--scorer=self_consistency=2",
        "--neutral=In",
        "--utility=exact",
        r"--answer=\d",
    ]
    code, out, err = ask(*arguments)
    lines = out.splitlines()
    assert (code, err) == (0, "") and lines[0].startswith(
        "0.5 pmi + 1 mbr + 2 self_consistency, per_token"
    )
    heads = lines[1].split()
    assert heads[:2] == ["rank", "score"] and heads[-4:] == ["tokens", "answer", "text", "times"]
    assert {"pmi", "pmi.neutral", "mbr", "self_consistency", "self_consistency.votes"} <= set(heads)
    shown = [
        "".join(c + "-" * (unicodedata.east_asian_width(c) == "W") for c in line)
        for line in lines[1:]
    ]
    assert len(set(map(len, shown))) == 1 and "天" in out, "a Chinese character takes two columns"
    record = json.loads(ask(*arguments, "--json")[1])
    assert (record["size"], record["duplicates"], len(record["utilities"])) == (3, 0, 3)
    assert record["weights"] == {"pmi": 0.5, "mbr": 1.0, "self_consistency": 2.0}
    for candidate in record["candidates"]:
        parts = candidate["parts"]
        assert candidate["score"] == pytest.approx(
            sum(record["weights"][name] * parts[name] for name in record["weights"])
        )
    beams = json.loads(
        ask("--workdir=RUN", "--mode=ranking", "--prompt=The", "--num_beams=3", "--json")[1]
    )
    assert beams["size"] == 3


def test_guesses_and_stats(ask):
    arguments = [
        "--workdir=RUN",
        "--prompt=The cat sat on the cat",
        "--max_new_tokens=12",
        "--min_new_tokens=12",
    ]
    plain = ask(*arguments)[1]
    for guess in (
        ["--prompt_lookup_num_tokens=3", "--max_matching_ngram_size=1"],
        ["--draft=RUN", "--num_assistant_tokens=2"],
    ):
        code, out, err = ask(*arguments, *guess, "--stats")
        stats = dict(line.split(": ") for line in err.splitlines())
        assert (code, out) == (0, plain)
        assert {
            "tokens_per_second",
            "roofline_tokens_per_second",
            "copy_gigabytes_per_second",
        } <= stats.keys()
        right = int(stats["accepted"])
        guessed = int(stats["guessed"])
        assert float(stats["acceptance_rate"]) == pytest.approx(right / guessed, abs=1e-3)
    assert float(stats["acceptance_rate"]) == 1, "a draft that is the model itself"


def test_int8_and_bfloat16_reach_the_decoder(ask):
    arguments = ["--workdir=RUN", "--prompt=The cat", "--json"]
    exact = json.loads(ask(*arguments)[1])["sequences"][0]
    for held in ("--weights=int8", "--cache=int8", "--dtype=bfloat16"):
        rounded = json.loads(ask(*arguments, held)[1])["sequences"][0]
        assert rounded["logprobs"] != exact["logprobs"]
        if held != "--cache=int8":  # the prompt is read before there is a cache
            assert rounded["logprobs"][0] == pytest.approx(exact["logprobs"][0], abs=0.2)


def test_fill(ask):
    code, out, err = ask("--workdir=RUN", "--mode=fill", "--prompt=The <mask> sat", "--guesses=3")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "mask 1" and len(lines) >= 5 and out.count("%") == 3
    record = json.loads(ask("--workdir=RUN", "--mode=fill", "--prompt=The <mask> sat", "--json")[1])
    assert len(record["masks"][0]) == 5 and record["text"].startswith("The ")


def test_an_escaped_line_end_in_stops_is_a_line_end(ask):
    r"""In stops, \n is a line end. A prompt is used unchanged, with a note."""
    plain = json.loads(ask("--workdir=RUN", "--prompt=The", "--max_new_tokens=6", "--json")[1])[
        "sequences"
    ][0]
    first = plain["text"][0]
    forced = ["--workdir=RUN", "--prompt=The", "--json", "--max_new_tokens=3"]
    for stop, typed in (("\n", r"\n"), ("\t", r"\t")):
        tokens = json.loads(
            ask("--workdir=RUN", "--prompt=The", "--json", f"--stop_words={typed}")[1]
        )
        assert tokens["sequences"]
        ids = ask_ids(ask, stop)
        out = json.loads(ask(*forced, f"--forced_tokens=0:{ids[0]}", f"--stop_strings={typed}")[1])
        assert (out["sequences"][0]["finish_reason"], out["sequences"][0]["text"]) == ("stop", "")
        out = json.loads(
            ask(*forced, f"--forced_tokens=0:{ids[0]}", rf"--stop_strings=\{typed}")[1]
        )
        assert out["sequences"][0]["text"].startswith(stop), (
            "an escaped backslash stands for itself"
        )
    code, out, err = ask("--workdir=RUN", r"--prompt=a\nb", "--max_new_tokens=1")
    assert code == 0 and out.startswith(r"a\nb") and err.startswith("note: ") and r"$'\n'" in err
    assert first


def ask_ids(ask, text: str) -> list[int]:
    return json.loads(
        ask(f"--workdir={ask.folder}", "--mode=tokens", f"--prompt={text}", "--json")[1]
    )["tokens"]


def test_mode_tokens_prints_the_ids_of_a_text(ask, tokenizer):
    code, out, err = ask(f"--workdir={ask.folder}", "--mode=tokens", "--prompt=The cat 好")
    ids = tokenizer.encode("The cat 好")
    assert code == 0 and out.splitlines()[-1] == ",".join(map(str, ids)) and "'The'" in out
    assert err == f"(as a prompt, it follows token {tokenizer.bos_id})\n"
    assert ask_ids(ask, " sat on") == tokenizer.encode(" sat on")


def test_words_are_replaced_by_their_tokens(ask, tokenizer):
    """Words are encoded with and without a space before them; the result equals the same ids given
    by hand."""
    base = ["--workdir=RUN", "--prompt=The cat", "--json"]
    with_space, bare = (",".join(map(str, tokenizer.encode(text))) for text in (" the", "the"))
    assert "," not in with_space
    wanted = ask(*base, f"--bad_words_ids={bare}", f"--bad_words_ids={with_space}")
    assert ask(*base, "--bad_words=the") == wanted
    assert ask(*base, "--suppress_words=the") == ask(*base, f"--suppress_tokens={with_space}")
    assert ask(*base, "--word_bias=cat:3") == ask(
        *base,
        *(
            f"--sequence_bias={','.join(map(str, tokenizer.encode(text)))}:3"
            for text in ("cat", " cat")
        ),
    )
    forced = [*base, "--num_beams=2", f"--forced_tokens=1:{with_space}"]
    sequence = json.loads(ask(*forced, "--stop_words=the")[1])["sequences"][0]
    assert (
        sequence["finish_reason"] == "stop"
        and len(sequence["tokens"]) == 2
        and "the" not in sequence["text"]
    )


def test_a_model_that_does_not_fit_is_refused_with_the_way_out(ask):
    arguments = ["--workdir=RUN", "--prompt=The cat"]
    code, out, err = ask(*arguments, "--memory=0.00004")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "error: RUN does not fit: a machine would hold at least" in err
    assert "it fits with --dtype=bfloat16 (" in err and "all the same with --memory=0\n" in err
    # Samples of one prompt may be fewer, and beams have no int8 cache.
    more = ["--mode=ranking", "--temperature=1", "--n=64", "--dtype=bfloat16", "--memory=0.00012"]
    assert "it fits with --cache=int8 (" in ask(*arguments, *more)[2]
    assert "--n=" in ask(*arguments, *more, "--cache=int8", "--n=512")[2]
    err = ask(*arguments, "--num_beams=64", "--dtype=bfloat16", "--memory=0.00002")[2]
    assert "does not fit" in err and "--cache" not in err
    # A draft is counted with the model.
    assert "does not fit" in ask(*arguments, "--draft=RUN", "--memory=0.00007")[2]
    assert ask(*arguments, "--memory=0.00007") == ask(*arguments) == ask(*arguments, "--memory=0")


def test_a_file_of_prompts_is_answered_line_by_line(ask, tmp_path):
    (tmp_path / "prompts.txt").write_text("The cat\n\nIn the\n")
    code, out, err = ask(
        "--workdir=RUN",
        f"--prompts={tmp_path / 'prompts.txt'}",
        f"--output={tmp_path / 'a.jsonl'}",
        "--batch=2",
        "--max_new_tokens=5",
    )
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert (code, err) == (0, "") and out == f"3 answers in {tmp_path / 'a.jsonl'}\n"
    assert [row["prompt"] for row in rows] == ["The cat", "", "In the"]
    for row in rows:
        alone = json.loads(
            ask("--workdir=RUN", f"--prompt={row['prompt']}", "--max_new_tokens=5", "--json")[1]
        )
        assert row["sequences"][0]["tokens"] == alone["sequences"][0]["tokens"]
    lines = [
        {"prompt": "The", "candidates": [" cat", " dog"], "id": 7},
        {"prompt": "In", "candidates": [" the"]},
    ]
    given = "".join(json.dumps(line) + "\n" for line in lines).encode()
    code, out, err = ask("--workdir=RUN", "--mode=ranking", "--prompts=-", stdin=given)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and found[0]["id"] == 7 and [len(row["candidates"]) for row in found] == [2, 1]
    (tmp_path / "masks.jsonl").write_text('"The <mask>"\n{"prompt": "<mask> cat"}\n')
    code, out, err = ask("--workdir=RUN", "--mode=fill", f"--prompts={tmp_path / 'masks.jsonl'}")
    assert code == 0 and all(len(json.loads(line)["masks"]) == 1 for line in out.splitlines())


def test_a_file_of_prompts_is_checked_first_and_output_is_kept(ask, tmp_path):
    path = tmp_path / "p.jsonl"
    answers = tmp_path / "a.jsonl"
    for content, message in (
        ('{"prompt": "a"}\n{"text": "b"}\n', 'line 2 has no text under the key "prompt"'),
        ('{"prompt": "a"}\n{"prompt"\n', "line 2 is not JSON"),
        ("", "line 1 is not JSON"),
        ('{"prompt": "a", "score": NaN}\n', "line 1 is not JSON (it holds NaN"),
        (json.dumps({"prompt": "a b " * 40}), "prompt 1 of 1: the prompt has"),
    ):
        path.write_text(content or "x")
        answers.unlink(missing_ok=True)
        code, out, err = ask("--workdir=RUN", f"--prompts={path}", f"--output={answers}")
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
        assert not answers.exists()
    path.write_text(
        '{"prompt": "The", "candidates": [" cat"]}\n{"prompt": "In", "candidates": [""]}\n'
    )
    answers.unlink(missing_ok=True)
    code, out, err = ask(
        "--workdir=RUN", "--mode=ranking", f"--prompts={path}", f"--output={answers}"
    )
    assert (
        code == 2
        and "prompt 2 of 2: candidate 1 of 1 is empty" in err
        and "(1 answers are written)" in err
    )
    assert len(answers.read_text().splitlines()) == 1
    code, out, err = ask(
        "--workdir=RUN", "--mode=ranking", f"--prompts={path}", f"--output={answers}"
    )
    assert (
        code == 2
        and "exists; name another file" in err
        and len(answers.read_text().splitlines()) == 1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top_k=5"], "top_k=5 affects sampling only"),
        (["--min_p=0.1"], "min_p=0.1 affects sampling only"),
        (["--seed=1"], "seed=1 affects sampling only"),
        (["--seed=0"], "seed=0 affects sampling only"),
        (["--seed=1", "--num_beams=2"], "seed=1 affects sampling only, and beam search"),
        (["--n=3"], "the same text"),
        (["--n=1", "--temperature=0", "--typical_p=0.5"], "typical_p=0.5"),
        (["--length_penalty=2"], "affects beams only"),
        (["--early_stopping=true"], "affects beams only"),
        (["--max_matching_ngram_size=3"], "guesses none"),
        (["--num_assistant_tokens=3"], "guessed by a draft model"),
        (["--stream", "--json"], "--json prints it at the end"),
        (["--stream", "--n=2", "--temperature=1"], "--stream shows one text"),
        (["--candidates= b"], "for --mode=ranking"),
        (["--scorer=pmi"], "--scorer is for --mode=ranking"),
        (["--normalise=sum"], "--normalise is for --mode=ranking"),
        (["--neutral=a"], "--neutral is for --mode=ranking"),
        (["--guesses=3"], "--guesses is for --mode=fill"),
        (["--mode=fill", "--temperature=1"], "--temperature is for --mode=generative or ranking"),
        (["--mode=fill", "--cache=int8"], "--cache is for"),
        (["--mode=fill", "--stop_words=a"], "--stop_words is for"),
        (
            ["--mode=ranking", "--candidates= b", "--cache=int8"],
            "--cache affects generated texts",
        ),
        (["--mode=ranking", "--candidates= b", "--n=3"], "--n affects generated candidates"),
        (
            ["--mode=ranking", "--candidates= b", "--bad_words=a"],
            "--bad_words affects generated candidates",
        ),
        (["--mode=ranking", "--stream"], "--stream is for --mode=generative"),
        (["--output=x"], "--output is for many"),
        (["--mode=ranking", "--temperature=0", "--n=3"], "the same text"),
        (["--mode=tokens", "--n=2"], "--n is for"),
        (["--prompts=x"], "--prompt is for one prompt"),
        (["--batch=2"], "--batch is for many prompts"),
        (["--suppress_words=zzqx"], "--bad_words forbids them in a row"),
        (["--word_bias=the"], "TEXT:BIAS"),
        (["--set=decode.top_k=5"], "top_k=5 affects sampling only"),
        (["--set=decode.seed=0"], "seed=0 affects sampling only"),
        (
            ["--temperature=1", "--stream", "--set=decode.num_return_sequences=2"],
            "--set=decode.num_return_sequences=2 asks for several",
        ),
        (["--set=decode.num_assistant_tokens=3"], "--set=decode.num_assistant_tokens=3 are"),
        (
            ["--mode=ranking", "--set=decode.num_assistant_tokens=3"],
            "--set=decode.num_assistant_tokens is for --mode=generative",
        ),
        (["--mode=fill", "--set=decode.top_k=5"], "--set is for --mode=generative or ranking"),
        (
            ["--mode=ranking", "--candidates= b", "--set=decode.top_k=5"],
            "--set affects generated candidates",
        ),
        (
            ["--num_beams=2", "--set=decode.num_beams=3"],
            "--num_beams gives 2 and --set=decode.num_beams gives 3",
        ),
        (
            ["--temperature=1", "--n=2", "--set=decode.num_return_sequences=3"],
            "--n gives 2 and --set=decode.num_return_sequences gives 3",
        ),
    ],
)
def test_a_flag_without_effect_raises_an_error(ask, arguments, message):
    code, out, err = ask("--workdir=RUN", "--prompt=a", *arguments)
    assert (
        (code, out) == (2, "")
        and err.startswith("error: ")
        and err.count("\n") == 1
        and message in err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=RUN", "--prompt=a", "--temperature=-1"], "temperature=-1.0"),
        (["--workdir=RUN", "--prompt=a", "--top_p=0"], "top_p=0.0"),
        (["--workdir=RUN", "--prompt=a", "--top_k=many"], "top_k"),
        (
            ["--workdir=RUN", "--prompt=a", "--num_beams=4", "--top_k=5"],
            "top_k=5 affects sampling only",
        ),
        (
            ["--workdir=RUN", "--prompt=a", "--num_beams=2", "--n=3"],
            "num_return_sequences=3 is above num_beams=2",
        ),
        (["--workdir=RUN", "--prompt=a", "--early_stopping=maybe"], "maybe"),
        (["--workdir=RUN", "--prompt=a", "--set=decode.num_beam=2"], "did you mean 'num_beams'"),
        (
            ["--workdir=OTHER", "--prompt=a", "--set=decode.top_k=many"],
            "decode.top_k='many' is not a value of type int",
        ),
        (
            ["--workdir=OTHER", "--prompt=a", "--set=decode.top_p=0"],
            "decode.top_p=0.0 is outside (0, 1]",
        ),
        (
            ["--workdir=RUN", "--prompt=a", "--logit_bias=5"],
            "--logit_bias=5 is not of the form ID:BIAS, as in",
        ),
        (
            ["--workdir=RUN", "--prompt=a", "--logit_bias=5,6:1"],
            "give several in a row to --sequence_bias",
        ),
        (
            ["--workdir=RUN", "--prompt=a", "--bad_words_ids=a"],
            "--bad_words_ids=a is not of the form ID,ID, as in",
        ),
        (
            ["--workdir=RUN", "--prompt=a", "--forced_tokens=5"],
            "--forced_tokens=5 is not of the form POSITION:ID",
        ),
        (["--workdir=RUN", "--prompt=a", "--eos_token_id=99999"], "eos_token_id has token 99999"),
        (["--workdir=RUN", "--prompt=a", "--stop_strings="], "a stop string is empty"),
        (["--workdir=RUN", "--prompt=a", "--unknown=1"], "unknown"),
        (["--workdir=RUN", "--prompt=a", "stray"], "'stray'"),
        (["--workdir=RUN", "--prompt=a", "--input=b"], "--prompt and --input"),
        (["--workdir=RUN", "--input=/no/such/file"], "/no/such/file"),
        (["--workdir=OTHER", "--prompt=a"], "OTHER holds no checkpoint"),
        (["--prompt=a"], "--workdir"),
        (["--workdir=RUN", "--prompt=" + "a b " * 40], "context holds 32"),
        (["--workdir=RUN", "--mode=fill", "--prompt=no blank"], "no mask"),
        (["--workdir=RUN", "--mode=ranking", "--prompt=a", "--candidates="], "empty"),
        (
            ["--workdir=RUN", "--mode=ranking", "--prompt=a", "--scorer=rouge"],
            "unknown scorer 'rouge'",
        ),
        (
            ["--workdir=RUN", "--mode=ranking", "--prompt=a", "--scorer=pmi=x"],
            "--scorer=pmi=x is not of the form NAME",
        ),
        (
            ["--workdir=RUN", "--mode=ranking", "--prompt=a", "--scorer=pmi", "--scorer=pmi=2"],
            "pmi is given twice",
        ),
        (
            ["--workdir=RUN", "--mode=ranking", "--prompt=a", "--utility=bleu"],
            "utility='bleu' acts in mbr alone",
        ),
        (
            ["--workdir=RUN", "--mode=ranking", "--prompt=a", "--candidates= b", "--top_k=5"],
            "--top_k affects generated candidates",
        ),
        (
            ["--workdir=RUN", "--mode=ranking", "--prompt=a", "--scorer=pseudo_log_likelihood"],
            "every stage of this one",
        ),
        (["--workdir=RUN", "--mode=dancing", "--prompt=a"], "dancing"),
        (["--workdir=RUN", "--prompt=a", "--draft=RUN", "--num_beams=2"], "a draft model guesses"),
        (["--workdir=RUN", "--prompt=a", "--draft=OTHER"], "OTHER holds no checkpoint"),
        (
            ["--workdir=RUN", "--prompt=a", "--draft=RUN", "--mode=fill"],
            "--draft is for --mode=generative",
        ),
        (
            ["--workdir=RUN", "--prompt=a", "--prompt_lookup_num_tokens=2", "--num_beams=2"],
            "guesses the next tokens of one sequence",
        ),
        (
            ["--workdir=RUN", "--prompt=a", "--cache=int8", "--num_beams=2"],
            "beam search does not support an int8 cache",
        ),
        (["--workdir=RUN", "--prompt=a", "--weights=int4"], "int4"),
        (["--workdir=RUN"], "standard input is not UTF-8 at byte 1"),
    ],
)
def test_invalid_input_exits_with_2_and_one_line(ask, arguments, message):
    code, out, err = ask(*arguments, stdin=b"a\xff")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_the_script_exits_with_2():
    done = subprocess.run([sys.executable, SCRIPT, "--wrokdir=RUN"], capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
)


@pytest.fixture
def template(tmp_path):
    """The flag that gives a chat template."""
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    return f"--chat_template={path}"


def test_a_conversation_by_standard_input(ask, tokenizer, template):
    """Each line is answered with the turns before it; /reset forgets them."""
    lines = b"the cat\n\nsea\n/reset\nthe cat\r\n"
    code, out, err = ask("--workdir=RUN", "--chat", template, "--max_new_tokens=4", stdin=lines)
    answers = out.split("\n")
    assert code == 0 and len(answers) == 4 and answers[0] == answers[2] and answers[3] == ""
    assert set(err.splitlines()) <= {"(cut off: length)"}
    assert (
        ask("--workdir=RUN", "--chat", template, "--max_new_tokens=4", "--nostream", stdin=lines)[1]
        == out
    )
    system = ["--system=the town", "--max_new_tokens=4"]
    assert ask("--workdir=RUN", "--chat", template, *system, stdin=b"the cat\n")[0] == 0


def test_a_wrong_line_of_a_conversation_is_named(ask, template):
    """The lines before it are answered."""
    arguments = ["--workdir=RUN", "--chat", template, "--max_new_tokens=2"]
    first = ask(*arguments, stdin=b"the cat\n")[1]
    for wrong, message in (
        (b"s\xffea", "line 3 of standard input is not UTF-8 at byte 1; convert it"),
        (b" cat" * 20, "line 3 of standard input: the conversation has"),
    ):
        code, out, err = ask(*arguments, stdin=b"\xef\xbb\xbfthe cat\n\n" + wrong + b"\nsea\n")
        assert (code, out) == (2, first)
        assert err.splitlines()[-1].startswith(f"error: {message}")


def test_a_conversation_is_the_generation_of_its_rendering(ask, tokenizer, template):
    end = tokenizer.special_names[tokenizer.eos_id]
    prompt = f"uthe cat{end}a"
    arguments = ["--workdir=RUN", "--max_new_tokens=4", "--parse_special"]
    whole = ask(*arguments, f"--prompt={prompt}", "--json")[1]
    text = json.loads(whole)["sequences"][0]["text"]
    out = ask("--workdir=RUN", "--chat", template, "--max_new_tokens=4", stdin=b"the cat\n")[1]
    assert text and out == text + "\n"


def test_a_chat_template_that_is_not_one_is_named(ask, tmp_path):
    path = tmp_path / "cut.jinja"
    path.write_text("{% for m in messages %}\n{{ m.content }")
    code, out, err = ask("--workdir=RUN", "--chat", f"--chat_template={path}", stdin=b"a\n")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --chat_template={path}: the chat template is not valid Jinja at")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat"], "no chat template: neither chat_template.jinja nor"),
        (["--chat", "--prompt=x"], "--prompt is for prompts, and --chat reads a conversation"),
        (["--chat", "--mode=fill"], "--chat generates answers, and --mode=fill does not"),
        (["--chat", "--n=2"], "--chat continues one answer, and --n=2 asks for several"),
        (["--system=x", "--prompt=x"], "--system is for a conversation; add --chat"),
        (["--chat", "TEMPLATE"], "the conversation has 34 tokens and the model's context holds 32"),
        (["--chat", "--chat_template=/none.jinja"], "none.jinja"),
    ],
)
def test_conversations_that_cannot_be_held(ask, template, arguments, message):
    arguments = [template if each == "TEMPLATE" else each for each in arguments]
    code, out, err = ask("--workdir=RUN", *arguments, stdin=b"x" * 20 + b" cat" * 10 + b"\n")
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err
