from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.errors import FileError
from runtime.files import check_writable, read_bytes, remove_leftovers, write_atomically

ROOT = Path(__file__).parents[1]

WRITE = """
import sys
from runtime.errors import ClearpactError
from runtime.files import write_atomically
{before}
try:
    write_atomically(sys.argv[1], b"n" * int(sys.argv[2]))
except ClearpactError as error:
    print(error)
"""


def write_in_a_process(path: Path, size: int, before: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", WRITE.format(before=before), str(path), str(size)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root; the limit on the file size, below, fails in the same place")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_bytes_and_text_are_written_into_folders_made_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"\x00\xff")
    assert read_bytes(path) == b"\x00\xff"
    write_atomically(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(small_disk: Path) -> None:
    path = small_disk / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(
        FileError, match=f"^{path}: cannot be written \\(No space left on device\\); free space or"
    ):
        write_atomically(path, b"n" * 200_000)
    assert path.read_bytes() == b"old"
    assert list(small_disk.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    assert write_in_a_process(path, 200_000, limit) == (
        f"{path}: cannot be written (File too large); free space or choose a folder you may write to\n"
    )
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert write_in_a_process(path, 9_000, limit) == ""
    assert path.read_bytes() == b"n" * 9_000


def test_ctrl_c_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    # The disk is made slow, not the code under test: fsync waits until Ctrl-C has come.
    code = """
import os, sys, time
from runtime.files import write_atomically
def fsync(descriptor):
    print("half way", flush=True)
    time.sleep(60)
os.fsync = fsync
write_atomically(sys.argv[1], b"new")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half way\n"
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors.strip().endswith("KeyboardInterrupt")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_or_the_new_file_and_never_half_of_one(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    versions = [bytes([n]) * 300_000 for n in range(2)]
    write_atomically(path, versions[0])
    done = threading.Event()
    torn: list[int] = []

    def read() -> None:
        while not done.is_set():
            if (seen := read_bytes(path)) not in versions:
                torn.append(len(seen))

    reader = threading.Thread(target=read)
    reader.start()
    end = time.monotonic() + 0.5
    turn = 0
    while time.monotonic() < end:
        turn += 1
        write_atomically(path, versions[turn % 2])
    done.set()
    reader.join()
    assert torn == []
    assert turn > 1


def test_many_threads_may_write_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    threads = [threading.Thread(target=write_atomically, args=(path, bytes([n]) * 1000)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = path.read_bytes()
    assert data == data[:1] * 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    path = tmp_path / "file"
    assert write_in_a_process(path, 3, f"import os; os.umask({umask})") == ""
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_writing_leaves_the_umask_of_other_threads_alone(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        seen = set()
        done = threading.Event()

        def watch() -> None:
            status = Path("/proc/self/status")
            while not done.is_set():
                seen.add(next(line for line in status.read_text().splitlines() if line.startswith("Umask")))

        watcher = threading.Thread(target=watch)
        watcher.start()
        for n in range(200):
            write_atomically(tmp_path / f"{n}", b"")
        done.set()
        watcher.join()
        assert seen == {"Umask:\t0027"}
    finally:
        os.umask(before)


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x"
    with pytest.raises(FileError, match=r"cannot be written \(File name too long\)"):
        write_atomically(tmp_path / ("n" * 256), b"x")


@pytest.mark.parametrize(
    "write", [check_writable, lambda path: write_atomically(path, b"x")], ids=["check", "write"]
)
def test_a_folder_and_a_device_are_no_target(tmp_path: Path, write: object) -> None:
    assert callable(write)
    with pytest.raises(
        FileError, match=f"^{tmp_path}: is a folder, expected the name of a file to write; add a file"
    ):
        write(tmp_path)
    with pytest.raises(
        FileError, match=r"^/dev/null: is no regular file and would be replaced by one; name another"
    ):
        write("/dev/null")
    assert Path("/dev/null").is_char_device()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "write", [check_writable, lambda path: write_atomically(path, b"x")], ids=["check", "write"]
)
def test_a_folder_that_cannot_be_made_is_an_error_before_any_work(tmp_path: Path, write: object) -> None:
    assert callable(write)
    (tmp_path / "file").touch()
    with pytest.raises(
        FileError, match=r"file/model.onnx: cannot be written \(.+\); free space or choose a folder"
    ):
        write(tmp_path / "file" / "model.onnx")
    # Not even root may write there.
    with pytest.raises(
        FileError, match=r"^/proc/model.onnx: cannot be written \(.+\); free space or choose a folder"
    ):
        write("/proc/model.onnx")


def test_checking_leaves_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.onnx"
    check_writable(path)
    assert list(path.parent.iterdir()) == []
    path.write_bytes(b"old")
    check_writable(path)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_reading_says_what_stands_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=f"^{tmp_path}/absent: no such file; check the path$"):
        read_bytes(tmp_path / "absent")
    with pytest.raises(FileError, match=f"^{tmp_path}: is a folder, expected a file; name the file inside it$"):
        read_bytes(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(FileError, match=r"loop: cannot be read \(Too many levels of symbolic links\); check its"):
        read_bytes(tmp_path / "loop")


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    names = {".clearpact-00ff.tmp", "ckpt.pt", "notes.tmp"}
    for name in names:
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"ckpt.pt", "notes.tmp"}
    remove_leftovers(tmp_path / "nowhere")
