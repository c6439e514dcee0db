"""A plan with its data and its models in memory: it can do any block, in any order, in any process."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from robustkit import data as real_data
from robustkit._engine.best_so_far import Keep
from robustkit._engine.noise import Noise
from robustkit._engine.state_guard import fork_generators
from robustkit.attack import Attack
from robustkit.attacks.universal import UniversalAttack
from robustkit.bench.execution.environment import environment
from robustkit.bench.execution.model_under_test import Subject, hash_matches, load_subjects
from robustkit.bench.execution.universal import LearnedPerturbation, learn, universal_stats
from robustkit.bench.execution.views import attacked, on_every_view
from robustkit.bench.execution.warm_starts import WarmStarts, read_warm_starts
from robustkit.bench.plan import plugins, specs
from robustkit.bench.plan.defence_specs import described
from robustkit.bench.plan.plan import Case, Plan
from robustkit.bench.plan.plugins import Plugin
from robustkit.bench.plan.request import command_of
from robustkit.bench.plan.specs import GoalSpec
from robustkit.bench.results.block import Block, Task
from robustkit.bench.results.picture import Picture
from robustkit.bench.results.record import Record
from robustkit.bench.results.store import Store
from robustkit.bench.results.universal_stats import UniversalStats
from robustkit.data import Data
from robustkit.errors import ArgumentError
from robustkit.goals import Misclassify
from robustkit.result import Result
from robustkit.threats import Threat

__all__ = ["LoadedRun", "ResolvedCase", "RunLoader", "load"]

PICTURES = 4  # per case, from its first block
LEARN_FROM = 1000  # images of a training part at most, unless more are scored
KEPT = 2**30  # bytes: where all images of a case take more, those that are solved are written only when asked for


@final
@dataclass(frozen=True)
class ResolvedCase:
    """A case, and what its words mean.

    Attributes:
        plugin: The package of the attack, where errors in it are to be told in one line; None where they pass unchanged.
    """

    case: Case
    attack: Attack
    threat: Threat
    aim: GoalSpec
    plugin: Plugin | None = None


def load(plan: Plan) -> LoadedRun:
    """Read what the plan names. Everything that can be seen to be wrong is refused here, before the first attack.

    Raises:
        ArgumentError: A spec that means nothing, data or weights that cannot be read or are not those that the plan was
            made with, a model that fails on the data.
        MissingExtraError: An optional dependency is needed.
    """
    trials = [
        ResolvedCase(
            case, specs.attack(case.attack), specs.threat(case.threat), specs.goal(case.goal), specs.plugin(case.attack)
        )
        for case in plan.cases
    ]
    with threads(plan.threads):
        whole = real_data.load(plan.data)
        data = whole.part(plan.offset, plan.limit)
        finds = read_warm_starts(plan.start_from, whole, range(plan.offset, plan.offset + len(data)))
        return LoadedRun(plan, data, load_subjects(data, plan), trials, finds=finds)


@final
@dataclass(frozen=True)
class RunLoader:
    """How work begins: with what is loaded here; in another process, where only the plan arrives, by loading it anew."""

    plan: Plan
    loaded: LoadedRun | None = field(default=None, compare=False, repr=False)
    answers: tuple[tuple[str, str], ...] = ()  # what the models say where it was loaded first
    store: Store | None = None  # where blocks may be found

    def __reduce__(self) -> tuple[type[RunLoader], tuple[Any, ...]]:
        answers = self.answers if self.loaded is None else tuple(self.loaded.fingerprints.items())
        return RunLoader, (self.plan, None, answers, self.store)

    def __call__(self) -> Callable[[Sequence[Task]], list[Block]]:
        """What does the blocks of a chain."""
        if self.loaded is not None:
            return partial(self.loaded.measure_all, store=self.store)
        loaded = load(self.plan)
        for spec, answer in self.answers:
            if loaded.fingerprints[spec] != answer:
                raise ArgumentError(
                    f"model {spec!r} is not the same twice: in a worker it says something else; seed what it draws"
                )
        return partial(loaded.measure_all, store=self.store)


@final
class LoadedRun:
    """A plan that can be run.

    Attributes:
        plan: What is to be measured; it holds the hashes of the data and the models as they are.
        trials: What its cases mean.
        weights: The hash of the weights of each model.
        fingerprints: Of what each model says.
        environment: Of the run.
        command: What asks for the same again.
    """

    def __init__(
        self,
        plan: Plan,
        data: Data,
        subjects: Mapping[str, Subject],
        trials: Sequence[ResolvedCase],
        command: str | None = None,
        finds: WarmStarts = WarmStarts(),
    ) -> None:
        hashes = {spec: subject.pin for spec, subject in subjects.items()} | {plan.data: data.hash} | dict(finds.hashes)
        for spec, wanted in plan.pins.items():
            if spec in hashes and not hash_matches(hashes[spec], wanted):
                raise ArgumentError(
                    f"{spec!r} has the hash {hashes[spec]}, and the plan was made with {wanted}: it is not the same any "
                    "more, or not the same twice; bring the old one back, or take its line out of [hashes] and begin anew"
                )
        for trial in trials:
            with plugins.blamed(trial.plugin, trial.case.attack):
                specs.check_served(trial.case.attack, trial.attack, trial.case.threat, trial.threat)
            white = trial.attack.access == "white"
            subjects[trial.case.subject].check(trial.case, trial.threat, trial.aim.wanted, white)
        self.weights = {spec: subject.hash for spec, subject in subjects.items()}
        self.fingerprints = {spec: subject.fingerprint for spec, subject in subjects.items()}
        self.plan, self.trials = replace(plan, pins=hashes), tuple(trials)
        self.environment = environment(plan.device, plan.threads) | specs.packages(case.attack for case in plan.cases)
        self.command = command_of(plan) if command is None else command
        self._data, self._subjects, self._finds = data, subjects, finds
        self._changes: dict[int, LearnedPerturbation] = {}
        self._at_hand: dict[Task, Block] = {}  # blocks on which others may stand
        for trial in self.trials:
            if isinstance(trial.attack, UniversalAttack):  # tried on two images: a layer that is not there is told now
                self._learn(trial, self._learns_from.part(0, 2))

    def __len__(self) -> int:
        """Images of the data."""
        return len(self._data)

    @property
    def classes(self) -> tuple[str, ...]:
        """A name for each class."""
        return self._data.classes

    def labels(self, case: int) -> Tensor:
        """The true classes of these images, (n,) int64."""
        return self._data.y[self.images(case).start :]

    def images(self, case: int) -> range:
        """The images that a case is scored on; a universal attack leaves out those that it has to learn from."""
        learns = isinstance(self.trials[case].attack, UniversalAttack) and self._pool is None
        return range(len(self) // 2 if learns else 0, len(self))

    def ways(self, case: int) -> Record:
        """What a record tells of the ways in which a case was attacked: the defence with every field, and the views."""
        trial = self.trials[case]
        target = self._subjects[trial.case.subject].target
        return {"defence_recipe": described(target), "views": list(attacked(trial.attack, target))}

    def tasks(self) -> list[Task]:
        """All blocks; the first of every case before the others, since then it is known what each costs."""
        starts = [self.images(case)[:: self.plan.block] for case in range(len(self.trials))]
        order = [(case, firsts[0]) for case, firsts in enumerate(starts)]
        order += [(case, first) for case, firsts in enumerate(starts) for first in firsts[1:]]
        return [self._task(case, first, min(first + self.plan.block, len(self))) for case, first in order]

    def chains(self, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
        """The tasks in groups, each to be done in its order: in a sweep a block stands on that of the next smaller eps."""
        groups: dict[tuple[Any, ...], list[Task]] = {}
        for task in tasks:
            groups.setdefault((*self._sweep(task.case), task.first), []).append(task)
        return [tuple(sorted(group, key=lambda task: self._order(task.case))) for group in groups.values()]

    def glance(self, subject: str) -> float:
        """Seconds that one clean image takes, in blocks."""
        one, rows = self._subjects[subject], slice(0, min(self.plan.block, len(self)))
        x, y = self._data.images(rows), self._data.y[rows]
        with threads(self.plan.threads):
            started = time.perf_counter()
            one.logits(x, y, 0, "glance")
            return (time.perf_counter() - started) / len(x)

    def measure(self, task: Task) -> Block:
        """Do a block."""
        with threads(self.plan.threads):
            return self._measured(task)

    def measure_all(self, tasks: Sequence[Task], store: Store | None = None) -> list[Block]:
        """Do the blocks of a chain; what they stand on is in the chain, in the store, or done anew."""
        try:
            for task in tasks:
                below = self._below(task)
                found = store.get(below) if store is not None and below is not None and below not in self._at_hand else None
                if below is not None and found is not None:
                    self._at_hand[below] = found
                self._at_hand[task] = self.measure(task)
            done = [self._at_hand[task] for task in tasks]
            return done if 4 * self._data.shape.numel() <= KEPT else [replace(block, found=None) for block in done]
        finally:
            self._at_hand = {}

    def _sweep(self, case: int) -> tuple[Any, ...]:
        """What cases have in common that differ in eps alone, if one may start from what another has found."""
        trial = self.trials[case]
        if isinstance(trial.attack, UniversalAttack):
            return (case,)
        return trial.case.subject, trial.case.attack, trial.case.goal, type(trial.threat), trial.threat.bounds

    def _order(self, case: int) -> tuple[float, str]:
        trial = self.trials[case]
        return float(trial.threat.eps), trial.case.threat

    def _below(self, task: Task) -> Task | None:
        """The block of the same images under the next smaller eps, on which this one stands."""
        lower = self._lower[task.case]
        return None if lower is None else self._task(lower, task.first, task.last)

    @cached_property
    def _lower(self) -> list[int | None]:
        """For each case the one of its sweep with the next smaller eps; asked for every block, so it is found once."""
        sweeps: dict[tuple[Any, ...], list[int]] = {}
        for case in range(len(self.trials)):
            sweeps.setdefault(self._sweep(case), []).append(case)
        lower: list[int | None] = [None] * len(self.trials)
        for cases in sweeps.values():
            for case in cases:
                smaller = (other for other in cases if self._order(other)[0] < self._order(case)[0])
                lower[case] = max(smaller, key=self._order, default=None)
        return lower

    def _task(self, case: int, first: int, last: int) -> Task:
        trial, plan = self.trials[case], self.plan
        asked = {
            "case": asdict(trial.case),
            "recipe": [repr(trial.attack), repr(trial.threat)],
            "data": plan.pins[plan.data],
            "model": self.fingerprints[trial.case.subject],
            "rows": [plan.offset + first, plan.offset + last],
            "seed": plan.seed,
            "block": plan.block,
            "batch_size": plan.batch_size,
            "device": plan.device,
            "normalize": plan.normalize,
            "save_adversarial": plan.save_adversarial,
            "environment": self.environment,
        }
        if trial.attack.minimum_norm:
            asked |= {"keep": _kept(trial.attack)}
        if isinstance(trial.attack, UniversalAttack):
            asked |= {"learned on": self._learns_from.hash, "models": self.fingerprints}
        else:
            below = self._below(Task(case, first, last, ""))
            asked |= {} if below is None else {"stands on": below.name}
            asked |= {"starts": list(self._finds.hashes.values())} if self._finds.hashes else {}
        name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        return Task(case, first, last, name)

    def _measured(self, task: Task) -> Block:
        trial, plan, rows = self.trials[task.case], self.plan, task.rows
        subject, attack = self._subjects[trial.case.subject], trial.attack
        learned = self._learned(task.case) if isinstance(attack, UniversalAttack) else None
        ids = torch.arange(task.first, task.last) + plan.offset
        starts = self._starts(task, ids) if learned is None else None
        started = time.perf_counter()
        clean, labels = subject.clean(rows), self._data.y[rows]
        x, y = self._data.images(rows).to(plan.device), labels.to(plan.device)
        ref = trial.aim.ref(subject.target.fn, x.clone(), y, subject.target.batch_size)  # a model may write to its input
        # A generator of the model's own would go on from where the last block left it, and in another worker elsewhere.
        key = Noise(plan.seed, ids).at("model", int(ids[0])).key
        with fork_generators(subject.target.generators, key), plugins.blamed(trial.plugin, trial.case.attack):
            attack = attack if learned is None else learned.perturbation
            result = on_every_view(
                attack,
                subject.target,
                x,
                ref,
                goal=trial.aim.goal,
                threat=trial.threat,
                seed=plan.seed,
                ids=ids,
                keep=_kept(attack),
                starts=starts,
            )
        if trial.aim.goal == Misclassify():
            after = ~result.success.cpu()
        else:
            after = ~Misclassify().success(subject.logits(result.x_adv, labels, rows.start, "after"), labels)
        spread = None if learned is None else self._spread(task, learned, x, result.x_adv, labels)
        seconds = time.perf_counter() - started
        is_first = task.first == self.images(task.case).start
        pictures = self._pictures(trial, subject, result, rows, clean, spread) if is_first else ()
        block = Block(task, result, ids, labels, clean, clean & after.numpy(), seconds, pictures, spread)
        if plan.save_adversarial:
            return block
        # Not a view, which would keep the images.
        return replace(block, result=replace(result, x_adv=x.new_empty(len(x), 0)), found=result.x_adv[block.changed].cpu())

    def _starts(self, task: Task, ids: Tensor) -> Tensor | None:
        """Where the attack may begin, (n, *S): what a smaller eps has found, else the best that earlier runs have."""
        trial, below = self.trials[task.case], self._below(task)
        if below is None and not self._finds.hashes:
            return None
        x = self._data.images(task.rows)
        starts = self._finds.images(trial.case.goal, trial.threat, self.plan.pins[trial.case.subject], ids, x)
        if below is not None:
            block = self._at_hand.get(below)
            if block is None or block.images is None:
                block = self._measured(below)
            assert block.images is not None
            solved = block.result.success.cpu()
            starts[solved] = x[solved]  # where no change at all was needed
            starts[block.changed.cpu()] = block.images.to(starts)
        return None if starts.isnan().all() else starts

    @cached_property
    def _pool(self) -> Data | None:
        """Where universal attacks learn, if the data have a part for that; as many images as are scored, or a thousand."""
        pool = real_data.training_part(self.plan.data)
        return pool and pool.part(0, max(LEARN_FROM, len(self)))

    @cached_property
    def _learns_from(self) -> Data:
        """What universal attacks learn from: a part for that, or the first half of the data."""
        if len(self) < 2 and self._pool is None:
            raise ArgumentError(
                f"data={self.plan.data!r}: a universal attack learns from the first half and is scored on the rest; here is "
                "one image, so take more"
            )
        return self._pool or self._data.part(0, len(self) // 2)

    def _learned(self, case: int) -> LearnedPerturbation:
        """The finished change of a universal attack; each process learns it once."""
        if case not in self._changes:
            self._changes[case] = self._learn(self.trials[case], self._learns_from)
        return self._changes[case]

    def _learn(self, trial: ResolvedCase, pool: Data) -> LearnedPerturbation:
        assert isinstance(trial.attack, UniversalAttack)
        with threads(self.plan.threads), plugins.blamed(trial.plugin, trial.case.attack):
            subject = self._subjects[trial.case.subject]
            return learn(trial.attack, subject, trial.aim, trial.threat, pool, self.plan)

    def _spread(self, task: Task, learned: LearnedPerturbation, x: Tensor, x_adv: Tensor, labels: Tensor) -> UniversalStats:
        """What the change does to the predictions; what it is, with the first block of its case."""
        trial, plan = self.trials[task.case], self.plan
        others = [subject for spec, subject in self._subjects.items() if spec != trial.case.subject]
        spread = universal_stats(
            self._subjects[trial.case.subject], others, x, x_adv, labels, first=task.first, threat=trial.threat, seed=plan.seed
        )
        if task.first != self.images(task.case).start:
            return spread
        return replace(spread, delta=learned.perturbation.delta[0].cpu(), learned=learned.facts)

    def _pictures(
        self,
        trial: ResolvedCase,
        subject: Subject,
        result: Result,
        rows: slice,
        clean: np.ndarray,
        spread: UniversalStats | None,
    ) -> tuple[Picture, ...]:
        """The first images of the block that the model gets right without an attack; those first that a universal one flips."""
        order, case = np.flatnonzero(clean), trial.case
        if spread is not None:
            order = np.concatenate([order[result.success.cpu().numpy()[order] == flipped] for flipped in (True, False)])
        chosen = order[:PICTURES]
        drawable = len(self._data.shape) == 4 and self._data.shape[1] in (1, 3) and trial.threat.bounds == (0.0, 1.0)
        if not len(chosen) or not drawable:
            return ()
        before, labels = self._data.images(rows)[chosen], self._data.y[rows][chosen]
        after = result.x_adv[torch.from_numpy(chosen)].cpu()
        said = [subject.logits(x, labels, rows.start, "pictures").double().softmax(1).max(1) for x in (before, after)]
        names = self._data.classes
        change = None if spread is None or spread.delta is None else spread.delta.numpy()
        return tuple(
            Picture(
                case.subject,
                case.attack,
                case.goal,
                case.threat,
                self.plan.offset + rows.start + int(i),
                before[k].numpy(),
                after[k].numpy(),
                names[int(labels[k])],
                _name(names, int(said[0].indices[k])),
                float(said[0].values[k]),
                _name(names, int(said[1].indices[k])),
                float(said[1].values[k]),
                float(result.size[i]),
                bool(result.success[i]),
                change,
            )
            for k, i in enumerate(chosen)
        )


def _kept(attack: Attack) -> Keep:
    """Which point of each image is wanted: of an attack that looks for small changes the smallest, which is a whole curve."""
    return "smallest" if attack.minimum_norm else "first"


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else str(index)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch inside, and afterwards as many as before."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
