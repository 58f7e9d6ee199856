"""Images in object stores: S3's own protocol, spoken by moto on this machine, and the same folders beside it."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyarrow import fs

from featnorm.inputs import DataError, ItemError, open_source, source_loader
from featnorm.inputs.formats import PassedOver

server = pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[server]'")

# The server does not check them, but they must not appear in any output.
KEY, SECRET = "AKIAKEY", "hush%2Fhush"


@pytest.fixture(scope="module")
def settings():
    running = server.ThreadedMotoServer("127.0.0.1", 0)
    running.start()
    host, port = running.get_host_and_port()
    yield f"endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    running.stop()


@pytest.fixture(scope="module", params=["s3", "file"])
def put(request, settings):
    """Return a function that copies a folder to a store, and returns a function from paths to addresses."""

    def copy(folder: Path, bucket: str):
        if request.param == "file":
            return lambda name="": f"file://{folder}/{name}".rstrip("/")
        address = f"s3://{KEY}:{SECRET}@{bucket}"
        system, path = fs.FileSystem.from_uri(f"{address}?{settings}")
        system.create_dir(path)
        fs.copy_files(str(folder), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=system)
        return lambda name="": f"{address}/{name}".rstrip("/") + f"?{settings}"

    return copy


def picture(value):
    return Image.fromarray(np.full((6, 8, 3), value, np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("stored")
    for value, name in enumerate(
        ["photos/b/2.png", "photos/b/1.PNG", "photos/a/deep/x.png", "photos/a/.hidden.png", "photos/.git/y.png"]
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(root / name)
    (root / "photos/b/notes.txt").write_text("no image")
    (root / "photos/b/broken.png").write_bytes(b"\x89PNG")
    (root / "flat").mkdir()
    for value in range(12):
        picture(value).save(root / f"flat/{value:02}.png")
    (root / "one.png").write_bytes((root / "flat/03.png").read_bytes())
    (root / "spaced name").mkdir()
    picture(9).save(root / "spaced name/a b.png")
    shutil.copytree(root / "flat", root / "splits/train")
    shutil.copytree(root / "flat", root / "splits/test")
    (root / "tables").mkdir()
    for shard in range(2):
        images = [{"bytes": (root / f"flat/{6 * shard + i:02}.png").read_bytes(), "path": None} for i in range(5)]
        images.append({"bytes": None, "path": f"../flat/{6 * shard + 5:02}.png"})
        table = pa.table({"image": images, "label": list(range(6))})
        pq.write_table(table, root / f"tables/train-{shard}.parquet", row_group_size=4)
    (root / "empty").mkdir()
    (root / "empty/readme.md").write_text("nothing")
    return root


@pytest.fixture(scope="module")
def at(put, folder):
    return put(folder, "bucket")


def contents(source):
    return [(np.asarray(source.item(i)).tobytes(), source.label(i), source.digest(i)) for i in range(len(source))]


@pytest.mark.parametrize("name", ["flat", "spaced name", "tables", "tables/train-1.parquet", "splits/train"])
def test_the_same_images_as_in_a_folder(at, folder, name):
    stored, local = open_source(at(name)), open_source(str(folder / name))
    assert stored.title == local.title
    assert stored.class_names == local.class_names
    if not name.startswith("tables"):
        assert contents(stored) == contents(local)
        return
    # Image files that the rows name are read too.
    assert contents(stored) == contents(local)
    assert [stored.name(i) for i in range(len(stored))] == [local.name(i) for i in range(len(local))]


def test_classes_and_corrupt_files(at, folder):
    stored, local = open_source(at("photos")), open_source(str(folder / "photos"))
    assert stored.class_names == local.class_names == ["a", "b"]
    names = [stored.name(i).partition("photos/")[2] for i in range(len(stored))]
    assert names == [local.name(i).partition("photos/")[2] for i in range(len(local))]
    assert names == ["a/deep/x.png", "b/1.PNG", "b/2.png", "b/broken.png"]
    assert [stored.label(i) for i in range(4)] == [local.label(i) for i in range(4)] == [0, 1, 1, 1]
    with pytest.raises(ItemError, match=r"photos/b/broken\.png: "):
        stored.item(3)
    assert str(stored.passed_over) == "ignored 1 file that is not an image (.txt 1) and 2 hidden"
    assert stored.passed_over == local.passed_over


def test_images_are_recognized_by_their_content(put, tmp_path):
    """Files whose names do not tell their format are recognized by their first bytes."""
    folder = tmp_path / "f"
    (folder / "x").mkdir(parents=True)
    picture(1).save(folder / "x/a.png")
    (folder / "x/scan").write_bytes((folder / "x/a.png").read_bytes())
    (folder / "x/b.dat").write_bytes((folder / "x/a.png").read_bytes())
    (folder / "x/c.json").write_text("{}")
    (folder / "x/empty").touch()
    address = put(tmp_path, "content")("f")
    source = open_source(address)
    assert [source.name(i).rpartition("/")[2] for i in range(len(source))] == ["a.png", "b.dat", "scan"]
    assert [source.label(i) for i in range(3)] == [0, 0, 0]
    assert source.passed_over == PassedOver({".json": 1, "no ending": 1})


def test_slices_and_single_files(at, folder):
    assert contents(open_source(at("flat") + "[2:8:3]")) == contents(open_source(f"{folder}/flat[2:8:3]"))
    assert contents(open_source(at("flat") + "[-1:]")) == contents(open_source(f"{folder}/flat[11:]"))
    joined = open_source(at("one.png"), str(folder / "one.png"), at("tables"))
    assert len(joined) == 14
    assert joined.digest(0) == joined.digest(1)
    assert joined.identity(0) != joined.identity(1)
    assert contents(open_source(at("one.png"))) == contents(open_source(str(folder / "one.png")))
    assert open_source(at("one.png")).title == "one.png"
    with pytest.raises(ItemError, match=r"empty/readme\.md: not an image in a format that featnorm reads"):
        open_source(at("empty/readme.md")).item(0)


def test_keys_are_not_shown(at):
    sources = [open_source(at(name)) for name in ("flat", "tables")]
    shown = [
        text
        for source in sources
        for i in range(len(source))
        for text in (source.title, source.name(i), source.identity(i))
    ]
    for name in ("none", "empty", "splits"):
        with pytest.raises(DataError) as error:
            open_source(at(name))
        shown.append(str(error.value))
    assert not [text for text in shown if KEY in text or "hush" in text or "endpoint" in text]
    assert {source.identity(0) for source in sources}.isdisjoint({source.identity(1) for source in sources})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "no file or folder .*none: check the address"),
        ("empty", "no images or videos in .*empty"),
        ("splits", "several splits, which must not be mixed: name one of test, train"),
        ("empty/no.txt", "no file or folder .*empty/no.txt: check the address"),
    ],
)
def test_missing_data(at, name, message):
    with pytest.raises(DataError, match=message):
        open_source(at(name))


@pytest.mark.parametrize(
    "address", ["nope://bucket/x", "s3://", "s3:///", "://x", "s3://k:s@b?no_such=1", "hf://x"]
)
def test_invalid_addresses(address):
    with pytest.raises(DataError) as error:
        open_source(address)
    assert "\n" not in str(error.value)
    assert "k:s" not in str(error.value)


def test_a_store_that_does_not_respond():
    with pytest.raises(DataError, match="cannot list s3://b/x"):
        open_source("s3://k:s@b/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1&anonymous=true")


def test_a_file_that_is_gone(put, tmp_path):
    (tmp_path / "f").mkdir()
    picture(1).save(tmp_path / "f/a.png")
    address = put(tmp_path, "gone")("f")
    source = open_source(address)
    system, path = fs.FileSystem.from_uri(address)
    system.delete_file(f"{path}/a.png")
    with pytest.raises(ItemError, match=r"a\.png: "):
        source.item(0)


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_read_in_workers(at):
    source = open_source(at("flat"), at("tables"))
    source.item(1)  # what this process has opened must not disturb the workers
    loader = source_loader(source, to_tensor, batch_size=5, workers=2)
    assert [int(image[0, 0, 0]) for batch in loader for image in batch.inputs] == [*range(12), *range(12)]


def test_sources_can_be_pickled(at):
    source = open_source(at("tables"))
    source.item(0)
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)
    flat = open_source(at("flat"))
    assert contents(pickle.loads(pickle.dumps(flat))) == contents(flat)
