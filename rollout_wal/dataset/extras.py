"""Free-form values as JSON that says again exactly what went in.

What is logged with a prompt may be more than JSON knows: bytes, and mappings whose keys are not text. Those are marked,
so that whoever knows only JSON still reads all the rest:

    bytes               {"!bytes": "base64"}
    a key 3, null, ...  "!3", "!null", ...: an exclamation mark, then the key as JSON
    a key "!x"          "!!x"
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any

import numpy as np

_MARK = "!"
_BYTES = "!bytes"


def extras_to_json(values: Mapping[Any, Any]) -> str:
    """Plain types as JSON: None, booleans, numbers (numpy's too), text, bytes, and lists and mappings of them.

    Raises:
        TypeError: a value that is none of these, or a tuple as a key.
    """
    return json.dumps(_marked(values), sort_keys=True)


def extras_from_json(text: str) -> dict[Any, Any]:
    """The inverse of `extras_to_json`. Tuples come back as lists, numpy's scalars as plain numbers."""
    values: dict[Any, Any] = _unmarked(json.loads(text))
    return values


def _marked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_key(key): _marked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item) for item in value]
    if isinstance(value, bytes | bytearray):
        return {_BYTES: b64encode(value).decode()}
    return value.item() if isinstance(value, np.generic) else value


def _key(key: Any) -> str:
    if isinstance(key, str):
        return _MARK + key if key.startswith(_MARK) else key
    if isinstance(key, tuple):  # it would come back as a list, which is no key
        raise TypeError(f"a mapping has the key {key!r:.100}")
    return _MARK + json.dumps(_marked(key))


def _unmarked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmarked(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _BYTES in value:
        return b64decode(value[_BYTES])
    return {_unkey(key): _unmarked(item) for key, item in value.items()}


def _unkey(key: str) -> Any:
    if not key.startswith(_MARK):
        return key
    return key[1:] if key.startswith(2 * _MARK) else _unmarked(json.loads(key[1:]))
