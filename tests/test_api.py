"""The Python API: data in memory, what a search returns, and the model that it keeps."""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from numpy.typing import NDArray
from PIL import Image
from tables import sample_rows, write_csv

import fmtune
from fmtune.checkpoint import create_preprocess
from fmtune.classifier import TrainedModel
from fmtune.config import DataConfig, TrialConfig
from fmtune.data import Classes, load_split
from fmtune.errors import DataError, InputError, RunFolderError
from fmtune.memory import place_sources, table_of_memory
from fmtune.model import Pixels, create_model
from fmtune.readers import Layout, Table
from fmtune.result import RunResult
from fmtune.session import quiet

TINY: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 64,
    "model": {"depth": 10, "width": 4, "stem": "imagenet"},
    "optim": {"name": "adamw", "lr": 0.01},
}
SPACE: dict[str, Any] = {
    "data": {"validation": 0.2},
    "search": {"trials": 2, "scheduler": "none", "finalists": 0, "refit": False},
    "resources": {"cpus": 2},
    "baseline": TINY,
    "trial": TINY | {"optim": {"name": {"choice": ["adamw", "sgd"]}, "lr": {"log": [0.001, 0.1]}}},
}
NAMES = np.array(["top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"])


def _frame(table: Table) -> pd.DataFrame:
    pixels = table.images.reshape(len(table), -1)
    frame = pd.DataFrame(pixels, columns=[f"pixel{i + 1}" for i in range(pixels.shape[1])])
    frame.insert(0, "label", table.labels)
    return frame


def _colours() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Random images (6, 5, 4, 3) that are square in no pair of axes."""
    return np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8), np.arange(6) % 2


def test_the_public_names_are_the_contracts() -> None:
    names = ["FmtuneError", "Space", "TrialConfig", "evaluate", "export", "load", "predict", "search", "train"]
    assert sorted(fmtune.__all__) == names
    assert all(callable(getattr(fmtune, name)) for name in names)


# Data in memory


def test_a_frame_is_read_as_the_csv_that_it_makes(tmp_path: Path) -> None:
    """The file's reader as second implementation, of pandas' own integers too, with the label in another column."""
    table = sample_rows("train", 2)
    expected = load_split(DataConfig(train=str(write_csv(tmp_path / "t.csv", table))), "train").table
    frame = _frame(table)
    moved = frame.astype("int64")[[*frame.columns[1:], "label"]]
    nullable = frame.convert_dtypes()
    for given, label in ((frame, "label"), (moved, "label"), (moved, -1), (nullable, "label")):
        read = table_of_memory(given, Layout(label), "data")
        assert np.array_equal(read.images, expected.images)
        assert np.array_equal(read.labels, expected.labels)


def test_grey_arrays_mean_the_same_in_every_layout() -> None:
    table = sample_rows("train", 2)
    grey = table.images[:, 0]
    for images in (grey, grey[..., None], grey[:, None]):
        read = table_of_memory((images, table.labels), Layout(), "data")
        assert np.array_equal(read.images, table.images)
        assert read.images.flags.c_contiguous


def test_colour_arrays_mean_the_same_with_channels_last_and_first() -> None:
    images, labels = _colours()
    last, first = (table_of_memory((x, labels), Layout(), "x") for x in (images, images.transpose(0, 3, 1, 2)))
    assert last.images.shape == (6, 3, 5, 4)
    assert np.array_equal(last.images, first.images)
    assert last.images[2, 1, 4, 3] == images[2, 4, 3, 1]


def test_the_shape_settles_what_the_sizes_leave_open() -> None:
    """Of (2, 3, 5, 3) either 3 may be the channels, of (2, 4, 5, 6) none is 1 or 3."""
    for sizes, shape, expected in (
        ((2, 3, 5, 3), (3, 5, 3), (2, 3, 3, 5)),
        ((2, 3, 5, 3), (5, 3, 3), (2, 3, 5, 3)),
        ((2, 4, 5, 6), (5, 6, 4), (2, 4, 5, 6)),
    ):
        images, labels = np.zeros(sizes, np.uint8), np.arange(2)
        with pytest.raises(DataError, match=r"set data\.shape to \[height, width, channels\]"):
            table_of_memory((images, labels), Layout(), "data")
        assert table_of_memory((images, labels), Layout(shape=shape), "data").images.shape == expected


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([1, 2], "data: a list; expected a name or path, a pandas DataFrame, or a pair (images, labels)"),
        ((np.zeros((2, 4, 4)), [0, 1]), "data: images of float64 and shape (2, 4, 4); expected uint8, 0 to 255, of"),
        (
            (np.zeros((2, 16), np.uint8), [0, 1]),
            "data: images of uint8 and shape (2, 16); expected uint8, 0 to 255, of",
        ),
        ((np.zeros((0, 4, 4), np.uint8), []), "data: images of uint8 and shape (0, 4, 4); expected"),
        ((np.zeros((2, 4, 4), np.uint8), [0]), "data: labels of shape (1,); expected (2,), one for each image"),
        ((np.zeros((2, 4, 4), np.uint8), [0.5, 1]), "data: row 0: label 0.5; expected integers, or strings throughout"),
        ((np.zeros((2, 4, 4), np.uint8), np.array(["a", None])), "data: row 1: label None; expected integers, or"),
        ((np.zeros((2, 4, 4), np.uint8), ["a", ""]), "data: row 1: an empty label; leave the row out, or name its"),
        (pd.DataFrame({"label": [0, 1], "a": [0, 300]}), "data: column a: "),
        (pd.DataFrame({"label": [0, 1], "a": [0.5, 1]}), "data: column a: "),
        (pd.DataFrame({"label": [0, 1], "a": [0, None]}), "data: column a: 1 values are missing"),
        (pd.DataFrame({"label": [0], "a": [0], "b": [0]}), "data: 2 pixels a row are no square; set data.shape"),
        (pd.DataFrame({"class": [0], "a": [0]}), "data: data.label: no column `label`; the first columns are class, a"),
        (pd.DataFrame([[0, 1]], columns=["label", "label"]), "data: two columns are called label; expected names"),
        (pd.DataFrame({"label": [0, 1], "a": [0, "x"]}), "data: "),
        (pd.DataFrame({"label": [], "a": []}), "data: no rows; expected one image a row"),
    ],
)
def test_a_mistake_in_memory_is_one_line(data: object, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        table_of_memory(data, Layout(), "data")
    (line,) = caught.value.lines
    assert line.startswith(problem)
    assert "\n" not in line


def test_a_test_split_numbered_by_somebody_else_is_refused() -> None:
    """Names are numbered in their order, which need not be that of the numbers that the test split has."""
    images = np.zeros((2, 4, 4), np.uint8)
    with pytest.raises(DataError, match=r"test: integer labels; the training rows have cat, dog"):
        place_sources(DataConfig(train="sample"), (images, ["dog", "cat"]), (images, [0, 1]))


def test_arrays_of_another_shape_than_the_spaces_are_refused() -> None:
    images = np.zeros((2, 4, 4), np.uint8), np.arange(2)
    with pytest.raises(
        DataError, match=r"images of shape \(2, 4, 4\); expected .* of height, width, channels \(5, 5, 1\)"
    ):
        table_of_memory(images, Layout(shape=(5, 5, 1)), "data")


def test_strings_are_numbered_in_their_order_and_alike_in_the_test_split() -> None:
    """The test split lacks the first class: numbered by itself it would call each class by its neighbour's number."""
    images = np.zeros((4, 3, 3), np.uint8)
    config = place_sources(
        DataConfig(), (images, ["cat", "ape", "dog", "cat"]), (images[:2], np.array(["dog", "cat"], object))
    )
    train = load_split(config, "train").table
    assert (train.labels.tolist(), train.names) == ([1, 0, 2, 1], {0: "ape", 1: "cat", 2: "dog"})
    assert Classes.of_table(train).names == ("ape", "cat", "dog")
    assert config.test is not None
    assert load_split(DataConfig(train=config.test), "test").table.labels.tolist() == [2, 1]


def test_a_string_that_the_training_rows_have_not_is_told() -> None:
    images = np.zeros((2, 3, 3), np.uint8)
    with pytest.raises(DataError, match=r"^test: row 1: label cow; the training rows have cat, dog$"):
        place_sources(DataConfig(), (images, ["cat", "dog"]), (images, ["cat", "cow"]))
    with pytest.raises(DataError, match=r"^test: row 0: label cat; the training rows have no strings$"):
        place_sources(DataConfig(), (images, [0, 1]), (images, ["cat", "cow"]))


def test_what_is_in_memory_goes_by_its_content() -> None:
    """The same for a frame and for arrays of the same rows; another for one pixel, label or name changed."""
    table = sample_rows("train", 1)
    pixels, names = table.images[:, 0], NAMES[table.labels]
    changed = pixels.copy()
    changed[3, 4, 5] ^= 1
    same = [place_sources(DataConfig(), data, None).train for data in (_frame(table), (pixels, table.labels))]
    others = [
        place_sources(DataConfig(), data, None).train
        for data in ((changed, table.labels), (pixels, table.labels[::-1]), (pixels, names), (pixels, np.sort(names)))
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 5


def test_a_kept_table_that_is_gone_is_told() -> None:
    with pytest.raises(
        DataError, match=r"^memory:0a: given in memory once, and not in the cache .* give the same data"
    ):
        load_split(DataConfig(train="memory:0a"), "train")


# What a search returns


@pytest.fixture(scope="module")
def result(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Of arrays with strings for labels, into a folder whose name is markup."""
    train, test = sample_rows("train", 20), sample_rows("test", 10)
    return fmtune.search(
        SPACE,
        data=(train.images[:, 0], NAMES[train.labels]),
        test=(test.images, list(NAMES[test.labels])),
        name="<i>two",
        runs=tmp_path_factory.mktemp("runs"),
    )


def test_a_search_in_memory_measures_on_the_test_split_in_memory(result: RunResult) -> None:
    assert result.summary["dataset"]["train"] == 160
    assert result.summary["dataset"]["test"] == 100
    assert result.best.classes.names == tuple(sorted(NAMES))


def test_evaluate_takes_memory_and_names_of_classes(result: RunResult) -> None:
    test = sample_rows("test", 10)
    measured = fmtune.evaluate(result.folder, (test.images, NAMES[test.labels]))
    assert measured.evaluation.accuracy == result.summary["test_accuracy"]
    assert measured.evaluation.loss == pytest.approx(result.summary["test_loss"])


def test_a_frame_trains_as_its_file_does(ray_cluster: None, tmp_path: Path) -> None:
    """To the same weights, bit for bit; and without a test split neither has one."""
    table = sample_rows("train", 10)
    space = {"data": {"validation": 0.2}, "resources": {"cpus": 1}, "trial": TINY}
    file = write_csv(tmp_path / "t.csv", table)
    runs = [
        fmtune.train(space, data=data, name=name, runs=tmp_path) for name, data in (("a", _frame(table)), ("b", file))
    ]
    weights = [(run.folder.best / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    assert [run.summary["test_accuracy"] for run in runs] == [None, None]


def test_the_same_data_resume_a_search_and_others_are_refused(ray_cluster: None, tmp_path: Path) -> None:
    frame = _frame(sample_rows("train", 10))
    space = SPACE | {"search": SPACE["search"] | {"trials": 1}}
    first = fmtune.search(space, data=frame, name="r", runs=tmp_path)
    before = first.folder.history.read_text()
    again = fmtune.search(SPACE, data=frame.copy(), name="r", runs=tmp_path, resume=True)
    assert again.folder.history.read_text().startswith(before)
    assert again.summary["trials"]["complete"] == 2
    frame.loc[0, "pixel1"] = 77
    with pytest.raises(RunFolderError, match=r"--resume with another `data`"):
        fmtune.search(SPACE, data=frame, name="r", runs=tmp_path, resume=True)


def test_trials_are_a_frame_of_what_was_measured(result: RunResult) -> None:
    trials = result.trials
    assert list(trials.columns) == [
        *("number", "state", "epoch", "val_accuracy", "val_loss", "seconds"),
        *("params.optim.name", "params.optim.lr"),
    ]
    assert trials["number"].tolist() == [0, 1]
    assert trials["state"].tolist() == ["complete", "complete"]
    history = result.folder.read_history()
    assert trials["val_accuracy"].tolist() == [history[number][-1].val_accuracy for number in (0, 1)]
    best = trials.set_index("number").loc[result.summary["best_trial"]]
    assert best["params.optim.lr"] == result.summary["params"]["optim.lr"]
    assert trials["val_accuracy"].max() == best["val_accuracy"]


def test_best_is_the_model_that_load_gives(result: RunResult) -> None:
    loaded = fmtune.load(result.folder.path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in result.best.state_dict().items())


def test_the_predictions_are_those_that_were_measured(result: RunResult) -> None:
    test = sample_rows("test", 10)
    predictions = result.best.predict(test.images)
    assert (predictions.names == NAMES[test.labels]).mean() == result.summary["test_accuracy"]
    assert (np.array(sorted(NAMES))[predictions.labels] == predictions.names).all()


def test_report_writes_the_page_again(result: RunResult) -> None:
    result.folder.report.unlink()
    path = result.report()
    assert path == result.folder.report
    assert path.read_text().startswith("<!doctype html>")


def test_a_notebook_shows_a_table_in_which_all_is_escaped(result: RunResult) -> None:
    shown = result._repr_html_()
    assert "&lt;i&gt;two" in shown and "<i>" not in shown
    cells = dict(re.findall(r"<th[^>]*>(\w+)</th><td[^>]*>(.*?)</td>", shown))
    assert list(cells) == ["found", "validation", "test", "baseline", "trials", "refit", "run", "report"]
    assert cells["test"].startswith(f"{100 * result.summary['test_accuracy']:.2f}%")


def test_a_result_prints_as_a_few_lines(result: RunResult) -> None:
    lines = repr(result).splitlines()
    assert [line.split()[0] for line in lines] == ["found", "validation", "test", "baseline", "trials", "refit", "run"]
    assert lines[-1].endswith("<i>two")
    assert repr(result.folder) == f"RunFolder({str(result.folder.path)!r})"


def test_a_ray_that_runs_already_is_used_and_left_running(
    ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = ray.get_runtime_context().gcs_address
    space = {"data": {"validation": 0.2}, "resources": {"cpus": 1}, "trial": TINY}
    fmtune.train(space, data=_frame(sample_rows("train", 5)), name="x", runs=tmp_path)
    assert ray.is_initialized()
    assert ray.get_runtime_context().gcs_address == before
    assert "this process has a Ray already, which is used and left running" in capfd.readouterr().out


def test_a_notebooks_own_stdout_gets_the_lines_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What else prints, to the file descriptor too, goes to the file, and nothing to the real screen."""
    with redirect_stdout(io.StringIO()) as shown:
        with quiet() as screen:
            screen.log_to(tmp_path / "log")
            screen.console.print("trial 0")
            print("chatter")
            os.write(1, b"noise\n")
        print("afterwards")
    assert shown.getvalue() == "trial 0\nafterwards\n"
    assert set((tmp_path / "log").read_text().split()) == {"chatter", "noise"}
    assert capfd.readouterr() == ("", "")


# The model that was kept


def _create_model(channels: int) -> TrainedModel:
    """Of images 6 x 4, for the labels 3, 5 and 9, its batch norms with the statistics of random images."""
    torch.manual_seed(0)
    config = TrialConfig.model_validate({"model": {"width": 4}})
    pixels = Pixels(channels, (0.3,) * channels, (0.4,) * channels)
    network, preprocess = create_model(config.model, channels, 3), create_preprocess(config, pixels)
    images = preprocess(torch.randint(0, 256, (32, channels, 6, 4), dtype=torch.uint8))
    network(images)
    with torch.no_grad():
        # Untrained, it would take all for one class.
        network.fc.bias -= network.eval()(images).mean(0)
    classes = Classes((3, 5, 9), ("shirt", "bag", "sandal"))
    return TrainedModel(network, preprocess, classes, config, (channels, 6, 4), pixels).eval()


def _images(channels: int, count: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, channels, 6, 4), dtype=np.uint8)


def test_the_model_is_a_torch_module_from_uint8_to_logits() -> None:
    """Their softmax are the probabilities that `predict` gives, and the labels their largest."""
    model, images = _create_model(3), _images(3, 20)
    with torch.no_grad():
        logits = model(torch.from_numpy(images))
    assert logits.shape == (20, 3) and logits.dtype == torch.float32
    predictions = model.predict(images)
    assert np.allclose(predictions.probabilities, logits.softmax(1).numpy(), atol=1e-6)
    assert predictions.labels.tolist() == [(3, 5, 9)[i] for i in logits.argmax(1)]
    assert predictions.names.tolist() == [("shirt", "bag", "sandal")[i] for i in logits.argmax(1)]
    assert len(set(predictions.labels)) > 1


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_every_layout_are_predicted_alike(channels: int) -> None:
    model, images = _create_model(channels), _images(channels)
    expected = model.predict(images).probabilities
    last = images.transpose(0, 2, 3, 1)
    for batch in (last, last[:, :, ::-1][:, :, ::-1], *([images[:, 0]] if channels == 1 else [])):
        assert np.allclose(model.predict(batch).probabilities, expected, atol=1e-6)
    for one in (images[1], last[1], *([images[1, 0]] if channels == 1 else [])):
        assert np.allclose(model.predict(one).probabilities, expected[1:2], atol=1e-5)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pictures_are_brought_to_the_models_channels_and_size(channels: int, mode: str) -> None:
    """A picture of the right form is predicted as its array; others as what Pillow makes of them."""
    model = _create_model(channels)
    array = _images(channels, 1)[0].transpose(1, 2, 0)
    fitting = Image.fromarray(array[:, :, 0] if channels == 1 else array)
    assert np.allclose(model.predict(fitting).probabilities, model.predict(array).probabilities, atol=1e-6)
    large = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 30, 4), dtype=np.uint8), "RGBA")
    brought = np.asarray(large.convert(mode).resize((4, 6), Image.Resampling.BILINEAR))
    both = model.predict([fitting, large])
    assert both.labels.shape == (2,)
    assert np.allclose(both.probabilities[1:], model.predict(brought).probabilities, atol=1e-5)


def test_pictures_are_read_as_the_files_of_them_are(tmp_path: Path) -> None:
    """Turned upright as the camera was held, and of 16 bits the upper 8: as `fmtune predict` has them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = _images(1, 1)[0, 0]
    Image.fromarray(np.rot90(grey)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    model = _create_model(1)
    expected = model.predict(grey).probabilities
    for name in ("turned.png", "deep.png"):
        with Image.open(tmp_path / name) as picture:
            assert np.allclose(model.predict(picture).probabilities, expected, atol=1e-6), name


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        ([], "images: a list; expected a numpy array of uint8, a picture of Pillow's or a list of them"),
        (torch.zeros(1, 3, 6, 4), "images: a Tensor; expected"),
        (np.zeros((1, 3, 6, 4)), "images: of float64; expected uint8, 0 to 255"),
        (np.zeros((2, 6, 4), np.uint8), "images: of shape (2, 6, 4); expected (N, 6, 4, 3), (N, 3, 6, 4), or one such"),
        (np.zeros((2, 28, 28, 3), np.uint8), "images: of shape (2, 28, 28, 3); expected (N, 6, 4, 3)"),
    ],
)
def test_images_that_the_model_can_not_take_are_told(images: Any, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        _create_model(3).predict(images)
    assert str(caught.value).startswith(problem)
