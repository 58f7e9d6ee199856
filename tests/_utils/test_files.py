"""Writing of files: a power cut at any moment, a full disk, a path that cannot be written."""

import ast
import errno
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import featnorm as fn
from featnorm import archive
from featnorm._utils import files
from featnorm._utils.files import WriteError, check_writable, replacing, write_text
from featnorm._utils.sealed import write_sealed
from featnorm.cli.console import prepare_folder, require_file_place
from featnorm.drift import DriftMonitor
from featnorm.records import FORMATS, Journal
from featnorm.report.drift import StreamHistory, write_drift_page
from featnorm.training.runs import log, write_checkpoint
from featnorm.verdict import ItemVerdict

VERDICT = ItemVerdict("a.png", 1.0, 0.5, True, None, None)


class Disk:
    """A folder on a file system that keeps only what it guarantees to keep.

    A file has its content as of its last flush, and is empty if it was never flushed. A folder has its names as of
    its last flush, or the newer ones: a file system with a journal of names alone may write a name before the
    content.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.contents: dict[int, bytes] = {}
        self.names: dict[str, int] = {}
        # While a file is open, no other file gets its inode number.
        self.held: list[int] = []
        self.outcomes: list[dict[str, bytes]] = []
        self._fsync, self._replace = os.fsync, os.replace
        for file in folder.iterdir():
            self.contents[self._number(file)] = file.read_bytes()
        self.names = self._current()
        patch.setattr(os, "fsync", self.fsync)
        patch.setattr(os, "replace", self.replace)

    def _number(self, file: Path) -> int:
        self.held.append(os.open(file, os.O_RDONLY))
        return os.fstat(self.held[-1]).st_ino

    def _current(self) -> dict[str, int]:
        return {file.name: self._number(file) for file in self.folder.iterdir() if file.is_file()}

    def fsync(self, handle: int) -> None:
        self.cut()
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            if found.st_ino == self.folder.stat().st_ino:
                self.names = self._current()
        else:
            self.contents[found.st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()
        self._fsync(handle)
        self.cut()

    def replace(self, source, target) -> None:
        self.cut()
        self._replace(source, target)
        self.cut()

    def cut(self) -> None:
        """Record what there may be after a power cut now."""
        for names in (self.names, self._current()):
            self.outcomes.append({name: self.contents.get(number, b"") for name, number in names.items()})

    def survivors(self) -> dict[str, bytes]:
        """Return what there is in any case after a power cut now."""
        return {name: self.contents.get(number, b"") for name, number in self.names.items()}


@contextmanager
def forgetful(folder: Path):
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(folder, patch)
        try:
            yield disk
        finally:
            for handle in disk.held:
                os.close(handle)


def journal(out):
    """Write the table of a run, whose journal exists before."""
    with Journal(out, {}, 1) as kept:
        kept.add(0, [VERDICT])
        kept.write(out)


def scorer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return fn.Scorer(model, fn.NAN()).calibrate([torch.randn(40, 4)])


def page(out):
    monitor = DriftMonitor([1.0, 2.0])
    history = StreamHistory()
    evidence = monitor.update([1.5])
    history.add(evidence, evidence, evidence)
    write_drift_page(out, monitor, history, archive.StoredCalibration(np.arange(40.0), 0.95), summary="", facts={})


WRITERS = {
    "d.featnorm": lambda out: scorer().save(out),
    "checkpoint.pt": lambda out: write_checkpoint(out, {"run": {}, "epoch": 1, "model": {"w": torch.ones(3)}}),
    "log.jsonl": lambda out: log(out, {"epoch": 1}),
    "result.json": lambda out: write_sealed(out, {"auroc": 0.5}),
    "page.html": page,
    "table.md": lambda out: write_text(out, "| a |\n"),
    **{f"t{ending}": journal for ending in FORMATS},
}


@pytest.mark.posix
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("before", [True, False])
def test_a_power_cut_leaves_the_earlier_file_or_the_whole_new_one(tmp_path, name, before):
    out = tmp_path / name
    old = None
    if before:
        # A log that may be continued.
        log(out, {"epoch": 0})
        old = out.read_bytes()
    with forgetful(tmp_path) as disk:
        WRITERS[name](out)
        new = out.read_bytes()
        assert disk.survivors()[name] == new
    assert new != old
    left = {outcome.get(name) for outcome in disk.outcomes}
    assert left == {old, new}
    assert not [file for file in tmp_path.iterdir() if file.name not in (name, f".{name}.part", f".{name}.lock")]


@pytest.mark.posix
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_power_cut_leaves_every_batch_that_was_added(tmp_path):
    with forgetful(tmp_path) as disk, Journal(tmp_path / "t.csv", {}, 1) as kept:
        for batch in range(3):
            kept.add(batch, [VERDICT])
            assert disk.survivors()[".t.csv.part"] == kept.path.read_bytes()
    for outcome in disk.outcomes:
        left = outcome.get(".t.csv.part", b"")
        assert kept.path.read_bytes().startswith(left)
        assert left[-1:] in (b"", b"\n")


@pytest.mark.posix
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_the_simulated_disk_loses_data(tmp_path):
    """The check detects a file that is renamed but never flushed, and a file written in place."""

    def renamed(out):
        (tmp_path / "new").write_text("new")
        os.replace(tmp_path / "new", out)

    for write in (renamed, lambda out: out.write_text("new")):
        (tmp_path / "t").write_text("old")
        with forgetful(tmp_path) as disk:
            write(tmp_path / "t")
            disk.cut()
            assert {outcome["t"] for outcome in disk.outcomes} != {b"old", b"new"}
            assert disk.survivors()["t"] != b"new"


@pytest.mark.posix
def test_a_folder_that_cannot_be_flushed_is_not_an_error(tmp_path, monkeypatch):
    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "t", "new")
    assert (tmp_path / "t").read_text() == "new"


@pytest.mark.posix
def test_a_folder_that_cannot_be_read_is_not_flushed(tmp_path, monkeypatch):
    """Simulate the permissions -wx, which do not keep root from reading."""
    really = os.open

    def refuse(path, flags, *rest, **options):
        if Path(os.fsdecode(path)) == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return really(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    write_text(tmp_path / "t", "new")
    assert (tmp_path / "t").read_text() == "new"


@contextmanager
def room_for(size):
    """Limit the size of files, as a full disk does."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.posix
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_reported_and_keeps_the_earlier_file(tmp_path, name):
    out = tmp_path / name
    log(out, {"epoch": 0})
    before = out.read_bytes()
    with room_for(4), pytest.raises(WriteError) as caught:
        WRITERS[name](out)
    words = str(caught.value)
    assert words.startswith(f"cannot write {tmp_path / ''}/".replace("//", "/"))
    assert name in words.split(":")[0]
    assert "MB are free): free some space, or choose another path" in words
    assert "\n" not in words
    assert caught.value.errno == errno.EFBIG
    assert out.read_bytes() == before
    assert not [file for file in tmp_path.iterdir() if file.name not in (name, f".{name}.part", f".{name}.lock")]


@pytest.mark.posix
def test_a_journal_on_a_full_disk_resumes_when_there_is_room(tmp_path):
    with Journal(tmp_path / "t.csv", {}, 1) as kept:
        kept.add(0, [VERDICT])
        room = kept.path.stat().st_size + 20
        with room_for(room), pytest.raises(WriteError, match=r"cannot write .*\.t\.csv\.part"):
            kept.add(1, [VERDICT])
    with Journal(tmp_path / "t.csv", {}, 1) as kept:
        assert (kept.missing(2), kept.damaged) == ([1], None)


def test_the_systems_error_is_kept(tmp_path):
    for number in (errno.ENOSPC, errno.EIO, errno.EROFS):
        with pytest.raises(WriteError, match=os.strerror(number)) as caught, replacing(tmp_path / "t"):
            raise OSError(number, os.strerror(number))
        assert caught.value.errno == number
        assert ("MB are free" in str(caught.value)) == (number == errno.ENOSPC)
    # Other errors in the block are raised unchanged.
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "t"):
        (tmp_path / "other").read_text()
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "t"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.posix
def test_names_of_the_maximum_length(tmp_path):
    name = 250 * "n" + ".csv"
    write_text(tmp_path / name, "whole")
    check_writable(tmp_path / name)
    assert (tmp_path / name).read_text() == "whole"
    with pytest.raises(ValueError, match="cannot be written: File name too long"):
        check_writable(tmp_path / (300 * "n"))
    with pytest.raises(OSError, match=r"cannot write .*: File name too long"):
        write_text(tmp_path / (300 * "n"), "whole")


def refused_in(folder, monkeypatch, error):
    """Simulate a read-only file system for one folder, also for root."""
    really = os.open

    def refuse(path, flags, *rest, **options):
        if flags & os.O_CREAT and Path(os.fsdecode(path)).parent == folder:
            raise OSError(error, os.strerror(error), path)
        return really(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENOENT])
def test_a_folder_that_cannot_be_written_is_reported_before_the_work(tmp_path, monkeypatch, error):
    refused_in(tmp_path, monkeypatch, error)
    for check in (
        lambda: check_writable(tmp_path / "t.csv"),
        lambda: require_file_place(tmp_path / "t.csv", []),
    ):
        with pytest.raises(ValueError, match=rf"t\.csv cannot be written: {os.strerror(error)}"):
            check()
    with pytest.raises(ValueError, match=rf"cannot write to the folder --out .*: {os.strerror(error)}"):
        prepare_folder(tmp_path, [])


def test_a_path_that_is_not_a_file_is_reported_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder is a folder: name a file"):
        check_writable(tmp_path / "folder")
    (tmp_path / "index.html").mkdir()
    with pytest.raises(ValueError, match=r"index\.html is a folder"):
        prepare_folder(tmp_path, [tmp_path / "index.html"])
    with pytest.raises(ValueError, match=r"cannot write t: there is no folder .*none"):
        check_writable(tmp_path / "none" / "t")
    (tmp_path / "file").write_text("file")
    with pytest.raises(ValueError, match=r"cannot write t: there is no folder .*file"):
        check_writable(tmp_path / "file" / "t")
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new")
    assert (tmp_path / "file").read_text() == "file"
    assert not (tmp_path / "new").exists()


@pytest.mark.posix
def test_a_file_that_cannot_be_replaced_is_reported_before_the_work(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        check_writable(tmp_path / "pipe")
    file = tmp_path / "file"
    file.write_text("file")
    file.chmod(0o400)
    check_writable(file)  # it can be replaced by a rename
    with monkeypatch.context() as patch:
        # The file of another user, in a folder that everybody may write to.
        patch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
        check_writable(file)
        tmp_path.chmod(0o1777)
        with pytest.raises(ValueError, match="file already exists and cannot be replaced"):
            check_writable(file)
    with monkeypatch.context() as patch:
        # Immutable, as after chattr +i.
        really = Path.open

        def refuse(path, mode="r", *rest, **options):
            if path == file and "+" in mode:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
            return really(path, mode, *rest, **options)

        patch.setattr(Path, "open", refuse)
        with pytest.raises(ValueError, match="file already exists and cannot be replaced"):
            check_writable(file)


def test_an_archive_of_a_model_on_a_full_disk(tmp_path, monkeypatch):
    """safetensors raises errors of its own, which are not OSErrors."""

    def fail(*_):
        raise archive.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(WriteError, match=r"cannot write .*d\.featnorm: No space left on device \("):
        scorer().save(tmp_path / "d.featnorm")


# Functions that write files otherwise, and why that is safe.
OTHERS = {
    ("_utils/files.py", "append"): "flushes what it appends",
    ("_utils/files.py", "acquire_lock"): "writes nothing",
    ("_utils/files.py", "write_text"): "the function that is meant",
    ("records.py", "_write_csv"): "the temporary file of Journal.write",
    ("records.py", "_write_jsonl"): "the temporary file of Journal.write",
    ("training/runs.py", "write_checkpoint"): "the temporary file, and memory",
    ("paper/studies/imagenet.py", "_bank"): "is made again by every run",
    ("inputs/cache.py", "_append"): "has checksums of its own",
}


def writers(source: str):
    """Yield the functions of a module that write files other than by `replacing`."""

    def writes(call: ast.Call) -> bool:
        modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        opens = any(str(mode)[:1] in "wax" for mode in modes)
        match call.func:
            case ast.Attribute(value=ast.Name(id="torch" | "onnx"), attr="save"):
                return True
            case ast.Attribute(attr="write_text" | "write_bytes") | ast.Name(id="save_file"):
                return True
            case ast.Attribute(attr="open") | ast.Name(id="open"):
                return opens
        return False

    def replaces(item: ast.withitem) -> bool:
        match item.context_expr:
            case ast.Call(func=ast.Name(id="replacing")):
                return True
        return False

    def visit(node: ast.AST, function: str):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.With) and any(map(replaces, node.items)):
            return
        if isinstance(node, ast.Call) and writes(node):
            yield function
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(source), "")


def test_every_file_is_written_by_replacing():
    root = Path(files.__file__).parents[1]
    found = {
        (file.relative_to(root).as_posix(), function)
        for file in root.rglob("*.py")
        for function in writers(file.read_text("utf-8"))
    }
    assert found <= OTHERS.keys()
    wrong = "def f(p):\n    p.write_text('x')\n    p.open('a')\n    p.open()\n    write_text(p, 'x')\n"
    assert list(writers(wrong)) == ["f", "f"]
