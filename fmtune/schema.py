"""The JSON Schema of the YAML, for editors."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import TypeAdapter

from fmtune.config import TrialConfig
from fmtune.recipes import RECIPES
from fmtune.spacefile import SECTIONS

_WHEN = {
    "type": "object",
    "description": "Search this only where other keys of `trial`, dotted, have one of the values listed.",
}


def create_schema() -> dict[str, Any]:
    """A schema (draft 2020-12) whose leaves below `trial` take a value or a range."""
    trial = _inline(TypeAdapter(TrialConfig).json_schema())
    properties: dict[str, Any] = {name: _inline(TypeAdapter(kind).json_schema()) for name, kind in SECTIONS.items()}
    properties["storage"] = {
        "type": ["string", "null"],
        "description": "Path of a folder that all nodes share, or URL (s3://, gs://), for Tune's own files and the "
        "finished run folder; null: all stays in the run folder.",
    }
    properties["baseline"] = {
        "anyOf": [{"enum": list(RECIPES)}, copy.deepcopy(trial)],
        "description": "Configuration of trial 0: a recipe by name, or fixed values as below `trial`.",
    }
    properties["trial"] = _with_ranges(trial)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fmtune search space",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its references replaced by what they refer to."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            target = definitions[node["$ref"].rpartition("/")[2]]
            return resolve({**target, **{key: value for key, value in node.items() if key != "$ref"}})
        return {key: resolve(value) for key, value in node.items()}

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def _with_ranges(node: dict[str, Any]) -> dict[str, Any]:
    """Each leaf of a configuration as that leaf or a range of it."""
    if "properties" in node:
        return {**node, "properties": {key: _with_ranges(value) for key, value in node["properties"].items()}}
    leaf = {key: value for key, value in node.items() if key not in ("title", "description", "default")}
    pair = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    kinds = {"choice": {"type": "array", "items": leaf, "minItems": 2}, "int": pair, "float": pair, "log": pair}
    ranges = [
        {
            "type": "object",
            "properties": {kind: values, "when": _WHEN},
            "required": [kind],
            "additionalProperties": False,
        }
        for kind, values in kinds.items()
    ]
    kept: dict[str, Any] = {key: node[key] for key in ("title", "description", "default") if key in node}
    return {**kept, "anyOf": [leaf, *ranges]}
