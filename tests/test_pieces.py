"""Sources in pieces, each block by block: the rows of the whole, in their order."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pyarrow import fs
from tables import sample_rows, write_csv, write_idx

from fmtune.errors import DataError
from fmtune.files import File
from fmtune.pictures import read_picture
from fmtune.pieces import Piece, find_pieces
from fmtune.readers import Table

GREY = (1, 28, 28)


def _read(pieces: Sequence[Piece]) -> NDArray[np.uint8]:
    """The images of pieces, joined."""
    blocks = [block.column("image").combine_chunks().to_numpy_ndarray() for piece in pieces for block in piece.read()]
    return np.concatenate(blocks)


def _refusal(source: Path, shape: tuple[int, int, int] = GREY) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(DataError) as caught:
        _read(find_pieces(str(source), "label", shape))
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


def _small_blocks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("fmtune.pieces.BLOCK_BYTES", rows * 784)


# Tables


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", ["t.csv", "bare.csv", "t.csv.gz", "t.parquet", "image.parquet"])
def test_tables_are_read_with_and_without_the_labels_column(
    name: str, labelled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In more than one block."""
    table = sample_rows("test", 3)
    path = tmp_path / name
    write_csv(tmp_path / "source.csv", table)
    lines = (tmp_path / "source.csv").read_text().splitlines()
    text = "\n".join(line if labelled else line.partition(",")[2] for line in lines[name == "bare.csv" :])
    pixels = table.images.reshape(30, 784)
    columns: dict[str, Any] = {"label": table.labels} if labelled else {}
    match name:
        case "t.csv" | "bare.csv":
            path.write_text(text)
        case "t.csv.gz":
            path.write_bytes(gzip.compress(text.encode()))
        case "t.parquet":
            pq.write_table(pa.table(columns | {f"p{i}": pixels[:, i] for i in range(784)}), path, row_group_size=4)
        case _:
            pq.write_table(pa.table(columns | {"image": [row.tobytes() for row in pixels]}), path)
    _small_blocks(monkeypatch, 7)
    pieces = find_pieces(str(path), "label", GREY)
    assert sum(1 for piece in pieces for _ in piece.read()) > 1
    assert np.array_equal(_read(pieces), table.images)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("start", ["", "label,a,b,c,d\n", "\ufefflabel,a,b,c,d\n", "\ufeff"])
def test_a_csv_cut_anywhere_gives_each_of_its_lines_once(
    start: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of 10 to 18 characters, in pieces of 4 to 60: cuts fall on line ends, beside them and within lines."""
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 2, 2), dtype=np.uint8)
    rows = [",".join(map(str, [7, *image.ravel()])) for image in images]
    path = tmp_path / "t.csv"
    for last in ("", end):
        path.write_bytes((start + end.join(rows) + last).encode())
        for size in range(2, 31):
            monkeypatch.setattr("fmtune.pieces.BLOCK_BYTES", size)
            assert np.array_equal(_read(find_pieces(str(path), "label", (1, 2, 2))), images), size


def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    table = sample_rows("test", 2)
    for name, rows in (("b", slice(8, 20)), ("a", slice(0, 8))):
        pq.write_table(pa.table({"image": [i.tobytes() for i in table.images[rows]]}), tmp_path / f"{name}.parquet")
    assert np.array_equal(_read(find_pieces(f"{tmp_path}/*.parquet", "label", GREY)), table.images)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_labels_are_passed_over_whatever_they_are(name: str, tmp_path: Path) -> None:
    """Names of classes, and some that are missing."""
    table = sample_rows("test", 1)
    pixels = table.images.reshape(10, 784)
    labels = pa.array(["boot", None, *["bag, large"] * 8])
    rows = pa.table({"label": labels} | {f"p{i}": pixels[:, i] for i in range(784)})
    write = pacsv.write_csv if name.endswith(".csv") else pq.write_table
    write(rows, tmp_path / name)
    assert np.array_equal(_read(find_pieces(str(tmp_path / name), "label", GREY)), table.images)


def test_tables_whose_names_look_like_those_of_idx_labels_are_predicted(tmp_path: Path) -> None:
    table = sample_rows("test", 2)
    for number, rows in enumerate((slice(0, 8), slice(8, 20))):
        write_csv(tmp_path / f"part-idx{number}.csv", Table(table.images[rows], table.labels[rows]))
    pieces = find_pieces(f"{tmp_path}/part-idx*.csv", "label", GREY)
    assert np.array_equal(_read(pieces), table.images)
    assert sum(piece.work for piece in pieces) < 2**20, "small files are little work"


def test_idx_images_need_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and beside the labels that a glob names too."""
    _small_blocks(monkeypatch, 7)
    table = sample_rows("test", 3)
    write_idx(tmp_path / "t-images-idx3-ubyte.gz", table.images[:, 0])
    assert np.array_equal(_read(find_pieces(f"{tmp_path}/t-images-idx3-ubyte.gz", "label", GREY)), table.images)
    write_idx(tmp_path / "t-labels-idx1-ubyte.gz", table.labels.astype(np.uint8))
    assert np.array_equal(_read(find_pieces(f"{tmp_path}/t-*", "label", GREY)), table.images)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_the_place_of_an_error_is_counted_in_the_whole_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_blocks(monkeypatch, 2)
    lines = write_csv(tmp_path / "t.csv", sample_rows("test", 3)).read_text().splitlines()
    lines[25] = lines[25].replace(",", ",x", 1)
    text = "\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert _refusal(tmp_path / name).startswith(f"{tmp_path}/{name}:26: column pixel1: 'x")


def _idx(count: int, content: bytes) -> bytes:
    return bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">u4").tobytes() + content


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.txt", b"1,2", "format not known by its name; expected .csv"),
        ("t.csv", b"", "the file is empty"),
        ("t.csv", b"label,a,b,c,d\n1,2,3,4,5\n", "data.shape: [28, 28, 1] are 784 values, a row has 4 pixels"),
        ("t.csv.gz", b"1,2", "can't be read"),
        ("t.parquet", b"no", "can't be read"),
        ("t-labels-idx1-ubyte", b"", "labels alone; name the images"),
        ("t-images-idx3-ubyte", b"no", "not an IDX file of 3-dimensional"),
        ("t-images-idx3-ubyte", _idx(2, bytes(784 + 5)), "ends in image 1 of 2"),
        ("t-images-idx3-ubyte", _idx(1, bytes(784 + 1)), "more bytes than the 1 images that its header promises"),
    ],
)
def test_a_spoiled_table_is_refused_with_place_and_remedy(
    name: str, content: bytes, problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    line = _refusal(tmp_path / name)
    assert line.startswith(f"{tmp_path}/{name}: ")
    assert problem in line


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "t-images-idx3-ubyte.gz", sample_rows("test", 1).images[:, 0, :20])
    assert "images are (1, 20, 28); the model takes (1, 28, 28)" in _refusal(tmp_path / "t-images-idx3-ubyte.gz")


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "t.parquet")
    assert _refusal(tmp_path / "t.parquet").endswith("no rows; expected one image a row")


# Pictures


def _picture(path: Path) -> File:
    return File(fs.LocalFileSystem(), str(path), path.name)


def test_a_folder_gives_its_pictures_and_theirs_names(tmp_path: Path) -> None:
    """Of all below it, in the order of their names; what is hidden or has another ending is passed over."""
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    (folder / ".thumbnails").mkdir()
    images = sample_rows("test", 1).images[:4, 0]
    for name, image in zip(["b.png", "a/2.PNG", "a/10.png", ".thumbnails/b.png"], images, strict=True):
        Image.fromarray(image).save(folder / name, format="PNG")
    (folder / "notes.txt").write_text("none")
    for source in (folder, f"{folder}/"):
        (piece,) = find_pieces(str(source), "label", GREY)
        (block,) = piece.read()
        assert block.column("file").to_pylist() == ["a/10.png", "a/2.PNG", "b.png"]
        assert np.array_equal(_read([piece])[:, 0], images[[2, 1, 0]])


def test_a_glob_gives_pictures_by_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of two."""
    _small_blocks(monkeypatch, 2)
    monkeypatch.chdir(tmp_path)
    images = sample_rows("test", 1).images[:5, 0]
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"{i}.png")
    pieces = find_pieces("*.png", "label", GREY)
    assert len(pieces) == 3
    names = [name for piece in pieces for block in piece.read() for name in block.column("file").to_pylist()]
    assert names == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert np.array_equal(_read(pieces)[:, 0], images)


def test_pictures_are_given_the_channels_of_the_model(tmp_path: Path) -> None:
    """Grey ones are repeated; of red, green and blue comes the luma of ITU-R 601-2, as Pillow documents it."""
    grey = sample_rows("test", 1).images[0, 0]
    colour = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(np.dstack([colour, np.full((28, 28), 9, np.uint8)])).save(tmp_path / "transparent.png")
    assert np.array_equal(read_picture(_picture(tmp_path / "grey.png"), GREY)[0], grey)
    assert np.array_equal(read_picture(_picture(tmp_path / "grey.png"), (3, 28, 28)), np.stack([grey] * 3))
    for name in ("colour.png", "transparent.png"):
        assert np.array_equal(read_picture(_picture(tmp_path / name), (3, 28, 28)), colour.transpose(2, 0, 1))
    luma = colour @ [0.299, 0.587, 0.114]
    assert np.abs(read_picture(_picture(tmp_path / "colour.png"), GREY)[0] - luma).max() <= 1


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    """Cut off at 255, nearly all of them would be white."""
    grey = sample_rows("test", 1).images[0, 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(read_picture(_picture(tmp_path / "deep.png"), GREY)[0], grey)


@pytest.mark.parametrize("size", [(56, 90), (14, 20)])
def test_pictures_of_another_size_are_stretched(size: tuple[int, int], tmp_path: Path) -> None:
    """Second implementation: torch's antialiased bilinear interpolation."""
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "t.png")
    found = read_picture(_picture(tmp_path / "t.png"), (3, 28, 28))
    images = torch.tensor(picture).permute(2, 0, 1)[None].float()
    expected = F.interpolate(images, (28, 28), mode="bilinear", antialias=True)[0].numpy()
    # Pillow rounds after each axis.
    assert np.abs(found - expected).max() <= 1


def test_a_picture_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    """Orientation 6: what is stored has to be turned clockwise by a quarter."""
    upright = np.zeros((28, 28), np.uint8)
    upright[:14] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright)).save(tmp_path / "t.jpg", exif=exif, quality=95)
    assert np.abs(read_picture(_picture(tmp_path / "t.jpg"), GREY)[0].astype(int) - upright).max() < 20


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    Image.fromarray(sample_rows("test", 1).images[0, 0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no")
    assert _refusal(tmp_path) == f"{tmp_path}/b.png: not an image; expected PNG or JPEG"
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    assert _refusal(tmp_path).startswith(f"{tmp_path}/b.png: can't be decoded (")
    (tmp_path / "b.png").unlink()
    (tmp_path / "notes.txt").write_text("no")
    assert _refusal(tmp_path / "*") == f"{tmp_path}/notes.txt: not an image; expected PNG or JPEG"


def test_pictures_have_other_channels_than_two(tmp_path: Path) -> None:
    Image.fromarray(sample_rows("test", 1).images[0, 0]).save(tmp_path / "a.png")
    assert "grey, RGB or RGBA, the model takes 2 channels" in _refusal(tmp_path, (2, 28, 28))


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1,2")
    assert _refusal(tmp_path).startswith(f"{tmp_path}: no PNG or JPEG files in the folder; for tables give a glob")


def test_pieces_are_read_without_torch() -> None:
    """Readers are processes of their own, and torch takes seconds to import and hundreds of megabytes."""
    program = "import sys, fmtune.pieces; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
