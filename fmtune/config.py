"""Typed configuration: what one trial, one search and one data set are made of.

Every class is immutable, refuses unknown keys, and checks its values when it is built.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)

Scalar = bool | int | float | str | None
"""A value of a trial's configuration."""
FINALIST_ROUNDS = 5
"""Fresh seeds that each finalist is retrained with at most."""
_SECRETS = ("access_key", "secret_key", "password")
"""What the query of a URL calls a secret."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_duration(value: object) -> object:
    """Seconds in a duration such as `90s`, `10m`, `1.5h`, `1h30m`; anything else is returned as it is.

    Raises:
        ValueError: `value` is a string and not such a duration.
    """
    if not isinstance(value, str):
        return value
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", value)
    if not parts or "".join(number + unit for number, unit in parts) != value:
        raise ValueError("should be a duration such as 90s, 10m or 1h30m")
    return float(sum(float(number) * _SECONDS[unit] for number, unit in parts))


def parse_size(value: object) -> object:
    """Bytes in a size such as `512M` or `1.5GiB`, in powers of 1024; anything else is returned as it is.

    Raises:
        ValueError: `value` is a string and not such a size.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])(?:iB)?", value)
    if found is None:
        raise ValueError("should be a size such as 512M or 1.5GiB")
    return int(float(found[1]) * _BYTES[found[2]])


Duration = Annotated[
    PositiveFloat,
    BeforeValidator(parse_duration),
    PlainSerializer(lambda seconds: f"{seconds:.15g}s", return_type=str),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^(\d+(\.\d+)?[smhd])+$"}]}
    ),
]
Size = Annotated[
    PositiveInt,
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^\d+(\.\d+)?[KMGT](iB)?$"},
            ]
        }
    ),
]
Probability = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of the configuration classes."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        # `try` is no name in Python.
        validate_by_name=True,
        serialize_by_alias=True,
    )


def has_credentials(place: str) -> bool:
    """Whether a URL carries a name, a password or a key, which would be written wherever the URL is."""
    url = urlsplit(place) if "://" in place else None
    return url is not None and ("@" in url.netloc or any(word in url.query for word in _SECRETS))


def refuse_credentials(source: str) -> str:
    """Validator of sources."""
    if has_credentials(source):
        raise ValueError("credentials in it would be written to the run folder; leave them to the environment")
    return source


def _check_database(place: str) -> str:
    if not place.startswith("postgresql://"):
        raise ValueError("should be a database such as postgresql://host/name")
    if has_credentials(place):
        raise ValueError("credentials in it would be written to the run folder; leave them to PGUSER and PGPASSWORD")
    return place


class DataConfig(Config):
    """Where the images come from and which of them are held out."""

    train: Annotated[str, AfterValidator(refuse_credentials)] = "sample"
    """A data set's name, or a CSV, Parquet or IDX path, glob or URL; `memory:KEY` is what Python gave in memory."""
    test: Annotated[str, AfterValidator(refuse_credentials)] | None = None
    """Source of the test split; null takes the name's own, and no test split for files."""
    fallback: str | None = None
    """Name that may stand in when `train` is a name whose data can't be had."""
    label: str | int = "label"
    """Column that holds the class: its name, or its position counted from 0."""
    shape: Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Field(strict=False)] | None = None
    """[height, width, channels] of a row of pixels; null infers a square single-channel image."""
    validation: Annotated[float, Field(gt=0, lt=1)] | Literal["test"] = 0.1
    """Fraction of each class held out of the training rows, or `test` to validate on the test split."""
    seed: NonNegativeInt = 0
    """Seed of the choice of held-out rows."""
    resize: PositiveInt | None = None
    """Pixels of the shorter side that the network sees, bilinear; null takes the images as they are."""
    memory: Size | None = None
    """Bytes of images that a process may hold, such as 2G, on its GPU if it has one; of a larger source it streams the
    rows from the cache, and shuffles them within so many. null takes what the machine (its GPUs aside) can spare for
    as many processes as it has CPUs."""


def _without_sign(name: object) -> object:
    return name[1:] if name in ("-images_per_second", "-parameters") and isinstance(name, str) else name


Objective = Annotated[
    Literal["val_accuracy", "images_per_second", "parameters"],
    BeforeValidator(_without_sign),
    WithJsonSchema({"enum": ["val_accuracy", "images_per_second", "-images_per_second", "parameters", "-parameters"]}),
]


class SearchConfig(Config):
    """How the space is explored and when to stop."""

    trials: PositiveInt = 60
    """Trials to start at most, the baseline among them."""
    time: Duration | None = None
    """Wall-clock seconds of the whole command, finalists and refit included."""
    cost: PositiveFloat | None = None
    """Money that the command may take, in the currency of `resources.price`."""
    metric: Literal["val_accuracy", "val_loss"] = "val_accuracy"
    """What decides: accuracy is maximised, loss minimised."""
    objectives: Annotated[tuple[Objective, ...], Field(strict=False)] = ()
    """Searches the Pareto front of these in place of one best trial: val_accuracy, and images_per_second of training or
    parameters or both. More accuracy, more images and fewer parameters are better, with or without a minus sign."""
    sampler: Literal["tpe", "random", "cmaes", "gp", "grid"] = "tpe"
    """Which values are tried: as those before suggest (tpe, cmaes, gp), at random, or all of a grid."""
    scheduler: Literal["asha", "hyperband", "median", "pbt", "none"] = "asha"
    """Which trials are stopped before their last epoch; pbt trains all of them to it, and has those that fall behind go
    on from the weights of a leader, with the leader's values a little changed."""
    rung: Literal["epochs", "seconds"] = "epochs"
    """What asha compares trials at equal amounts of; with seconds of training a slow network must earn its time."""
    finalists: NonNegativeInt = 3
    """Leaders retrained to the end with fresh seeds before one is chosen; 0 and 1 take the leader as it is."""
    tries: Annotated[tuple[dict[str, Any], ...], Field(alias="try", strict=False)] = ()
    """Values of ranges to start with, each entry like `trial`; what an entry leaves out is drawn."""
    storage: Annotated[str, AfterValidator(_check_database)] | None = None
    """Database of a study that several runs share, postgresql://HOST/NAME; null keeps it in the run folder."""
    refit: bool = True
    """Whether the winner is trained once more on the training and validation rows together."""
    seed: NonNegativeInt = 0
    """Seed of the sampler, and with the trial's number of everything random in a trial."""

    @model_validator(mode="after")
    def _seconds_need_a_time(self) -> SearchConfig:
        has_limit = self.time is not None or self.cost is not None
        if self.rung == "seconds" and not (has_limit and self.scheduler in ("asha", "hyperband")):
            raise ValueError("rung: seconds divides the time; set time or cost, and scheduler to asha or hyperband")
        return self

    @model_validator(mode="after")
    def _pbt_draws_at_random(self) -> SearchConfig:
        if self.scheduler == "pbt" and self.sampler != "random":
            raise ValueError(
                f"scheduler: pbt changes a trial's values as it trains, and sampler {self.sampler} learns from values "
                "that stay; set sampler to random"
            )
        return self

    @model_validator(mode="after")
    def _objectives_go_together(self) -> SearchConfig:
        if not self.objectives:
            return self
        names = self.objectives
        if names[0] != "val_accuracy" or self.metric != "val_accuracy" or not 1 < len(set(names)) == len(names):
            raise ValueError("objectives: expected val_accuracy, as search.metric is, and then others, each once")
        if self.sampler == "cmaes":
            raise ValueError("objectives: sampler cmaes has one objective only; take tpe, random, gp or grid")
        if self.scheduler in ("median", "pbt"):
            raise ValueError(
                f"objectives: scheduler {self.scheduler} compares by one metric; take asha, hyperband or none"
            )
        return self

    @property
    def mode(self) -> Literal["max", "min"]:
        """Direction of `metric`."""
        return "max" if self.metric == "val_accuracy" else "min"

    @property
    def retrained(self) -> int:
        """Leaders to be retrained with fresh seeds: none of a front, whose trial is taken by a rule."""
        return 0 if self.objectives else self.finalists

    @property
    def modes(self) -> list[Literal["max", "min"]]:
        """Directions of the objectives, or of `metric` where there are none."""
        return ["min" if name == "parameters" else "max" for name in self.objectives] or [self.mode]


class ResourcesConfig(Config):
    """What one trial gets."""

    workers: PositiveInt = 1
    """Processes that train one trial together (DDP)."""
    cpus: PositiveFloat | None = None
    """CPUs of each worker; null gives 1 to each worker of a search, and all to a single training."""
    gpus: NonNegativeFloat = 0
    """GPUs of each worker; a fraction lets trials share one."""
    price: PositiveFloat | None = None
    """What an hour of all machines together costs."""


class LoggingConfig(Config):
    """Where trials are logged beside the run folder; null is nowhere."""

    mlflow: str | None = None
    """URI of an MLflow server or store; its name and password come from MLflow's own environment variables."""
    wandb: str | None = None
    """Project of Weights & Biases; its key comes from its login or WANDB_API_KEY."""

    @model_validator(mode="after")
    def _no_credentials(self) -> LoggingConfig:
        if self.mlflow is not None and "@" in urlsplit(self.mlflow).netloc:
            # Of the whole section, so that the message does not repeat it.
            raise ValueError(
                "mlflow: a name or a password in the URI would be written to the run folder; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self


class ModelConfig(Config):
    """A residual network (He et al., 2016, https://arxiv.org/abs/1512.03385)."""

    depth: Literal[10, 18, 34, 50, 101, 152] = 10
    """Layers, as published from 18 on; 10 has one basic block a stage."""
    width: PositiveInt = 16
    """Channels of the first stage, doubled in each later one; 64 is the published width."""
    stem: Literal["small", "half", "imagenet"] = "half"
    """First layers: 3x3 stride 1; 3x3 stride 2; 7x7 stride 2 and max pooling as published."""
    head: Literal["replace", "stack"] = "replace"
    """One linear layer to the classes, or the published 1000-way layer and a second one upon it."""
    channels: Literal[1, 3] | None = None
    """Input channels; null takes the data's, and 3 repeats a grey image three times."""
    pretrained: str | None = None
    """Weights to start from: `imagenet`, a .safetensors or .pth file, or a run."""
    freeze: Annotated[int, Field(ge=0, le=5)] = 0
    """Stages kept as loaded: 0 none, 1 the stem, 2 to 5 the stem and layer1 to layer4."""
    unfreeze_epoch: Annotated[int, Field(ge=2)] | None = None
    """First epoch that trains the frozen stages too; null keeps them as loaded to the end."""

    @model_validator(mode="after")
    def _freezing_has_a_point(self) -> ModelConfig:
        if self.freeze and self.pretrained is None:
            raise ValueError("freeze keeps random weights when pretrained is null; set pretrained, or freeze to 0")
        if self.unfreeze_epoch is not None and not self.freeze:
            raise ValueError("unfreeze_epoch thaws nothing when freeze is 0; set freeze, or unfreeze_epoch to null")
        return self


class AugmentConfig(Config):
    """Random changes of each training image; zero and false switch one off."""

    flip: bool = True
    """Mirror left to right with probability 1/2."""
    translate: NonNegativeInt = 0
    """Largest shift in pixels, each axis alone; what comes in is zero."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest angle in degrees, either way."""
    erase: Probability = 0.0
    """Probability of filling a random rectangle with zero (Zhong et al., 2020, https://arxiv.org/abs/1708.04896)."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of the Beta distribution of mixup (Zhang et al., 2018, https://arxiv.org/abs/1710.09412)."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of the Beta distribution of CutMix (Yun et al., 2019, https://arxiv.org/abs/1905.04899)."""

    @model_validator(mode="after")
    def _one_mixing(self) -> AugmentConfig:
        if self.mixup and self.cutmix:
            raise ValueError("mixup and cutmix both mix pairs of images; set one of them to 0")
        return self


class OptimConfig(Config):
    """The optimizer and its learning rate over the steps."""

    name: Literal["adamw", "adam", "sgd", "muon"] = "muon"
    """Muon trains the convolutions (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon), AdamW the rest."""
    lr: PositiveFloat = 0.02
    """Peak learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd and muon (Nesterov's); adam and adamw keep their betas of 0.9 and 0.999."""
    weight_decay: NonNegativeFloat = 0.05
    """Decay of weights; norms and biases are left out. Decoupled but for sgd and adam."""
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    """Linear up over a quarter of the steps and linear down; cosine down to zero; or neither."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the target spread evenly over all classes."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each stage to the one before it (Howard and Ruder, 2018,
    https://arxiv.org/abs/1801.06146); 1 gives all stages one rate."""
    average: Literal["none", "ema", "last"] = "none"
    """Weights to evaluate and keep: the last step's, an exponential mean, or the mean of the last quarter."""


class TrialConfig(Config):
    """Everything that decides one training but its data and its seed."""

    epochs: PositiveInt = 6
    """Passes over the training rows."""
    batch_size: PositiveInt = 256
    """Images a step, over all workers."""
    drop_last: bool = False
    """Leave out the rows that don't fill a batch; false spreads all rows over batches of nearly one size."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Numbers of the forward and backward pass; auto is bf16 where the device computes in it."""
    compile: Literal["auto"] | bool = "auto"
    """Whether torch.compile makes the training step; auto does on a GPU, for long trainings."""
    normalize: bool = True
    """Shift and scale pixels by the training rows' mean and standard deviation; false only divides by 255."""
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()


MUTABLE = (
    *("optim.lr", "optim.momentum", "optim.weight_decay", "optim.label_smoothing"),
    *(f"augment.{name}" for name in AugmentConfig.model_fields),
)
"""What of a trial's configuration can change along its training; the rest, its network above all, stays with it."""


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping by dotted keys as mappings within mappings."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = copy.copy(value)
    return nested


def flatten(config: Config) -> dict[str, Scalar]:
    """The values of a configuration by dotted keys."""
    flat: dict[str, Scalar] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Config):
            flat |= {f"{name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            flat[name] = value
    return flat
