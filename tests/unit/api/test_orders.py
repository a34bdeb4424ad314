"""Write routes: they order as the commands do, once for each key, and alerts act once for each begin."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from api_process import BEARER, TOKEN, serving
from gate_world import STATES, World, world_in

from stream_xp.domain.operator import OperatorAction
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.services.operate import Call, Placed, _order, _signed
from stream_xp.settings import Secret, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

ALERT = {
    "status": "firing",
    "labels": {"alertname": "CheckoutErrors", "experiment": "checkout", "severity": "critical"},
    "annotations": {"summary": "errors are 3 times the usual"},
    "startsAt": "2027-01-15T07:59:00Z",
    "endsAt": "0001-01-01T00:00:00Z",
    "generatorURL": "http://prometheus/graph",
    "fingerprint": "c8fef55b1fe2f6a8",
}


def group(*alerts: dict[str, Any]) -> dict[str, Any]:
    """What Alertmanager posts, version 4."""
    return {
        "version": "4",
        "groupKey": '{}:{alertname="CheckoutErrors"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "stream-xp",
        "groupLabels": {"alertname": "CheckoutErrors"},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager",
        "alerts": list(alerts),
    }


class Desk:
    """In place of `operate.place`: it writes into the view, with the ids that the real one gives."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.calls: list[Call] = []
        self.error: Exception | None = None
        self.hold: threading.Event | None = None

    def place(self, settings: Settings, call: Call, *, now_ms: int, nonce: str) -> Placed:
        self.calls.append(call)
        if self.hold is not None:
            self.hold.wait(60)
        if self.error is not None:
            raise self.error
        known = self.world.view.known(call.experiment)
        assert known.record is not None
        order = _signed(_order(known.record, known.standing, call), now_ms=now_ms, nonce=nonce)
        self.world.put("signals", order)
        return Placed(order=order)


def world(state: str = "pass") -> World:
    return world_in(state, api_token=Secret(f"ci:{TOKEN}"))


def test_an_order_is_the_one_of_the_commands_and_the_gates_follow() -> None:
    here = world()
    desk = Desk(here)
    with serving(here, place=desk.place) as (client, _):
        answer = client.post(
            "/api/v1/experiments/checkout/orders/stop",
            json={"reason": "the pager rang", "actor": "kim"},
            headers=BEARER,
        )
        assert answer.status_code == 202
        assert desk.calls == [
            Call(
                experiment="checkout",
                action=OperatorAction.STOP,
                actor="kim (by ci)",
                reason="the pager rang",
            )
        ]
        gate = client.get("/api/v1/experiments/checkout/gate").json()
        assert (gate["verdict"], gate["decision_id"]) == ("stop", answer.json()["order"]["id"])
        listed = client.get("/api/v1/experiments/checkout/signals").json()["items"]
        assert [(one["action"], one["by"], one["reason"]) for one in listed] == [
            ("stop", "kim (by ci)", "the pager rang")
        ]


@pytest.mark.parametrize(
    ("path", "more", "said"),
    [
        ("pause", {}, {}),
        ("resume", {}, {}),
        ("ship", {"arm": "canary"}, {"arm": "canary"}),
        ("approve", {"signal": "s1"}, {"signal": "s1"}),
        ("reject", {"signal": "s1"}, {"signal": "s1"}),
        ("reset", {}, {}),
        ("set-stage", {"stage": 2}, {"stage": 2}),
    ],
)
def test_each_order_has_its_route(path: str, more: dict[str, Any], said: dict[str, Any]) -> None:
    here = world()
    desk = Desk(here)
    desk.error = ConfigError("it would change nothing")
    with serving(here, place=desk.place) as (client, _):
        answer = client.post(
            f"/api/v1/experiments/checkout/orders/{path}", json={"reason": "r", **more}, headers=BEARER
        )
        assert (answer.status_code, answer.json()) == (409, {"error": "it would change nothing"})
    expected = Call(
        experiment="checkout", action=OperatorAction(path.replace("-", "_")), actor="ci", reason="r", **said
    )
    assert desk.calls == [expected]


def test_a_request_that_is_repeated_with_its_key_orders_once() -> None:
    here = world()
    desk = Desk(here)
    with serving(here, place=desk.place) as (client, _):

        def order(key: str | None) -> str:
            headers = BEARER if key is None else BEARER | {"idempotency-key": key}
            url = "/api/v1/experiments/checkout/orders/pause"
            return str(client.post(url, json={"reason": "r"}, headers=headers).json()["order"]["id"])

        assert order("a") == order("a") != order("b")
        assert order(None) != order(None)
        assert len(client.get("/api/v1/experiments/checkout/signals").json()["items"]) == 4


def test_orders_that_make_no_sense_are_refused_before_anything_is_read() -> None:
    here = world()
    desk = Desk(here)
    bad: tuple[dict[str, Any], ...] = (
        {},
        {"reason": ""},
        {"reason": "r", "stage": -1},
        {"reason": "r", "why": 1},
        {"reason": 1},
    )
    with serving(here, place=desk.place) as (client, _):
        for body in bad:
            answer = client.post("/api/v1/experiments/checkout/orders/stop", json=body, headers=BEARER)
            assert answer.status_code == 400, body
        unknown = client.post("/api/v1/experiments/chekout/orders/stop", json={"reason": "r"}, headers=BEARER)
        assert unknown.status_code == 404
        long_key = BEARER | {"idempotency-key": "k" * 201}
        answer = client.post(
            "/api/v1/experiments/checkout/orders/stop", json={"reason": "r"}, headers=long_key
        )
        assert answer.status_code == 400
        assert (
            client.post("/api/v1/experiments/checkout/orders/delete", json={}, headers=BEARER).status_code
            == 404
        )
    assert desk.calls == []


def test_a_broker_that_takes_nothing_is_said_and_a_crowd_is_told_to_come_again() -> None:
    here = world()
    desk = Desk(here)
    desk.error = DependencyError("broker 10.0.0.9 is away")
    url = "/api/v1/experiments/checkout/orders/pause"
    with serving(here, place=desk.place) as (client, api):
        answer = client.post(url, json={"reason": "r"}, headers=BEARER)
        assert answer.status_code == 503
        assert "10.0.0.9" not in answer.text
        desk.hold = threading.Event()
        codes: list[int] = []
        threads = [
            threading.Thread(
                target=lambda: codes.append(
                    client.post(url, json={"reason": "r"}, headers=BEARER).status_code
                )
            )
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        until(lambda: api.orders._waiting == 8)
        crowded = client.post(url, json={"reason": "r"}, headers=BEARER)
        assert (crowded.status_code, crowded.headers["retry-after"]) == (429, "5")
        # The gates answer all the while.
        assert client.get("/api/v1/experiments/checkout/gate").status_code == 200
        assert len(desk.calls) == 1 + 2
        desk.hold.set()
        for thread in threads:
            thread.join(60)
        assert codes == [503] * 8


def until(condition: Callable[[], object]) -> None:
    waited = threading.Event()
    for _ in range(6000):
        if condition():
            return
        waited.wait(0.01)
    raise AssertionError("it never came")


# --- alerts --------------------------------------------------------------------------------------------------------


def test_an_alert_acts_as_a_guardrail_once() -> None:
    here = world()
    desk = Desk(here)
    with serving(here, place=desk.place) as (client, _):

        def alerted(*alerts: dict[str, Any]) -> list[tuple[str, str]]:
            answer = client.post("/api/v1/alertmanager", json=group(*alerts), headers=BEARER)
            assert answer.status_code == 200, answer.text
            return [(one["did"], one["reason"]) for one in answer.json()["alerts"]]

        assert client.get("/api/v1/experiments/checkout/gate").json()["verdict"] == "pass"
        assert alerted(ALERT) == [("ordered", "")]
        gate = client.get("/api/v1/experiments/checkout/gate").json()
        assert gate["verdict"] == "stop"
        reason = "CheckoutErrors fires since 2027-01-15T07:59:00Z (alert c8fef55b1fe2f6a8)"
        assert gate["reason"] == f"alertmanager: {reason}"
        # Sent again while it fires, with another value in its text; then resolved.
        again = ALERT | {"annotations": {"summary": "errors are 4 times the usual"}}
        assert alerted(again, ALERT) == [("known", ""), ("known", "")]
        assert alerted(ALERT | {"status": "resolved"})[0][0] == "nothing"
        assert len(desk.calls) == 1
        # A person has looked and takes it back: the same alert stops it no second time, a new one does.
        reset = {"reason": "a false alarm"}
        assert (
            client.post("/api/v1/experiments/checkout/orders/reset", json=reset, headers=BEARER).status_code
            == 202
        )
        assert alerted(ALERT) == [("known", "")]
        assert client.get("/api/v1/experiments/checkout/gate").json()["verdict"] == "pass"
        assert alerted(ALERT | {"startsAt": "2027-01-15T08:10:00Z"}) == [("ordered", "")]
        assert client.get("/api/v1/experiments/checkout/gate").json()["verdict"] == "stop"


def test_an_alert_may_only_pause() -> None:
    here = world()
    desk = Desk(here)
    pausing = ALERT | {"labels": ALERT["labels"] | {"stream_xp_action": "pause"}}  # type: ignore[operator]
    with serving(here, place=desk.place) as (client, _):
        client.post("/api/v1/alertmanager", json=group(pausing), headers=BEARER)
        assert client.get("/api/v1/experiments/checkout/gate").json()["cause"] == "held"


def test_what_an_alert_cannot_do_is_told_and_the_others_of_its_group_still_act() -> None:
    here = world()
    desk = Desk(here)
    labels: dict[str, str] = ALERT["labels"]  # type: ignore[assignment]
    nothing = [
        ALERT | {"labels": {"alertname": "A"}},
        ALERT | {"labels": labels | {"experiment": "chekout"}},
        ALERT | {"labels": labels | {"stream_xp_action": "ship"}},
        ALERT | {"fingerprint": ""},
        ALERT | {"status": "resolved"},
    ]
    with serving(here, place=desk.place) as (client, _):
        answer = client.post("/api/v1/alertmanager", json=group(*nothing, ALERT), headers=BEARER)
        outcomes = answer.json()["alerts"]
        assert [one["did"] for one in outcomes] == ["nothing"] * 5 + ["ordered"]
        assert all(one["reason"] for one in outcomes[:5])
        bodies = ({}, {"alerts": [{"labels": {}}]}, {"alerts": [ALERT | {"labels": {"a": 1}}]})
        for body in bodies:
            assert client.post("/api/v1/alertmanager", json=body, headers=BEARER).status_code == 400
    assert len(desk.calls) == 1


def test_alertmanager_sends_again_what_no_broker_took() -> None:
    here = world()
    desk = Desk(here)
    desk.error = DependencyError("away")
    with serving(here, place=desk.place) as (client, _):
        assert client.post("/api/v1/alertmanager", json=group(ALERT), headers=BEARER).status_code == 503
        desk.error = None
        answer = client.post("/api/v1/alertmanager", json=group(ALERT), headers=BEARER)
        assert answer.json()["alerts"][0]["did"] == "ordered"


def test_an_alert_on_what_is_stopped_changes_nothing() -> None:
    here = world("stop")
    desk = Desk(here)
    desk.error = ConfigError("checkout: stop would change nothing")
    with serving(here, place=desk.place) as (client, _):
        answer = client.post("/api/v1/alertmanager", json=group(ALERT), headers=BEARER)
        assert answer.json()["alerts"][0]["did"] == "nothing"
        assert STATES["stop"].verdict == client.get("/api/v1/experiments/checkout/gate").json()["verdict"]


def many(count: int, *, first: int = 0, **labels: str) -> list[dict[str, Any]]:
    base: dict[str, str] = ALERT["labels"]  # type: ignore[assignment]
    return [
        ALERT | {"labels": base | labels | {"instance": f"i{n}"}, "fingerprint": f"{n:016x}"}
        for n in range(first, first + count)
    ]


def test_ten_thousand_alerts_do_not_hide_the_one_that_matters(capsys: pytest.CaptureFixture[str]) -> None:
    here = world()
    desk = Desk(here)
    crowd = many(9_999, experiment="\u202e<script>\r\n\x1b[2J\x00" * 3)
    with serving(here, place=desk.place) as (client, _):
        answer = client.post("/api/v1/alertmanager", json=group(*crowd, ALERT), headers=BEARER)
        assert answer.status_code == 200, answer.text[:200]
        outcomes = [one["did"] for one in answer.json()["alerts"]]
        assert outcomes == ["nothing"] * 9_999 + ["ordered"]
        assert client.get("/api/v1/experiments/checkout/gate").json()["verdict"] == "stop"
        too_many = client.post("/api/v1/alertmanager", json=group(*many(10_001)), headers=BEARER)
        assert too_many.status_code == 400
        too_long = client.post(
            "/api/v1/alertmanager",
            content=b" " * 8_388_609,
            headers={**BEARER, "content-type": "application/json"},
        )
        assert too_long.status_code == 413
    said = capsys.readouterr().out
    # Of the crowd there is one line, and no letter of its own in it.
    assert said.count("alerts change nothing") == 1
    assert len(said) < 5_000
    assert "script" not in said


def test_a_crowd_of_alerts_on_one_experiment_is_one_order() -> None:
    """Each order reads topics: as many as alerts would keep people's orders out."""
    here = world()
    desk = Desk(here)
    with serving(here, place=desk.place) as (client, _):
        answer = client.post("/api/v1/alertmanager", json=group(*many(500)), headers=BEARER)
        outcomes = answer.json()["alerts"]
        assert [one["did"] for one in outcomes] == ["ordered"] + ["nothing"] * 499
        assert len(desk.calls) == 1
        # One that only pauses is asked for besides.
        pausing = many(2, first=500, stream_xp_action="pause")
        client.post("/api/v1/alertmanager", json=group(*many(2), *pausing), headers=BEARER)
        assert [call.action for call in desk.calls[1:]] == [OperatorAction.STOP, OperatorAction.PAUSE]


def test_what_an_alert_says_of_itself_steers_no_terminal() -> None:
    here = world()
    desk = Desk(here)
    hostile = ALERT | {
        "labels": {"experiment": "checkout", "alertname": "A\x1b[2J\r\nSet-Cookie: x", "\x00": "\u2028"},
        "startsAt": "2027\x1b]0;owned\x07",
        "fingerprint": "f\r\n\x9b" + "f" * 5_000,
    }
    with serving(here, place=desk.place) as (client, _):
        answer = client.post("/api/v1/alertmanager", json=group(hostile), headers=BEARER)
        assert answer.json()["alerts"][0]["did"] == "ordered"
        surrogate = b'{"alerts": [{"status": "firing", "labels": {"experiment": "\\ud800"}}]}'
        headers = {**BEARER, "content-type": "application/json"}
        assert client.post("/api/v1/alertmanager", content=surrogate, headers=headers).status_code == 400
    (call,) = desk.calls
    assert call.reason.isprintable()
    assert len(call.reason) < 400
