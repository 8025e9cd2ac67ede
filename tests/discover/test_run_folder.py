import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from discover import run_folder
from discover.config import RunConfig, SampleConfig
from discover.errors import CheckpointError, RunFolderError
from discover.run_folder import (
    CONFIG,
    create_run_folder,
    load_checkpoint,
    locked,
    new_folder,
    open_run_folder,
    save_checkpoint,
    write_atomic,
)

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(7)}


def no_leftovers(folder: Path) -> bool:
    return not list(folder.rglob(".*.tmp"))


def test_a_new_run_records_configuration_versions_and_seed(tmp_path: Path) -> None:
    config = RunConfig(target=1.34, seed=5)
    folder = create_run_folder(config, name="bandgap", output=str(tmp_path / "run"), argv=["python", "x"])
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["seed"] == 5
    assert versions["packages"]["torch"] == torch.__version__
    assert versions["command"] == ["python", "x"]
    assert open_run_folder(folder.path).config(RunConfig) == config


def test_the_default_folder_is_named_by_time_and_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig(target=1.34)
    first = create_run_folder(config, name="bandgap*density^0.5", output=None)
    second = create_run_folder(config, name="bandgap*density^0.5", output=None)
    assert first.path.parent.name == "runs"
    assert "bandgap-density-0-5" in first.path.name
    assert first.path != second.path


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    create_run_folder(RunConfig(target=1), name="x", output=str(tmp_path))
    with pytest.raises(RunFolderError, match="resume="):
        create_run_folder(RunConfig(target=2), name="x", output=str(tmp_path))


@pytest.mark.parametrize("content", [None, "[1, 2", "reward: nonsense"])
def test_a_folder_without_a_readable_configuration_is_no_run(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / CONFIG).write_text(content)
    with pytest.raises(RunFolderError):
        open_run_folder(tmp_path).config(RunConfig)


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(RunFolderError, match="another process is working there"), locked(tmp_path / "run"):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(RunFolderError, match="cannot lock"), locked(tmp_path):
        pass


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "now")
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(new_folder, ["x"] * 8))
    assert len(set(folders)) == 8
    assert all(folder.is_dir() for folder in folders)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nowhere"):
        open_run_folder(tmp_path / "nowhere")


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot create"):
        create_run_folder(RunConfig(target=1), name="x", output=str(tmp_path / "file" / "run"))


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "No permission")])
def test_a_full_disk_or_a_read_only_one_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    path = tmp_path / "candidates.csv"
    write_atomic(path, "old")

    def fail(descriptor: int) -> None:
        del descriptor
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_folder.os, "fsync", fail)
    with pytest.raises(RunFolderError, match=words):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert no_leftovers(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_really_full_device_is_reported_when_the_log_is_written(tmp_path: Path) -> None:
    folder = create_run_folder(RunConfig(target=1), name="x", output=str(tmp_path))
    (folder / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match="disk is full"):
        folder.log("step", loss=1.0)


def test_the_log_keeps_events_in_order_and_survives_a_cut_line(tmp_path: Path) -> None:
    folder = create_run_folder(RunConfig(target=1), name="x", output=str(tmp_path))
    for step in range(3):
        folder.log("step", step=step, loss=torch.tensor(0.5))
    folder.log("done")
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"event": "step", "ste')  # killed while writing
    again = open_run_folder(tmp_path)
    again.mend()
    again.log("step", step=3)
    assert [record["step"] for record in again.read_log("step")] == [0, 1, 2, 3]
    assert [record["event"] for record in again.read_log()] == ["step", "step", "step", "done", "step"]


def test_reading_a_run_that_is_being_written_leaves_its_files_alone(tmp_path: Path) -> None:
    create_run_folder(RunConfig(target=1), name="x", output=str(tmp_path))
    (tmp_path / ".candidates.csv.1.tmp").write_text("half")
    (tmp_path / "log.jsonl").write_text('{"event": "st')
    open_run_folder(tmp_path)
    assert (tmp_path / ".candidates.csv.1.tmp").read_text() == "half"
    assert (tmp_path / "log.jsonl").read_text() == '{"event": "st'
    open_run_folder(tmp_path).mend()
    assert not (tmp_path / ".candidates.csv.1.tmp").exists()


def test_a_checkpoint_comes_back_equal(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", "sampler", TENSORS, {"step": 3, "name": "x"})
    tensors, state = load_checkpoint(tmp_path / "checkpoint", "sampler")
    assert state == {"step": 3, "name": "x"}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_a_new_checkpoint_replaces_the_old_one(tmp_path: Path) -> None:
    for step in range(3):
        save_checkpoint(tmp_path / "checkpoint", "sampler", {"x": torch.tensor([step])}, {"step": step})
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert load_checkpoint(tmp_path / "checkpoint", "sampler")[1] == {"step": 2}


def test_a_checkpoint_that_cannot_be_finished_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "checkpoint", "sampler", TENSORS, {"step": 1})

    def full_when_json(path: Path, content: bytes | str) -> None:
        if path.suffix == ".json":
            raise RunFolderError("the disk is full")
        write_atomic(path, content)

    monkeypatch.setattr(run_folder, "write_atomic", full_when_json)
    with pytest.raises(RunFolderError):
        save_checkpoint(tmp_path / "checkpoint", "sampler", {"x": torch.zeros(2)}, {"step": 2})
    tensors, state = load_checkpoint(tmp_path / "checkpoint", "sampler")
    assert state == {"step": 1}
    assert set(tensors) == set(TENSORS)


def damage(path: Path, how: str) -> None:
    header = path / "checkpoint.json"
    weights = next(path.glob("*.safetensors"))
    content: dict[str, Any] = json.loads(header.read_text())
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif how == "truncated header":
        header.write_text(header.read_text()[:40])
    elif how == "no weights":
        weights.unlink()
    elif how == "foreign":
        header.write_text('{"state_dict": {}}')
    elif how == "future":
        header.write_text(json.dumps(content | {"format_version": 99}))
    elif how == "missing":
        header.unlink()
    elif how == "incomplete":
        del content["sha256"]
        header.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated weights", "truncated or was changed"),
        ("truncated header", "truncated or no checkpoint"),
        ("no weights", "beside it"),
        ("foreign", "not written by this project"),
        ("future", "format version 99"),
        ("missing", "no checkpoint"),
        ("incomplete", "lacks sha256"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_reason(tmp_path: Path, how: str, message: str) -> None:
    save_checkpoint(tmp_path / "checkpoint", "sampler", TENSORS, {"step": 1})
    damage(tmp_path, how)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "checkpoint", "sampler")


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", "prior", TENSORS, {})
    with pytest.raises(CheckpointError, match="of a prior, not of a sampler"):
        load_checkpoint(tmp_path / "checkpoint", "sampler")


def test_a_configuration_of_another_command_is_refused(tmp_path: Path) -> None:
    create_run_folder(SampleConfig(run="x"), name="x", output=str(tmp_path))
    with pytest.raises(RunFolderError, match="not the configuration of a run"):
        open_run_folder(tmp_path).config(RunConfig)


@pytest.mark.slow
def test_kill_minus_nine_while_writing_checkpoints_leaves_a_whole_one(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from discover.run_folder import save_checkpoint
        step = 0
        while True:
            step += 1
            stem = Path(sys.argv[1]) / "checkpoint"
            save_checkpoint(stem, "sampler", {"x": torch.full((20000,), step)}, {"step": step})
            print(step, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    tensors, state = load_checkpoint(tmp_path / "checkpoint", "sampler")
    assert state["step"] >= 5
    assert bool((tensors["x"] == state["step"]).all())
