"""The flags of a command that several processes run together."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("Several processes"):
    DISTRIBUTED = flags.DEFINE_enum(
        "distributed",
        "auto",
        ["auto", "on", "off"],
        "join the processes that SLURM, a TPU pod or GKE started; on: fail where there are none",
    )
    COORDINATOR = flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, the same in every process"
    )
    PROCESSES = flags.DEFINE_integer("processes", None, "number of processes")
    PROCESS_ID = flags.DEFINE_integer("process_id", None, "number of this process, from 0")
    LOCAL_DEVICES = flags.DEFINE_integer(
        "local_devices", None, "number of devices to simulate on the CPU of this process"
    )
    COORDINATOR_TIMEOUT = flags.DEFINE_integer(
        "coordinator_timeout", 300, "seconds to wait for all processes to connect"
    )


def asked() -> bool:
    """Return whether a flag asks for other processes or devices than a single process has."""
    given = (COORDINATOR, PROCESSES, PROCESS_ID, LOCAL_DEVICES)
    return any(flag.value is not None for flag in given) or DISTRIBUTED.value == "on"


def start(heartbeat_seconds: int) -> None:
    """Join the other processes, if there are any; see `train.processes.start`."""
    from mtnlg_jax.train import processes

    processes.start(
        COORDINATOR.value,
        PROCESSES.value,
        PROCESS_ID.value,
        heartbeat_seconds,
        LOCAL_DEVICES.value,
        DISTRIBUTED.value,
        COORDINATOR_TIMEOUT.value,
    )
