"""What `apply` puts on the topics: the next experiment record and the next config record.

Within one version the design is frozen and only the weights and the prose may change; a new design is a new
version, which starts again at weight epoch 0.

A ramp and a policy move the coverage and the weights by epochs of their own. The file does not say where they are,
so it takes nothing back: it adds an epoch only if its weights are not those that were applied before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from stream_xp.domain.assignment import layer_config, uniform_share
from stream_xp.domain.decision import ConfigRecord, RolloutStatus
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Status, WeightEpoch
from stream_xp.domain.statistics_size import most_epochs
from stream_xp.errors import ConfigError

_PROSE = ("owner", "hypothesis")


def next_record(
    current: ExperimentRecord | None, spec: ExperimentSpec, *, effective_ms: int
) -> ExperimentRecord:
    """Return the record that follows `current` when `spec` is applied; equal to it if nothing changes.

    An archived record stays archived until the version rises. New weights keep the coverage that a ramp has come to,
    and hold in every context, until a policy moves them again.

    Raises:
        ConfigError: the version went back, the design changed without a new version, or the weights changed of an
            experiment that was concluded.
    """
    if current is not None and spec.experiment != current.spec.experiment:
        raise ConfigError(f"{spec.experiment} cannot follow the record of {current.spec.experiment}")
    if current is None or spec.version > current.spec.version:
        return _first_record(spec, effective_ms)
    if spec.version < current.spec.version:
        raise ConfigError(
            f"{spec.experiment}: version {spec.version} is older than the published version "
            f"{current.spec.version}; raise `version` to at least {current.spec.version + 1}"
        )
    changed = changed_design(current.spec, spec)
    if changed:
        raise ConfigError(
            f"{spec.experiment}: the design of version {spec.version} is frozen, and these fields changed: "
            f"{', '.join(changed)}; raise `version` to {spec.version + 1} to start again with a new design"
        )
    epochs = _next_epochs(current, spec, effective_ms)
    return msgspec.structs.replace(current, spec=spec, epochs=epochs)


def archived_record(current: ExperimentRecord) -> ExperimentRecord:
    """Return `current` as archived: from its activation on, the engine takes no more events for it."""
    return msgspec.structs.replace(current, status=Status.ARCHIVED)


def next_config(current: ConfigRecord | None, record: ExperimentRecord) -> ConfigRecord:
    """Return the config record that follows `current` once `record` is published; `current` if it says so.

    How a conclusion reads to applications only the worker that concluded says.

    Raises:
        ConfigError: the experiment was stopped or shipped, which new weights must not undo.
    """
    epoch = record.epochs[-1]
    newer = current is None or record.spec.version > current.version
    if epoch.final and newer:
        raise ConfigError(
            f"{record.spec.experiment}: version {record.spec.version} was concluded by signal {epoch.signal_id}; "
            f"raise `version` to {record.spec.version + 1} to start again"
        )
    if current is None or newer:
        return _running(record, config_version=1 if current is None else current.config_version + 1)
    if record.spec.version < current.version:
        raise ConfigError(
            f"{current.experiment}: applications already follow version {current.version}; "
            f"raise `version` to at least {current.version + 1}"
        )
    if epoch.final or epoch.epoch <= current.weight_epoch:
        return current
    if current.status is not RolloutStatus.RUNNING:
        raise ConfigError(
            f"{current.experiment}: version {current.version} was {current.status} by signal "
            f"{current.signal_id}, and new weights would undo that; raise `version` to start again"
        )
    return _running(record, config_version=current.config_version + 1, paused=current.paused)


def changed_design(before: ExperimentSpec, after: ExperimentSpec) -> tuple[str, ...]:
    """Return the paths of all fields that differ, weights and prose left out."""
    if before.design_hash() == after.design_hash():
        return ()
    return tuple(_differences(_design(before), _design(after), "")) or ("design",)


def _first_record(spec: ExperimentSpec, effective_ms: int) -> ExperimentRecord:
    coverage = 1.0 if spec.ramp is None else spec.ramp.stages[0].coverage
    epoch = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=effective_ms, coverage=coverage)
    return ExperimentRecord(spec=spec, epochs=(epoch,), design_hash=spec.design_hash())


def _next_epochs(
    current: ExperimentRecord, spec: ExperimentSpec, effective_ms: int
) -> tuple[WeightEpoch, ...]:
    last = current.epochs[-1]
    if spec.weights == current.spec.weights:
        return current.epochs
    if last.final:
        raise ConfigError(
            f"{spec.experiment}: version {spec.version} was concluded by signal {last.signal_id}, and new weights "
            f"would undo that; raise `version` to {spec.version + 1} to start again, or reset it"
        )
    if effective_ms < last.effective_ms:
        raise ConfigError(
            f"{spec.experiment}: new weights would take effect at {effective_ms} (epoch milliseconds), "
            f"before those of epoch {last.epoch} at {last.effective_ms}; check this machine's clock, or wait"
        )
    most = most_epochs(spec)
    if len(current.epochs) >= most:
        raise ConfigError(
            f"{spec.experiment}: version {spec.version} has {len(current.epochs)} weight epochs, and with its arms, "
            f"metrics and segments it can have {max(1, most)}; raise `version` to start again with these weights"
        )
    epoch = WeightEpoch(
        epoch=last.epoch + 1, weights=spec.weights, effective_ms=effective_ms, coverage=last.coverage
    )
    return (*current.epochs, epoch)


def _running(record: ExperimentRecord, *, config_version: int, paused: bool = False) -> ConfigRecord:
    epoch, allocation = record.epochs[-1], record.spec.allocation
    return ConfigRecord(
        experiment=record.spec.experiment,
        version=record.spec.version,
        status=RolloutStatus.RUNNING,
        weights=epoch.weights,
        weight_epoch=epoch.epoch,
        effective_ms=epoch.effective_ms,
        config_version=config_version,
        coverage=epoch.coverage,
        contexts=epoch.contexts,
        context=None if allocation is None else allocation.context,
        paused=paused,
        layer=layer_config(record.spec.layer),
        holdout=bool(record.spec.holdout),
        program=record.spec.program,
        uniform_slice=uniform_share(record.spec, epoch),
        uniform_segment=record.spec.uniform_segment,
    )


def _design(spec: ExperimentSpec) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(spec)
    arms = [{name: value for name, value in arm.items() if name != "weight"} for arm in fields["arms"]]
    return {**{name: value for name, value in fields.items() if name not in _PROSE}, "arms": arms}


def _differences(before: Any, after: Any, path: str) -> list[str]:
    return [difference for step in _steps(before, after, path) for difference in step]


def _steps(before: Any, after: Any, path: str) -> Iterator[list[str]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in {**before, **after}:
            yield _differences(before.get(name), after.get(name), f"{path}.{name}".lstrip("."))
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield _differences(*pair, f"{path}[{index}]")
    elif before != after:
        yield [path]
