from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from pyarrow import fs
from tables import write_idx
from torchvision.datasets.mnist import read_image_file, read_label_file

from fmtune.datasets import read_named
from fmtune.errors import DataError
from fmtune.files import File
from fmtune.readers import Layout, Table, fit_layout, read_files, to_tensors

SAMPLE = Path(read_named.__code__.co_filename).parent / "sample"


def _sample_rows(n: int = 20) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels (n, 784) and labels of the first test rows; the headers of the two files have 16 and 8 bytes."""
    images = gzip.decompress((SAMPLE / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((SAMPLE / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    return (
        np.frombuffer(images, np.uint8).reshape(-1, 784)[:n].copy(),
        np.frombuffer(labels, np.uint8)[:n].astype(np.int64),
    )


def _sample_frame(label_at: int = 0, label: str = "label") -> pd.DataFrame:
    pixels, labels = _sample_rows()
    frame = pd.DataFrame(pixels, columns=[f"pixel{i}" for i in range(1, 785)])
    frame.insert(label_at, label, labels)
    return frame


def _file(path: Path) -> File:
    return File(fs.LocalFileSystem(), str(path), path.name)


def _read(path: Path, layout: Layout | None = None) -> Table:
    return read_files([_file(path)], layout or Layout())


def _assert_is_frame(table: Table, frame: pd.DataFrame, label: str | int) -> None:
    """Compare with what pandas has read, of square grey images."""
    label = frame.columns[label] if isinstance(label, int) else label
    side = math.isqrt(frame.shape[1] - 1)
    assert table.images.dtype == np.uint8
    assert table.labels.dtype == np.int64
    assert np.array_equal(table.images, frame.drop(columns=label).to_numpy().reshape(-1, 1, side, side))
    assert np.array_equal(table.labels, frame[label].to_numpy())


def _refusal(path: Path, layout: Layout | None = None) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(DataError) as caught:
        _read(path, layout)
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


# CSV


def test_csv_with_header_reads_as_pandas_does(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    _sample_frame().to_csv(path, index=False)
    _assert_is_frame(_read(path), pd.read_csv(path), "label")


@pytest.mark.parametrize("layout", [Layout(), Layout(label=0)])
def test_csv_without_header_has_its_label_first(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    _sample_frame().to_csv(path, index=False, header=False)
    _assert_is_frame(_read(path, layout), pd.read_csv(path, header=None), 0)


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize(("position", "label"), [(300, 300), (784, -1), (784, 784), (0, -785)])
def test_csv_label_is_found_by_position(position: int, label: int, header: bool, tmp_path: Path) -> None:
    """A negative position counts from the last column, which is -1."""
    path = tmp_path / "rows.csv"
    _sample_frame(label_at=position).to_csv(path, index=False, header=header)
    _assert_is_frame(_read(path, Layout(label=label)), pd.read_csv(path, header=0 if header else None), position)


@pytest.mark.parametrize("position", [1, 400, 784])
def test_csv_label_is_found_by_name(position: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    _sample_frame(label_at=position, label="class").to_csv(path, index=False)
    _assert_is_frame(_read(path, Layout(label="class")), pd.read_csv(path), "class")


def test_gzipped_csv_reads_as_pandas_does(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    _sample_frame().to_csv(path, index=False)
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    _assert_is_frame(_read(path), pd.read_csv(path), "label")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("header", [True, False])
def test_csv_of_any_editor_reads_as_pandas_does(header: bool, newline: str, encoding: str, tmp_path: Path) -> None:
    """Byte-order marks and Windows line ends are what spreadsheet programs write."""
    path = tmp_path / "rows.csv"
    _sample_frame().to_csv(path, index=False, header=header, lineterminator=newline, encoding=encoding)
    frame = pd.read_csv(path, header=0 if header else None, encoding=encoding)
    _assert_is_frame(_read(path), frame, 0)


def test_csv_of_colour_images_has_channels_last(tmp_path: Path) -> None:
    """Second implementation: pandas' row, reshaped to height, width and channels one image at a time."""
    path = tmp_path / "rows.csv"
    pd.DataFrame(np.hstack([[[5], [6]], np.arange(48).reshape(2, 24)])).to_csv(path, index=False, header=False)
    table = _read(path, Layout(shape=(2, 4, 3)))
    assert table.images.shape == (2, 3, 2, 4)
    for image, row in zip(table.images, pd.read_csv(path, header=None).to_numpy()[:, 1:], strict=True):
        for channel in range(3):
            assert np.array_equal(image[channel], row.reshape(2, 4, 3)[:, :, channel])


def test_labels_outside_of_bytes_and_below_zero_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("label,a,b,c,d\n-3,1,2,3,4\n70000,1,2,3,4\n")
    assert _read(path).labels.tolist() == [-3, 70000]


def test_csv_of_columns_that_pandas_has_numbered_has_no_row_of_numbers(tmp_path: Path) -> None:
    """`DataFrame(array).to_csv(index=False)` calls them 0, 1, 2 and so on."""
    frame = _sample_frame()
    frame.columns = pd.RangeIndex(len(frame.columns))
    frame.to_csv(tmp_path / "rows.csv", index=False)
    _assert_is_frame(_read(tmp_path / "rows.csv", Layout(label=0)), frame, 0)
    assert "no column `label`; the first columns are 0, 1, 2" in _refusal(tmp_path / "rows.csv")


def test_csv_rows_may_be_longer_than_what_is_parsed_at_a_time(tmp_path: Path) -> None:
    """Of 520 x 520 pixels, 1.1 MB each, where pyarrow takes in 1 MiB."""
    images = np.full((2, 270_400), 255, np.uint8)
    images[1, ::7] = 100
    text = "".join(f"{label}," + ",".join(map(str, row)) + "\n" for label, row in enumerate(images))
    (tmp_path / "rows.csv").write_text(text)
    table = _read(tmp_path / "rows.csv")
    assert np.array_equal(table.images.reshape(2, -1), images)
    assert table.labels.tolist() == [0, 1]


def test_csv_whose_name_looks_like_that_of_idx_labels_is_one(tmp_path: Path) -> None:
    """The second of two parts must not be taken for the labels of the first."""
    frame = _sample_frame()
    for number, rows in enumerate((slice(0, 8), slice(8, 20))):
        frame[rows].to_csv(tmp_path / f"part-idx{number}.csv", index=False)
    _assert_is_frame(read_files([_file(tmp_path / f"part-idx{i}.csv") for i in (0, 1)], Layout()), frame, "label")


def test_several_csv_are_joined_in_the_order_given(tmp_path: Path) -> None:
    frame = _sample_frame()
    parts = [frame[12:], frame[:5], frame[5:12]]
    for number, part in enumerate(parts):
        part.to_csv(tmp_path / f"{number}.csv", index=False)
    table = read_files([_file(tmp_path / f"{number}.csv") for number in range(3)], Layout())
    _assert_is_frame(table, pd.concat([pd.read_csv(tmp_path / f"{number}.csv") for number in range(3)]), "label")


def test_files_of_different_shapes_are_refused_with_both_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("label,a,b,c,d\n1,2,3,4,5\n")
    (tmp_path / "b.csv").write_text("label,a\n1,2\n")
    with pytest.raises(DataError) as caught:
        read_files([_file(tmp_path / "a.csv"), _file(tmp_path / "b.csv")], Layout())
    assert caught.value.lines == (
        "b.csv: images are 1 x 1 x 1, those of a.csv are 2 x 2 x 1; all must be of one shape",
    )


HEADER = "label,a,b,c,d\n"


@pytest.mark.parametrize(
    ("content", "place", "remedy"),
    [
        pytest.param("", "t.csv: ", "expected a line of column names or of numbers", id="empty"),
        pytest.param(HEADER, "t.csv: ", "no rows below the header; expected one image a row", id="header only"),
        pytest.param(HEADER.strip(), "t.csv: ", "no rows below the header", id="header only, line not ended"),
        pytest.param("label\n1\n", "t.csv:1: ", "expected a label and pixels", id="one column"),
        pytest.param(HEADER + "1,2,3,4,5\n1,2,3,4\n", "t.csv:3: ", "4 values; expected 5", id="short row"),
        pytest.param(HEADER + "1,2,3,4,5,6\n", "t.csv:2: ", "6 values; expected 5", id="long row"),
        pytest.param("1,2,3,4,5\n1,2,3\n", "t.csv:2: ", "3 values; expected 5", id="short row, no header"),
        pytest.param(
            HEADER + "1,2,3,4,5\ncat,2,3,4,5\n", "t.csv:3: ", "column label: 'cat'; expected an integer", id="label"
        ),
        pytest.param(
            HEADER + "1.5,2,3,4,5\n", "t.csv:2: ", "column label: '1.5'; expected an integer", id="fractional label"
        ),
        pytest.param(
            HEADER + "1,2,3,4,5\n\n1,2,256,4,5\n",
            "t.csv:4: ",
            "column b: 256; expected a pixel from 0 to 255",
            id="pixel over 255, after an empty line",
        ),
        pytest.param(
            HEADER + "1,2,3,4,-1\n", "t.csv:2: ", "column d: -1; expected a pixel from 0 to 255", id="negative pixel"
        ),
        pytest.param(
            "1,2,3,4,5\n1,2,3,4,300\n", "t.csv:2: ", "column 4: 300; expected a pixel from 0 to 255", id="no header"
        ),
        pytest.param(HEADER + "1,2,3,,5\n", "t.csv:2: ", "column c: ''; expected an integer", id="missing pixel"),
        pytest.param(HEADER + ",2,3,4,5\n", "t.csv:2: ", "column label: ''; expected an integer", id="missing label"),
        pytest.param(HEADER + "1,2,NA,4,5\n", "t.csv:2: ", "column b: 'NA'; expected an integer", id="NA"),
        pytest.param(HEADER + "1,2,3.5,4,5\n", "t.csv:2: ", "column b: '3.5'; expected an integer", id="fraction"),
        pytest.param(HEADER + "1,2,+3,4,5\n", "t.csv:2: ", "column b: '+3'; expected an integer", id="plus sign"),
        pytest.param(HEADER + "1,2,1_0,4,5\n", "t.csv:2: ", "column b: '1_0'; expected an integer", id="underscore"),
        pytest.param(HEADER + "99999999999999999999,2,3,4,5\n", "t.csv:2: ", "column label: ", id="label over 64 bits"),
        pytest.param("label,a,b,c\n1,2,3,4\n", "t.csv: ", "set data.shape to [height, width, channels]", id="shape"),
        pytest.param("lable,a,b,c,d\n1,2,3,4,5\n", "t.csv:1: ", "did you mean `lable`?", id="near miss"),
        pytest.param("x,a,b,c,d\n1,2,3,4,5\n", "t.csv:1: ", "the first columns are x, a, b", id="no near miss"),
    ],
)
def test_spoiled_csv_is_refused_with_place_and_remedy(content: str, place: str, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    line = _refusal(path)
    assert line.startswith(place)
    assert remedy in line


@pytest.mark.parametrize(
    ("layout", "remedy"),
    [
        (Layout(label=5), "column 5 of 5; expected 0 to 4"),
        (Layout(label=-6), "column -6 of 5; expected 0 to 4"),
        (Layout(label="class"), "give the column's position"),
        (Layout(shape=(2, 3, 1)), "data.shape: [2, 3, 1] are 6 values, a row has 4 pixels"),
    ],
)
def test_layout_that_does_not_fit_a_csv_without_header_is_refused(layout: Layout, remedy: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("1,2,3,4,5\n")
    line = _refusal(path, layout)
    assert line.startswith("t.csv: data.")
    assert remedy in line


def test_place_of_an_error_is_counted_across_the_blocks_of_a_large_file(tmp_path: Path) -> None:
    """The file has more than the 1 MiB that is looked through at a time."""
    path = tmp_path / "t.csv.gz"
    good = "3," + ",".join(["200"] * 784) + "\n"
    with gzip.open(path, "wt", compresslevel=1) as stream:
        stream.write(good * 500 + good.replace("200\n", "256\n") + good * 3)
    assert 500 * len(good) > 1 << 20
    assert _refusal(path) == "t.csv.gz:501: column 784: 256; expected a pixel from 0 to 255"


@pytest.mark.parametrize("name", ["t.txt", "t.npz", "csv"])
def test_unknown_format_is_refused_with_the_known_ones(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(HEADER + "1,2,3,4,5\n")
    assert _refusal(path) == f"{name}: format not known by its name; expected .csv, .csv.gz, .parquet or an IDX file"


@pytest.mark.parametrize("name", ["t.csv.gz", "t-images-idx3-ubyte.gz"])
def test_file_that_is_no_gzip_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(HEADER + "1,2,3,4,5\n")
    assert _refusal(path).startswith(f"{name}: ")


# Parquet


def _parquet(path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("label_at", [0, 500])
@pytest.mark.parametrize("kind", ["uint8", "int64", "float32"])
def test_parquet_with_a_column_a_pixel_reads_as_pandas_does(kind: str, label_at: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    frame = _sample_frame(label_at)
    frame = frame.astype({column: kind for column in frame.columns if column != "label"})
    # By pyarrow, in several row groups, so that columns come in several chunks.
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path, row_group_size=7)
    _assert_is_frame(_read(path), _sample_frame(label_at), "label")


def _list(pixels: NDArray[np.uint8]) -> pa.Array:
    return pa.array(pixels.tolist(), pa.list_(pa.int32()))


def _fixed_size_list(pixels: NDArray[np.uint8]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(pixels.ravel()), pixels.shape[1])


def _tensor(pixels: NDArray[np.uint8]) -> pa.Array:
    side = math.isqrt(pixels.shape[1])
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(pixels.reshape(-1, side, side)))


def _binary(pixels: NDArray[np.uint8]) -> pa.Array:
    return pa.array([row.tobytes() for row in pixels], pa.binary())


def _large_binary(pixels: NDArray[np.uint8]) -> pa.Array:
    return pa.array([row.tobytes() for row in pixels], pa.large_binary())


def _fixed_size_binary(pixels: NDArray[np.uint8]) -> pa.Array:
    return pa.array([row.tobytes() for row in pixels], pa.binary(pixels.shape[1]))


ENCODINGS = [_list, _fixed_size_list, _tensor, _binary, _large_binary, _fixed_size_binary]


@pytest.mark.parametrize("label_first", [True, False])
@pytest.mark.parametrize("encode", ENCODINGS)
def test_parquet_with_an_image_column_gives_the_rows_it_was_made_of(
    encode: Callable[[NDArray[np.uint8]], pa.Array], label_first: bool, tmp_path: Path
) -> None:
    pixels, labels = _sample_rows()
    columns = {"label": pa.array(labels), "image": encode(pixels)}
    ordered = columns if label_first else dict(reversed(columns.items()))
    pq.write_table(pa.table(ordered), tmp_path / "rows.parquet", row_group_size=7)
    table = _read(tmp_path / "rows.parquet")
    assert np.array_equal(table.images, pixels.reshape(-1, 1, 28, 28))
    assert np.array_equal(table.labels, labels)


def test_parquet_of_colour_tensors_has_channels_last(tmp_path: Path) -> None:
    images = np.arange(48, dtype=np.uint8).reshape(2, 2, 4, 3)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    table = _read(_parquet(tmp_path / "t.parquet", label=pa.array([0, 1]), image=tensors))
    assert np.array_equal(table.images, np.moveaxis(images, 3, 1))


@pytest.mark.parametrize("shape", [None, (4, 5, 3)])
def test_parquet_of_tensors_with_channels_first_keeps_its_pixels_in_their_places(
    shape: tuple[int, int, int] | None, tmp_path: Path
) -> None:
    """As torch has them: known by the layout's shape, or by the size of the axis."""
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 5), dtype=np.uint8)
    pq.write_table(pa.table({"label": np.arange(6), "image": to_tensors(images)}), tmp_path / "rows.parquet")
    assert np.array_equal(_read(tmp_path / "rows.parquet", Layout(shape=shape)).images, images)
    refusal = _refusal(tmp_path / "rows.parquet", Layout(shape=(5, 4, 3)))
    assert "tensors of shape (3, 4, 5); expected height, width, channels (5, 4, 3)" in refusal


@pytest.mark.parametrize("sizes", [(4, 6, 5), (3, 6, 3), (3, 6, 4)])
def test_tensors_whose_channels_are_not_known_are_refused(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    images = np.zeros((2, *sizes), np.uint8)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    path = _parquet(tmp_path / "t.parquet", label=pa.array([0, 1]), image=tensors)
    assert _refusal(path) == f"t.parquet: tensors of shape {sizes}; set data.shape to [height, width, channels]"
    height, width, channels = sizes
    assert _read(path, Layout(shape=sizes)).images.shape == (2, channels, height, width)


@pytest.mark.parametrize("index", [None, "number"])
def test_the_index_of_a_frame_is_no_column(index: str | None, tmp_path: Path) -> None:
    """Parquet has one where the rows were shuffled."""
    frame = _sample_frame().sample(frac=1, random_state=0).rename_axis(index=index)
    frame.to_parquet(tmp_path / "rows.parquet")
    table = _read(tmp_path / "rows.parquet")
    _assert_is_frame(table, frame, "label")
    fitted = fit_layout(_file(tmp_path / "rows.parquet"), Layout(shape=(28, 28, 1), ignores_labels=True))
    assert fitted.label == "label"


def test_labels_may_be_the_index_of_a_frame(tmp_path: Path) -> None:
    frame = _sample_frame()
    frame.set_index("label").to_parquet(tmp_path / "rows.parquet")
    _assert_is_frame(_read(tmp_path / "rows.parquet"), frame, "label")


def test_columns_of_a_csv_that_are_called_alike_are_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("label,p,p,p,p\n1,2,3,4,5\n")
    assert _refusal(tmp_path / "t.csv") == "t.csv:1: two columns are called 'p'; expected names that differ"


def test_a_folder_called_as_a_partition_adds_no_column(tmp_path: Path) -> None:
    (tmp_path / "fold=1").mkdir()
    frame = _sample_frame()
    frame.to_parquet(tmp_path / "fold=1" / "rows.parquet")
    _assert_is_frame(_read(tmp_path / "fold=1" / "rows.parquet"), frame, "label")


@pytest.mark.parametrize("kind", [pa.list_(pa.uint8()), pa.binary()])
def test_parquet_of_images_of_different_sizes_is_refused(kind: pa.DataType, tmp_path: Path) -> None:
    """3 and 5 pixels are as many as twice 4, but no two images of 2 x 2."""
    images = pa.array([bytes(3), bytes(5)] if kind == pa.binary() else [[0] * 3, [0] * 5], kind)
    line = _refusal(_parquet(tmp_path / "t.parquet", label=pa.array([0, 1]), image=images))
    assert line == "t.parquet: images are not all of one size"


ONE, TWO, ABCD = pa.array([1]), pa.array([1, 2]), pa.array([b"abcd"])
SPOILED_PARQUET: dict[str, tuple[dict[str, pa.Array], str]] = {
    "no rows": ({"label": ONE[:0], "image": ABCD[:0]}, "no rows; expected one image a row"),
    "near miss": ({"lable": ONE, "image": ABCD}, "did you mean `lable`?"),
    "label": ({"label": pa.array(["1"]), "image": ABCD}, "column label: string; expected integers"),
    "missing label": ({"label": pa.array([None], pa.int64()), "image": ABCD}, "column label: 1 values are missing"),
    "missing image": ({"label": TWO, "image": pa.array([b"abcd", None])}, "column image: 1 values are missing"),
    "shape": ({"label": ONE, "image": pa.array([b"abc"])}, "set data.shape to [height, width, channels]"),
    "pixel over 255": ({"label": ONE, "image": pa.array([[1, 2, 3, 256]])}, "expected lists of pixels from 0 to 255"),
    "text": ({"label": ONE, "image": pa.array(["abcd"])}, "column image: string; expected lists of pixels"),
    "negative pixel": ({"label": ONE} | dict.fromkeys("abcd", pa.array([-1])), "expected pixels from 0 to 255"),
}


@pytest.mark.parametrize(("columns", "remedy"), SPOILED_PARQUET.values(), ids=SPOILED_PARQUET)
def test_spoiled_parquet_is_refused_with_column_and_remedy(
    columns: dict[str, pa.Array], remedy: str, tmp_path: Path
) -> None:
    """A Parquet file has no lines, so its place is its name alone."""
    line = _refusal(_parquet(tmp_path / "t.parquet", **columns))
    assert line.startswith("t.parquet: ")
    assert remedy in line


def test_parquet_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_text(HEADER)
    assert _refusal(path).startswith("t.parquet: not a readable Parquet file")


# IDX


def _write_pair(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> tuple[Path, Path]:
    paths = folder / "t-images-idx3-ubyte.gz", folder / "t-labels-idx1-ubyte.gz"
    for path, values in zip(paths, (images, labels), strict=True):
        write_idx(path, values)
    return paths


def _idx_rows() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images that are not square, so that height and width can't be swapped unseen."""
    pixels, labels = _sample_rows()
    return pixels[:, : 20 * 28].reshape(-1, 20, 28), labels.astype(np.uint8)


@pytest.mark.parametrize("order", [[0], [0, 1], [1, 0]])
def test_idx_pair_comes_back_as_written(order: list[int], tmp_path: Path) -> None:
    """By the images' name alone, whose labels lie beside them, and by both names in either order."""
    images, labels = _idx_rows()
    paths = _write_pair(tmp_path, images, labels)
    table = read_files([_file(paths[i]) for i in order], Layout())
    assert np.array_equal(table.images[:, 0], images)
    assert np.array_equal(table.labels, labels)
    assert table.labels.dtype == np.int64


def test_written_idx_pair_is_what_torchvision_reads(tmp_path: Path) -> None:
    images, labels = _idx_rows()
    for path in _write_pair(tmp_path, images, labels):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    assert np.array_equal(read_image_file(str(tmp_path / "t-images-idx3-ubyte")).numpy(), images)
    assert np.array_equal(read_label_file(str(tmp_path / "t-labels-idx1-ubyte")).numpy(), labels)


def test_written_idx_carries_no_time(tmp_path: Path) -> None:
    """Bytes 4 to 7 of gzip's header are the time, which would make equal content differ from run to run."""
    for path in _write_pair(tmp_path, *_idx_rows()):
        assert path.read_bytes()[4:8] == bytes(4)


def test_idx_pair_of_unequal_lengths_is_refused(tmp_path: Path) -> None:
    images, labels = _idx_rows()
    path, _ = _write_pair(tmp_path, images, labels[:-1])
    assert _refusal(path) == "t-labels-idx1-ubyte.gz: 19 labels; expected 20, one for each image"


def test_idx_images_without_labels_beside_them_are_refused(tmp_path: Path) -> None:
    path, beside = _write_pair(tmp_path, *_idx_rows())
    beside.unlink()
    assert _refusal(path) == "t-labels-idx1-ubyte.gz: no such file; the labels belong beside the images"


def test_idx_labels_alone_are_refused(tmp_path: Path) -> None:
    _, path = _write_pair(tmp_path, *_idx_rows())
    assert "name the images, such as train-images-idx3-ubyte.gz" in _refusal(path)


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (0, "not an IDX file of 3-dimensional unsigned bytes"),
        (6, "its header"),
        (16 + 100, f"116 bytes; its header promises {16 + 20 * 20 * 28}"),
    ],
)
def test_truncated_idx_is_refused(length: int, reason: str, tmp_path: Path) -> None:
    path, _ = _write_pair(tmp_path, *_idx_rows())
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:length]))
    line = _refusal(path)
    assert line.startswith("t-images-idx3-ubyte.gz: ")
    assert reason in line
