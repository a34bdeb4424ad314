"""A scenario in a file."""

from __future__ import annotations

import yaml

from stream_xp.services.scenarios.scenario import load_scenario


def experiment(**fields):
    return {
        "experiment": "one",
        "owner": "o",
        "hypothesis": "h",
        "unit": "member",
        "arms": [{"key": "a", "weight": 0.6, "control": True}, {"key": "b", "weight": 0.4}],
        "metrics": [
            {
                "key": "errors",
                "kind": "conversion",
                "role": "guardrail",
                "direction": "decrease",
                "attribution_window": "10m",
                "margin": {"absolute": 0.05},
                "critical": True,
            }
        ],
        "planned_sample": 2000,
        **fields,
    }


def fields(**over):
    return {
        "scenario": "s",
        "title": "A title.",
        "experiment": experiment(),
        "traffic": {"units_per_hour": 600},
        "truths": {"errors": {"mean": 0.1}},
        "looks": "30m",
        "horizon": "4h",
        **over,
    }


def write_and_load(folder, **over):
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump(fields(**over)), encoding="utf-8")
    return load_scenario(path)


MEAN = {
    "key": "minutes",
    "kind": "mean",
    "role": "secondary",
    "direction": "increase",
    "attribution_window": "1h",
    "scale": 0.5,
    "bound": 100,
}


HARMLESS = {"critical": False, "margin": {"absolute": 0.05}}
FOLLOWED = experiment(
    metrics=[
        {
            "key": "take",
            "kind": "conversion",
            "role": "primary",
            "direction": "increase",
            "attribution_window": "10m",
        }
    ],
    segments={"draw": ["uniform"]},
    allocation={
        "policy": "thompson",
        "metric": "take",
        "delay": {"ages": ["2m", "6m"]},
        "uniform_slice": 0.1,
        "uniform_segment": "draw",
    },
)
