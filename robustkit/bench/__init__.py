"""Measures models against attacks and shows what came out."""

from robustkit.bench.evaluate import Report, evaluate, run
from robustkit.bench.picture import Picture
from robustkit.bench.plan import Case, Plan, default_plan
from robustkit.bench.plan_file import plan_text, read_plan
from robustkit.bench.show.report import report

__all__ = [
    "Case",
    "Picture",
    "Plan",
    "Report",
    "default_plan",
    "evaluate",
    "plan_text",
    "read_plan",
    "report",
    "run",
]
