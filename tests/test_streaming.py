"""Images that stay in the cache: written, read in any order, and streamed through a window of bounded memory."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from tables import sample_rows, write_csv, write_idx
from torch import Generator, Tensor

import fmtune
import fmtune.data
import fmtune.pieces
import fmtune.stored
from fmtune.batches import Batches, place_images
from fmtune.config import DataConfig
from fmtune.data import load_split, load_training_data, measure_pixels
from fmtune.describe import describe_source
from fmtune.errors import DataError
from fmtune.readers import Table
from fmtune.sources import open_place
from fmtune.stored import BlockReader, StoredImages, StoredTable, read_table, write_table

ROWS, BLOCK_ROWS = 103, 8
"""Of `stored`: 13 blocks, the last of 7 rows."""


def _numbered() -> Table:
    """Images that say which row they are."""
    numbers = np.arange(ROWS)
    images = np.broadcast_to(numbers.astype(np.uint8).reshape(-1, 1, 1, 1), (ROWS, 1, 2, 3)).copy()
    return Table(images, numbers)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredImages:
    """A window of six blocks."""
    monkeypatch.setattr(fmtune.stored, "_BLOCK_BYTES", BLOCK_ROWS * 6)
    file = open_place(str(tmp_path / "t.parquet"))
    write_table(file, [_numbered()])
    table = read_table(file, memory=6 * BLOCK_ROWS * 6)
    assert isinstance(table, StoredTable)
    assert np.array_equal(table.labels, np.arange(ROWS))
    return table.images


# The file


@pytest.mark.parametrize("cuts", [[], [1], [8], [7, 9], [3, 50, 51, 100]])
def test_parts_of_any_size_make_one_table(cuts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmtune.stored, "_BLOCK_BYTES", BLOCK_ROWS * 6)
    whole = _numbered()
    bounds = list(itertools.pairwise([0, *cuts, ROWS]))
    file = open_place(str(tmp_path / "t.parquet"))
    write_table(file, (Table(whole.images[a:b], whole.labels[a:b], {3: "three"}) for a, b in bounds))
    found = read_table(file, memory=10**9)
    assert isinstance(found, Table)
    assert np.array_equal(found.images, whole.images)
    assert np.array_equal(found.labels, whole.labels)
    assert found.names == {3: "three"}
    groups = pq.read_metadata(file.path)
    sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    assert sizes == [BLOCK_ROWS] * (ROWS // BLOCK_ROWS) + [ROWS % BLOCK_ROWS]


def test_a_table_that_breaks_off_leaves_no_file(tmp_path: Path) -> None:
    def parts() -> Iterator[Table]:
        yield _numbered()
        raise DataError("spoiled")

    with pytest.raises(DataError, match="spoiled"):
        write_table(open_place(str(tmp_path / "t.parquet")), parts())
    assert list(tmp_path.iterdir()) == []


def test_stored_images_are_indexed_as_an_array_is(stored: StoredImages) -> None:
    images = _numbered().images
    assert stored.shape == images.shape
    for rows in ([5], [102, 0, 50, 50, 7], [], range(ROWS)):
        index = np.array(rows, np.int64)
        assert np.array_equal(stored[index], images[index])
    assert np.array_equal(stored[42], images[42])


def test_statistics_of_stored_images_are_those_of_an_array(stored: StoredImages) -> None:
    images, rows = _numbered().images, np.arange(1, ROWS, 3)
    assert measure_pixels(stored) == measure_pixels(images)
    assert measure_pixels(stored, rows=rows) == measure_pixels(images, rows=rows)


def test_a_cache_that_is_not_here_is_told(stored: StoredImages) -> None:
    Path(stored.file.path).unlink()
    with pytest.raises(DataError, match="not on this machine; where there are several, set FMTUNE_CACHE"):
        stored[0]


# The stream


def _batches(images: StoredImages, rank: int = 0, workers: int = 1) -> Batches:
    """Every row but each fifth, as a validation part would leave them."""
    rows = torch.tensor([row for row in range(ROWS) if row % 5])
    return Batches(place_images(images, torch.device("cpu")), torch.arange(ROWS), rows, rank, workers)


def _epoch(batches: Batches, size: int, drop_last: bool, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """This worker's parts, which say the same rows in images and labels."""
    found = []
    for images, labels, part in batches.shuffled(size, drop_last, Generator().manual_seed(seed)):
        assert images[:, 0, 1, 2].tolist() == labels.tolist()
        found.append((images[part], labels[part]))
    return found


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 7, 16, 60, 200])
def test_every_row_comes_once_an_epoch_on_any_number_of_workers(size: int, workers: int, stored: StoredImages) -> None:
    seen = [_epoch(_batches(stored, rank, workers), max(size, workers), drop_last=False) for rank in range(workers)]
    rows = torch.cat([labels for epoch in seen for _, labels in epoch])
    assert sorted(rows.tolist()) == _batches(stored).rows.tolist()


def test_the_order_is_the_same_for_every_number_of_workers(stored: StoredImages) -> None:
    alone = [labels.tolist() for _, labels in _epoch(_batches(stored), 16, drop_last=True)]
    parts = zip(*(_epoch(_batches(stored, rank, 3), 16, drop_last=True) for rank in range(3)), strict=True)
    assert [[row for _, labels in part for row in labels.tolist()] for part in parts] == alone
    assert alone != [labels.tolist() for _, labels in _epoch(_batches(stored), 16, drop_last=True, seed=1)]


def test_rows_are_mixed_across_blocks(stored: StoredImages) -> None:
    """Half a window, three blocks, is shuffled together: a batch of eight rows does not come from one block."""
    blocks = [{row // BLOCK_ROWS for row in labels.tolist()} for _, labels in _epoch(_batches(stored), 8, False)]
    assert sum(map(len, blocks)) / len(blocks) > 2
    order = [row for _, labels in _epoch(_batches(stored), 8, False) for row in labels.tolist()]
    assert order[:20] != sorted(order[:20])
    assert max(order[:20]) > 40  # blocks come in random order too


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_ordered_is_that_of_images_held(workers: int, stored: StoredImages) -> None:
    held = torch.tensor(_numbered().images)
    for rank in range(workers):
        streamed = _batches(stored, rank, workers)
        expected = Batches(held, streamed.labels, streamed.rows, rank, workers)
        pairs = zip(streamed.ordered(10), expected.ordered(10), strict=True)
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_no_more_blocks_are_held_than_the_memory_allows(stored: StoredImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is read once, and reading runs six blocks ahead of what is still needed at most."""
    reads: list[int] = []
    read = BlockReader.read

    def count(self: BlockReader, number: int) -> NDArray[np.uint8]:
        reads.append(number)
        return read(self, number)

    monkeypatch.setattr(BlockReader, "read", count)
    seen: set[int] = set()
    batches = _batches(stored)
    rows_left = {block: sum(row // BLOCK_ROWS == block for row in batches.rows.tolist()) for block in range(13)}
    for _, labels, _ in batches.shuffled(4, False, Generator().manual_seed(0)):
        for row in labels.tolist():
            rows_left[row // BLOCK_ROWS] -= 1
        done = {block for block, left in rows_left.items() if left == 0}
        # Those that this batch used up are let go of after it.
        assert len(set(reads) - seen) <= 6
        seen = done
    assert sorted(reads) == list(range(13))


def test_an_epoch_that_is_broken_off_leaves_no_thread(stored: StoredImages) -> None:
    import threading

    before = threading.active_count()
    epoch = _batches(stored).shuffled(4, False, Generator().manual_seed(0))
    next(epoch)
    epoch.close()  # type: ignore[attr-defined]
    assert threading.active_count() <= before + 1


def test_a_spoiled_cache_is_told_by_the_reader(stored: StoredImages) -> None:
    batches = _batches(stored)
    path = Path(stored.file.path)
    content = path.read_bytes()
    # The pages, but not the footer.
    path.write_bytes(bytes(len(content) - 2000) + content[-2000:])
    with pytest.raises(DataError, match=r"t\.parquet: can't be read"):
        list(batches.shuffled(8, False, Generator().manual_seed(0)))


# Sources


def _sources(folder: Path, table: Table) -> dict[str, Path]:
    csv = write_csv(folder / "t.csv", table)
    (folder / "t.csv.gz").write_bytes(gzip.compress(csv.read_bytes()))
    rows = [image.tobytes() for image in table.images]
    pq.write_table(pa.table({"label": table.labels, "image": rows}), folder / "t.parquet", row_group_size=9)
    write_idx(folder / "t-images-idx3-ubyte.gz", table.images[:, 0])
    write_idx(folder / "t-labels-idx1-ubyte.gz", table.labels.astype(np.uint8))
    return {path.name: path for path in folder.iterdir() if "labels" not in path.name}


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "t-images-idx3-ubyte.gz"])
def test_what_is_parsed_in_pieces_is_what_is_parsed_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little memory: in pieces of seven rows, and the images stay in the cache."""
    monkeypatch.setattr(fmtune.pieces, "BLOCK_BYTES", 7 * 784)
    monkeypatch.setattr(fmtune.data, "read_files", None)
    table = sample_rows("train", 3)
    source = _sources(tmp_path, table)[name]
    loaded = load_split(DataConfig(train=str(source), memory=9000), "train").table
    assert isinstance(loaded, StoredTable)
    assert np.array_equal(loaded.images[np.arange(30)], table.images)
    assert np.array_equal(loaded.labels, table.labels)
    again = load_split(DataConfig(train=str(source), memory=10**6), "train")
    assert isinstance(again.table, Table)
    assert np.array_equal(again.table.images, table.images)
    assert again.origin.startswith("parsed before")


def test_files_of_two_shapes_are_refused_in_pieces_too(tmp_path: Path) -> None:
    table = sample_rows("train", 2)
    write_csv(tmp_path / "a.csv", table)
    write_csv(tmp_path / "b.csv", Table(table.images[:, :, :14, :14], table.labels))
    with pytest.raises(DataError, match=r"b\.csv: images are 14 x 14 x 1, those of .*a\.csv are 28 x 28 x 1"):
        load_split(DataConfig(train=str(tmp_path / "*.csv"), memory=1000), "train")


def test_rows_of_another_size_further_down_are_refused_in_pieces_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch is of one size, and the second of another than the first."""
    monkeypatch.setattr("fmtune.pieces.BLOCK_BYTES", 10 * 784)
    images = [bytes(784)] * 10 + [bytes(1024)] * 10
    pq.write_table(pa.table({"label": [0, 1] * 10, "image": images}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: data\.shape: \[28, 28, 1\] are 784 values, a row has 1024"):
        load_training_data(DataConfig(train=str(tmp_path / "t.parquet"), memory=1000))


def test_a_header_alone_is_refused_in_pieces_too(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("label,a,b,c,d\n")
    with pytest.raises(DataError, match="no rows"):
        load_split(DataConfig(train=str(tmp_path / "t.csv"), memory=1), "train")
    assert not list(fmtune.data.cache_folder().glob("tables/*.part"))


def test_a_source_is_described_alike_held_and_stored(tmp_path: Path) -> None:
    table = sample_rows("train", 3)
    images = table.images.copy()
    images[4] = images[9]
    images[7] = 5
    source = str(write_csv(tmp_path / "t.csv", Table(images, table.labels)))
    held, stored = (describe_source(DataConfig(train=source, memory=memory)) for memory in (10**6, 1000))
    assert isinstance(stored.loaded.table, StoredTable)
    assert held.problems == stored.problems
    assert len(held.problems) == 3
    assert (held.lowest, held.highest, held.pixels) == (stored.lowest, stored.highest, stored.pixels)


def test_validation_on_a_test_split_wants_images_held(tmp_path: Path) -> None:
    source = str(write_csv(tmp_path / "t.csv", sample_rows("train", 3)))
    with pytest.raises(DataError, match=r"data\.validation: test: more images than data\.memory allows"):
        load_training_data(DataConfig(train=source, test=source, validation="test", memory=1000))


def test_the_cache_can_be_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMTUNE_CACHE", f"file://{tmp_path}/shared/")
    (tmp_path / "shared" / "tables").mkdir(parents=True)
    table = sample_rows("train", 2)
    source = str(write_csv(tmp_path / "t.csv", table))
    for memory in (1000, 10**6):
        loaded = load_split(DataConfig(train=source, memory=memory), "train").table
        assert np.array_equal(loaded.images[np.arange(20)], table.images)
    (cached,) = (tmp_path / "shared" / "tables").iterdir()
    assert cached.suffix == ".parquet"


# A whole run


@pytest.mark.slow
def test_a_search_streams_what_memory_does_not_hold(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From parsing in pieces to the test split, with the statistics of all rows and every row seen."""
    monkeypatch.setattr(fmtune.stored, "_BLOCK_BYTES", 40 * 784)
    source = str(write_csv(tmp_path / "t.csv", sample_rows("train", 40)))
    space = {
        "data": {"train": source, "test": source, "memory": "100K", "validation": 0.2},
        "search": {"trials": 3, "finalists": 2, "scheduler": "none"},
        "resources": {"cpus": 2},
        "baseline": {"epochs": 1, "model": {"width": 4}},
        "trial": {"epochs": 2, "batch_size": 16, "model": {"width": 4}, "optim": {"lr": {"log": [0.005, 0.05]}}},
    }
    result = fmtune.search(space, runs=tmp_path / "runs")
    summary = result.summary
    assert summary["trials"] == {"complete": 3, "pruned": 0, "failed": 0}
    assert (summary["dataset"]["train"], summary["dataset"]["validation"]) == (320, 80)
    assert summary["test_accuracy"] > 0.3
    assert (result.folder.path / "report.html").exists()
