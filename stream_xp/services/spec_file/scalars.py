"""Scalar nodes to values."""

from __future__ import annotations

import math
import operator
import re
from decimal import Decimal
from typing import Any

import yaml
from msgspec import inspect

from stream_xp.services.spec_file.faults import did_you_mean, shown
from stream_xp.services.spec_file.nodes import TAG, described, mismatch

_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)?(\.[0-9_]*)?([eE][-+]?[0-9]{1,4})?")


def scalar_of(node: yaml.Node, kind: inspect.Type, hint: str) -> Any:
    """Return the value of a scalar node; raises ValueError with the fault."""
    if isinstance(kind, inspect.BoolType):
        return _boolean(node)
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        return _number(node, kind)
    if isinstance(kind, inspect.EnumType):
        return _choice(_string(node), kind)
    if isinstance(kind, inspect.StrType):
        return _checked_text(_string(node), kind, hint)
    raise ValueError("is of a kind that spec files do not hold")


def _boolean(node: yaml.Node) -> bool:
    if node.tag != f"{TAG}bool" or node.value.lower() not in yaml.SafeLoader.bool_values:
        raise mismatch("true or false", node)
    return bool(yaml.SafeLoader.bool_values[node.value.lower()])


def _string(node: yaml.Node) -> str:
    if node.tag == f"{TAG}str":
        return str(node.value)
    can_be_quoted = (
        isinstance(node, yaml.ScalarNode) and node.tag.startswith(TAG) and node.tag != f"{TAG}null"
    )
    raise ValueError(f"expected text, got {described(node)}{'; put it in quotes' if can_be_quoted else ''}")


def _choice(text: str, kind: inspect.EnumType) -> Any:
    members = {str(member.value): member for member in kind.cls}
    if text not in members:
        known = ", ".join(members)
        raise ValueError(f"must be one of {known}, got {shown(text)!r}{did_you_mean(text, members)}")
    return members[text]


def _checked_text(text: str, kind: inspect.StrType, hint: str) -> str:
    wrong = wrong_length(len(text), kind, "characters")
    if wrong:
        raise ValueError(wrong)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("holds half a surrogate pair, which is no character")
    if kind.pattern is not None and re.search(kind.pattern, text) is None:
        raise ValueError(f"must be {hint or f'text like {kind.pattern}'}, got {shown(text)!r}")
    return text


def _number(node: yaml.Node, kind: inspect.IntType | inspect.FloatType) -> int | float:
    whole = isinstance(kind, inspect.IntType)
    noun = "a whole number" if whole else "a number"
    text = node.value.replace("_", "") if isinstance(node, yaml.ScalarNode) else ""
    if node.tag not in (f"{TAG}int", f"{TAG}float"):
        raise ValueError(f"expected {noun}, got {described(node)}{_number_hint(node, text)}")
    if text.lower().strip("+-") in (".inf", ".nan"):
        raise ValueError(f"must be finite, got {shown(node.value)}")
    if not any(map(str.isdigit, text)) or _DECIMAL.fullmatch(text) is None:
        # YAML 1.1 reads 010 as 8, 1:30 as 90 and 0x10 as 16, which nobody means here.
        raise ValueError(f"expected {noun} in plain decimals, got {shown(node.value)!r}")
    if whole and node.tag != f"{TAG}int":
        raise ValueError(f"expected {noun}, got {shown(node.value)}")
    return _in_range(_parsed(text, whole=whole), kind)


def _parsed(text: str, *, whole: bool) -> int | float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"is too large for a number: {shown(text)}")
    return int(text) if whole else number


def _number_hint(node: yaml.Node, text: str) -> str:
    """Return what to write instead where YAML 1.1 reads 1e-3 and "0.1" as text."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != f"{TAG}str":
        return ""
    if not any(map(str.isdigit, text)) or _DECIMAL.fullmatch(text) is None:
        return ""
    if node.style is not None:
        return "; take the quotes away"
    plain = f"{Decimal(text):f}" if abs(Decimal(text).adjusted()) <= 30 else None
    return f"; YAML reads an exponent without point and sign as text{f', write {plain}' if plain else ''}"


def _in_range(number: float, kind: inspect.IntType | inspect.FloatType) -> int | float:
    checks = (
        (kind.gt, operator.gt, "greater than"),
        (kind.ge, operator.ge, "at least"),
        (kind.lt, operator.lt, "less than"),
        (kind.le, operator.le, "at most"),
    )
    for limit, holds, words in checks:
        if limit is not None and not holds(number, limit):
            raise ValueError(f"must be {words} {limit}, got {number!r}")
    return number


def wrong_length(length: int, kind: Any, noun: str) -> str | None:
    """What is wrong with the length of a text or list; None if nothing is."""
    if kind.min_length is not None and length < kind.min_length:
        return f"has {length} {noun}, needs at least {kind.min_length}"
    if kind.max_length is not None and length > kind.max_length:
        return f"has {length} {noun}, may have at most {kind.max_length}"
    return None
