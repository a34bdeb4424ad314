"""Exact inverse-propensity sums: what weights that adapt leave behind, merged by addition.

When a bandit changes the weights, each unit is assigned with a propensity of its own, logged **as of its
assignment**. Its inverse is quantised once to whole steps of 2^-24, values are whole quantisation steps, and
every sum is an integer of any size; so merging is addition and order never matters.

`PropensitySums` belongs to one arm. It is complete for the augmented inverse-propensity estimate with *frozen*
centres: constants, set in the design, that outcomes are compared with before they are weighted (0 by default,
which is the plain inverse-propensity estimate). A good constant narrows the sequence, a bad one widens it;
none biases it. Centres that follow the data, from earlier units only, get the variance further down (to the
variance around the arm's current mean, where a constant leaves the variance around the constant: for a metric
of mean m and variance v, with weights near one half, the factor is about (v + (m - centre)^2) / v), and they
follow drift. `RunningAipw` has such centres; its price is that its updates depend on the order of batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stream_xp.stats._codec import decimal, integer, pack, unpack
from stream_xp.stats.moments import Moments

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

GRID_BITS = 24
GRID = 1 << GRID_BITS
SMALLEST_PROPENSITY = 1e-9

_SUMS, _RUNNING, _VERSION = "IPSM", "AIPW", 1
_SUMS_FIELDS = ("units", "inverse", "n", "s", "q", "w", "ww", "wy", "wwy", "wyy", "wwyy")
_RUNNING_FIELDS = (
    "control_n", "control_s", "control_q", "treatment_n", "treatment_s", "treatment_q",
    "psi", "psi_squares", "control_inverse", "treatment_inverse",
)  # fmt: skip


def inverse_weight(propensity: float) -> int:
    """Return 1 / propensity in whole steps of 2^-24, rounded to the nearest.

    The rounding changes the expected weight of a unit, 1, by at most 3e-8.

    Args:
        propensity: probability of the arm as of the unit's assignment, in [1e-9, 1].

    Raises:
        ValueError: `propensity` is out of that range.

    """
    if isinstance(propensity, bool) or not SMALLEST_PROPENSITY <= propensity <= 1:
        raise ValueError(f"propensity must lie in [{SMALLEST_PROPENSITY}, 1], got {propensity!r}")
    return round(GRID / propensity)


@dataclass(frozen=True, slots=True)
class PropensitySums:
    """Inverse-propensity sums of one arm over the units that might have got it.

    w is 1 / propensity of this arm for a unit, in steps of 2^-24; y its value in quantisation steps. The
    first two sums run over all units, whichever arm they got, the rest over the units of the arm.

    Attributes:
        units: number of all units randomised while the arm was open.
        inverse: sum of w over all of them.
        n: number of units in the arm.
        s: sum of y.
        q: sum of y^2.
        w: sum of w.
        ww: sum of w^2.
        wy: sum of w y.
        wwy: sum of w^2 y.
        wyy: sum of w y^2.
        wwyy: sum of w^2 y^2.

    Raises:
        ValueError: a field is no Python int, a count is negative, or the sums are impossible for real units
            (by w >= 1, by n <= units, or by Cauchy-Schwarz).

    """

    units: int
    inverse: int
    n: int
    s: int
    q: int
    w: int
    ww: int
    wy: int
    wwy: int
    wyy: int
    wwyy: int

    def __post_init__(self) -> None:
        _check_integers(self, _SUMS_FIELDS)
        if not 0 <= self.n <= self.units:
            raise ValueError("n must not be negative and must be at most units")
        if self.w < GRID * self.n or self.inverse - self.w < GRID * (self.units - self.n):
            raise ValueError("w and inverse must come from propensities of at most 1")
        if self.n == 0 and any((self.s, self.q, self.w, self.ww, self.wy, self.wwy, self.wyy, self.wwyy)):
            raise ValueError("s, q, w, ww, wy, wwy, wyy and wwyy must be 0 when n is 0")
        for name, square, left, right in (
            ("q", self.s, self.n, self.q),
            ("ww", self.w, self.n, self.ww),
            ("wyy", self.wy, self.w, self.wyy),
            ("wwyy", self.wwy, self.ww, self.wwyy),
            ("wwyy", self.wyy, self.q, self.wwyy),
        ):
            if square * square > left * right or right < 0:
                raise ValueError(f"{name} must be possible for real units by Cauchy-Schwarz")

    @classmethod
    def empty(cls) -> PropensitySums:
        """Return the sums of no unit, the identity of `merge`."""
        return cls(*(0 for _ in _SUMS_FIELDS))

    @classmethod
    def from_units(
        cls, values: Sequence[int], propensities: Sequence[float], *, elsewhere: Iterable[float] = ()
    ) -> PropensitySums:
        """Return the sums of single units.

        Args:
            values: one Python int, in quantisation steps, per unit of the arm.
            propensities: of this arm, for these units, as of their assignment, in [1e-9, 1].
            elsewhere: propensities of *this* arm for the units that got another one.

        Raises:
            ValueError: `values` and `propensities` differ in length, or a propensity is out of its range.

        """
        if len(values) != len(propensities):
            raise ValueError(f"propensities must be as many as values, {len(values)}")
        pairs = [(inverse_weight(p), y) for y, p in zip(values, propensities, strict=True)]
        others = [inverse_weight(p) for p in elsewhere]
        rows: list[tuple[int, ...]] = [
            (1, w, 1, y, y * y, w, w * w, w * y, w * w * y, w * y * y, w * w * y * y) for w, y in pairs
        ]
        rows.append((len(others), sum(others), *(0 for _ in _SUMS_FIELDS[2:])))
        return cls(*(sum(column) for column in zip(*rows, strict=True)))

    @classmethod
    def from_epoch(cls, moments: Moments, *, propensity: float, units: int) -> PropensitySums:
        """Return the sums of one weight epoch, in which every unit had the same propensity of this arm.

        Args:
            moments: of the arm's units in the epoch.
            propensity: of the arm in the epoch, in [1e-9, 1].
            units: all units of the epoch, whichever arm they got, >= moments.n.

        Raises:
            ValueError: an argument breaks a rule above.

        """
        w, (n, s, q) = inverse_weight(propensity), (moments.n, moments.s, moments.q)
        return cls(units, w * units, n, s, q, w * n, w * w * n, w * s, w * w * s, w * q, w * w * q)

    def merge(self, other: PropensitySums) -> PropensitySums:
        """Return the sums of both sets of units together; the same as ``self + other``."""
        return self + other

    def __add__(self, other: PropensitySums) -> PropensitySums:
        """Return the sums of both sets of units together; exact, commutative and associative."""
        if not isinstance(other, PropensitySums):
            return NotImplemented
        return PropensitySums(*(a + b for a, b in zip(self.integers, other.integers, strict=True)))

    def __sub__(self, other: PropensitySums) -> PropensitySums:
        """Return the sums without the units of `other`; ValueError if they cannot be part of these."""
        if not isinstance(other, PropensitySums):
            return NotImplemented
        return PropensitySums(*(a - b for a, b in zip(self.integers, other.integers, strict=True)))

    @property
    def integers(self) -> tuple[int, ...]:
        """The eleven fields in their order."""
        return tuple(getattr(self, name) for name in _SUMS_FIELDS)

    @property
    def moments(self) -> Moments:
        """The plain moments of the arm's values."""
        return Moments(self.n, self.s, self.q)

    def to_bytes(self) -> bytes:
        """Return the binary form, kind "IPSM", version 1: the eleven fields in order; canonical."""
        return pack(_SUMS, _VERSION, self.integers)

    @classmethod
    def from_bytes(cls, data: bytes) -> PropensitySums:
        """Return the sums of a binary form.

        Raises:
            ValueError: `data` is damaged, of another kind or version, or its sums are impossible.

        """
        return cls(*_unpacked(data, _SUMS, _SUMS_FIELDS))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: the version, and each field as a decimal string."""
        return _json(self, _SUMS_FIELDS)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> PropensitySums:
        """Return the sums of a JSON form.

        Raises:
            ValueError: `fields` is of another version, a field is missing or no integer, or the sums are
                impossible.

        """
        return cls(*_from_json(fields, _SUMS_FIELDS))


@dataclass(frozen=True, slots=True)
class RunningAipw:
    """ORDER-DEPENDENT sums of the augmented inverse-propensity score of two arms, one per partition.

    Each batch is scored against the mean outcome of each arm over the *earlier* batches of the partition.
    Observing is therefore not commutative over batches (within one it is); merging partitions is, and a merged
    value is for evaluation. All sums are integers, so a replay of the same batches gives the same bytes.

    The score of a unit is psi = mu1 - mu0 + A (y - mu1) / p - (1 - A) (y - mu0) / (1 - p), with p the
    propensity of treatment, in 2^-24 of a quantisation step.

    Attributes:
        control_n: units of control.
        control_s: sum of their values, in quantisation steps.
        control_q: sum of their squares.
        treatment_n: units of treatment.
        treatment_s: sum of their values.
        treatment_q: sum of their squares.
        psi: sum of the scores of all units.
        psi_squares: sum of their squares.
        control_inverse: sum of 1 / (1 - p) over all units, in steps of 2^-24.
        treatment_inverse: sum of 1 / p over all units, in steps of 2^-24.

    Raises:
        ValueError: a field is no Python int, a count is negative, or the sums are impossible for real units.

    """

    control_n: int
    control_s: int
    control_q: int
    treatment_n: int
    treatment_s: int
    treatment_q: int
    psi: int
    psi_squares: int
    control_inverse: int
    treatment_inverse: int

    def __post_init__(self) -> None:
        _check_integers(self, _RUNNING_FIELDS)
        for name in ("control", "treatment"):
            try:
                _ = getattr(self, name)
            except ValueError as error:
                raise ValueError(f"{name}_n, {name}_s and {name}_q must be moments: {error}") from error
        if min(self.control_inverse, self.treatment_inverse) < GRID * self.n:
            raise ValueError("control_inverse and treatment_inverse must come from propensities of at most 1")
        if self.n * self.psi_squares < self.psi * self.psi or (self.n == 0 and self.psi_squares):
            raise ValueError("psi_squares must be possible for real scores by Cauchy-Schwarz")

    @classmethod
    def empty(cls) -> RunningAipw:
        """Return the sums of no unit, the identity of `merge`."""
        return cls(*(0 for _ in _RUNNING_FIELDS))

    @property
    def n(self) -> int:
        """Number of units in both arms."""
        return self.control_n + self.treatment_n

    @property
    def control(self) -> Moments:
        """The plain moments of control's values."""
        return Moments(self.control_n, self.control_s, self.control_q)

    @property
    def treatment(self) -> Moments:
        """The plain moments of treatment's values."""
        return Moments(self.treatment_n, self.treatment_s, self.treatment_q)

    @property
    def integers(self) -> tuple[int, ...]:
        """The ten fields in their order."""
        return tuple(getattr(self, name) for name in _RUNNING_FIELDS)

    def observed(self, batch: Iterable[tuple[bool, int, float]], *, start: int = 0) -> RunningAipw:
        """Return the sums after one more batch of units of this partition.

        Args:
            batch: (treated, value in quantisation steps, propensity of treatment in [1e-9, 1 - 1e-9]) per unit.
            start: centre, in quantisation steps, of an arm without an earlier unit; frozen in the design.

        Raises:
            ValueError: a propensity is out of its range.

        """
        centres = _centre(self.control, start), _centre(self.treatment, start)
        return self + _scored(tuple(batch), centres)

    def merge(self, other: RunningAipw) -> RunningAipw:
        """Return the sums of two partitions together; the same as ``self + other``."""
        return self + other

    def __add__(self, other: RunningAipw) -> RunningAipw:
        """Return the sums of two partitions together; exact, commutative and associative."""
        if not isinstance(other, RunningAipw):
            return NotImplemented
        return RunningAipw(*(a + b for a, b in zip(self.integers, other.integers, strict=True)))

    def to_bytes(self) -> bytes:
        """Return the binary form, kind "AIPW", version 1: the ten fields in order; canonical."""
        return pack(_RUNNING, _VERSION, self.integers)

    @classmethod
    def from_bytes(cls, data: bytes) -> RunningAipw:
        """Return the sums of a binary form.

        Raises:
            ValueError: `data` is damaged, of another kind or version, or its sums are impossible.

        """
        return cls(*_unpacked(data, _RUNNING, _RUNNING_FIELDS))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: the version, and each field as a decimal string."""
        return _json(self, _RUNNING_FIELDS)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> RunningAipw:
        """Return the sums of a JSON form.

        Raises:
            ValueError: `fields` is of another version, a field is missing or no integer, or the sums are
                impossible.

        """
        return cls(*_from_json(fields, _RUNNING_FIELDS))


def _scored(units: Sequence[tuple[bool, int, float]], centres: tuple[int, int]) -> RunningAipw:
    control, treatment = centres
    psi = squares = inverse_c = inverse_t = 0
    arms: tuple[list[int], list[int]] = ([], [])
    for treated, value, propensity in units:
        weight_c, weight_t = inverse_weight(1.0 - propensity), inverse_weight(propensity)
        weight, centre, sign = (weight_t, treatment, 1) if treated else (weight_c, control, -1)
        score = treatment - control + sign * _nearest(weight * (value * GRID - centre), GRID)
        psi, squares = psi + score, squares + score * score
        inverse_c, inverse_t = inverse_c + weight_c, inverse_t + weight_t
        arms[bool(treated)].append(value)
    c, t = (Moments.from_values(values) for values in arms)
    return RunningAipw(c.n, c.s, c.q, t.n, t.s, t.q, psi, squares, inverse_c, inverse_t)


def _centre(earlier: Moments, start: int) -> int:
    # The mean outcome in 2^-24 of a quantisation step.
    return _nearest(earlier.s * GRID, earlier.n) if earlier.n else start * GRID


def _nearest(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _check_integers(statistic: object, names: Sequence[str]) -> None:
    for name in names:
        if type(getattr(statistic, name)) is not int:
            raise ValueError(f"{name} must be a Python int")


def _unpacked(data: bytes, tag: str, names: Sequence[str]) -> list[int]:
    integers = unpack(data, tag, _VERSION)
    if len(integers) != len(names):
        raise ValueError(
            f"data must hold the {len(names)} integers {', '.join(names)}, it holds {len(integers)}"
        )
    return integers


def _json(statistic: object, names: Sequence[str]) -> dict[str, Any]:
    return {"version": _VERSION} | {name: decimal(getattr(statistic, name)) for name in names}


def _from_json(fields: Mapping[str, Any], names: Sequence[str]) -> list[int]:
    if fields.get("version") != _VERSION:
        raise ValueError(f"version must be {_VERSION}, got {fields.get('version')!r}")
    return [integer(fields, name) for name in names]
