from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torch.hub
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from fmtune.checkpoint import create_preprocess, load_model, save_model
from fmtune.classifier import TrainedModel
from fmtune.config import ModelConfig, TrialConfig
from fmtune.data import Classes, load_training_data
from fmtune.errors import InputError
from fmtune.export import describe_export
from fmtune.model import Pixels, Preprocess, ResNet, create_model
from fmtune.pretrained import LoadReport, check_pretrained, imagenet_pixels, load_pretrained, read_weights
from fmtune.probe import read_all_weights
from fmtune.space import Space
from fmtune.trial import SharedData, create_task, create_training

RESNET18 = {"depth": 18, "width": 64, "stem": "imagenet"}
HEAD = ("fc.weight", "fc.bias")


def _random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _warm_up(network: nn.Module, channels: int) -> None:
    """Give batch norms the statistics of one random batch; 0 and 1 everywhere would hide one in another's place."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(_random_images(4, channels, 64, 64, seed=1))
    network.eval()


@pytest.fixture(scope="module")
def published() -> nn.Module:
    """torchvision's resnet18 with random weights."""
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.resnet18(weights=None)
    _warm_up(network, 3)
    return network


@pytest.fixture
def weights(published: nn.Module) -> dict[str, Tensor]:
    return dict(published.state_dict())


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a network."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def _create_config(pretrained: str | Path, **values: Any) -> ModelConfig:
    return ModelConfig.model_validate({**RESNET18, "pretrained": str(pretrained), **values})


def _load(
    config: ModelConfig, channels: int = 3, classes: int = 1000, cache: Path = Path("none")
) -> tuple[ResNet, LoadReport]:
    torch.manual_seed(7)
    network = create_model(config, channels, classes)
    report = load_pretrained(network, config, read_weights(config, cache))
    return network.eval(), report


def _save_pth(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def _save_run(folder: Path, channels: int, values: dict[str, Any], classes: int = 3) -> ResNet:
    """A run folder's `best`, and its network."""
    config = TrialConfig.model_validate({"model": {"width": 4, **values}})
    torch.manual_seed(3)
    network, pixels = create_model(config.model, channels, classes), Pixels.unit(channels)
    _warm_up(network, channels)
    labels = Classes(tuple(range(classes)), tuple(map(str, range(classes))))
    model = TrainedModel(network, create_preprocess(config, pixels), labels, config, (channels, 28, 28), pixels)
    save_model(folder / "best", model)
    return network


@pytest.mark.parametrize(
    ("name", "save"), [("w.pth", _save_pth), ("w.pt", _save_pth), ("w.safetensors", lambda path, w: save_file(w, path))]
)
@torch.no_grad()
def test_file_gives_the_sources_logits(
    tmp_path: Path, published: nn.Module, weights: dict[str, Tensor], name: str, save: Callable[..., object]
) -> None:
    save(tmp_path / name, weights)
    network, report = _load(_create_config(tmp_path / name))
    images = _random_images(2, 3, 64, 64)
    expected = published(images)
    assert expected.std() > 0.01
    assert torch.allclose(network(images), expected, rtol=0, atol=1e-5)
    assert report == LoadReport(str(tmp_path / name), tuple(network.state_dict()), (), ())
    assert report.describe() == f"{tmp_path / name}: 122 tensors loaded"


@torch.no_grad()
def test_one_channel_network_gives_for_grey_what_three_channels_give_for_grey_repeated(
    tmp_path: Path, published: nn.Module, weights: dict[str, Tensor]
) -> None:
    network, report = _load(_create_config(_save_pth(tmp_path / "w.pth", weights)), channels=1)
    grey = _random_images(2, 1, 64, 64)
    assert network.conv1.weight.shape == (64, 1, 7, 7)
    assert torch.allclose(network(grey), published(grey.repeat(1, 3, 1, 1)), rtol=0, atol=1e-4)
    assert "conv1.weight" in report.loaded


@torch.no_grad()
def test_three_channel_network_gives_for_grey_repeated_what_one_channel_gives_for_grey(tmp_path: Path) -> None:
    source = _save_run(tmp_path, 1, {"stem": "half"})
    network, _ = _load(ModelConfig(width=4, stem="half", pretrained=str(tmp_path)), channels=3, classes=3)
    grey = _random_images(2, 1, 28, 28)
    assert network.conv1.weight.shape == (4, 3, 3, 3)
    assert torch.allclose(network(grey.repeat(1, 3, 1, 1)), source(grey), rtol=0, atol=1e-5)


@torch.no_grad()
def test_head_for_other_classes_stays_new_and_the_features_are_the_sources(
    tmp_path: Path, published: nn.Module, weights: dict[str, Tensor]
) -> None:
    config = _create_config(_save_pth(tmp_path / "w.pth", weights))
    torch.manual_seed(7)
    fresh = create_model(config, 3, 10)
    network, report = _load(config, classes=10)
    assert torch.equal(network.fc.weight, fresh.fc.weight)
    assert torch.equal(network.fc.bias, fresh.fc.bias)
    images = _random_images(2, 3, 64, 64)
    network.fc, ours = nn.Identity(), network.fc  # type: ignore[assignment]
    features = network(images)
    # The source's own last layer upon these features gives the source's logits.
    logits = nn.functional.linear(features, weights["fc.weight"], weights["fc.bias"])
    assert torch.allclose(logits, published(images), rtol=0, atol=1e-5)
    assert ours.weight.shape == (10, 512)
    assert (report.left_out, report.made_new) == (HEAD, HEAD)
    assert report.describe() == (
        f"{tmp_path / 'w.pth'}: 120 tensors loaded; left out fc.weight, fc.bias; new fc.weight, fc.bias"
    )


def test_stacked_head_takes_the_published_layer_and_makes_the_second(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    network, report = _load(_create_config(_save_pth(tmp_path / "w.pth", weights), head="stack"), classes=10)
    assert torch.equal(network.fc.weight, weights["fc.weight"])
    assert (report.left_out, report.made_new) == ((), ("head.weight", "head.bias"))


def test_stacked_heads_second_layer_is_left_out_by_a_network_without(tmp_path: Path) -> None:
    _save_run(tmp_path, 1, {"head": "stack"}, classes=3)
    _, report = _load(ModelConfig(width=4, pretrained=str(tmp_path)), channels=1, classes=3)
    assert sorted(report.left_out) == ["fc.bias", "fc.weight", "head.bias", "head.weight"]
    assert report.made_new == HEAD


def test_head_is_taken_whole_or_not_at_all(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    del weights["fc.bias"]
    _, report = _load(_create_config(_save_pth(tmp_path / "w.pth", weights)))
    assert (report.left_out, report.made_new) == (("fc.weight",), HEAD)


def test_weights_without_a_head_or_batch_counters_load(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """Old published files have no `num_batches_tracked`."""
    kept = {k: v for k, v in weights.items() if k not in HEAD and not k.endswith(".num_batches_tracked")}
    network, report = _load(_create_config(_save_pth(tmp_path / "w.pth", kept)))
    assert torch.equal(network.state_dict()["layer4.1.bn2.running_var"], weights["layer4.1.bn2.running_var"])
    assert (report.left_out, report.made_new) == ((), HEAD)
    assert len(report.loaded) == 122 - 2 - 20


@torch.no_grad()
@pytest.mark.parametrize("folder", ["", "best"])
def test_earlier_run_gives_its_logits(tmp_path: Path, folder: str) -> None:
    source = _save_run(tmp_path, 1, {"stem": "small"})
    config = ModelConfig(width=4, stem="small", pretrained=str(tmp_path / folder), freeze=5)
    network, report = _load(config, channels=1, classes=3)
    images = _random_images(2, 1, 28, 28)
    assert torch.equal(network(images), source(images))
    assert report.made_new == ()
    assert not next(network.layer4.parameters()).requires_grad


@pytest.mark.parametrize("kind", ["run", "export"])
@pytest.mark.parametrize(
    ("labels", "names", "is_taken"),
    [((0, 1, 2), ("0", "1", "2"), True), ((5, 6, 7), ("5", "6", "7"), False), ((0, 1, 2), ("a", "b", "c"), False)],
)
def test_head_of_other_classes_stays_new_though_they_are_as_many(
    tmp_path: Path, kind: str, labels: tuple[int, ...], names: tuple[str, ...], is_taken: bool
) -> None:
    """Where it is known what the weights tell apart: a run's folder says so, and the file beside an export."""
    place = tmp_path
    source = _save_run(tmp_path, 1, {"stem": "small"})
    if kind == "export":
        place = tmp_path / "w.safetensors"
        save_file(source.state_dict(), place)
        described = describe_export(load_model(tmp_path / "best"), "safetensors")
        (tmp_path / "w.safetensors.json").write_text(json.dumps(described), encoding="utf-8")
    config = ModelConfig(width=4, stem="small", pretrained=str(place))
    torch.manual_seed(7)
    network = create_model(config, 1, 3)
    new = network.fc.weight.clone()
    report = load_pretrained(network, config, read_weights(config, tmp_path), Classes(labels, names))
    assert set(report.made_new) == set(report.left_out) == set(() if is_taken else HEAD)
    assert torch.equal(network.fc.weight, source.fc.weight if is_taken else new)
    assert torch.equal(network.conv1.weight, source.conv1.weight)


@torch.no_grad()
def test_cached_published_weights_are_used_without_a_network(
    tmp_path: Path, published: nn.Module, weights: dict[str, Tensor]
) -> None:
    _save_pth(tmp_path / "resnet18-f37072fd.pth", weights)
    network, report = _load(_create_config("imagenet"), cache=tmp_path)
    images = _random_images(2, 3, 64, 64)
    assert torch.allclose(network(images), published(images), rtol=0, atol=1e-5)
    assert report.source == "imagenet (resnet18-f37072fd.pth)"


def test_published_weights_are_fetched_once_and_checked_by_their_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, Tensor]
) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(url: str, path: str, hash_prefix: str | None, progress: bool) -> None:
        asked.append((url, hash_prefix))
        torch.save(weights, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        _load(_create_config("imagenet"), cache=tmp_path / "new")
    assert asked == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd")]


def test_without_network_and_cache_the_error_names_file_and_place(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        _load(_create_config("imagenet"), cache=tmp_path)
    assert raised.value.lines == (
        "trial.model.pretrained: can't fetch https://download.pytorch.org/models/resnet18-f37072fd.pth "
        f"(Name or service not known); download it elsewhere and put it at {tmp_path / 'resnet18-f37072fd.pth'}",
    )


def test_download_of_another_hash_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise RuntimeError('invalid hash value (expected "f37072fd", got "0")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(InputError, match=r"can't fetch https://.*pth \(invalid hash value .*put it at "):
        _load(_create_config("imagenet"), cache=tmp_path)


@pytest.mark.parametrize("damage", [lambda whole: b"<html>log in</html>", lambda whole: whole[: len(whole) // 2]])
def test_damaged_cached_file_is_an_error_that_says_to_delete_it(
    tmp_path: Path, weights: dict[str, Tensor], damage: Callable[[bytes], bytes]
) -> None:
    path = _save_pth(tmp_path / "resnet18-f37072fd.pth", weights)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError) as raised:
        _load(_create_config("imagenet"), cache=tmp_path)
    assert raised.value.lines == (f"{path}: damaged, or no file of tensors; delete it and try again",)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_published_depth_has_weights_to_fetch(tmp_path: Path, depth: int) -> None:
    """The network is not asked for: the download fails before."""
    config = _create_config("imagenet", depth=depth)
    check_pretrained(config)
    with pytest.raises(InputError, match=rf"can't fetch https://.*/resnet{depth}-[0-9a-f]{{8}}\.pth "):
        read_weights(config, tmp_path)


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"depth": 10}, ["trial.model.depth: 10, for which there are no published weights; expected 18 or more"]),
        ({"width": 16}, ["trial.model.width: 16, for which there are no published weights; expected 64"]),
        ({"stem": "half"}, ["trial.model.stem: half, for which there are no published weights; expected imagenet"]),
        (
            {"depth": 10, "stem": "small"},
            [
                "trial.model.depth: 10, for which there are no published weights; expected 18 or more",
                "trial.model.stem: small, for which there are no published weights; expected imagenet",
            ],
        ),
    ],
)
def test_networks_without_published_weights_are_refused_before_any_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], lines: list[str]
) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("asked for"))
    config = _create_config("imagenet", **values)
    expected = tuple(f"{line}, or trial.model.pretrained other than imagenet" for line in lines)
    for refuse in (lambda: check_pretrained(config), lambda: _load(config, cache=tmp_path)):
        with pytest.raises(InputError) as raised:
            refuse()
        assert raised.value.lines == expected


def test_what_can_be_loaded_passes_the_check(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    _save_run(tmp_path / "run", 1, {})
    for pretrained in ("imagenet", tmp_path / "run", _save_pth(tmp_path / "w.pth", weights)):
        check_pretrained(_create_config(pretrained))
    check_pretrained(ModelConfig())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "none.pth",
            "no file or folder none.pth; expected imagenet, a .safetensors, .pth or .pt file, or a run's folder",
        ),
        ("Imagenet", "no file or folder Imagenet; expected imagenet, a "),
        ("w.onnx", "w.onnx is of no known format; expected imagenet, a .safetensors, .pth or .pt file, "),
        ("folder", "folder has no best/model.safetensors; expected a finished run"),
    ],
)
def test_missing_files_and_runs_fail_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "best").mkdir(parents=True)
    (tmp_path / "w.onnx").touch()
    with pytest.raises(InputError) as raised:
        check_pretrained(_create_config(name))
    (line,) = raised.value.lines
    assert line.startswith(f"trial.model.pretrained: {message}")


@pytest.mark.parametrize(
    ("values", "problem", "advice"),
    [
        (
            {"width": 16},
            "conv1.weight is (64, 3, 7, 7), the network's (16, 3, 7, 7)",
            "trial.model.width: 64",
        ),
        (
            {"stem": "small"},
            "conv1.weight is (64, 3, 7, 7), the network's (64, 3, 3, 3)",
            "trial.model.stem: imagenet",
        ),
        (
            {"depth": 34},
            "no layer1.2.conv1.weight, which the network has as (64, 64, 3, 3)",
            "trial.model.depth: 18",
        ),
        (
            {"depth": 10},
            "layer1.1.conv1.weight, (64, 64, 3, 3), is nothing that the network has",
            "trial.model.depth: 18",
        ),
        (
            {"depth": 50},
            "layer1.0.conv1.weight is (64, 64, 3, 3), the network's (64, 64, 1, 1)",
            "trial.model.depth: 18",
        ),
        (
            {"depth": 10, "width": 16, "stem": "half"},
            "conv1.weight is (64, 3, 7, 7), the network's (16, 3, 3, 3)",
            "trial.model.depth: 18, trial.model.width: 64, trial.model.stem: imagenet",
        ),
    ],
)
def test_weights_of_another_network_are_refused_with_the_settings_that_fit(
    tmp_path: Path, weights: dict[str, Tensor], values: dict[str, Any], problem: str, advice: str
) -> None:
    path = _save_pth(tmp_path / "w.pth", weights)
    with pytest.raises(InputError) as raised:
        _load(_create_config(path, **values))
    assert raised.value.lines == (f"{path}: {problem}; expected {advice}",)


def test_weights_of_another_width_are_refused_by_a_network_of_one_channel(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    """The message has the file's shape and not the one summed over channels."""
    path = _save_pth(tmp_path / "w.pth", weights)
    with pytest.raises(InputError, match=re.escape("is (64, 3, 7, 7), the network's (16, 1, 7, 7)")):
        _load(_create_config(path, width=16), channels=1)


def test_small_stem_of_a_run_is_advised_to_a_network_with_the_published_one(tmp_path: Path) -> None:
    _save_run(tmp_path, 1, {"stem": "half"})
    with pytest.raises(InputError, match=r"expected trial\.model\.stem: small or half$"):
        _load(ModelConfig(width=4, stem="imagenet", pretrained=str(tmp_path)), channels=1, classes=3)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"aux.weight": torch.zeros(2, 3)}, "aux.weight, (2, 3), is nothing that the network has"),
        ({"conv1.weight": torch.zeros(64, 4, 7, 7)}, "conv1.weight is (64, 4, 7, 7), the network's (64, 3, 7, 7)"),
    ],
)
def test_networks_that_no_setting_gives_are_refused(
    tmp_path: Path, weights: dict[str, Tensor], change: dict[str, Tensor], problem: str
) -> None:
    path = _save_pth(tmp_path / "w.pth", weights | change)
    with pytest.raises(InputError) as raised:
        _load(_create_config(path))
    (line,) = raised.value.lines
    assert line.startswith(f"{path}: {problem}; expected weights of a plain ResNet for 1 or 3 channels")


def test_refused_weights_leave_the_network_as_it_was(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    config = _create_config(_save_pth(tmp_path / "w.pth", weights), depth=10)
    network = create_model(config, 3, 10)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(InputError):
        load_pretrained(network, config, read_weights(config, tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class _Bomb:
    """Its unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    path, mark = tmp_path / "w.pth", tmp_path / "ran"
    torch.save({"conv1.weight": _Bomb(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        InputError, match=r"w\.pth: damaged, or holds more than tensors, which fmtune does not unpickle"
    ):
        _load(_create_config(path))
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Bomb(mark)))
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "state_dict": {}}, "holds a dict with the keys epoch, state_dict; expected a state dict"),
        (torch.zeros(3), "holds a Tensor; expected a state dict: tensors by name"),
    ],
)
def test_file_of_something_else_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = _save_pth(tmp_path / "w.pth", content)
    with pytest.raises(InputError) as raised:
        _load(_create_config(path))
    (line,) = raised.value.lines
    assert line.startswith(f"{path}: {message}")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_file_cut_short_is_refused_in_one_line(tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "w.pth"
    torch.save(create_model(ModelConfig(width=1), 1, 2).state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"w\.pth: (damaged|can't be read)[^\n]*; (copy|expected)[^\n]*$") as raised:
        _load(_create_config(path))
    assert len(raised.value.lines) == 1


def test_safetensors_file_cut_short_is_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "w.safetensors"
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"w\.safetensors: not a whole safetensors file \(.*\); copy or download"):
        _load(_create_config(path))


def test_trials_start_from_weights_that_the_driver_has_read(ray_cluster: None, tmp_path: Path) -> None:
    """On other machines there is no such file."""
    source = _save_run(tmp_path / "run", 1, {"stem": "small"}, classes=10)
    model = {"width": 4, "stem": "small", "pretrained": str(tmp_path / "run")}
    space = Space.load({"data": {"train": "sample"}, "trial": {"model": model}})
    data = load_training_data(space.data)
    weights, lines = read_all_weights(space, data)
    (line,) = lines
    assert line.endswith("left out fc.bias, fc.weight; new fc.weight, fc.bias")
    shutil.rmtree(tmp_path / "run")
    shared = SharedData.of(data, weights)
    training = create_training(create_task(0, 1, space.trial_config({})), shared, torch.device("cpu"), 0, 1, None)
    own = training.state.network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in source.state_dict().items() if name not in HEAD)


@pytest.mark.parametrize("normalize", [False, True])
def test_weights_of_a_run_that_normalised_otherwise_are_told(tmp_path: Path, normalize: bool) -> None:
    _save_run(tmp_path / "run", 1, {"stem": "small"}, classes=10)
    model = {"width": 4, "stem": "small", "pretrained": str(tmp_path / "run")}
    space = Space.load({"data": {"train": "sample"}, "trial": {"model": model, "normalize": normalize}})
    _, lines = read_all_weights(space, load_training_data(space.data))
    told = [line for line in lines if line.endswith("its images were normalised; set trial.normalize to true here too")]
    assert len(told) == (not normalize)


def test_loading_without_pretrained_is_a_programmers_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to load"):
        read_weights(ModelConfig(), tmp_path)


def test_published_weights_get_their_own_normalisation() -> None:
    """At the size that is asked for; without normalising, pixels stay as they are."""
    pixels = Pixels(1, (0.2,), (0.3,), resize=64)
    config = TrialConfig(model=ModelConfig(channels=3, pretrained="imagenet"))
    assert create_preprocess(config, pixels).pixels == replace(imagenet_pixels(3), resize=64)
    plain = config.model_copy(update={"normalize": False})
    assert create_preprocess(plain, pixels).pixels == Pixels.unit(1, 64)


def test_imagenet_pixels_normalise_as_torchvision_does() -> None:
    """Second implementation: the transform that comes with the published weights."""
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms(crop_size=8, resize_size=8)
    assert torch.allclose(Preprocess(imagenet_pixels(3), 3)(images), transform(images), rtol=0, atol=1e-5)
