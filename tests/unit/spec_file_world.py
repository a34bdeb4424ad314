"""A valid experiment file, and the faults that an edit of it brings."""

from __future__ import annotations

import pytest

from stream_xp.services.spec_file import SpecFault, SpecFaults, parse_spec

VALID = """\
experiment: canary
owner: a@example.com
hypothesis: it does no harm
unit: member
arms:
  - key: old
    weight: 0.9
    control: true
  - key: new
    weight: 0.1
metrics:
  - key: errors
    kind: conversion
    role: guardrail
    direction: decrease
    attribution_window: 10m
    margin:
      absolute: 0.005
  - key: spend
    kind: mean
    role: secondary
    direction: increase
    attribution_window: 1d
    bound: 100
    scale: 0.01
planned_sample: 20_000
alpha: 0.05
minimum_runtime: 1d
maximum_runtime: 7d
segments:
  device: [tv, web]
"""


def faults_of(text: str | bytes) -> list[SpecFault]:
    raw = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(SpecFaults) as caught:
        parse_spec(raw, "f.yaml")
    return list(caught.value.faults)


def edited(old: str, new: str) -> str:
    assert VALID.count(old) == 1, old
    return VALID.replace(old, new)
