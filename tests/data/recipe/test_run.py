"""Run the data recipe from end to end on real prose with planted faults, and with interruptions."""

import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mtnlg_jax import storage
from mtnlg_jax.config import Config, override
from mtnlg_jax.data.batches import HeldOut
from mtnlg_jax.data.filter.clean import CleanConfig, clean
from mtnlg_jax.data.held_out_sources import HeldOutSources
from mtnlg_jax.data.prepare import describe
from mtnlg_jax.data.read.builtin_corpus import embedded_documents
from mtnlg_jax.data.recipe import corpus
from mtnlg_jax.data.recipe.report import render
from mtnlg_jax.data.recipe.run import make
from mtnlg_jax.data.recipe.settings import (
    DecontaminationConfig,
    QualityConfig,
    Recipe,
    Source,
    load_recipe,
)
from mtnlg_jax.data.recipe.stages import in_processes, on_ray
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.train.inputs import load_data

ROOT = Path(__file__).resolve().parents[3]
LEAK = (
    "A traveller who came from the northern harbour told them that seventeen lanterns had been lit "
    "on the old lighthouse before the storm began in earnest."
)
NOTICE = (
    "This whole paragraph is a notice which the publisher put at the end of every single page "
    "of the manual, so that nobody could ever miss it, and so it comes again and again."
)
FRENCH = (
    "Le petit chat est assis sur la table et regarde par la fenêtre les oiseaux "
    "qui chantent dans le jardin. "
    "Il fait très beau ce matin et toute la famille prend le petit déjeuner sur la terrasse. "
) * 6


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Write (folder of text, folder of test sets) with two sources.

    The second has a near-duplicate of a document of the first. There are also a notice in three
    documents, a leak, an address, a French text and a text that is too short.
    """
    root = tmp_path_factory.mktemp("text")
    tests = tmp_path_factory.mktemp("tests")
    texts = [document.text for document in itertools.islice(embedded_documents(), 40)]
    texts = [text for text in texts if clean(text, CleanConfig()).text == text]
    half = len(texts) // 2
    books = texts[:half]
    pages = texts[half:]
    for number in (1, 2, 3):
        pages[number] += f"\n\n{NOTICE}\n"
    middle = books[5].index(". ", len(books[5]) // 2) + 2
    books[5] = books[5][:middle] + LEAK + " " + books[5][middle:]
    books[6] += "\nWrite to jane.doe@example.com for more of it.\n"
    pages += [books[0].replace(" the ", " teh ", 1), FRENCH, "Too short."]
    (root / "books").mkdir()
    (root / "pages").mkdir()
    for number, text in enumerate(books):
        (root / "books" / f"{number:02d}.txt").write_text(text)
    (root / "pages" / "web.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in pages)
    )
    (tests / "cloze.jsonl").write_text(json.dumps({"context": LEAK, "answer": "earnest"}) + "\n")
    return root, tests


@pytest.fixture(scope="module")
def recipe(planted):
    return Recipe(
        name="planted",
        sources=(Source("books", ("books",), priority=1), Source("pages", ("pages",))),
        clean=CleanConfig(languages=("en",)),
        vocab_size=600,
        shard_bytes=20_000,
        decontamination=DecontaminationConfig(test_sets=(str(planted[1]),)),
    )


@pytest.fixture(scope="module")
def one():
    return functools.partial(in_processes, 1)


@pytest.fixture(scope="module")
def made(planted, recipe, one, tmp_path_factory):
    """Return (output, info) of an uninterrupted run in one process."""
    output = tmp_path_factory.mktemp("made") / "out"
    return output, make(recipe, planted[0], output, engine=one(), progress=False)


def _texts(output):
    """Return {location: text} decoded from the training and held-out parts."""
    tokenizer = load_tokenizer(output / "tokenizer")
    found = []
    for folder in [*sorted((output / "sources").glob("*/train")), output / "heldout"]:
        tokens = open_tokens(folder)
        offsets = [0]
        for number in range(tokens.documents):
            offsets.append(int(tokens.document_offsets[number + 1]))
            ids = tokens.read(offsets[-2], offsets[-1])
            assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
            found.append(tokenizer.decode(ids))
    return found


def _digests(output):
    """Return sha256 of every file except the lock and the record of the input's location."""
    return {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name not in (".lock", "recipe.json")
    }


def test_only_planted_faults_are_found(made, planted):
    output, info = made
    joined = "\n".join(_texts(output))
    stages = {stage["name"]: stage for stage in info["stages"]}
    assert joined.count(NOTICE) == 1
    assert "traveller who came from the northern" not in joined
    assert " teh " not in joined  # the copy of the source of lower priority went
    assert "jane.doe" not in joined and "<EMAIL>" in joined
    assert "petit chat" not in joined and "Too short." not in joined
    assert stages["near-duplicates"]["dropped"] == {"near-duplicate of another document": 1}
    assert stages["repeated paragraphs"]["changed"] == {"paragraphs that came before": 2}
    assert stages["test sets"]["changed"] == {"holds text of a test set": 1}
    assert stages["clean"]["dropped"] == {"language": 1, "too_short": 1}
    assert stages["clean"]["changed"] == {"email": 1}
    before = stages["read"]["bytes"][1]
    after = stages["test sets"]["bytes"][1]
    assert (
        0 < before - after < len(FRENCH) + 2 * len(NOTICE) + 15_000
    )  # the copy, and 200 characters beside the leak


def test_counts_agree_from_stage_to_stage(made):
    output, info = made
    for earlier, later in itertools.pairwise(info["stages"]):
        assert later["documents"][0] == earlier["documents"][1]
        assert later["bytes"][0] == earlier["bytes"][1]
        assert sum(later["lengths"]) == later["documents"][1]
    prepared = json.loads((output / "prepared.json").read_text())
    size = prepared["train"]["bytes"] + prepared["heldout"]["bytes"]
    assert size == info["stages"][-1]["bytes"][1]
    assert 0.005 < prepared["heldout"]["bytes"] / size < 0.1
    assert sum(weight for _, weight in prepared["sources"]) == pytest.approx(1)
    assert sum(row["epochs"] * row["tokens"] for row in info["blend"]) == pytest.approx(
        info["train_tokens"]
    )


def test_the_report_needs_no_network(made):
    page = (made[0] / "report.html").read_text()
    for wanted in (
        "near-duplicate of another document",
        "holds text of a test set",
        "web.jsonl:",
        "<img alt=",
        "Write to &lt;EMAIL&gt; for more",
        made[1]["outputs"]["all"],
    ):
        assert wanted in page
    assert "http" not in page and "jane.doe" not in page
    assert page == render(json.loads((made[0] / "report.json").read_text()))
    assert "near-duplicates" in describe(made[1])


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_number_of_processes_does_not_matter(made, planted, recipe, tmp_path, count):
    make(recipe, planted[0], tmp_path / "out", engine=in_processes(count), progress=False)
    assert _digests(tmp_path / "out") == _digests(made[0])


def test_the_order_of_input_does_not_matter(made, planted, recipe, one, tmp_path):
    files = sorted((planted[0] / "books").iterdir())
    pages = Source("pages", (str(planted[0] / "pages"),))
    shuffled = [str(file) for file in random.Random(1).sample(files, len(files))]
    other = dataclasses.replace(
        recipe, sources=(pages, Source("books", tuple(shuffled), priority=1))
    )
    make(other, None, tmp_path / "out", engine=one(), progress=False)
    ours = _digests(tmp_path / "out")
    theirs = _digests(made[0])
    assert {name for name in theirs if ours.get(name) != theirs[name]} <= {
        "report.json",
        "report.html",
    }


class _Stopped(Exception):
    pass


def _stopping(after):
    """Return an engine that fails after a number of tasks, and counts the finished ones."""
    done = []

    @contextmanager
    def engine():
        def run(function, tasks):
            for number, task in enumerate(tasks):
                if len(done) == after:
                    raise _Stopped
                done.append(task.name)
                yield number, function(task)

        yield run

    return engine(), done


def test_a_run_stopped_after_each_task_resumes(made, planted, recipe, tmp_path):
    """Stop repeatedly with a few more finished tasks each time; no task is done twice."""
    everything = []
    rounds = 0
    while True:
        engine, done = _stopping(5)
        try:
            make(recipe, planted[0], tmp_path / "out", engine=engine, progress=False)
            break
        except _Stopped:
            assert not (tmp_path / "out" / "prepared.json").exists()
            rounds += 1
        finally:
            everything += done
    assert rounds > 5 and len(everything) == len(set(everything))
    assert _digests(tmp_path / "out") == _digests(made[0])


def test_a_full_disk_is_reported_and_finished_tasks_are_kept(
    made, planted, recipe, one, tmp_path, monkeypatch
):
    write = storage.write_file
    written = []

    def full(location, name, content):
        if len(written) == 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(name)
        write(location, name, content)

    monkeypatch.setattr(storage, "write_file", full)
    with pytest.raises(OSError, match="No space left.*the same command continues"):
        make(recipe, planted[0], tmp_path / "out", engine=one(), progress=False)
    monkeypatch.undo()
    make(recipe, planted[0], tmp_path / "out", engine=one(), progress=False)
    assert _digests(tmp_path / "out") == _digests(made[0])


def _command(planted, output, *more):
    return [
        sys.executable,
        ROOT / "launch/prepare_data.py",
        f"--config={ROOT}/configs/data/english.py",
        f"--input={planted[0]}",
        f"--test_sets={planted[1]}",
        f"--output={output}",
        "--vocab_size=600",
        "--set=shard_bytes=20000",
        "--processes=2",
        *more,
    ]


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_resumes(planted, tmp_path, kills):
    def run(output, seconds=None):
        process = subprocess.Popen(
            _command(planted, output),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=seconds)
            assert process.returncode == 0, said
            return said
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    begin = time.perf_counter()
    said = run(tmp_path / "whole")
    assert "report.html" in said and "epochs" in said
    whole = time.perf_counter() - begin
    for _ in range(kills):
        run(tmp_path / "killed", random.uniform(0.4, 0.9) * whole)
    run(tmp_path / "killed")
    assert _digests(tmp_path / "killed") == _digests(tmp_path / "whole")


def test_a_changed_input_is_detected(planted, recipe, one, tmp_path):
    root = tmp_path / "text"
    subprocess.run(["cp", "-r", planted[0], root], check=True)
    make(recipe, root, tmp_path / "out", engine=one(), progress=False)
    with open(root / "books" / "03.txt", "a") as file:
        file.write("\nA sentence that came later than all the others did.\n")
    with pytest.raises(
        FileExistsError, match=r"begun with other input: books/03.txt .*--overwrite"
    ):
        make(recipe, root, tmp_path / "out", engine=one(), progress=False)
    engine, done = _stopping(None)
    make(recipe, root, tmp_path / "out", engine=engine, overwrite=True, progress=False)
    read = [name for name in done if name.startswith("stages/read/")]
    assert len(read) == 1 and "A sentence that came later" in "\n".join(_texts(tmp_path / "out"))


def test_changed_settings_repeat_only_dependent_stages(made, planted, recipe, tmp_path):
    subprocess.run(["cp", "-r", made[0], tmp_path / "out"], check=True)
    other = dataclasses.replace(recipe, vocab_size=500)
    with pytest.raises(FileExistsError, match="vocab_size was 600 and is 500"):
        make(other, planted[0], tmp_path / "out", progress=False)
    engine, done = _stopping(None)
    make(other, planted[0], tmp_path / "out", engine=engine, overwrite=True, progress=False)
    assert {name.split("/")[1] for name in done} <= {"tokenizer", "encode", "arrays"}
    engine, done = _stopping(None)
    make(other, planted[0], tmp_path / "out", engine=engine, progress=False)
    assert not done


def test_a_run_reads_every_source_by_its_weight(made):
    output, info = made
    config = override(Config(), f"data.path={output}", "data.sequence_length=64")
    data = load_data(config)
    assert data.tokenizer.fingerprint == info["tokenizer"]["fingerprint"]
    [(held_out, share)] = data.held_out
    assert len(held_out) == info["tokens"]["heldout"] and share == 1
    # The held-out text says whose it is.
    names = [row["name"] for row in info["blend"]]
    spans = held_out.meta["sources"]
    assert {name for name, _ in spans} == set(names)
    assert sum(tokens for _, tokens in spans) == len(held_out)
    sources = HeldOutSources(HeldOut(data.held_out, 64, 32), 64)
    assert sorted(sources.names) == sorted(names)
    samples = 1024
    drawn, _ = data.stages[0]._blend(np.arange(samples))
    assert np.bincount(drawn) / samples == pytest.approx(
        [row["weight"] for row in info["blend"]], abs=0.001
    )


def _small(folder, **texts):
    """Write a folder of sources, each a file of JSON lines."""
    for name, lines in texts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "a.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in lines)
        )
    return folder


def _sentences(seed, count):
    rng = random.Random(seed)
    return " ".join(
        f"Number {rng.randrange(10**9)} came before {rng.randrange(10**9)}." for _ in range(count)
    )


PLAIN = Recipe(stages=("tokens",), vocab_size=300)


def test_a_failed_run_invalidates_older_records(one, tmp_path):
    """A run with other settings overwrote files that an older record lists."""
    root = _small(tmp_path / "text", a=[_sentences(seed, 9) for seed in range(10)])
    with open(root / "a" / "a.jsonl", "a") as file:
        file.write('{"text": "cut sh')
    first = dataclasses.replace(PLAIN, on_error="skip", shard_bytes=900)
    make(first, root, tmp_path / "out", engine=one(), progress=False)
    texts = sorted(_texts(tmp_path / "out"))
    with pytest.raises(ValueError, match="not valid JSON"):
        make(
            dataclasses.replace(PLAIN, shard_bytes=500),
            root,
            tmp_path / "out",
            engine=one(),
            overwrite=True,
            progress=False,
        )
    make(first, root, tmp_path / "out", engine=one(), overwrite=True, progress=False)
    assert sorted(_texts(tmp_path / "out")) == texts


def test_another_tokenizer_hides_the_data_until_it_is_complete(
    one, tmp_path, monkeypatch, gpt2_files
):
    root = _small(tmp_path / "text", a=[_sentences(seed, 40) for seed in range(10)])
    make(PLAIN, root, tmp_path / "out", engine=one(), progress=False)
    other = dataclasses.replace(PLAIN, tokenizer=str(gpt2_files))
    engine, _ = _stopping(2)
    with pytest.raises(_Stopped):
        make(other, root, tmp_path / "out", engine=engine, overwrite=True, progress=False)
    assert not (tmp_path / "out" / "prepared.json").exists()
    info = make(other, root, tmp_path / "out", engine=one(), overwrite=True, progress=False)
    assert (
        info["tokenizer"]["kind"]
        == load_tokenizer(tmp_path / "out" / "tokenizer").kind
        == "byte-level BPE"
    )


def test_a_remote_output_is_the_same_and_keeps_other_files(one, tmp_path):
    root = _small(tmp_path / "text", a=[_sentences(seed, 40) for seed in range(10)])
    here = make(PLAIN, root, tmp_path / "out", engine=one(), progress=False)
    there = make(PLAIN, root, "memory://recipe/out", engine=one(), progress=False)
    assert there["outputs"] == here["outputs"]
    storage.write_file("memory://recipe/other", "precious.txt", b"mine")
    with pytest.raises(FileExistsError, match=r"no recipe\.json"):
        make(PLAIN, root, "memory://recipe/other", engine=one(), progress=False)


def test_workers_end_with_the_process_that_started_them(tmp_path):
    script = tmp_path / "start.py"
    script.write_text("""
import os, sys, time
from mtnlg_jax.data.recipe.stages import in_processes
def work(number):
    time.sleep(3 * number)
    open(f"{sys.argv[1]}/{number}", "w").close()
if __name__ == "__main__":
    with in_processes(2) as engine:
        for number, _ in engine(work, [0, 1, 2]):
            os.kill(os.getpid(), 9)
""")
    subprocess.run([sys.executable, script, tmp_path], timeout=60)
    time.sleep(4)
    assert (tmp_path / "0").exists() and not (tmp_path / "2").exists()


def test_training_and_held_out_texts_are_disjoint(one, tmp_path):
    long = [_sentences(seed, 400) for seed in range(20)]
    root = _small(
        tmp_path / "text", big=long + [_sentences(seed, 1) for seed in range(100, 1100)], small=long
    )
    make(
        dataclasses.replace(PLAIN, heldout=0.1),
        root,
        tmp_path / "out",
        engine=one(),
        progress=False,
    )
    texts = _texts(tmp_path / "out")
    count = open_tokens(tmp_path / "out" / "heldout").documents
    assert count and not set(texts[-count:]) & set(texts[:-count])


def test_a_repeated_paragraph_is_kept_once(one, tmp_path):
    p, q, r, s = (_sentences(seed, 3) for seed in range(4))
    root = _small(
        tmp_path / "text", a=[f"{q}\n\n{r}", f"{p}\n\n{q}", f"{p}\n\n{s}", "Short.", q + "\n\nEnd."]
    )
    info = make(
        Recipe(stages=("paragraphs", "tokens"), vocab_size=300, heldout=0.0),
        root,
        tmp_path / "out",
        engine=one(),
        progress=False,
    )
    joined = "\n\n".join(_texts(tmp_path / "out"))
    assert [joined.count(paragraph) for paragraph in (p, q, r, s)] == [1, 1, 1, 1]
    assert info["stages"][-1]["dropped"] == {"fewer than 200 characters left": 1}


def test_the_number_of_key_partitions_does_not_matter(
    made, planted, recipe, one, tmp_path, monkeypatch
):
    monkeypatch.setattr(corpus, "_KEYS_AT_ONCE", 7)
    make(recipe, planted[0], tmp_path / "out", engine=one(), progress=False)
    same = {
        name: digest for name, digest in _digests(made[0]).items() if not name.startswith("stages")
    }
    assert same.items() <= _digests(tmp_path / "out").items()


def test_changed_samples_and_test_sets_are_reported(planted, one, tmp_path):
    root = _small(tmp_path / "text", a=[_sentences(seed, 40) for seed in range(30)])
    samples = _small(
        tmp_path / "samples",
        good=[_sentences(seed, 4) for seed in range(40)],
        bad=["spam " * seed for seed in range(5, 30)],
    )
    (samples / "bad" / "b.jsonl").write_text(
        (samples / "good" / "a.jsonl").read_text().replace("Number", "Nombre")
    )
    judged = Recipe(
        stages=("quality",),
        quality=QualityConfig((str(samples / "good"),), (str(samples / "bad"),)),
    )
    said = make(judged, root, tmp_path / "out", engine=one(), progress=False)["stages"][-1]["note"]
    os.rename(samples / "bad" / "b.jsonl", samples / "good" / "b.jsonl")
    with pytest.raises(FileExistsError, match="other input: .*b.jsonl"):
        make(judged, root, tmp_path / "out", engine=one(), progress=False)
    again = make(judged, root, tmp_path / "out", engine=one(), overwrite=True, progress=False)[
        "stages"
    ][-1]["note"]
    assert "40 good and 65 bad" in said and "80 good and 25 bad" in again


def test_missing_or_clashing_sources_are_reported(one, tmp_path):
    root = _small(tmp_path / "text", a=[_sentences(1, 40)], b=[" \n"])
    weighted = dataclasses.replace(
        PLAIN, sources=(Source("a", ("a",), 0.5), Source("b", ("b",), 0.5))
    )
    with pytest.raises(ValueError, match=r"'b' has the weight 0.5, and no text"):
        make(weighted, root, tmp_path / "out", engine=one(), progress=False)
    os.rename(root / "a", root / "a b")
    os.rename(root / "b", root / "a_b")
    with pytest.raises(ValueError, match="would be the source 'a_b'"):
        make(PLAIN, root, tmp_path / "other", engine=one(), progress=False)
    with pytest.raises(ValueError, match="is inside the input"):
        make(PLAIN, root, root / "out", engine=one(), progress=False)


def test_selected_stages_write_text(planted, recipe, one, tmp_path):
    only = dataclasses.replace(recipe, stages=("duplicates",))
    info = make(only, planted[0], tmp_path / "out", engine=one(), progress=False)
    assert [stage["name"] for stage in info["stages"]] == ["read", "near-duplicates"]
    assert not (tmp_path / "out" / "prepared.json").exists()
    assert list((tmp_path / "out" / "stages" / "duplicates").glob("*.parquet"))


def test_a_classifier_removes_texts_like_the_bad_samples(planted, recipe, one, tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text(
        "".join(
            json.dumps({"text": text}) + "\n"
            for text in (
                path.read_text()[cut : cut + 300]
                for path in sorted((planted[0] / "books").iterdir())
                for cut in (0, 300)
            )
        )
    )
    words = "buy cheap pills now click here win casino bonus free offer".split()
    spam = [" ".join(random.Random(number).choices(words, k=90)) for number in range(30)]
    (tmp_path / "bad.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in spam[:20])
    )
    (tmp_path / "text").mkdir()
    texts = [path.read_text()[600:] for path in sorted((planted[0] / "books").iterdir())]
    (tmp_path / "text" / "all.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts + spam[20:])
    )
    judged = Recipe(
        stages=("quality",), quality=QualityConfig((str(good),), (str(tmp_path / "bad.jsonl"),))
    )
    info = make(judged, tmp_path / "text", tmp_path / "out", engine=one(), progress=False)
    stage = info["stages"][-1]
    assert stage["dropped"] == {"by its score, and by chance": pytest.approx(10, abs=2)}
    assert stage["examples"]["near the border"]


@pytest.mark.slow
def test_the_result_on_a_ray_cluster_is_the_same(made, planted, recipe, tmp_path):
    pytest.importorskip("ray")
    make(recipe, planted[0], tmp_path / "out", engine=on_ray(), progress=False)
    assert _digests(tmp_path / "out") == _digests(made[0])


@pytest.mark.parametrize("name", ["english", "chinese", "mixed", "mtnlg"])
def test_configs_load(name):
    found = load_recipe(str(ROOT / f"configs/data/{name}.py"))
    assert found.name == name


def test_the_recipe_has_the_blend_of_the_paper():
    found = load_recipe(str(ROOT / "configs/data/mtnlg.py"))
    assert len(found.sources) == 15
    assert sum(source.weight for source in found.sources) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ("wash",)}, "unknown stage 'wash'"),
        ({"stages": ("duplicates", "clean")}, "in this order: clean,duplicates"),
        ({"quality": QualityConfig(alpha=0.0)}, "alpha=0.0"),
        ({"tokenizer": "nowhere"}, "nowhere"),
        ({"heldout": 0.7}, "heldout=0.7"),
        ({"sources": (Source("a", ("books",), -1.0),)}, "weight=-1.0"),
        (
            {"sources": (Source("a", ("books",), 0.0), Source("b", ("pages",), 0.0))},
            "all sources are 0",
        ),
        ({"sources": (Source("a", ("books",), 1.0), Source("b", ("pages",)))}, "'b' has no weight"),
        (
            {"sources": (Source("a", ("books",)), Source("a", ("pages",)))},
            "two sources have the name 'a'",
        ),
        ({"sources": (Source("a/b", ("books",)),)}, "'a/b'"),
        ({"sources": (Source("a", ()),)}, "no paths"),
        ({"sources": (Source("a", ("nowhere",)),)}, "nowhere"),
        ({"quality": QualityConfig(good=("x",))}, "go together"),
        ({"decontamination": DecontaminationConfig(test_sets=("nowhere.jsonl",))}, "nowhere.jsonl"),
        ({"shard_bytes": 0}, "shard_bytes=0"),
        (
            {"sources": (Source("a", ("books",), settings=("clean.min_token=1",)),)},
            "did you mean 'min_tokens'",
        ),
        (
            {"sources": (Source("a", ("books",), settings=("vocab_size=9",)),)},
            "only those of clean differ by source",
        ),
        (
            {"sources": (Source("a", ("books",), settings=("clean.prose_rules=maybe",)),)},
            "source 'a'.*not a value",
        ),
        (
            {"sources": (Source("a", ("books",), skip_stages=("tokens",)),)},
            "holds 'tokens'; choose among clean",
        ),
    ],
)
def test_invalid_recipes_raise_before_any_work(planted, recipe, one, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(
            dataclasses.replace(recipe, **change),
            planted[0],
            tmp_path / "out",
            engine=one(),
            progress=False,
        )
    assert not (tmp_path / "out" / "stages").exists()


def test_a_test_set_equal_to_the_corpus_is_reported(planted, recipe, one, tmp_path):
    rows = [{"text": path.read_text()} for path in sorted((planted[0] / "books").iterdir())]
    rows += [
        json.loads(line) for line in (planted[0] / "pages" / "web.jsonl").read_text().splitlines()
    ]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = dataclasses.replace(
        recipe, decontamination=DecontaminationConfig(test_sets=(str(tmp_path / "all.jsonl"),))
    )
    with pytest.raises(ValueError, match="is one of the test sets the corpus itself"):
        make(own, planted[0], tmp_path / "out", engine=one(), progress=False)


def test_a_folder_of_other_files_is_not_changed(planted, recipe, one, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"no recipe\.json"):
        make(recipe, planted[0], tmp_path, engine=one(), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_errors_of_the_command_are_one_line(planted, tmp_path):
    for more, words in (
        ("--skip_sources=nobody", "nobody"),
        ("--stages=wash", "'wash'"),
        ("--answer=x", "pairs"),
    ):
        result = subprocess.run(
            _command(planted, tmp_path / "out", more), capture_output=True, text=True
        )
        assert (
            result.returncode == 2
            and words in result.stderr
            and len(result.stderr.strip().splitlines()) == 1
        )
