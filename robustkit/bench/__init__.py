"""Robustness benchmarks: plans, their execution, results, comparisons and reports."""

from robustkit.bench.evaluate import Report, evaluate, run
from robustkit.bench.plan.plan import Case, Plan, default_plan
from robustkit.bench.plan.plan_file import plan_text, read_plan
from robustkit.bench.reporting.page import report
from robustkit.bench.results.picture import Picture

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
