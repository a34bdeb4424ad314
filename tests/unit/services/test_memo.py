"""The decision record, from golden records: what it holds, how it reads, and what an effect is worth."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from stream_xp import stats
from stream_xp.adapters.kafka_admin import topics_dir
from stream_xp.domain.decision import (
    Action,
    AgeChange,
    AgeEffect,
    AgeResult,
    Evidence,
    Method,
    MetricResult,
    MetricState,
    QuantileResult,
    Result,
    SegmentResult,
    Signal,
)
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, MetricKind, WeightEpoch
from stream_xp.domain.operator import OperatorAction, Order, OrderSignal
from stream_xp.domain.statistics import ALL, MetricMoments
from stream_xp.engine.comparison import Comparison, Stratum
from stream_xp.engine.design import plans
from stream_xp.engine.mean_findings import mean_findings
from stream_xp.engine.segments import shrunk_segments
from stream_xp.services.memo import conclusions, markdown, memo, worth
from stream_xp.services.memo.build import Facts
from stream_xp.services.memo.plots import can_plot, write_plots
from stream_xp.services.memo.record import Force, Memo, PriorSource
from stream_xp.services.memo.worth import Past, past_effects, shrunk, standard_error

if TYPE_CHECKING:
    from pathlib import Path

GOLDEN = msgspec.json.decode(min((topics_dir() / "golden").rglob("*signal*.json")).read_bytes(), type=Signal)


def spec(**fields: Any) -> ExperimentSpec:
    body: dict[str, Any] = {
        "experiment": "exp",
        "owner": "tests",
        "hypothesis": "more | people <b>click</b>",
        "unit": "member",
        "planned_sample": 4000,
        "arms": [{"key": "old", "weight": 0.5, "control": True}, {"key": "new", "weight": 0.5}],
        "metrics": [
            {
                "key": "click",
                "kind": "conversion",
                "role": "primary",
                "direction": "increase",
                "attribution_window": "1h",
                "minimum_effect": {"absolute": 0.01},
            },
            {
                "key": "spent",
                "kind": "mean",
                "role": "guardrail",
                "direction": "increase",
                "attribution_window": "1h",
                "bound": 100.0,
                "scale": 0.01,
                "margin": {"relative": 0.02},
            },
        ],
    }
    return msgspec.convert(body | fields, ExperimentSpec)


def record(design: ExperimentSpec, *more: WeightEpoch) -> ExperimentRecord:
    first = WeightEpoch(epoch=0, weights=design.weights, effective_ms=0)
    return ExperimentRecord(spec=design, epochs=(first, *more), design_hash=design.design_hash())


RECORD = record(
    spec(),
    WeightEpoch(
        epoch=1, weights={"old": 0.0, "new": 1.0}, effective_ms=3_600_000, final=True, signal_id="won"
    ),
)


def metric(
    estimate: float = 0.05, half: float = 0.04, *, key: str = "click", units: int = 2000
) -> MetricResult:
    conversion = key == "click"
    return MetricResult(
        metric=key,
        role="primary" if conversion else "guardrail",
        arm="new",
        state=MetricState.BETTER if conversion else MetricState.SAFE,
        method=Method.EXACT_THEN_ASYMPTOTIC if conversion else Method.ASYMPTOTIC,
        control_units=units // 2,
        arm_units=units - units // 2,
        control_mean=0.2,
        arm_mean=0.2 + estimate,
        effect=Evidence(estimate, estimate - half, estimate + half, 4.0, 0.018, 3.0),
    )


def result(look: int, **fields: Any) -> Result:
    known: dict[str, Any] = {
        "experiment": "exp",
        "version": 1,
        "look": look,
        "evaluated_ms": 1_000 * look,
        "invalid": (),
        "crossover_units": 0,
        "metrics": (metric(units=100 * look), metric(0.5, 0.4, key="spent", units=100 * look)),
    }
    return msgspec.structs.replace(GOLDEN.data.result, **(known | fields))


def decided(
    identity: str,
    action: Action = Action.SHIP,
    *,
    look: int = 3,
    proposed: bool = False,
    since: str | None = None,
) -> Signal:
    decision = msgspec.structs.replace(
        GOLDEN.data.decision, action=action, arm="new", metric="click", reason="click is *better*\nin new"
    )
    data = msgspec.structs.replace(
        GOLDEN.data, decision=decision, result=result(look, decision=decision), proposed=proposed, since=since
    )
    return msgspec.structs.replace(GOLDEN, id=identity, time=f"1970-01-01T00:00:0{look}+00:00", data=data)


def ordered(identity: str, action: str, *, second: int = 4, **fields: Any) -> OrderSignal:
    order = Order(
        experiment="exp", version=1, action=OperatorAction(action), actor="kim", reason="as agreed", **fields
    )
    return OrderSignal(
        id=identity, source="/p", subject="exp", time=f"1970-01-01T00:00:0{second}+00:00", data=order
    )


def facts(*said: Signal | OrderSignal, past: tuple[Past, ...] = (), looks: int = 3) -> Facts:
    return Facts(RECORD, said, tuple(result(look) for look in range(1, looks + 1)), past)


def newest(found: Facts) -> Memo:
    return memo(found, conclusions(found)[-1])


# --- which decisions have a memo ----------------------------------------------------------------------------


def test_every_stop_and_ship_that_counted_has_a_memo() -> None:
    found = facts(
        decided("went", Action.ADVANCE),
        decided("waits", Action.SHIP, proposed=True),
        ordered("no", "reject", signal_id="waits"),
        ordered("end", "stop"),
        decided("late", Action.SHIP),
        ordered("twice", "ship", arm="new"),
    )
    assert [one.id for one in conclusions(found)] == ["waits", "end"]


@pytest.mark.parametrize(
    ("after", "force"),
    [
        ((), Force.WAITS),
        ((ordered("o", "approve", signal_id="won"),), Force.IN_FORCE),
        ((ordered("o", "reject", signal_id="won"),), Force.REJECTED),
        ((ordered("o", "reset"),), Force.TAKEN_BACK),
        ((ordered("o", "stop"),), Force.TAKEN_BACK),
    ],
    ids=["nothing", "approve", "reject", "reset", "stop"],
)
def test_a_memo_says_where_its_decision_stands(after: tuple[OrderSignal, ...], force: Force) -> None:
    found = facts(decided("won", proposed=True), *after)
    one = memo(found, conclusions(found)[0])
    assert (one.decided.force, one.decided.proposed, one.decided.by) == (force, True, "the service")
    assert one.decided.approved_by == ("kim" if force is Force.IN_FORCE else None)


def test_a_decision_of_a_person_shows_the_evidence_of_before_it() -> None:
    one = newest(facts(ordered("end", "stop", second=2), looks=4))
    assert (one.decided.by, one.decided.action, one.decided.arm) == ("kim", Action.STOP, "old")
    assert (one.decided.reason, one.seen.look) == ("as agreed", 2)
    assert any("A person (kim) decided this, not the evidence" in text for text in one.caveats)


def test_an_order_before_any_result_has_nothing_to_show() -> None:
    with pytest.raises(ValueError, match="no result is known"):
        newest(Facts(RECORD, (ordered("end", "stop"),), ()))


def test_the_audit_trail_has_everything_and_says_what_counts() -> None:
    one = newest(
        facts(
            ordered("p", "pause", second=1),
            ordered("q", "pause", second=2),
            decided("won"),
            ordered("s", "set_stage", stage=2),
        )
    )
    assert [(line.by, line.what, line.about, line.nothing) for line in one.audit] == [
        ("kim", "pause", "", None),
        ("kim", "pause", "", "it is paused already"),
        ("the service", "ship", "new, click", None),
        ("kim", "set-stage", "stage 2", "a ship is in force; a reset must come first"),
    ]


# --- what was seen ------------------------------------------------------------------------------------------


def test_history_ends_with_the_decision() -> None:
    one = newest(facts(decided("won"), looks=5))
    click = one.metrics[0]
    assert [point.look for point in click.history] == [1, 2, 3]
    assert [point.units for point in click.history] == [100, 200, 300]
    assert (click.since_units, one.seen.known_looks) == (100, 3)


def test_looks_that_are_gone_are_said() -> None:
    found = Facts(RECORD, (decided("won"),), (result(3),))
    assert any("Of 3 looks 1 are still known" in text for text in newest(found).caveats)
    assert not any("still known" in text for text in newest(facts(decided("won"))).caveats)


def test_invalid_reasons_are_spans_of_looks() -> None:
    reasons = [("a",), ("a", "b"), (), ("a",)]
    looks = tuple(result(at, invalid=why) for at, why in enumerate(reasons, start=1))
    found = Facts(RECORD, (decided("won", look=4),), looks)
    spans = [(one.reason, one.first_look, one.last_look, one.from_ms) for one in newest(found).invalid]
    assert spans == [("a", 1, 2, 1_000), ("b", 2, 2, 2_000), ("a", 4, 4, 4_000)]


def test_an_asymptotic_method_says_from_which_n() -> None:
    caveats = newest(facts(decided("won"))).caveats
    (said,) = [text for text in caveats if "spent in new (asymptotic)" in text]
    assert "there were 300; the first known look has 100 units" in said
    assert not any("click in new (exact" in text for text in caveats)


# --- what an effect is worth --------------------------------------------------------------------------------


def rows(n: int, s: int, q: int, *, key: str, arm: str) -> MetricMoments:
    return MetricMoments(key, arm, 0, ALL, n, str(s), str(q))


@pytest.mark.parametrize(("treated", "sign"), [(560, 1), (440, -1)], ids=["above", "below"])
def test_the_standard_error_is_that_of_the_engine(treated: int, sign: int) -> None:
    """The one read from the sequence is the one that the engine had: of a conversion, and of a mean."""
    design = RECORD
    for at, key in enumerate(("click", "spent")):
        values = [(2000, 500), (2000, treated)]
        control, arm = (
            rows(n, s, s, key=key, arm=arm) for (n, s), arm in zip(values, ("old", "new"), strict=True)
        )
        plan = plans(design)[at]._replace(standard_error=True)
        finding = mean_findings([Comparison(plan, "new", ALL, (Stratum(0, 0.5, control, arm),))])[0]
        known = {name: getattr(finding, name) for name in finding.__struct_fields__}
        found = MetricResult(
            metric=key, role="primary", arm="new", state=MetricState.BETTER, method=plan.method, **known
        )
        truth = found.standard_error
        assert truth is not None
        assert found.effect is not None
        assert found.effect.estimate is not None
        assert sign * found.effect.estimate > 0
        read = standard_error(design, msgspec.structs.replace(found, standard_error=None))
        assert read == pytest.approx(truth, rel=1e-3)
        assert standard_error(design, found) == truth


@pytest.mark.parametrize("method", [Method.RATE_RATIO, Method.QUANTILE])
def test_no_standard_error_is_read_from_other_sequences(method: Method) -> None:
    found = msgspec.structs.replace(metric(), method=method)
    assert standard_error(RECORD, found) is None
    assert shrunk(RECORD, found, ()).note == "there is no standard error to shrink by"


def past(number: int, *, key: str = "click", kind: MetricKind = MetricKind.CONVERSION) -> tuple[Past, ...]:
    effects = [0.01 * (-1) ** at * (1 + at % 3) for at in range(number)]
    return tuple(Past(f"past-{at}", 1, key, kind, "new", effect, 0.005) for at, effect in enumerate(effects))


def test_an_effect_is_shrunk_by_past_experiments() -> None:
    found = shrunk(RECORD, metric(), past(12))
    assert found.experiments == 12
    assert found.standard_error is not None
    assert found.effect is not None
    assert 0 < found.effect < 0.05
    prior = stats.prior_from_past([one.effect for one in past(12)], [0.005] * 12)
    again = stats.selected_effect(0.05, found.standard_error, prior_sd=float(prior.sd))
    assert (found.effect, found.type_s, found.type_m) == (again.effect, again.type_s, again.type_m)


TOO_FEW = "no prior could be learned: {} past effects on this metric are known, 10 are needed"


def test_too_few_past_experiments_give_the_default_prior_and_say_so() -> None:
    found = shrunk(RECORD, metric(), past(9))
    assert (found.prior, found.experiments) == (PriorSource.DEFAULT, 9)
    assert found.prior_sd == pytest.approx(0.3 * 0.2)
    assert found.note is not None
    assert found.note.startswith(TOO_FEW.format(9) + "; as wide as 30 % of the control mean")
    again = stats.selected_effect(0.05, found.standard_error or 0.0, prior_sd=0.3 * 0.2)
    assert (found.effect, found.type_s, found.type_m) == (again.effect, again.type_s, again.type_m)
    learned = shrunk(RECORD, metric(), past(10))
    assert (learned.prior, learned.note) == (PriorSource.LEARNED, None)


def test_the_default_prior_is_at_least_as_wide_as_the_minimum_effect() -> None:
    without_mean = msgspec.structs.replace(metric(), control_mean=0.0)
    assert shrunk(RECORD, without_mean, ()).prior_sd == pytest.approx(0.01)
    guardrail = msgspec.structs.replace(metric(0.5, 0.4, key="spent"), control_mean=0.0)
    found = shrunk(RECORD, guardrail, ())
    assert (found.effect, found.prior) == (None, None)
    assert found.note == (
        TOO_FEW.format(0)
        + ", and no default one: the control mean is 0, and the metric has no minimum effect"
    )


def test_the_past_is_bounded_and_keeps_what_began_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worth, "MOST_PAST", 3)
    names = [f"e{at}" for at in range(6)]
    records = {(name, 1): RECORD for name in names}
    results = [
        # The later it began, the sooner it ended.
        result(
            1, experiment=name, evaluated_ms=9000 - at, runtime_ms=5000 - 3 * at, metrics=(metric(0.01 * at),)
        )
        for at, name in enumerate(names)
    ]
    found = past_effects(records, results)
    assert [one.experiment for one in found] == ["e3", "e4", "e5"]
    assert past_effects(records, reversed(results)) == found


def test_only_the_same_metric_of_other_experiments_counts() -> None:
    others = (*past(12, key="spent"), *past(12, kind=MetricKind.MEAN))
    mine = tuple(one._replace(experiment="exp") for one in past(12))
    assert shrunk(RECORD, metric(), (*others, *mine)).experiments == 0


def test_past_effects_need_their_record_and_a_standard_error() -> None:
    records = {("exp", 1): RECORD}
    untested = msgspec.structs.replace(metric(), effect=None)
    results = [result(3), result(3, version=2), result(4, metrics=(untested,))]
    found = past_effects(records, results)
    assert [(one.experiment, one.metric, one.kind) for one in found] == [
        ("exp", "click", MetricKind.CONVERSION),
        ("exp", "spent", MetricKind.MEAN),
    ]


# --- how it reads -------------------------------------------------------------------------------------------


def test_the_page_has_every_part() -> None:
    found = facts(decided("won", proposed=True), ordered("yes", "approve", signal_id="won"), past=past(12))
    text = markdown(newest(found))
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads == [
        "# exp, version 1: ship (new, click)",
        "## Plan",
        "## What was seen",
        "## Evidence",
        "## What the effects are worth",
        "## Weights and coverage",
        "## Caveats",
        "## Who said what",
        "## Where it comes from",
    ]
    assert "**in force**, decided by the service, approved by kim at" in text
    assert "minimum effect 0.01" in text
    assert "margin 2 % of the control" in text
    assert "learned, sd 0.02" in text
    assert "- Effects are shrunk by a default prior: no prior could be learned: 0 past effects" in text
    assert "| 1 | 1970-01-01 01:00:00 UTC | 1 | old 0, new 1 (final) | won |" in text
    assert "`stream-xp verify won` derives it again" in text


def test_the_plan_says_what_it_has_to_do_with_others() -> None:
    beside = spec(
        layer={"name": "checkout_page", "slots": ["0-399", "999"]},
        program="quarter",
        champion={"experiment": "colours", "version": 2, "arm": "green"},
    )
    found = facts(decided("won"))
    text = markdown(newest(replace(found, record=msgspec.structs.replace(RECORD, spec=beside))))
    assert "- Layer: checkout\\_page, slots 0-399, 999 of 1,000, 40.1 % of all units\n" in text
    assert "- Program: keeps away from the units that quarter holds out\n" in text
    assert "- Champion, the control here: green of colours version 2\n" in text
    assert "A holdout" not in text
    assert "Layer" not in markdown(newest(found))
    quarter = msgspec.structs.replace(beside, holdout=True)
    text = markdown(newest(replace(found, record=msgspec.structs.replace(RECORD, spec=quarter))))
    assert "- A holdout: units in these slots are held out" in text


def test_names_and_reasons_cannot_become_markup() -> None:
    text = markdown(newest(facts(decided("won"))))
    assert "- Hypothesis: more \\| people \\<b\\>click\\</b\\>" in text
    assert "Reason: click is \\*better\\* in new." in text
    width = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| ")}
    assert all(count >= 4 for count in width)


def test_tables_have_as_many_cells_in_every_line() -> None:
    block: list[int] = []
    for line in [*markdown(newest(facts(decided("won"), past=past(12)))).splitlines(), ""]:
        if line.startswith("|"):
            block.append(line.replace("\\|", "").count("|"))
        elif block:
            assert len(set(block)) == 1, line
            block = []


SHOWN = Evidence(0.1, 0.05, None, 2.0, 0.1, 3.0)
AGED = AgeResult(
    metric="click",
    arm="new",
    control_units=9,
    arm_units=8,
    per_ms=86_400_000,
    buckets=(
        AgeEffect(from_ms=0, until_ms=86_400_000, control_units=20, arm_units=21, effect=SHOWN),
        AgeEffect(from_ms=86_400_000, until_ms=172_800_000, control_units=9, arm_units=8),
    ),
    early=SHOWN,
    late=SHOWN,
    change=SHOWN,
    kind=AgeChange.NOVELTY,
)


def test_quantiles_segments_and_ages_have_tables_of_their_own() -> None:
    shown = Evidence(0.1, 0.05, None, 2.0, 0.1, 3.0)
    quantile = QuantileResult(quantile=0.9, control_value=1.0, arm_value=1.1, effect=shown)
    segment = SegmentResult(
        metric="click",
        arm="new",
        segment="os=a",
        control_units=10,
        arm_units=11,
        effect=shown,
        standard_error=0.02,
    )
    other = msgspec.structs.replace(
        segment, segment="os=other", effect=Evidence(0.0, None, None, 0.0, 1.0, 3.0), standard_error=0.02
    )
    signal = decided("won")
    found = msgspec.structs.replace(
        signal.data.result,
        metrics=(msgspec.structs.replace(metric(), quantiles=(quantile,)),),
        segments=(segment, other),
        ages=(AGED,),
    )
    data = msgspec.structs.replace(signal.data, result=found)
    text = markdown(newest(facts(msgspec.structs.replace(signal, data=data))))
    assert "| click | new | 0.9 | 1 | 1.1 | 0.1 \\[0.05, -\\] | 2.00 of 3.00 |" in text
    (drawn, _) = shrunk_segments((segment, other))
    assert 0.05 < drawn.effect < 0.1
    told = f"{drawn.effect:.4g} ± {drawn.sd:.4g}"
    assert f"| os=a | click | new | 10 / 11 | 0.1 \\[0.05, -\\] | 2.00 of 3.00 | {told} |" in text
    assert "Segments registered before the first look" in text
    assert "| click | new | 0 s to 1 d | 20 / 21 | 0.1 \\[0.05, -\\] |" in text
    assert "| click | new | 9 / 8 | 1 d | 0.1 | 0.1 | 0.1 \\[0.05, -\\] | 2.00 of 3.00 | novelty |" in text
    assert "the effect changes with age (novelty)" in text


def test_the_json_is_the_memo_again() -> None:
    one = newest(facts(decided("won"), ordered("p", "pause"), past=past(12)))
    assert msgspec.json.decode(msgspec.json.encode(one), type=Memo) == one
    assert json.loads(msgspec.json.encode(one))["schema"] == 1


@pytest.mark.skipif(not can_plot(), reason="the extra `plot` is not installed")
def test_plots_are_linked_and_the_same_twice(tmp_path: Path) -> None:
    one = newest(facts(decided("won"), past=past(12)))
    drawn = write_plots(one, tmp_path, "exp")
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["exp-1-click-new.svg", "exp-2-spent-new.svg", "exp-weights.svg"]
    text = markdown(drawn)
    assert all(f"]({name})" in text for name in names)
    before = [(tmp_path / name).read_bytes() for name in names]
    write_plots(one, tmp_path, "exp")
    assert [(tmp_path / name).read_bytes() for name in names] == before
    assert "](" not in markdown(one)


@pytest.mark.skipif(not can_plot(), reason="the extra `plot` is not installed")
def test_a_single_look_and_an_open_bound_can_be_drawn(tmp_path: Path) -> None:
    open_bound = msgspec.structs.replace(metric(), effect=Evidence(0.1, None, None, 0.0, 1.0, 3.0))
    looks = (result(3, metrics=(open_bound,)),)
    signal = decided("won")
    data = msgspec.structs.replace(signal.data, result=looks[0])
    one = newest(Facts(RECORD, (msgspec.structs.replace(signal, data=data),), looks))
    assert write_plots(one, tmp_path, "exp").metrics[0].plot == "exp-1-click-new.svg"


def test_the_uniform_slice_has_a_table_of_its_own() -> None:
    raw = (topics_dir() / "golden" / "result.uniform.v1.json").read_bytes()
    alone = msgspec.json.decode(raw, type=Result).uniform_slice
    assert alone is not None
    assert alone.sample_ratio is not None
    wrong = msgspec.structs.replace(alone.sample_ratio, mismatch=True)
    texts = []
    for one in (None, alone, msgspec.structs.replace(alone, sample_ratio=wrong)):
        signal = decided("won")
        found = msgspec.structs.replace(signal.data.result, uniform_slice=one)
        data = msgspec.structs.replace(signal.data, result=found)
        texts.append(markdown(newest(facts(msgspec.structs.replace(signal, data=data)))))
    plain, text, mismatch = texts
    assert "uniform slice" not in plain
    effect = alone.effects[0]
    assert (
        f"| {effect.metric} | {effect.arm} | 590 / 592 | 0.1 | 0.12 | 0.02 \\[-0.03, 0.07\\] | -1.50 of 3.00 |"
        in text
    )
    assert "The uniform slice alone, 10 % of the units" in text
    assert "a sample-ratio mismatch" in mismatch
    assert "a sample-ratio mismatch" not in text
