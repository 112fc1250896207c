"""What launch/audit.py does after its flags are checked."""

import json
import os
from typing import TYPE_CHECKING

from mtnlg_jax import foreign, storage
from mtnlg_jax.cli.auditing import options
from mtnlg_jax.cli.decoding import devices, fitting

if TYPE_CHECKING:
    from mtnlg_jax.config import Config
    from mtnlg_jax.evaluate.audit.settings import AuditSettings

REPORT = ("audit.json", "audit.html")


def settings() -> "AuditSettings":
    """Return the settings of the flags. Raise ValueError if one is out of its range."""
    from mtnlg_jax.evaluate.audit.settings import AuditSettings, ExtractionSettings, check

    found = AuditSettings(
        parts=None if options.PARTS.value is None else tuple(options.PARTS.value),
        passages=options.PASSAGES.value,
        extraction=ExtractionSettings(
            options.prefixes(),
            options.CONTINUATION.value,
            options.SAMPLES.value,
            options.TEMPERATURE.value,
            options.TOP_K.value,
        ),
        candidates=options.CANDIDATES.value,
        member_tokens=options.MEMBER_TOKENS.value,
        min_k=options.MIN_K.value,
        texts=options.TEXTS.value,
        text_tokens=options.TEXT_TOKENS.value,
        seed=options.SEED.value,
        show_texts=options.SHOW_TEXTS.value,
    )
    check(found)
    return found


def output() -> str:
    """Return the folder of the report. Raise ValueError if none is given and the model's folder is
    not a run's."""
    workdir = options.WORKDIR.value
    if options.OUTPUT.value is not None:
        return options.OUTPUT.value
    if foreign.reader_of(workdir) is not None:
        raise ValueError(
            f"{workdir} is not the folder of a run, so nothing is written there; give a folder for "
            "the report with --output"
        )
    return workdir


def check_folder(folder: str) -> None:
    """Raise ValueError if no report can be written to ``folder``; make it if it is missing."""
    if storage.is_remote(folder):
        return
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--output={folder} is a file; give a folder")
    if options.OUTPUT.value is not None:
        os.makedirs(folder, exist_ok=True)


def _check_memory(config: "Config") -> None:
    """Raise ValueError if the model and its caches do not fit."""
    from mtnlg_jax.decode.memory import Caches, Choices, Plan
    from mtnlg_jax.evaluate.audit.extraction import ROWS

    mesh = devices.mesh()
    caches = (Caches(ROWS, config.model.max_position_embeddings),)
    copies = 1 if options.REFERENCE.value is None else 2
    plan = Plan(config.model, mesh=mesh, caches=caches, copies=copies)
    choices = Choices(dtype=False, weights=False, cache=False)
    fitting.check(options.WORKDIR.value, [plan], choices, mesh)


def perform(folder: str) -> None:
    """Audit the run, print a summary and write the report to ``folder``."""
    from mtnlg_jax import compat

    wanted = settings()
    compat.configure_cache()

    # Imported here: bad input is reported before JAX is imported, which takes longer.
    from mtnlg_jax.evaluate.audit.report import describe, render
    from mtnlg_jax.evaluate.audit.run import audit

    report = audit(
        options.WORKDIR.value,
        options.CHECKPOINT.value,
        wanted,
        data=options.DATA.value,
        canaries=options.CANARIES.value,
        reference=options.REFERENCE.value,
        mesh=devices.mesh(),
        before=lambda config, _: _check_memory(config),
        progress=devices.on_first_process(),
    )
    if not devices.on_first_process():
        return
    page = render(report)
    data = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    with storage.disk_errors(folder, "the report is not written whole"):
        for name, content in zip(REPORT, (data + "\n", page), strict=True):
            storage.write_file(folder, name, content.encode(errors="backslashreplace"))
    print(describe(report), flush=True)
    print(f"report: {storage.join(folder, REPORT[1])} and {REPORT[0]}")
