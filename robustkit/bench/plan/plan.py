"""Plans: which models are attacked how. Models, data, threats and attacks are named as on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from robustkit.errors import ArgumentError

__all__ = ["NONE", "UNTARGETED", "Case", "Plan", "attack_goal_pairs", "default_plan", "model_under_test_name", "product"]

NONE = "none"  # the spec of no defence
UNTARGETED = "misclassify"  # the only goal whose robust accuracy measures the robustness of a model


@final
@dataclass(frozen=True)
class Case:
    """A model, perhaps behind a defence, under one attack with one goal in one threat model; a row of the table.

    Attributes:
        model: Model spec.
        threat: Threat spec.
        attack: Attack spec.
        goal: Goal spec.
        defence: Defence spec; "none" for no defence.
    """

    model: str
    threat: str
    attack: str
    goal: str = UNTARGETED
    defence: str = NONE

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Case:
        """The case of a record of results.json."""
        return cls(record["model"], record["threat"], record["attack"], record["goal"], record["defence"] or NONE)

    @property
    def defence_or_none(self) -> str | None:
        """The defence spec; None if there is no defence."""
        return None if self.defence == NONE else self.defence

    @property
    def model_under_test(self) -> str:
        """The name of what is attacked: the model, or the model behind its defence."""
        return model_under_test_name(self.model, self.defence_or_none)


def model_under_test_name(model: str, defence: str | None) -> str:
    """The name of a model and its defence; None for no defence."""
    return model if defence is None else f"{model} behind {defence}"


@final
@dataclass(frozen=True)
class Plan:
    """The cases of a run, and the settings that their numbers depend on.

    Attributes:
        cases: The cases, in the order of the results.
        data: Data spec.
        offset: The number of examples to skip.
        limit: The number of examples to use; None uses all.
        seed: The seed of all noise.
        block: The number of images that are attacked and written to a file at a time; a resumed run repeats unfinished blocks.
        batch_size: The largest number of images per forward pass.
        device: The device of the models.
        threads: Torch threads in each worker. The last bits of the numbers may depend on it, but not on the number of workers.
        normalize: MEAN,STD of a normalisation in front of models made by a factory; each is one number, or one per channel,
            separated by ":". None if the models normalise their inputs themselves.
        save_adversarial: Write the images of all examples, not only those on which the attack succeeded.
        start_from: Folders of earlier runs on the same images, or files of adversarial images; attacks start from these.
        expected_hashes: Hashes of the data, the models and the earlier runs that the plan was made with, by spec. They are
            the table [hashes] of a plan file. Anything with another hash is refused.
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
    expected_hashes: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("offset", 0), ("limit", 1), ("block", 1), ("batch_size", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ArgumentError(f"{name}={value} must be at least {least}; leave it out for the default")
        if not self.cases:
            raise ArgumentError("the plan has no case; name a model, a threat and an attack")
        if len(set(self.cases)) < len(self.cases):
            repeated = next(case for case in self.cases if self.cases.count(case) > 1)
            raise ArgumentError(f"the plan contains {repeated} twice; remove one")

    @property
    def models(self) -> tuple[str, ...]:
        """The model specs, without repetitions."""
        return tuple(dict.fromkeys(case.model for case in self.cases))


def product(
    models: Iterable[str], threats: Iterable[str], attacks: Iterable[tuple[str, str]], defences: Iterable[str] = (NONE,)
) -> tuple[Case, ...]:
    """The cases of all combinations, without repetitions.

    Args:
        models: Model specs.
        threats: Threat specs.
        attacks: Pairs (attack spec, goal spec).
        defences: Defence specs.
    """
    threats, attacks, defences = tuple(threats), tuple(attacks), tuple(defences)
    cases = (
        Case(model, threat, attack, goal, defence)
        for model in models
        for defence in defences
        for threat in threats
        for attack, goal in attacks
    )
    return tuple(dict.fromkeys(cases))


def attack_goal_pairs(threat: str, attacks: Iterable[str] | None, goals: Iterable[str] | None) -> list[tuple[str, str]]:
    """Every attack with every goal. The defaults are the strongest attack for the threat, and misclassify.

    Args:
        threat: Threat spec.
        attacks: Attack specs, if given.
        goals: Goal specs, if given.
    """
    strongest = {"linf": "standard", "l2": "standard", "l1": "l1apgd", "pixels": "pixelsearch"}
    chosen = attacks or [strongest.get(threat.partition(":")[0], "pgd")]
    return [(attack, goal) for attack in chosen for goal in goals or ["misclassify"]]


_MODELS = ("zoo:mnist-cnn", "zoo:mnist-cnn-robust")
# One attack of each kind, at the eps that the robust model was trained with.
_ATTACKS = (
    ("fgsm", "misclassify"),
    ("fgsm", "least-likely"),
    ("ifgsm", "misclassify"),
    ("mifgsm", "misclassify"),
    ("pgd", "misclassify"),
    ("uap-pgd", "misclassify"),
    ("standard", "misclassify"),
)
_CURVE = ("linf:0.05", "linf:0.1", "linf:0.2")  # smaller eps, all with the strongest attack
# A short differential evolution: the full one costs up to 30,400 forwards per image, and this plan should take a minute.
_PIXELS = (("onepixel:population=40,generations=10", "misclassify"), ("pixelsearch", "misclassify"))
_IMAGES = 300


def default_plan() -> Plan:
    """The plan of `robustkit bench` without arguments: two MNIST models, attacks of each kind, 300 held-out images."""
    parts = ((_CURVE, [("standard", "misclassify")]), (["linf:0.3"], _ATTACKS), (["pixels:1"], _PIXELS))
    cases = tuple(case for model in _MODELS for threats, attacks in parts for case in product([model], threats, attacks))
    return Plan(cases, "mnist-5k", limit=_IMAGES)
