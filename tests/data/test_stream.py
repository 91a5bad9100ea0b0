"""What a rank draws of a batch: its own rows alone, with the totals of all of them."""

import dataclasses

import numpy as np
import pytest
import torch

from undo.data.rows import PackedDocuments
from undo.data.store import pack
from undo.data.stream import MixedStream
from undo.lm.tokens import IGNORE, MARK

SHARES = {"retain": 0.6, "forget": 0.4}
LENGTH = 12


def documents(count: int, seed: int, paired: bool = False) -> list[np.ndarray]:
    """Of 1 to 30 tokens: some have no label, some are cut, and a few are marked."""
    rng = np.random.default_rng(seed)
    made = [rng.integers(1, 90, size=rng.integers(1, 30)).astype(np.uint32) for _ in range(count)]
    made += [np.array([7], dtype=np.uint32)] * 9
    return [doc | np.uint32(MARK) if paired and rng.random() < 0.1 else doc for doc in made]


@pytest.fixture(scope="module", params=["on disk", "of pairs", "in memory"])
def stores(request, tmp_path_factory):
    sizes, paired = {"retain": 25, "forget": 6}, request.param == "of pairs"
    texts = {role: documents(count, count, paired) for role, count in sizes.items()}
    if request.param == "in memory":
        return {role: PackedDocuments(some, LENGTH, 100) for role, some in texts.items()}
    folder = tmp_path_factory.mktemp("stores")
    return {role: pack(some, folder / role, LENGTH, 100, paired) for role, some in texts.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_ranks_rows_are_the_batch_and_know_its_totals(stores, ranks):
    """Through several epochs of each role, also where an epoch ends within a batch, and for ranks of unequal parts."""
    whole, divided = (MixedStream(stores, SHARES, 7, seed=3) for _ in range(2))
    for step in range(40):
        batch, marked = whole.batch(step), torch.zeros(7, LENGTH, dtype=torch.bool)
        assert batch.total == int((batch.labels != IGNORE).sum())
        has_labels = torch.zeros(int(batch.document.max()) + 1).index_put_(
            (batch.document[batch.labels != IGNORE],), torch.ones(())
        )
        assert batch.documents == int(has_labels.sum())
        for rank in range(ranks):
            mine, rows = divided.batch(step, rank, ranks), slice(rank, None, ranks)
            for name in ("input_ids", "positions", "labels"):
                assert torch.equal(getattr(mine, name), getattr(batch, name)[rows])
            assert (mine.total, mine.documents, mine.counted_in_all) == (batch.total, batch.documents, None)
            if mine.marked is not None:
                marked[rows] = mine.marked
        assert torch.equal(marked, torch.zeros_like(marked) if batch.marked is None else batch.marked)


def test_a_rank_reads_no_other_rank_s_tokens(stores):
    read = []

    @dataclasses.dataclass
    class Watched:
        rows: PackedDocuments
        length: int = LENGTH
        vocab_size: int = 100

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, row):
            read.append(row)
            return self.rows[row]

        def lengths(self, rows):
            return self.rows.lengths(rows)

    stream = MixedStream({role: Watched(rows) for role, rows in stores.items()}, SHARES, 7, seed=0)
    for rank, count in ((0, 3), (1, 2), (2, 2)):
        read.clear()
        stream.batch(5, rank, 3)
        assert len(read) == count
