"""A run's best model in a file for use elsewhere: ONNX, a `torch.export` program, or plain weights."""

from __future__ import annotations

import importlib
import importlib.metadata
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Generator, Tensor

from fmtune.checkpoint import write_json
from fmtune.classifier import TrainedModel
from fmtune.errors import InputError, RunFailed
from fmtune.extras import import_extra
from fmtune.files import check_writable
from fmtune.predict import load

Kind = Literal["onnx", "torch", "safetensors"]
ENDINGS: dict[Kind, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
"""What a file of each kind must be called."""
_TOLERANCE = 1e-4
"""Largest difference between ONNX Runtime's logits and torch's, in units of the largest logit or 1."""
_EXAMPLE_IMAGES = 2
"""Batch size to trace with: torch.export takes a size of 0 or 1 for a constant."""
_ANY_BATCH = {"images": {0: torch.export.Dim("batch")}}


def export(run: str | PathLike[str], output: str | Path, kind: Kind, *, runs: str | Path = "runs") -> list[Path]:
    """Write a run's best model to `output`, and beside it `OUTPUT.json` with what its user must know.

    `onnx` and `torch` files take `images`, uint8 (N, C, H, W) of any N, and give `logits`, float32 (N, classes); they
    normalise by themselves. A `safetensors` file holds the network's weights under their published names, and its user
    normalises. An ONNX file is checked against torch's logits where ONNX Runtime is installed.

    Returns:
        The files written.

    Raises:
        InputError: the run, the kind or the output is not as it must be, or `onnx` lacks a package.
        RunFailed: ONNX Runtime's logits are not torch's; nothing is written.
    """
    output = Path(output)
    _check_output(output, kind)
    if kind == "onnx":
        import_extra("onnx", "onnxscript", "onnxscript", "onnx")
    model = load(run, runs=runs)
    # Written aside, so that a file of the name asked for is always whole, and checked.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".fmtune-") as aside:
        path = Path(aside) / output.name
        match kind:
            case "onnx":
                _write_onnx(model, path)
            case "torch":
                _write_program(model, path)
            case "safetensors":
                # `save_file` makes a file that only its owner can read, and this one is for others.
                path.write_bytes(save(model.network.state_dict()))
        write_json(path.with_name(path.name + ".json"), describe_export(model, kind))
        return [written.replace(output.parent / written.name) for written in sorted(Path(aside).iterdir())]


def describe_export(model: TrainedModel, kind: Kind) -> dict[str, Any]:
    """What the user of an exported file must know, as JSON values.

    `shape` is (channels, height, width) of an image. `normalisation` is of pixels scaled to 0..1, with a mean and a
    standard deviation for each of these channels, or where ImageNet's weights see a grey image three times for each of
    those; then pixels are brought to `resize` on the shorter side unless it is null. `inside` says whether the file
    does both. `model` has all that rebuilds the network.
    """
    inside = kind != "safetensors"
    pixels = model.preprocess.pixels
    normalisation = {"mean": list(pixels.mean), "std": list(pixels.std), "resize": pixels.resize, "inside": inside}
    return {
        "format": kind,
        "labels": list(model.classes.labels),
        "names": list(model.classes.names),
        "shape": list(model.shape),
        "input": {"name": "images", "dtype": "uint8" if inside else "float32", "layout": "NCHW"},
        "output": {"name": "logits", "dtype": "float32", "layout": "NC"},
        "normalisation": normalisation,
        "model": model.config.model.model_dump(mode="json") | {"channels": model.preprocess.channels},
        "fmtune": importlib.metadata.version("fmtune"),
    }


def _check_output(output: Path, kind: Kind) -> None:
    if kind not in ENDINGS:
        raise InputError(f"{kind}: no such format; expected {', '.join(ENDINGS)}")
    if output.suffix != ENDINGS[kind]:
        raise InputError(f"{output}: expected a name that ends in {ENDINGS[kind]}, for the format {kind}")
    check_writable(output)


def _create_example(shape: tuple[int, int, int]) -> tuple[Tensor]:
    """Arguments to trace with; what is traced depends on their shapes alone."""
    return (torch.zeros(_EXAMPLE_IMAGES, *shape, dtype=torch.uint8),)


def _write_program(model: TrainedModel, path: Path) -> None:
    torch.export.save(torch.export.export(model, _create_example(model.shape), dynamic_shapes=_ANY_BATCH), path)


def _write_onnx(model: TrainedModel, path: Path) -> None:
    """Write and check an ONNX file; one over 2 GB gets its weights beside it, as protobuf has no room for them."""
    torch.onnx.export(
        model,
        _create_example(model.shape),
        path,
        dynamo=True,
        dynamic_shapes=_ANY_BATCH,
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    _verify_onnx(model, path)


@torch.no_grad()
def _verify_onnx(model: TrainedModel, path: Path) -> None:
    """Compare ONNX Runtime's logits with torch's on random images, at batch sizes other than the traced one.

    Raises:
        RunFailed: they differ.
    """
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        return
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    draws = Generator().manual_seed(0)
    for batch in (1, 5):
        images = torch.randint(0, 256, (batch, *model.shape), dtype=torch.uint8, generator=draws)
        expected = model(images)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        difference = float((torch.from_numpy(logits) - expected).abs().max())
        # Written so that a NaN, which compares as false, does not pass.
        if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise RunFailed(
                f"{path.name}: not written: ONNX Runtime's logits differ from torch's by {difference:.2g}; "
                f"try other versions of torch, onnxscript and onnxruntime, or the format torch"
            )
