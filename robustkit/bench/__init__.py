"""Measures models against attacks and shows what came out."""

from robustkit.bench.plan import Case, Plan, default_plan
from robustkit.bench.report import Picture, report
from robustkit.bench.runner import Outcome, run

__all__ = ["Case", "Outcome", "Picture", "Plan", "default_plan", "report", "run"]
