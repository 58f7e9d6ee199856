"""Files that survive: a power cut at any moment, a full disk, a place that cannot be written to."""

import ast
import errno
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import featnorm as fn
from featnorm import archive
from featnorm._utils import files
from featnorm._utils.files import WriteError, replacing, try_place, write_text
from featnorm._utils.sealed import write_sealed
from featnorm.cli.show import prepare_folder, require_file_place
from featnorm.drift import DriftMonitor
from featnorm.image_scorer import ImageVerdict
from featnorm.records import FORMATS, Journal
from featnorm.report.drift import Course, write_drift_page
from featnorm.training.runs import log, write_checkpoint

VERDICT = ImageVerdict("a.png", 1.0, 0.5, True, None, None)
posix = pytest.mark.skipif(os.name == "nt", reason="of POSIX file systems")


class Disk:
    """A folder on a file system that keeps no more than it must.

    Of a file it keeps what was in it when it was last flushed, and nothing where it never was. Of a folder it
    keeps the names of when that was last flushed; but it may also have got to the newer ones by itself, as a
    journal of names alone does, which makes a name appear before the content.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.contents: dict[int, bytes] = {}
        self.names: dict[str, int] = {}
        # As long as a file is open, no other one gets its number.
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
        """Note what there may be after a power cut now."""
        for names in (self.names, self._current()):
            self.outcomes.append({name: self.contents.get(number, b"") for name, number in names.items()})

    def survivors(self) -> dict[str, bytes]:
        """Return what there is for certain after a power cut now."""
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
    """Write the table of a run; its own journal is there before."""
    with Journal(out, {}, 1) as kept:
        kept.add(0, [VERDICT])
        kept.write(out)


def scorer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return fn.Scorer(model, fn.NAN()).calibrate([torch.randn(40, 4)])


def page(out):
    monitor = DriftMonitor([1.0, 2.0])
    course = Course()
    evidence = monitor.update([1.5]).numpy()
    course.add(evidence, evidence, evidence)
    write_drift_page(out, monitor, course, fn.Calibration(torch.arange(40.0)), summary="", facts={})


WRITERS = {
    "d.featnorm": lambda out: scorer().save(out),
    "checkpoint.pt": lambda out: write_checkpoint(out, {"run": {}, "epoch": 1, "model": {"w": torch.ones(3)}}),
    "log.jsonl": lambda out: log(out, {"epoch": 1}),
    "result.json": lambda out: write_sealed(out, {"auroc": 0.5}),
    "page.html": page,
    "table.md": lambda out: write_text(out, "| a |\n"),
    **{f"t{ending}": journal for ending in FORMATS},
}


@posix
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("before", [True, False])
def test_a_power_cut_leaves_the_earlier_file_or_the_whole_new_one(tmp_path, name, before):
    out = tmp_path / name
    old = None
    if before:
        # As a log that may go on.
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


@posix
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


@posix
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_the_forgetful_disk_forgets(tmp_path):
    """It sees what the library did before: a file that is renamed and never flushed, and one written in place."""

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


@posix
def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch):
    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "t", "new")
    assert (tmp_path / "t").read_text() == "new"


@posix
def test_a_folder_that_cannot_be_read_is_not_flushed(tmp_path, monkeypatch):
    """As one with the permissions -wx, which whoever is root can read all the same."""
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
    """Files may grow to a size and no more, as on a disk that is full."""
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


@posix
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_keeps_the_earlier_file(tmp_path, name):
    out = tmp_path / name
    log(out, {"epoch": 0})
    before = out.read_bytes()
    with room_for(4), pytest.raises(WriteError) as caught:
        WRITERS[name](out)
    words = str(caught.value)
    assert words.startswith(f"cannot write {tmp_path / ''}/".replace("//", "/"))
    assert name in words.split(":")[0]
    assert "MB are free): free some space, or choose another place" in words
    assert "\n" not in words
    assert caught.value.errno == errno.EFBIG
    assert out.read_bytes() == before
    assert not [file for file in tmp_path.iterdir() if file.name not in (name, f".{name}.part", f".{name}.lock")]


@posix
def test_a_journal_on_a_full_disk_goes_on_when_there_is_room(tmp_path):
    with Journal(tmp_path / "t.csv", {}, 1) as kept:
        kept.add(0, [VERDICT])
        room = kept.path.stat().st_size + 20
        with room_for(room), pytest.raises(WriteError, match=r"cannot write .*\.t\.csv\.part"):
            kept.add(1, [VERDICT])
    with Journal(tmp_path / "t.csv", {}, 1) as kept:
        assert (kept.missing(2), kept.damaged) == ([1], None)


def test_what_the_system_says_is_kept(tmp_path):
    for number in (errno.ENOSPC, errno.EIO, errno.EROFS):
        with pytest.raises(WriteError, match=os.strerror(number)) as caught, replacing(tmp_path / "t"):
            raise OSError(number, os.strerror(number))
        assert caught.value.errno == number
        assert ("MB are free" in str(caught.value)) == (number == errno.ENOSPC)
    # What befalls in the block and has nothing to do with the file stays what it is.
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "t"):
        (tmp_path / "other").read_text()
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "t"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@posix
def test_names_as_long_as_names_can_be(tmp_path):
    name = 250 * "n" + ".csv"
    write_text(tmp_path / name, "whole")
    try_place(tmp_path / name)
    assert (tmp_path / name).read_text() == "whole"
    with pytest.raises(ValueError, match="cannot be written: File name too long"):
        try_place(tmp_path / (300 * "n"))
    with pytest.raises(OSError, match=r"cannot write .*: File name too long"):
        write_text(tmp_path / (300 * "n"), "whole")


def refused_in(folder, monkeypatch, error):
    """Let no file be made in a folder, as on a file system that is read-only; root may write anywhere else."""
    really = os.open

    def refuse(path, flags, *rest, **options):
        if flags & os.O_CREAT and Path(os.fsdecode(path)).parent == folder:
            raise OSError(error, os.strerror(error), path)
        return really(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ENOENT])
def test_a_place_that_cannot_be_written_to_is_found_before_the_work(tmp_path, monkeypatch, error):
    refused_in(tmp_path, monkeypatch, error)
    for check in (
        lambda: try_place(tmp_path / "t.csv"),
        lambda: require_file_place(tmp_path / "t.csv", []),
    ):
        with pytest.raises(ValueError, match=rf"t\.csv cannot be written: {os.strerror(error)}"):
            check()
    with pytest.raises(ValueError, match=rf"is no folder that can be written to: {os.strerror(error)}"):
        prepare_folder(tmp_path, [])


def test_a_place_that_is_taken_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder is a folder: name a file"):
        try_place(tmp_path / "folder")
    (tmp_path / "index.html").mkdir()
    with pytest.raises(ValueError, match=r"index\.html is a folder"):
        prepare_folder(tmp_path, [tmp_path / "index.html"])
    with pytest.raises(ValueError, match=r"there is no folder .*none to write t to"):
        try_place(tmp_path / "none" / "t")
    (tmp_path / "file").write_text("file")
    with pytest.raises(ValueError, match=r"there is no folder .*file to write t to"):
        try_place(tmp_path / "file" / "t")
    try_place(tmp_path / "file")
    try_place(tmp_path / "new")
    assert (tmp_path / "file").read_text() == "file"
    assert not (tmp_path / "new").exists()


@posix
def test_a_file_that_cannot_be_replaced_is_found_before_the_work(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is no regular file"):
        try_place(tmp_path / "pipe")
    file = tmp_path / "file"
    file.write_text("file")
    file.chmod(0o400)
    try_place(file)  # which a rename replaces
    with monkeypatch.context() as patch:
        # In a folder where everybody writes, the file of another user.
        patch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
        try_place(file)
        tmp_path.chmod(0o1777)
        with pytest.raises(ValueError, match="file is there already and cannot be replaced"):
            try_place(file)
    with monkeypatch.context() as patch:
        # Immutable, by chattr +i.
        really = Path.open

        def refuse(path, mode="r", *rest, **options):
            if path == file and "+" in mode:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
            return really(path, mode, *rest, **options)

        patch.setattr(Path, "open", refuse)
        with pytest.raises(ValueError, match="file is there already and cannot be replaced"):
            try_place(file)


def test_an_archive_of_a_model_on_a_full_disk(tmp_path, monkeypatch):
    """safetensors has errors of its own, which are no OSError."""

    def fail(*_):
        raise archive.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(archive, "save_file", fail)
    with pytest.raises(WriteError, match=r"cannot write .*d\.featnorm: No space left on device \("):
        scorer().save(tmp_path / "d.featnorm")


# Who else writes: of which files, and why that is sound.
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
    """Yield the functions of a module that write files in any other way than by `replacing`."""

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
