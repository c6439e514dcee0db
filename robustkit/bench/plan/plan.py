"""What is to be measured: a list of cases, as the strings of the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from robustkit.errors import ArgumentError

__all__ = ["Case", "Plan", "default_plan", "pairs", "product"]

NONE = "none"  # the word for no defence


@final
@dataclass(frozen=True)
class Case:
    """One row of the table: a model, perhaps behind a defence, under one attack with one goal in one threat."""

    model: str
    threat: str
    attack: str
    goal: str = "misclassify"
    defence: str = NONE

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Case:
        """The case of a record of results.json."""
        return cls(record["model"], record["threat"], record["attack"], record["goal"], record["defence"] or NONE)

    @property
    def defended(self) -> str | None:
        """The defence; None where there is none."""
        return None if self.defence == NONE else self.defence

    @property
    def subject(self) -> str:
        """What is attacked, in words: the model, or the model behind its defence."""
        return self.model if self.defence == NONE else f"{self.model} behind {self.defence}"


@final
@dataclass(frozen=True)
class Plan:
    """The cases of a run, and all that their numbers depend on besides.

    Attributes:
        cases: In the order in which they are told.
        data: Data spec.
        offset: How many examples to pass over.
        limit: How many to take from there; None takes all.
        seed: Of all noise.
        block: How many images are attacked, written down and, if need be, taken up again at a time.
        batch_size: The most images of a block that go through a model at once.
        device: Where the models run.
        threads: Of torch, in each worker. More would share out the work of one image, and may change its last bits; more
            workers do not.
        normalize: MEAN,STD to be put before the models that a factory makes; each one number, or one a channel with ":"
            between them. None where they normalise for themselves.
        save_adversarial: Whether all attacked images are written, and not only those that are solved.
        start_from: Folders of earlier runs on the same images, or files of adversarial images; attacks begin at what is there.
        pins: Hashes of the data, the models and the earlier runs that the plan was made with, by spec; others are refused.
    """

    cases: tuple[Case, ...]
    data: str
    offset: int = 0
    limit: int | None = None
    seed: int = 0
    block: int = 100
    batch_size: int = 100
    device: str = "cpu"
    threads: int = 1
    normalize: str | None = None
    save_adversarial: bool = False
    start_from: tuple[str, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("offset", 0), ("limit", 1), ("block", 1), ("batch_size", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ArgumentError(f"{name}={value} must be at least {least}; leave it out for the default")
        if not self.cases:
            raise ArgumentError("the plan holds no case; name a model, a threat and an attack")
        if len(set(self.cases)) < len(self.cases):
            twice = next(case for case in self.cases if self.cases.count(case) > 1)
            raise ArgumentError(f"the plan holds {twice} twice; leave one out")

    @property
    def models(self) -> tuple[str, ...]:
        """The specs of its models, each once."""
        return tuple(dict.fromkeys(case.model for case in self.cases))


def product(
    models: Iterable[str], threats: Iterable[str], attacks: Iterable[tuple[str, str]], defences: Iterable[str] = (NONE,)
) -> tuple[Case, ...]:
    """Every model behind every defence under every threat with every (attack, goal), each once."""
    threats, attacks, defences = tuple(threats), tuple(attacks), tuple(defences)
    cases = (
        Case(model, threat, attack, goal, defence)
        for model in models
        for defence in defences
        for threat in threats
        for attack, goal in attacks
    )
    return tuple(dict.fromkeys(cases))


def pairs(threat: str, attacks: Iterable[str] | None, goals: Iterable[str] | None) -> list[tuple[str, str]]:
    """What is run in a threat: every attack with every goal; where none is named, the strongest, and misclassify."""
    strongest = {"linf": "standard", "l2": "standard", "l1": "l1apgd", "pixels": "pixelsearch"}
    named = attacks or [strongest.get(threat.partition(":")[0], "pgd")]
    return [(attack, goal) for attack in named for goal in goals or ["misclassify"]]


_MODELS = ("zoo:mnist-cnn", "zoo:mnist-cnn-robust")
# One of each kind, at the budget that the robust model was trained for.
_ATTACKS = (
    ("fgsm", "misclassify"),
    ("fgsm", "least-likely"),
    ("ifgsm", "misclassify"),
    ("mifgsm", "misclassify"),
    ("pgd", "misclassify"),
    ("uap-pgd", "misclassify"),
    ("standard", "misclassify"),
)
_CURVE = ("linf:0.05", "linf:0.1", "linf:0.2")  # and below it the one to report by, so that the curve is one to believe
# The evolution in short: in full it costs up to 30,400 forwards an image, and this is to end in about a minute.
_PIXELS = (("onepixel:population=40,generations=10", "misclassify"), ("pixelsearch", "misclassify"))
_IMAGES = 300


def default_plan() -> Plan:
    """What a bare `robustkit bench` runs: two models of real digits, attacks of each kind, 300 held-out images."""
    parts = ((_CURVE, [("standard", "misclassify")]), (["linf:0.3"], _ATTACKS), (["pixels:1"], _PIXELS))
    cases = tuple(case for model in _MODELS for threats, attacks in parts for case in product([model], threats, attacks))
    return Plan(cases, "mnist-5k", limit=_IMAGES)
