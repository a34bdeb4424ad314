"""What explains wrong statistics: the search finds the record that the test lost, doubled or let in."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from stream_xp.domain.ages import Ages
from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import (
    Adjustment,
    Aggregation,
    Arm,
    Covariate,
    Denominator,
    Direction,
    ExperimentRecord,
    ExperimentSpec,
    Metric,
    MetricKind,
    Role,
    WeightEpoch,
)
from stream_xp.services.oracle import explain as module
from stream_xp.services.oracle.compare import first_mismatch
from stream_xp.services.oracle.explain import Case, Cut, Effect, Explanation, explain, first_wrong
from stream_xp.services.oracle.recompute import (
    EXPOSURES,
    REWARDS,
    Fate,
    Lateness,
    LoggedRecord,
    LoggedSpec,
    Screened,
    Screening,
    screen,
    statistics_of,
)

if TYPE_CHECKING:
    from stream_xp.domain.statistics import ExperimentStatistics

L = 1_000
T = 1_000_000
W = T + 10**6
VERSION = ("exp", 1)


def metric(key: str, kind: MetricKind, **changes: Any) -> Metric:
    plain = {"role": Role.PRIMARY, "direction": Direction.INCREASE, "attribution_window": "5s"}
    return Metric(**{"key": key, "kind": kind, **plain, **changes})


SPEC = ExperimentSpec(
    experiment="exp",
    owner="team",
    hypothesis="better",
    unit="member",
    arms=(Arm(key="a", weight=0.5, control=True), Arm(key="b", weight=0.5)),
    metrics=(
        metric("click", MetricKind.CONVERSION),
        metric("spend", MetricKind.MEAN, bound=100.0, scale=0.5, adjustment=Adjustment.CUPED),
        metric(
            "per_click",
            MetricKind.RATIO,
            event="spend",
            bound=100.0,
            scale=0.5,
            denominator=Denominator(event="click", aggregation=Aggregation.ANY),
        ),
        metric("errors", MetricKind.COUNT, event="error"),
        metric("wait", MetricKind.LATENCY, bound=100.0, scale=0.5),
    ),
    planned_sample=1000,
    covariate=Covariate(scale=1.0, bound=9.0),
    segments={"device": ("tv",)},
)


def drawn(seed: int, units: int = 60, max_units: int | None = None) -> Screening:
    """A prefix of many units with rewards of all kinds, some of them twice, some late."""
    dice = random.Random(seed)
    logs: dict[str, list[LoggedRecord]] = {EXPOSURES: [], REWARDS: []}

    def add(topic: str, time_ms: int, unit: str, *, id_: str | None = None, **fields: Any) -> None:
        log = logs[topic]
        event = {"id": id_ or f"{topic}{len(log)}", "time": time_ms, "unit": unit, **fields}
        at_ms = max([T, *(one.timestamp_ms for one in log[-1:])]) + dice.randrange(20)
        log.append(LoggedRecord(len(log), at_ms, unit.encode(), json.dumps(event).encode()))

    for n in range(units):
        unit, at_ms = f"u{n}", T + 10 * n
        arm = dice.choice("ab")
        device = {"device": dice.choice(["tv", "web"])}
        add(EXPOSURES, at_ms, unit, experiment="exp", arm=arm, covariate=float(n % 9), segments=device)
        for _ in range(dice.randrange(4)):
            name = dice.choice(["click", "spend", "error", "wait", "noise"])
            # Each value once, so that no two records have the same effect on sums.
            value = 0.5 * (1 + len(logs[REWARDS]))
            add(REWARDS, at_ms + dice.randrange(400), unit, metric=name, value=value)
        if dice.random() < 0.1:
            add(REWARDS, at_ms, unit, metric="spend", value=90.0, id_="once")
    return screened(logs, max_units=max_units)


def screened(
    logs: dict[str, list[LoggedRecord]], watermark_ms: int = W, max_units: int | None = None
) -> Screening:
    epoch = WeightEpoch(epoch=0, weights=SPEC.weights, effective_ms=0)
    record = ExperimentRecord(spec=SPEC, epochs=(epoch,), design_hash=SPEC.design_hash())
    return screen(
        logs[EXPOSURES],
        logs[REWARDS],
        [LoggedSpec(0, "exp", record)],
        watermark_ms=watermark_ms,
        allowed_lateness_ms=L,
        activation_delay_ms=0,
        limits=Limits(),
        behind_watermark={},
        max_units=max_units,
    )


def end_of(screening: Screening) -> Cut:
    """The whole of what was screened."""
    last = [
        max(one.offset for one in (*log.admitted, *log.refused, *log.over))
        for log in (screening.seen, screening.heard)
    ]
    return Cut(exposures=last[0], rewards=last[1])


def explained(screening: Screening, published: ExperimentStatistics, end: Cut | None = None) -> Explanation:
    case = Case(VERSION, published, screening, end or end_of(screening))
    mismatch = first_mismatch(published, statistics_of(case.cut(case.end), VERSION))
    assert mismatch is not None
    return explain(case, mismatch, watermarks=(T, W + 1, T + 6_200))


def without(screened: Screened[Any], offset: int) -> Screened[Any]:
    rest = [one for one in screened.admitted if one.offset != offset]
    over = [one for one in screened.over if one.offset != offset]
    return Screened(screened.fates, screened.reasons, rest, screened.refused, over)


def with_one_more(screened: Screened[Any], offset: int) -> Screened[Any]:
    (extra,) = (one for one in (*screened.admitted, *screened.refused) if one.offset == offset)
    more = sorted([*screened.admitted, extra], key=lambda one: one.offset)
    return Screened(screened.fates, screened.reasons, more, screened.refused, screened.over)


@pytest.mark.parametrize("seed", range(2))
def test_a_lost_reward_is_named(seed: int) -> None:
    screening, tried = drawn(seed), 0
    truth = statistics_of(screening, VERSION)
    for one in screening.heard.admitted[::7]:
        wrong = statistics_of(screening._replace(heard=without(screening.heard, one.offset)), VERSION)
        if wrong.canonical() == truth.canonical():
            continue
        found = explained(screening, wrong)
        named = [(s.effect, s.topic, s.offset) for s in found.suspects]
        assert (Effect.LOST, REWARDS, one.offset) in named or found.more_suspects
        if one.event.metric == "spend":
            assert named == [(Effect.LOST, REWARDS, one.offset)]
            assert found.more_suspects == 0
        tried += 1
    assert tried > 3


@pytest.mark.parametrize("seed", range(2))
def test_a_doubled_reward_is_named(seed: int) -> None:
    screening = drawn(seed)
    spends = [one for one in screening.heard.admitted if one.event.metric == "spend"]
    for one in spends[::5]:
        wrong = statistics_of(screening._replace(heard=with_one_more(screening.heard, one.offset)), VERSION)
        found = explained(screening, wrong)
        assert [(s.effect, s.offset, s.fate) for s in found.suspects] == [
            (Effect.DOUBLED, one.offset, Fate.COUNTED)
        ]


def test_a_duplicate_that_was_let_in_is_named() -> None:
    screening = drawn(3, units=200)
    refused = [one for one in screening.heard.refused if one.event.metric == "spend"]
    assert refused
    wrong = statistics_of(
        screening._replace(heard=with_one_more(screening.heard, refused[-1].offset)), VERSION
    )
    found = explained(screening, wrong)
    assert (Effect.LET_IN, refused[-1].offset) in [(s.effect, s.offset) for s in found.suspects]
    assert {s.fate for s in found.suspects} <= {Fate.DUPLICATE, Fate.LATE}


def test_a_lost_exposure_is_named() -> None:
    screening = drawn(4)
    one = screening.seen.admitted[17]
    wrong = statistics_of(screening._replace(seen=without(screening.seen, one.offset)), VERSION)
    found = explained(screening, wrong)
    assert (Effect.LOST, EXPOSURES, one.offset) in [(s.effect, s.topic, s.offset) for s in found.suspects]


@pytest.mark.parametrize(("exposures", "rewards"), [(-1, 0), (0, -2), (-4, 0), (0, -9), (2, 0), (0, 4)])
def test_statistics_of_another_prefix_are_recognised(exposures: int, rewards: int) -> None:
    screening = drawn(5, units=120)
    claimed = Cut(exposures=80, rewards=90)
    case = Case(VERSION, statistics_of(screening, VERSION), screening, claimed)
    published = statistics_of(case.cut(Cut(exposures=80 + exposures, rewards=90 + rewards)), VERSION)
    found = explained(screening, published, claimed)
    assert found.prefix is not None
    assert statistics_of(case.cut(found.prefix), VERSION).canonical() == published.canonical()
    assert (found.prefix.exposures == 80) == (exposures == 0)


@pytest.mark.parametrize("seconds", [-0.3, -0.05, 0.08, 0.2])
def test_a_prefix_that_ends_at_another_time_in_both_topics_is_recognised(seconds: float) -> None:
    screening = drawn(5, units=120)
    case = Case(VERSION, statistics_of(screening, VERSION), screening, Cut(exposures=None, rewards=None))
    claimed, real = (
        Cut(
            exposures=max(one.offset for one in screening.seen.admitted if one.log_ms <= until_ms),
            rewards=max(one.offset for one in screening.heard.admitted if one.log_ms <= until_ms),
        )
        for until_ms in (T + 800, T + 800 + int(seconds * 1000))
    )
    published = statistics_of(case.cut(real), VERSION)
    found = explained(screening, published, claimed)
    assert found.prefix is not None
    assert statistics_of(case.cut(found.prefix), VERSION).canonical() == published.canonical()


def test_statistics_at_another_watermark_are_recognised() -> None:
    screening = drawn(6)
    early = screening._replace(rules=Lateness(L, T + 6_200))
    found = explained(screening, statistics_of(early, VERSION))
    assert found.watermark_ms == T + 6_200


def test_what_no_single_record_explains_has_no_suspect_but_contributors() -> None:
    screening = drawn(7)
    spends = [one.offset for one in screening.heard.admitted if one.event.metric == "spend"]
    heard = without(without(screening.heard, spends[1]), spends[4])
    wrong = statistics_of(screening._replace(heard=heard), VERSION)
    found = explained(screening, wrong)
    assert (found.suspects, found.prefix, found.watermark_ms, found.exhaustive) == ((), None, None, True)
    assert {spends[1], spends[4]} & set(found.contributors.rewards)
    assert len(found.contributors.rewards) == min(20, found.contributors.reward_count)


def test_contributors_are_those_after_the_last_prefix_known_to_be_right() -> None:
    screening = drawn(7)
    spends = [one.offset for one in screening.heard.admitted if one.event.metric == "spend"]
    wrong = statistics_of(screening._replace(heard=without(screening.heard, spends[-1])), VERSION)
    case = Case(VERSION, wrong, screening, end_of(screening))
    mismatch = first_mismatch(wrong, statistics_of(screening, VERSION))
    assert mismatch is not None
    since = Cut(exposures=end_of(screening).exposures, rewards=spends[-1] - 1)
    found = explain(case, mismatch, since=since)
    assert found.contributors.exposures == ()
    assert min(found.contributors.rewards) == spends[-1]


def test_a_search_that_gives_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TRIALS", 10)
    screening = drawn(7)
    spends = [one.offset for one in screening.heard.admitted if one.event.metric == "spend"]
    wrong = statistics_of(screening._replace(heard=without(screening.heard, spends[-1])), VERSION)
    found = explained(screening, wrong)
    assert not found.exhaustive
    assert found.suspects == ()


# Past the bound of units


def test_a_lost_reward_is_named_past_the_bound() -> None:
    screening = drawn(2, units=120, max_units=50)
    assert len(screening.seen.over) == 70
    inside = {one.event.unit for one in screening.seen.admitted}
    one = next(
        one
        for one in screening.heard.admitted[30:]
        if one.event.metric == "spend" and one.event.unit in inside
    )
    wrong = statistics_of(screening._replace(heard=without(screening.heard, one.offset)), VERSION)
    found = explained(screening, wrong)
    assert [(s.effect, s.offset) for s in found.suspects] == [(Effect.LOST, one.offset)]


@pytest.mark.parametrize("at", [0, 5])
def test_an_exposure_that_was_lost_past_the_bound_is_one_of_many(at: int) -> None:
    screening = drawn(2, max_units=50)
    wrong = statistics_of(
        screening._replace(seen=without(screening.seen, screening.seen.over[at].offset)), VERSION
    )
    found = explained(screening, wrong)
    assert {(s.effect, s.topic, s.fate) for s in found.suspects} == {
        (Effect.LOST, EXPOSURES, Fate.OVER_LIMIT)
    }
    assert len(found.suspects) + found.more_suspects == len(screening.seen.over) == 10
    assert found.contributors.exposure_count == 10
    assert not found.exhaustive


@pytest.mark.parametrize("exposures", [-3, 4])
def test_another_prefix_past_the_bound_is_recognised(exposures: int) -> None:
    screening = drawn(5, units=120, max_units=60)
    claimed = Cut(exposures=80, rewards=90)
    case = Case(VERSION, statistics_of(screening, VERSION), screening, claimed)
    published = statistics_of(case.cut(Cut(exposures=80 + exposures, rewards=90)), VERSION)
    assert published.over_limit == 21 + exposures
    found = explained(screening, published, claimed)
    assert found.prefix == Cut(exposures=80 + exposures, rewards=90)


# The bisection of what was published


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_the_first_wrong_publication_is_found_in_few_steps(count: int) -> None:
    for bad in range(count):
        asked: list[int] = []

        def wrong(at: int, bad: int = bad, asked: list[int] = asked) -> bool:
            asked.append(at)
            return at >= bad

        assert first_wrong(count, wrong) == bad
        assert len(asked) <= count.bit_length()


@pytest.mark.parametrize("seed", range(20))
def test_where_wrong_does_not_stay_wrong_it_still_comes_after_a_right_one(seed: int) -> None:
    dice = random.Random(seed)
    states = [dice.random() < 0.5 for _ in range(40)] + [True]
    found = first_wrong(len(states), lambda at: states[at])
    assert states[found]
    assert found == 0 or not states[found - 1]


def test_a_reward_that_is_lost_in_a_bucket_of_age_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attribution window is over long before: only the rows of buckets differ."""
    short = tuple(msgspec.structs.replace(one, attribution_window="1ms") for one in SPEC.metrics)
    spend = msgspec.structs.replace(short[1], adjustment=Adjustment.NONE)
    ages = Ages(metrics=("spend",), until=("100ms", "200ms", "300ms", "400ms"))
    aged = msgspec.structs.replace(SPEC, metrics=(short[0], spend, *short[3:]), ages=ages)
    monkeypatch.setitem(globals(), "SPEC", aged)
    screening, tried = drawn(7, units=200), set()
    truth = statistics_of(screening, VERSION)
    for one in screening.heard.admitted:
        wrong = statistics_of(screening._replace(heard=without(screening.heard, one.offset)), VERSION)
        mismatch = first_mismatch(wrong, truth)
        # Some rewards have one id and one value; each of them explains the loss of another.
        alike = one.event.metric != "spend" or one.event.id == "once"
        if alike or mismatch is None or mismatch.metric in tried:
            continue
        found = explained(screening, wrong)
        assert [(s.effect, s.topic, s.offset) for s in found.suspects] == [(Effect.LOST, REWARDS, one.offset)]
        assert mismatch.metric is not None
        listed = [
            other.offset for other in screening.heard.admitted if other.offset in found.contributors.rewards
        ]
        assert one.offset in listed
        assert len(listed) < sum(other.event.metric == "spend" for other in screening.heard.admitted) / 2
        tried.add(mismatch.metric)
    assert {"spend@age1", "spend@age2", "spend@age3", "spend@age4"} <= tried
