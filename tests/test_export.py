from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from fmtune.checkpoint import create_preprocess, save_model
from fmtune.classifier import TrainedModel
from fmtune.config import TrialConfig
from fmtune.data import Classes
from fmtune.errors import InputError, RunFailed, RunFolderError
from fmtune.export import export
from fmtune.model import Pixels, create_model
from fmtune.space import Space

GREY = Pixels(1, (0.286,), (0.353,))
COLOUR = Pixels(3, (0.1, 0.4, 0.7), (0.2, 0.3, 0.5))
SETTINGS: dict[str, tuple[Pixels, dict[str, Any]]] = {
    "grey": (GREY, {}),
    "grey repeated": (GREY, {"model": {"channels": 3}}),
    "colour": (COLOUR, {}),
    "resized": (Pixels(1, (0.286,), (0.353,), resize=16), {}),
    "not normalised": (COLOUR, {"normalize": False}),
    "bottlenecks, stacked head": (COLOUR, {"model": {"depth": 50, "head": "stack", "stem": "imagenet"}}),
}


def _create_model(setting: str = "grey") -> TrainedModel:
    """A tiny model for images of 10 x 14 pixels, its batch norms with the statistics of one batch of random images.

    The initial statistics are 0 and 1 everywhere, with which a wrong normalisation would go unseen.
    """
    torch.manual_seed(0)
    pixels, values = SETTINGS[setting]
    config = TrialConfig.model_validate(values | {"model": {"width": 4, **values.get("model", {})}})
    classes = Classes((3, 5, 9), ("shirt", "bag", "sandal"))
    network = create_model(config.model, pixels.channels, len(classes))
    model = TrainedModel(network, create_preprocess(config, pixels), classes, config, (pixels.channels, 10, 14), pixels)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network(model.preprocess(_random_images(64, model)))
    network.eval()
    return model


def _random_images(batch: int, model: TrainedModel) -> Tensor:
    draws = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, *model.shape), dtype=torch.uint8, generator=draws)


def _save_run(folder: Path, model: TrainedModel) -> Path:
    """A run folder with no more than export needs."""
    save_model(folder / "best", model)
    (folder / "space.yaml").write_text(Space.load({}).to_yaml(), encoding="utf-8")
    return folder


@torch.no_grad()
def _expected_logits(model: TrainedModel, images: Tensor) -> Tensor:
    """Logits in float64, by the definition of normalisation and not by `Preprocess`."""
    used = model.pixels if model.config.normalize else Pixels.unit(model.pixels.channels)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (used.mean, used.std))
    x = (images.double() / 255 - mean) / std
    if used.resize is not None:
        x = functional.resize(x, [used.resize], antialias=True)
    logits: Tensor = model.network.double()(x.repeat(1, 3 // x.shape[1] if model.config.model.channels else 1, 1, 1))
    model.network.float()
    assert logits.std() > 0.01
    return logits


def _open_onnx(path: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("setting", ["grey repeated", "bottlenecks, stacked head"])
def test_onnx_file_gives_the_models_logits_for_any_batch_size(tmp_path: Path, setting: str) -> None:
    pytest.importorskip("onnxscript")
    model = _create_model(setting)
    export(_save_run(tmp_path / "run", model), tmp_path / "model.onnx", "onnx")
    session = _open_onnx(tmp_path / "model.onnx")
    for batch in (1, 5):
        images = _random_images(batch, model)
        (logits,) = session.run(None, {"images": images.numpy()})
        assert logits.dtype == np.float32
        assert logits.shape == (batch, 3)
        assert torch.allclose(torch.from_numpy(logits).double(), _expected_logits(model, images), rtol=0, atol=1e-4)


def test_onnx_file_names_and_types_its_input_and_output(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    export(_save_run(tmp_path / "run", _create_model()), tmp_path / "model.onnx", "onnx")
    session = _open_onnx(tmp_path / "model.onnx")
    described = [(value.name, value.type, value.shape) for value in session.get_inputs() + session.get_outputs()]
    assert described == [
        ("images", "tensor(uint8)", ["batch", 1, 10, 14]),
        ("logits", "tensor(float)", ["batch", 3]),
    ]


@pytest.mark.parametrize("setting", SETTINGS)
def test_torch_program_gives_the_models_logits_for_any_batch_size(tmp_path: Path, setting: str) -> None:
    model = _create_model(setting)
    export(_save_run(tmp_path / "run", model), tmp_path / "model.pt2", "torch")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 5):
        images = _random_images(batch, model)
        logits = program(images)
        assert logits.dtype == torch.float32
        assert torch.allclose(logits.double(), _expected_logits(model, images), rtol=0, atol=1e-4)


def test_safetensors_file_holds_the_weights_under_their_own_names(tmp_path: Path) -> None:
    model = _create_model()
    export(_save_run(tmp_path / "run", model), tmp_path / "model.safetensors", "safetensors")
    weights, expected = load_file(tmp_path / "model.safetensors"), model.network.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    rebuilt = create_model(model.config.model, 1, 3)
    rebuilt.load_state_dict(weights, strict=True)
    for batch in (1, 5):
        images = _random_images(batch, model)
        logits = rebuilt.eval()(model.preprocess(images)).double()
        assert torch.allclose(logits, _expected_logits(model, images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_files_are_as_readable_as_the_users_other_files(tmp_path: Path, kind: Any) -> None:
    before = os.umask(0o022)
    try:
        written = export(
            _save_run(tmp_path / "run", _create_model()),
            tmp_path / {"torch": "model.pt2", "safetensors": "model.safetensors"}[kind],
            kind,
        )
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in written] == [0o644, 0o644]


def test_json_beside_a_torch_file_tells_what_its_user_must_know(tmp_path: Path) -> None:
    written = export(_save_run(tmp_path / "run", _create_model("colour")), tmp_path / "model.pt2", "torch")
    assert written == [tmp_path / "model.pt2", tmp_path / "model.pt2.json"]
    content = json.loads(written[1].read_text(encoding="utf-8"))
    assert content.pop("model")["channels"] == 3
    assert content == {
        "format": "torch",
        "labels": [3, 5, 9],
        "names": ["shirt", "bag", "sandal"],
        "shape": [3, 10, 14],
        "input": {"name": "images", "dtype": "uint8", "layout": "NCHW"},
        "output": {"name": "logits", "dtype": "float32", "layout": "NC"},
        "normalisation": {"mean": [0.1, 0.4, 0.7], "std": [0.2, 0.3, 0.5], "resize": None, "inside": True},
        "fmtune": version("fmtune"),
    }


def test_json_beside_weights_says_that_the_user_normalises_and_how_to_rebuild_the_network(tmp_path: Path) -> None:
    model = _create_model("grey repeated")
    export(_save_run(tmp_path / "run", model), tmp_path / "model.safetensors", "safetensors")
    content = json.loads((tmp_path / "model.safetensors.json").read_text(encoding="utf-8"))
    assert content["input"]["dtype"] == "float32"
    assert content["normalisation"] == {"mean": [0.286], "std": [0.353], "resize": None, "inside": False}
    assert content["shape"] == [1, 10, 14]
    assert content["model"] == model.config.model.model_dump(mode="json")


def test_json_of_a_model_that_only_divides_by_255_has_unit_statistics(tmp_path: Path) -> None:
    _, described = export(
        _save_run(tmp_path / "run", _create_model("not normalised")), tmp_path / "m.safetensors", "safetensors"
    )
    normalisation = json.loads(described.read_text(encoding="utf-8"))["normalisation"]
    assert (normalisation["mean"], normalisation["std"]) == ([0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize(("kind", "name"), [("onnx", "m.onnx"), ("torch", "m.pt2"), ("safetensors", "m.safetensors")])
def test_export_prints_nothing_and_leaves_two_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: Any, name: str
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    run, output = _save_run(tmp_path / "run", _create_model()), tmp_path / "out"
    output.mkdir()
    export(run, output / name, kind)
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in output.iterdir()) == [name, f"{name}.json"]


def test_run_is_found_by_its_name_under_runs(tmp_path: Path) -> None:
    _save_run(tmp_path / "runs" / "mine", _create_model())
    written = export("mine", str(tmp_path / "m.safetensors"), "safetensors", runs=tmp_path / "runs")
    assert written[0] == tmp_path / "m.safetensors"


def test_export_again_replaces_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_text("old")
    export(_save_run(tmp_path / "run", _create_model()), tmp_path / "m.safetensors", "safetensors")
    assert "conv1.weight" in load_file(tmp_path / "m.safetensors")


def test_logits_that_onnx_runtime_computes_otherwise_are_an_error_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class Inaccurate(runtime.InferenceSession):  # type: ignore[misc, name-defined]
        def run(self, *args: Any) -> list[NDArray[np.float32]]:
            return [logits + np.float32(0.01) for logits in super().run(*args)]

    run, output = _save_run(tmp_path / "run", _create_model()), tmp_path / "out"
    output.mkdir()
    monkeypatch.setattr(runtime, "InferenceSession", Inaccurate)
    with pytest.raises(RunFailed, match=r"^m\.onnx: not written: ONNX Runtime's logits differ from torch's by 0\.01"):
        export(run, output / "m.onnx", "onnx")
    assert list(output.iterdir()) == []


def test_onnx_without_onnx_runtime_is_written_unchecked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    written = export(_save_run(tmp_path / "run", _create_model()), tmp_path / "m.onnx", "onnx")
    assert written[0].stat().st_size > 0


def test_onnx_without_onnxscript_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _save_run(tmp_path / "run", _create_model())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError) as raised:
        export(run, tmp_path / "m.onnx", "onnx")
    assert raised.value.lines == ("onnx: needs the package onnxscript; pip install 'fmtune[onnx]'",)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("onnx", "m.pt", "m.pt: expected a name that ends in .onnx, for the format onnx"),
        ("torch", "m.pt", "m.pt: expected a name that ends in .pt2, for the format torch"),
        ("safetensors", "m", "m: expected a name that ends in .safetensors, for the format safetensors"),
        ("torch", "none/m.pt2", "none/m.pt2: no folder none; make it, or name one that exists"),
        ("torch", "folder.pt2", "folder.pt2: is a folder; expected a file's name"),
        ("tflite", "m.tflite", "tflite: no such format; expected onnx, torch, safetensors"),
    ],
)
def test_unfit_output_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.pt2").mkdir()
    run = _save_run(tmp_path / "run", _create_model())
    with pytest.raises(InputError) as raised:
        export(run, name, kind)
    assert raised.value.lines == (message,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pt2", "run"]


def test_run_that_is_missing_or_unfinished_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such run"):
        export("none", tmp_path / "m.pt2", "torch", runs=tmp_path)
    run = _save_run(tmp_path / "run", _create_model())
    (run / "best" / "model.safetensors").unlink()
    with pytest.raises(RunFolderError, match="expected a finished run"):
        export(run, tmp_path / "m.pt2", "torch")
