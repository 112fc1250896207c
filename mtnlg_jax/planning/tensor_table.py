"""Report how every tensor of a config lies on its mesh, and the memory of a device in a step."""

import dataclasses

from mtnlg_jax.config import Config, validate
from mtnlg_jax.parallel.mesh import axes_in, described, mesh_shape, plan_table
from mtnlg_jax.planning.cost import Job
from mtnlg_jax.planning.layout import layout_of
from mtnlg_jax.planning.text import columns
from mtnlg_jax.train import lora, quantized_base


def tensor_table(config: Config, devices: int | None = None) -> str:
    """Return the table of ``config`` on its mesh.

    If mesh.data is -1, the data axis takes what is left of ``devices``; without ``devices`` it is
    1. Raises ValueError if the mesh does not fit.
    """
    mesh = config.mesh
    replica = mesh.pipe * mesh.expert * mesh.context * mesh.tensor
    sizes = mesh_shape(mesh, devices or replica * max(mesh.data, 1))
    config = dataclasses.replace(config, mesh=dataclasses.replace(mesh, data=sizes["data"]))
    validate(config)
    rows = plan_table(lora.abstract_parameters(config), sizes, mesh.zero)
    layout = layout_of(config)
    job = Job(config, None)
    memory = job.memory(layout)

    axes = described(sizes)
    cells = [
        (
            row.path,
            row.dims,
            " ".join(map(str, row.shape)),
            " ".join(_split_over(entry, sizes) for entry in row.spec),
            f"{row.bytes:,}",
        )
        for row in rows
    ]
    table = columns(
        [
            ("tensor", "dims", "shape", "split over", "bytes a device"),
            *cells,
            (f"all, {_types(config)}", "", "", "", f"{sum(row.bytes for row in rows):,}"),
        ],
        left=4,
    )
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
    return (
        f"{config.name}: {config.model.parameter_count():,} parameters on {axes} = "
        f"{replica * sizes['data']:,} devices, zero {mesh.zero}\n\n"
        f"{table}\n\n"
        f"GiB a device in a step: {parts}; together {sum(memory.values()) / 2**30:.1f}"
        f"{_on_host(job.host(layout))}\n"
        f"{_in_float32(config)} are float32, weights {config.train.compute_dtype}; "
        f"recompute {config.train.recompute}, micro-batches of "
        f"{layout.micro_batch_size}"
    )


def _on_host(host: dict[str, float]) -> str:
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in host.items() if size)
    return f"\nGiB of its host for each device: {parts}" if parts else ""


def _in_float32(config: Config) -> str:
    trained = "adapters" if lora.used(config) else "masters"
    dtype = config.optimizer.moments_dtype
    if dtype == "float32":
        return f"{trained}, moments and gradients"
    return f"moments are {dtype}, {trained} and gradients"


def _types(config: Config) -> str:
    return f"float32 and {config.optimizer.lora_base}" if quantized_base.used(config) else "float32"


def _split_over(entry: str | tuple[str, ...] | None, sizes: dict[str, int]) -> str:
    """Return the axes of an entry of a PartitionSpec: "data", "data+expert", or "-" for none."""
    axes = axes_in(entry)
    return "+".join(axis for axis in axes if axis != "expert" or sizes[axis] > 1) or "-"
