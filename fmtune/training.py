"""Training and evaluation of one network, epoch by epoch; knows torch and nothing of Ray."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fmtune.augment import augment, batch_cutmix, batch_mixup
from fmtune.batches import Batches, count_trained
from fmtune.config import TrialConfig
from fmtune.errors import NonFiniteLoss
from fmtune.model import Preprocess
from fmtune.optim import Optimization

Precision = Literal["fp32", "bf16", "fp16"]
EVALUATION_BATCH = 1024
"""Images of an evaluation step; without gradients the memory of a training step holds several times its batch."""
_LOSS_CHECK_STEPS = 64
"""Steps between looks at the loss, each of which waits for the device."""


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
        return asdict(self)


@dataclass
class TrainingState:
    """All that training needs to go on after an epoch; random numbers follow from the seed and the epoch."""

    network: nn.Module
    optimization: Optimization
    epoch: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimization": self.optimization.state_dict(),
            "epoch": self.epoch,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimization.load_state_dict(state["optimization"])
        self.epoch, self.seconds = state["epoch"], state["seconds"]


class Report(Protocol):
    """Called after each epoch; may raise to end the training."""

    def __call__(self, metrics: EpochMetrics, state: TrainingState) -> None: ...


@dataclass(frozen=True)
class Evaluation:
    """Predictions over a split, and what they are worth.

    `confusion` is int64 (classes, classes), rows the true class and columns the predicted one.
    """

    loss: float
    confusion: Tensor = field(repr=False)

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
) -> None:
    """Train `network` for `config.epochs` epochs, or from the epoch that `resume_from` ended with.

    Args:
        network: on the device of the batches; wrapped for DDP where several workers train together.
        preprocess: turns uint8 images into the network's input.
        train: batches to learn from.
        validation: batches to measure on after each epoch, if any.
        config: epochs, batch size, precision, augmentation and optimizer.
        seed: of the order of rows and the augmentation.
        report: called after each epoch with its metrics and the state to save.
        resume_from: a `TrainingState.state_dict()`.

    Raises:
        NonFiniteLoss: the training or validation loss became NaN or infinite.
    """
    steps = train.steps(config.batch_size, config.drop_last)
    precision = select_precision(config.precision, train.device)
    optimization = Optimization(network, config.optim, steps * config.epochs, loss_scaling=precision == "fp16")
    # Checkpoints name parameters as published, without DDP's prefix.
    state = TrainingState(network.module if isinstance(network, DistributedDataParallel) else network, optimization)
    if resume_from is not None:
        state.load_state_dict(resume_from)
    while state.epoch < config.epochs:
        started = time.perf_counter()
        state.epoch += 1
        learning_rate = optimization.learning_rate
        train_loss = _train_epoch(network, state, preprocess, train, config, precision, seed)
        trained = time.perf_counter()
        result = None if validation is None else _validate(state, preprocess, validation, precision)
        state.seconds += time.perf_counter() - started
        images = count_trained(len(train), config.batch_size, config.drop_last)
        report(
            EpochMetrics(
                epoch=state.epoch,
                train_loss=train_loss,
                val_loss=None if result is None else result.loss,
                val_accuracy=None if result is None else result.accuracy,
                learning_rate=learning_rate,
                images_per_second=images / (trained - started),
                seconds=state.seconds,
            ),
            state,
        )


def _validate(state: TrainingState, preprocess: Preprocess, validation: Batches, precision: Precision) -> Evaluation:
    """Evaluate the network, the same one on all workers.

    Raises:
        NonFiniteLoss: a prediction is NaN or infinite.
    """
    if dist.is_initialized():
        # Each worker's batch norms have seen rows of its own; rank 0's statistics are the ones that are saved.
        for buffer in state.network.buffers():
            dist.broadcast(buffer, src=0)
    result = evaluate(state.network, preprocess, validation, precision)
    if not math.isfinite(result.loss):
        raise NonFiniteLoss("validation", state.epoch, None, result.loss)
    return result


def _train_epoch(
    network: nn.Module,
    state: TrainingState,
    preprocess: Preprocess,
    train: Batches,
    config: TrialConfig,
    precision: Precision,
    seed: int,
) -> float:
    """One pass over the training rows; returns the mean loss over them."""
    network.train()
    generator = Generator(train.device).manual_seed(seed * 1_000_003 + state.epoch)
    own_generator = Generator(train.device).manual_seed((seed * 1_000_003 + state.epoch) * 1009 + train.rank)
    steps = train.steps(config.batch_size, config.drop_last)
    # Losses stay on the device: fetching each would make every step wait for it.
    losses = torch.zeros(steps, device=train.device)
    counts = torch.zeros(steps, device=train.device)
    for step, (images, labels) in enumerate(train.shuffled(config.batch_size, config.drop_last, generator)):
        with _autocast(precision, train.device):
            loss = _training_loss(network, preprocess, images, labels, config, own_generator)
        state.optimization.minimise(loss)
        losses[step], counts[step] = loss.detach(), len(labels)
        if (step + 1) % _LOSS_CHECK_STEPS == 0:
            _check_finite(losses[: step + 1], state.epoch)
    _check_finite(losses, state.epoch)
    total, images_seen = _sum_over_workers(torch.stack([losses.double() @ counts.double(), counts.double().sum()]))
    return total / images_seen


def _training_loss(
    network: nn.Module, preprocess: Preprocess, images: Tensor, labels: Tensor, config: TrialConfig, draws: Generator
) -> Tensor:
    """Mean cross entropy of an augmented batch, against both labels of each image where images are mixed."""
    x = preprocess(augment(images, config.augment, draws))
    smoothing = config.optim.label_smoothing
    if not (config.augment.mixup or config.augment.cutmix):
        return F.cross_entropy(network(x), labels, label_smoothing=smoothing)
    if config.augment.mixup:
        x, partner, share = batch_mixup(x, config.augment.mixup, draws)
    else:
        x, partner, share = batch_cutmix(x, config.augment.cutmix, draws)
    logits = network(x)
    own = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    other = F.cross_entropy(logits, labels[partner], label_smoothing=smoothing, reduction="none")
    return torch.lerp(other, own, share).mean()


def _check_finite(losses: Tensor, epoch: int) -> None:
    finite = losses.isfinite()
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        raise NonFiniteLoss("training", epoch, step + 1, float(losses[step]))


@torch.no_grad()
def evaluate(network: nn.Module, preprocess: Preprocess, batches: Batches, precision: Precision = "fp32") -> Evaluation:
    """Cross entropy and confusion counts over a split, summed over all workers.

    Args:
        network: gives logits (N, classes) for what `preprocess` makes of uint8 (N, C, H, W).
        preprocess: as in training.
        batches: the split.
        precision: numbers to compute in.
    """
    network.eval()
    total = torch.zeros((), dtype=torch.float64, device=batches.device)
    pairs = []
    for images, labels in batches.ordered(EVALUATION_BATCH):
        with _autocast(precision, batches.device):
            logits = network(preprocess(images))
        total += F.cross_entropy(logits.float(), labels, reduction="sum").double()
        pairs.append(labels * logits.shape[1] + logits.argmax(dim=1))
    classes = logits.shape[1]
    counts = torch.bincount(torch.cat(pairs), minlength=classes * classes).double()
    loss, *confusion = _sum_over_workers(torch.cat([total.view(1), counts]))
    return Evaluation(loss / sum(confusion), torch.tensor(confusion, dtype=torch.int64).view(classes, classes))


def _sum_over_workers(values: Tensor) -> list[float]:
    """Sums of float64 values (n,) over the workers that train together."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def _autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A context that computes in the given precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def select_precision(precision: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """The numbers to compute in: as asked, or for `auto` bf16 where the device multiplies in it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
