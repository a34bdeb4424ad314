"""Planning: what an experiment's tests take and give, before it starts."""

from stream_xp.services.plan.baselines import Baseline, Known, load_baselines, parse_given
from stream_xp.services.plan.report import ExperimentPlan, NotPlanned, PlannedTest
from stream_xp.services.plan.service import Aim, Size, parse_effects, parse_size, plan_experiment
from stream_xp.services.plan.topic import read_baselines

__all__ = [
    "Aim",
    "Baseline",
    "ExperimentPlan",
    "Known",
    "NotPlanned",
    "PlannedTest",
    "Size",
    "load_baselines",
    "parse_effects",
    "parse_given",
    "parse_size",
    "plan_experiment",
    "read_baselines",
]
