"""Predictions of any number of images, here and by Ray Data: the same rows, in order, whole or not at all."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tables import sample_rows, write_csv, write_idx
from torch import nn

from fmtune import load, predict
from fmtune.checkpoint import create_preprocess, create_trained_model, save_model
from fmtune.config import TrialConfig
from fmtune.data import Classes
from fmtune.errors import DataError, InputError
from fmtune.model import Pixels, create_model
from fmtune.pictures import find_pictures, read_picture
from fmtune.pieces import find_pieces
from fmtune.rows import write_rows
from fmtune.space import Space

CLASSES = Classes((3, 5, 9), ("shirt", "bag", "sandal"))
COLUMNS = ["label", "name", "probability_shirt", "probability_bag", "probability_sandal"]
GREY_SHAPE = (1, 28, 28)
GREY = Pixels(1, (0.286,), (0.353,))
COLOUR = Pixels(3, (0.1, 0.4, 0.7), (0.2, 0.3, 0.5))


def _create_run(folder: Path, pixels: Pixels) -> Path:
    """A run of a model with random weights for images of 28 x 28, with batch norms that have seen random images."""
    torch.manual_seed(0)
    config = TrialConfig.model_validate({"model": {"width": 4}})
    network = create_model(config.model, pixels.channels, len(CLASSES))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    images = torch.randint(0, 256, (64, pixels.channels, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        network(create_preprocess(config, pixels)(images))
    shape = (pixels.channels, 28, 28)
    save_model(folder / "best", create_trained_model(config, pixels, CLASSES, shape, network.state_dict()))
    (folder / "space.yaml").write_text(Space.load({}).to_yaml(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _create_run(tmp_path_factory.mktemp("grey"), GREY)


@pytest.fixture(scope="module")
def colour_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _create_run(tmp_path_factory.mktemp("colour"), COLOUR)


@torch.no_grad()
def _expected(run: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Probabilities of all images in one go; they differ from image to image, so that their order shows."""
    model = load(run)
    logits: torch.Tensor = model.network(model.preprocess(torch.tensor(images)))
    probabilities = logits.softmax(dim=1).numpy()
    assert len(np.unique(probabilities.round(4), axis=0)) > 0.9 * len(images)
    return probabilities


def _assert_rows(frame: pd.DataFrame, expected: NDArray[np.float32]) -> None:
    assert frame["row"].tolist() == list(range(len(expected)))
    probabilities = frame[COLUMNS[2:]].to_numpy()
    assert np.abs(probabilities - expected).max() < 1e-5
    best = probabilities.argmax(axis=1)
    assert frame["label"].tolist() == [CLASSES.labels[i] for i in best]
    assert frame["name"].tolist() == [CLASSES.names[i] for i in best]


def _write_sources(folder: Path) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """30 images, and the same as a source of each kind."""
    table = sample_rows("test", 3)
    csv = write_csv(folder / "t.csv", table)
    (folder / "t.csv.gz").write_bytes(gzip.compress(csv.read_bytes()))
    pq.write_table(pa.table({"image": [i.tobytes() for i in table.images]}), folder / "t.parquet", row_group_size=7)
    write_idx(folder / "t-images-idx3-ubyte.gz", table.images[:, 0])
    (folder / "photos").mkdir()
    for i, image in enumerate(table.images[:, 0]):
        Image.fromarray(image).save(folder / "photos" / f"{i:02d}.png")
    names = ("t.csv", "t.csv.gz", "t.parquet", "t-images-idx3-ubyte.gz", "photos", "photos/*.png")
    return table.images, {name: folder / name for name in names}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_every_kind_of_source_gives_the_same_rows(
    ending: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block, they are the probabilities of all images in one go."""
    monkeypatch.setattr("fmtune.pieces.BLOCK_BYTES", 7 * 784)
    images, sources = _write_sources(tmp_path)
    expected = _expected(run, images)
    output = tmp_path / f"out.{ending}"
    for name, source in sources.items():
        assert predict(run, source, output) == 30
        frame = pd.read_csv(output) if ending == "csv" else pd.read_parquet(output)
        assert list(frame.columns) == ["row", *(["file"] if "photos" in name else []), *COLUMNS]
        _assert_rows(frame, expected)
        if name == "photos":
            assert frame["file"].tolist() == [f"{i:02d}.png" for i in range(30)]
        if name == "photos/*.png":
            assert frame["file"].tolist() == [f"{tmp_path}/photos/{i:02d}.png" for i in range(30)]


def test_rows_come_back_from_ray_in_order(
    ray_cluster: None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fifth picture takes far longer to decode than the others, each of which is a block of its own."""
    monkeypatch.setattr("fmtune.pieces.BLOCK_BYTES", 784)
    for i, image in enumerate(sample_rows("test", 2).images[:, 0]):
        side, ending = 5000 if i % 5 == 0 else 28, "jpg" if i % 2 else "png"
        Image.fromarray(image).resize((side, side)).save(tmp_path / f"{i:02d}.{ending}")
    files = find_pictures(str(tmp_path))
    assert predict(run, tmp_path, tmp_path / "out.parquet", address="auto") == 20
    _assert_rows(
        pd.read_parquet(tmp_path / "out.parquet"),
        _expected(run, np.stack([read_picture(f, GREY_SHAPE) for f in files])),
    )


@pytest.mark.parametrize("name", ["t.csv.gz", "photos"])
def test_ray_reads_compressed_text_and_pictures(
    name: str, ray_cluster: None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmtune.pieces.BLOCK_BYTES", 7 * 784)
    images, sources = _write_sources(tmp_path)
    assert predict(run, sources[name], tmp_path / "out.csv", address="auto") == 30
    frame = pd.read_csv(tmp_path / "out.csv")
    assert list(frame.columns) == ["row", *(["file"] if name == "photos" else []), *COLUMNS]
    _assert_rows(frame, _expected(run, images))


@pytest.mark.parametrize("address", [None, "auto"])
def test_an_error_in_the_last_piece_is_one_line_and_leaves_nothing(
    address: str | None, ray_cluster: None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output of an earlier time stays as it was."""
    monkeypatch.setattr("fmtune.pieces.BLOCK_BYTES", 7 * 784)
    path = write_csv(tmp_path / "t.csv", sample_rows("test", 3))
    path.write_text(path.read_text() + "1,2\n")
    output = tmp_path / "out.csv"
    output.write_text("earlier")
    with pytest.raises(InputError) as caught:
        predict(run, path, output, address=address)
    assert caught.value.lines == (f"{path}:32: 2 values; expected 785, as in the first line",)
    assert output.read_text() == "earlier"
    assert {entry.name for entry in tmp_path.iterdir()} == {"t.csv", "out.csv"}


def test_what_is_written_is_in_its_place_only_when_it_is_whole(tmp_path: Path) -> None:
    """Looked for after each write, and after an interruption."""
    output = tmp_path / "out.parquet"
    table = pa.table({"label": [1, 2]})
    with pytest.raises(KeyboardInterrupt), write_rows(output) as writer:
        writer.write(table)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with write_rows(output) as writer:
        for _ in range(3):
            writer.write(table)
            assert not output.exists()
    assert pq.read_table(output).to_pydict() == {"row": [0, 1, 2, 3, 4, 5], "label": [1, 2, 1, 2, 1, 2]}
    assert list(tmp_path.iterdir()) == [output]


def test_grey_pictures_suit_a_model_of_colour_and_the_other_way_round(
    run: Path, colour_run: Path, tmp_path: Path
) -> None:
    """A grey picture is the colour one whose three channels are equal, and back."""
    grey = sample_rows("test", 1).images
    for i, image in enumerate(grey[:, 0]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "colour").mkdir()
    for i, image in enumerate(grey[:, 0]):
        Image.fromarray(np.dstack([image] * 3)).save(tmp_path / "colour" / f"{i}.png")
    assert predict(colour_run, f"{tmp_path}/*.png", tmp_path / "out.parquet") == 10
    _assert_rows(pd.read_parquet(tmp_path / "out.parquet"), _expected(colour_run, grey.repeat(3, axis=1)))
    assert predict(run, tmp_path / "colour", tmp_path / "out.parquet") == 10
    _assert_rows(pd.read_parquet(tmp_path / "out.parquet"), _expected(run, grey))


def test_a_picture_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).touch()
    with pytest.raises(DataError, match=r"caf\\udce9.png': a name that is no UTF-8; rename the file"):
        find_pieces(str(tmp_path), "label", (1, 28, 28))


def test_a_name_stands_for_its_test_split(run: Path, tmp_path: Path) -> None:
    assert predict(run, "sample", tmp_path / "out.parquet") == 1000


@pytest.mark.parametrize(
    ("source", "output", "problem"),
    [
        ("t.csv", "out.txt", "out.txt: format not known by its name; expected .csv or .parquet"),
        ("t.csv", "no/out.csv", "no/out.csv: no folder no; make it, or name one that exists"),
        ("t.csv", "folder.csv", "folder.csv: is a folder; expected a file's name"),
        ("t.csv", "t.csv", "t.csv: is the input; choose another name"),
        ("t*.csv", "t.csv", "t.csv: is the input; choose another name"),
        ("file://{folder}/t.csv", "t.csv", "t.csv: is the input; choose another name"),
        ("no.csv", "out.csv", "no.csv: no such file"),
        ("*.parquet", "out.csv", "*.parquet: no such file"),
        ("folder.csv", "out.csv", "folder.csv: no PNG or JPEG files in the folder; for tables give a glob, such as "),
        ("header.csv", "out.csv", "header.csv: no rows; expected one image a row"),
        ("cifar.csv", "out.csv", "cifar.csv: data.shape: [28, 28, 1] are 784 values, a row has 12 pixels"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    source: str, output: str, problem: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(Path("t.csv"), sample_rows("test", 1))
    Path("cifar.csv").write_text("label," + ",".join(f"p{i}" for i in range(12)) + "\n" + ",".join("1" * 13) + "\n")
    Path("header.csv").write_text(",".join(f"p{i}" for i in range(784)) + "\n")
    Path("folder.csv").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(InputError) as caught:
        predict(run, source.format(folder=tmp_path), output)
    (line,) = caught.value.lines
    assert line.startswith(problem)
    assert "\n" not in line
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
