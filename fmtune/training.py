"""Training and evaluation of one network, epoch by epoch; knows torch and nothing of Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fmtune.augment import batch_cutmix, batch_mixup
from fmtune.averaging import WeightAverage
from fmtune.batches import Batches, count_trained
from fmtune.config import TrialConfig
from fmtune.errors import NonFiniteLoss
from fmtune.feed import ALL, Feed, Precision, autocast, feed_features, feed_pixels
from fmtune.model import Preprocess, ResNet
from fmtune.optim import Optimization

Forward = Callable[[Tensor], Tensor]
"""From a prepared batch to logits (N, classes)."""
Distribute = Callable[[nn.Module], nn.Module]
"""Wraps a network so that several workers train it together."""
EVALUATION_BATCH = 1024
"""Images of an evaluation step; without gradients the memory of a training step holds several times its batch."""
_LOSS_CHECK_STEPS = 64
"""Steps between looks at the loss, each of which waits for the device."""
_COMPILE_STEPS = 20_000
"""Steps of about 10 ms from which a saving of a quarter of each pays back 40 s of compiling."""


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch reports.

    `seconds` counts from the trial's first step, evaluation included; without a validation part there is nothing to
    evaluate, and `val_loss` and `val_accuracy` are None.
    """

    epoch: int
    train_loss: float
    val_loss: float | None
    val_accuracy: float | None
    learning_rate: float
    images_per_second: float
    seconds: float

    def as_dict(self) -> dict[str, float | None]:
        # A search of thousands of trials asks for them by the million, and `asdict` copies each value.
        return dict(vars(self))


@dataclass
class TrainingState:
    """All that training needs to go on after an epoch; random numbers follow from the seed and the epoch."""

    network: nn.Module
    optimization: Optimization
    average: WeightAverage | None = None
    epoch: int = 0
    seconds: float = 0.0

    @property
    def best_network(self) -> nn.Module:
        """The network to evaluate and to keep: of mean weights where there are any."""
        return (self.average and self.average.network) or self.network

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimization": self.optimization.state_dict(),
            "average": self.average.state_dict() if self.average and self.average.network else None,
            "epoch": self.epoch,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimization.load_state_dict(state["optimization"])
        if self.average and state["average"]:
            self.average.load_state_dict(state["average"])
        self.epoch, self.seconds = state["epoch"], state["seconds"]


class Report(Protocol):
    """Called after each epoch; may raise to end the training."""

    def __call__(self, metrics: EpochMetrics, state: TrainingState) -> None: ...


@dataclass(frozen=True)
class Evaluation:
    """Predictions over a split, and what they are worth.

    `confusion` is int64 (classes, classes), rows the true class and columns the predicted one. `predicted` is int64
    (N,), the class of each of this worker's rows in their order, and `confidence` float32 (N,), its probability.
    """

    loss: float
    confusion: Tensor = field(repr=False)
    predicted: Tensor = field(repr=False)
    confidence: Tensor = field(repr=False)

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


def fit(
    network: nn.Module,
    preprocess: Preprocess,
    train: Batches,
    validation: Batches | None,
    config: TrialConfig,
    *,
    seed: int,
    report: Report,
    resume_from: dict[str, Any] | None = None,
    distribute: Distribute | None = None,
) -> None:
    """Train `network` for `config.epochs` epochs, or from the epoch that `resume_from` ended with.

    Args:
        network: on the device of the batches; a `ResNet` where stages are frozen.
        preprocess: turns uint8 images into the network's input.
        train: batches to learn from.
        validation: batches to measure on after each epoch, if any.
        config: epochs, batch size, precision, augmentation and optimizer.
        seed: of the order of rows and the augmentation.
        report: called after each epoch with its metrics and the state to save.
        resume_from: a `TrainingState.state_dict()`.
        distribute: wraps the network for DDP where several workers train together.

    Raises:
        NonFiniteLoss: the training or validation loss became NaN or infinite.
    """
    training = Training(
        network, preprocess, train, validation, config, seed=seed, resume_from=resume_from, distribute=distribute
    )
    while training.state.epoch < config.epochs:
        report(training.run_epoch(), training.state)


class Training:
    """One network on its way through its epochs; arguments and errors are those of `fit`.

    Attributes:
        state: where it is.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        train: Batches,
        validation: Batches | None,
        config: TrialConfig,
        *,
        seed: int,
        resume_from: dict[str, Any] | None = None,
        distribute: Distribute | None = None,
    ) -> None:
        self._config, self._seed, self._distribute = config, seed, distribute
        self._pixels = feed_pixels(train, validation, preprocess, config.augment)
        self._forward: Forward = network
        self._device = train.device
        self._precision = select_precision(config.precision, self._device)
        self._epoch_steps = train.steps(config.batch_size, config.drop_last)
        self._steps = self._epoch_steps * config.epochs
        optimization = Optimization(
            network,
            config.optim,
            self._steps,
            loss_scaling=self._precision == "fp16",
            will_unfreeze=config.model.unfreeze_epoch is not None,
        )
        kind = config.optim.average
        average = None if kind == "none" else WeightAverage(network, kind, self._steps)
        self.state = TrainingState(network, optimization, average)
        if resume_from is not None:
            self.state.load_state_dict(resume_from)
        self._feed: Feed | None = None

    def run_epoch(self) -> EpochMetrics:
        """Train and evaluate the next epoch."""
        started = time.perf_counter()
        state, config = self.state, self._config
        state.epoch += 1
        feed = self._prepare_epoch()
        prepared = time.perf_counter()
        learning_rate = state.optimization.learning_rate
        train_loss = self._train(feed)
        trained = time.perf_counter()
        result = None if feed.validation is None else self._validate(feed, feed.validation)
        state.seconds += time.perf_counter() - started
        images = count_trained(len(feed.train), config.batch_size, config.drop_last)
        return EpochMetrics(
            epoch=state.epoch,
            train_loss=train_loss,
            val_loss=None if result is None else result.loss,
            val_accuracy=None if result is None else result.accuracy,
            learning_rate=learning_rate,
            # Without the one pass through frozen stages, which is not of every epoch.
            images_per_second=images / (trained - prepared),
            seconds=state.seconds,
        )

    def _prepare_epoch(self) -> Feed:
        """What the epoch is fed with; the network is made ready in the first one and where its stages thaw."""
        network, thaw = self.state.network, self._config.model.unfreeze_epoch
        if isinstance(network, ResNet) and network.frozen and thaw is not None and self.state.epoch >= thaw:
            network.unfreeze()
            self._feed = None
        if self._feed is None:
            self._feed = self._choose_feed()
            self._forward = self._create_forward(self._feed.first)
        return self._feed

    def _choose_feed(self) -> Feed:
        network = self.state.network
        if not isinstance(network, ResNet):
            return self._pixels
        return feed_features(self._pixels, network, self._config.augment, self._precision) or self._pixels

    def _create_forward(self, first: int) -> Forward:
        """From what the feed gives to logits, in training."""
        forward: Any = self._distribute(self.state.network) if self._distribute else self.state.network
        if should_compile(self._config.compile, self._device, self._steps):
            # Batches have two sizes at most, each of which gets a program of its own.
            mode = "reduce-overhead" if self._device.type == "cuda" else "default"
            forward = torch.compile(forward, dynamic=False, mode=mode)
        return partial(forward, first=first) if first else forward

    def _train(self, feed: Feed) -> float:
        """One pass over the training rows; returns the mean loss over them."""
        state, config, train = self.state, self._config, feed.train
        state.network.train()
        seed = self._seed * 1_000_003 + state.epoch
        generator = Generator(train.device).manual_seed(seed)
        # Augmentation is drawn alike by all workers; images are mixed among each worker's own.
        draws = Generator(train.device).manual_seed(seed * 1009)
        mixing = Generator(train.device).manual_seed(seed * 1009 + 1 + train.rank)
        # Losses stay on the device: fetching each would make every step wait for it.
        losses = torch.zeros(self._epoch_steps, device=train.device)
        counts = torch.zeros(self._epoch_steps, device=train.device)
        for step, (images, labels, part) in enumerate(train.shuffled(config.batch_size, config.drop_last, generator)):
            with autocast(self._precision, train.device):
                x, targets = feed.prepare(images, draws, part), labels[part]
                loss = _training_loss(self._forward, x, targets, config, mixing)
            # Workers' gradients are averaged: each counts by its images, of which one may have one more than another.
            state.optimization.minimise(loss * (len(targets) * train.workers / len(labels)))
            if state.average is not None:
                state.average.update(state.network, (state.epoch - 1) * self._epoch_steps + step + 1)
            losses[step], counts[step] = loss.detach(), len(targets)
            if (step + 1) % _LOSS_CHECK_STEPS == 0:
                _check_finite(losses[: step + 1], state.epoch)
        _check_finite(losses, state.epoch)
        total, images_seen = _sum_over_workers(torch.stack([losses.double() @ counts.double(), counts.double().sum()]))
        return total / images_seen

    def _validate(self, feed: Feed, validation: Batches) -> Evaluation:
        """Evaluate the network, which is the same on all workers, batch norms' statistics included.

        Raises:
            NonFiniteLoss: a prediction is NaN or infinite.
        """
        network = self.state.best_network
        result = evaluate(network, lambda x: feed.prepare(x, None, ALL), validation, self._precision, first=feed.first)
        if not math.isfinite(result.loss):
            raise NonFiniteLoss("validation", self.state.epoch, None, result.loss)
        return result


def _training_loss(forward: Forward, x: Tensor, labels: Tensor, config: TrialConfig, draws: Generator) -> Tensor:
    """Mean cross entropy of a prepared batch, against both labels of each image where images are mixed."""
    smoothing = config.optim.label_smoothing
    if not (config.augment.mixup or config.augment.cutmix):
        return F.cross_entropy(forward(x), labels, label_smoothing=smoothing)
    if config.augment.mixup:
        x, partner, share = batch_mixup(x, config.augment.mixup, draws)
    else:
        x, partner, share = batch_cutmix(x, config.augment.cutmix, draws)
    logits = forward(x)
    own = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    other = F.cross_entropy(logits, labels[partner], label_smoothing=smoothing, reduction="none")
    return torch.lerp(other, own, share).mean()


def _check_finite(losses: Tensor, epoch: int) -> None:
    finite = losses.isfinite()
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        raise NonFiniteLoss("training", epoch, step + 1, float(losses[step]))


@torch.no_grad()
def evaluate(
    network: nn.Module,
    prepare: Callable[[Tensor], Tensor],
    batches: Batches,
    precision: Precision = "fp32",
    *,
    first: int = 0,
) -> Evaluation:
    """Cross entropy and confusion counts over a split, summed over all workers, and this worker's predictions.

    Args:
        network: gives logits (N, classes) for what `prepare` makes of a batch.
        prepare: as in training, but for what is random in it.
        batches: the split.
        precision: numbers to compute in.
        first: stage of the network that takes what `prepare` gives.
    """
    network.eval()
    forward: Forward = partial(network, first=first) if first else network
    total = torch.zeros((), dtype=torch.float64, device=batches.device)
    pairs, predicted, confidence = [], [], []
    for images, labels in batches.ordered(EVALUATION_BATCH):
        with autocast(precision, batches.device):
            logits = forward(prepare(images))
        total += F.cross_entropy(logits.float(), labels, reduction="sum").double()
        predicted.append(logits.argmax(dim=1))
        confidence.append(logits.float().softmax(dim=1).amax(dim=1))
        pairs.append(labels * logits.shape[1] + predicted[-1])
    classes = logits.shape[1]
    counts = torch.bincount(torch.cat(pairs), minlength=classes * classes).double()
    loss, *confusion = _sum_over_workers(torch.cat([total.view(1), counts]))
    matrix = torch.tensor(confusion, dtype=torch.int64).view(classes, classes)
    return Evaluation(loss / sum(confusion), matrix, torch.cat(predicted), torch.cat(confidence))


def _sum_over_workers(values: Tensor) -> list[float]:
    """Sums of float64 values (n,) over the workers that train together."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def select_precision(precision: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """The numbers to compute in: as asked, or for `auto` bf16 where the device multiplies in it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def should_compile(compile: Literal["auto"] | bool, device: torch.device, steps: int) -> bool:
    """Whether to compile the training step: as asked, or for `auto` where the planned steps pay back the compiling."""
    if compile != "auto":
        return compile
    # On CPUs a compiled step was measured to be no faster than this one (benchmarks/README.md).
    return device.type == "cuda" and steps >= _COMPILE_STEPS
