"""What `zinf bench` found of drives and links, and its progress."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from zinf_cli.amounts import format_bytes
from zinf_cli.bench.nvme import Point, Result
from zinf_cli.machine.profile_file import Links


def links_screen(links: Links, out: Path) -> RenderableType:
    """Rates of compute, update, copies and collectives."""
    table = Table(box=None, pad_edge=False)
    table.add_column("by rows")
    counts = sorted({rows for rates in links.matmul.values() for rows in rates})
    for count in counts:
        table.add_column(str(count), justify="right")
    for name, measured in (("matrix products", links.matmul), ("a block's pass", links.block)):
        for precision, rates in measured.items():
            cells = (_flops(rates[count]) if count in rates else "" for count in counts)
            table.add_row(f"{name}, {precision}", *cells)
    lines = Table.grid(padding=(0, 2))
    lines.add_row("AdamW on the CPU", f"{links.adamw / 1e9:.2f} billion parameters/s")
    for name, rate in (
        ("CPU memory to one accelerator", links.copy_alone),
        ("to all of them", links.copy_host),
        ("all-gather within the host, into one rank", links.collective),
        ("all-gather across hosts, into one rank", links.across),
    ):
        if rate is not None:
            lines.add_row(name, f"{rate / 1e9:.3g} GB/s")
    return Group(table, Text(), lines, Text(), Text(f"kept in {out}, where launch and estimate look for it"))


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def nvme_screen(result: Result, fio: dict[str, object] | None, out: Path) -> RenderableType:
    """The sweep, the best of it, fio beside it, and a block to paste into a recipe."""
    counts = sorted({point.threads for point in result.sweep})
    parts: list[RenderableType] = []
    for direction, best in (("read", result.read), ("write", result.write)):
        table = Table(title=f"{direction}, by block size and threads", title_justify="left", box=None, pad_edge=False)
        table.add_column("")
        for count in counts:
            table.add_column(str(count), justify="right")
        rates = {(p.block_size, p.threads): p for p in result.sweep if p.direction == direction}
        for block in sorted({point.block_size for point in result.sweep}):
            cells = [f"{rates[block, count].bytes_per_s / 1e9:.2f} GB/s" for count in counts]
            table.add_row(format_bytes(block), *cells)
        parts += [table, Text(_line(direction, best, fio), style="bold"), Text()]
    parts.append(Text(f"read and write at once: {result.both / 1e9:.2f} GB/s in sum"))
    drives, compute = result.beside
    parts.append(Text(f"while all cores compute: {drives:.0%} of that, and {compute:.0%} of their compute"))
    parts.append(Text(f"kept in {out}, where launch and estimate look for it"))
    folders = ", ".join(str(folder) for folder in result.folders)
    parts.append(Text(f"\nfor a recipe:\n\noffload:\n  nvme_path: [{folders}]"))
    return Group(*parts)


def _line(direction: str, best: Point, fio: dict[str, object] | None) -> str:
    text = f"{direction}: {best.bytes_per_s / 1e9:.2f} GB/s with {best.threads} × {format_bytes(best.block_size)}"
    if fio is not None:
        theirs, share = fio[direction], fio["zinf_of_fio"]
        assert isinstance(theirs, dict)
        assert isinstance(share, dict)
        text += f"; fio ({fio['engine']}) {theirs['bytes_per_s'] / 1e9:.2f} GB/s, in turn: {share[direction]:.2f} of it"
    return text
