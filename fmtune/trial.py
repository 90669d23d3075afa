"""One trial on Ray: in its own warm process, or by DDP in a Ray Train `TorchTrainer`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fmtune.batches import Batches, place_images, place_rows
from fmtune.checkpoint import create_preprocess, load_training, save_training
from fmtune.collectives import trim_transfers
from fmtune.config import ModelConfig, ResourcesConfig, TrialConfig
from fmtune.data import Classes, TrainingData, to_arrow, weights_folder
from fmtune.errors import FmtuneError
from fmtune.failures import DEATHS
from fmtune.model import Pixels, create_model
from fmtune.pretrained import Weights, load_pretrained, read_weights, weights_key
from fmtune.seeds import derive_seed
from fmtune.storage import fetch
from fmtune.stored import Images, StoredImages, StoredTable
from fmtune.streaming import ImageStream
from fmtune.training import Distribute, EpochMetrics, Report, Training, TrainingState


@dataclass(frozen=True)
class Task:
    """What a trial is asked to do; it travels as Tune's configuration of the trial.

    Attributes:
        name: the trial's folder, unique in its run.
        seed: of the initial weights, the order of rows and the augmentation.
        trial: a `TrialConfig` as plain values.
        rows: `train` holds the validation part out; `all` trains on it too, and measures nothing.
        number: the trial's number in the search, None outside it.
        resume_from: path or URL of a checkpoint of this trial to go on from.
        until: epoch that it stops after, if that is not its last one.
        earlier: where the configuration changes along the training, those before `trial`, each with the last epoch that
            it holds for.
    """

    name: str
    seed: int
    trial: dict[str, Any]
    rows: Literal["train", "all"] = "train"
    number: int | None = None
    resume_from: str | None = None
    until: int | None = None
    earlier: Sequence[tuple[int, dict[str, Any]]] = ()

    @property
    def last_epoch(self) -> int:
        """The last one that is trained."""
        return self.config.epochs if self.until is None else self.until

    @property
    def config(self) -> TrialConfig:
        return TrialConfig.model_validate(self.trial)

    @property
    def trial_number(self) -> int:
        """`number` of a trial of the search."""
        assert self.number is not None
        return self.number

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SharedData:
    """What all trials share: one Ray Dataset, which of its rows each part has, and weights to start from.

    Images that stay in the cache are read from there by each process. `key` names the content, so that a process that
    has it on its device need not fetch it again. Weights lie in Ray's object store by `weights_key`: other nodes have
    not got the driver's files.
    """

    key: str
    dataset: ray.data.Dataset | StoredTable
    train_rows: NDArray[np.int64]
    validation_rows: NDArray[np.int64]
    pixels: Pixels
    classes: Classes
    weights: Mapping[str, ray.ObjectRef[Weights]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: TrainingData, weights: Mapping[str, Weights] | None = None) -> SharedData:
        """Put the images into Ray's object store, or tell where in the cache they stay; and put weights there too."""
        dataset: ray.data.Dataset | StoredTable
        if isinstance(data.images, StoredImages):
            dataset = StoredTable(data.images, data.labels)
        else:
            dataset = ray.data.from_arrow(to_arrow(data.images, data.labels))
        key = f"{data.loaded.key}-{len(data.images)}"
        stored = {name: ray.put(value) for name, value in (weights or {}).items()}
        return cls(key, dataset, data.train_rows, data.validation_rows, data.pixels, data.classes, stored)

    def read_weights(self, config: ModelConfig) -> Weights:
        """The weights that a network of this configuration starts from.

        Raises:
            InputError: as of `pretrained.read_weights`, for weights that are not in the store.
        """
        key = weights_key(config)
        if key in self.weights:
            return ray.get(self.weights[key])
        # The driver reads what a sample of configurations wants, which may lack a rare one.
        return read_weights(config, weights_folder())


def create_task(seed: int, number: int, config: TrialConfig, resume_from: str | None = None) -> Task:
    """Trial `number` of a search with `seed`."""
    return Task(
        name=task_name(number),
        seed=derive_seed(seed, number),
        trial=config.model_dump(),
        number=number,
        resume_from=resume_from,
    )


def task_name(number: int) -> str:
    """Folder of a trial of the search, which sorts by number."""
    return f"{number:05d}"


def run_trial(config: dict[str, Any], *, data: SharedData, resources: ResourcesConfig) -> None:
    """Tune's trainable: train the task in `config` and report each epoch with a checkpoint."""
    task = Task(**config)
    if resources.workers > 1:
        _run_distributed(task, data, resources)
        return
    set_threads(resources)
    device = torch.device("cuda" if resources.gpus else "cpu")
    # Tune has a checkpoint for it where an earlier attempt died with its process or its node.
    checkpoint = tune.get_checkpoint()
    with checkpoint.as_directory() if checkpoint is not None else nullcontext(task.resume_from) as folder:
        _train(replace(task, resume_from=folder), data, device, rank=0, workers=1, report=_report_to_tune)


def _run_distributed(task: Task, data: SharedData, resources: ResourcesConfig) -> None:
    """Train with several workers, whose reports reach Tune through Ray Train's callback."""
    storage = tune.get_context().get_storage()
    trainer = ray.train.torch.TorchTrainer(
        _run_worker,
        train_loop_config={"task": task, "data": data, "resources": resources},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=worker_resources(resources),
        ),
        run_config=ray.train.RunConfig(
            # Within the trial's own folder, which no other attempt at the task shares.
            name="workers",
            storage_path=storage.trial_fs_path,
            storage_filesystem=storage.storage_filesystem,
            # Ray types the list by the callbacks of Train V1.
            callbacks=[TuneReportCallback(), _GivesUp()],  # type: ignore[list-item]
            # Tune hears of a checkpoint a report later than Train, and may end the trial on the one before.
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=DEATHS),
        ),
    )
    try:
        trainer.fit()
    except ray.train.ControllerError as error:
        raise error.controller_failure from None


class _GivesUp(ray.train.UserCallback):
    """Ends a training that failed by itself: Train would take that for the death of a worker, and try again.

    What a callback raises is a failure of Train's controller, which is not tried again.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, FmtuneError):
                raise error


def _run_worker(config: dict[str, Any]) -> None:
    """The loop of one DDP worker."""
    task: Task = config["task"]
    set_threads(config["resources"])
    context, checkpoint = ray.train.get_context(), ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint is not None else nullcontext(task.resume_from) as folder:
        _train(
            replace(task, resume_from=folder),
            config["data"],
            ray.train.torch.get_device(),
            context.get_world_rank(),
            context.get_world_size(),
            _report_to_train,
        )


def _train(task: Task, shared: SharedData, device: torch.device, rank: int, workers: int, report: Report) -> None:
    distribute = _distribute if workers > 1 else None
    state = _load_state(task.resume_from) if task.resume_from else None
    for last, trial in (*task.earlier, (task.last_epoch, task.trial)):
        if state is not None and state["epoch"] >= last:
            continue
        training = create_training(replace(task, trial=trial), shared, device, rank, workers, distribute, state)
        while training.state.epoch < last:
            report(training.run_epoch(), training.state)
        state = training.state.state_dict()


def _distribute(network: nn.Module) -> nn.Module:
    """A network as Ray Train's workers train it together."""
    return trim_transfers(cast(DistributedDataParallel, ray.train.torch.prepare_model(network)))


def create_training(
    task: Task,
    shared: SharedData,
    device: torch.device,
    rank: int,
    workers: int,
    distribute: Distribute | None,
    state: dict[str, Any] | None = None,
) -> Training:
    """A task made ready to train, at the epoch of a state, or of its checkpoint if it has one.

    Args:
        task: what to train.
        shared: the data.
        device: of this process.
        rank: this process's place among `workers`.
        workers: processes that train the task together.
        distribute: wraps the network for them.
        state: `TrainingState.state_dict()` to go on from.
    """
    if state is None and task.resume_from:
        state = _load_state(task.resume_from)
    config = task.config
    images, labels = tensors_on_device(shared, device)
    rows = np.union1d(shared.train_rows, shared.validation_rows) if task.rows == "all" else shared.train_rows
    train = Batches(images, labels, place_rows(rows, images), rank, workers)
    validation = replace(train, rows=place_rows(shared.validation_rows, images))
    torch.manual_seed(task.seed)
    network = create_model(config.model, shared.pixels.channels, len(shared.classes))
    if config.model.pretrained is not None and state is None:
        load_pretrained(network, config.model, shared.read_weights(config.model), shared.classes)
    return Training(
        network.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        create_preprocess(config, shared.pixels).to(device),
        train,
        None if task.rows == "all" else validation,
        config,
        seed=task.seed,
        resume_from=state,
        distribute=distribute,
    )


def _load_state(checkpoint: str) -> dict[str, Any]:
    with fetch(checkpoint) as folder:
        return load_training(folder)


def _report_to_tune(metrics: EpochMetrics, state: TrainingState) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_training(Path(folder), state.state_dict(), metrics)
        tune.report(metrics.as_dict(), checkpoint=tune.Checkpoint.from_directory(folder))


def _report_to_train(metrics: EpochMetrics, state: TrainingState) -> None:
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report({})
    else:
        with tempfile.TemporaryDirectory() as folder:
            save_training(Path(folder), state.state_dict(), metrics)
            ray.train.report(metrics.as_dict(), checkpoint=ray.train.Checkpoint.from_directory(folder))
    # The first brings its checkpoint to the storage, which may take longer than workers wait for one another in a step.
    dist.barrier()


def set_threads(resources: ResourcesConfig) -> None:
    """Torch's threads as this worker's share of the machine."""
    torch.set_num_threads(count_threads(resources))


def count_threads(resources: ResourcesConfig) -> int:
    """Threads that each worker computes with on the CPU."""
    return max(1, math.floor(resources.cpus or 1))


_held: dict[tuple[str, torch.device], tuple[Tensor | ImageStream, Tensor]] = {}
"""The data set that this process has on its device: trials that follow one another share it."""


def tensors_on_device(shared: SharedData, device: torch.device) -> tuple[Tensor | ImageStream, Tensor]:
    """Images uint8 (N, C, H, W), or a stream of them, and labels int64 (N,), fetched once for a process and device."""
    key = (shared.key, device)
    if key not in _held:
        _held.clear()
        images: Images
        if isinstance(shared.dataset, StoredTable):
            images, labels = shared.dataset.images, shared.dataset.labels
        else:
            table = pa.concat_tables(ray.get(shared.dataset.to_arrow_refs())).combine_chunks()
            tensors = table.column("image").chunk(0)
            images = tensors.storage.flatten().to_numpy().reshape(-1, *tensors.type.shape)
            labels = table.column("label").to_numpy()
        _held[key] = (place_images(images, device), torch.tensor(labels, device=device))
    return _held[key]


def worker_resources(resources: ResourcesConfig) -> dict[str, float]:
    """What Ray sets aside for each worker."""
    return {"CPU": resources.cpus or 1.0} | ({"GPU": resources.gpus} if resources.gpus else {})


def trial_resources(resources: ResourcesConfig) -> Mapping[str, float]:
    """What Ray sets aside for the trial's own process: a driver of workers needs nothing for itself."""
    # Tune wants to set aside something; a byte of memory holds nobody up.
    return worker_resources(resources) if resources.workers == 1 else {"CPU": 0.0, "memory": 1.0}
