"""The first form of an evaluation's file, with one field for each kind of measure, brought into the present form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.evaluate.labels import distinct_labels

LISTS = {"recall": "recall", "tasks": "lm_eval"}  # fields with several results of a variant, and their measures
SINGLE = ("size", "latency", "perplexity")
REQUESTS = ("perplexity", "recall", "lm_eval", "latency")


def from_schema_1(value: dict[str, Any]) -> dict[str, Any]:
    """The object of a file with `"schema": 1` as one of schema 2; any other object as it is.

    Raises:
        ValueError: a part of it has not the form that it had.
    """
    if value.get("schema") != 1:
        return value
    kept = {key: part for key, part in value.items() if key not in (*REQUESTS, "schema", "variants")}
    recalls = [_object(request, "recall") for request in _listed(value, "recall")]
    labels = distinct_labels([str(request.get("task")) for request in recalls], recalls)
    return {
        **kept,
        "schema": 2,
        "asked": [{"measure": "kv_bytes"}, {"measure": "size"}, *_asked(value)],
        "variants": [
            _variant(row, list(zip(labels, recalls, strict=True)), value.get("batch_size"))
            for row in _listed(value, "variants")
        ],
    }


def _asked(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []
    for name in REQUESTS:
        request = value.get(name)
        if name == "recall":
            asked += [{"measure": name, "tasks": _listed(value, name)}] if value.get(name) else []
        elif request is not None:
            asked.append({"measure": name, **_object(request, name)})
    return asked


def _variant(row: Any, recalls: list[tuple[str, Mapping[str, Any]]], batch_size: Any) -> Any:
    if not isinstance(row, Mapping):
        return row
    results: list[dict[str, Any]] = [{"measure": "kv_bytes", "held": row.get("kv_bytes", {})}]
    for name in SINGLE:
        if row.get(name) is not None:
            results.append({"measure": name, **_object(row[name], name)})
    for key, name in LISTS.items():
        for number, result in enumerate(_listed(row, key)):
            more: dict[str, Any] = {}
            if name == "recall":
                if len(_listed(row, key)) != len(recalls):
                    raise ValueError(f"variants: expected {len(recalls)} results of recall, got {len(row[key])}")
                label, request = recalls[number]
                more = {"task": label, "haystack": request.get("haystack", ""), "batch_size": batch_size}
            results.append({"measure": name, **_object(result, key), **more})
    known = {"kv_bytes", *SINGLE, *LISTS}
    return {key: part for key, part in row.items() if key not in known} | {"results": results}


def _object(part: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(part, Mapping):
        raise ValueError(f"{what}: expected an object")
    return part


def _listed(value: Mapping[str, Any], key: str) -> list[Any]:
    part = value.get(key, [])
    if not isinstance(part, list):
        raise ValueError(f"{key}: expected a list")
    return part
