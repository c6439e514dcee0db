"""How often does `Standard` raise a false flag? Runs on models without gradient masking, and every flag they raise.

    OMP_NUM_THREADS=1 python -m benchmarks.false_alarms [--train FILE.npz --data FILE.npz] [--images 64] [--seeds 2]

Each model of benchmarks/classifiers.py is attacked in its own threat, with half its eps, and with two values of eps in the
other norm, which it was not trained for; every seed uses other images. The runs of one model are not independent, so the
interval, the exact one of Clopper & Pearson (1934) at 95 %, describes only these runs. Seconds are processor seconds. The
result is written to benchmarks/results/false_alarms.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor, nn

from benchmarks.classifiers import CLASSIFIERS, Classifier, trained_classifier
from benchmarks.machine import processor
from robustkit import L2, Linf
from robustkit._engine.ledger import Check, sum_checks
from robustkit.attacks import Standard
from robustkit.flags import p_value
from robustkit.result import Result
from robustkit.threats import Threat

RESULT = Path(__file__).parent / "results" / "false_alarms.json"
# The threats of the other norm for each data set, the smaller eps first.
OTHER_NORM: dict[str, tuple[Threat, Threat]] = {
    "digits": (L2(0.3), L2(0.8)),
    "mnist-5k": (L2(0.8), L2(2.0)),
    "colours": (L2(0.15), L2(0.4)),
}
LEVEL = 0.05


def threats(one: Classifier) -> tuple[Threat, ...]:
    """Return the threat of the model, the same with half its eps, and two of the other norm."""
    half = replace(one.threat, eps=float(one.threat.eps) / 2)
    other = (Linf(0.05), Linf(0.15)) if isinstance(one.threat, L2) else OTHER_NORM[one.data]
    return one.threat, half, *other


def interval(hits: int, of: int) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a proportion."""
    low = float(beta.ppf(LEVEL / 2, hits, of - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - LEVEL / 2, hits + 1, of - hits)) if hits < of else 1.0
    return low, high


def run(net: nn.Module, x: Tensor, y: Tensor, one: Classifier, threat: Threat, seed: int) -> tuple[dict[str, Any], Result]:
    """Evaluate once; return the robust images, flags and checks as a row, and the result."""
    start = time.process_time()
    result = Standard()(net, x, y, threat=threat, seed=seed)
    checks = {check.name: [check.hits, check.of, check.limit, round(p_value(check), 5)] for check in result.checks}
    row = {
        "model": one.name,
        "threat": repr(threat),
        "seed": seed,
        "images": len(x),
        "robust": int((~result.success).sum()),
        "seconds": round(time.process_time() - start, 1),
        "flags": {flag.name: flag.why for flag in result.flags},
        "notes": [note.name for note in result.notes],
        "evidence": checks,
    }
    return row, result


def runs(
    names: Sequence[Classifier], files: tuple[str | None, str | None], images: int, seeds: int
) -> Iterator[tuple[dict[str, Any], Result]]:
    """Run all models and threats for each seed, seed by seed, so that an interrupted run covers all models."""
    loaded = [(one, *trained_classifier(one, *files, images * seeds)) for one in names]
    for seed in range(seeds):
        part = slice(seed * images, (seed + 1) * images)
        for number in range(4):
            for one, net, x, y in loaded:
                yield run(net, x[part], y[part], one, threats(one)[number], seed)


def by_check(checks: Sequence[Check], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise each check: its hits over all runs, the number of runs it flagged, and its smallest p-value."""
    summary = {}
    for total in sum_checks(checks):
        single = [row["evidence"][total.name] for row in rows if total.name in row["evidence"]]
        summary[total.name] = {
            "hits": total.hits,
            "of": total.of,
            "limit": total.limit,
            "runs": len(single),
            "runs_with_hits": sum(one[0] > 0 for one in single),
            "smallest_p": min(one[3] for one in single),
            "flagged": sum(total.name in row["flags"] for row in rows),
        }
    return summary


def main() -> None:
    """Run, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--train", help="npz file with x (N, 32, 32, 3) bytes and y; without it, the models for colour images are skipped"
    )
    parser.add_argument("--data", help="the same format, with held-out images")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of models; no file is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [
        one for one in CLASSIFIERS if (one.data != "colours" or options.train) and one.name in (options.only or [one.name])
    ]
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []
    for row, result in runs(names, (options.train, options.data), options.images, options.seeds):
        rows.append(row)
        checks += result.checks
        head = f"{row['model']:<17} {row['threat']:<44} seed {row['seed']}: robust {row['robust']}/{row['images']}"
        print(f"{head}, {row['seconds']} s, flags {row['flags'] or 'none'}", flush=True)
        content = report(rows, checks, options)
        if not options.only:
            RESULT.write_text(_format_json(content))
    low, high = content["interval"]
    print(
        f"{content['flagged']} of {len(rows)} runs raised a flag: {content['share']:.1%}, 95 % interval {low:.1%} to {high:.1%}"
    )


def report(rows: Sequence[dict[str, Any]], checks: Sequence[Check], options: argparse.Namespace) -> dict[str, Any]:
    """Return the content of the result file for the runs so far."""
    flagged = [row for row in rows if row["flags"]]
    command = f"python -m benchmarks.false_alarms --images {options.images} --seeds {options.seeds}"
    return {
        "command": command + (" --train ... --data ..." if options.train else ""),
        "machine": {"processor": processor(), "threads": 1, "python": platform.python_version(), "torch": torch.__version__},
        "runs": len(rows),
        "flagged": len(flagged),
        "share": len(flagged) / len(rows),
        "interval": interval(len(flagged), len(rows)),
        "seconds": round(sum(row["seconds"] for row in rows)),
        "checks": by_check(checks, rows),
        "alarms": [{key: row[key] for key in ("model", "threat", "seed", "flags")} for row in flagged],
        "each": rows,
    }


def _format_json(content: dict[str, Any]) -> str:
    """Format as JSON with one line per entry of lists and tables."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            body = "[\n  " + ",\n  ".join(json.dumps(one) for one in value) + "\n ]"
        elif key == "checks":
            body = "{\n  " + ",\n  ".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in value.items()) + "\n }"
        else:
            body = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
