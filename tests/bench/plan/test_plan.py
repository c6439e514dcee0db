"""Plans from options and from files, and the commands and files that give them again."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkit import cli
from robustkit.bench import Case, Plan, default_plan, plan_text, read_plan
from robustkit.bench.plan.request import Request, command_of, plan_of
from robustkit.bench.plan.specs import attack_registry
from robustkit.commands import bench as command
from robustkit.errors import ArgumentError

MODELS = ("zoo:mnist-cnn", "zoo:mnist-cnn-robust")
THREATS = ("linf:0.05", "linf:0.1", "linf:0.2", "linf:0.3")


def test_the_default_plan_has_attacks_of_each_kind_and_a_curve():
    cases = []
    for model in MODELS:
        cases += [Case(model, threat, "standard") for threat in THREATS[:3]]
        for attack in ("fgsm", "fgsm -> least-likely", "ifgsm", "mifgsm", "pgd", "uap-pgd", "standard"):
            name, _, goal = attack.partition(" -> ")
            cases.append(Case(model, "linf:0.3", name, goal or "misclassify"))
        cases += [Case(model, "pixels:1", attack) for attack in ("onepixel:population=40,generations=10", "pixelsearch")]
    assert plan_of(Request()) == default_plan() == Plan(tuple(cases), "mnist-5k", limit=300)
    assert {case.attack.partition(":")[0] for case in cases} <= set(attack_registry())


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request(limit=5, seed=3), Plan(default_plan().cases, "mnist-5k", limit=5, seed=3)),
        (Request(model=["m"], data="d", threat=["t"]), Plan((Case("m", "t", "pgd"),), "d")),
        (Request(model=["m", "m"], data="d", threat=["t", "t"], attack=["a", "a"]), Plan((Case("m", "t", "a"),), "d")),
        (
            Request(None, ["m", "n"], "d", 9, 8, ["t", "u"], ["a", "b"], ["g", "h"], 7, 5, 6, "cuda", 2, "0,1", True),
            Plan(
                tuple(Case(m, t, a, g) for m in "mn" for t in "tu" for a in "ab" for g in "gh"),
                "d",
                8,
                9,
                7,
                5,
                6,
                "cuda",
                2,
                "0,1",
                True,
            ),
        ),
        (
            Request(attack=["a"], data="d", threat=["t"]),
            Plan((Case("zoo:mnist-cnn", "t", "a"), Case("zoo:mnist-cnn-robust", "t", "a")), "d"),
        ),
        (
            Request(goal=["g"]),
            Plan(
                tuple(
                    Case(m, t, "pixelsearch" if t == "pixels:1" else "standard", "g")
                    for m in MODELS
                    for t in (*THREATS, "pixels:1")
                ),
                "mnist-5k",
            ),
        ),
        (Request(data="d"), Plan(default_plan().cases, "d")),
        (
            Request(threat=["l1:5"]),
            Plan(
                tuple(
                    Case(m, "l1:5", a, g)
                    for m in MODELS
                    for a, g in (
                        ("fgsm", "misclassify"),
                        ("fgsm", "least-likely"),
                        ("ifgsm", "misclassify"),
                        ("mifgsm", "misclassify"),
                        ("pgd", "misclassify"),
                    )
                ),
                "mnist-5k",
            ),
        ),
        (
            Request(model=["m"], data="d", threat=["linf:0.1", "pixels:3"]),
            Plan((Case("m", "linf:0.1", "standard"), Case("m", "pixels:3", "pixelsearch")), "d"),
        ),
        (Request(goal=["g"], model=["m"], data="d", threat=["t"]), Plan((Case("m", "t", "pgd", "g"),), "d")),
        (Request(data="d", start_from=["r", "q", "r"]), Plan(default_plan().cases, "d", start_from=("r", "q"))),
    ],
)
def test_a_request_gives_all_combinations_of_its_options(request_, expected):
    assert plan_of(request_) == expected


@pytest.mark.parametrize(("missing", "given_"), [("data", {"threat": ["t"]}), ("threat", {"data": "d"})])
def test_a_model_needs_data_and_a_threat(missing, given_):
    with pytest.raises(ArgumentError, match=f"--{missing} is missing; .* for example: robustkit bench --model m --data"):
        plan_of(Request(model=["m"], **given_))


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"offset": -1}, {"batch_size": 0}, {"block": 0}, {"threads": 0}])
def test_numbers_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ArgumentError, match=f"{name}={value} must be at least"):
        plan_of(Request(**wrong))


def test_a_plan_without_cases_or_with_a_repeated_case_is_refused():
    with pytest.raises(ArgumentError, match="the plan has no case"):
        Plan((), "digits")
    with pytest.raises(ArgumentError, match=r"contains Case\(model='m'.* twice"):
        Plan((Case("m", "t", "a"), Case("m", "t", "a")), "digits")


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SETTINGS = {
    "offset": st.integers(0, 9),
    "limit": st.none() | st.integers(1, 9),
    "seed": st.integers(-(2**40), 2**40),
    "block": st.integers(1, 9),
    "batch_size": st.integers(1, 9),
    "device": WORDS,
    "threads": st.integers(1, 9),
    "normalize": st.none() | WORDS,
    "save_adversarial": st.booleans(),
    "start_from": st.lists(WORDS, max_size=2).map(tuple),
}
CASES = st.lists(st.builds(Case, WORDS, WORDS, WORDS, WORDS), min_size=1, max_size=4, unique=True)
PLANS = st.builds(Plan, CASES.map(tuple), WORDS, expected_hashes=st.dictionaries(WORDS, WORDS, max_size=3), **SETTINGS)


@given(PLANS)
def test_a_plan_that_is_written_and_read_is_equal(tmp_path_factory, plan):
    path = tmp_path_factory.getbasetemp() / "plan.toml"
    path.write_text(plan_text(plan), encoding="utf-8")
    read = read_plan(path)
    assert read == plan
    assert read.expected_hashes == plan.expected_hashes


@given(PLANS)
def test_the_command_of_a_plan_gives_this_plan(plan):
    words = shlex.split(command_of(plan, "/some/plan.toml"))
    if words == ["robustkit", "bench", "--plan", "/some/plan.toml"]:
        return
    assert parsed(words) == plan


def parsed(words):
    """The plan that the command line makes of these words."""
    plans = []
    real, command.bench_command = command.bench_command, lambda request, options: plans.append(plan_of(request)) or 0
    try:
        assert words[:2] == ["robustkit", "bench"]
        assert cli.main(words[1:]) == 0
    finally:
        command.bench_command = real
    return plans[0]


@pytest.mark.parametrize(
    ("plan", "command_"),
    [
        (default_plan(), "robustkit bench"),
        (plan_of(Request(limit=7)), "robustkit bench --limit 7"),
        (plan_of(Request(model=["a b.py:n", "m"], data="npz:x 'y'.npz", seed=-4, threat=["t", "u"], goal=["g"])), None),
        (
            plan_of(Request(model=["m"], data="digits", threat=["t"], attack=["a"], device="cuda:1", save_adversarial=True)),
            None,
        ),
        (Plan((Case("m", "t", "a"), Case("m", "u", "b")), "digits"), "robustkit bench --plan plan.toml"),
    ],
)
def test_the_reported_command_gives_the_same_plan(plan, command_):
    reported = command_of(plan)
    assert command_ is None or reported == command_
    if "--plan" not in reported:
        assert parsed(shlex.split(reported)) == plan


LISTS = 'data = "d"\nmodels = ["m"]\nthreats = ["t"]\n'
ONE = '[[cases]]\nmodel = "m"\nthreat = "t"\nattack = "a"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LISTS, Plan((Case("m", "t", "pgd"),), "d")),
        ('data = "d"\nlimit = 3\n' + ONE, Plan((Case("m", "t", "a"),), "d", limit=3)),
        (
            LISTS + 'attacks = ["a", "b"]\n' + ONE + 'goal = "g"\n',
            Plan((Case("m", "t", "a"), Case("m", "t", "b"), Case("m", "t", "a", "g")), "d"),
        ),
    ],
)
def test_a_plan_may_be_written_by_hand(tmp_path, text, expected):
    (tmp_path / "plan.toml").write_text(text)
    assert read_plan(tmp_path / "plan.toml") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = ", "is not TOML: .* correct that line"),
        ("\udcff", "cannot be read"),
        ('limti = 3\ndata = "d"\n', "'limti' is not a key of the plan; its keys are .*limit"),
        ('limit = "3"\n' + LISTS, "limit='3' must be a whole number"),
        ("limit = true\n" + LISTS, "limit=True must be a whole number"),
        ("limit = 2.5\n" + LISTS, "limit=2.5 must be a whole number"),
        ("limit = 0\n" + LISTS, "limit=0 must be at least 1"),
        ("save_adversarial = 1\n" + LISTS, "save_adversarial=1 must be true or false"),
        ("data = 3\n", "data=3 must be a string"),
        (ONE, "data is missing; name the data"),
        ('data = "d"\n', "the plan has no case"),
        ('start_from = "r"\n' + LISTS, "start_from='r' must be a list of strings"),
        ('data = "d"\nmodels = "m"\n', "models='m' must be a list of strings"),
        ('data = "d"\nmodels = [1]\n', r"models=\[1\] must be a list of strings"),
        ('data = "d"\nmodels = ["m"]\n', "threats is missing, and models needs it"),
        ('data = "d"\nattacks = ["m"]\n', "models is missing, and attacks needs it"),
        ('data = "d"\ncases = 3\n', "cases must be tables"),
        ('data = "d"\n[[cases]]\nmodel = "m"\nthreat = "t"\n', "case 1 has no attack"),
        ('data = "d"\n' + ONE + "seed = 3\n", "'seed' is not a key of case 1; its keys are model, threat, attack, goal"),
        ('data = "d"\n[[cases]]\nmodel = 3\nthreat = "t"\nattack = "a"\n', "model=3 must be a string"),
        (LISTS + "hashes = 3\n", "hashes must be a table"),
        (LISTS + "[hashes]\nm = 3\n", "m=3 must be a string"),
    ],
)
def test_an_invalid_plan_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "plan.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArgumentError, match=message) as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"plan={str(path)!r}")
    assert "\n" not in str(caught.value)


def test_no_option_can_be_combined_with_a_plan_file(tmp_path):
    (tmp_path / "plan.toml").write_text(LISTS)
    with pytest.raises(ArgumentError, match="--batch-size cannot be combined with --plan"):
        plan_of(Request(plan=tmp_path / "plan.toml", batch_size=3))
    with pytest.raises(ArgumentError, match=r"none\.toml' cannot be read"):
        plan_of(Request(plan=tmp_path / "none.toml"))
