"""Which directories are checkpoints, which of them is continued, and which are kept; without a model or a run."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from calls import as_any_user
from safetensors.torch import load_file
from torch import Tensor

from quack_lm.errors import UserError
from quack_lm.parallel import World
from quack_lm.training import checkpoint
from quack_lm.training.saver import Saver

ALONE = World(0, 1, 0, torch.device("cpu"))
SHARD = "shard-00001-model-00001-of-00001.safetensors"
STATE = {"stabilizer_state": [], "progress": {}, "manifest_sha256": "0" * 64}


def saver(
    directory: Path, *, keep: int = 100, keep_every: int = 0, is_async: bool = True, first_step: int = 0
) -> Saver:
    return Saver(
        *(directory, ALONE),
        keep=keep,
        keep_every=keep_every,
        is_async=is_async,
        first_step=first_step,
        about={"config": {"seed": 0}},
    )


def tensors(step: int) -> dict[str, Tensor]:
    return {
        "model.w": torch.full((5, 3), float(step)),
        "optimizer.w.step": torch.tensor(float(step)),
        "model.half": torch.full((7,), float(step), dtype=torch.bfloat16),
    }


def write(to: Saver, *steps: int) -> None:
    for step in steps:
        to.save(step, tensors(step), STATE)
    to.wait()
    assert to.error is None


def linked(old: Path) -> None:
    old.rename(old.parent.parent / "elsewhere")
    old.symlink_to(old.parent.parent / "elsewhere")


def without_write_bits(old: Path) -> None:
    for path in (old, *old.iterdir()):
        path.chmod(path.stat().st_mode & ~0o222)


def with_one_read_only_file(old: Path) -> None:
    (old / "state.json").chmod(0o444)


def change_flags(flag: str, path: Path) -> None:
    done = subprocess.run(["chattr", flag, str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NO FLAGS OF FILES CAN BE SET HERE: {done.stderr.strip()}")


def immutable_file(old: Path) -> None:
    change_flags("+i", old / "state.json")


@pytest.mark.parametrize("protect", [linked, without_write_bits, with_one_read_only_file, immutable_file])
def test_an_old_checkpoint_that_is_protected_is_kept_with_one_warning(
    protect: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to, old = saver(tmp_path / "run", keep=1), tmp_path / "run" / "step_00000001"
    write(to, 1)
    protect(old)
    try:
        write(to, 2, 3)
    finally:
        if protect is immutable_file:
            for file in tmp_path.rglob("state.json"):
                change_flags("-i", file)
    assert names(tmp_path / "run") == ["step_00000001", "step_00000003"]
    assert checkpoint.validate_checkpoint(old, verify_checksums=True) is None
    assert capsys.readouterr().err.count("is a link or write-protected and is kept") == 1


def test_what_cannot_be_deleted_is_a_warning_and_in_the_way_of_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(saver(tmp_path), 1)
    left = tmp_path / ".step_00000002.partial"
    left.mkdir()
    for file in (left / "half", tmp_path / "step_00000001/state.json"):
        file.touch()
        change_flags("+a", file)  # which no permission shows
    try:
        write(saver(tmp_path, keep=1, first_step=1), 2)
        write(saver(tmp_path, keep=1, first_step=2), 3, 4)
    finally:
        for file in (*tmp_path.rglob("half"), *tmp_path.rglob("state.json")):
            change_flags("-a", file)
    assert names(tmp_path) == [".deleted_1", ".deleted_2", "step_00000004"]
    assert capsys.readouterr().err.count("cannot be deleted and stays: Operation not permitted") == 4
    write(saver(tmp_path, keep=1, first_step=4), 5)
    assert names(tmp_path) == ["step_00000005"]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("is_async", [True, False])
def test_what_is_saved_is_read_back(is_async: bool, tmp_path: Path) -> None:
    write(saver(tmp_path, is_async=is_async), 3)
    (found,) = checkpoint.list_checkpoints(tmp_path)
    assert checkpoint.latest_valid_checkpoint(tmp_path) == found
    assert names(found) == ["manifest.json", SHARD, "state.json"]
    saved = load_file(found / SHARD)
    assert saved.keys() == tensors(3).keys()
    for name, expected in tensors(3).items():
        assert torch.equal(saved[name], expected)
        assert saved[name].dtype == expected.dtype


def test_a_large_checkpoint_is_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 64)  # model.w is 60 bytes
    write(saver(tmp_path), 3)
    found = checkpoint.latest_valid_checkpoint(tmp_path)
    assert found is not None
    first, second = (load_file(found / f"shard-00001-model-0000{n}-of-00002.safetensors") for n in (1, 2))
    assert (first.keys(), second.keys()) == ({"model.w", "optimizer.w.step"}, {"model.half"})
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors(3).items()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(found)), no_dist=True)
    assert all(read[name].equal(tensor) for name, tensor in tensors(3).items())


def test_a_tensor_changed_after_the_save_began_is_saved_as_it_was(tmp_path: Path) -> None:
    to, live = saver(tmp_path), tensors(1)
    to.save(1, live, STATE)
    live["model.w"].fill_(9.0)
    to.wait()
    assert load_file(tmp_path / "step_00000001" / SHARD)["model.w"].max() == 1.0


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def make_foreign(path: Path) -> None:
    path.write_text("{}")


def make_endless(path: Path) -> None:
    path.write_text('{"files": {"state.json": {"bytes": Infinity, "sha256": ""}}}')


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "cut tensors": (SHARD, cut, "has .* bytes, not"),
    "empty tensors": (SHARD, lambda path: path.write_bytes(b""), "has 0 bytes, not"),
    "a flipped bit": (SHARD, flip_a_bit, "another sha256"),
    "no tensors": (SHARD, Path.unlink, "is missing"),
    "a flipped bit in the state": ("state.json", flip_a_bit, "another sha256"),
    "no state": ("state.json", Path.unlink, "is missing"),
    "no manifest": ("manifest.json", Path.unlink, "no manifest.json"),
    "cut manifest": ("manifest.json", cut, "not what a run writes|is missing|another sha256"),
    "foreign manifest": ("manifest.json", make_foreign, "not what a run writes"),
    "manifest with endless bytes": ("manifest.json", make_endless, "not what a run writes"),
    "a pipe for the state": ("state.json", lambda path: path.unlink() or os.mkfifo(path), "is not a regular file"),
    "one more file": ("extra.safetensors", lambda path: path.write_bytes(b"x"), "is not in its manifest"),
    "nothing at all": (".", lambda path: [p.unlink() for p in path.iterdir()] and None, "no manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped_and_left_alone(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(saver(tmp_path), 1, 2)
    name, spoil, message = DAMAGES[damage]
    spoil(tmp_path / "step_00000002" / name)
    if damage == "cut manifest":  # the last byte is a line's end, which json does not need
        spoil(tmp_path / "step_00000002" / name)
    left = names(tmp_path / "step_00000002")
    assert checkpoint.latest_valid_checkpoint(tmp_path) == tmp_path / "step_00000001"
    (line,) = capsys.readouterr().err.splitlines()
    assert "step_00000002 is not a valid checkpoint and is skipped" in line
    assert re.search(message, line)
    assert names(tmp_path / "step_00000002") == left
    shutil.rmtree(tmp_path / "step_00000001")
    with pytest.raises(UserError, match=f"none of the 1 checkpoints in {tmp_path} is valid.*({message})"):
        checkpoint.latest_valid_checkpoint(tmp_path)


def test_a_checkpoint_under_another_ones_name_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(saver(tmp_path), 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000005")
    assert checkpoint.latest_valid_checkpoint(tmp_path) == tmp_path / "step_00000001"
    assert "of another step" in capsys.readouterr().err


def test_the_newest_and_every_so_many_are_kept(tmp_path: Path) -> None:
    write(saver(tmp_path, keep=2, keep_every=4), *range(1, 12))
    assert names(tmp_path) == [f"step_{step:08d}" for step in (4, 8, 10, 11)]


def test_a_damaged_checkpoint_does_not_count_as_kept_and_is_not_deleted(tmp_path: Path) -> None:
    write(saver(tmp_path), 1, 2, 3, 6)
    flip_a_bit(tmp_path / "step_00000006" / SHARD)
    cut(tmp_path / "step_00000002" / SHARD)
    newest = checkpoint.latest_valid_checkpoint(tmp_path)
    assert newest == tmp_path / "step_00000003"
    to = saver(tmp_path, keep=2, first_step=3)
    write(to, 4)
    assert names(tmp_path) == [f"step_{step:08d}" for step in (2, 3, 4, 6)]
    write(to, 5, 6)
    assert names(tmp_path) == ["damaged_step_00000006_1", *(f"step_{step:08d}" for step in (2, 5, 6))]
    assert checkpoint.latest_valid_checkpoint(tmp_path) == tmp_path / "step_00000006"


def test_what_a_killed_save_left_is_invisible_and_goes_with_the_next(tmp_path: Path) -> None:
    partial = tmp_path / ".step_00000009.partial"
    partial.mkdir(parents=True)
    (partial / SHARD).write_bytes(b"half")
    assert checkpoint.latest_valid_checkpoint(tmp_path) is None
    write(saver(tmp_path), 1)
    assert names(tmp_path) == ["step_00000001"]


def test_a_save_that_fails_says_which_directory_and_leaves_the_last_one(tmp_path: Path) -> None:
    to = saver(tmp_path, keep=1)
    write(to, 1)
    tmp_path.chmod(0o555)
    with as_any_user():
        to.save(2, tensors(2), STATE)
        to.wait()
    tmp_path.chmod(0o755)
    assert to.error is not None
    assert str(tmp_path) in to.error
    assert checkpoint.latest_valid_checkpoint(tmp_path) == tmp_path / "step_00000001"


def test_every_file_is_on_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    seen: dict[str, list[str]] = {}

    def rename(path: Path, target: Path) -> Path:
        seen["before"] = [p.name for p in synced]
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    write(saver(tmp_path), 1)
    before = seen["before"]
    assert {SHARD, "state.json.tmp", "manifest.json.tmp"} <= set(before)
    assert before.index("manifest.json.tmp") > before.index(SHARD)
    assert synced[-1] == tmp_path


def test_the_time_until_a_checkpoint_is_whole_is_counted(tmp_path: Path) -> None:
    to, start = saver(tmp_path), time.perf_counter()
    write(to, 1, 2)
    assert 0 < to.total_s <= time.perf_counter() - start
    assert json.loads((tmp_path / "step_00000002/state.json").read_text())["config"] == {"seed": 0}
