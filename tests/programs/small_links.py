"""What `zinf bench links` has its ranks run, with small things to measure."""

from __future__ import annotations

from zinf_cli.bench import links

links.HIDDEN["cpu"] = 128
links.SECONDS = links.ENOUGH_S = 0.01
links.UPDATE_NUMEL = 1 << 16
links.GATHER_BYTES = 1 << 20
measure = links.measure
