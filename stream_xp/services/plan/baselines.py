"""What is known of a metric before the experiment: read from a file or an option, and held against its kind."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import yaml

from stream_xp.domain.experiment import Adjustment, Aggregation, ExperimentSpec, Metric, MetricKind
from stream_xp.errors import ConfigError

MAX_FILE_BYTES = 262_144

Share = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
Spread = Annotated[float, msgspec.Meta(ge=0.0)]
Correlation = Annotated[float, msgspec.Meta(gt=-1.0, lt=1.0)]


class Baseline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A metric's distribution over units without the treatment; which fields it needs depends on its kind.

    Attributes:
        rate: share of units that convert.
        mean: of a unit's value, metric units. sd: its standard deviation.
        mean_m, mean_d, var_m, var_d, cov_md: of a ratio's numerator m and denominator d of one unit.
        share: of units with at least one event in their window.
        correlation: of a unit's value with its covariate, inside an arm.
        quantiles: quantile to value, metric units; at least two, as close to the tested ones as can be.
    """

    rate: Share | None = None
    mean: float | None = None
    sd: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    mean_m: float | None = None
    mean_d: float | None = None
    var_m: Spread | None = None
    var_d: Spread | None = None
    cov_md: float | None = None
    share: Share | None = None
    correlation: Correlation | None = None
    quantiles: dict[float, float] | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are there."""
        return {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}


class Known(NamedTuple):
    """A baseline and where it comes from.

    Attributes:
        notes: what a reader should know of it, a sentence each.
    """

    baseline: Baseline
    source: str
    notes: tuple[str, ...] = ()

    def over(self, other: Known | None) -> Known:
        """These fields, and those of `other` where there are none here."""
        if other is None or not other.baseline.given().keys() - self.baseline.given().keys():
            return self
        merged = Baseline(**{**other.baseline.given(), **self.baseline.given()})
        return Known(merged, f"{self.source}; {other.source}", (*self.notes, *other.notes))


def load_baselines(path: Path, spec: ExperimentSpec) -> dict[str, Known]:
    """Return the baselines in a YAML or JSON file, a mapping of metric key to fields of `Baseline`.

    Raises:
        ConfigError: the file cannot be read, or an entry is no baseline of a metric of the experiment.
    """
    content = _content(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must map metric keys to baselines, such as `order: {{rate: 0.1}}`")
    return {str(key): _known(str(key), fields, spec, source=str(path)) for key, fields in content.items()}


def parse_given(texts: Iterable[str], spec: ExperimentSpec) -> dict[str, Known]:
    """Return the baselines of options such as ``order:rate=0.1`` and ``revenue:mean=12,sd=30``.

    Quantiles are written ``q0.5=120``.

    Raises:
        ConfigError: a text is none, or is no baseline of a metric of the experiment.
    """
    known: dict[str, Known] = {}
    for text in texts:
        key, separator, rest = text.partition(":")
        fields = dict(_assignments(text, rest)) if separator else {}
        if not fields:
            raise ConfigError(f"{text!r}: a baseline is METRIC:FIELD=NUMBER,... such as order:rate=0.1")
        known[key] = _known(key, fields, spec, source="command line").over(known.get(key))
    return known


def lacking(metric: Metric, known: Known | None) -> tuple[str, ...]:
    """Fields that a plan of this metric still needs."""
    there = known.baseline.given() if known else {}
    return tuple(field for field in needed(metric) if field not in there)


def needed(metric: Metric) -> tuple[str, ...]:
    """Fields of `Baseline` that a plan of this metric needs."""
    if metric.kind is MetricKind.LATENCY:
        return ("quantiles",)
    if metric.kind is MetricKind.RATIO:
        return ("mean_m", "mean_d", "var_m", "var_d", "cov_md")
    if metric.folds_by is Aggregation.FIRST:
        return ("share",)
    value = ("rate",) if metric.folds_by is Aggregation.ANY else ("mean", "sd")
    return value if metric.adjustment is Adjustment.NONE else (*value, "correlation")


_EXAMPLES = {
    "rate": "0.1",
    "mean": "12.5",
    "sd": "30",
    "share": "0.05",
    "correlation": "0.5",
    "mean_m": "3",
    "mean_d": "1.5",
    "var_m": "9",
    "var_d": "2",
    "cov_md": "3",
}
_WORDS = {
    "rate": "the share of units that convert",
    "share": "the share of units with an event",
    "mean": "the mean of a unit's value",
    "sd": "its standard deviation",
    "correlation": "its correlation with the covariate (0 to plan without)",
    "mean_m": "numerator's mean",
    "mean_d": "denominator's mean",
    "var_m": "numerator's variance",
    "var_d": "denominator's variance",
    "cov_md": "their covariance",
    "quantiles": "at least two quantiles and their values",
}


def complaint(metric: Metric, fields: Iterable[str]) -> str:
    """One line that says which numbers of a metric are missing, and how to give them."""
    listed = tuple(fields)
    words = ", ".join(f"{field} ({_WORDS[field]})" for field in listed)
    example = (
        "q0.5=120,q0.99=900"
        if "quantiles" in listed
        else ",".join(f"{field}={_EXAMPLES[field]}" for field in listed)
    )
    what = f"a {metric.kind} needs {words}"
    return f"{metric.key}: no baseline: {what}; give it with --given {metric.key}:{example} or in --baseline FILE"


def _known(key: str, fields: Any, spec: ExperimentSpec, *, source: str) -> Known:
    metrics = {metric.key: metric for metric in spec.metrics}
    if key not in metrics:
        close = difflib.get_close_matches(key, metrics, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(metrics)}"
        raise ConfigError(f"{source}: the experiment has no metric {key!r}; {hint}")
    try:
        # Not strict, because YAML reads 1e-3 as text and JSON has no keys but text.
        baseline = msgspec.convert(fields, Baseline, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {key}: {error}") from error
    _check(metrics[key], baseline, source)
    return Known(baseline, source)


def _check(metric: Metric, baseline: Baseline, source: str) -> None:
    place, wanted = f"{source}: {metric.key}", needed(metric)
    strange = [field for field in baseline.given() if field not in wanted]
    if strange:
        about = f"a plan of this {metric.kind} takes {', '.join(wanted)}"
        raise ConfigError(f"{place}: {', '.join(strange)} is not used, {about}")
    for name, value in baseline.given().items():
        if isinstance(value, float) and not abs(value) < 1e100:
            raise ConfigError(f"{place}: {name} must be finite and below 1e100")
    if baseline.mean_d == 0:
        raise ConfigError(f"{place}: mean_d must not be 0")
    if None not in (baseline.cov_md, baseline.var_m, baseline.var_d):
        _check_covariance(place, baseline)
    if baseline.quantiles is not None:
        _check_quantiles(place, baseline.quantiles)


def _check_covariance(place: str, baseline: Baseline) -> None:
    product = (baseline.var_m or 0.0) * (baseline.var_d or 0.0)
    if (baseline.cov_md or 0.0) ** 2 > product * (1 + 1e-9):
        raise ConfigError(f"{place}: cov_md squared must be at most var_m times var_d")


def _check_quantiles(place: str, quantiles: Mapping[float, float]) -> None:
    pairs = sorted(quantiles.items())
    values = [value for _, value in pairs]
    if len(pairs) < 2:
        raise ConfigError(f"{place}: quantiles must be at least two")
    if not all(0 < q < 1 for q, _ in pairs):
        raise ConfigError(f"{place}: quantiles must lie between 0 and 1")
    if not all(0 < low < high < 1e100 for low, high in itertools.pairwise(values)):
        raise ConfigError(f"{place}: values of quantiles must be above 0 and grow with the quantile")


def _assignments(text: str, rest: str) -> Iterator[tuple[str, Any]]:
    quantiles: dict[str, str] = {}
    for part in rest.split(","):
        name, separator, number = (piece.strip() for piece in part.partition("="))
        if not (name and separator and number):
            raise ConfigError(f"{text!r}: a baseline is METRIC:FIELD=NUMBER,... such as order:rate=0.1")
        if name.startswith("q") and name[1:2].isdigit():
            quantiles[name[1:]] = number
        else:
            yield name, number
    if quantiles:
        yield "quantiles", quantiles


# Files --------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses aliases, which can make a small file enormous, and keys given twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 (PyYAML's signature)
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a name is given twice", node.start_mark)
        return mapping


def _content(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is longer than {MAX_FILE_BYTES} bytes, the most that is read")
    try:
        # JSON is read as YAML, too; numbers that YAML takes for text are converted with the fields.
        return yaml.load(raw.decode("utf-8-sig"), _Loader)  # noqa: S506 (a safe loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
