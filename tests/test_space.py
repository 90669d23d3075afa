from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest

from fmtune.config import TrialConfig, flatten
from fmtune.errors import SpaceError
from fmtune.recipes import SEED
from fmtune.space import Space
from fmtune.spacefile import leaves

SPACES = Path(__file__).parent.parent / "search_spaces"
SHIPPED = sorted(SPACES.glob("*.yaml"))
CONDITIONAL: dict[str, Any] = {
    "trial": {
        "optim": {
            # Written before what it depends on.
            "momentum": {"float": [0.8, 0.9], "when": {"optim.name": ["sgd", "muon"]}},
            "name": {"choice": ["sgd", "muon", "adamw"]},
        }
    }
}


def _problems(text: str, tmp_path: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    """What a file is refused for, without the folder."""
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(SpaceError) as raised:
        Space.load(path, overrides)
    return [line.replace(f"{tmp_path}/", "") for line in raised.value.lines]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_spaces_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    space = Space.load(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(space.to_yaml())
    assert Space.load(resolved) == space


def test_seed_yaml_is_the_seed_recipe() -> None:
    """The baseline's recipe stands in the code, `fmtune train`'s in the YAML: one and the same."""
    space = Space.load(Path(__file__).parent.parent / "search_spaces" / "seed.yaml")
    assert space.trial_config({}) == SEED
    assert space.data.validation == "test"


def test_all_mistakes_are_told_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = """\
data: {train: sample, validaton: 0.1}
search:
  trials: 0
  time: 10x
trial:
  model:
    depth: {choice: [10, 19]}
  optim:
    wieght_decay: 0.1
    lr: {log: [0, 1]}
    momentum: {float: [0.8, 1.2]}
"""
    assert _problems(text, tmp_path) == [
        "s.yaml:1: data.validaton: unknown key; did you mean `validation`?",
        "s.yaml:3: search.trials: 0; expected greater than 0",
        "s.yaml:4: search.time: '10x'; should be a duration such as 90s, 10m or 1h30m",
        "s.yaml:7: trial.model.depth: 19; expected 10, 18, 34, 50, 101 or 152",
        "s.yaml:10: trial.optim.lr: log: [0, 1]; expected low above 0",
        "s.yaml:11: trial.optim.momentum: 1.2; expected less than 1",
        "s.yaml:9: trial.optim.wieght_decay: unknown key; did you mean `weight_decay`?",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("trial: {epochs: 3, epochs: 4}", "s.yaml:1: not valid YAML: found duplicate key"),
        ("trial: [1", "s.yaml:1: not valid YAML"),
        ("- 1", "s.yaml: expected a mapping with keys"),
        ("resorces: {}", "s.yaml:1: resorces: unknown key; did you mean `resources`?"),
        ("search: 3", "s.yaml:1: search: 3; expected a mapping with keys trials"),
        ("trial: {optim: {lr: -1.0}}", "s.yaml:1: trial.optim.lr: -1.0; expected greater than 0"),
        ("trial: {optim: {lr: .nan}}", "s.yaml:1: trial.optim.lr: nan; expected"),
        ("trial: {augment: {flip: 1}}", "s.yaml:1: trial.augment.flip: 1; expected a boolean"),
        ("trial: {model: {choice: [1, 2]}}", "s.yaml:1: trial.model:"),
        ("trial: {epochs: {int: [3]}}", "s.yaml:1: trial.epochs: int: [3]; expected two numbers, [low, high]"),
        ("trial: {epochs: {int: [3, 3]}}", "s.yaml:1: trial.epochs: int: [3, 3]; expected low below high"),
        ("trial: {epochs: {int: [1, 3], step: 1}}", "s.yaml:1: trial.epochs: a range with keys int, step; expected"),
        ("trial: {epochs: {float: [1, 3]}}", "s.yaml:1: trial.epochs: 1.0; expected an integer"),
        ("trial: {epochs: {choice: [1, 1]}}", "s.yaml:1: trial.epochs: choice: [1, 1]; expected two or more different"),
        (
            "trial: {optim: {momentum: {float: [0.8, 0.9], when: {optim.nam: [sgd]}}}}",
            "s.yaml:1: trial.optim.momentum: when: unknown key `optim.nam`; did you mean `optim.name`?",
        ),
        (
            "trial: {optim: {name: adamw, momentum: {float: [0.8, 0.9], when: {optim.name: [sgdd]}}}}",
            "s.yaml:1: trial.optim.name: 'sgdd'; expected 'adamw', 'adam', 'sgd' or 'muon'",
        ),
        ("data: {fallback: sampl}", "s.yaml:1: data.fallback: 'sampl'; did you mean `sample`?"),
        (
            "search: {sampler: grid, try: [{epochs: 2}]}\ntrial: {epochs: {choice: [2, 3]}}",
            "s.yaml:1: search.try: a grid goes by its own order; leave it out, or take another search.sampler",
        ),
        (
            "trial: {epochs: {int: [1, 3], when: {batch_size: 8}}, batch_size: {choice: [8, 9], when: {epochs: 2}}}",
            "s.yaml:1: trial.epochs: when: `batch_size` depends on `epochs` in turn",
        ),
        (
            "trial: {augment: {mixup: {choice: [0.0, 0.2]}, cutmix: {float: [0.1, 1]}}}",
            "s.yaml:1: trial.augment: mixup and cutmix both mix pairs of images; set one of them to 0",
        ),
        (
            "trial: {model: {freeze: {int: [0, 5]}}}",
            "s.yaml:1: trial.model: freeze keeps random weights when pretrained is null",
        ),
        (
            "search: {try: [{epochs: 2, optim: {lr: 3.0}}]}\ntrial: {epochs: 2, optim: {lr: {log: [0.1, 1]}}}",
            "s.yaml:1: search.try.0: epochs is not searched; expected one of optim.lr",
        ),
        (
            "search: {try: [{optim: {lr: 3.0}}]}\ntrial: {optim: {lr: {log: [0.1, 1]}}}",
            "s.yaml:1: search.try.0: optim.lr: 3.0; expected a value of its range, {'log': [0.1, 1]}",
        ),
        ("baseline: sed", "s.yaml:1: baseline: 'sed'; expected seed or default, or a mapping"),
        (
            "search: {sampler: grid}\ntrial: {optim: {lr: {log: [0.1, 1]}}}",
            "s.yaml:2: trial.optim.lr: log: a grid has no end on it; use choice",
        ),
        (
            "resources: {workers: 4}\ntrial:\n  batch_size: 3",
            "s.yaml:3: trial.batch_size: 3; expected 4 or more, an image for each worker",
        ),
        (
            "resources: {workers: 4}\ntrial:\n  batch_size: {choice: [8, 3, 16]}",
            "s.yaml:3: trial.batch_size: 3; expected 4 or more",
        ),
        ("resources: {workers: 4}\ntrial: {batch_size: {int: [3, 9]}}", "s.yaml:2: trial.batch_size: 3; expected 4"),
        ("resources: {workers: 4}\nbaseline:\n  batch_size: 3", "s.yaml:3: baseline.batch_size: 3; expected 4 or more"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(text: str, problem: str, tmp_path: Path) -> None:
    problems = _problems(text, tmp_path)
    assert problems[0].startswith(problem)


def test_anchors_and_merge_keys_are_taken(tmp_path: Path) -> None:
    """What a merge brings in is told at the line of the mapping that it is merged into."""
    shared = "trial: &shared {epochs: 2, augment: {flip: &flip false}}\n"
    (tmp_path / "s.yaml").write_text(shared + "baseline: {<<: *shared, batch_size: 64, normalize: *flip}\n")
    space = Space.load(tmp_path / "s.yaml")
    assert (space.baseline.epochs, space.baseline.batch_size) == (2, 64)
    assert not space.baseline.augment.flip and not space.baseline.normalize
    assert _problems("trial: &shared {epochs: 0}\nbaseline: {<<: *shared}\n", tmp_path) == [
        "s.yaml:2: baseline.epochs: 0; expected greater than 0",
        "s.yaml:1: trial.epochs: 0; expected greater than 0",
    ]


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"no\.yaml: no such file"):
        Space.load(tmp_path / "no.yaml")


def test_overrides_set_values_ranges_and_sections(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("trial: {epochs: 3}")
    overrides = ["trial.epochs=5", "search.time=1h30m", "trial.optim.lr={log: [0.1, 1]}", "data.test=x.csv"]
    space = Space.load(path, overrides)
    assert space.fixed["epochs"] == 5
    assert space.search.time == 5400
    assert space.ranges["optim.lr"].candidates == (0.1, 1)
    assert space.data.test == "x.csv"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("trial.epochs", "--set trial.epochs: expected KEY=VALUE, such as search.trials=20"),
        ("trial.epochs=none", "--set trial.epochs=none: trial.epochs: 'none'; expected an integer"),
        ("trial.epochs.x=1", "--set trial.epochs.x=1: `epochs` is a value and has no keys below it"),
        ("trial.epoch=1", "--set trial.epoch=1: trial.epoch: unknown key; did you mean `epochs`?"),
        ("trial.epochs=[", "--set trial.epochs=[: not valid YAML"),
        ("trial.model.freeze=3", "--set trial.model.freeze=3: trial.model: freeze keeps random weights"),
    ],
)
def test_a_mistake_in_an_override_is_told_as_one(override: str, problem: str, tmp_path: Path) -> None:
    assert _problems("trial: {epochs: 3}", tmp_path, (override,))[0].startswith(problem)


def test_conditions_hold_for_the_sampler() -> None:
    """A range is drawn where its condition holds and nowhere else, whatever the order in the file."""
    space = Space.load(CONDITIONAL)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(30):
        trial = study.ask()
        drawn = space.suggest(trial)
        assert ("optim.momentum" in drawn) == (drawn["optim.name"] in ("sgd", "muon"))
        assert trial.params == drawn
        seen.add(drawn["optim.name"])
    assert seen == {"sgd", "muon", "adamw"}


def test_a_sample_becomes_its_configuration() -> None:
    space = Space.load(CONDITIONAL)
    config = space.trial_config({"optim.name": "adamw"})
    assert config.optim.name == "adamw"
    # What is not drawn is as TrialConfig has it.
    assert config.optim.momentum == TrialConfig().optim.momentum
    assert space.params_of(config) == {"optim.name": "adamw"}


def test_everything_unsaid_is_trial_configs_default() -> None:
    assert flatten(Space.load({}).trial_config({})) == flatten(TrialConfig())


def test_the_baseline_trains_as_long_as_the_longest_trial() -> None:
    assert Space.load({"trial": {"epochs": {"int": [2, 7]}}}).baseline == SEED.model_copy(update={"epochs": 7})


def test_the_grid_is_every_combination_that_conditions_allow() -> None:
    """2 x 2 for sgd, and adamw once, whose momentum is not searched."""
    names = {"choice": ["sgd", "adamw"]}
    momenta = {"choice": [0.8, 0.9], "when": {"optim.name": "sgd"}}
    space = Space.load(
        {
            "search": {"sampler": "grid", "trials": 99},
            "trial": {"epochs": {"int": [1, 2]}, "optim": {"name": names, "momentum": momenta}},
        }
    )
    keys = ("epochs", "optim.name", "optim.momentum")
    points = [tuple(point[key] for key in keys if key in point) for point in space.grid()]
    sgd = [(epochs, "sgd", momentum) for epochs in (1, 2) for momentum in (0.8, 0.9)]
    assert sorted(points, key=str) == sorted([*sgd, (1, "adamw"), (2, "adamw")], key=str)
    assert space.trials == 7


def test_of_a_grid_of_billions_only_what_is_asked_for_is_made() -> None:
    wide = {"int": [1, 1000]}
    trial = {"epochs": wide, "batch_size": wide, "model": {"width": wide}}
    space = Space.load({"search": {"sampler": "grid", "trials": 5}, "trial": trial})
    assert space.trials == 5
    planned = space.planned(0, lambda config: 0.0, seed=0)
    assert [planned[number]["model.width"] for number in range(1, 6)] == [1, 2, 3, 4, 5]


def test_a_relative_storage_is_of_the_working_folder_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on from elsewhere finds its trials."""
    monkeypatch.chdir(tmp_path)
    assert Space.load({"storage": "kept"}).storage == str(tmp_path / "kept")
    assert Space.load({"storage": "s3://bucket/kept"}).storage == "s3://bucket/kept"


@pytest.mark.parametrize(
    ("search", "limit"),
    [
        ({}, None),
        ({"time": "2m"}, 120),
        ({"cost": 3.0}, 5400),
        ({"cost": 3.0, "time": "1h"}, 3600),
        ({"cost": 1.0, "time": "1h"}, 1800),
    ],
)
def test_time_is_bounded_by_what_the_cost_pays_for_too(search: dict[str, Any], limit: float | None) -> None:
    """Hand-worked at a price of 2 an hour."""
    space = Space.load({"search": search, "resources": {"price": 2.0}, "trial": {}})
    assert space.time_limit == limit


def test_the_first_random_trials_are_the_cheapest_of_them_first() -> None:
    """After what is to be tried; the draws are those of the seed, and lie in the ranges."""

    def plan(seed: int) -> dict[int, dict[str, Any]]:
        search = {"try": [{"epochs": 9}], "seed": seed}
        space = Space.load({"search": search, "trial": {"epochs": {"int": [1, 9]}, "optim": {"lr": {"log": [0.1, 1]}}}})
        return space.planned(6, lambda config: config.epochs, space.search.seed)

    planned = plan(seed=1)
    assert list(planned) == [1, 2, 3, 4, 5, 6, 7]
    assert planned[1] == {"epochs": 9}
    epochs = [planned[number]["epochs"] for number in range(2, 8)]
    assert epochs == sorted(epochs) and len(set(epochs)) > 1
    assert all(0.1 <= planned[number]["optim.lr"] <= 1 for number in range(2, 8))
    assert plan(seed=1) == planned != plan(seed=2)


def test_the_first_random_trials_cover_every_range_evenly() -> None:
    """Of nine points three have each optimizer, and each ninth of the learning rates holds one, on its logarithm."""
    optim = {"name": {"choice": ["sgd", "adamw", "muon"]}, "lr": {"log": [1e-9, 1.0]}}
    space = Space.load({"trial": {"epochs": {"int": [1, 9]}, "optim": optim}})
    planned = space.planned(9, lambda config: 0, seed=1).values()
    assert sorted(point["epochs"] for point in planned) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert Counter(point["optim.name"] for point in planned) == {"sgd": 3, "adamw": 3, "muon": 3}
    assert sorted(math.floor(math.log10(float(point["optim.lr"]))) for point in planned) == list(range(-9, 0))


def test_a_cost_without_a_price_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"search\.cost: what an hour costs is not known; set resources\.price"):
        Space.load({"search": {"cost": 3.0}, "trial": {}})


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("s3://key:secret@bucket/x", "credentials in it would be written to the run folder"),
        ("s3://bucket/x?access_key=key&secret_key=secret", "credentials in it would be written to the run folder"),
        ("ftp://bucket/x", "expected a path, or a URL of s3, gs, file"),
        (3, "expected null, or the path or URL of a folder"),
    ],
)
def test_a_storage_that_none_could_write_to_is_refused(storage: object, words: str) -> None:
    with pytest.raises(SpaceError, match=f"storage: .*{words}") as raised:
        Space.load({"storage": storage, "trial": {}})
    assert "secret@" not in str(raised.value) and "=secret" not in str(raised.value)


@pytest.mark.parametrize("key", ["train", "test"])
def test_sources_with_credentials_are_refused(key: str) -> None:
    with pytest.raises(SpaceError, match=rf"data\.{key}: .*credentials in it would be written") as raised:
        Space.load({"data": {key: "s3://key:secret@bucket/x.csv"}, "trial": {}})
    assert "secret" not in str(raised.value)


def test_batches_of_an_image_for_each_worker_are_taken() -> None:
    """The lowest size counts, and it is just enough; with one worker any size is."""
    sizes = {"batch_size": {"int": [4, 9]}}
    assert Space.load({"resources": {"workers": 4}, "trial": sizes}).resources.workers == 4
    assert Space.load({"trial": {"batch_size": 1}}).fixed["batch_size"] == 1


def _run_folder(path: Path) -> str:
    path.mkdir(parents=True)
    return str(path.resolve())


def test_starting_weights_may_go_by_the_name_of_a_run(tmp_path: Path) -> None:
    """Wherever a file may have them: fixed, in a choice, in its conditions, in what is tried, and in the baseline."""
    runs = tmp_path / "runs"
    one, two = _run_folder(runs / "one"), _run_folder(runs / "two")
    content = {
        "search": {"try": [{"model": {"pretrained": "two"}}]},
        "baseline": {"model": {"pretrained": "one"}},
        "trial": {
            "model": {
                "pretrained": {"choice": ["imagenet", "one", "two"]},
                "freeze": {"int": [0, 5], "when": {"model.pretrained": ["two"]}},
            }
        },
    }
    space = Space.load(content, runs=runs)
    assert space.ranges["model.pretrained"].candidates == ("imagenet", one, two)
    assert space.ranges["model.freeze"].when == {"model.pretrained": (two,)}
    assert space.planned(0, lambda config: 0, 0) == {1: {"model.pretrained": two}}
    assert space.baseline.model.pretrained == one
    # As a run keeps it, it needs neither the folder of runs nor this working directory.
    resolved = tmp_path / "space.yaml"
    resolved.write_text(space.to_yaml())
    assert Space.load(resolved, runs=tmp_path / "elsewhere") == Space.load(resolved) == space


def test_a_path_goes_before_the_name_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named, here = _run_folder(tmp_path / "runs" / "one"), tmp_path / "one"
    content = {"trial": {"model": {"pretrained": "one"}}}
    assert Space.load(content, runs=Path("runs")).fixed["model.pretrained"] == named
    here.touch()
    assert Space.load(content, runs=Path("runs")).fixed["model.pretrained"] == str(here.resolve())


def test_starting_weights_that_are_not_there_are_told_with_all_else(tmp_path: Path) -> None:
    """With what was looked for; an absolute path is no name."""
    path = tmp_path / "s.yaml"
    path.write_text("trial:\n  epochs: 0\n  model:\n    pretrained: {choice: [one, /nowhere/two]}\n")
    with pytest.raises(SpaceError) as raised:
        Space.load(path, runs=Path("my-runs"))
    expected = "expected imagenet, a .safetensors, .pth or .pt file, or an earlier run by its folder or name"
    assert raised.value.lines == (
        f"{path}:4: trial.model.pretrained: 'one'; there is no one and no my-runs/one; {expected}",
        f"{path}:4: trial.model.pretrained: '/nowhere/two'; there is no /nowhere/two; {expected}",
        f"{path}:2: trial.epochs: 0; expected greater than 0",
    )


def test_a_range_whose_condition_never_holds_stays_at_its_default() -> None:
    """As `freeze` does where no weights are loaded; what depends on it is asked of that default."""
    model = {
        "pretrained": None,
        "freeze": {"int": [0, 5], "when": {"model.pretrained": ["imagenet"]}},
        "unfreeze_epoch": {"choice": [None, 2], "when": {"model.freeze": [1, 2, 3]}},
    }
    space = Space.load({"trial": {"model": model, "epochs": {"int": [1, 3], "when": {"model.freeze": 0}}}})
    assert list(space.ranges) == ["epochs"]
    assert (space.fixed["model.freeze"], space.fixed["model.unfreeze_epoch"]) == (0, None)


@pytest.mark.parametrize("name", ["default", "finetune", "gpu"])
@pytest.mark.parametrize(
    ("override", "tried"),
    [
        ("trial.optim.lr=0.005", {"optim.name", "model.freeze", "batch_size"}),
        ("trial.optim.lr={log: [0.004, 0.005]}", {"optim.name", "model.freeze", "batch_size"}),
        ("trial.optim.name=sgd", {"optim.lr"}),
        ("trial.model={}", {"optim.lr"}),
    ],
)
def test_what_is_set_goes_before_what_is_to_be_tried(name: str, override: str, tried: set[str], tmp_path: Path) -> None:
    """The shipped files take it, and keep of their configurations to start with what is still searched."""
    space = Space.load(SPACES / f"{name}.yaml", [override])
    for one in space.search.tries:
        kept = dict(leaves(one))
        assert kept and kept.keys() <= space.ranges.keys()
        assert all(space.ranges[key].contains(value) for key, value in kept.items())
    given = {key for one in space.search.tries for key, _ in leaves(one)}
    assert given & tried
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(space.to_yaml())
    assert Space.load(resolved) == space


def test_whole_numbers_in_a_choice_of_a_float_are_floats() -> None:
    """As a configuration has them, so that what is read of one is found among the values."""
    space = Space.load({"trial": {"augment": {"cutmix": {"choice": [0, 1.0]}}, "epochs": {"choice": [1, 2]}}})
    assert repr(space.ranges["augment.cutmix"].candidates) == "(0.0, 1.0)"
    assert repr(space.ranges["epochs"].candidates) == "(1, 2)"


@pytest.mark.parametrize("value", [2.5, True, 9, "3"])
def test_what_is_to_be_tried_is_a_value_of_its_range(value: Any) -> None:
    with pytest.raises(SpaceError, match=r"space: search\.try\.0: epochs: .*; expected a value of its range"):
        Space.load({"search": {"try": [{"epochs": value}]}, "trial": {"epochs": {"int": [1, 8]}}})


def test_an_override_is_blamed_only_for_what_the_problem_names(tmp_path: Path) -> None:
    (problem,) = _problems("trial: {model: {freeze: 3}}", tmp_path, ("trial.model.width=8",))
    assert problem.startswith("s.yaml:1: trial.model: freeze keeps")


def test_a_condition_may_ask_for_what_is_set_otherwise() -> None:
    space = Space.load(SPACES / "default.yaml", ["trial.optim.name=adamw"])
    assert "optim.momentum" not in space.ranges
    assert "optim.momentum" not in dict(leaves(space.search.tries[0]))
