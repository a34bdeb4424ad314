"""Rules for many experiments at once: of one file by itself, and of an experiment beside the others that run."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from stream_xp.domain.fields import Fault, broken
from stream_xp.domain.layers import (
    HOLDOUT_ARM,
    PROGRAM_ARM,
    Champion,
    Layer,
    free_slots,
    listed,
    shared_slots,
)
from stream_xp.domain.rollout import Mode

if TYPE_CHECKING:
    from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec

_SLACK = 1e-9


def layer_faults(spec: ExperimentSpec) -> list[Fault]:
    """Every rule that `layer`, `overlap`, `holdout`, `program` and `champion` of one file break."""
    return [
        *_slot_faults(spec.layer),
        *_overlap_faults(spec),
        *_holdout_faults(spec),
        *_champion_faults(spec),
    ]


def _slot_faults(layer: Layer | None) -> list[Fault]:
    if layer is None:
        return []
    ranges = layer.ranges
    faults = [
        Fault(("layer", "slots", at), message)
        for at, one in enumerate(ranges)
        for _, message in broken(
            (one.first > one.last, "", f"the first slot is over the last in {one}"),
            (
                one.last >= layer.of,
                "",
                f"the layer has the slots 0-{layer.of - 1}, {one} goes beyond them",
            ),
        )
    ]
    growing = [
        Fault(("layer", "slots", at), f"must grow from one to the next, {one} does not come after {before}")
        for at, (before, one) in enumerate(itertools.pairwise(ranges), start=1)
        if one.first <= before.last
    ]
    return faults or growing


def _overlap_faults(spec: ExperimentSpec) -> list[Fault]:
    overlap = spec.overlap
    if overlap is None:
        return []
    own = None if spec.layer is None else spec.layer.name
    approves = spec.conclusion is not None and spec.conclusion.mode is Mode.APPROVE
    faults = [
        Fault(
            ("overlap", field, at), f"{key!r} is {'its own layer' if key == own else 'the experiment itself'}"
        )
        for field, mine in (
            ("forbidden", spec.experiment),
            ("decisive", spec.experiment),
            ("forbidden_layers", own),
        )
        for at, key in enumerate(getattr(overlap, field))
        if key == mine
    ]
    both = [key for key in overlap.decisive if key in overlap.forbidden]
    return faults + [
        Fault(("overlap", field), message)
        for field, message in broken(
            (
                bool(both),
                "decisive",
                f"who is forbidden shares no unit, so cannot interact: {', '.join(both)}",
            ),
            (
                bool(overlap.decisive) and not approves,
                "decisive",
                "needs `conclusion: {mode: approve}`: it is the approval that an interaction keeps back",
            ),
        )
    ]


def _holdout_faults(spec: ExperimentSpec) -> list[Fault]:
    if not spec.holdout:
        wrong = Fault(("holdout",), "can only be true; leave it out otherwise")
        return [] if spec.holdout is None else [wrong]
    arms = {arm.key: arm for arm in spec.arms}
    layer = spec.layer
    named = set(arms) == {HOLDOUT_ARM, PROGRAM_ARM} and arms[HOLDOUT_ARM].control
    wrong_share = named and layer is not None and abs(arms[HOLDOUT_ARM].weight - layer.share) > _SLACK
    share = 0.0 if layer is None else layer.share
    found = broken(
        (layer is None, "holdout", "needs a layer, whose slots are the units that are held out"),
        (
            not named,
            "arms",
            f"a holdout has the two arms {HOLDOUT_ARM} (the control) and {PROGRAM_ARM}",
        ),
        (
            wrong_share,
            "arms",
            f"the weight of {HOLDOUT_ARM} must be the share of its slots, {share:g}: the slot is the arm",
        ),
        (
            bool(spec.guardrails),
            "metrics",
            "a holdout has no guardrail: stopping a program for harm is for people, metric by metric",
        ),
        (
            spec.conclusion is None or spec.conclusion.mode is not Mode.APPROVE,
            "conclusion",
            "a holdout needs `conclusion: {mode: approve}`: nobody is let out of it without a person",
        ),
        (
            spec.maximum_runtime is None,
            "holdout",
            "needs a maximum_runtime, such as 13w: after it other units should have their turn",
        ),
        (spec.ramp is not None, "ramp", "a holdout has no ramp"),
        (spec.allocation is not None, "allocation", "a holdout has no allocation: its weights are its slots"),
        (spec.program is not None, "program", "a holdout is in no program"),
        (spec.champion is not None, "champion", "a holdout has no champion"),
    )
    return [Fault((field,), message) for field, message in found]


def _champion_faults(spec: ExperimentSpec) -> list[Fault]:
    champion = spec.champion
    if champion is None or champion.experiment != spec.experiment or champion.version < spec.version:
        return []
    return [Fault(("champion", "version"), f"must be before this version, {spec.version}")]


# One experiment beside others ---------------------------------------------------------------------


class Relation(StrEnum):
    """What two experiments may have in common: an element of the overlap matrix.

    free: units. disjoint: none, they are in one layer. forbidden: none, one of them says so. held_out: no unit that
    the holdout, one of the two, holds out.
    """

    FREE = "free"
    DISJOINT = "disjoint"
    FORBIDDEN = "forbidden"
    HELD_OUT = "held_out"


def relation(one: ExperimentSpec, other: ExperimentSpec) -> Relation:
    """What two experiments may share; whichever is named first."""
    if _holds_out(one, other) or _holds_out(other, one):
        return Relation.HELD_OUT
    if _one_layer(one, other):
        return Relation.DISJOINT
    return Relation.FORBIDDEN if _forbids(one, other) or _forbids(other, one) else Relation.FREE


def decisive(one: ExperimentSpec, other: ExperimentSpec) -> bool:
    """Whether an interaction of the two keeps the first of them from being approved."""
    return one.overlap is not None and other.experiment in one.overlap.decisive


def _holds_out(holdout: ExperimentSpec, other: ExperimentSpec) -> bool:
    if not holdout.holdout or other.holdout:
        return False
    return other.program == holdout.experiment or _one_layer(holdout, other)


def _one_layer(one: ExperimentSpec, other: ExperimentSpec) -> bool:
    return one.layer is not None and other.layer is not None and one.layer.name == other.layer.name


def _forbids(one: ExperimentSpec, other: ExperimentSpec) -> bool:
    overlap = one.overlap
    if overlap is None:
        return False
    layer = None if other.layer is None else other.layer.name
    return other.experiment in overlap.forbidden or layer in overlap.forbidden_layers


class Collision(msgspec.Struct, frozen=True, kw_only=True):
    """Why an experiment cannot stand beside another one.

    Attributes:
        path: the field of the experiment.
        message: the rule.
        other: the other experiment; None where one is missing.
        other_path: the field of the other one.
    """

    path: tuple[str | int, ...]
    message: str
    other: str | None = None
    other_path: tuple[str | int, ...] = ()


def collisions(
    spec: ExperimentSpec, others: Collection[ExperimentSpec], *, complete: bool
) -> list[Collision]:
    """Every rule that keeps an experiment from running beside others.

    Args:
        spec: the experiment.
        others: those that run, at most one version of each; that of `spec` itself is passed over.
        complete: whether `others` are all that there are, so that what is not among them is missing.
    """
    beside = [other for other in others if other.experiment != spec.experiment]
    found = [one for other in beside for one in _pair(spec, other, _free_in(spec, beside))]
    return found + _program_missing(spec, beside, complete=complete)


def _free_in(spec: ExperimentSpec, beside: Iterable[ExperimentSpec]) -> str:
    if spec.layer is None:
        return ""
    of_layer = [other.layer for other in beside if other.layer and other.layer.name == spec.layer.name]
    return listed(free_slots(of_layer, spec.layer.of))


def _pair(spec: ExperimentSpec, other: ExperimentSpec, free: str) -> list[Collision]:
    return [
        *_layer_collisions(spec, other, free),
        *_holdout_collisions(spec, other),
        *_forbidden_collisions(spec, other),
    ]


def _layer_collisions(spec: ExperimentSpec, other: ExperimentSpec, free: str) -> list[Collision]:
    mine, theirs, name = spec.layer, other.layer, other.experiment
    if mine is None or theirs is None:
        return []
    if mine.name != theirs.name:
        salt = f"the layer {theirs.name} of {name} is hashed with {mine.seed} too, so their units are not independent"
        return _said([(mine.seed == theirs.seed, "salt", salt)], other)
    layer = f"layer {mine.name}"
    both = shared_slots(mine, theirs)
    checks = [
        (mine.of != theirs.of, "of", f"{layer} has {theirs.of} slots in {name}, {mine.of} here"),
        (
            mine.seed != theirs.seed,
            "salt",
            f"{layer} is hashed with {theirs.seed} in {name}, {mine.seed} here",
        ),
        (bool(both), "slots", f"{name} takes {listed(both)} of {layer} already; free are {free}"),
    ]
    unit = f"{layer} is of {other.unit!r} in {name}, of {spec.unit!r} here: the unit is what is hashed"
    units = [Collision(path=("unit",), message=unit, other=name, other_path=("unit",))]
    return _said(checks, other) + (units if spec.unit != other.unit else [])


def _said(checks: list[tuple[bool, str, str]], other: ExperimentSpec) -> list[Collision]:
    return [
        Collision(
            path=("layer", field),
            message=message,
            other=other.experiment,
            other_path=("layer", field),
        )
        for field, message in broken(*checks)
    ]


def _holdout_collisions(spec: ExperimentSpec, other: ExperimentSpec) -> list[Collision]:
    mine, name = spec.program == other.experiment, other.experiment
    theirs = other.program == spec.experiment
    one_layer = _one_layer(spec, other) and bool(spec.holdout) != bool(other.holdout)
    checks = (
        (mine and not other.holdout, "program", f"{name} is no holdout"),
        (
            theirs and not spec.holdout,
            "holdout",
            f"{name} names this experiment as its holdout, and it is none",
        ),
        (
            (mine or theirs) and spec.unit != other.unit and not _one_layer(spec, other),
            "unit",
            f"is {spec.unit!r} here, {other.unit!r} in {name}: what is held out is told by the unit",
        ),
        (
            one_layer and not spec.holdout and spec.program is None,
            "layer",
            f"{name} holds out units of it: name a holdout as `program`, so that what ships stays away from them",
        ),
        (
            one_layer and bool(spec.holdout) and other.program is None,
            "layer",
            f"{name} is in this layer and names no holdout as its `program`, so what it ships would reach all units",
        ),
    )
    return [
        Collision(path=(field,), message=message, other=name, other_path=("program",))
        for field, message in broken(*checks)
    ]


def _forbidden_collisions(spec: ExperimentSpec, other: ExperimentSpec) -> list[Collision]:
    if relation(spec, other) is not Relation.FORBIDDEN:
        return []
    mine, name = _forbids(spec, other), other.experiment
    who = f"it may share no unit with {name}" if mine else f"{name} may share no unit with it"
    message = f"{who}, and both would run: give them slots of one layer, or let one end first"
    return [
        Collision(
            path=("overlap",) if mine else ("experiment",),
            message=message,
            other=name,
            other_path=("experiment",) if mine else ("overlap",),
        )
    ]


def _program_missing(
    spec: ExperimentSpec, beside: Iterable[ExperimentSpec], *, complete: bool
) -> list[Collision]:
    program = spec.program
    if program is None or not complete or any(other.experiment == program for other in beside):
        return []
    return [Collision(path=("program",), message=f"no holdout {program} runs")]


def no_champion(champion: Champion, record: ExperimentRecord | None) -> str | None:
    """Why the record of the version that a champion names does not make it one; None if it does.

    It must have ended by a ship of that arm, so the arm has all units by its newest weight epoch, and is no control.
    """
    version = f"{champion.experiment} version {champion.version}"
    if record is None:
        return f"there is no {version}, or the topic does not hold it any more"
    arms = [arm.key for arm in record.spec.arms]
    if champion.arm not in arms:
        return f"{version} has no arm {champion.arm}; it has {', '.join(arms)}"
    last = record.epochs[-1]
    if not last.final:
        return f"{version} has not ended, so nothing shipped"
    if champion.arm == record.spec.control.key or last.weights[champion.arm] != 1.0:
        shipped = next(arm for arm, weight in last.weights.items() if weight == 1.0)
        stopped = shipped == record.spec.control.key
        return (
            f"{version} did not ship {champion.arm}: it {'was stopped' if stopped else f'shipped {shipped}'}"
        )
    return None
