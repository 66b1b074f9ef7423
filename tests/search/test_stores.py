"""One contract for all stores and index types: FAISS in a folder, PostgreSQL, Milvus Lite, and a server of Milvus,
where COTS_TEST_MILVUS has its address.
"""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from search_stores import DIM, INFO, fill, make_rows, make_vectors, names

from modeling_cots.search.conditions import Condition, as_conditions
from modeling_cots.search.embedding import row_ids_of
from modeling_cots.search.stores import create_store, open_store, store_exists

NUM = 1200
CASES = [("faiss", name) for name in ("exact", "hnsw", "ivfpq", "int8", "binary")]
CASES += [("milvus", name) for name in ("exact", "hnsw", "int8")]
CASES += [("postgres", name) for name in ("exact", "hnsw", "halfvec")]
CASES += [("server", name) for name in ("exact", "hnsw", "ivfpq", "int8") if os.environ.get("COTS_TEST_MILVUS")]
KINDS = list(dict.fromkeys(kind for kind, _ in CASES))
YEARS = [number % 7 if number % 3 else None for number in range(NUM)]
PLACES = [("Oslo", "O'\"Hare")[number % 2] for number in range(NUM)]


@pytest.fixture(params=CASES, ids="-".join)
def place_and_index_type(request, new_place):
    kind, index_type = request.param
    return new_place(kind), index_type


@pytest.fixture
def filled(place_and_index_type):
    place, index_type = place_and_index_type
    store = create_store(place, INFO, index_type)
    vectors = make_vectors(NUM)
    fill(store, make_rows(vectors, year=YEARS, place=PLACES))
    yield store, vectors, place
    store.close()


def test_add_search_delete(filled):
    store, vectors, place = filled
    assert len(store) == NUM
    found = store.search(vectors[:20], 10, [])
    exact = np.argsort(-(vectors[:20] @ vectors.T), axis=1)[:, :10]
    hits = [len(set(names(row)) & {f"pic{p}" for p in true}) for row, true in zip(found, exact, strict=True)]
    assert np.mean(hits) / 10 > 0.9  # 1.0 for exact; the others may miss a little
    if store.info["engine"] == "exact":
        assert np.mean(hits) == 10
    first = found[3][0]
    assert first["name"] == "pic3" and first["score"] == pytest.approx(1, abs=0.05)
    assert first["captions"] == ["caption of pic3", "b"] and first["thumbnail"]["bytes"] == b"jpeg"
    assert first["place"] == PLACES[3] and "embedding" not in first
    assert [hit["score"] for hit in found[3]] == sorted((hit["score"] for hit in found[3]), reverse=True)

    # Deleted entries are in no result, also after the store is opened again; the rest is.
    ids = row_ids_of(["pic3", "pic4", "nothing"])
    assert store.has(ids).tolist() == [True, True, False]
    assert store.delete(ids) == 2 and len(store) == NUM - 2
    store.close()
    store = open_store(place)
    assert store.has(ids).tolist() == [False, False, False] and store_exists(place)
    assert not {"pic3", "pic4"} & set(names(store.search(vectors[3:4], 50, [])[0]))

    # What was deleted can come back, and new entries are found without a rebuild.
    fresh = make_vectors(30, seed=1)
    fill(store, make_rows(fresh, first=NUM, year=[3] * 30))
    fill(store, make_rows(vectors[3:4], first=3))
    assert len(store) == NUM + 29
    assert names(store.search(fresh[5:6], 1, [])[0]) == [f"pic{NUM + 5}"]
    assert names(store.search(vectors[3:4], 1, [])[0]) == ["pic3"]
    store.close()


# Names as data sets have them: words of Milvus' filters, signs, what Milvus and we ourselves use.
ODD_NAMES = [
    "in",
    "and",
    "exists",
    "not",
    "Date Taken",
    "aesthetic-score",
    "日本",
    'a "b"\\\n',
    "a.b",
    "x[0]",
    "$x",
    "1st",
]
ODD_NAMES += ["row_id_", "score", "distance", "id", "count(*)", "a == b", "like", "true", "null", "meta"]


@pytest.fixture(params=KINDS)
def small(request, new_place):
    """A store of six entries, with a column of each kind, and numbers under odd names."""
    store = create_store(new_place(request.param), INFO, "exact")
    columns = {
        "year": [2019, 2020, 2021, None, 2**53 + 1, -(2**63)],
        "share": [0.5, 1.0, -1.0, 2.5, None, 1e300],
        "flag": [True, False, None, True, False, None],
        "zip": ["01234", "5", "6", None, "true", "a 'b' \"c\" \\ \n\x07日本"],
        "empty": [None] * 6,
        **{name: range(6) for name in ODD_NAMES},
    }
    fill(store, make_rows(make_vectors(6), **columns))
    yield store
    store.close()


def numbers(store, where) -> list[int]:
    """The numbers of the entries that satisfy conditions, which `search` and `find` agree on."""
    conditions = as_conditions(where)
    found = sorted(int(name[3:]) for name in names(store.search(make_vectors(1), 9, conditions)[0]))
    assert sorted(store.find(conditions)) == sorted(row_ids_of([f"pic{number}" for number in found]))
    return found


def test_any_name_of_a_column_can_be_filtered_by(small):
    for name in ODD_NAMES:
        assert numbers(small, Condition(name, ">=", 4)) == [4, 5], name
        assert numbers(small, Condition(name, "in", [1, 3.0, 7])) == [1, 3], name
        assert numbers(small, Condition(name, "!=", 3)) == [0, 1, 2, 4, 5], name
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        assert numbers(small, [f'"{quoted}" == 2', "zip == 6"]) == [2], name
        (hit,) = small.search(make_vectors(1), 1, [Condition(name, "==", 2)])[0]
        assert hit["score_" if name == "score" else name] == 2 and -1 <= hit["score"] <= 1 + 1e-6, name
        assert small.delete(small.find([Condition(name, "<", 3)])) == 3 and len(small) == 3, name
        fill(small, make_rows(make_vectors(6)[:3], zip=["01234", "5", "6"], **{each: range(3) for each in ODD_NAMES}))


SAME_EVERYWHERE = [
    ("zip == 5", [1]),
    ("zip == 01234", [0]),
    ("zip == '01234'", [0]),
    ("zip == true", [4]),
    ("zip in (5, 6)", [1, 2]),
    ("zip != 5", [0, 2, 4, 5]),
    ("zip > 5", [2, 4, 5]),
    (Condition("zip", "==", "a 'b' \"c\" \\ \n\x07日本"), [5]),
    (Condition("zip", "in", [str(number) for number in range(3000)]), [1, 2]),
    ("name in ['pic1', 'pic3']", [1, 3]),
    ("name == pic3", [3]),
    ("year > 2019", [1, 2, 4]),
    ("year > 2019.5", [1, 2, 4]),
    ("year == 2020.0", [1]),
    ("year == 2020.5", []),
    ("year in [2021.5, 2019, 99999999999999999999]", [0]),
    ("year != 2020", [0, 2, 4, 5]),
    ("year == 9007199254740993", [4]),
    ("year == 9007199254740992", []),
    ("year > 9007199254740992", [4]),
    ("year < -9223372036854775807", [5]),
    ("year <= -99999999999999999999", []),
    ("year < 99999999999999999999", [0, 1, 2, 4, 5]),
    ("year >= 99999999999999999999", []),
    ("share > 1", [3, 5]),
    ("share == 1", [1]),
    ("share in [1, 2.5]", [1, 3]),
    ("share >= 99999999999999999999", [5]),
    ("flag == true", [0, 3]),
    ("flag != true", [1, 4]),
    ("flag in [True, False]", [0, 1, 3, 4]),
    (["flag == true", "share > 1"], [3]),
    ("year == True", "holds numbers"),
    ("year == '2020'", "holds numbers"),
    ("year == Oslo", "holds numbers"),
    ("share in [1, 'a']", "holds numbers"),
    ("share == false", "holds numbers"),
    ("flag == 1", "holds booleans"),
    ("flag == 'true'", "holds booleans"),
    ("flag >= true", "no order"),
    (Condition("zip", "==", 5), "holds texts"),
    (Condition("name", "==", 5), "holds texts"),
    ("empty == 1", "no metadata 'empty'"),
    ("nothing == 1", "no metadata 'nothing'"),
    ("'' == 1", "no metadata ''"),
    ("row_id == 1", "no metadata 'row_id'"),
    ("embedding == 1", "no metadata 'embedding'"),
    ("thumbnail == 1", "no metadata 'thumbnail'"),
    ("$meta == 1", "no metadata"),
]


def test_a_condition_means_the_same_in_every_store(small):
    for where, expected in SAME_EVERYWHERE:
        if isinstance(expected, list):
            assert numbers(small, where) == expected, where
        else:
            with pytest.raises(ValueError, match=expected):
                small.find(as_conditions(where))


def test_a_column_keeps_its_kind(small):
    for column, value in (("year", "x"), ("year", True), ("flag", 1), ("zip", 5), ("share", "0.5")):
        with pytest.raises(ValueError, match=f"metadata '{column}' holds .* in this index and .* in the new entries"):
            fill(small, make_rows(make_vectors(1), first=9, **{column: [value]}))


def test_whole_and_other_numbers_are_one_kind(small):
    fill(small, make_rows(make_vectors(1), first=9, year=[2020.5], share=[3], empty=["x"]))
    assert numbers(small, "year == 2020.5") == [9] and numbers(small, "year < 2020.5") == [0, 1, 5]
    assert numbers(small, "year > 9e15") == [4]  # an integer that a float rounds
    assert numbers(small, "share == 3") == [9] and numbers(small, "empty == x") == [9]


def test_a_column_without_a_value_left_is_missing(small):
    fill(small, make_rows(make_vectors(1), first=9, year=[7], rare=["x"]))
    assert numbers(small, "rare == x") == [9]
    small.delete(row_ids_of(["pic9"]))
    with pytest.raises(ValueError, match="no metadata 'rare'"):
        small.find(as_conditions("rare == x"))


FILTERS = [
    ("year >= 5", lambda number, year, place: year is not None and year >= 5),
    ("year != 3", lambda number, year, place: year is not None and year != 3),
    ('place == "O\'\\"Hare"', lambda number, year, place: place != "Oslo"),
    (["year in [1, 2]", "place == Oslo"], lambda number, year, place: year in (1, 2) and place == "Oslo"),
    ("name == pic9", lambda number, year, place: number == 9),
]


def test_filters(filled):
    store, vectors, _ = filled
    for where, holds in FILTERS:
        allowed = [number for number in range(NUM) if holds(number, YEARS[number], PLACES[number])]
        assert set(store.find(as_conditions(where))) == set(row_ids_of([f"pic{number}" for number in allowed]))
        found = names(store.search(vectors[:1], 10, as_conditions(where))[0])
        exact = np.array(allowed)[np.argsort(-(vectors[allowed] @ vectors[0]))[:10]]
        assert len(found) == min(10, len(allowed))
        assert {int(name[3:]) for name in found} <= set(allowed)
        assert len(set(found) & {f"pic{number}" for number in exact}) >= 0.8 * len(found)


def test_refusals_and_edges(filled):
    store, vectors, place = filled
    with pytest.raises(ValueError, match="no metadata 'color'"):
        store.search(vectors[:1], 3, as_conditions("color == red"))
    with pytest.raises(ValueError, match="name a new folder|(collection|table) '.*' at .* already"):
        create_store(place, INFO, "exact")
    assert store.search(vectors[:1], 3, as_conditions("year == 77")) == [[]]
    store.rebuild("exact")
    assert store.info["engine"] == "exact" and len(store) == NUM
    assert names(store.search(vectors[8:9], 1, [])[0]) == ["pic8"]


def test_an_empty_index_finds_nothing(place_and_index_type, new_place, request):
    store = create_store(place_and_index_type[0], INFO, place_and_index_type[1])
    assert len(store) == 0 and store.search(np.ones((2, DIM), np.float32), 3, []) == [[], []]
    assert store.delete(row_ids_of(["x"])) == 0
    store.close()
    with pytest.raises(ValueError, match="index type must be one of"):
        create_store(new_place(request.node.callspec.params["place_and_index_type"][0]), INFO, "magic")


HANDLES = st.integers(0, 1)
NUMBERS = st.lists(st.integers(0, 19), min_size=1, max_size=6, unique=True)
STEPS = st.one_of(
    st.tuples(st.just("add"), HANDLES, NUMBERS),
    st.tuples(st.just("add"), HANDLES, NUMBERS),
    st.tuples(st.just("delete"), HANDLES, NUMBERS),
    st.tuples(st.just("delete the year"), HANDLES, st.integers(0, 2)),
    st.tuples(st.just("rebuild"), HANDLES, st.sampled_from(["exact", "hnsw"])),
    st.tuples(st.just("open anew"), HANDLES, st.none()),
    st.tuples(st.just("look"), HANDLES, st.integers(0, 19)),
)
POOL = make_vectors(20, seed=3)


class Twin:
    """What an index with one handle holds: numbers of entries, each with the step that added it."""

    def __init__(self):
        self.entries, self.engine = {}, "exact"

    def check(self, store, query: int) -> None:
        assert len(store) == len(self.entries) and store.info["engine"] == self.engine
        order = [number for number in np.argsort(-(POOL @ POOL[query])) if number in self.entries]
        (found,) = store.search(POOL[query : query + 1], 20, [])
        assert [(hit["name"], hit["year"], hit["step"]) for hit in found] == [
            (f"pic{number}", number % 3, self.entries[number]) for number in order
        ]


def take_step(store, twin: Twin, kind: str, value, number_of_step: int) -> None:
    """One step of a handle, which answers as the twin does."""
    if kind == "add":
        new = [number for number in value if number not in twin.entries]
        with store.adding():
            missing = ~store.has(row_ids_of([f"pic{number}" for number in value]))
            assert np.array(value)[missing].tolist() == new
            for number in new:
                step = {"year": [number % 3], "step": [number_of_step]}
                store.add(make_rows(POOL[number : number + 1], first=number, **step))
        twin.entries.update(dict.fromkeys(new, number_of_step))
    elif kind == "rebuild":
        store.rebuild(value)
        twin.engine = value
    elif kind.startswith("delete"):
        gone = [number for number in twin.entries if number in np.atleast_1d(value)]
        ids = row_ids_of([f"pic{number}" for number in np.atleast_1d(value)])
        if kind == "delete the year":
            gone = [number for number in twin.entries if number % 3 == value]
            ids = store.find(as_conditions(f"year == {value}")) if twin.entries else ids[:0]
        assert store.delete(ids) == len(gone)
        for number in gone:
            del twin.entries[number]
    elif kind == "look":
        twin.check(store, value)


def interleave(place: str, steps: list) -> None:
    """Take the steps with two handles of one index; then both, and a third, must answer as one handle would."""
    twin, first = Twin(), create_store(place, INFO, "exact")
    stores = [first, open_store(place)]
    for number_of_step, (kind, handle, value) in enumerate(steps):
        if kind == "open anew":
            stores[handle].close()
            stores[handle] = open_store(place)
        else:
            take_step(stores[handle], twin, kind, value, number_of_step)
    stores.append(open_store(place))
    for store in stores:
        twin.check(store, 7)
        store.close()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEPS, min_size=2, max_size=12))
def test_two_handles_of_a_folder_answer_as_one(new_place, steps):
    interleave(new_place("faiss"), steps)


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(STEPS, min_size=2, max_size=8))
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "faiss"])
def test_two_handles_of_a_collection_or_a_table_answer_as_one(new_place, kind, steps):
    interleave(new_place(kind), steps)


@pytest.mark.parametrize("place", ["nowhere", "nowhere.db"])
def test_there_is_no_index(tmp_path, place):
    assert not store_exists(tmp_path / place)
    with pytest.raises(ValueError, match="no index"):
        open_store(tmp_path / place)


@pytest.mark.parametrize(
    ("place", "packages"),
    [
        ("index", "faiss-cpu"),
        ("index.db", "pymilvus milvus-lite"),
        ("postgresql://host/db#t", "'psycopg.binary.' pgvector"),
    ],
)
def test_says_what_to_install(place, packages, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {packages}"):
        create_store(place, INFO, "exact")
