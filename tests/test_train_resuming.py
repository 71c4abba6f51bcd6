"""A run keeps its word: options given with --resume, epochs, a moved folder, and one owner at a time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runtime.errors import FileError, OptionError
from tests.image_folders import write_digits
from train import checkpoint as checkpoints
from train.__main__ import main
from train.data import splits
from train.ownership import LOCK_NAME, owned
from train.recipe import default_recipe
from train.resuming import with_options

ROOT = Path(__file__).parents[1]
OWN = """
import sys, time
from pathlib import Path
from train.ownership import owned
with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(60)
"""


def start_owner(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWN, str(folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "owned\n"
    return process


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs on a folder of images."""
    root = tmp_path_factory.mktemp("resuming")
    write_digits(root / "mine", {"zero": 12, "one": 12})
    main(["--data", f"folder:{root / 'mine'}", "--image-size", "12", "--epochs", "2", "--method", "plain",
          "--runs", str(root / "runs"), "--name", "a", "--workers", "0", "--bits", "4"])  # fmt: skip
    return root / "runs" / "a"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "runs" / "a")


def test_a_second_process_is_refused_and_a_killed_one_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_owner(folder)
    with pytest.raises(OptionError, match=rf"^{folder}: another process trains there \(process {process.pid} on "):
        owned(folder).__enter__()
    for arguments in (["--data", "digits", "--runs", str(tmp_path), "--name", "run", "--overwrite"],):
        with pytest.raises(OptionError, match="another process trains there"):
            main(arguments)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (folder / LOCK_NAME).exists()
    with owned(folder):
        assert (folder / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(OptionError, match="another process trains there"):
            owned(folder).__enter__()
    assert list(folder.iterdir()) == []


def test_a_lock_file_that_nobody_holds_is_taken_over(tmp_path: Path) -> None:
    for left in ("", "process 999999999 on nowhere", f"process {os.getpid()} on here", "\udcff"):
        (tmp_path / LOCK_NAME).write_bytes(os.fsencode(left))
        with owned(tmp_path):
            pass
        assert not (tmp_path / LOCK_NAME).exists()


def test_of_many_that_start_at_once_one_owns_the_folder_at_a_time(tmp_path: Path) -> None:
    inside, most, refused = [0], [0], [0]
    guard = threading.Lock()

    def work() -> None:
        for _ in range(100):
            try:
                with owned(tmp_path):
                    with guard:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    with guard:
                        inside[0] -= 1
            except OptionError:
                with guard:
                    refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert refused[0] < 400


def test_a_folder_that_cannot_be_owned_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"cannot be written \(.*\); choose a folder you may write to$"):
        owned(tmp_path / "file" / "run").__enter__()
    with pytest.raises(FileError, match=r"absent/ckpt.pt: no such file"):
        main(["--resume", str(tmp_path / "absent")])
    assert not (tmp_path / "absent").exists()


def test_the_lock_is_gone_after_an_error(copy: Path) -> None:
    (copy / "ckpt.pt").write_bytes(b"")
    with pytest.raises(FileError, match="no complete torch file"):
        main(["--resume", str(copy)])
    assert not (copy / LOCK_NAME).exists()


def test_a_finished_run_says_so_and_keeps_its_parameters(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (copy / "ckpt.pt").read_bytes()
    main(["--resume", str(copy)])
    out = capsys.readouterr().out
    assert f"finished all 2 epochs are done; train on with --resume {copy} --epochs 4\n" in out
    assert "note" not in out
    assert (copy / "ckpt.pt").read_bytes() == before


def test_every_option_that_a_resumed_run_does_not_take_is_named(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bits.json").write_text('{"conv2": 3}')
    given = {
        "--bits": "8", "--method": "sgt", "--lr": "0.5", "--batch-size": "7", "--seed": "3", "--arch": "resnet20",
        "--weight-quantizer": "lsq", "--bits-file": str(tmp_path / "bits.json"), "--optimizer": "adam",
        "--epochs": "1",
        "--name": "b", "--runs": "elsewhere", "--image-size": "99", "--split-seed": "4", "--init": "x.pt",
        "--recipe": "maleki2024-cifar10", "--temperature": "2",
    }  # fmt: skip
    flags = [
        "--overwrite",
        "--full-range",
        "--quantize-adds",
        "--no-bias-grid",
        "--flip",
        "--pretrained",
        "--class-weights",
    ]
    main(["--resume", str(copy), *(part for pair in given.items() for part in pair), *flags])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note     ")]
    assert {line.split()[1].rstrip(":") for line in notes} == {*given, *flags}
    assert "note     --bits 8: not taken with --resume; the run keeps 4" in notes
    assert "note     --epochs 1: not taken with --resume; the run keeps 2" in notes
    checkpoint = checkpoints.load(copy / "ckpt.pt")
    assert (checkpoint.quant.bits, checkpoint.recipe.method, len(checkpoint.history)) == (4, "plain", 2)


def test_options_that_say_what_the_run_is_anyway_are_not_worth_a_line(
    copy: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = checkpoints.load(copy / "ckpt.pt").recipe
    main(["--resume", str(copy), "--bits", "4", "--method", "plain", "--lr", str(recipe.lr), "--arch", "cnn2",
          "--epochs", "2", "--name", "a", "--runs", str(copy.parent), "--data", recipe.data, "--device", "cpu",
          "--workers", "0"])  # fmt: skip
    assert "note" not in capsys.readouterr().out


def test_more_epochs_are_trained_and_fewer_are_not(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--resume", str(copy), "--epochs", "3"])
    out = capsys.readouterr().out
    assert "note     --epochs 3: the run had 2 to go; its schedule is that of 3 from here on" in out
    assert "epoch   3/3" in out
    checkpoint = checkpoints.load(copy / "ckpt.pt")
    assert (checkpoint.recipe.epochs, len(checkpoint.history)) == (3, 3)


def test_another_data_set_is_refused(copy: Path, digits_checkpoint: checkpoints.Checkpoint) -> None:
    with pytest.raises(
        OptionError, match=r"^--data digits: the run trains on folder:.*mine; leave it out, or start"
    ):
        main(["--resume", str(copy), "--data", "digits"])
    with pytest.raises(OptionError, match=r"^--data folder:x: the run trains on digits"):
        with_options(digits_checkpoint, {"data": "folder:x"}, Path("runs/a"))


def test_a_moved_image_folder_can_be_named_and_is_remembered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_digits(tmp_path / "mine", {"zero": 12, "one": 12})
    options = ["--image-size", "12", "--method", "plain", "--runs", str(tmp_path), "--epochs", "1"]
    main(["--data", f"folder:{tmp_path / 'mine'}", *options, "--name", "moved"])
    (tmp_path / "mine").rename(tmp_path / "elsewhere")
    run = tmp_path / "moved"
    with pytest.raises(
        FileError, match=rf"^{tmp_path}/mine: no such folder; where the images have moved, name it"
    ):
        main(["--resume", str(run), "--epochs", "2"])
    monkeypatch.chdir(tmp_path)
    main(["--resume", str(run), "--data", "folder:elsewhere", "--epochs", "2"])
    assert splits.read(run / "split.json").root == str(tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    main(["--resume", str(run), "--epochs", "3"])
    checkpoint = checkpoints.load(run / "ckpt.pt")
    assert len(checkpoint.history) == 3
    assert splits.read(run / "split.json").name == checkpoint.recipe.data_name
    # It is the same run as one whose folder never moved.
    main(["--data", f"folder:{tmp_path / 'elsewhere'}", *options, "--name", "straight"])
    for epochs in ("2", "3"):
        main(["--resume", str(tmp_path / "straight"), "--epochs", epochs])
    straight = checkpoints.load(tmp_path / "straight" / "ckpt.pt")
    assert all((value == checkpoint.state_dict[name]).all() for name, value in straight.state_dict.items())


def test_a_folder_of_other_files_is_not_the_moved_one(copy: Path, tmp_path: Path) -> None:
    other = write_digits(tmp_path / "other", {"zero": 5, "one": 5})
    with pytest.raises(FileError, match=r"no such file; .*such images; restore it"):
        main(["--resume", str(copy), "--data", f"folder:{other}"])
    with pytest.raises(FileError, match=r"nowhere: no such folder; where the images have moved, name it"):
        main(["--resume", str(copy), "--data", f"folder:{tmp_path / 'nowhere'}"])


def test_a_run_replaces_nothing_that_it_reads(copy: Path, tmp_path: Path) -> None:
    before = (copy / "ckpt.pt").read_bytes()
    shared = ["--data", "digits", "--runs", str(copy.parent), "--name", "a", "--overwrite"]
    for option in ("--init", "--teacher"):
        with pytest.raises(FileError, match=r"ckpt\.pt: is an input, which is read; name another file to write"):
            main([*shared, option, str(copy / "ckpt.pt")])
    photos = write_digits(tmp_path / "photos", {"zero": 5, "one": 5})
    with pytest.raises(FileError, match=rf"lies in {photos}, whose files are read"):
        main(["--data", f"folder:{photos}", "--runs", str(photos)])
    assert (copy / "ckpt.pt").read_bytes() == before
    assert default_recipe("digits").init == ""
