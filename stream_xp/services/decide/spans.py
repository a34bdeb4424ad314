"""What the spans of the decide stage say of the work that they are about."""

from __future__ import annotations

from collections.abc import Sequence

from stream_xp.domain.decision import ConfigRecord, Signal
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.tracing import SHOWN_EXPERIMENTS, Attributes
from stream_xp.services.decide.look import Watched


def about_evaluation(changed: Sequence[Watched]) -> Attributes:
    """An evaluation of several experiments names the first few."""
    names = tuple(watched.experiment for watched in changed[:SHOWN_EXPERIMENTS])
    return {"streamxp.experiments": len(changed), "streamxp.experiment.names": names}


def about_signal(signal: Signal) -> Attributes:
    """A decision."""
    return {
        "streamxp.experiment": signal.subject,
        "streamxp.version": signal.data.result.version,
        "streamxp.signal.id": signal.id,
        "streamxp.action": signal.data.decision.action.value,
        "streamxp.proposed": signal.data.proposed,
    }


def about_epoch(record: ExperimentRecord) -> Attributes:
    """The newest weight epoch of a record."""
    newest = record.epochs[-1]
    return {
        **_about_version(record.spec.experiment, record.spec.version, newest.signal_id),
        "streamxp.weight_epoch": newest.epoch,
    }


def about_config(config: ConfigRecord) -> Attributes:
    """What applications are told."""
    return {
        **_about_version(config.experiment, config.version, config.signal_id),
        "streamxp.config_version": config.config_version,
        "streamxp.status": config.status.value,
    }


def _about_version(experiment: str, version: int, signal_id: str | None) -> Attributes:
    about: Attributes = {"streamxp.experiment": experiment, "streamxp.version": version}
    return about if signal_id is None else {**about, "streamxp.signal.id": signal_id}
