from __future__ import annotations

import copy
import io
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from fmtune import training
from fmtune.augment import batch_cutmix, batch_mixup
from fmtune.batches import Batches
from fmtune.config import AugmentConfig, ModelConfig, OptimConfig, TrialConfig
from fmtune.errors import NonFiniteLoss
from fmtune.model import Pixels, Preprocess, create_model
from fmtune.optim import Optimization
from fmtune.training import EpochMetrics, TrainingState, _training_loss, evaluate, fit, select_precision, should_compile

PLAIN = AugmentConfig(flip=False, translate=0)
TINY = ModelConfig(width=4, stem="small")
PREPROCESS = Preprocess(Pixels(1, (0.5,), (0.25,)), 1)


class _Stop(Exception):
    """Raised by a report to end a training early, as a scheduler of trials does."""


def _dark_and_bright(n: int, seed: int = 0) -> Batches:
    """Images of 8 x 8 pixels, of 0..99 where the label is 0 and of 156..255 where it is 1."""
    labels = torch.arange(n) % 2
    noise = torch.randint(0, 100, (n, 1, 8, 8), generator=Generator().manual_seed(seed))
    return Batches((noise + 156 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, torch.arange(n))


def _noise(n: int, classes: int) -> Batches:
    generator = Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return Batches(images, torch.randint(0, classes, (n,), generator=generator), torch.arange(n))


def _linear(classes: int, pixels: int = 16) -> nn.Sequential:
    """A network without batch norm, so that an image's logits do not depend on its batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))


def _layer(network: nn.Sequential) -> nn.Linear:
    layer = network[1]
    assert isinstance(layer, nn.Linear)
    return layer


def _resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(TINY, 1, 2)


def _config(**changes: Any) -> TrialConfig:
    plain: dict[str, Any] = {"epochs": 1, "batch_size": 4, "precision": "fp32", "model": TINY, "augment": PLAIN}
    return TrialConfig(**(plain | changes))


def _fit(network: nn.Module, train: Batches, config: TrialConfig, seed: int = 0) -> list[EpochMetrics]:
    metrics: list[EpochMetrics] = []
    fit(network, PREPROCESS, train, train, config, seed=seed, report=lambda epoch, _: metrics.append(epoch))
    return metrics


def _logits(network: nn.Sequential, batches: Batches) -> NDArray[np.float64]:
    """numpy's own evaluation of a `_linear` network."""
    layer = _layer(network)
    x = (batches.images[batches.rows].numpy().reshape(len(batches), -1) / 255 - 0.5) / 0.25
    return np.asarray(x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy())


def _cross_entropy(logits: NDArray[np.float64], label: int) -> float:
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon"])
def test_bright_and_dark_are_told_apart(
    name: Literal["adamw", "adam", "sgd", "muon"], precision: Literal["fp32", "bf16", "fp16"]
) -> None:
    """Property: from half right to all right, on images that were not trained on too."""
    network, train, other = _resnet(), _dark_and_bright(64), _dark_and_bright(40, seed=1)
    before = evaluate(network, PREPROCESS, other)
    config = _config(
        epochs=8,
        batch_size=16,
        precision=precision,
        augment=AugmentConfig(),
        optim=OptimConfig(name=name, lr=0.02, weight_decay=0.01, label_smoothing=0.0),
    )
    metrics = _fit(network, train, config)
    assert before.accuracy < 1
    assert metrics[-1].val_accuracy == 1
    assert evaluate(network, PREPROCESS, other).accuracy == 1


def test_train_loss_is_the_mean_over_images() -> None:
    """Second implementation in numpy; 10 images in batches of 4, 3 and 3, so the mean over batches is another."""
    network, train = _linear(3), _noise(10, classes=3)
    config = _config(optim=OptimConfig(name="sgd", lr=1e-12, label_smoothing=0.0))
    labels = train.labels.tolist()
    losses = [_cross_entropy(row, label) for row, label in zip(_logits(network, train), labels, strict=True)]
    expected = np.mean(losses)
    (metrics,) = _fit(network, train, config)
    assert metrics.train_loss == pytest.approx(float(expected), rel=1e-5)
    assert metrics.val_loss == pytest.approx(float(expected), rel=1e-5)


def test_training_without_validation_equals_one_with_it() -> None:
    """Property: measuring changes neither weights nor random numbers; without it there is nothing to report."""
    measured, unmeasured, batches = _resnet(), _resnet(), _dark_and_bright(24)
    config = _config(epochs=2, batch_size=8, augment=AugmentConfig())
    _fit(measured, batches, config)
    seen: list[tuple[float | None, float | None]] = []
    fit(
        unmeasured, PREPROCESS, batches, None, config, seed=0,
        report=lambda metrics, state: seen.append((metrics.val_loss, metrics.val_accuracy)),
    )  # fmt: skip
    assert seen == [(None, None)] * 2
    assert all(torch.equal(value, measured.state_dict()[key]) for key, value in unmeasured.state_dict().items())


def test_drop_last_leaves_rows_out_of_train_loss() -> None:
    """Second implementation: the mean over the 8 of 10 rows whose epoch order the seed gives."""
    network, train = _linear(3), _noise(10, classes=3)
    config = _config(drop_last=True, optim=OptimConfig(name="sgd", lr=1e-12, label_smoothing=0.0))
    order = torch.randperm(10, generator=Generator().manual_seed(1))[:8]
    logits = _logits(network, train)
    expected = np.mean([_cross_entropy(logits[row], int(train.labels[row])) for row in order.tolist()])
    (metrics,) = _fit(network, train, config)
    assert metrics.train_loss == pytest.approx(float(expected), rel=1e-5)


def test_one_step_of_sgd_is_the_hand_worked_one() -> None:
    """The gradient of cross entropy is (softmax - target) x, and Nesterov's first step takes 1.9 of it."""
    network, train = _linear(3), _noise(4, classes=3)
    before = _layer(network).weight.detach().double().numpy().copy()
    optim = OptimConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.0, schedule="constant", label_smoothing=0.0)
    x = (train.images.numpy().reshape(4, -1) / 255 - 0.5) / 0.25
    logits = _logits(network, train)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gradient = (softmax - np.eye(3)[train.labels.numpy()]).T @ x / 4
    _fit(network, train, _config(optim=optim))
    after = _layer(network).weight.detach().numpy()
    np.testing.assert_allclose(after, before - 0.1 * 1.9 * gradient, atol=1e-5)


def test_metrics_count_epochs_and_follow_the_learning_rate() -> None:
    """Hand-worked: cosine over 3 epochs of 2 steps starts them at steps 0, 2 and 4 of 6."""
    config = _config(epochs=3, optim=OptimConfig(name="sgd", lr=0.2, schedule="cosine"))
    metrics = _fit(_linear(3), _noise(8, classes=3), config)
    assert [epoch.epoch for epoch in metrics] == [1, 2, 3]
    expected = [0.1 * (1 + math.cos(math.pi * step / 6)) for step in (0, 2, 4)]
    assert [epoch.learning_rate for epoch in metrics] == pytest.approx(expected)


def _fit_until(
    epoch: int,
    network: nn.Module,
    config: TrialConfig,
    resume_from: dict[str, Any] | None = None,
    preprocess: Preprocess = PREPROCESS,
) -> tuple[bytes, list[EpochMetrics]]:
    """Train to an epoch's end; gives the state as saved there, and the metrics."""
    seen: list[EpochMetrics] = []
    saved = io.BytesIO()

    def report(metrics: EpochMetrics, state: TrainingState) -> None:
        seen.append(metrics)
        if metrics.epoch == epoch:
            torch.save(state.state_dict(), saved)
            raise _Stop

    batches = _dark_and_bright(24)
    with pytest.raises(_Stop):
        fit(network, preprocess, batches, batches, config, seed=3, report=report, resume_from=resume_from)
    return saved.getvalue(), seen


@pytest.mark.parametrize(
    ("name", "precision"), [("adamw", "fp32"), ("adam", "fp32"), ("sgd", "fp32"), ("muon", "fp32"), ("adamw", "fp16")]
)
def test_resumed_training_equals_one_in_a_single_go(name: str, precision: str) -> None:
    """Property: weights, batch-norm statistics and metrics of epochs 3 and 4 are the same bit for bit."""
    optim = OptimConfig.model_validate({"name": name, "lr": 0.02})
    augment = AugmentConfig(rotate=10.0, erase=0.5, mixup=0.4)
    config = _config(epochs=4, batch_size=8, precision=precision, augment=augment, optim=optim)
    whole = _resnet()
    _, metrics = _fit_until(4, whole, config)

    half, _ = _fit_until(2, _resnet(), config)
    resumed = _resnet(seed=1)
    state = torch.load(io.BytesIO(half), weights_only=True)
    _, rest = _fit_until(4, resumed, config, resume_from=state)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    assert [_without_time(epoch) for epoch in rest] == [_without_time(epoch) for epoch in metrics[2:]]


def test_resumed_training_goes_on_with_its_loss_scale() -> None:
    """Property: as above, where fp16 overflows for longer than two epochs and the scale is halved each time.

    Inputs of size 100 make gradients that overflow until the scale has come down from 65,536 to 512 or so.
    """
    large = Preprocess(Pixels(1, (0.5,), (0.005,)), 1)
    config = _config(epochs=4, batch_size=8, precision="fp16", optim=OptimConfig(name="adamw"))
    whole = _linear(2, pixels=64)
    _fit_until(4, whole, config, preprocess=large)
    half, _ = _fit_until(2, _linear(2, pixels=64), config, preprocess=large)
    resumed = _linear(2, pixels=64)
    _fit_until(4, resumed, config, torch.load(io.BytesIO(half), weights_only=True), large)
    assert not torch.equal(_layer(whole).weight, _layer(_linear(2, pixels=64)).weight)
    assert torch.equal(_layer(resumed).weight, _layer(whole).weight)


def _without_time(metrics: EpochMetrics) -> dict[str, float | None]:
    return {key: value for key, value in metrics.as_dict().items() if key not in ("seconds", "images_per_second")}


def test_seconds_go_on_from_the_resumed_state() -> None:
    config = _config(epochs=2, batch_size=8)
    state = torch.load(io.BytesIO(_fit_until(1, _resnet(), config)[0]), weights_only=True)
    state["seconds"] = 1000.0
    _, (metrics,) = _fit_until(2, _resnet(), config, resume_from=state)
    assert metrics.seconds > 1000


def test_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        network = _resnet()
        _fit(network, _dark_and_bright(24), _config(batch_size=8, augment=AugmentConfig()), seed)
        return network.state_dict()

    first, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def _copies_of_one_image(n: int, rank: int = 0, workers: int = 1) -> Batches:
    one = _noise(1, classes=3)
    return Batches(one.images.expand(n, 1, 4, 4), one.labels.expand(n), torch.arange(n), rank, workers)


def test_each_epoch_has_its_own_draws() -> None:
    """Property: with weights that stay and images that are alike, only the augmentation can change the loss."""
    config = _config(
        epochs=2, augment=AugmentConfig(translate=2), optim=OptimConfig(name="sgd", lr=1e-12, label_smoothing=0.0)
    )
    first, second = _fit(_linear(3), _copies_of_one_image(16), config)
    assert first.train_loss != pytest.approx(second.train_loss, rel=1e-3)
    assert first.val_loss == pytest.approx(second.val_loss, rel=1e-6)


def test_workers_draw_as_one_does() -> None:
    """Property: as above; each image is changed in its own way, and by two workers as by one."""
    optim = OptimConfig(name="sgd", lr=1e-12, schedule="constant", label_smoothing=0.0)
    config = _config(augment=AugmentConfig(translate=2), optim=optim)
    (first,) = _fit(_linear(3), _copies_of_one_image(16, rank=0, workers=2), config)
    (second,) = _fit(_linear(3), _copies_of_one_image(16, rank=1, workers=2), config)
    (alone,) = _fit(_linear(3), _copies_of_one_image(16), config)
    assert first.train_loss != pytest.approx(second.train_loss, rel=1e-3)
    assert fmean([first.train_loss, second.train_loss]) == pytest.approx(alone.train_loss, rel=1e-6)


def test_each_image_weighs_the_same_however_many_workers_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of workers are averaged, and a batch of 8 has parts of 2, 3 and 3: the mean of what they minimise."""
    minimised: list[float] = []
    monkeypatch.setattr(Optimization, "minimise", lambda self, loss: minimised.append(float(loss.detach())))
    whole = _noise(8, classes=3)
    for rank in range(3):
        _fit(_linear(3), replace(whole, rank=rank, workers=3), _config(batch_size=8))
    _fit(_linear(3), whole, _config(batch_size=8))
    *parts, alone = minimised
    assert fmean(parts) == pytest.approx(alone, rel=1e-6)


def test_poisoned_weights_are_reported_at_the_first_step_of_their_epoch() -> None:
    def poison(metrics: EpochMetrics, state: TrainingState) -> None:
        if metrics.epoch == 2:
            state.network[1].weight.data.fill_(float("nan"))  # type: ignore[index]

    batches = _noise(8, classes=3)
    with pytest.raises(NonFiniteLoss, match=r"^training loss became nan in epoch 3 at step 1$") as caught:
        fit(_linear(3), PREPROCESS, batches, batches, _config(epochs=5), seed=0, report=poison)
    assert (caught.value.epoch, caught.value.step) == (3, 1)
    assert math.isnan(caught.value.loss)


def test_enormous_learning_rate_is_reported_at_the_step_after_the_overflow() -> None:
    """The first loss is from fresh weights; its gradient times 1e38, over inputs of size 2, overflows the second's."""
    config = _config(optim=OptimConfig(name="sgd", lr=1e38, schedule="constant"))
    with pytest.raises(NonFiniteLoss, match="in epoch 1 at step 2"):
        _fit(_linear(3), _noise(16, classes=3), config)


def test_a_long_epoch_is_given_up_before_its_end() -> None:
    """Property: the loss is looked at within an epoch, so that not all of its 200 batches are drawn."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = _linear(3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            logits: Tensor = self.inner(x)
            return logits * float("nan")

    network = Counting()
    with pytest.raises(NonFiniteLoss, match=r"in epoch 1 at step 1$"):
        _fit(network, _noise(200, classes=3), _config(batch_size=1))
    assert network.calls < 100


def test_non_finite_loss_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(NonFiniteLoss("training", 3, 7, float("inf"))))
    assert isinstance(error, NonFiniteLoss)
    assert (error.epoch, error.step, error.loss) == (3, 7, float("inf"))
    assert error.lines == ("training loss became inf in epoch 3 at step 7",)
    assert error.exit_code == 1


def test_evaluation_equals_a_plain_numpy_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Second implementation, over rows that are a part of the table and fill no whole number of batches."""
    monkeypatch.setattr(training, "EVALUATION_BATCH", 8)
    whole, network = _noise(60, classes=3), _linear(3)
    batches = Batches(whole.images, whole.labels, torch.arange(1, 60, 2))
    labels = whole.labels[batches.rows].tolist()
    logits = _logits(network, batches)
    confusion = np.zeros((3, 3), np.int64)
    for label, predicted in zip(labels, logits.argmax(axis=1), strict=True):
        confusion[label, predicted] += 1
    losses = [_cross_entropy(row, label) for row, label in zip(logits, labels, strict=True)]

    result = evaluate(network, PREPROCESS, batches)
    assert result.confusion.dtype == torch.int64
    assert result.confusion.tolist() == confusion.tolist()
    assert result.loss == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert result.images == 30
    assert result.correct == int(np.trace(confusion))
    assert result.accuracy == pytest.approx(float(np.trace(confusion)) / 30)
    assert result.predicted.tolist() == logits.argmax(axis=1).tolist()
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert result.confidence.numpy() == pytest.approx(shares.max(axis=1), rel=1e-5)


def test_evaluation_changes_neither_weights_nor_statistics() -> None:
    network = _resnet().train()
    before = copy.deepcopy(network.state_dict())
    evaluate(network, PREPROCESS, _dark_and_bright(8))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_count_for_both_labels_by_their_shares(kind: str, smoothing: float) -> None:
    """Hand-worked: each image's loss is share * loss(own label) + (1 - share) * loss(partner's label)."""
    mix: Callable[..., tuple[Tensor, Tensor, Tensor]] = batch_mixup if kind == "mixup" else batch_cutmix
    augment = AugmentConfig.model_validate({"flip": False, "translate": 0, kind: 0.7})
    config = _config(augment=augment, optim=OptimConfig(label_smoothing=smoothing))
    network, batches = _linear(3), _noise(9, classes=3)
    loss = _training_loss(network, PREPROCESS(batches.images), batches.labels, config, Generator().manual_seed(5))

    mixed, partner, share = mix(PREPROCESS(batches.images), 0.7, Generator().manual_seed(5))
    logits = network(mixed).detach().double().numpy()
    expected = 0.0
    for i in range(9):
        own = float(share[i])
        targets = np.full(3, smoothing / 3)
        targets[batches.labels[i]] += (1 - smoothing) * own
        targets[batches.labels[partner[i]]] += (1 - smoothing) * (1 - own)
        expected += sum(targets[label] * _cross_entropy(logits[i], label) for label in range(3)) / 9
    assert 0.01 < float(share.min()) < 0.99
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_asked_for_is_the_precision_selected(precision: Literal["fp32", "bf16", "fp16"]) -> None:
    assert select_precision(precision, torch.device("cpu")) == precision


def test_automatic_precision_is_one_that_needs_no_loss_scaling() -> None:
    assert select_precision("auto", torch.device("cpu")) in ("fp32", "bf16")


THAWING = ModelConfig(width=4, stem="small", pretrained="imagenet", freeze=3, unfreeze_epoch=3)
FROZEN = ("conv1.", "bn1.", "layer1.", "layer2.")
"""What begins the names of all that 3 frozen stages have."""


@pytest.mark.parametrize("translate", [0, 1], ids=["kept outputs", "images"])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon"])
def test_frozen_stages_stay_bit_for_bit_until_they_thaw(name: str, translate: int) -> None:
    config = _config(
        epochs=3,
        batch_size=8,
        model=THAWING,
        augment=AugmentConfig(flip=False, translate=translate),
        optim=OptimConfig.model_validate({"name": name, "lr": 0.02}),
    )
    network = create_model(THAWING, 1, 2)
    before = copy.deepcopy(network.state_dict())
    changed: list[set[str]] = []
    with_state: list[int] = []

    def report(_: EpochMetrics, state: TrainingState) -> None:
        weights = state.network.state_dict()
        changed.append({key for key in weights if not torch.equal(weights[key], before[key])})
        with_state.append(sum(len(optimizer.state) for optimizer in state.optimization.optimizers))

    fit(network, PREPROCESS, _dark_and_bright(24), None, config, seed=0, report=report)
    free = {key for key in before if not key.startswith(FROZEN)}
    assert changed[0] <= free
    assert changed[1] == free
    assert changed[2] == set(before)
    assert with_state[0] == with_state[1] < with_state[2] == len(list(network.parameters()))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_training_resumed_around_its_thaw_equals_one_in_a_single_go(stop: int) -> None:
    config = _config(epochs=4, batch_size=8, model=THAWING)

    def create(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return create_model(THAWING, 1, 2)

    whole = create(0)
    _fit_until(4, whole, config)
    part, _ = _fit_until(stop, create(0), config)
    resumed = create(1)
    _fit_until(4, resumed, config, resume_from=torch.load(io.BytesIO(part), weights_only=True))
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "device", "steps", "expected"),
    [
        ("auto", "cuda", 20_000, True),
        ("auto", "cuda", 19_999, False),
        ("auto", "cpu", 10**9, False),
        (True, "cpu", 1, True),
        (False, "cuda", 10**9, False),
    ],
)
def test_compiling_is_decided_by_device_and_planned_steps(asked: Any, device: str, steps: int, expected: bool) -> None:
    assert should_compile(asked, torch.device(device), steps) == expected


@pytest.mark.slow
def test_a_compiled_training_is_the_plain_one_but_for_rounding() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler, g++")
    losses = [
        [epoch.train_loss for epoch in _fit(_linear(2, 64), _dark_and_bright(20), _config(epochs=2, compile=compiled))]
        for compiled in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
