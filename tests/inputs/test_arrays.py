"""Rows of arrays and tables: opening, labels, hostile files, and what the commands make of them."""

import json
import os
import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import featnorm as fn
from featnorm.fitting import model_for
from featnorm.inputs import DataError, ItemError, SlicedSource, arrays, open_source, parquet, source_of
from featnorm.inputs.arrays import LabeledSource, class_labels, row_features
from featnorm.inputs.rows import Vector, fit_rows

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(240, 6)).astype(np.float32)
LABELS = (ROWS[:, 0] > 0).astype(int)


def stack(source):
    rows = fit_rows(source)
    return np.stack([rows(source.item(i)).numpy() for i in range(len(source))])


def parquet_of(path, column, **others):
    pq.write_table(pa.table({"vector": column, **others}), path, row_group_size=50)
    return path


def lists(rows, type_=None):
    return pa.array([None if row is None else list(map(float, row)) for row in rows], type_)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: np.save(p / "x.npy", ROWS),
        lambda p: np.save(p / "x.npy", ROWS.astype(np.float64)),
        lambda p: np.save(p / "x.npy", np.asfortranarray(ROWS)),
        lambda p: np.savez(p / "x.npz", ROWS),
        lambda p: np.savez_compressed(p / "x.npz", features=ROWS, labels=LABELS, names=np.arange(3)),
        lambda p: parquet_of(p / "x.parquet", lists(ROWS)),
        lambda p: parquet_of(p / "x.parquet", lists(ROWS, pa.large_list(pa.float32())), id=list(range(240))),
        lambda p: parquet_of(p / "x.parquet", lists(ROWS, pa.list_(pa.float32(), 6)), label=LABELS),
    ],
)
def test_vectors_of_every_kind_of_file(tmp_path, write):
    write(tmp_path)
    (file,) = tmp_path.glob("x.*")
    source = open_source(str(file))
    np.testing.assert_array_equal(stack(source), ROWS)
    assert (source.kind.name, source.width, source.name(7)) == ("rows", 6, "row 7")
    part = open_source(f"{file}[10:20]")
    np.testing.assert_array_equal(stack(part), ROWS[10:20])
    digests = [open_source(str(file)).digest(i) for i in range(240)]
    assert len(set(digests)) == 240
    assert row_features(source, Vector(6)).digests == digests


def test_types_and_orders_of_numbers_have_the_same_digests(tmp_path):
    rows = RNG.integers(-3, 4, (40, 5))
    found = []
    for dtype in (np.int8, np.int64, np.float16, np.float32, np.float64):
        np.save(tmp_path / "x.npy", rows.astype(dtype, order="F"))
        found.append([open_source(str(tmp_path / "x.npy")).digest(i) for i in range(40)])
    assert all(digests == found[0] for digests in found)


def test_labels_of_an_npz_file_and_of_a_column(tmp_path):
    np.savez(tmp_path / "x.npz", ROWS, y=np.array(["a", "b"])[LABELS])
    source = open_source(str(tmp_path / "x.npz"))
    assert source.class_names == ["a", "b"]
    assert [source.label(i) for i in range(240)] == LABELS.tolist()
    np.savez(tmp_path / "x.npz", rows=ROWS, kinds=LABELS)
    source = open_source(str(tmp_path / "x.npz"), label_column="kinds")
    assert [source.label(i) for i in range(240)] == LABELS.tolist()
    table = pd.DataFrame(ROWS, columns=list("abcdef")).assign(kind=np.array(["no", "yes"])[LABELS])
    table.to_csv(tmp_path / "x.csv", index=False)
    table.to_parquet(tmp_path / "x.parquet")
    for ending in ("csv", "parquet"):
        source = open_source(str(tmp_path / f"x.{ending}"), label_column="kind")
        assert source.class_names == ["no", "yes"]
        assert source.columns == tuple("abcdef")
        assert [source.label(i) for i in range(240)] == LABELS.tolist()


@pytest.mark.parametrize("ending", ["npy", "csv", "txt"])
@pytest.mark.parametrize("names", [None, ["left", "right"]])
def test_labels_of_a_file_of_their_own(tmp_path, ending, names):
    np.save(tmp_path / "x.npy", ROWS)
    given = LABELS if names is None else np.array(names)[LABELS]
    file = tmp_path / f"labels.{ending}"
    if ending == "npy":
        np.save(file, given)
    else:
        file.write_text("\n".join([*(["label"] * (ending == "csv")), *map(str, given)]) + "\n")
    source = LabeledSource(open_source(str(tmp_path / "x.npy")), file)
    assert source.class_names == names
    assert [source.label(i) for i in range(240)] == LABELS.tolist()
    with pytest.raises(DataError, match=r"labels\.\w+ has 240 labels, and x\[:99\] has 99 rows"):
        LabeledSource(open_source(f"{tmp_path / 'x.npy'}[:99]"), file)


def test_labels_that_are_missing_or_of_another_shape():
    assert class_labels([3, None, -1]) == ([3, None, -1], None)
    assert class_labels(np.array([1.0, np.nan, 0.0])) == ([1, None, 0], ["0.0", "1.0"])
    assert class_labels([True, None, False]) == ([1, None, 0], ["False", "True"])
    with pytest.raises(DataError, match=r"labels have shape \(2, 1\): expected one label per item"):
        class_labels(np.zeros((2, 1)))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (np.zeros(5), r"x has shape \(5,\) and type float64: expected real numbers of shape \(n, D\)"),
        (np.zeros((2, 3, 4)), r"x has shape \(2, 3, 4\)"),
        (np.zeros((0, 3)), r"x has shape \(0, 3\)"),
        (np.zeros((3, 0)), r"x has shape \(3, 0\)"),
        (np.zeros((3, 2), complex), "type complex128"),
        (np.array([["a", "b"]]), "type <U1"),
        (np.array([[1, None]], object), r"x\.npy holds Python objects, which are not loaded"),
    ],
)
def test_arrays_that_cannot_be_rows(tmp_path, values, match):
    np.save(tmp_path / "x.npy", values, allow_pickle=True)
    with pytest.raises(DataError, match=match):
        open_source(str(tmp_path / "x.npy"))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.npy", b"not an array", "cannot read .*x.npy: it was not written by numpy.save"),
        ("x.npy", b"", "cannot read .*x.npy: "),
        ("x.npz", b"PK", "cannot read .*x.npz: "),
        ("x.csv", b"a,b\n", "no rows in .*x.csv"),
        (
            "x.csv",
            b"0.5,1e3\n1,2\n",
            "the first row of .*x.csv holds numbers: add a row with the names of the col",
        ),
        ("x.parquet", b"PAR1", "cannot read .*x.parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        open_source(str(tmp_path / name))


def test_arrays_and_columns_that_leave_a_choice_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "x.npz", a=ROWS, b=ROWS)
    with pytest.raises(DataError, match=r"x holds 2 arrays of shape \(n, D\) \(a, b\): keep one"):
        open_source(str(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", ROWS, labels=LABELS[:3])
    with pytest.raises(DataError, match="x holds 240 rows, and 3 labels"):
        open_source(str(tmp_path / "x.npz"))
    with pytest.raises(DataError, match="no array 'kind' in x: it has labels, arr_0"):
        open_source(str(tmp_path / "x.npz"), label_column="kind")
    parquet_of(tmp_path / "x.parquet", lists(ROWS), other=lists(ROWS))
    with pytest.raises(DataError, match=r"x holds several columns of vectors \(vector, other\): keep one"):
        open_source(str(tmp_path / "x.parquet"))
    with pytest.raises(DataError, match="no column 'kind' in x: it has vector, label"):
        open_source(str(parquet_of(tmp_path / "x.parquet", lists(ROWS), label=LABELS)), label_column="kind")
    np.save(tmp_path / "y.npy", ROWS[:, :3])
    np.save(tmp_path / "x.npy", ROWS)
    with pytest.raises(DataError, match="the rows of x and y have different columns"):
        open_source(str(tmp_path / "x.npy"), str(tmp_path / "y.npy"))


def test_rows_of_a_csv_file_that_cannot_be_read_cost_no_other(tmp_path):
    lines = [b"\xef\xbb\xbfa,word", *(b"%d,w%d" % (i, i % 3) for i in range(50))]
    lines[3] = b"2"
    lines[5] = b"4,w1,5"
    lines[7] = b'6,"w\n1"'
    lines[9] = b"8,\xff"
    lines[11] = b"inf,w1"
    (tmp_path / "x.csv").write_bytes(b"\r\n".join(lines))
    source = open_source(str(tmp_path / "x.csv"))
    assert source.columns == ("a", "word")
    assert source.item(6) == {"a": "6", "word": "w\n1"}
    cells = "the row has {} cells, but the header has 2"
    for i, why in ((2, cells.format(1)), (4, cells.format(3)), (8, "it is not valid UTF-8")):
        with pytest.raises(ItemError, match=f"row {i}: {why}"):
            source.item(i)
    rows = fit_rows(source)
    assert not rows.gaps.any()
    features = row_features(source, rows)
    assert features.rows.tolist() == [i for i in range(50) if i not in (2, 4, 8, 10)]
    assert [name for name, _ in features.corrupt] == ["row 2", "row 4", "row 8", "row 10"]
    assert features.corrupt[3][1] == "column 'a' is infinite"


def test_vectors_that_are_missing_or_ragged_cost_no_other(tmp_path):
    given = [*ROWS[:100].tolist(), None, [1.0], [*map(float, "12345"), float("nan")]]
    source = open_source(str(parquet_of(tmp_path / "x.parquet", lists(given))))
    features = row_features(source, Vector(6))
    np.testing.assert_array_equal(features.values.numpy(), ROWS[:100])
    assert [why for _, why in features.corrupt] == [
        "no vector in this row",
        "it has 1 numbers: 6 are needed",
        "column 5 is nan in float32, which is not finite",
    ]


def test_rows_of_json_lines(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({"vector": row, "id": i}) for i, row in enumerate(ROWS.tolist()))
    )
    np.testing.assert_array_equal(stack(open_source(str(tmp_path / "x.jsonl"))), ROWS)
    lines = [{"a": i, "b": "x" if i % 2 else None, "c": [True, "yes", 3][i % 3]} for i in range(30)]
    (tmp_path / "x.jsonl").write_text("\n".join([*map(json.dumps, lines), "no JSON", '{"a": "NA"}']))
    source = open_source(str(tmp_path / "x.jsonl"))
    assert source.item(1) == {"a": 1, "b": "x", "c": "yes"}
    assert source.item(31) == {"a": None, "b": None, "c": None}
    rows = fit_rows(source)
    assert (rows.numbers, [*rows.categories]) == (["a"], ["b", "c"])
    assert [name for name, _ in row_features(source, rows).corrupt] == ["row 30"]


def test_shards_are_one_table(tmp_path):
    for k in range(2):
        parquet_of(tmp_path / f"part-{k}.parquet", lists(ROWS[k * 120 : (k + 1) * 120]))
    source = open_source(str(tmp_path))
    np.testing.assert_array_equal(stack(source), ROWS)
    assert source.name(130) == "part-1.parquet row 10"
    pq.write_table(pa.table({"a": [1]}), tmp_path / "part-1.parquet")
    with pytest.raises(DataError, match=r"part-1\.parquet has other columns than"):
        open_source(str(tmp_path))


def test_shards_of_lines_are_one_table(tmp_path):
    lines = [f"{i},w{i % 3},{i % 2}" for i in range(1300)]
    lines[3] = "3"
    (tmp_path / "part-0.csv").write_text("\n".join(["a,word,label", *lines[:1200]]))
    (tmp_path / "part-1.csv").write_text("\n".join(["a,word,label", *lines[1200:]]))
    source = open_source(str(tmp_path))
    assert (source.columns, source.class_names, source.label(1201)) == (("a", "word"), None, 1)
    for i in (0, 1023, 1024, 1199, 1200, 1299):
        assert source.item(i) == {"a": str(i), "word": f"w{i % 3}"}
    with pytest.raises(ItemError, match=r"part-0\.csv row 3: the row has 1 cells, but the header has 3"):
        source.item(3)
    assert source.name(1200) == "part-1.csv row 0"
    assert source.column("a")[2:5] == ["2", None, "4"]
    assert source.identity(3) != source.identity(4)
    (tmp_path / "part-1.csv").write_text("a,word\n1,x\n")
    with pytest.raises(DataError, match=r"part-1\.csv has other columns than .*part-0\.csv"):
        open_source(str(tmp_path))


def test_a_row_group_is_decoded_in_pieces(tmp_path, monkeypatch):
    for module in (arrays, parquet):
        monkeypatch.setattr(module, "PIECE", 16)
    source = open_source(str(parquet_of(tmp_path / "x.parquet", lists(ROWS[:120].tolist()))))
    opened = []
    real = parquet.open_parquet
    monkeypatch.setattr(parquet, "open_parquet", lambda *a: opened.append(a) or real(*a))
    np.testing.assert_array_equal([source.item(i) for i in range(120)], ROWS[:120])
    assert len(opened) == 2  # the first of three row groups was opened for the width
    order = np.random.default_rng(0).permutation(120)
    np.testing.assert_array_equal([source.item(i) for i in order], ROWS[order])
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.item(17), ROWS[17])

    def broken(*_):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(parquet, "open_parquet", broken)
        for i in (50, 66, 82):  # the pieces of the second row group
            with pytest.raises(DataError, match="the disk is gone"):
                copy.item(i)
    np.testing.assert_array_equal(copy.item(56), ROWS[56])


def test_a_group_of_rows_is_converted_as_it_is_read(tmp_path):
    words = [f"w{i}" for i in range(3000)]
    pq.write_table(pa.table({"a": range(3000), "word": words}), tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"))
    assert [source.item(i) for i in (0, 1023, 1024, 2999)] == [
        {"a": i, "word": f"w{i}"} for i in (0, 1023, 1024, 2999)
    ]
    assert len(source._tables.find(0, None)) == 3000
    assert len(source._rows.find((0, 2), None)) == 3000 - 2048


@pytest.mark.parametrize(
    "given", [ROWS, torch.tensor(ROWS), torch.tensor(ROWS).double().requires_grad_(), ROWS.tolist()], ids=type
)
def test_fit_and_predict_take_arrays_and_tensors(given, tmp_path):
    scorer = fn.fit(given, labels=LABELS)
    assert repr(scorer.detector) == "KNN(k=10)"
    assert scorer.facts["head"] == "none"
    found = scorer.predict(given)
    assert len(found) == 240
    assert [v.score for v in found] == pytest.approx(scorer(torch.tensor(ROWS)).score.tolist(), abs=1e-6)
    scorer.save(tmp_path / "d.featnorm", weights=True)
    assert fn.load(tmp_path / "d.featnorm").predict(given) == found
    with pytest.raises(TypeError, match=r"rows must be of shape \(n, D\), got \(6,\)"):
        scorer.predict(ROWS[0])
    with pytest.raises(TypeError, match="item 0 is of type str: expected a row, or a mapping of its columns"):
        scorer.predict(["a path"])
    short, fine = scorer.predict([ROWS[0, :5], ROWS[0]])
    assert (short.error, short.score) == ("it has 5 numbers: 6 are needed", None)
    assert fine == found[0]._replace(item="item 1")


def test_a_data_frame_is_a_table_that_a_file_keeps(tmp_path):
    table = pd.DataFrame(ROWS, columns=list("abcdef")).assign(word=np.array(["x", "y"])[LABELS], kind=LABELS)
    scorer = fn.fit(table, label_column="kind", group_by="word", detector="KNN(k=3, normalize=False)", tpr=0.5)
    assert scorer.preprocess.left_out == ["kind", "word"]
    found = scorer.predict(table)
    scorer.save(tmp_path / "d.featnorm", weights=True)
    again = fn.load(tmp_path / "d.featnorm")
    assert again.predict(table) == found
    assert again.digest() == scorer.digest()
    again.preprocess.mean[0] += 1e-6
    assert again.digest() != scorer.digest()
    assert all(v.error == "missing columns 'a'" for v in scorer.predict(table.drop(columns="a")))
    np.save(tmp_path / "x.npy", ROWS[:, :5])
    with pytest.raises(
        DataError, match="x has 5 columns without names, and a table is needed with the columns 'a'"
    ):
        fn.score_source(scorer, open_source(str(tmp_path / "x.npy")))
    table.rename(columns={"a": "z"}).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(DataError, match="x: missing columns 'a'; unknown columns 'z'"):
        fn.score_source(scorer, open_source(str(tmp_path / "x.csv")))


def test_columns_that_are_not_used_are_named():
    table = pd.DataFrame(ROWS, columns=list("abcdef")).assign(none=np.nan, site=LABELS)
    with pytest.warns(UserWarning, match="not used: 'none', without a value in any of the rows"):
        scorer = fn.fit(table, group_by="site", tpr=0.5)
    assert scorer.preprocess.left_out == ["site", "none"]
    source = source_of(table)
    for by, left_out in (("class", ["none"]), (r"row (\d)", ["none"]), ("site", ["site", "none"])):
        assert model_for(source, thresholds_by=by).transform.left_out == left_out


def test_similar_records_are_the_nearest_ones():
    table = pd.DataFrame({"a": np.r_[np.linspace(1, 2, 120), np.linspace(50, 60, 120)], "b": np.full(240, 1.0)})
    scorer = fn.fit(table, tpr=0.5)
    (verdict,) = scorer.predict([{"a": 49, "b": 1.0}], explain=True)
    shown = [float(neighbor.text().split(", ")[0].removeprefix("a: ")) for neighbor in verdict.why.nearest]
    assert shown == sorted(shown)
    assert shown[0] < 51
    distance = (shown[0] - 49) / scorer.preprocess.scale[0]
    assert verdict.why.nearest[0].similarity == pytest.approx(-distance, abs=1e-3)


def test_equal_records_of_a_table_are_all_used():
    table = pd.DataFrame({"a": RNG.integers(0, 2, 400), "b": RNG.choice(["x", "y"], 400)})
    scorer = fn.fit(table)
    assert scorer.facts["rows"] == "the DataFrame: 320 to fit on, 80 held out for calibration"
    assert len({bytes(row) for row in scorer.detector.bank.rows.numpy()}) == 4


def test_copies_and_near_copies_of_vectors_count_once():
    copies = np.concatenate([ROWS, ROWS[:40], ROWS[:5] + 1e-6])
    scorer = fn.fit(copies)
    assert scorer.facts["rows"].startswith("the array: ")
    assert "from 285 rows" in scorer.facts["made"]
    assert len(scorer.calibration.scores) == 48


def test_the_commands_take_an_array(featnorm, tmp_path):
    np.save(tmp_path / "known.npy", ROWS[:200])
    np.save(tmp_path / "labels.npy", np.array(["left", "right"])[LABELS[:200]])
    odd = ROWS[200:].copy()
    odd[3] = np.nan
    odd[5] = [-9, 9, -9, 9, -9, 9]
    np.save(tmp_path / "new.npy", odd)
    code, out, _ = featnorm("fit", "known.npy", "--labels", "labels.npy", "--detector", "Mahalanobis")
    assert code == 0
    assert "200 rows in known; model: featnorm:rows." in out
    assert "Backbone: none, the rows are vectors of 6 numbers." in out
    code, out, _ = featnorm("score", "detector.featnorm", "new.npy", "-o", "out.jsonl")
    assert code == 0
    assert "row 3: column 0 is nan" in out
    table = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(table) == 40
    assert [table[3]["score"], table[5]["verdict"]] == [None, "OOD"]
    assert featnorm("calibrate", "detector.featnorm", "known.npy", "--tpr", "0.9", "-o", "again.featnorm")[0] == 0
    code, out, _ = featnorm("inspect", "again.featnorm")
    assert code == 0
    assert "vectors: 6 numbers" in out
    np.save(tmp_path / "wide.npy", np.zeros((30, 7)))
    code, _, error = featnorm("score", "detector.featnorm", "wide.npy")
    assert code != 0
    assert "wide has 7 columns, and vectors of 6 numbers are needed" in error


def test_the_commands_take_a_table(featnorm, tmp_path):
    table = pd.DataFrame(ROWS, columns=list("abcdef")).assign(word=np.array(["x", "y"])[LABELS])
    table["name"] = [f"name-{i}" for i in range(len(table))]
    table.to_csv(tmp_path / "known.csv", index=False)
    code, out, error = featnorm("fit", "known.csv", "--label-column", "word", "--group-by", "f")
    assert code == 0, error
    assert "none, the rows are 5 features of 'a', 'b', 'c', 'd', 'e'; 'f', 'word', 'name' left out" in out
    assert "Note: not used: 'name', whose texts differ in more than half of the rows" in out
    assert "Note: the labels are not used: no head is trained (--head train)" in out
    assert "KNN(k=10, normalize=False)" in out
    code, out, error = featnorm("score", "detector.featnorm", "known.csv", "--html", "page.html", "-o", "out.csv")
    assert code == 0, error
    assert len(pd.read_csv(tmp_path / "out.csv")) == 240
    assert "row" in (tmp_path / "page.html").read_text()
    code, _, error = featnorm("score", "detector.featnorm", "out.csv")
    assert code != 0
    assert "missing columns 'a', 'b', 'c', 'd', 'e'; unknown columns 'error'" in error


def test_a_model_of_ones_own_takes_rows(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom featnorm.inputs import Vector\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    mlp = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))\n"
        "    return mlp, Vector(6)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    odd = ROWS.copy()
    odd[3] = np.inf
    with pytest.warns(
        UserWarning, match="1 rows of the array cannot be read; the first is row 3: column 0 is inf"
    ):
        scorer = fn.fit(odd, "mine:make", labels=LABELS, detector="NAN", cache=tmp_path / "cache")
    assert scorer.head == "keep"
    found = scorer.predict(ROWS[:20])
    assert len({v.score for v in found}) == 20
    assert scorer.predict(np.full((1, 6), np.nan))[0].error == "column 0 is nan in float32, which is not finite"
    scorer.save(tmp_path / "d.featnorm", weights=True)
    assert fn.load(tmp_path / "d.featnorm", "mine:make").predict(ROWS[:20]) == found


def test_a_changed_file_has_other_identities(tmp_path):
    def identities():
        source = open_source(str(tmp_path / f"x.{ending}"))
        return {source.identity(i) for i in range(len(source))}

    for ending, write in (("npy", np.save), ("npz", np.savez), ("csv", np.savetxt)):
        found = []
        for values in (ROWS[:9], ROWS[9:18]):
            write(
                tmp_path / f"x.{ending}",
                values,
                **({"delimiter": ",", "header": "a,b,c,d,e,f", "comments": ""} if ending == "csv" else {}),
            )
            os.utime(tmp_path / f"x.{ending}", (len(found), len(found)))
            found.append(identities())
        assert len(found[0] | found[1]) == 18


def test_slices_keep_columns_and_widths(tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    source = SlicedSource(open_source(str(tmp_path / "x.npy")), [5, 3], "two")
    assert source.width == 6
    np.testing.assert_array_equal(stack(source), ROWS[[5, 3]])


@pytest.mark.usefixtures("operators_read_once")
def test_the_commands_export_evaluate_and_monitor_rows(featnorm, tmp_path):
    session = pytest.importorskip("onnxruntime").InferenceSession
    np.save(tmp_path / "known.npy", ROWS)
    np.save(tmp_path / "odd.npy", 5 + ROWS[:50])
    assert featnorm("fit", "known.npy", "--detector", "KNN(k=3, normalize=False)")[0] == 0
    code, out, error = featnorm("export", "detector.featnorm", "-o", "d.onnx")
    assert code == 0, error
    assert "in:  rows (n, 6) float32, as returned by the preprocess of featnorm:rows" in out
    scorer = fn.load(tmp_path / "detector.featnorm")
    graph = session(tmp_path / "d.onnx")
    names = [output.name for output in graph.get_outputs()]
    found = dict(zip(names, graph.run(None, {"rows": ROWS[:7]}), strict=True))
    verdicts = scorer.predict(ROWS[:7])
    np.testing.assert_allclose(found["score"], [v.score for v in verdicts], rtol=1e-3)
    assert found["is_id"].tolist() == [v.is_id for v in verdicts]
    metadata = json.loads(graph.get_modelmeta().custom_metadata_map["featnorm"])
    assert metadata["rows"] == {"vector": 6, "embeds": True}
    for name in ("known", "odd"):
        assert featnorm("score", "detector.featnorm", f"{name}.npy", "-o", f"{name}.csv")[0] == 0
    _, out, _ = featnorm("monitor", "detector.featnorm", "odd.csv")
    assert "drift" in out
    code, out, error = featnorm("evaluate", "detector.featnorm", "--id", "known.npy", "--ood", "odd.npy")
    assert code == 0, error
    results = json.loads((tmp_path / "featnorm-evaluation" / "results.json").read_text())
    assert "KNN(k=3, normalize=False)" in json.dumps(results)
    code, _, error = featnorm("evaluate", "detector.featnorm", "--id", "known.csv", "--ood", "odd.npy")
    assert code != 0
    assert "known has named columns, and vectors of 6 numbers are needed" in error
