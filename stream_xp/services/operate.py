"""What people do: orders to ``xp.signals``, refused where they would change nothing, and followed until enacted.

The worker that owns the experiment enacts an order, as it does its own decisions (docs/decisions.md). What is said
here beforehand is what that worker would say as the topics stand now; between reading them and writing to them somebody
else may order something, so what counts is the order of the topic, and `wait` tells it.
"""

from __future__ import annotations

import datetime as dt
import difflib
import hashlib
import time
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec

from stream_xp.adapters.topic_reader import TopicReader
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.decision import Action, ConfigRecord, Result, RolloutStatus
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Status
from stream_xp.domain.operator import OperatorAction, Order, OrderSignal
from stream_xp.engine.standing import Said, Standing, said, standing
from stream_xp.errors import ConfigError
from stream_xp.services.overlap import decisive_interactions
from stream_xp.services.passed_over import PassedOver
from stream_xp.services.publish import published
from stream_xp.services.signal_records import readable

if TYPE_CHECKING:
    from stream_xp.settings import Settings

SOURCE: Final = "stream-xp/operator"
POLL_S: Final = 0.25
_ANSWERS: Final = (OperatorAction.APPROVE, OperatorAction.REJECT)


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What a person wants, as they said it.

    Attributes:
        arm: of a ship; absent: the treatment, if there is one only.
        stage: of set_stage, from 0.
        signal: of approve, reject and reset, the beginning of the signal's id; absent: the one that waits or is in
            force.
        monitors: of reset: take nothing back, and only open what monitors have latched. So does a reset where nothing
            is to take back.
    """

    experiment: str
    action: OperatorAction
    actor: str
    reason: str
    arm: str | None = None
    stage: int | None = None
    signal: str | None = None
    monitors: bool = False


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """An order that stands on ``xp.signals``.

    Attributes:
        look: look of the newest result before the order; 0 without one.
    """

    order: OrderSignal
    look: int = 0


class Fate(StrEnum):
    """What has become of an order.

    enacted: applications follow it, or, of a reject, the proposal is gone. overtaken: something that came before it on
    the topic made it change nothing. waiting: no worker has acted on it yet.
    """

    ENACTED = "enacted"
    OVERTAKEN = "overtaken"
    WAITING = "waiting"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What has become of an order, in a sentence, and the config that applications follow by then."""

    fate: Fate
    text: str
    config: ConfigRecord | None = None


def place(settings: Settings, call: Call, *, now_ms: int, nonce: str) -> Placed:
    """Write an order, if it makes sense as the topics stand now.

    Args:
        settings: brokers and prefix.
        call: what is wanted.
        now_ms: wall clock, epoch milliseconds.
        nonce: what tells this order from the same one at another time; with the content it gives the id, so that
            whoever repeats a request with its nonce orders once.

    Raises:
        ConfigError: there is no such experiment, the order could change nothing, or it approves a ship that a
            decisive interaction keeps back; nothing was written.
        DependencyError: a broker did not answer, or did not acknowledge the order.
    """
    record = _running(settings, call.experiment)
    records = _said(settings, record)
    order = _signed(_order(record, standing(record.spec, records), call), now_ms=now_ms, nonce=nonce)
    if order.data.monitors:
        _check_latched(settings, order.data)
    _check(record, records, order)
    if call.action is OperatorAction.APPROVE:
        _check_interactions(settings, record.spec, standing(record.spec, records))
    look = _look(settings, order) if call.action is OperatorAction.REJECT else 0
    with TopicWriter(settings) as writer:
        writer.send(settings.topic("signals"), key=call.experiment.encode(), value=msgspec.json.encode(order))
    return Placed(order=order, look=look)


def wait(
    settings: Settings,
    placed: Placed,
    *,
    timeout_s: float,
    pause: Callable[[float], None] = time.sleep,
    now_s: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Wait until an order was enacted, or it is clear that it never will be, at most `timeout_s`.

    Raises:
        ConfigError, DependencyError: a topic cannot be read.
    """
    deadline_s = now_s() + timeout_s
    while True:
        outcome = _outcome(settings, placed)
        if outcome.fate is not Fate.WAITING or now_s() >= deadline_s:
            return outcome
        pause(POLL_S)


# --- what makes sense --------------------------------------------------------------------------------------


def _running(settings: Settings, experiment: str) -> ExperimentRecord:
    record, _ = published(settings, experiment)
    if record is None:
        raise ConfigError(
            f"{experiment}: no such experiment on {settings.topic('experiments')}{_meant(settings, experiment)}"
        )
    if record.status is Status.ARCHIVED:
        raise ConfigError(
            f"{experiment}: version {record.spec.version} is archived, and nothing moves it; "
            "apply it with a higher `version` to start again"
        )
    return record


def _meant(settings: Settings, experiment: str) -> str:
    """Which experiments there are that could have been meant."""
    with TopicReader(settings, settings.topic("experiments")) as reader:
        known = sorted(key.decode(errors="replace") for key in reader.newest_by_key())
    near = difflib.get_close_matches(experiment, known, n=3) or known[:3]
    return f"; there is {', '.join(near)}" if near else "; there is none at all"


def _order(record: ExperimentRecord, now: Standing, call: Call) -> Order:
    """The order that was meant, with what is not said filled in.

    Raises:
        ConfigError: it says too much, too little, or what is not there.
    """
    name = f"{record.spec.experiment}: {_word(call.action)}"
    fields = {
        "experiment": record.spec.experiment,
        "version": record.spec.version,
        "action": call.action,
        "actor": call.actor.strip(),
        "reason": call.reason.strip(),
        "arm": _arm(record, call),
        "stage": _stage(record, call),
        "signal_id": _answered(now, call, name),
        "monitors": _opens_only(now, call, name),
    }
    try:
        return msgspec.convert(fields, Order)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name} is refused: {error}") from error


def _arm(record: ExperimentRecord, call: Call) -> str | None:
    spec, name = record.spec, f"{record.spec.experiment}: {_word(call.action)}"
    if call.action is not OperatorAction.SHIP:
        if call.arm is not None:
            raise ConfigError(f"{name} takes no arm")
        return None
    treatments = [arm.key for arm in spec.treatments]
    if call.arm is None and len(treatments) == 1:
        return treatments[0]
    if call.arm == spec.control.key:
        raise ConfigError(f"{name}: {call.arm} is the control; `stream-xp stop` gives it all traffic")
    if call.arm not in treatments:
        named = "needs an arm" if call.arm is None else f"{call.arm!r} is no arm"
        raise ConfigError(f"{name}: {named}; --arm is one of {', '.join(treatments)}")
    return call.arm


def _stage(record: ExperimentRecord, call: Call) -> int | None:
    ramp, name = record.spec.ramp, f"{record.spec.experiment}: {_word(call.action)}"
    if call.action is not OperatorAction.SET_STAGE:
        if call.stage is not None:
            raise ConfigError(f"{name} takes no stage")
        return None
    if ramp is None:
        raise ConfigError(f"{name}: version {record.spec.version} has no ramp, so no stages")
    if call.stage is None or not 0 <= call.stage < len(ramp.stages):
        stages = ", ".join(f"{at} ({stage.coverage:.4g})" for at, stage in enumerate(ramp.stages))
        raise ConfigError(
            f"{name}: there is no stage {call.stage}; the stages and their coverage are {stages}"
        )
    return call.stage


def _answered(now: Standing, call: Call, name: str) -> str | None:
    """The whole id of the signal that is answered or taken back."""
    if call.action not in (*_ANSWERS, OperatorAction.RESET):
        if call.signal is not None:
            raise ConfigError(f"{name} takes no signal")
        return None
    held = now.proposed if call.action in _ANSWERS else now.latched or now.proposed
    if _opens_only(now, call, name):
        return None
    if held is None:
        raise _nothing_held(now, call, name)
    if call.signal is not None and not held.signal_id.startswith(call.signal):
        stands = "waits" if held is now.proposed else "is in force"
        raise ConfigError(f"{name}: no signal {call.signal!r} {stands}; that of {held.signal_id} does")
    return held.signal_id


def _opens_only(now: Standing, call: Call, name: str) -> bool:
    """Whether it is a reset that takes nothing back, and opens the latches of monitors.

    The order says so: a stop that comes before it on the topic is not taken back by it.
    """
    if call.action is not OperatorAction.RESET:
        if call.monitors:
            raise ConfigError(f"{name} opens no monitors")
        return False
    if call.monitors and call.signal is not None:
        raise ConfigError(f"{name} takes back a signal or only opens the monitors, not both")
    return call.monitors or (call.signal is None and now.latched is None and now.proposed is None)


def _nothing_held(now: Standing, call: Call, name: str) -> ConfigError:
    if call.action is OperatorAction.RESET:
        return ConfigError(f"{name}: no stop, ship or proposal is there to take back")
    held = now.latched
    concluded = (
        f"; a {held.decision.action} is in force already ({held.signal_id})" if held is not None else ""
    )
    return ConfigError(f"{name}: nothing is proposed{concluded}")


def _signed(order: Order, *, now_ms: int, nonce: str) -> OrderSignal:
    """The record of an order; its id is derived from what is ordered and the nonce."""
    identity = hashlib.sha256(b"\0".join((msgspec.json.encode(order), nonce.encode()))).hexdigest()[:32]
    return OrderSignal(
        id=identity,
        source=SOURCE,
        subject=order.experiment,
        time=dt.datetime.fromtimestamp(now_ms / 1000, dt.UTC).isoformat(),
        data=order,
    )


def _check(record: ExperimentRecord, records: list[Said], order: OrderSignal) -> None:
    """Refuse what the worker would ignore, in its words."""
    if any((one.source, one.id) == (order.source, order.id) for one in records):
        return  # The same request again: it stands there, and counts once.
    rule = _ignored(standing(record.spec, [*records, said(order)]), order)
    if rule is not None:
        name = f"{record.spec.experiment}: {_word(order.data.action)}"
        raise ConfigError(f"{name} would change nothing: {rule}{_instead(standing(record.spec, records))}")


def _check_latched(settings: Settings, order: Order) -> None:
    """Refuse to open what is not latched."""
    result = _newest(settings, order)
    if not any(one.latched for one in (result.monitors if result is not None else None) or ()):
        raise ConfigError(
            f"{order.experiment}: reset: no monitor is latched, and without --monitors "
            "a stop, ship or proposal must be there to take back"
        )


def _check_interactions(settings: Settings, spec: ExperimentSpec, now: Standing) -> None:
    """Refuse to approve a ship of an experiment that is proven to interact with one that its file calls decisive."""
    if now.proposed is None or now.proposed.decision.action is not Action.SHIP:
        return
    others = decisive_interactions(settings, spec)
    if others:
        raise ConfigError(
            f"{spec.experiment}: approve: it interacts with {', '.join(others)}, and its file says that this decides; "
            "`stream-xp overlap` shows how. `stream-xp ship` overrides it"
        )


def _instead(now: Standing) -> str:
    if now.latched is None:
        return ""
    return f" (`stream-xp reset` takes back signal {now.latched.signal_id})"


def _ignored(now: Standing, order: OrderSignal) -> str | None:
    """Why an order changed nothing; None if it did."""
    return next(
        (one.rule for one in now.ignored if (one.source, one.id) == (order.source, order.id)),
        None,
    )


def _word(action: OperatorAction) -> str:
    return action.value.replace("_", "-")


# --- what became of it -------------------------------------------------------------------------------------


def _outcome(settings: Settings, placed: Placed) -> Outcome:
    order = placed.order.data
    record, config = published(settings, order.experiment)
    if record is None or record.spec.version != order.version or record.status is Status.ARCHIVED:
        text = f"version {order.version} is archived or gone, or a newer version is there"
        return Outcome(fate=Fate.OVERTAKEN, text=text, config=config)
    now = standing(record.spec, _said(settings, record))
    rule = _ignored(now, placed.order)
    if rule is not None:
        return Outcome(fate=Fate.OVERTAKEN, text=f"it changes nothing: {rule}", config=config)
    if order.action is OperatorAction.REJECT:
        return _rejected(settings, placed, config)
    if order.monitors:
        return _opened(settings, placed, now, config)
    if config is not None and config.version == order.version and _followed(record, config, placed.order):
        return Outcome(fate=Fate.ENACTED, text=_says(config), config=config)
    return Outcome(fate=Fate.WAITING, text=_look_at(settings, order), config=config)


def _followed(record: ExperimentRecord, config: ConfigRecord, order: OrderSignal) -> bool:
    """Whether the config says what was ordered."""
    action = order.data.action
    if action in (OperatorAction.PAUSE, OperatorAction.RESUME):
        return config.paused == (action is OperatorAction.PAUSE)
    # An approval has no weight epoch of its own: that of the proposal follows from it.
    named = order.data.signal_id if action is OperatorAction.APPROVE else order.id
    epoch = next((epoch.epoch for epoch in record.epochs if epoch.signal_id == named), None)
    if epoch is None:
        # What was only proposed moved nothing, so that taking it back moves nothing either.
        return (
            action is OperatorAction.RESET
            and not record.epochs[-1].final
            and config.status is (RolloutStatus.RUNNING)
        )
    concludes = action in (OperatorAction.STOP, OperatorAction.SHIP, OperatorAction.APPROVE)
    return config.weight_epoch > epoch or (
        config.weight_epoch == epoch and concludes == (config.status is not RolloutStatus.RUNNING)
    )


def _rejected(settings: Settings, placed: Placed, config: ConfigRecord | None) -> Outcome:
    """A reject moves nothing, so only the next result shows it."""
    order = placed.order.data
    found = _newest(settings, order)
    rollout = found.rollout if found is not None and found.look > placed.look else None
    if rollout is not None and rollout.proposed != order.signal_id:
        return Outcome(fate=Fate.ENACTED, text="the proposal waits no longer", config=config)
    return Outcome(fate=Fate.WAITING, text=_look_at(settings, order), config=config)


def _opened(settings: Settings, placed: Placed, now: Standing, config: ConfigRecord | None) -> Outcome:
    """Latches show in results alone; what is still proven is latched again by the look that opens them."""
    order = placed.order.data
    found = _newest(settings, order)
    monitors = (found.monitors if found is not None else None) or ()
    if any(one.since == now.opened for one in monitors):
        again = [
            f"{one.monitor} of {one.arm}" if one.arm else str(one.monitor) for one in monitors if one.latched
        ]
        text = (
            f"it is proven still, and latched again: {', '.join(again)}"
            if again
            else "no monitor is latched any more"
        )
        return Outcome(fate=Fate.ENACTED, text=text, config=config)
    return Outcome(fate=Fate.WAITING, text=_look_at(settings, order), config=config)


def _says(config: ConfigRecord) -> str:
    weights = ", ".join(f"{arm} {weight:.4g}" for arm, weight in config.weights.items())
    held = ", paused" if config.paused else ""
    return (
        f"applications follow config version {config.config_version}: {config.status}{held}, "
        f"coverage {config.coverage:.4g}, {weights}"
    )


def _look_at(settings: Settings, order: Order) -> str:
    return (
        f"no worker has enacted it yet. The order stands on {settings.topic('signals')} and will count. Look at "
        f"`stream-xp status {order.experiment}` (is there a result, is it new? an order is enacted from the first "
        "exposure on), and at the worker (is one running with the role decide? its log names what changes nothing)"
    )


def _said(settings: Settings, record: ExperimentRecord) -> list[Said]:
    """All that was said of a version, in the order of its partition."""
    topic = settings.topic("signals")
    found = []
    with TopicReader(settings, topic) as reader, PassedOver() as passed_over:
        for one in reader.backlog():
            if one.value is not None:
                signal = readable(passed_over, one.value, topic=one.topic, place=one.place)
                if signal is not None:
                    found.append(said(signal))
    version = (record.spec.experiment, record.spec.version)
    return [one for one in found if (one.experiment, one.version) == version]


def _look(settings: Settings, order: OrderSignal) -> int:
    found = _newest(settings, order.data)
    return 0 if found is None else found.look


def _newest(settings: Settings, order: Order) -> Result | None:
    """The newest result of the order's version."""
    topic = settings.topic("results")
    with TopicReader(settings, topic) as reader, PassedOver() as passed_over:
        newest = reader.newest_by_key().get(order.experiment.encode())
        if newest is None:
            return None
        result = passed_over.decoded(newest.value, Result, topic=topic, place=newest.place)
    return result if result is not None and result.version == order.version else None
