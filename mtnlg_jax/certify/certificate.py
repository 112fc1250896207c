"""Compute a certificate: what a config's mesh computes, compared with one device."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from mtnlg_jax.certify import culprit, exchange, figures, inputs, meshes, resume, updates
from mtnlg_jax.certify.compute import (
    Computation,
    Objective,
    Result,
    Teacher,
    make_teacher,
    objectives_of,
    plain,
    with_types,
)
from mtnlg_jax.certify.figures import Figure, Tolerance, Types, tolerance_of, types_of
from mtnlg_jax.certify.shrink import Copy, small_copy
from mtnlg_jax.config import Config

# Relative difference below which two computations are the same but for rounding, when the tensor is
# looked for that makes them differ.
_CLOSE = 1e-4

Say = Callable[[str], None]


@dataclasses.dataclass
class Certificate:
    """The figures of a config, and what they are figures of."""

    config: Config  # as it was given, not its small copy
    devices: int
    copy: Copy
    figures: list[Figure]
    tolerances: dict[tuple[str, str], Tolerance]  # (check, name of the types)
    left_out: dict[str, str]  # check -> why
    suspects: list[str]  # tensors that may be wrong in the plan
    seconds: float
    processor_seconds: float  # other load does not change it

    @property
    def within(self) -> bool:
        """Whether every figure is within its tolerance."""
        return all(figure.within for figure in self.figures)

    def outside(self) -> list[Figure]:
        """Return the figures beyond their tolerances."""
        return [figure for figure in self.figures if not figure.within]


def certify(config: Config, devices: int = 8, say: Say = lambda text: None) -> Certificate:
    """Return the certificate of ``config`` on ``devices`` of this process; ``say`` is told of each
    part that begins.

    Raises ValueError before any work where the config cannot be brought down to them.
    """
    began = time.perf_counter()
    busy = time.process_time()
    available = jax.device_count()
    if devices > available:
        raise ValueError(
            f"--devices={devices} is more than the {available} of this process; start it with as "
            "many, or give fewer"
        )
    sources = _sources(small_copy(config, devices).config)  # raises before anything is written
    with tempfile.TemporaryDirectory(prefix="certificate-") as folder:
        data = inputs.write_data(folder, config.train.seed, sources)
        copy = small_copy(config, devices, data)
        found = Maker(copy, folder, say)
        found.plan()
        found.gradients()
        found.updates()
        found.run()
    return Certificate(
        config,
        devices,
        copy,
        found.figures,
        found.tolerances,
        found.left_out,
        found.suspects,
        time.perf_counter() - began,
        time.process_time() - busy,
    )


def _sources(config: Config) -> int:
    """Return the number of sources of the data: differential privacy may sample whole ones, of
    which a fourth joins a step."""
    optimizer = config.optimizer
    if not optimizer.private or optimizer.dp_unit != "source":
        return 1
    return 4 * config.train.global_batch_size // optimizer.rows_of_unit


class Maker:
    """Makes the figures of one certificate, part after part."""

    def __init__(self, copy: Copy, folder: str, say: Say):
        self.figures: list[Figure] = []
        self.tolerances: dict[tuple[str, str], Tolerance] = {}
        self.left_out: dict[str, str] = {}
        self.suspects: list[str] = []
        self._copy = copy
        self._folder = folder
        self._say = say
        config = copy.config
        self._data = inputs.open_data(config)
        self._params = inputs.parameters_of(plain(config))
        self._given: Result | None = None  # of the first objective on one device
        self._teacher: Teacher | None = None
        if copy.teacher is not None:
            self._teacher = make_teacher(copy.teacher, config.train.seed)

    def _tolerance(self, check: str, types: Types) -> float:
        key = (check, types.name)
        if key not in self.tolerances:
            config = self._copy.config
            devices = max(map(meshes.devices_of, self._copy.meshes))
            self.tolerances[key] = tolerance_of(check, types, config, devices)
        return self.tolerances[key].value

    def _suspect(self, names: Iterable[str]) -> None:
        self.suspects += [name for name in names if name not in self.suspects]

    def _failed(self, check: str, what: str, types: Types, error: Exception, **where: str) -> None:
        """Record that a part could not be computed."""
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        limit = self._tolerance(check, types)
        where = {"mesh": "", "objective": ""} | where
        self.figures.append(
            Figure(check, what, where["mesh"], where["objective"], types.name, None, limit, problem)
        )

    def plan(self) -> None:
        """Compare the specs of the tensors with the plan's table and with each other."""
        limit = self._tolerance(figures.PLAN, figures.STRICT)
        for sizes in self._copy.meshes:
            mesh = meshes.text_of(sizes)
            odd = culprit.odd_specs(self._copy.on(sizes))
            self._suspect(odd)
            self.figures += [
                Figure(figures.PLAN, name, mesh, "", "", None, limit, problem)
                for name, problem in odd.items()
            ]
            if not odd:
                self.figures.append(
                    Figure(figures.PLAN, "the spec of every tensor", mesh, "", "", 0.0, limit)
                )

    def gradients(self) -> None:
        """Compare loss and gradients of each objective, on each mesh and in each type."""
        for objective in objectives_of(self._copy.config):
            self._say(f"{objective.name} objective on one device")
            alone = self._computation(plain(self._copy.config), objective, figures.STRICT)
            wanted = alone(self._params)
            self._given = self._given or wanted[0]
            for sizes in self._copy.meshes:
                for types in types_of(self._copy.config):
                    self._say(
                        f"{objective.name} objective on {meshes.text_of(sizes)} in {types.name}"
                    )
                    self._compare(sizes, objective, types, alone, wanted)

    def _computation(self, config: Config, objective: Objective, types: Types) -> Computation:
        return Computation(with_types(config, types), objective, self._data, self._teacher)

    def _compare(
        self,
        sizes: meshes.Sizes,
        objective: Objective,
        types: Types,
        alone: Computation,
        wanted: list[Result],
    ) -> None:
        where = {"mesh": meshes.text_of(sizes), "objective": objective.name}
        try:
            spread = self._computation(self._copy.on(sizes), objective, types)
            got = spread(self._params)
        except OSError:
            raise
        # Whatever a wrong plan raises is a finding: the other parts are still worth their time.
        except Exception as error:
            self._failed(figures.LOSS, "loss", types, error, **where)
            return
        # In a ramp there are two batches, of which the larger difference is told.
        loss = 0.0
        tensors: dict[str, float] = {}
        loads: list[float] = []
        for one, other in zip(got, wanted, strict=True):
            loss = max(loss, figures.loss_difference(one.loss, other.loss), key=_with_nan)
            each = figures.tensor_differences(one.gradients, other.gradients, types)
            for name, difference in each.items():
                tensors[name] = max(difference, tensors.get(name, 0.0), key=_with_nan)
            if one.loads is not None and other.loads is not None:
                loads.append(figures.largest_relative(one.loads, other.loads))

        def add(check: str, name: str, difference: float) -> Figure:
            limit = self._tolerance(check, types)
            line = Figure(
                check, name, **where, types=types.name, difference=difference, tolerance=limit
            )
            self.figures.append(line)
            return line

        line = add(figures.LOSS, "loss", loss)
        for name, difference in tensors.items():
            add(figures.GRADIENT, name, difference)
        if loads:
            add(figures.LOADS, "all layers", max(loads))
        if not line.within and types == figures.STRICT:
            self._say(f"the loss differs: looking for the tensor on {where['mesh']}")

            def agrees(params: Any, name: str) -> bool:
                pairs = zip(spread(params), alone(params), wanted, strict=True)
                return all(_agree(*results, name, types) for results in pairs)

            self._suspect(culprit.suspects(self._params, agrees))

    def updates(self) -> None:
        """Compare what each mesh does with the same gradients and the same state; `gradients` comes
        first."""
        assert self._given is not None, "the gradients of one device are known"
        types = figures.STRICT  # the optimizer does not see those of products and sums
        self._say("the update of these gradients on one device")
        reference = updates.Reference(
            with_types(self._copy.config, types), self._data, self._params, self._given
        )
        for sizes in self._copy.meshes:
            mesh = meshes.text_of(sizes)
            self._say(f"the update of the same gradients on {mesh}")
            try:
                found = reference.differences(with_types(self._copy.on(sizes), types))
            except OSError:
                raise
            except Exception as error:
                self._failed(figures.UPDATE, "update", types, error, mesh=mesh)
                continue
            for check, tensors in found.items():
                limit = self._tolerance(check, types)
                self.figures += [
                    Figure(check, name, mesh, "", types.name, difference, limit)
                    for name, difference in tensors.items()
                ]

    def run(self) -> None:
        """Move a small run to other meshes, and its checkpoint to Hugging Face and back."""
        copy = self._copy
        mesh = meshes.text_of(copy.meshes[0])
        family, why = exchange.family_of(copy.config)
        for types in types_of(copy.config):
            elsewhere = {
                meshes.text_of(copy.other): copy.elsewhere,
                "one device": resume.on_one_device(copy.config),
            }
            folder = os.path.join(self._folder, f"run in {types.compute} {types.reduce}")
            self._say(f"a run in {types.name} from {mesh} to {' and to '.join(elsewhere)}")
            try:
                runs = {
                    name: resume.SmallRun(with_types(each, types), self._data, self._teacher)
                    for name, each in elsewhere.items()
                }
                config = with_types(copy.config, types)
                stays = resume.SmallRun(config, self._data, self._teacher)
                limits = {check: self._tolerance(check, types) for check in resume.CHECKS}
                self.figures += resume.moved(stays, runs, self._params, folder, types, mesh, limits)
            except OSError:  # of the disk
                raise
            except Exception as error:
                self._failed(figures.RESTORED, "state", types, error, mesh=mesh)
                continue
            if family is None:
                self.left_out[figures.EXCHANGE] = why
            elif types == figures.STRICT:
                self._exchange(config, folder, family)

    def _exchange(self, config: Config, folder: str, family: str) -> None:
        self._say(f"its checkpoint to Hugging Face's {family} and back")
        self._tolerance(figures.EXCHANGE, figures.STRICT)
        try:
            self.figures += exchange.exchanged(config, self._data.tokenizer, folder, family)
        except OSError:
            raise
        except Exception as error:
            self._failed(figures.EXCHANGE, "parameters", figures.STRICT, error, mesh=family)


def _agree(one: Result, other: Result, usual: Result, name: str, types: Types) -> bool:
    """Return whether loss and all gradients but that of ``name`` agree.

    Not where ``other`` has next to no gradients, unlike ``usual``: a constant output embedding, for
    example, gives every token the same loss, and hides what is wrong elsewhere.
    """
    rest = {each: array for each, array in other.gradients.items() if each != name}
    kept = sum(float(np.abs(array).sum()) for array in rest.values())
    before = sum(float(np.abs(usual.gradients[each]).sum()) for each in rest)
    differences = figures.tensor_differences(one.gradients, rest, types)
    agree = max(differences.values(), default=0.0, key=_with_nan) <= _CLOSE
    return (
        agree and kept > _CLOSE * before and figures.loss_difference(one.loss, other.loss) <= _CLOSE
    )


def _with_nan(value: float) -> float:
    """Return a key by which a NaN is the largest."""
    return value if value == value else float("inf")
