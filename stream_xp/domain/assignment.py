"""Which arm a unit gets: the reference for every application, in whatever language.

The service assigns nobody; applications do, by what stands on ``xp.config``. Everything is a function of the unit and
of texts that are published, through one hash, so two applications always agree and nothing has to be kept:

    h(text) = the first 12 hexadecimal digits of SHA-256 of the UTF-8 bytes of the text, as a whole number
    slot    = h("slot:" + salt + ":" + unit) mod (number of slots)
    covered = h("coverage:" + experiment + ":" + version + ":" + unit) / 2**48 < coverage
    arm     = the first in the order of the keys' bytes whose cumulated weight is over
              h("arm:" + experiment + ":" + version + ":" + unit) / 2**48

Where a config has a ``uniform_slice`` u, with K arms that have a weight, a unit is drawn in two steps:

    in the slice = h("uniform:" + experiment + ":" + version + ":" + unit) / 2**48 < u
    arm in it    = by weights of 1 / K each
    arm outside  = by what the slice leaves, max(0, weight - u / K), and the number of the arm times 1 - u

So all units together have the weights, and the propensity is the weight as ever. The exposure of a unit in the slice
says so: the segment ``uniform_segment`` of it is ``uniform``.

48 bits are a whole number in every language, also where all numbers are doubles, and the quotient is exact. Salts and
keys hold no colon, so no two texts are confused. The hashes begin with different words, so they are independent
of one another; so are those of two layers, and of two experiments.

Weights are added up as doubles, one after the other in that order. What rounding leaves over falls to the last arm
that has a weight.

``topics/vectors/assignment.v1.json`` holds known answers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, NamedTuple

from stream_xp.domain.decision import ConfigRecord, LayerConfig, RolloutStatus
from stream_xp.domain.layers import HOLDOUT_ARM, PROGRAM_ARM, Layer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stream_xp.domain.experiment import ExperimentSpec, WeightEpoch

HASH: Final = "sha256-48"
"""Name of the hash on ``xp.config``; another one would move every unit, so it would be another name."""
_DIGITS: Final = 12
_ALL: Final = 2**48


class Assigned(NamedTuple):
    """What a unit gets.

    Attributes:
        arm: None where the unit has no part in the experiment and gets the control.
        exposed: whether the application is to send an exposure when the unit meets the arm.
        propensity: of the exposure; None without one.
        uniform: whether it is of the uniform slice; the exposure's segment `config.uniform_segment` is then `uniform`.
    """

    arm: str | None
    exposed: bool = False
    propensity: float | None = None
    uniform: bool = False


NO_PART: Final = Assigned(None)


def hash48(text: str) -> int:
    """The hash of a text: 0 to 2**48 - 1."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:_DIGITS], 16)


def layer_config(layer: Layer | None) -> LayerConfig | None:
    """What applications need to know of a layer."""
    if layer is None:
        return None
    slots = tuple((first, last) for first, last in layer.ranges)
    return LayerConfig(name=layer.name, salt=layer.seed, of=layer.of, slots=slots, hash=HASH)


def slot_of(salt: str, unit: str, of: int) -> int:
    """The slot of a unit in a layer of `of` slots."""
    return hash48(f"slot:{salt}:{unit}") % of


def in_slots(layer: LayerConfig, unit: str) -> bool:
    """Whether a unit is in one of the slots.

    Raises:
        ValueError: the layer is hashed in a way that is not known here.
    """
    if layer.hash != HASH:
        raise ValueError(f"layer {layer.name} is hashed by {layer.hash!r}, known is {HASH}")
    slot = slot_of(layer.salt, unit, layer.of)
    return any(first <= slot <= last for first, last in layer.slots)


def fraction(purpose: str, config: ConfigRecord, unit: str) -> float:
    """A number in [0, 1) of a unit, for `coverage`, `uniform` or `arm` of an experiment version."""
    return hash48(f"{purpose}:{config.experiment}:{config.version}:{unit}") / _ALL


def drawn(weights: Mapping[str, float], number: float) -> str:
    """The arm of a number in [0, 1).

    Raises:
        ValueError: no arm has a weight.
    """
    total, last = 0.0, None
    for arm in sorted(weights):
        if weights[arm] > 0.0:
            total, last = total + weights[arm], arm
            if number < total:
                return arm
    if last is None:
        raise ValueError("no arm has a weight")
    return last


def uniform_share(spec: ExperimentSpec, epoch: WeightEpoch) -> float:
    """Share of the units that are drawn evenly first: of a spec whose exposures tell it, until the experiment ends."""
    told = spec.allocation is not None and spec.allocation.uniform_segment is not None and not epoch.final
    return spec.allocation.uniform_slice if told and spec.allocation is not None else 0.0


def drawn_in_two_steps(weights: Mapping[str, float], number: float, *, share: float, inside: bool) -> str:
    """The arm of a number in [0, 1), for a unit inside or outside of a uniform slice of a share below 1.

    Raises:
        ValueError: no arm has a weight.
    """
    opened = [arm for arm in weights if weights[arm] > 0.0]
    if inside and opened:
        return drawn(dict.fromkeys(opened, 1 / len(opened)), number)
    left = {arm: max(0.0, weights[arm] - share / len(opened)) for arm in opened}
    # Rounding may leave nothing of weights that are the slice alone.
    return drawn(left if any(left.values()) else weights, number * (1.0 - share))


def held_out(holdout: ConfigRecord, unit: str) -> bool:
    """Whether a holdout keeps a unit from its program.

    While it runs, the units in its slots; all units once it was stopped, none once the program was shipped.

    Raises:
        ValueError: it is no holdout, or its layer is hashed in a way that is not known here.
    """
    if not holdout.holdout or holdout.layer is None:
        raise ValueError(f"{holdout.experiment} is no holdout")
    if holdout.status is RolloutStatus.RUNNING:
        return in_slots(holdout.layer, unit)
    return holdout.weights.get(HOLDOUT_ARM, 0.0) > 0.0


def assigned(
    config: ConfigRecord, unit: str, *, context: str = "", holdout: ConfigRecord | None = None
) -> Assigned:
    """What a unit gets in an experiment.

    Args:
        config: of the experiment; the weights in force, so the newest record whose `effective_ms` has come.
        unit: what is randomised; the Kafka key of its events.
        context: the unit's value of the segment `config.context`; empty where there is none.
        holdout: the config of the experiment that `config.program` names.

    Raises:
        ValueError: `holdout` is not the one that the config names, or a hash is not known here.
    """
    if (None if holdout is None else holdout.experiment) != config.program:
        raise ValueError(f"{config.experiment}: needs the config of the holdout {config.program}")
    if holdout is not None and held_out(holdout, unit):
        return NO_PART
    if config.status is not RolloutStatus.RUNNING:
        return Assigned(drawn(config.weights, 0.0))
    inside = config.layer is None or in_slots(config.layer, unit)
    weights = config.contexts.get(context, config.weights)
    if config.holdout:
        arm = HOLDOUT_ARM if inside else PROGRAM_ARM
        return Assigned(arm, exposed=True, propensity=weights[arm])
    if not inside or not fraction("coverage", config, unit) < config.coverage:
        return NO_PART
    number, share = fraction("arm", config, unit), config.uniform_slice
    if not share:
        arm = drawn(weights, number)
        return Assigned(arm, exposed=True, propensity=weights[arm])
    uniform = fraction("uniform", config, unit) < share
    arm = drawn_in_two_steps(weights, number, share=share, inside=uniform)
    return Assigned(arm, exposed=True, propensity=weights[arm], uniform=uniform)
