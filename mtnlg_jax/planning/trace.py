"""Write a simulated step as a trace that Perfetto and chrome://tracing open.

Source of the format: Trace Event Format, Google, 2016. The step is one process, and so is the body
of each loop, which is shown once: in the step, and in the bodies around it, a loop is one piece
named by its trips. A lane is a thread.
"""

import json
import os

from mtnlg_jax.planning.span import Span
from mtnlg_jax.planning.timeline import COMPUTE, Timeline

_LOOPS = "loops"


def write_trace(timeline: Timeline, path: str) -> None:
    """Write ``timeline`` to ``path``; a file there is replaced only when all is written."""
    beside = f"{path}.new"
    with open(beside, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": events_of(timeline), "displayTimeUnit": "ms"}, file)
    os.replace(beside, path)


def events_of(timeline: Timeline) -> list[dict]:
    """Return the trace events of a step and of the bodies of its loops."""
    found: list[dict] = []
    bodies = [(timeline.program.entry, 0, "one step")]
    for process, (body, depth, title) in enumerate(bodies):
        span = timeline.span(body, depth)
        found += _process(process, title, span)
        for loop in span.loops:
            known = [name for name, *_ in bodies]
            if loop.body not in known:
                bodies.append((loop.body, depth + 1, f"one turn of {loop.name}, {loop.body}"))
    return found


def _process(process: int, title: str, span: Span) -> list[dict]:
    lanes = [COMPUTE, *([_LOOPS] if span.loops else [])]
    lanes += sorted({event.lane for event in span.events} - {COMPUTE})
    threads = {lane: number for number, lane in enumerate(lanes)}
    found = [
        {"ph": "M", "pid": process, "name": "process_name", "args": {"name": title}},
        {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}},
    ]
    for lane, thread in threads.items():
        at = {"ph": "M", "pid": process, "tid": thread}
        found.append({**at, "name": "thread_name", "args": {"name": lane}})
        found.append({**at, "name": "thread_sort_index", "args": {"sort_index": thread}})
    for event in span.events:
        found.append(
            {
                "ph": "X",
                "pid": process,
                "tid": threads[event.lane],
                "name": event.name,
                "cat": event.label,
                "ts": event.begin * 1e6,
                "dur": event.seconds * 1e6,
                "args": {"class": event.label, "source": event.source},
            }
        )
    for loop in span.loops:
        found.append(
            {
                "ph": "X",
                "pid": process,
                "tid": threads[_LOOPS],
                "name": f"{loop.trips:g} turns of {loop.name}",
                "cat": "loop",
                "ts": loop.begin * 1e6,
                "dur": loop.seconds * 1e6,
                "args": {"body": loop.body, "turns": loop.trips},
            }
        )
    return found
