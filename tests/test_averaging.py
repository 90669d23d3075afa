from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fmtune import averaging
from fmtune.averaging import WeightAverage
from fmtune.batches import Batches
from fmtune.checkpoint import load_weights, save_training
from fmtune.config import AugmentConfig, ModelConfig, OptimConfig, TrialConfig
from fmtune.model import Pixels, Preprocess, create_model
from fmtune.training import EpochMetrics, TrainingState, evaluate, fit

PREPROCESS = Preprocess(Pixels(1, (0.5,), (0.25,)), 1)


def _set(network: nn.Linear, value: float) -> nn.Linear:
    with torch.no_grad():
        network.weight.fill_(value)
    return network


def _averaged(average: WeightAverage) -> float:
    assert isinstance(average.network, nn.Linear)
    return float(average.network.weight.detach())


def test_last_is_the_plain_mean_over_the_last_quarter_of_the_steps() -> None:
    """Hand-worked: of 100 steps, each of which sets the weight to its number, those at 76, 80, ..., 100."""
    network = nn.Linear(1, 1, bias=False)
    average = WeightAverage(network, "last", steps=100)
    for step in range(1, 101):
        average.update(_set(network, step), step)
        if step == 75:
            assert average.network is None
    assert _averaged(average) == pytest.approx(88.0)


def test_ema_forgets_at_the_rate_of_its_share_of_the_steps() -> None:
    """Hand-worked: of 1,000 steps the mean's horizon is 20, so every fourth step takes 4/20 of the new weight."""
    network = nn.Linear(1, 1, bias=False)
    average = WeightAverage(network, "ema", steps=1000)
    for step in range(1, 13):
        average.update(_set(network, step), step)
    expected = 4.0  # the first one is taken whole
    for weight in (8.0, 12.0):
        expected += 0.2 * (weight - expected)
    assert _averaged(average) == pytest.approx(expected)


def test_ema_of_a_short_training_is_its_last_weights() -> None:
    """A horizon shorter than the interval leaves nothing of what was before; the last step counts in any case."""
    network = nn.Linear(1, 1, bias=False)
    average = WeightAverage(network, "ema", steps=6)
    for step in range(1, 7):
        average.update(_set(network, step), step)
    assert _averaged(average) == 6.0


def test_batch_norms_statistics_are_averaged_with_the_weights() -> None:
    network = nn.BatchNorm2d(1)
    average = WeightAverage(network, "last", steps=8)
    for step, mean in ((8, 1.0), (8, 3.0)):
        assert network.running_mean is not None
        network.running_mean.fill_(mean)
        average.update(network, step)
    assert isinstance(average.network, nn.BatchNorm2d)
    assert average.network.running_mean is not None
    assert average.network.running_mean.item() == 2.0


def _config(kind: str, epochs: int = 4) -> TrialConfig:
    return TrialConfig(
        epochs=epochs,
        batch_size=8,
        precision="fp32",
        model=ModelConfig(width=4, stem="small"),
        augment=AugmentConfig(flip=False, translate=0),
        optim=OptimConfig.model_validate({"average": kind}),
    )


def _batches() -> Batches:
    labels = torch.arange(48) % 2
    images = torch.randint(0, 200, (48, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return Batches((images + 50 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, torch.arange(48))


class _Stop(Exception):
    """Ends a training at a report."""


def _fit(kind: str, stop: int = 4, resume_from: dict[str, Any] | None = None) -> tuple[EpochMetrics, TrainingState]:
    torch.manual_seed(0)
    last: list[tuple[EpochMetrics, TrainingState]] = []

    def report(metrics: EpochMetrics, state: TrainingState) -> None:
        last[:] = [(metrics, state)]
        if metrics.epoch == stop:
            raise _Stop

    network, batches = create_model(_config(kind).model, 1, 2), _batches()
    with pytest.raises(_Stop):
        fit(network, PREPROCESS, batches, batches, _config(kind), seed=0, report=report, resume_from=resume_from)
    return last[0]


@pytest.mark.parametrize("kind", ["ema", "last"])
def test_mean_weights_are_what_is_measured_and_kept(
    kind: Literal["ema", "last"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averaging, "_EMA_SHARE", 0.5)
    metrics, state = _fit(kind)
    save_training(tmp_path, state.state_dict(), metrics)
    kept = load_weights(tmp_path)
    trained = state.network.state_dict()
    assert kept.keys() == trained.keys()
    assert any(not torch.equal(kept[key], trained[key]) for key in kept if "weight" in key)
    fresh = create_model(_config(kind).model, 1, 2)
    fresh.load_state_dict(kept)
    assert evaluate(fresh, PREPROCESS, _batches()).loss == pytest.approx(metrics.val_loss, rel=1e-5)


def test_before_the_last_quarter_the_trained_weights_are_kept(tmp_path: Path) -> None:
    metrics, state = _fit("last", stop=1)
    save_training(tmp_path, state.state_dict(), metrics)
    trained = state.network.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in load_weights(tmp_path).items())


def _copied(state: TrainingState) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    copy: dict[str, Any] = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    return copy


@pytest.mark.parametrize("kind", ["ema", "last"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_training_has_the_mean_of_one_in_a_single_go(
    kind: str, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Property: bit for bit, from before the first update of the mean and from after it."""
    monkeypatch.setattr(averaging, "_EMA_SHARE", 0.5)

    def weights(state: TrainingState) -> dict[str, Tensor]:
        return state.best_network.state_dict()

    _, whole = _fit(kind)
    _, part = _fit(kind, stop)
    _, resumed = _fit(kind, resume_from=_copied(part))
    assert all(torch.equal(value, weights(resumed)[key]) for key, value in weights(whole).items())
