"""Flags of launch/task.py --task=write."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("Writing long texts (--task=write)"):
    WORDS = flags.DEFINE_integer(
        "words", 500, "words of the text, without headings; in Chinese, characters", lower_bound=1
    )
    OUTLINE = command.define_path(
        "outline",
        "auto",
        "file of the headings, one a line or JSON; auto: the model writes the outline",
    )
    CANDIDATES = flags.DEFINE_integer(
        "candidates",
        4,
        "continuations to rank for each piece, and outlines to rank; 1: show the text token by "
        "token",
        lower_bound=1,
    )
    SCORE_WEIGHTS = flags.DEFINE_list(
        "score_weights",
        [],
        "PART=WEIGHT,PART=WEIGHT for the parts logprob (default 1), repetition (2), span (1), "
        "outline (0.5) and coherence (0) of a candidate's score",
    )
