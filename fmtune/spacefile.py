"""Reading a search-space file: where each value stands, and every mistake in it at once."""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from fmtune.config import (
    MUTABLE,
    Config,
    DataConfig,
    LoggingConfig,
    ResourcesConfig,
    Scalar,
    SearchConfig,
    TrialConfig,
    flatten,
    has_credentials,
    nest,
    refuse_credentials,
)
from fmtune.datasets import NAMES
from fmtune.errors import SpaceError, first_line
from fmtune.files import is_url
from fmtune.ranges import Choice, Interval, Range, is_range, parse_range
from fmtune.recipes import RECIPES

SECTIONS: dict[str, type[Config]] = {
    "data": DataConfig,
    "search": SearchConfig,
    "resources": ResourcesConfig,
    "logging": LoggingConfig,
}
KEYS = (*SECTIONS, "storage", "baseline", "trial")
"""Top-level keys of the file."""
_STORES = ("s3", "gs", "file")
"""Schemes of the URLs that `storage` takes: those that both pyarrow and Ray write to."""
_WEIGHTS = "expected imagenet, a .safetensors, .pth or .pt file, or an earlier run by its folder or name"


class Document:
    """The file's content, and where each of its values stands."""

    def __init__(self, content: dict[str, Any], source: str, lines: Mapping[str, int]) -> None:
        self.content = content
        self._source = source
        self._lines = lines
        self._overridden: dict[str, str] = {}

    @classmethod
    def of_mapping(cls, mapping: Mapping[str, Any]) -> Document:
        return cls(_plain(mapping), "space", {})

    @classmethod
    def of_file(cls, path: Path) -> Document:
        """Parse a YAML file.

        Raises:
            SpaceError: the file is missing or is no YAML mapping.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise SpaceError(f"{path}: no such file; expected a search space in YAML") from None
        except (OSError, UnicodeDecodeError) as error:
            raise SpaceError(f"{path}: can't be read as text ({error})") from None
        try:
            content = YAML().load(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark
            line = f":{mark.line + 1}" if mark else ""
            raise SpaceError(f"{path}{line}: not valid YAML: {first_line(error.problem or error)}") from None
        except YAMLError as error:
            raise SpaceError(f"{path}: not valid YAML: {first_line(error)}") from None
        if not isinstance(content, CommentedMap):
            raise SpaceError(f"{path}: expected a mapping with keys {', '.join(KEYS)}")
        return cls(_plain(content), str(path), dict(_lines_of(content)))

    def override(self, assignment: str) -> None:
        """Set a dotted key from `KEY=VALUE`, the value in YAML.

        Raises:
            SpaceError: there is no `=`, the value is not valid YAML, or a parent of the key is no mapping.
        """
        place = f"--set {assignment}"
        key, equals, text = assignment.partition("=")
        if not (key and equals):
            raise SpaceError(f"{place}: expected KEY=VALUE, such as search.trials=20")
        try:
            value = _plain(YAML(typ="safe").load(io.StringIO(text)))
        except YAMLError as error:
            raise SpaceError(f"{place}: not valid YAML: {first_line(error)}") from None
        self.replace(key, value, place)

    def replace(self, key: str, value: Any, place: str) -> None:
        """Set a dotted key to a plain value that the user gave at `place`.

        Raises:
            SpaceError: a parent of the key is no mapping.
        """
        *parents, last = key.split(".")
        node = self.content
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise SpaceError(f"{place}: `{parent}` is a value and has no keys below it")
        node[last] = value
        self._overridden[key] = place

    def is_overridden(self, key: str) -> bool:
        """Whether the user gave a dotted key, or a parent of it, beside the file."""
        return any(f"{key}.".startswith(f"{other}.") for other in self._overridden)

    def place(self, key: str, problem: str) -> str:
        """File and line, or override, of a dotted key or its nearest parent.

        Where values don't go together, it is the override of one that the problem names.
        """
        named = set(re.findall(r"\w+", problem))
        for other, place in self._overridden.items():
            if other.startswith(f"{key}.") and other.rpartition(".")[2] in named:
                return place
        while True:
            if key in self._overridden:
                return self._overridden[key]
            if key in self._lines:
                return f"{self._source}:{self._lines[key]}"
            if "." not in key:
                return self._source
            key = key.rpartition(".")[0]


@dataclass
class Sections:
    """The validated parts of a file; the trial's values by dotted key."""

    data: DataConfig = field(default_factory=DataConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    storage: str | None = None
    baseline: str | dict[str, Any] = "seed"
    fixed: dict[str, Scalar] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)


class SpaceReader:
    """Reads a document into sections and gathers what is wrong with it.

    Args:
        document: the file.
        runs: folder of run folders whose names starting weights may go by; None where each is a path already.
    """

    def __init__(self, document: Document, runs: Path | None = None) -> None:
        self._document, self._runs = document, runs
        self._problems: list[str] = []
        self._idle: set[str] = set()

    def read(self) -> Sections:
        """The sections.

        Raises:
            SpaceError: one line for each mistake.
        """
        content = self._find_weights(self._document.content, "")
        sections = Sections()
        for key in content:
            if key not in KEYS:
                self._add(key, f"unknown key; {_hint(key, KEYS)}")
        for name, kind in SECTIONS.items():
            setattr(sections, name, self._read_config(kind, content.get(name), name) or kind())
        sections.storage = self._read_storage(content.get("storage"))
        sections.baseline = self._read_baseline(content.get("baseline", "seed"))
        self._read_trial(content.get("trial"), sections)
        self._check_batch_sizes(sections)
        if sections.search.sampler == "grid":
            self._check_grid(sections.ranges)
        if sections.search.scheduler == "pbt" and not set(MUTABLE) & set(sections.ranges):
            self._add("search.scheduler", f"pbt changes values along a training; search one of {', '.join(MUTABLE)}")
        self._check_companions(sections)
        self._read_tries(sections)
        if self._problems:
            raise SpaceError(*self._problems)
        return sections

    def _find_weights(self, node: Any, key: str) -> Any:
        """The content with starting weights as absolute paths: trials run in folders of their own."""
        if isinstance(node, dict):
            return {
                name: self._find_weights(value, key if name == "choice" else f"{key}.{name}".removeprefix("."))
                for name, value in node.items()
            }
        if isinstance(node, list):
            return [self._find_weights(item, key) for item in node]
        if key.endswith("pretrained") and isinstance(node, str) and node != "imagenet":
            return self._find_path(node, key)
        return node

    def _find_path(self, weights: str, key: str) -> str:
        """The file or folder of this very path, or else the run of this name."""
        if self._runs is None:
            return str(Path(weights).resolve())
        places = (Path(weights), self._runs / weights)
        found = next((place for place in places if place.exists()), None)
        if found is None:
            looked_for = " and no ".join(dict.fromkeys(map(str, places)))
            self._add(key, f"{weights!r}; there is no {looked_for}; {_WEIGHTS}")
            return weights
        return str(found.resolve())

    def _read_config(self, kind: type[Config], values: Any, name: str) -> Config | None:
        try:
            return kind.model_validate({} if values is None else values)
        except ValidationError as error:
            self._add_errors(error, kind, name)
            return None

    def _read_storage(self, storage: Any) -> str | None:
        if storage is None:
            return None
        if not isinstance(storage, str):
            self._add("storage", f"{storage!r}; expected null, or the path or URL of a folder that all nodes share")
            return None
        try:
            refuse_credentials(storage)
        except ValueError as error:
            self._add("storage", str(error))
            return None
        if is_url(storage) and urlsplit(storage).scheme not in _STORES:
            self._add("storage", f"{storage!r}; expected a path, or a URL of {', '.join(_STORES)}")
            return None
        # A path is the same wherever the run goes on from.
        return storage if is_url(storage) else os.path.abspath(storage)

    def _read_baseline(self, baseline: Any) -> str | dict[str, Any]:
        if isinstance(baseline, dict):
            self._read_config(TrialConfig, baseline, "baseline")
            return baseline
        if not isinstance(baseline, str) or baseline not in RECIPES:
            self._add(
                "baseline", f"{baseline!r}; expected {' or '.join(RECIPES)}, or a mapping like `trial` of fixed values"
            )
            return "seed"
        return baseline

    def _read_trial(self, trial: Any, sections: Sections) -> None:
        if not isinstance(trial, dict | None):
            self._add("trial", f"{trial!r}; expected a mapping with keys {', '.join(TrialConfig.model_fields)}")
            return
        given: dict[str, Any] = {}
        for key, value in leaves(trial or {}):
            if is_range(value):
                self._read_range(key, value, sections)
            else:
                given[key] = value
        # Ranges stand at their defaults here, so that a mistake in a fixed value is told once.
        config = self._read_config(TrialConfig, nest(given), "trial")
        if config is not None:
            sections.fixed = {key: value for key, value in flatten(config).items() if key not in sections.ranges}
            for key, searched in sections.ranges.items():
                self._check_condition(key, searched, sections)
            self._fix_idle_ranges(sections)

    def _read_range(self, key: str, value: dict[str, Any], sections: Sections) -> None:
        defaults = flatten(TrialConfig())
        try:
            searched = parse_range(value)
            if isinstance(searched, Choice) and isinstance(defaults.get(key), float):
                searched = searched.of_floats()
        except ValueError as error:
            self._add(f"trial.{key}", str(error))
            return
        if key not in defaults:
            self._check_value(key, None)
            return
        fits = [self._check_value(key, candidate) for candidate in searched.candidates]
        if all(fits):
            sections.ranges[key] = searched

    def _check_value(self, key: str, value: Scalar) -> bool:
        """Whether one value of a range fits the field that it is for, all else at its default."""
        try:
            TrialConfig.model_validate(nest({key: value}))
        except ValidationError as error:
            located = [
                one
                for one in error.errors()
                if _dotted(one["loc"]).startswith(key) or key.startswith(_dotted(one["loc"]))
            ]
            own = [one for one in located if one["type"] != "value_error"]
            for one in own[:1]:
                self._add(f"trial.{key}", _describe(one, TrialConfig, value))
            return not own
        return True

    def _check_batch_sizes(self, sections: Sections) -> None:
        """Find batches without an image for each of a trial's workers."""
        workers, searched = sections.resources.workers, sections.ranges.get("batch_size")
        smallest = min(searched.candidates) if searched else sections.fixed.get("batch_size")  # type: ignore[type-var]
        baseline = sections.baseline
        given = baseline if isinstance(baseline, dict) else RECIPES[baseline].model_dump()
        for place, size in (("trial", smallest), ("baseline", given.get("batch_size", TrialConfig().batch_size))):
            # What is no number is told of elsewhere.
            if isinstance(size, int) and size < workers:
                self._add(f"{place}.batch_size", f"{size}; expected {workers} or more, an image for each worker")

    def _check_grid(self, ranges: Mapping[str, Range]) -> None:
        for key, searched in ranges.items():
            if isinstance(searched, Interval) and searched.kind != "int":
                self._add(
                    f"trial.{key}", f"{searched.kind}: a grid has no end on it; use choice, or another search.sampler"
                )

    def _check_companions(self, sections: Sections) -> None:
        """Find values that want another section, or a data set, to go with."""
        if sections.search.cost is not None and sections.resources.price is None:
            self._add("search.cost", "what an hour costs is not known; set resources.price")
        workers, gpus = sections.resources.workers, sections.resources.gpus
        if workers > 1 and not float(gpus).is_integer():
            self._add("resources.gpus", f"{gpus}; expected a whole number: {workers} workers can't share a GPU")
        if sections.data.fallback is not None and sections.data.fallback not in NAMES:
            self._add("data.fallback", f"{sections.data.fallback!r}; {_hint(sections.data.fallback, NAMES)}")

    def _read_tries(self, sections: Sections) -> None:
        """Check the configurations to start with, and leave out of them what the user has set otherwise."""
        tries = []
        if sections.search.tries and sections.search.sampler == "grid":
            self._add("search.try", "a grid goes by its own order; leave it out, or take another search.sampler")
        for i, values in enumerate(sections.search.tries):
            kept = {}
            for key, value in leaves(values):
                searched = sections.ranges.get(key)
                if searched is not None and searched.contains(value):
                    kept[key] = value
                elif key not in self._idle and not self._document.is_overridden(f"trial.{key}"):
                    self._add(f"search.try.{i}", _describe_try(key, value, sections.ranges))
            tries.append(nest(kept))
        sections.search = sections.search.model_copy(update={"tries": tuple(tries)})

    def _check_condition(self, key: str, searched: Range, sections: Sections) -> None:
        known = (*sections.fixed, *sections.ranges)
        for other, allowed in searched.when.items():
            if other not in known:
                self._add(f"trial.{key}", f"when: unknown key `{other}`; {_hint(other, known)}")
            elif other in sections.fixed:
                for value in allowed:
                    self._check_value(other, value)
            elif other in sections.ranges and not any(sections.ranges[other].contains(value) for value in allowed):
                self._add(f"trial.{key}", f"when: never searched, for no value of {other} is one of {list(allowed)}")
            elif self._depends_on(other, key, sections.ranges, frozenset()):
                self._add(f"trial.{key}", f"when: `{other}` depends on `{key}` in turn")

    def _fix_idle_ranges(self, sections: Sections) -> None:
        """Leave at their defaults the ranges whose conditions never hold, for what they ask of is fixed otherwise."""
        defaults, fixed, ranges = flatten(TrialConfig()), sections.fixed, sections.ranges

        def is_idle(searched: Range) -> bool:
            return any(other in fixed and fixed[other] not in allowed for other, allowed in searched.when.items())

        # What is fixed so may be what others ask of.
        while idle := [key for key, searched in ranges.items() if is_idle(searched)]:
            for key in idle:
                del ranges[key]
                fixed[key] = defaults[key]
            self._idle |= set(idle)

    def _depends_on(self, key: str, target: str, ranges: Mapping[str, Range], seen: frozenset[str]) -> bool:
        if key == target:
            return True
        if key not in ranges or key in seen:
            return False
        return any(self._depends_on(other, target, ranges, seen | {key}) for other in ranges[key].when)

    def _add_errors(self, error: ValidationError, kind: type[Config], section: str) -> None:
        told = set()
        for one in error.errors():
            key = _dotted((section, *_key_path(kind, one["loc"])))
            if key not in told:
                told.add(key)
                self._add(key, _describe(one, kind, one["input"]))

    def _add(self, key: str, problem: str) -> None:
        self._problems.append(f"{self._document.place(key, problem)}: {key}: {problem}")


def _describe_try(key: str, value: Scalar, ranges: Mapping[str, Range]) -> str:
    """What is wrong with a value to start with."""
    if key not in ranges:
        return f"{key} is not searched; {_hint(key, tuple(ranges))}"
    return f"{key}: {value!r}; expected a value of its range, {ranges[key].as_yaml()}"


def _describe(error: Any, kind: type[BaseModel], value: Any) -> str:
    """What is wrong with a value and what would be right, from one of pydantic's errors."""
    if error["type"] == "extra_forbidden":
        return f"unknown key; {_hint(str(error['loc'][-1]), _fields_at(kind, error['loc'][:-1]))}"
    if error["type"] == "value_error":
        reason = str(error["ctx"]["error"])
        is_secret = isinstance(value, str) and has_credentials(value)
        return reason if isinstance(value, dict) or is_secret else f"{value!r}; {reason}"
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{value!r}; expected a mapping with keys {', '.join(_fields_at(kind, error['loc']))}"
    expected = (
        error["msg"].removeprefix("Input should be ").replace("a valid integer", "an integer").replace("valid ", "")
    )
    return f"{value!r}; expected {expected}"


def _key_path(kind: type[BaseModel], location: tuple[Any, ...]) -> tuple[Any, ...]:
    """A location without the branches of a union that pydantic appends to it."""
    path: list[Any] = []
    node: Any = kind
    for part in location:
        path.append(part)
        if not (isinstance(node, type) and issubclass(node, BaseModel)) or part not in node.model_fields:
            break
        node = node.model_fields[part].annotation
    return tuple(path)


def _fields_at(kind: type[BaseModel], location: tuple[Any, ...]) -> tuple[str, ...]:
    node: Any = kind
    for part in location:
        node = node.model_fields[part].annotation
    return tuple(field.alias or name for name, field in node.model_fields.items())


def _hint(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else f"expected one of {', '.join(known)}"


def _dotted(location: tuple[Any, ...]) -> str:
    return ".".join(map(str, location))


def leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values and ranges by dotted key; an empty mapping within counts as its defaults."""
    for key, value in mapping.items():
        if isinstance(value, dict) and not is_range(value):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lines_of(mapping: CommentedMap, prefix: str = "") -> Iterator[tuple[str, int]]:
    for key, value in mapping.items():
        # What a merge key (<<) brings in has no place of its own.
        place = (mapping.lc.data or {}).get(key, (mapping.lc.line,))
        yield f"{prefix}{key}", place[0] + 1
        if isinstance(value, CommentedMap):
            yield from _lines_of(value, f"{prefix}{key}.")


def _plain(value: Any) -> Any:
    """ruamel's containers and scalars as Python's own, which strict validation wants."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, ScalarBoolean):  # an int to Python
        return bool(value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
