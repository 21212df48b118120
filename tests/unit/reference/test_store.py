"""Reference scores on disk: found again to the bit, damage and other settings named."""

import json

import numpy as np
import pytest

from diffdpo.errors import UserError
from diffdpo.reference.store import Part, make_folder, open_store, read_part, write_part

IDENTITY = {"reference_weights": "aa", "num_mc_samples": 4, "seed": 0}
MADE = {"processes": 1, "micro_batch": 2}


def part(records: list[int], counts: list[int], first: float = 0.0) -> Part:
    f_R = first + np.arange(sum(counts), dtype=np.float32) / 3
    return Part(np.array(records, np.int64), np.array(counts, np.int32), f_R, MADE)


def make_store(folder):
    make_folder(folder, IDENTITY, about={})
    return open_store(folder, IDENTITY)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


def test_scores_come_back_to_the_bit_and_mapped(tmp_path):
    written = part([2, 5, 9], [4, 0, 8])
    write_part(tmp_path / "a.part", written)
    found = read_part(tmp_path / "a.part")
    assert found.records_P.tolist() == [2, 5, 9] and found.counts_P.tolist() == [4, 0, 8]
    assert np.array_equal(found.f_R, written.f_R) and found.f_R.dtype == np.float32
    assert isinstance(found.f_R, np.memmap), "scores stay on disk"
    assert found.made_with == MADE
    assert list(tmp_path.iterdir()) == [tmp_path / "a.part"], "nothing half written is left"


def test_a_part_is_ordered_by_record_whoever_computed_it():
    joined = Part.of([part([7, 3], [2, 1]), part([5, 7], [1, 2], first=100.0)])
    assert joined.records_P.tolist() == [3, 5, 7] and joined.counts_P.tolist() == [1, 1, 2]
    assert np.allclose(joined.f_R, [2 / 3, 100, 0, 1 / 3]), "of a record that stands in two, the first counts"


def test_lookup_by_epoch_and_record(store):
    store.add(0, "a", part([1, 4], [2, 2]))
    store.add(0, "b", part([2, 3], [2, 2], first=10))
    store.add(1, "a", part([1], [2], first=20))
    counts, present = np.array([2, 2, 2]), np.array([True, False, True])
    assert np.allclose(store.lookup(0, (2, -1, 4), counts, present), [10, 10 + 1 / 3, 0, 0, 2 / 3, 1])
    assert np.allclose(store.lookup(1, (1, -1, -1), counts, np.array([True, False, False]))[:2], [20, 20 + 1 / 3])
    assert store.known(0, 6).tolist() == [False, True, True, True, True, False]
    assert store.made_with(0) == (MADE,)


@pytest.mark.parametrize(("record", "count", "said"), [(3, 2, "no score"), (1, 3, "2 row scores instead of 3")])
def test_what_is_not_there_is_named(store, record, count, said):
    store.add(0, "a", part([1], [2]))
    with pytest.raises(UserError, match=f"{said} for record {record} of epoch 0"):
        store.lookup(0, (record,), np.array([count]), np.array([True]))


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "lengthened", "header"])
def test_damage_is_found_and_named(store, damage):
    store.add(0, "a", part([1, 2], [2, 2]))
    store.add(0, "b", part([3], [2]))
    path = store.folder / "epoch-0" / "a.part"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 1
    if damage == "header":
        data[40] ^= 1
    cut = {"cut": len(data) - 5, "emptied": 0}.get(damage, len(data))
    path.write_bytes(data[:cut] + (b"\0" if damage == "lengthened" else b""))
    again = make_store(store.folder)
    assert again.known(0, 4).tolist() == [False, False, False, True]
    assert len(again.damaged(0)) == 1 and f"{path} is damaged" in again.damaged(0)[0]


@pytest.mark.parametrize("name", list(IDENTITY))
def test_another_setting_is_refused_and_named(store, name):
    with pytest.raises(UserError, match=f"made with {name} {IDENTITY[name]}, this run has other") as caught:
        open_store(store.folder, IDENTITY | {name: "other"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}'])
def test_a_damaged_identity_is_named(store, content):
    (store.folder / "identity.json").write_text(content)
    with pytest.raises(UserError, match=r"identity\.json cannot be read"):
        make_store(store.folder)


def test_scores_of_nobody_knows_what_are_refused(store):
    store.add(0, "a", part([1], [2]))
    (store.folder / "identity.json").unlink()
    with pytest.raises(UserError, match=r"holds scores but no identity\.json"):
        make_store(store.folder)


def test_parts_of_other_shapes_can_be_left_aside(store):
    store.add(0, "a", part([1], [2]))
    assert open_store(store.folder, IDENTITY, shapes=MADE).known(0, 2)[1]
    assert not open_store(store.folder, IDENTITY, shapes=MADE | {"processes": 2}).known(0, 2)[1]


def test_the_identity_can_be_read_by_people(store):
    assert json.loads((store.folder / "identity.json").read_text())["identity"] == IDENTITY


def test_an_unreadable_part_is_one_line_and_stays(store, monkeypatch):
    store.add(0, "a", part([1], [2]))
    path = store.folder / "epoch-0" / "a.part"

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("diffdpo.reference.store.read_part", refuse)
    with pytest.raises(UserError, match=r"a.part cannot be read .*Permission denied") as caught:
        make_store(store.folder).known(0, 2)
    assert path.exists() and "\n" not in str(caught.value)
