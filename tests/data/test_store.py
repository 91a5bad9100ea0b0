"""The token store: nothing lost, nothing torn that fits, and a stream that knows every step by its number."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import batch
from undo.config.mistakes import ConfigError
from undo.data import store as tokens
from undo.data import stream as stream_module
from undo.data.store import StoreWriter, TokenStore, batched, best_fit, pack
from undo.data.stream import MixedStream
from undo.lm.tokens import IGNORE, collate


@given(st.lists(st.integers(1, 20), max_size=80))
def test_best_fit_places_each_item_once_and_never_overfills(lengths):
    bins = best_fit(np.array(lengths, dtype=int), 20)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 20 for b in bins)
    if lengths:  # at most one bin can be half empty: two of them would have been one
        assert sum(sum(lengths[i] for i in b) <= 10 for b in bins) <= 1


@settings(deadline=None, max_examples=30)
@given(documents=st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=50), min_size=1, max_size=30))
def test_every_token_is_kept_in_its_document_s_order(documents, tmp_path_factory):
    store = pack(map(np.array, documents), tmp_path_factory.mktemp("store") / "s", length=16, vocab_size=1000)
    assert store.tokens == sum(map(len, documents))
    pieces = sorted(tuple(piece.tolist()) for i in range(len(store)) for piece in store[i])
    assert pieces == sorted(tuple(d[i : i + 16]) for d in documents for i in range(0, len(d), 16))
    assert all(sum(map(len, store[i])) <= 16 for i in range(len(store)))


@pytest.mark.parametrize(("vocabulary", "bytes_each"), [(200, 2), (1 << 16, 2), ((1 << 16) + 1, 3), (256_000, 3)])
def test_a_token_takes_as_few_bytes_as_the_vocabulary_needs(tmp_path, vocabulary, bytes_each):
    pack([np.full(300, vocabulary - 1)], tmp_path / "s", 64, vocabulary)
    assert (tmp_path / "s" / "tokens.bin").stat().st_size == 300 * bytes_each
    assert int(TokenStore(tmp_path / "s")[0][0][0]) == vocabulary - 1


def test_a_token_outside_the_vocabulary_is_refused_and_leaves_no_store(tmp_path):
    with pytest.raises(ConfigError, match="1000 does not fit"):
        pack([np.array([1, 1000])], tmp_path / "s", 8, 1000)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("tokens.bin", lambda file: os.truncate(file, 100), "has 100 bytes, not 600"),
        ("rows.bin", lambda file: os.truncate(file, 24), "has 24 bytes, not"),
        ("pieces.bin", Path.unlink, "cannot be read (No such file or directory)"),
        ("pieces.bin", lambda file: file.write_bytes(file.read_bytes()[::-1]), "is not what was written"),
        ("tokens.bin", lambda file: file.write_bytes(bytes(600)), "is not what was written"),
        ("store.json", Path.unlink, "cannot be read"),
        ("store.json", lambda file: file.write_text(""), "is damaged"),
        ("store.json", lambda file: file.write_text("null"), "is damaged"),
        ("store.json", lambda file: file.write_text("{}"), "is damaged"),
        ("store.json", lambda file: file.write_bytes(b"\xff"), "is damaged"),
    ],
)
def test_damage_is_named_with_its_file(tmp_path, name, damage, said):
    """A store cut in half would train on half of the data."""
    pack([np.arange(300)], tmp_path / "s", 64, 1000)
    damage(tmp_path / "s" / name)
    with pytest.raises(ConfigError) as error:
        TokenStore(tmp_path / "s")
    assert f"{tmp_path / 's' / name}: {said}" in str(error.value)
    assert "--force" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("tokens.bin", b"1234", "has 4 bytes, not 600"), ("progress.json", b'{"state": {', "is damaged")],
)
def test_a_store_that_was_damaged_half_way_is_not_continued(tmp_path, name, content, said):
    """Truncating a file to what it should hold would fill it up with zeros."""
    StoreWriter(tmp_path / "s", 64, 1000).add([np.arange(300)], {})
    (tmp_path / "s.partial" / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"s\.partial/{name}: {said}"):
        StoreWriter(tmp_path / "s", 64, 1000)


def test_of_large_files_the_size_alone_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "SMALL", 100)
    pack([np.arange(300)], tmp_path / "s", 64, 1000)
    (tmp_path / "s/tokens.bin").write_bytes(bytes(600))
    TokenStore(tmp_path / "s")
    os.truncate(tmp_path / "s/tokens.bin", 598)
    with pytest.raises(ConfigError, match=r"tokens\.bin: has 598 bytes"):
        TokenStore(tmp_path / "s")


def test_windows_of_packing_end_by_number_and_by_size():
    items = ["aaa", "b", "cc", "dddddd", "e", "f", "g"]
    assert list(batched(items, 3, 6)) == [["aaa", "b", "cc"], ["dddddd"], ["e", "f", "g"]]
    assert list(batched(items, 2, 100)) == [["aaa", "b"], ["cc", "dddddd"], ["e", "f"], ["g"]]
    assert list(batched([], 2, 100)) == []


def test_rows_do_not_depend_on_where_windows_end_except_in_their_packing(tmp_path, monkeypatch):
    """Every token is kept, and reading crosses from window to window."""
    documents = [np.full(n, n) for n in range(1, 40)]
    whole = pack(documents, tmp_path / "a", 16, 100)
    monkeypatch.setattr(tokens, "WINDOW_TOKENS", 50)
    parts = pack(documents, tmp_path / "b", 16, 100)
    assert len(parts) >= len(whole)
    for store in (whole, parts):
        values = np.concatenate([piece for i in range(len(store)) for piece in store[i]])
        assert sorted(values.tolist()) == sorted(n for n in range(1, 40) for _ in range(n))


def test_collate_by_hand():
    tokens = collate([[np.array([5, 6, 7]), np.array([8, 9])]], length=7)
    assert tokens.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0]]
    assert tokens.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert tokens.labels.tolist() == [[6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE]]
    assert tokens.total == 3


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    # token value tells role and document: retain 0-49, forget 100-119
    return {
        "retain": pack([np.full(8, i) for i in range(50)], folder / "retain", 8, 200),
        "forget": pack([np.full(8, 100 + i) for i in range(20)], folder / "forget", 8, 200),
    }


def test_the_stream_depends_on_seed_and_step_alone(stores):
    one, two = (MixedStream(stores, {"retain": 0.5, "forget": 0.5}, 6, seed=3) for _ in range(2))
    forwards = [one.batch(step).input_ids for step in range(40)]
    for step in reversed(range(40)):
        assert torch.equal(two.batch(step).input_ids, forwards[step])
    other = MixedStream(stores, {"retain": 0.5, "forget": 0.5}, 6, seed=4)
    assert any(not torch.equal(other.batch(s).input_ids, forwards[s]) for s in range(40))


def test_the_draws_do_not_depend_on_how_many_are_held(stores, monkeypatch):
    """Blocks of three steps give what one draw of all rows gives, forwards, backwards and from the middle."""
    shares = {"retain": 0.6, "forget": 0.4}
    whole = MixedStream(stores, shares, 6, seed=3)
    expected = [whole.batch(step).input_ids for step in range(40)]
    drawn = np.random.default_rng([3, 0]).choice(2, size=(40, 6), p=[0.6, 0.4])
    assert [[int(row[0] >= 100) for row in rows] for rows in expected] == drawn.tolist()
    monkeypatch.setattr(stream_module, "DRAWN_AT_ONCE", 18)
    for steps in (range(40), reversed(range(40)), (25, 3, 39)):
        held = MixedStream(stores, shares, 6, seed=3)
        for step in steps:
            assert torch.equal(held.batch(step).input_ids, expected[step])


def test_shares_are_met_and_every_epoch_takes_every_row_once(stores):
    stream = MixedStream(stores, {"retain": 0.75, "forget": 0.25}, 10, seed=0)
    drawn = torch.cat([stream.batch(step).input_ids[:, 0] for step in range(100)])
    retain, forget = drawn[drawn < 100].tolist(), drawn[drawn >= 100].tolist()
    assert abs(len(retain) / 1000 - 0.75) < 0.05
    for values, size in ((retain, 50), (forget, 20)):
        epochs = [values[i : i + size] for i in range(0, len(values) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_role_of_share_zero_is_never_drawn(stores):
    stream = MixedStream(stores, {"retain": 1.0, "forget": 0.0}, 10, seed=0)
    assert all((stream.batch(step).input_ids < 100).all() for step in range(20))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, None])
def test_micro_batches_are_the_batch_and_know_its_total(rows):
    tokens = batch(rows=4)
    parts = list(tokens.micro_batches(rows))
    assert torch.equal(torch.cat([p.labels for p in parts]), tokens.labels)
    assert {p.total for p in parts} == {tokens.total}
