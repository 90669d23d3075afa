from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from tables import sample_rows, write_csv, write_idx

import fmtune.data
from fmtune.config import DataConfig
from fmtune.data import (
    Classes,
    load_split,
    load_test_split,
    load_training_data,
    measure_pixels,
    split_rows,
)
from fmtune.errors import DataError
from fmtune.readers import Table
from fmtune.stored import StoredTable
from fmtune.trial import SharedData


def test_the_split_is_stratified_disjoint_and_complete() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 7])
    train, validation = split_rows(labels, 0.1, seed=0, place="x")
    assert sorted([*train, *validation]) == list(range(157))
    # A tenth of each class, rounded, and one at least.
    assert np.bincount(labels[validation]).tolist() == [10, 5, 1]


def test_the_split_depends_on_its_seed_alone() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 500)
    first, again, other = (split_rows(labels, 0.2, seed, "x")[1] for seed in (3, 3, 4))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_the_split_is_the_same_in_every_version() -> None:
    """Runs that are compared across versions of fmtune must hold out the same rows."""
    assert split_rows(np.repeat([0, 1], 10), 0.2, seed=0, place="x")[1].tolist() == [4, 6, 12, 19]


def test_a_class_of_one_row_is_refused() -> None:
    with pytest.raises(DataError, match=r"x: row 2: the only one of its class"):
        split_rows(np.array([0, 0, 1]), 0.5, seed=0, place="x")


def test_pixel_statistics_are_numpys() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), dtype=np.uint8)
    pixels = measure_pixels(images)
    scaled = images.astype(np.float64) / 255
    assert pixels.mean == pytest.approx(scaled.mean(axis=(0, 2, 3)))
    assert pixels.std == pytest.approx(scaled.std(axis=(0, 2, 3)))


def test_pixel_statistics_come_from_the_training_part_alone(tmp_path: Path) -> None:
    """White validation rows, found by the split itself, leave the mean of black training rows at 0."""
    labels = np.repeat([0, 1], 10)
    _, validation = split_rows(labels, 0.2, seed=0, place="x")
    images = np.zeros((20, 1, 4, 4), np.uint8)
    images[validation] = 255
    source = write_csv(tmp_path / "t.csv", Table(images, labels))
    data = load_training_data(DataConfig(train=str(source), validation=0.2))
    assert data.validation_rows.tolist() == validation.tolist()
    assert data.pixels.mean == (0.0,)


def test_labels_become_indices_in_their_order() -> None:
    table = Table(np.zeros((4, 1, 2, 2), np.uint8), np.array([7, 3, 7, 5]), {3: "three"})
    classes = Classes.of_table(table)
    assert classes.names == ("three", "5", "7")
    assert classes.indices(table.labels, "x").tolist() == [2, 0, 2, 1]
    with pytest.raises(DataError, match=r"x: row 1: label 4; the training rows have 3, 5, 7"):
        classes.indices(np.array([3, 4]), "x")


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "t.csv", Table(np.zeros((4, 1, 2, 2), np.uint8), np.zeros(4, np.int64)))
    with pytest.raises(DataError, match=r"one class only \(0\); expected two or more"):
        load_training_data(DataConfig(train=str(source)))


def test_a_table_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reading comes from the cache, with the same rows; a changed file is parsed anew."""
    source = tmp_path / "t.csv"
    write_csv(source, sample_rows("train", 2))
    first = load_split(DataConfig(train=str(source)), "train")
    with monkeypatch.context() as patched:
        patched.delattr(fmtune.data, "read_files")
        second = load_split(DataConfig(train=str(source)), "train")
    assert second.origin.startswith("parsed before")
    assert np.array_equal(first.table.images, second.table.images)
    assert np.array_equal(first.table.labels, second.table.labels)
    write_csv(source, sample_rows("train", 3))
    assert len(load_split(DataConfig(train=str(source)), "train").table) == 30


def test_a_glob_joins_its_files_by_name(tmp_path: Path) -> None:
    table = sample_rows("train", 2)
    write_csv(tmp_path / "b.csv", Table(table.images[5:], table.labels[5:]))
    write_csv(tmp_path / "a.csv", Table(table.images[:5], table.labels[:5]))
    loaded = load_split(DataConfig(train=str(tmp_path / "*.csv")), "train")
    assert np.array_equal(loaded.table.images, table.images)


def test_changed_labels_of_several_idx_files_are_read_anew(tmp_path: Path) -> None:
    """They are not named by the glob, and lie beside the images that are; some sets have a dot in their names."""
    table = sample_rows("train", 2)
    for name, rows in (("a", slice(0, 8)), ("b", slice(8, 20))):
        write_idx(tmp_path / f"{name}-images.idx3-ubyte.gz", table.images[rows, 0])
        write_idx(tmp_path / f"{name}-labels.idx1-ubyte.gz", table.labels[rows].astype(np.uint8))
    for source in ("*-images.idx3-ubyte.gz", "*.gz"):
        loaded = load_split(DataConfig(train=str(tmp_path / source)), "train")
        assert np.array_equal(loaded.table.images, table.images)
        assert np.array_equal(loaded.table.labels, table.labels)
    write_idx(tmp_path / "b-labels.idx1-ubyte.gz", np.full(12, 3, np.uint8))
    loaded = load_split(DataConfig(train=str(tmp_path / "*-images.idx3-ubyte.gz")), "train")
    assert loaded.table.labels[8:].tolist() == [3] * 12


def test_a_file_with_brackets_in_its_name_is_found(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "train[1].csv", sample_rows("train", 2))
    assert len(load_split(DataConfig(train=str(source)), "train").table) == 20


def test_what_unpacks_to_more_than_the_memory_allows_stays_in_the_cache_at_once(tmp_path: Path) -> None:
    """Images of one value pack to next to nothing, so that their file's size promises less."""
    labels = np.repeat(np.arange(10), 20)
    pq.write_table(pa.table({"label": labels, "image": [bytes(784)] * 200}), tmp_path / "t.parquet")
    loaded = load_split(DataConfig(train=str(tmp_path / "t.parquet"), memory=100_000), "train")
    assert isinstance(loaded.table, StoredTable)
    assert np.array_equal(loaded.table.labels, labels)


def test_a_cache_that_can_not_be_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_csv(tmp_path / "t.csv", sample_rows("train", 2))
    (tmp_path / "taken").touch()
    monkeypatch.setenv("FMTUNE_CACHE", str(tmp_path / "taken"))
    with pytest.raises(DataError, match=r"can't be written \(.*\); set FMTUNE_CACHE to a place that can"):
        load_split(DataConfig(train=str(source)), "train")


def test_a_url_is_read_through_arrows_file_systems(tmp_path: Path) -> None:
    table = sample_rows("train", 2)
    write_csv(tmp_path / "a.csv", table)
    for source in (f"file://{tmp_path}/a.csv", f"file://{tmp_path}/*.csv"):
        assert np.array_equal(load_split(DataConfig(train=source), "train").table.images, table.images)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("no.csv", r"no\.csv: no such file"),
        (str(Path(__file__).parent), r"tests: is a folder; expected a file, or a glob such as .*tests/\*\.csv"),
        ("fashion", r"fashion: no such file; known names are sample, fashion-mnist"),
        ("file:///no/such/*.csv", r"can't be reached|no such file"),
    ],
)
def test_a_source_that_is_not_there_is_told(source: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        load_split(DataConfig(train=source), "train")


def test_a_file_has_no_test_split_of_its_own(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "t.csv", sample_rows("train", 2))
    config = DataConfig(train=str(source))
    loaded = load_split(config, "train")
    with pytest.raises(DataError, match=r"a file has no test split of its own; set data\.test"):
        load_test_split(config, loaded)


def test_the_fallback_stands_in_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the named data can't be had, its own test split stands in with it."""

    def fail(name: str, *_: object) -> object:
        raise DataError(f"{name}: not here") if name == "mnist" else AssertionError(name)

    read_named = fmtune.data.datasets.read_named
    monkeypatch.setattr(
        fmtune.data.datasets, "read_named", lambda name, *rest: (fail if name == "mnist" else read_named)(name, *rest)
    )
    config = DataConfig(train="mnist", fallback="sample")
    loaded = load_split(config, "train")
    assert (loaded.source, len(loaded.table)) == ("sample", 6000)
    assert loaded.origin.startswith("stand-in for mnist")
    assert len(load_test_split(config, loaded).table) == 1000
    with pytest.raises(DataError, match="mnist: not here"):
        load_split(DataConfig(train="mnist"), "train")


def test_trials_find_the_rows_in_the_ray_dataset(ray_cluster: None, tmp_path: Path) -> None:
    """What goes into the object store comes out the same, pixel for pixel, for grey and for colour."""
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        table = Table(rng.integers(0, 256, (20, channels, 4, 4), dtype=np.uint8), np.repeat([0, 1], 10))
        source = tmp_path / f"{channels}.csv"
        rows = table.images.transpose(0, 2, 3, 1).reshape(20, 1, 1, -1)
        write_csv(source, Table(rows, table.labels))
        data = load_training_data(DataConfig(train=str(source), shape=(4, 4, channels)))
        shared = SharedData.of(data)
        images, labels = ray.get(_fetch.remote(shared))
        assert np.array_equal(images, table.images)
        assert np.array_equal(labels, table.labels)
        assert shared.dataset.count() == 20


@ray.remote
def _fetch(shared: SharedData) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    import torch

    from fmtune.trial import tensors_on_device

    images, labels = tensors_on_device(shared, torch.device("cpu"))
    return images.numpy(), labels.numpy()
