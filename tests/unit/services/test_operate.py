"""Orders of people: what is refused before it is written, what is written, and what has become of it."""

from __future__ import annotations

import getpass
import json
from typing import TYPE_CHECKING, Any, Self

import msgspec
import pytest
from click.testing import CliRunner

from stream_xp.adapters.kafka_admin import topics_dir
from stream_xp.adapters.topic_reader import TopicRecord
from stream_xp.cli import main
from stream_xp.domain.decision import (
    Action,
    ConfigRecord,
    MonitorName,
    MonitorResult,
    Result,
    RolloutState,
    RolloutStatus,
    Signal,
)
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Status, WeightEpoch
from stream_xp.domain.operator import OperatorAction, OrderSignal
from stream_xp.engine.standing import said, standing
from stream_xp.errors import ConfigError
from stream_xp.services import evidence, operate, publish
from stream_xp.services.demo.board import Board
from stream_xp.services.demo.tail import SIGNALS, Seen
from stream_xp.services.operate import Call, Fate, Placed, place, wait
from stream_xp.services.passed_over import PassedOver
from stream_xp.services.signal_records import readable
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

GOLDEN = msgspec.json.decode(min((topics_dir() / "golden").rglob("*signal*.json")).read_bytes(), type=Signal)
SETTINGS = Settings()
RAMP = {"stages": [{"coverage": 0.1}, {"coverage": 1.0}]}


class Topics:
    """Topics in memory, in place of a broker."""

    def __init__(self) -> None:
        self.records: dict[str, list[TopicRecord]] = {}

    def add(self, topic: str, key: str, value: msgspec.Struct | bytes) -> None:
        name = SETTINGS.topic(topic)
        kept = self.records.setdefault(name, [])
        body = value if isinstance(value, bytes) else msgspec.json.encode(value)
        kept.append(TopicRecord(name, 0, len(kept), len(kept), key.encode(), body, ()))

    def of(self, topic: str) -> list[TopicRecord]:
        return self.records.get(SETTINGS.topic(topic), [])

    @property
    def orders(self) -> list[OrderSignal]:
        values = [record.value or b"" for record in self.of("signals")]
        return [msgspec.json.decode(value, type=OrderSignal) for value in values if b"operator.v1" in value]


@pytest.fixture
def topics(monkeypatch: pytest.MonkeyPatch) -> Topics:
    held = Topics()

    class Reader:
        def __init__(self, _: Settings, topic: str) -> None:
            self._records = held.records.get(topic, [])

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def backlog(self) -> Iterator[TopicRecord]:
            yield from self._records

        def newest_by_key(self) -> dict[bytes, TopicRecord]:
            return {record.key or b"": record for record in self._records}

    class Writer:
        def __init__(self, _: Settings) -> None: ...

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def send(self, topic: str, *, key: bytes, value: bytes) -> None:
            held.add(topic.removeprefix(SETTINGS.prefix), key.decode(), value)

    for module in (operate, publish, evidence):
        monkeypatch.setattr(module, "TopicReader", Reader)
    monkeypatch.setattr(operate, "TopicWriter", Writer)
    return held


def spec(**fields: Any) -> ExperimentSpec:
    metric = {"key": "click", "kind": "conversion", "role": "primary", "direction": "increase"}
    body: dict[str, Any] = {
        "experiment": "exp",
        "owner": "tests",
        "hypothesis": "people know better",
        "unit": "member",
        "planned_sample": 4000,
        "arms": [{"key": "old", "weight": 0.5, "control": True}, {"key": "new", "weight": 0.5}],
        "metrics": [metric | {"attribution_window": "1h"}],
    }
    return msgspec.convert(body | fields, ExperimentSpec)


THREE = [
    {"key": "old", "weight": 0.4, "control": True},
    {"key": "new", "weight": 0.3},
    {"key": "newer", "weight": 0.3},
]


def record(design: ExperimentSpec, *more: WeightEpoch, status: Status = Status.ACTIVE) -> ExperimentRecord:
    first = WeightEpoch(epoch=0, weights=design.weights, effective_ms=0)
    return ExperimentRecord(
        spec=design, epochs=(first, *more), design_hash=design.design_hash(), status=status
    )


def config(**fields: Any) -> ConfigRecord:
    running: dict[str, Any] = {
        "experiment": "exp",
        "version": 1,
        "status": RolloutStatus.RUNNING,
        "weights": {"old": 0.5, "new": 0.5},
        "weight_epoch": 0,
        "effective_ms": 0,
        "config_version": 1,
    }
    return ConfigRecord(**(running | fields))


def decided(
    identity: str, action: Action = Action.STOP, *, proposed: bool = False, arm: str = "new"
) -> Signal:
    decision = msgspec.structs.replace(GOLDEN.data.decision, action=action, arm=arm)
    result = msgspec.structs.replace(GOLDEN.data.result, experiment="exp", version=1)
    data = msgspec.structs.replace(GOLDEN.data, decision=decision, result=result, proposed=proposed)
    return msgspec.structs.replace(GOLDEN, id=identity, data=data)


def call(action: str, **fields: Any) -> Call:
    known = {"experiment": "exp", "actor": "kim", "reason": "the test says so"}
    return Call(**(known | {"action": OperatorAction(action)} | fields))


def put(action: str, *, nonce: str = "n", **fields: Any) -> Placed:
    return place(SETTINGS, call(action, **fields), now_ms=1_000, nonce=nonce)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "interacts", "refused"),
    [(Action.SHIP, ["b", "c"], True), (Action.SHIP, [], False), (Action.STOP, ["b", "c"], False)],
)
def test_a_ship_that_a_decisive_interaction_keeps_back_is_not_approved(
    topics: Topics, monkeypatch: pytest.MonkeyPatch, action: Action, interacts: list[str], refused: bool
) -> None:
    design = spec(overlap={"decisive": ["b", "c"]}, conclusion={"mode": "approve"})
    topics.add("experiments", "exp", record(design))
    topics.add("signals", "exp", decided("s1", action, proposed=True))
    asked = []
    monkeypatch.setattr(operate, "decisive_interactions", lambda settings, of: asked.append(of) or interacts)
    if refused:
        with pytest.raises(ConfigError, match="approve: it interacts with b, c, and its file says") as caught:
            put("approve")
        assert "`stream-xp ship` overrides it" in str(caught.value)
        assert topics.orders == []
        put("reject")
        put("ship", nonce="by hand")
    else:
        put("approve")
    assert asked == ([design] if action is Action.SHIP else [])
    assert len(topics.orders) == (2 if refused else 1)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown experiment": (
        "stop",
        {"experiment": "ex"},
        "ex: no such experiment on xp.experiments; there is exp",
    ),
    "ship without an arm": ("ship", {}, "needs an arm; --arm is one of new, newer"),
    "ship the control": ("ship", {"arm": "old"}, "old is the control; `stream-xp stop`"),
    "ship no arm": ("ship", {"arm": "mew"}, "'mew' is no arm; --arm is one of new, newer"),
    "stage out of the ramp": (
        "set_stage",
        {"stage": 2},
        "no stage 2; the stages and their coverage are 0 (0.1), 1 (1)",
    ),
    "stage below the ramp": ("set_stage", {"stage": -1}, "no stage -1"),
    "no stage": ("set_stage", {}, "no stage None"),
    "nothing proposed": ("approve", {}, "exp: approve: nothing is proposed"),
    "nothing to reject": ("reject", {}, "exp: reject: nothing is proposed"),
    "nothing to reset": (
        "reset",
        {},
        "no monitor is latched, and without --monitors a stop, ship or proposal must be there to take back",
    ),
    "no monitors to reset": ("reset", {"monitors": True}, "no monitor is latched"),
    "monitors of a stop": ("stop", {"monitors": True}, "stop opens no monitors"),
    "a signal and the monitors": (
        "reset",
        {"monitors": True, "signal": "a"},
        "takes back a signal or only opens the monitors, not both",
    ),
    "no signal to reset": ("reset", {"signal": "a"}, "no stop, ship or proposal is there to take back"),
    "not paused": ("resume", {}, "resume would change nothing: it is not paused"),
    "an arm of a stop": ("stop", {"arm": "new"}, "stop takes no arm"),
    "a stage of a stop": ("stop", {"stage": 0}, "stop takes no stage"),
    "a signal of a stop": ("stop", {"signal": "a"}, "stop takes no signal"),
    "no reason": ("stop", {"reason": "  "}, "Expected `str` of length >= 1"),
    "no actor": ("stop", {"actor": " "}, "Expected `str` of length >= 1"),
}


@pytest.mark.parametrize(("action", "fields", "rule"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_and_not_written(
    topics: Topics, action: str, fields: dict[str, Any], rule: str
) -> None:
    topics.add("experiments", "exp", record(spec(arms=THREE, ramp=RAMP)))
    with pytest.raises(ConfigError) as caught:
        put(action, **fields)
    assert rule in str(caught.value)
    assert topics.of("signals") == []


def test_an_archived_experiment_takes_no_order(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec(), status=Status.ARCHIVED))
    with pytest.raises(ConfigError, match="version 1 is archived"):
        put("stop")
    assert topics.of("signals") == []


def test_an_experiment_without_a_ramp_has_no_stages(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    with pytest.raises(ConfigError, match="version 1 has no ramp"):
        put("set_stage", stage=0)


def test_what_is_concluded_needs_a_reset_first(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    topics.add("signals", "exp", decided("harm"))
    with pytest.raises(ConfigError, match=r"ship would change nothing: a stop is in force.*signal harm"):
        put("ship")
    with pytest.raises(ConfigError, match=r"nothing is proposed; a stop is in force already \(harm\)"):
        put("approve")
    with pytest.raises(ConfigError, match="no signal 'nope' is in force; that of harm does"):
        put("reset", signal="nope")
    assert put("reset", signal="ha").order.data.signal_id == "harm"
    put("ship", nonce="after")
    assert [one.data.action for one in topics.orders] == ["reset", "ship"]


def test_a_pause_is_not_repeated(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    put("pause")
    with pytest.raises(ConfigError, match="pause would change nothing: it is paused already"):
        put("pause", nonce="other")
    put("resume")
    assert len(topics.orders) == 2


# --- what is written ---------------------------------------------------------------------------------------


def test_an_order_says_who_and_why_and_of_which_version(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec(version=3)))
    placed = put("ship", actor=" kim ", reason="it is better\n")
    (written,) = topics.orders
    assert written == placed.order
    assert (written.subject, written.source, written.time) == (
        "exp",
        "stream-xp/operator",
        "1970-01-01T00:00:01+00:00",
    )
    order = written.data
    assert (order.version, order.action, order.actor, order.reason, order.arm) == (
        3,
        "ship",
        "kim",
        "it is better",
        "new",
    )
    assert topics.of("signals")[0].key == b"exp"


def test_an_answer_names_the_whole_id_of_the_proposal(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    topics.add("signals", "exp", decided("0123456789", Action.SHIP, proposed=True))
    with pytest.raises(ConfigError, match="no signal '9' waits; that of 0123456789 does"):
        put("approve", signal="9")
    assert put("approve", signal="0123").order.data.signal_id == "0123456789"


def test_the_same_request_is_one_order_and_another_is_another(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    first, again = put("stop", nonce="a"), put("stop", nonce="a")
    assert first.order.id == again.order.id
    assert len(first.order.id) == 32
    other = operate._signed(first.order.data, now_ms=1_000, nonce="b")
    assert other.id != first.order.id
    design = spec()
    assert standing(design, [said(one) for one in topics.orders]).ignored == ()


def test_what_is_no_signal_is_passed_over(topics: Topics, caplog: pytest.LogCaptureFixture) -> None:
    topics.add("experiments", "exp", record(spec()))
    topics.add("signals", "exp", b"{}")
    put("stop")
    assert "passed over: xp.signals partition 0 offset 0" in caplog.text


# --- what becomes of it ------------------------------------------------------------------------------------


def fate(placed: Placed) -> Fate:
    return wait(SETTINGS, placed, timeout_s=0.0).fate


def test_a_stop_is_enacted_once_the_config_follows_its_epoch(topics: Topics) -> None:
    design = spec()
    topics.add("experiments", "exp", record(design))
    topics.add("config", "exp", config())
    placed = put("stop")
    assert fate(placed) is Fate.WAITING
    end = WeightEpoch(
        epoch=1, weights={"old": 1.0, "new": 0.0}, effective_ms=9, final=True, signal_id=placed.order.id
    )
    topics.add("experiments", "exp", record(design, end))
    assert fate(placed) is Fate.WAITING
    topics.add("config", "exp", config(weight_epoch=1, config_version=2))
    assert fate(placed) is Fate.WAITING
    topics.add(
        "config", "exp", config(weight_epoch=1, config_version=3, status="stopped", weights=end.weights)
    )
    outcome = wait(SETTINGS, placed, timeout_s=0.0)
    assert outcome.fate is Fate.ENACTED
    assert "config version 3: stopped, coverage 1, old 1, new 0" in outcome.text


@pytest.mark.parametrize(("action", "paused"), [("pause", True), ("resume", False)])
def test_a_pause_is_enacted_by_the_config_alone(topics: Topics, action: str, *, paused: bool) -> None:
    topics.add("experiments", "exp", record(spec()))
    if action == "resume":
        put("pause")
    topics.add("config", "exp", config(paused=not paused))
    placed = put(action, nonce="now")
    assert fate(placed) is Fate.WAITING
    topics.add("config", "exp", config(paused=paused, config_version=2))
    assert fate(placed) is Fate.ENACTED


def test_an_approval_is_enacted_by_the_epoch_of_the_proposal(topics: Topics) -> None:
    design = spec()
    topics.add("experiments", "exp", record(design))
    topics.add("config", "exp", config())
    topics.add("signals", "exp", decided("wanted", Action.SHIP, proposed=True))
    placed = put("approve")
    end = WeightEpoch(
        epoch=1, weights={"old": 0.0, "new": 1.0}, effective_ms=9, final=True, signal_id="wanted"
    )
    topics.add("experiments", "exp", record(design, end))
    assert fate(placed) is Fate.WAITING
    topics.add("config", "exp", config(weight_epoch=1, config_version=2, status="shipped"))
    assert fate(placed) is Fate.ENACTED


def test_a_rejection_is_enacted_by_the_next_result(topics: Topics) -> None:
    def result(look: int, proposed: str | None) -> Result:
        state = RolloutState(
            stage=None, coverage=1.0, weights={}, paused=False, proposed=proposed, epochs_left=9
        )
        return msgspec.structs.replace(
            GOLDEN.data.result, experiment="exp", version=1, look=look, rollout=state
        )

    topics.add("experiments", "exp", record(spec()))
    topics.add("signals", "exp", decided("wanted", Action.SHIP, proposed=True))
    # The result of the look that proposed does not know of it yet.
    topics.add("results", "exp", result(7, None))
    placed = put("reject")
    assert (placed.look, fate(placed)) == (7, Fate.WAITING)
    topics.add("results", "exp", result(8, "wanted"))
    assert fate(placed) is Fate.WAITING
    topics.add("results", "exp", result(9, None))
    assert fate(placed) is Fate.ENACTED


def test_a_reset_of_a_proposal_moves_nothing(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    topics.add("config", "exp", config())
    topics.add("signals", "exp", decided("wanted", Action.SHIP, proposed=True))
    assert fate(put("reset")) is Fate.ENACTED


def watched(*, latched: bool, since: str | None = None) -> Result:
    stall = MonitorResult(monitor=MonitorName.EXPOSURE_STALL, arm="new", latched=latched, since=since)
    return msgspec.structs.replace(GOLDEN.data.result, experiment="exp", version=1, monitors=(stall,))


def test_a_reset_opens_what_monitors_have_latched(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    topics.add("config", "exp", config())
    topics.add("results", "exp", watched(latched=True))
    placed = put("reset")
    assert (placed.order.data.signal_id, placed.order.data.monitors) == (None, True)
    assert standing(spec(), [said(placed.order)]).opened == placed.order.id
    # The config says nothing of latches.
    assert fate(placed) is Fate.WAITING
    topics.add("results", "exp", watched(latched=True, since=placed.order.id))
    outcome = wait(SETTINGS, placed, timeout_s=0.0)
    assert (outcome.fate, outcome.text) == (
        Fate.ENACTED,
        "it is proven still, and latched again: exposure_stall of new",
    )
    topics.add("results", "exp", watched(latched=False, since=placed.order.id))
    assert wait(SETTINGS, placed, timeout_s=0.0).text == "no monitor is latched any more"
    with pytest.raises(ConfigError, match="no monitor is latched"):
        put("reset", nonce="again")


def test_a_proposal_stays_when_only_the_monitors_are_opened(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    topics.add("signals", "exp", decided("wanted", Action.SHIP, proposed=True))
    topics.add("results", "exp", watched(latched=True))
    code, _, _ = run("reset", "exp", "--monitors", "--reason", "the arm is back", "--actor", "kim")
    (order,) = topics.orders
    assert (code, order.data.signal_id, order.data.monitors) == (0, None, True)
    now = standing(spec(), [said(decided("wanted", Action.SHIP, proposed=True)), said(order)])
    assert (now.proposed.signal_id if now.proposed else None, now.opened) == ("wanted", order.id)
    # Without it the proposal is taken back.
    assert put("reset").order.data.signal_id == "wanted"


def test_what_came_before_the_monitors_were_opened_still_counts(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    topics.add("results", "exp", watched(latched=True))
    placed = put("reset")
    order = topics.of("signals").pop()
    said_then = [decided("wanted", Action.SHIP, proposed=True), placed.order, decided("harm")]
    for one in said_then:
        topics.add("signals", "exp", one if one is not placed.order else order.value or b"")
    # The stop names no reset, because none has taken anything back; what follows it cannot count.
    topics.add("signals", "exp", decided("late", Action.SHIP))
    listed = [one.id for one in evidence.read_signals(SETTINGS, experiment="exp")]
    assert sorted(listed) == sorted(["wanted", "harm", placed.order.id])
    now = standing(spec(), map(said, said_then))
    assert now.latched is not None
    assert now.latched.signal_id == "harm"


def test_latches_of_another_version_are_not_opened(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    topics.add("results", "exp", msgspec.structs.replace(watched(latched=True), version=2))
    with pytest.raises(ConfigError, match="no monitor is latched"):
        put("reset")


def test_an_order_that_comes_second_is_told_so(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    placed = put("ship")
    # Somebody else's stop came between the reading and the writing.
    ship = topics.of("signals").pop()
    topics.add("signals", "exp", decided("harm"))
    topics.add("signals", "exp", ship.value or b"")
    outcome = wait(SETTINGS, placed, timeout_s=60.0)
    assert outcome.fate is Fate.OVERTAKEN
    assert "a stop is in force" in outcome.text


def test_a_newer_version_overtakes_an_order(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    placed = put("stop")
    topics.add("experiments", "exp", record(spec(version=2)))
    assert fate(placed) is Fate.OVERTAKEN


def test_waiting_ends_with_where_to_look(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    placed = put("stop")
    clock = iter([0.0, 1.0, 2.0, 3.0])
    paused: list[float] = []
    outcome = wait(SETTINGS, placed, timeout_s=2.5, pause=paused.append, now_s=lambda: next(clock))
    assert outcome.fate is Fate.WAITING
    assert len(paused) == 2
    assert "stands on xp.signals and will count" in outcome.text
    assert "stream-xp status exp" in outcome.text


# --- the commands ------------------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_a_command_orders_as_the_account_and_says_the_id(
    topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "jo")
    topics.add("experiments", "exp", record(spec(ramp=RAMP)))
    code, out, _ = run("set-stage", "exp", "--stage", "1", "--reason", "enough seen")
    (order,) = topics.orders
    assert (code, out) == (0, f"exp version 1: set-stage ordered by jo: {order.id}\n")
    assert (order.data.action, order.data.stage, order.data.actor) == ("set_stage", 1, "jo")


def test_an_account_without_a_name_must_say_who(topics: Topics, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    topics.add("experiments", "exp", record(spec()))
    code, _, err = run("stop", "exp", "--reason", "r")
    assert (code, "--actor says who orders" in err) == (2, True)
    assert run("stop", "exp", "--reason", "r", "--actor", "kim")[0] == 0


def test_a_refusal_exits_2_and_what_is_not_enacted_3(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    code, out, err = run("resume", "exp", "--reason", "r", "--actor", "kim")
    assert (code, out) == (2, "")
    assert err == "Error: exp: resume would change nothing: it is not paused\n"
    code, out, err = run(
        "pause", "exp", "--reason", "r", "--actor", "kim", "--wait", "--timeout", "0", "--json"
    )
    answer = json.loads(out)
    assert (code, answer["fate"], answer["order"]["data"]["action"]) == (3, "waiting", "pause")


def test_signals_show_orders_and_what_is_proposed(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    topics.add("signals", "exp", decided("wanted", Action.SHIP, proposed=True))
    put("approve", reason="as\x1b[31m agreed")
    code, out, err = run("signals", "exp")
    first, second = sorted(out.splitlines(), key=lambda line: "ORDER" in line)
    assert (code, err) == (0, "")
    assert "  PROPOSED SHIP  exp version 1 (new" in first
    assert "  ORDER APPROVE  exp version 1 (signal wanted): kim: as?[31m agreed  " in second
    assert run("signals", "other")[1] == ""
    lines = run("signals", "--json")[1].splitlines()
    assert sorted(json.loads(line)["type"] for line in lines) == [
        "com.streamxp.decision.v1",
        "com.streamxp.operator.v1",
    ]


def test_after_a_reset_another_decision_is_believed(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    topics.add("signals", "exp", decided("first"))
    topics.add("signals", "exp", decided("late", Action.SHIP))
    put("reset")
    (order,) = topics.orders
    topics.add("signals", "exp", decided("older", Action.SHIP))
    again = decided("again", Action.SHIP)
    topics.add(
        "signals",
        "exp",
        msgspec.structs.replace(again, data=msgspec.structs.replace(again.data, since=order.id)),
    )
    topics.add("signals", "exp", decided("too late"))
    believed = {one.id for one in evidence.read_signals(SETTINGS)}
    assert believed == {"first", order.id, "again"}


def test_what_a_reader_believes_is_what_counts(topics: Topics) -> None:
    """A reader without the spec leaves out just what the fold with the spec ignores."""
    design = spec()
    topics.add("experiments", "exp", record(design))
    topics.add("signals", "exp", decided("p1", Action.SHIP, proposed=True))
    topics.add("signals", "exp", decided("p2", Action.SHIP, proposed=True))
    put("reject")
    topics.add("signals", "exp", decided("p3", Action.STOP, proposed=True))
    put("approve")
    topics.add("signals", "exp", decided("s1"))
    with PassedOver() as passed_over:
        found = [
            readable(passed_over, one.value, topic=one.topic, place=one.place) for one in topics.of("signals")
        ]
    records = [one for one in found if one is not None]
    ignored = {one.id for one in standing(design, [said(one) for one in records]).ignored}
    assert ignored == {"p2", "s1"}
    assert {one.id for one in evidence.read_signals(SETTINGS)} == {one.id for one in records} - ignored


def test_the_demo_counts_stops_and_ships_only(topics: Topics) -> None:
    topics.add("experiments", "exp", record(spec()))
    put("pause")
    topics.add("signals", "exp", decided("moved", Action.ADVANCE))
    topics.add("signals", "exp", decided("won", Action.SHIP))
    board = Board()
    for one in topics.of("signals"):
        board.take(Seen(SIGNALS, one.value or b"", 0.0))
    assert [heard.signal.id for heard in board.signals["exp"]] == ["won"]
    assert board.passed_over.counts == {}
