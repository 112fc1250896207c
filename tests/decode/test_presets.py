"""Presets: which settings they decide, and launch/generate.py --preset."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from mtnlg_jax.config import DecodeConfig, validate_decode
from mtnlg_jax.decode.presets import DECIDED, PRESETS, with_preset
from mtnlg_jax.decode.scorers import weights_of

# What a preset leaves as it is.
KEPT = (
    *("max_new_tokens", "min_new_tokens", "min_length", "max_time", "seed"),
    *("logit_bias", "sequence_bias", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "forced_tokens", "eos_token_id"),
    *("stop_token_ids", "stop_sequences", "stop_strings", "num_assistant_tokens"),
)


def test_every_setting_is_decided_or_kept():
    names = {field.name for field in dataclasses.fields(DecodeConfig)}
    assert set(DECIDED) | set(KEPT) == names and not set(DECIDED) & set(KEPT)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_replaces_other_choices(name):
    base = DecodeConfig(
        temperature=0.7, top_k=50, repetition_penalty=1.2, max_new_tokens=9, stop_strings=("a",)
    )
    decode = with_preset(base, name)
    validate_decode(decode)
    expected = DecodeConfig(max_new_tokens=9, stop_strings=("a",))
    assert decode == dataclasses.replace(expected, **PRESETS[name].decode)
    if PRESETS[name].scorers:
        weights_of(PRESETS[name].scorers)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="unknown preset='better'; choose one of greedy, nucleus"):
        with_preset(DecodeConfig(), "better")


@pytest.fixture(scope="module")
def ask(answering, tokenizer, tmp_path_factory):
    """Return a function (*arguments, stdin bytes) -> (exit code, standard output, standard
    error)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return answering("generate.py", folder, positions=32, new_tokens=6)


def test_flags_override_a_preset(ask):
    given = ["--workdir=RUN", "--prompt=The cat"]
    code, contrastive, err = ask(*given, "--preset=contrastive")
    assert (code, err) == (0, "")
    assert ask(*given, "--penalty_alpha=0.6", "--top_k=4")[1] == contrastive
    greedy = ask(*given)[1]
    assert ask(*given, "--preset=greedy")[1] == greedy
    # At temperature 0 the limits of sampling of the preset wait, and DRY stays.
    assert ask(*given, "--preset=nucleus", "--temperature=0")[1] == greedy
    drawn = ask(*given, "--preset=nucleus", "--seed=5")[1]
    assert ask(*given, "--temperature=1", "--set=decode.top_p=0.95", "--seed=5")[1] == drawn


def test_the_best_of_several_texts_is_written(ask, tmp_path):
    given = ["--workdir=RUN", "--prompt=The cat", "--preset=best", "--n=5", "--seed=2"]
    record = json.loads(ask(*given, "--json")[1])
    ranking = record["ranking"]
    assert record["text"] == ranking["candidates"][0]["text"]
    assert ranking["size"] == 5 and ranking["weights"] == dict(PRESETS["best"].scorers)
    parts = ranking["candidates"][0]["parts"]
    assert {"logprob", "diversity", "diversity.distinct_2", "coherence.shuffled"} <= set(parts)
    assert ask(*given)[1] == f"The cat{record['text']}\n"
    # As one of many prompts, and as a ranking.
    (tmp_path / "prompts.txt").write_text("The cat\nThe dog\n")
    lines = ask(given[0], f"--prompts={tmp_path / 'prompts.txt'}", *given[2:])[1].splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["The cat", "The dog"]
    assert json.loads(lines[0])["text"] == record["text"]
    ranked = json.loads(ask(*given, "--mode=ranking", "--json")[1])
    assert ranked["candidates"] == ranking["candidates"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--preset=best", "--stream"], "--stream is for a text as it is written"),
        (["--preset=best", "--chat"], "--chat is for a text as it is written"),
        (["--preset=mirostat", "--top_k=3"], "top_k=3 limits sampling, and mirostat_tau=5.0"),
        # Without its method a preset would be another one.
        (
            ["--preset=contrastive", "--temperature=0.8"],
            "contrastive search, which does not sample",
        ),
        (["--preset=contrastive", "--num_beams=2"], "compares candidates for one sequence"),
        (["--preset=mirostat", "--num_beams=2"], "is steered by the tokens of one sequence"),
        (["--preset=mirostat", "--temperature=0"], "mirostat_tau=5.0 affects sampling only"),
        (["--preset=nucleus", "--mode=fill"], "--preset is for --mode=generative or ranking"),
        (
            ["--preset=nucleus", "--mode=ranking", "--candidates=a"],
            "--preset affects generated candidates",
        ),
        (["--dry_base=2"], "dry_base=2.0 is for DRY"),
        (["--penalty_alpha=0.6"], "penalty_alpha=0.6 compares the top_k most likely tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(ask, given, message):
    prompt = [] if "--chat" in given else ["--prompt=The cat"]
    code, out, err = ask("--workdir=RUN", *prompt, *given)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_candidates_of_every_row_leave_a_preset_nothing_to_write(ask, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "The", "candidates": [" cat", " dog"]}\n')
    given = ["--workdir=RUN", f"--prompts={path}", "--mode=ranking", "--preset=nucleus"]
    code, out, err = ask(*given)
    assert (code, out) == (2, "")
    assert f"--preset affects generated candidates, and each line of {path} has its own" in err


def test_the_page_shows_the_figures_of_the_benchmark():
    root = Path(__file__).resolve().parents[2]
    report = json.loads((root / "benchmarks/results/presets.json").read_text())
    table = runpy.run_path(str(root / "benchmarks/presets.py"))["table"](report)
    assert table in (root / "docs/presets.md").read_text()
    assert {*PRESETS, "real text"} == set(report["results"])
    decided = {name: dict(PRESETS[name].decode) for name in PRESETS}
    assert report["presets"] == decided, "a preset has changed; run the benchmark again"
