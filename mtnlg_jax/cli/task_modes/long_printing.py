"""Print how an answer to a long input was made."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtnlg_jax.tasks.answers import Answer
    from mtnlg_jax.tasks.work import Comparison, Work


def print_work(answer: "Answer") -> None:
    """Print the votes, citations, terms and chrF of an answer, and its calls on standard error."""
    work = answer.work
    if work is None:
        return
    _print_opinions(work)
    _print_sentences(work)
    for term in work.terms:
        if term.missed:
            missed = ", ".join(map(str, term.missed))
            print(
                f"(glossary: {term.source!r} is not {term.target!r} in {term.asked - term.honoured}"
                f" of {term.asked} sentence groups: paragraphs {missed})"
            )
    for comparison in work.comparisons:
        _print_comparison(comparison)
    for note in work.notes:
        print(f"note: {note}", file=sys.stderr)
    if work.method != "whole":
        print(
            f"({work.method}: {work.parts:,} parts, {work.calls:,} calls of the model, "
            f"{work.tokens_in:,} tokens read, {work.tokens_out:,} written)",
            file=sys.stderr,
        )


def _print_opinions(work: "Work") -> None:
    if len(work.votes) > 1:
        print("parts, by weight in the vote:")
        for vote in sorted(work.votes, key=lambda vote: -vote.weight)[:5]:
            part = vote.part
            print(
                f"  {vote.weight:8.2f}  {vote.label} {vote.probability:.1%}  characters "
                f"{part.start:,} to {part.end:,}, {part.tokens} tokens"
            )
    for aspect in work.aspects:
        if aspect.label:
            print(
                f"{aspect.name}: {aspect.label} {aspect.probability:.1%}, {len(aspect.votes)} parts"
            )
        else:
            print(f"{aspect.name}: not mentioned")


def _print_sentences(work: "Work") -> None:
    labeled = [sentence for sentence in work.sentences if sentence.label]
    for sentence in labeled:
        where = f"[{sentence.passage}]" if sentence.passage else "no passage"
        probability = sentence.probabilities.get(sentence.label)
        shown = "" if probability is None else f" {probability:.1%}"
        print(f"  {sentence.label}{shown}, {where}: {sentence.text}")
    unsupported = [each.text for each in labeled if each.label != "supported"]
    if labeled:
        print(f"{len(unsupported)} of {len(labeled)} sentences are not supported by a passage")


def _print_comparison(comparison: "Comparison") -> None:
    scores = [each.chrf for each in comparison.paragraphs]
    print(
        f"chrF {comparison.chrf:.2f} against the {comparison.against}: {len(scores)} aligned "
        f"paragraphs, {min(scores):.1f} to {max(scores):.1f}"
    )
    if comparison.against != "reference":
        print("(round trip: it says what survives both directions, not how good one is)")
