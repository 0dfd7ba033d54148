"""Hardware profiles: built in, and from a file that zinf bench wrote."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from zinf_cli.errors import UsageError
from zinf_cli.machine.hardware import accelerators_here, huge_pages
from zinf_cli.machine.profile_file import (
    Best,
    Links,
    Measured,
    Nvme,
    find_measured,
    load_measured,
    load_profile,
    save_measured,
)
from zinf_cli.machine.profiles import BUILT_IN
from zinf_cli.plan.io import Io, choose_io

BEST = Best(bytes_per_s=2.5e9, block_size=4 << 20, threads=4)
LINKS = Links(
    accelerators=0, cpu_memory=16 << 30, matmul={"fp32": {16: 1e10}}, block={"fp32": {16: 9e9, 1024: 7.2e10}}, adamw=5e8
)


def nvme(folder: Path) -> Nvme:
    return Nvme(folders=(folder,), space=1 << 40, read=BEST, write=BEST, both=2.7e9)


def test_the_dgx2_is_that_of_figure_2b() -> None:
    dgx2 = BUILT_IN["dgx2"]
    assert dgx2.copy(16) == pytest.approx(3e9)
    assert dgx2.copy(1) == pytest.approx(12e9)
    assert dgx2.drives.read / 16 == pytest.approx(1.6e9)
    assert dgx2.peak("bf16") == 70e12


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_profile_is_whole(name: str) -> None:
    profile = BUILT_IN[name]
    assert profile.name == name
    assert min(profile.device_memory, profile.cpu_memory, profile.drives.space) > 1e10
    assert profile.flops("bf16", 1024) < profile.peak("bf16")


def test_launch_speaks_to_the_drives_as_the_bench_found_best(tmp_path: Path) -> None:
    drives = Measured(nvme=nvme(tmp_path)).drives()
    assert drives is not None
    assert choose_io(drives, folders=1, ranks=1, cores=0) == Io(4, 4, 4 << 20)
    assert choose_io(drives, folders=2, ranks=1, cores=0) == Io(2, 2, 4 << 20)
    assert choose_io(drives, folders=1, ranks=16, cores=0) == Io(2, 2, 4 << 20)  # one at work while the other ends
    assert choose_io(drives, folders=1, ranks=1, cores=2) == Io(2, 2, 4 << 20)  # compute needs the cores
    small = replace(drives, block_bytes=3 << 20)
    assert choose_io(small, folders=1, ranks=1, cores=0).block_bytes == 2 << 20  # a part of a stripe
    assert choose_io(replace(drives, measured=False), folders=1, ranks=1, cores=0) == Io()


def test_each_bench_leaves_the_section_of_the_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / "hardware.yaml"
    save_measured(path, "nvme", nvme(tmp_path), "box")
    with pytest.raises(UsageError, match="links is missing"):
        load_profile(str(path))
    save_measured(path, "links", LINKS, "box")
    save_measured(path, "nvme", nvme(tmp_path), "box")
    profile = load_profile(str(path))
    assert profile.drives.both == 2.7e9
    assert profile.flops("fp32", 16) == pytest.approx(0.9e10)
    assert profile.flops("fp32", 128) == pytest.approx(0.9 * 4.5e10)  # half way by logarithm
    assert profile.flops("fp32", 9000) == pytest.approx(7.2e10)
    assert [entry.name for entry in path.parent.iterdir()] == ["hardware.yaml"]


@pytest.mark.parametrize("out", [".", "file/hardware.yaml"])
def test_what_cant_be_kept_is_an_error_in_a_line(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't be written"):
        save_measured(tmp_path / out, "nvme", nvme(tmp_path), "box")


def test_the_file_beside_the_recipe_comes_before_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    recipe = tmp_path / "recipes" / "r.yaml"
    assert find_measured(recipe) is None
    save_measured(tmp_path / "config" / "zinf" / "hardware.yaml", "nvme", nvme(tmp_path), "user")
    found = find_measured(recipe)
    assert found is not None
    assert found.name == "user"
    assert found.covers((tmp_path / "not" / "there",))
    assert not found.covers((Path("/proc"),))
    save_measured(recipe.parent / "hardware.yaml", "nvme", nvme(tmp_path), "beside")
    found = find_measured(recipe)
    assert found is not None
    assert found.name == "beside"


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"nvme: {", b"name: 2024-02-30", b"\xff", b"nvme: {space: 3}"])
def test_what_a_power_cut_left_is_no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    torn, notes = tmp_path / "zinf" / "hardware.yaml", list[str]()
    torn.parent.mkdir()
    torn.write_bytes(content)
    assert find_measured(None, notes.append) is None
    assert [str(torn) in note for note in notes] == [True]
    with pytest.raises(UsageError):  # which was asked for by name
        load_measured(torn)
    save_measured(torn, "nvme", nvme(tmp_path), "box")
    assert find_measured(None) is not None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("nvme", "read", "bytes_per_s"), -3, "-3 is absurd: input should be greater"),
        (("nvme", "both"), 1e30, "1e30 is absurd"),
        (("nvme", "write"), None, "nvme.write"),
        (("nvme", "read", "threads"), "four", "nvme.read.threads"),
        (("nvme", "space"), "lots", "expected a size such as 48GiB"),
        (("links", "matmul"), {}, "matmul needs a rate"),
        (("links", "accelerators"), 4, "accelerators need device_memory"),
        (("links", "block"), {"fp32": {16: 3}}, "3 is absurd"),
        (("drives",), {}, "drives: unknown key"),
    ],
)
def test_absurd_values_are_refused_by_name(path: tuple[str, ...], value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "hardware.yaml"
    save_measured(file, "nvme", nvme(tmp_path), "box")
    save_measured(file, "links", LINKS, "box")
    tree = branch = yaml.safe_load(file.read_text())
    for key in path[:-1]:
        branch = branch[key]
    branch[path[-1]] = value
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UsageError) as caught:
        load_measured(file)
    assert message in str(caught.value).replace("1e+30", "1e30")
    assert str(file) in str(caught.value)


def test_a_profile_that_is_none_names_those_that_are() -> None:
    with pytest.raises(UsageError, match="dgx2, dgx-h100"):
        load_profile("dgx3")


@given(st.text())
def test_any_text_is_a_profile_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "hardware.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(UsageError):
        load_measured(file)


@pytest.mark.parametrize("sign", ["proc/driver/nvidia/gpus/0000:01:00.0", "dev/nvidia0"])
def test_either_sign_of_an_accelerator_counts(sign: str, tmp_path: Path) -> None:
    """Containers may have the one or the other; what is not a GPU's has no number."""
    (tmp_path / "dev" / "nvidiactl").mkdir(parents=True)
    assert accelerators_here(tmp_path) == 0
    (tmp_path / sign).mkdir(parents=True)
    assert accelerators_here(tmp_path) == 1


@pytest.mark.parametrize(("says", "told"), [("always [madvise] never\n", "madvise"), (None, "unknown")])
def test_whether_there_are_huge_pages(says: str | None, told: str, tmp_path: Path) -> None:
    if says is not None:
        file = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
        file.parent.mkdir(parents=True)
        file.write_text(says)
    assert huge_pages(tmp_path) == told
