"""The table of index types: which vector store has which, and what the one check says."""

import pytest

from modeling_cots.search.index_types import FAISS, INDEX_TYPES, MILVUS_LITE, MILVUS_SERVER, POSTGRES, check_index_type


@pytest.mark.parametrize(
    ("store", "names"),
    [
        (FAISS, ["exact", "hnsw", "ivfpq", "int8", "binary"]),
        (MILVUS_SERVER, ["exact", "hnsw", "ivfpq", "int8"]),
        (MILVUS_LITE, ["exact", "hnsw", "int8"]),
        (POSTGRES, ["exact", "hnsw", "halfvec"]),
    ],
)
def test_each_store_takes_its_own_index_types_alone(store, names):
    assert [name for name, index_type in INDEX_TYPES.items() if store in index_type.stores] == names
    for name in names:
        check_index_type(name, store)
    for name in {*INDEX_TYPES, "magic"} - set(names):
        with pytest.raises(ValueError, match=f"With {store} the index type must be one of {', '.join(names)}; got"):
            check_index_type(name, store)


def test_the_refusal_says_what_has_the_index_type():
    with pytest.raises(ValueError, match="got 'ivfpq', which needs FAISS or a Milvus server.$"):
        check_index_type("ivfpq", MILVUS_LITE)
    with pytest.raises(ValueError, match="got 'magic'.$"):
        check_index_type("magic", MILVUS_LITE)
