"""What a card says of devices, times, FLOPs and energy, with the arithmetic of each figure."""

import dataclasses
import datetime
from collections.abc import Iterator

from mtnlg_jax.config import Config
from mtnlg_jax.evaluate.card.facts import Fact, Facts
from mtnlg_jax.evaluate.card.page import Cell, Section
from mtnlg_jax.evaluate.card.run_files import ENVIRONMENT, METRICS, STARTS, RunFiles
from mtnlg_jax.hardware import flops_per_token, watts_of
from mtnlg_jax.train import lora

_TABLE = "mtnlg_jax/hardware.py"


@dataclasses.dataclass(frozen=True)
class Energy:
    """What the author knows of the power. None: unknown.

    ``watts_per_device``: above 0; in place of the vendors' figures. ``pue``: power of the data
    center over that of the devices, at least 1. ``carbon_kg_per_kwh``: at least 0.
    """

    watts_per_device: float | None = None
    pue: float | None = None
    carbon_kg_per_kwh: float | None = None

    def __post_init__(self) -> None:
        limits = {
            "watts_per_device": (0, "above"),
            "pue": (1, "at least"),
            "carbon_kg_per_kwh": (0, "at least"),
        }
        for name, (least, words) in limits.items():
            value = getattr(self, name)
            if value is None:
                continue
            enough = value > least if words == "above" else value >= least
            if not (enough and value < 1e9):  # also refuses NaN
                raise ValueError(f"--{name}={value} must be {words} {least} and finite")


def compute_sections(facts: Facts, run: RunFiles, energy: Energy) -> list[Section]:
    """Return the sections on compute and energy, and add their facts. Needs those of training."""
    compute = Section("Compute")
    _flops(compute, facts, run)
    starts = _starts(compute, facts, run)
    return [compute, _energy(facts, run, energy, starts)]


def _flops(section: Section, facts: Facts, run: RunFiles) -> None:
    config = run.config
    frozen = lora.used(config)
    head = not _has_answers(run)
    key = f"flops_per_token(/model, sequence_length, frozen={frozen}, head={head})"
    each = _flops_of(config, frozen, head)
    facts.given(each, _TABLE, key, "FLOPs of a token, forward and backward", "FLOP", "flops")
    total = facts.derive("total_flops", "FLOPs of training", "flops * tokens", "FLOP")
    section.listing([facts["flops"], total])
    section.blocks.append(
        "The FLOPs of a token are counted from the config by the formula of PaLM's appendix: each "
        "product forward and backward, and attention in full. What is computed again to save "
        "memory, evaluations, and teachers do not count."
    )
    if total.known:
        section.blocks.append(f"FLOPs: {facts.worked('total_flops')}")


def _flops_of(config: Config, frozen: bool, head: bool) -> float | None:
    try:
        return flops_per_token(config.model, config.sequence_length, frozen=frozen, head=head)
    except ValueError:  # the vocabulary is not known
        return None


def _has_answers(run: RunFiles) -> bool:
    """Return whether a source has tokens that are read and not predicted, which skip the head."""
    sources = run.content[run.data].get("sources", []) if run.data else []
    return any("answer_tokens" in each.get("prepared", {}).get("train", {}) for each in sources)


@dataclasses.dataclass(frozen=True)
class _Start:
    """One start of the run. Names of facts; "" where something is not recorded."""

    seconds: str
    count: str
    kind: str | None


def _starts(section: Section, facts: Facts, run: RunFiles) -> list[_Start]:
    """Add a table of the starts of the run, with their devices and times."""
    numbers = [number for number, _ in run.content[STARTS]]
    found = []
    rows: list[list[Cell]] = []
    for place, number in enumerate(numbers):
        after = numbers[place + 1] if place + 1 < len(numbers) else None
        line = f"[line={number}]"
        place_of = (STARTS, line)
        if "devices" not in dict(run.content[STARTS])[number] and after is None:
            place_of = (ENVIRONMENT, "")  # of the last start, also in older runs
        date = facts.read(STARTS, f"{line}/date", "Start: date", name=f"date_{number}")
        kind = facts.read(place_of[0], f"{place_of[1]}/devices/kind", "Start: kind of device")
        count = facts.read(
            place_of[0], f"{place_of[1]}/devices/count", "Start: devices", name=f"devices_{number}"
        )
        processes = facts.read(place_of[0], f"{place_of[1]}/processes", "Start: processes")
        end = _end(facts, run, number, after)
        seconds = _seconds(facts, number, date, end)
        rows.append([date, kind, count, processes, seconds])
        found.append(
            _Start(
                seconds.name if seconds.known else "", count.name if count.known else "", kind.value
            )
        )
    section.table(("start", "kind of device", "devices", "processes", "seconds"), rows)
    _hours(section, facts, run, found)
    return found


def _end(facts: Facts, run: RunFiles, number: int, after: int | None) -> Fact:
    """Return when the start wrote its last record."""
    file = METRICS if after is None else STARTS
    key = "max of []/time" if after is None else f"[line={after}]/reached/time"
    label = "Start: time of its last record"
    # In full: four digits of seconds since 1970 would be years.
    return facts.read(file, key, label, "s", f"end_{number}", "{:.3f}".format)


def _seconds(facts: Facts, number: int, date: Fact, end: Fact) -> Fact:
    name = f"seconds_{number}"
    if date.known and end.known:
        begun = datetime.datetime.fromisoformat(date.value).timestamp()
        # The date has whole seconds. An earlier record is of an earlier start: this one wrote none.
        if end.value < begun:
            return facts.given(None, STARTS, "", "Start: seconds up to its last record", "", name)
    arithmetic = f"end_{number} - unix(date_{number})"
    return facts.derive(name, "Start: seconds up to its last record", arithmetic)


def _hours(section: Section, facts: Facts, run: RunFiles, starts: list[_Start]) -> None:
    """Add the device-hours: of the records' times, or else estimated from the speed."""
    known = [start for start in starts if start.seconds and start.count]
    if known:
        products = " + ".join(f"{start.count} * {start.seconds}" for start in known)
        arithmetic = f"({products}) / 3600"
        hours = facts.derive("device_hours", "Device-hours", arithmetic)
        section.blocks.append(f"Device-hours: {facts.worked('device_hours')}")
        section.blocks.append(
            "A start counts from its line in starts.jsonl to its last record in metrics.jsonl, "
            "with compiling, evaluating, saving, and steps that a resume repeated."
        )
        if len(known) < len(starts):
            section.blocks.append("Starts without a recorded time or devices are not counted.")
        assert hours.known
        return
    count = starts[-1].count if starts else ""
    if not count or not facts["tokens_per_second"].known or not facts["tokens"].known:
        facts.given(None, METRICS, "[]/time", "Device-hours", "", "device_hours")
        section.blocks.append("Device-hours: unknown, since the run did not record times.")
        return
    arithmetic = f"{count} * tokens / tokens_per_second / 3600"
    facts.derive("device_hours", "Device-hours, estimated from the speed", arithmetic)
    section.blocks.append(
        f"Device-hours, estimated: {facts.worked('device_hours')}. The run did not record times; "
        "compiling, evaluating and saving are not in this figure."
    )


def _energy(facts: Facts, run: RunFiles, energy: Energy, starts: list[_Start]) -> Section:
    section = Section("Energy")
    known = [start for start in starts if start.seconds and start.count]
    watts = dict(_watts(facts, energy, [start.kind for start in starts]))
    facts.given(
        energy.pue,
        "--pue",
        "",
        "Power of the data center over that of the devices (PUE)",
        "",
        "pue",
    )
    facts.given(
        energy.carbon_kg_per_kwh, "--carbon_kg_per_kwh", "", "Carbon per kWh", "kg", "carbon"
    )
    names = set(watts.values())
    section.listing([facts[name] for name in sorted(names)] + [facts["pue"], facts["carbon"]])
    arithmetic = ""
    if len(names) == 1 and facts["device_hours"].known:
        arithmetic = f"device_hours * {next(iter(names))} / 1000"
        if known and len(known) == 1:
            # devices x watts x hours, as one reads it
            facts.derive("hours", "Hours", f"{known[0].seconds} / 3600")
            arithmetic = f"{known[0].count} * {next(iter(names))} * hours / 1000"
    elif known:
        products = [f"{s.count} * {s.seconds} * {watts[s.kind]}" for s in known]
        arithmetic = f"({' + '.join(products)}) / 3600 / 1000"
    _result(section, facts, energy, arithmetic)
    return section


def _watts(
    facts: Facts, energy: Energy, kinds: list[str | None]
) -> Iterator[tuple[str | None, str]]:
    """Yield (kind of device, name of the fact of its watts)."""
    label = "Most power of a device"
    if energy.watts_per_device is not None:
        given = energy.watts_per_device
        facts.given(given, "--watts_per_device", "", "Power of a device", "W", "watts")
        yield from ((kind, "watts") for kind in dict.fromkeys(kinds or [None]))
        return
    for number, kind in enumerate(dict.fromkeys(kinds or [None])):
        found = watts_of(kind) if kind else None
        name = "watts" if number == 0 else f"watts_{number}"
        value = found[0] if found else None
        words = f"{label}, {kind} ({found[1]})" if found else f"{label}, {kind or 'kind unknown'}"
        facts.given(value, _TABLE, f"watts_of({kind!r})", words, "W", name)
        yield kind, name


def _result(section: Section, facts: Facts, energy: Energy, arithmetic: str) -> None:
    """Add the lines of the energy and of the carbon."""
    if energy.pue is not None and arithmetic:
        arithmetic += " * pue"
    if arithmetic:
        facts.derive("energy", "Energy, estimated", arithmetic, "kWh")
    else:
        facts.given(None, METRICS, "", "Energy, estimated", "kWh", "energy")
    if facts["energy"].known:
        section.blocks.append(f"Energy: {facts.worked('energy')}")
        section.blocks.append(
            "The devices are counted at their full power; their hosts, disks and network are not "
            "counted"
            + ("." if energy.pue is not None else ", nor is cooling, since the PUE is unknown.")
        )
    else:
        section.blocks.append(
            "Energy: unknown. It is devices × watts × hours × PUE; the power of these devices, or "
            "the time of the run, is not known."
        )
    if energy.carbon_kg_per_kwh is not None and facts["energy"].known:
        facts.derive("emissions", "Carbon, estimated", "energy * carbon", "kg")
        # The Hub's head has grams.
        facts.derive("emissions_in_grams", "Carbon, estimated", "emissions * 1000", "g")
        section.blocks.append(f"Carbon: {facts.worked('emissions')}")
    else:
        section.blocks.append("Carbon: unknown.")
