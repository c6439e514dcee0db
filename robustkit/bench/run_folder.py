"""The folder of a run: whether a run may start or resume in it, and the files that are written to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, final

from filelock import FileLock, Timeout

import robustkit
from robustkit._engine.schema import SCHEMA
from robustkit.bench.execution.loaded_run import LoadedRun
from robustkit.bench.execution.runner import Outcome
from robustkit.bench.plan.hashes import hash_matches
from robustkit.bench.plan.plan import Plan
from robustkit.bench.plan.plan_file import plan_text, read_plan
from robustkit.bench.reporting.page import report
from robustkit.bench.results.record import worst_case
from robustkit.bench.results.store import Files, replace_file
from robustkit.errors import ArgumentError

__all__ = ["SCHEMA", "Folder", "open_folder", "results_of"]


@final
@dataclass(frozen=True)
class Folder:
    """A folder that is locked for one run.

    Attributes:
        path: Its path.
        fresh: Whether it holds no run yet.
    """

    path: Path
    fresh: bool

    @property
    def store(self) -> Files:
        """The store of its blocks."""
        return Files(self.path / "examples")

    def begin(self, loaded: LoadedRun) -> None:
        """Write the plan of a new run, or check that a resumed run has the same models and environment.

        Raises:
            ArgumentError: A model or the environment has changed since the run began.
        """
        if self.fresh:
            text = plan_text(loaded.plan)
            replace_file(self.path / "results.json", _json(results_of(loaded, [])))
            replace_file(self.path / "plan.toml", text.encode("utf-8"))
            return
        old = self._read_results()
        changed = [
            f"{name} was {value}, is {loaded.environment.get(name)}"
            for name, value in old["environment"].items()
            if value != loaded.environment.get(name)
        ]
        changed_models = [spec for spec, value in loaded.fingerprints.items() if old["fingerprints"].get(spec) != value]
        if changed_models:
            raise ArgumentError(
                f"out={str(self.path)!r}: model {changed_models[0]!r} has other outputs than when this run began: its code "
                "or its environment has changed; restore it, or name a new folder"
            )
        if changed:
            raise ArgumentError(
                f"out={str(self.path)!r} was begun in another environment ({'; '.join(changed)}), and its numbers must not "
                "be mixed; resume it there, or name a new folder"
            )

    def _read_results(self) -> dict[str, Any]:
        try:
            old = json.loads((self.path / "results.json").read_text(encoding="utf-8"))
            return {name: dict(old[name]) for name in ("environment", "fingerprints")}
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"out={str(self.path)!r} has a results.json that cannot be read, so its models and environment are unknown; "
                "name a new folder"
            ) from error

    def write(self, loaded: LoadedRun, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Write results.json and report.html of the finished cases; returns the content of results.json."""
        results = results_of(loaded, outcomes)
        pictures = [picture for outcome in sorted(outcomes, key=_index) for picture in outcome.pictures]
        replace_file(self.path / "results.json", _json(results))
        page = report(results, pictures, command=results["command"])
        replace_file(self.path / "report.html", page.encode("utf-8"))
        return results


@contextmanager
def open_folder(out: Path | None, plan: Plan, *, resume: bool = False) -> Iterator[Folder]:
    """Lock a folder for a run. A folder that is created here is removed again if nothing was written to it.

    Args:
        out: Its path; by default a new folder under runs/ named by date and time.
        plan: The plan, with the hashes of its data and models.
        resume: Resume the run in this folder; it must be a run of this plan.

    Raises:
        ArgumentError: The folder exists and `resume` is False, has no run or a run of another plan, is in use, or cannot be
            created.
    """
    path = out if out is not None else Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    try:
        fresh = not _is_begun(path, resume)
        if not fresh:
            _check_plan(path, plan)
        created = [part for part in (path, *path.parents) if not part.exists()]
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise ArgumentError(f"out={str(path)!r} is in use by another run; wait for it, or name another folder") from error
    except OSError as error:
        raise ArgumentError(f"out={str(path)!r} cannot be written ({error.strerror}); name another folder") from error
    try:
        yield Folder(path, fresh)
    finally:
        # Removed only if nothing was written: a process that waits for a removed lock file would lock another file.
        if fresh and not (path / "results.json").exists():
            (path / ".lock").unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # raised where the folder is not empty, the usual case
            for part in created:
                part.rmdir()


def results_of(loaded: LoadedRun, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The content of results.json; records are in the order of the plan."""
    outcomes = sorted(outcomes, key=_index)
    return {
        "robustkit": robustkit.__version__,
        "schema": SCHEMA,
        "environment": loaded.environment,
        "fingerprints": loaded.fingerprints,
        "command": loaded.command,
        "data": {"spec": loaded.plan.data, "offset": loaded.plan.offset, "limit": loaded.plan.limit},
        "cases": len(loaded.cases),
        "worst_case": worst_case([(outcome.record, outcome.robust) for outcome in outcomes]),
        "records": [outcome.record for outcome in outcomes],
    }


def _index(outcome: Outcome) -> int:
    return outcome.index


def _json(results: dict[str, Any]) -> bytes:
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # file names may contain bytes that are not Unicode


def _is_begun(path: Path, resume: bool) -> bool:
    """Whether the folder has a run to resume; a folder with anything else is refused."""
    if not path.exists():
        return False
    if not resume:
        raise ArgumentError(
            f"out={str(path)!r} exists, and nothing is overwritten; name a new folder, or resume its run with --resume"
        )
    if not path.is_dir():
        raise ArgumentError(f"out={str(path)!r} is not a folder; name a new folder")
    if (path / "plan.toml").exists() and (path / "results.json").exists():
        return True
    # A run that was killed before it wrote its plan leaves only this file.
    ours = ["results.json"] if _is_empty_run(path / "results.json") else []
    foreign = [entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.name not in ours]
    if foreign:
        raise ArgumentError(f"out={str(path)!r} contains {sorted(foreign)[0]!r} but no run; name a new folder")
    return False


def _is_empty_run(path: Path) -> bool:
    """Whether this is the file that `begin` writes first."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["records"] == [])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_plan(path: Path, plan: Plan) -> None:
    old = read_plan(path / "plan.toml")
    different = [name for name in vars(plan) if name != "expected_hashes" and getattr(plan, name) != getattr(old, name)]
    if not all(hash_matches(plan.expected_hashes.get(spec, "none"), wanted) for spec, wanted in old.expected_hashes.items()):
        different.append("hashes")
    if different:
        raise ArgumentError(
            f"out={str(path)!r} has a run of another plan (different: {', '.join(different)}); name a new folder, or resume "
            f"that run: robustkit bench --out {path} --resume"
        )
