"""--profile: facts, samples of style and preferences of a person in the prompts."""

from typing import TYPE_CHECKING

from absl import flags

from mtnlg_jax import command

if TYPE_CHECKING:
    from mtnlg_jax.tasks.answers import Answer
    from mtnlg_jax.tasks.profile import Profile

with command.flag_group("A person's profile"):
    PROFILE = command.define_path(
        "profile",
        None,
        "file of facts, samples of style and preferences (JSON, JSON lines or Markdown), of which "
        "each prompt shows what fits its input",
    )
    SHARE = flags.DEFINE_float(
        "profile_share", 0.25, "share of the model's context that the profile may take"
    )


def check(model_used: bool) -> None:
    """Raise ValueError if --profile or --profile_share has no effect."""
    if SHARE.present and not PROFILE.value:
        raise ValueError("--profile_share is for --profile=FILE; give both or neither")
    if PROFILE.value and not model_used:
        raise ValueError(
            "--profile goes into the prompts of a model, and --score and --make_pairs ask none; "
            "leave it out"
        )


def read() -> "Profile | None":
    """Return the profile of --profile; None without."""
    from mtnlg_jax.tasks.profile import read_profile

    return read_profile(PROFILE.value, SHARE.value) if PROFILE.value else None


def describe(profile: "Profile", answer: "Answer") -> str:
    """Return which entries of the profile a prompt has shown."""
    shown = ", ".join(str(each.number) for each in answer.profile) or "none"
    count = len(answer.profile)
    return f"(the prompt shows {count} of {len(profile.entries)} entries of the profile: {shown})"
