"""The page that a run leaves, opened in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from browser import CHROMIUM, Browser, browser
from workshop import Workshop

CURVES = ("loss-0", "eval_loss-0", "grad_norm-0", "lr-0", "step_s-0", "waiting-0", "traffic-0", "cpu-0", "nvme-0")
FIGURES = ("tiers", "units", "lanes-0")
BOXES = """[...document.querySelectorAll('[id^="curve-"], [id^="figure-"]')]
  .map(part => [part.id, part.getBoundingClientRect()]).map(([id, box]) => [id, box.left, box.right, box.width])"""
COLOURS = "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])"
STROKE = "getComputedStyle(document.querySelector('#curve-loss-0 path')).stroke"
OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([one, a], n) => boxes.slice(n + 1).filter(([_, b]) =>
    a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom).map(([other]) => [one, other]));
})"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
def test_a_run_leaves_a_page_that_opens(workshop: Workshop, tmp_path: Path) -> None:
    ended = workshop.launch(
        "logging.report=true", "profiler.enabled=true", "train.eval_interval=2", "train.max_grad_norm=0.1"
    )
    assert ended.code == 0, ended.err
    page = ended.run_dir / "report.html"
    assert f"open {page}" in ended.err
    with browser(tmp_path / "profile") as tab:
        seen = {
            (width, scheme): colours(tab, page, width, scheme) for width in (390, 1280) for scheme in ("light", "dark")
        }
        assert tab.complaints == []
        assert tab.value("performance.getEntriesByType('resource').length") == 0
    assert seen[390, "light"] == seen[1280, "light"] != seen[390, "dark"] == seen[1280, "dark"]


def colours(tab: Browser, page: Path, width: int, scheme: str) -> list[str]:
    """Those of text, page and loss, of a page whose figures are all to be seen at this width."""
    tab.open(page, width, scheme)
    boxes = {name: box for name, *box in tab.value(BOXES)}
    assert {f"curve-{name}" for name in CURVES} | {f"figure-{name}" for name in FIGURES} <= boxes.keys()
    for name, (left, right, wide) in boxes.items():
        assert wide > 100, name
        scrolls = name.removeprefix("figure-") in FIGURES
        assert left >= 0, name
        assert scrolls or right <= width, name
    assert tab.value("document.documentElement.scrollWidth") == width
    assert tab.value(OVERLAPS) == []
    return [*tab.value(COLOURS), tab.value(STROKE)]
