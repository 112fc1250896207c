"""What planning predicts for the programs that benchmarks/card.py times, and the ratio."""

from mtnlg_jax.hardware import CHIPS

# Its figures stand in for a device that is no card of the table, as --small on a CPU.
STAND_IN = "H100"


def seconds_of(text: str, trips=lambda depth: 1) -> tuple[str, float]:
    """Return (card, predicted seconds of one run of the compiled program ``text``); ``trips`` of
    loops that know theirs at run time, by the loops around them."""
    from mtnlg_jax import compat
    from mtnlg_jax.model.kernels import select
    from mtnlg_jax.planning.gpu_costs import GpuCosts
    from mtnlg_jax.planning.hlo import Program
    from mtnlg_jax.planning.timeline import Timeline

    here = select.device() if compat.platform() == "gpu" else None
    card = here if here in CHIPS else STAND_IN
    mesh = {"data": 1}
    return card, Timeline(Program(text), mesh, GpuCosts(CHIPS[card], 1), trips).step.seconds


def beside(text: str, seconds: float) -> dict:
    """Return the prediction for a program that took ``seconds``."""
    card, predicted = seconds_of(text)
    return {
        "predicted_for": card,
        "predicted_milliseconds": 1e3 * predicted,
        "predicted_over_measured": predicted / seconds,
    }


def decode(sizes: dict, held: str, rows: int, positions: int) -> dict:
    """Predict the tokens/s of decoding ``rows`` rows, from the program that writes a chunk of
    tokens behind ``positions`` of them."""
    import jax

    from mtnlg_jax.config import Config, DataConfig, ModelConfig, TrainConfig
    from mtnlg_jax.decode.results import CHUNK
    from mtnlg_jax.parallel.mesh import make_mesh
    from mtnlg_jax.planning import steps

    config = Config(
        model=ModelConfig(**sizes),
        data=DataConfig(sequence_length=positions),
        train=TrainConfig(global_batch_size=rows, micro_batch_size=rows, compute_dtype="bfloat16"),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    weights = "int8" if held == "int8" else None
    text = steps.lower(config, mesh, "decode", weights).compile().as_text() or ""
    card, seconds = seconds_of(text, steps.dynamic_trips(config, mesh, "decode"))
    return {"predicted_for": card, "predicted_tokens_per_second": rows * CHUNK / seconds}
