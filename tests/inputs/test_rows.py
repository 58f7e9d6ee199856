"""Preprocess of rows: vectors, and tables against scikit-learn's transformers."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from featnorm import inputs
from featnorm.inputs import DataError, ItemError
from featnorm.inputs.rows import Table, Vector, rows_of

RNG = np.random.default_rng(0)
COUNTRIES = [f"c{k:02}" for k in range(40)]


def people(n=600, seed=0):
    """A table with missing values of either kind, a constant column, and a column of more than 32 categories."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, 41) / np.arange(1, 41).sum()
    table = pd.DataFrame(
        {
            "age": rng.normal(40, 10, n),
            "country": rng.choice(COUNTRIES, n, p=weights),
            "children": rng.integers(0, 5, n),
            "member": rng.random(n) < 0.5,
            "income": rng.lognormal(10, 1, n),
            "color": rng.choice(np.array(["red", "green", None], object), n),
            "unit": np.full(n, 3.0),
        }
    )
    table.loc[::7, "income"] = math.nan
    return table


def source_of(table, label=None):
    return inputs.source_of(table, label_column=label)


def encoded(rows, table):
    return np.stack(
        [rows(row).numpy() for row in table.astype(object).where(table.notna(), None).to_dict("records")]
    )


def test_a_table_is_encoded_as_by_the_transformers_of_scikit_learn():
    train, test = people(), people(50, seed=1)
    rows = Table.fit(source_of(train))
    numbers, words = ["age", "children", "income", "unit"], ["country", "member", "color"]
    assert rows.columns == numbers + words

    def as_words(table):
        given = table[words].astype(object)
        return given.where(given.notna(), None).map(lambda value: None if value is None else str(value))

    expected = ColumnTransformer(
        [
            ("number", make_pipeline(StandardScaler(), SimpleImputer(strategy="constant", fill_value=0)), numbers),
            ("missing", MissingIndicator(error_on_new=False), numbers),
            ("word", OneHotEncoder(handle_unknown="ignore", max_categories=32, sparse_output=False), words),
        ]
    ).fit(pd.concat([train[numbers], as_words(train)], axis=1))
    for table in (train, test):
        wanted = expected.transform(pd.concat([table[numbers], as_words(table)], axis=1))
        np.testing.assert_allclose(encoded(rows, table), wanted, rtol=1e-5, atol=1e-6)
    assert rows.width == 4 + 1 + 32 + 2 + 3
    assert str(rows) == (
        "none, the rows are 42 features of 'age', 'children', 'income', 'unit', 'country' and 2 more"
    )


def test_unknown_categories_and_missing_values_follow_the_rule():
    rows = Table.fit(source_of(people()))
    known = rows.reference()
    unknown = rows({**known, "color": "blue", "age": None, "income": None}).numpy()
    base = rows(known).numpy()
    changed = np.flatnonzero(base != unknown)
    # The age and the income are 0, that an income is missing 1, and no color is 1.
    assert unknown[[0, 2]].tolist() == [0, 0]
    assert unknown[4] == 1
    assert unknown[-3:].tolist() == [0, 0, 0]
    assert len(changed) == 4
    # A rare country is one of the rarer, and a country that is new is none.
    assert base[5:37].sum() == 1
    assert rows({**known, "country": "c00"}).numpy()[36] == 1
    assert rows({**known, "country": "c99"}).numpy()[5:37].sum() == 0


def test_strings_that_read_as_numbers_are_numbers_and_those_that_name_rows_are_left_out():
    n = 100
    table = pd.DataFrame({"id": [f"row-{i}" for i in range(n)], "code": ["01", "2.5"] * 50, "": range(n)})
    rows = Table.fit(source_of(table), {"weight"})
    assert (rows.numbers, rows.categories, rows.left_out) == (["code"], {}, ["weight", "id"])
    assert rows({"code": "2.5"}) == rows({"code": 2.5, "id": "any", "weight": 3})
    assert str(rows).endswith("; 'weight', 'id' left out")
    assert rows.naming == ["id"]
    with pytest.raises(DataError, match=r"no column of the DataFrame can be used \('id' left out\)"):
        Table.fit(source_of(table[["id"]]))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"age": "old"}, "column 'age' is 'old', not a number"),
        ({"age": True}, "column 'age' is True, not a number"),
        ({"age": [1]}, r"column 'age' is \[1\], not a number"),
        ({"age": math.inf}, "column 'age' is infinite"),
        ({"age": 1e300}, "column 'age' is too large"),
        ({"salary": 1, "zip": 2}, "unknown columns 'salary', 'zip'"),
        ({"age": ...}, "missing columns 'age'"),
    ],
)
def test_a_row_that_does_not_fit_names_the_column(change, why):
    rows = Table.fit(source_of(people()))
    row = {name: value for name, value in {**rows.reference(), **change}.items() if value is not ...}
    with pytest.raises(ItemError, match=why):
        rows(row)


def test_a_row_may_be_a_list_in_the_order_of_the_columns():
    rows = Table.fit(source_of(people()))
    row = rows.reference()
    assert torch.equal(rows(list(row.values())), rows(row))
    with pytest.raises(ItemError, match="it has 6 values: 7 are needed, one per column"):
        rows(list(row.values())[:6])


def test_columns_of_other_types_are_refused_by_name():
    table = pd.DataFrame({"when": pd.date_range("2026-01-01", periods=50), "a": range(50)})
    with pytest.raises(
        DataError, match=r"column 'when' of the DataFrame holds values of type (datetime|Timestamp): "
    ):
        Table.fit(source_of(table))


def test_a_column_without_values_is_left_out_and_one_without_variance_is_zero():
    table = pd.DataFrame({"none": [math.nan] * 50, "same": [2] * 50, "a": RNG.normal(size=50)})
    rows = Table.fit(source_of(table))
    assert (rows.columns, rows.left_out, rows.empty, rows.naming) == (["same", "a"], ["none"], ["none"], [])
    assert rows({"none": None, "same": 2, "a": None}).tolist() == [0, 0]
    assert rows({"none": 3, "same": 4, "a": None}).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([1.0, 2.0], "it has 2 numbers: 3 are needed"),
        ([1.0, math.nan, 2.0], "column 1 is nan in float32, which is not finite"),
        (np.array([1.0, 2.0, 1e39]), "column 2 is inf in float32, which is not finite"),
        ([1.0, "x", 2.0], "column 1 is 'x', not a number"),
        (["x" * 99, 0, 0], "column 0 is 'x{48}…, not a number"),
        ({"a": 1}, "it has named columns: a vector of 3 numbers is needed"),
        ([[1], [2], [3]], r"column 0 is \[1\], not a number"),
    ],
)
def test_a_vector_that_does_not_fit(row, why):
    with pytest.raises(ItemError, match=why):
        Vector(3)(row)


def test_a_vector_of_any_type_is_used_in_single_precision():
    for row in ([1, 2, 3], ["1", 2.0, 3], np.arange(1, 4, dtype=np.float16), np.arange(1, 4, dtype=np.uint8)):
        assert Vector(3)(row).tolist() == [1, 2, 3]
        assert Vector(3)(row).dtype == torch.float32


@pytest.mark.parametrize("rows", [Vector(4), Vector(2, embeds=False), Table.fit(source_of(people()))])
def test_the_state_rebuilds_exactly(rows):
    settings, tensors = rows.state()
    again = rows_of(settings, tensors)
    assert torch.equal(again(rows.reference()), rows(rows.reference()))
    assert (again.width, again.embeds, str(again)) == (rows.width, rows.embeds, str(rows))


def test_damaged_states_are_refused():
    settings, tensors = Table.fit(source_of(people())).state()
    for wrong in (
        ({"vector": 0, "embeds": True}, {}),
        ({"vector": 3, "embeds": 1}, {}),
        ({**settings, "numbers": ["age"]}, tensors),
        ({**settings, "categories": {"color": [[]]}}, tensors),
        ({**settings, "categories": {"color": [[3]]}}, tensors),
        (settings, {**tensors, "scale": -tensors["scale"]}),
        (settings, {**tensors, "mean": tensors["mean"].float()}),
        (settings, {"mean": tensors["mean"]}),
    ):
        with pytest.raises((LookupError, TypeError, ValueError)):
            rows_of(*wrong)
