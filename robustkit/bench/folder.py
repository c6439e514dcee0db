"""The folder of a run: what may be begun or taken up again in it, and the files that are written there."""

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
from robustkit.bench.execution.model_under_test import hash_matches
from robustkit.bench.execution.runner import Outcome
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
    """A folder that is held for one run.

    Attributes:
        path: Where it is.
        fresh: Whether nothing of a run was there.
    """

    path: Path
    fresh: bool

    @property
    def store(self) -> Files:
        """Where its blocks are."""
        return Files(self.path / "examples")

    def begin(self, loaded: LoadedRun) -> None:
        """Write the plan, or hold the run to the one that is there.

        Raises:
            ArgumentError: The folder holds a run of another plan, or one of another environment.
        """
        if self.fresh:
            text = plan_text(loaded.plan)
            replace_file(self.path / "results.json", _json(results_of(loaded, [])))
            replace_file(self.path / "plan.toml", text.encode("utf-8"))
            return
        old = self._told()
        changed = [
            f"{name} was {value}, is {loaded.environment.get(name)}"
            for name, value in old["environment"].items()
            if value != loaded.environment.get(name)
        ]
        others = [spec for spec, value in loaded.fingerprints.items() if old["fingerprints"].get(spec) != value]
        if others:
            raise ArgumentError(
                f"out={str(self.path)!r}: model {others[0]!r} does not say what it said when this run began: its code or its "
                "surroundings have changed; bring the old ones back, or name a new folder"
            )
        if changed:
            raise ArgumentError(
                f"out={str(self.path)!r} was begun elsewhere ({'; '.join(changed)}), and its numbers are not to be mixed; "
                "resume it there, or name a new folder"
            )

    def _told(self) -> dict[str, Any]:
        try:
            old = json.loads((self.path / "results.json").read_text(encoding="utf-8"))
            return {name: dict(old[name]) for name in ("environment", "fingerprints")}
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"out={str(self.path)!r} holds a results.json that cannot be read, so nobody can say what it was begun with; "
                "name a new folder"
            ) from error

    def write(self, loaded: LoadedRun, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Write results.json and report.html of the cases so far; the content of results.json comes back."""
        results = results_of(loaded, outcomes)
        pictures = [picture for outcome in sorted(outcomes, key=_index) for picture in outcome.pictures]
        replace_file(self.path / "results.json", _json(results))
        page = report(results, pictures, command=results["command"])
        replace_file(self.path / "report.html", page.encode("utf-8"))
        return results


@contextmanager
def open_folder(out: Path | None, plan: Plan, *, resume: bool = False) -> Iterator[Folder]:
    """A folder that nobody else writes to; default a new one of the present date and time under runs/.

    One that was made here goes again if nothing was written to it.

    Args:
        out: Where.
        plan: The plan, with the hashes of its data and models.
        resume: Whether a run that is there is to be taken up again; it must be one of this plan.

    Raises:
        ArgumentError: It exists and is not to be resumed, holds no run or that of another plan, is in use, or cannot be
            made.
    """
    path = out if out is not None else Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    try:
        fresh = not _is_begun(path, resume)
        if not fresh:
            _check_plan(path, plan)
        made = [part for part in (path, *path.parents) if not part.exists()]
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
        # Removed only where nothing was written: who waits for a lock file that is removed would hold another one.
        if fresh and not (path / "results.json").exists():
            (path / ".lock").unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # not empty, as it should be
            for part in made:
                part.rmdir()


def results_of(loaded: LoadedRun, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The content of results.json, in the order of the plan, whatever the order in which the cases were finished."""
    told = sorted(outcomes, key=_index)
    return {
        "robustkit": robustkit.__version__,
        "schema": SCHEMA,
        "environment": loaded.environment,
        "fingerprints": loaded.fingerprints,
        "command": loaded.command,
        "data": {"spec": loaded.plan.data, "offset": loaded.plan.offset, "limit": loaded.plan.limit},
        "cases": len(loaded.trials),
        "worst_case": worst_case([(outcome.record, outcome.robust) for outcome in told]),
        "records": [outcome.record for outcome in told],
    }


def _index(outcome: Outcome) -> int:
    return outcome.index


def _json(results: dict[str, Any]) -> bytes:
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # file names may hold what is no Unicode


def _is_begun(path: Path, resume: bool) -> bool:
    """Whether a run is there that is to be resumed; a folder that holds anything else is refused."""
    if not path.exists():
        return False
    if not resume:
        raise ArgumentError(
            f"out={str(path)!r} exists; nothing is overwritten: name a new folder, or give --resume to go on with a run"
        )
    if not path.is_dir():
        raise ArgumentError(f"out={str(path)!r} is no folder; nothing is overwritten: name a new folder")
    if (path / "plan.toml").exists() and (path / "results.json").exists():
        return True
    # A run that was killed before it had said what it is has left no more than these.
    ours = ["results.json"] if _is_empty_run(path / "results.json") else []
    strange = [entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.name not in ours]
    if strange:
        raise ArgumentError(f"out={str(path)!r} holds no run but {sorted(strange)[0]!r}; name a new folder")
    return False


def _is_empty_run(path: Path) -> bool:
    """Whether this is what `begin` writes first."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["records"] == [])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_plan(path: Path, plan: Plan) -> None:
    old = read_plan(path / "plan.toml")
    names = [name for name in vars(plan) if name != "pins" and getattr(plan, name) != getattr(old, name)]
    if not all(hash_matches(plan.pins.get(spec, "none"), wanted) for spec, wanted in old.pins.items()):
        names.append("hashes")
    if names:
        what = ", ".join(names)
        raise ArgumentError(
            f"out={str(path)!r} holds a run of another plan (other {what}); name a new folder, or resume that run by: "
            f"robustkit bench --out {path} --resume"
        )
