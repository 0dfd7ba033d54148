"""What each lane of a profiled run was busy with, over time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from zinf_cli.report.ink import WIDE, Picture, colour, drawn, wide_canvas
from zinf_cli.trace import LANES, Span, busy, read_spans

_MOST_RANKS = 4
_ROLES = {
    "wait": "bad", "compute": "blue", "glue": "blue", "update": "violet", "gather": "orange", "reduce": "orange",
    "copy in": "gold", "copy out": "gold", "nvme read": "teal", "nvme write": "teal",
}  # fmt: skip


def lanes(trace: Path) -> Iterator[Picture]:
    """A picture of each of the first ranks; UsageError where there is no trace."""
    for rank, spans in list(read_spans(trace).items())[:_MOST_RANKS]:
        yield _rank(rank, spans)


def _rank(rank: int, spans: list[Span]) -> Picture:
    used = [lane for lane in LANES if any(span.lane == lane for span in spans)]
    begin = min(span.start for span in spans if span.lane != "wait" or used == ["wait"])  # a first wait is a start's
    end = max(span.end for span in spans)
    pixel = (end - begin) / WIDE
    axes = wide_canvas(20 * len(used))
    axes.figure.set_gid(f"figure-lanes-{rank}")
    for row, lane in enumerate(used):
        times = busy([span for span in spans if span.lane == lane], gap=pixel / 2)
        seen = [(max(start, begin), stop) for start, stop in times if stop > begin]
        bars = [(start - begin, max(stop - start, pixel / 4)) for start, stop in seen]
        axes.broken_barh(bars, (row - 0.4, 0.8), color=colour(_ROLES[lane]), linewidth=0)
    axes.set_xlim(0, end - begin)
    axes.set_ylim(len(used) - 0.5, -0.5)
    axes.set_yticks(range(len(used)), used)
    axes.grid(visible=False)
    axes.set_xlabel("seconds of the profiled steps")
    return Picture(f"lanes-{rank}", f"Lanes of rank {rank}", drawn(axes))
