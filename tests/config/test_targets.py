"""Names of functions in the configuration: a hostile corpus, and signatures that are bound before use."""

import sys
import textwrap

import pytest
import torch

from framework.config import targets
from framework.config.compose import check, compose
from framework.config.schema import Target
from framework.errors import ConfigError

GIVEN = ["model.path=some/model", "data.train=[{path: rows.jsonl}]"]

HOSTILE = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "pathlib.Path.write_text",
    "torch.load",
    "torch.hub.load",
    "pickle.loads",
    "importlib.import_module",
    "hydra.utils.instantiate",
    "timeit.timeit",
    "logging.os.system",
    # through what our own modules import
    "framework.config.targets.os.system",
    "framework.config.targets.importlib.import_module",
    "framework.config.targets.functools.partial",
    "framework.config.record.os.system",
    "framework.config.record.yaml.unsafe_load",
    "framework.config.record.Path",
    "framework.config.record.Path.write_text",
    "framework.losses.sft.Tensor",
    "framework.batch.torch.load",
    "framework.batch.replace",
    "framework.keyed.hashlib.new",
    "framework.strategy.base.torch.load",
    # names that only look like ours
    "frameworks.losses.sft",
    "framework_evil.run",
    "framework.losses.sft.sft.__globals__",
    "framework.losses.sft.sft.__call__",
    "framework.__builtins__.eval",
    "framework.config.targets._import",
    "framework.losses",
    "framework.errors.DONE",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_but_functions_of_trusted_packages_is_found(name):
    with pytest.raises(ConfigError):
        targets.find(name, [])


@pytest.mark.parametrize("name", HOSTILE[::8])
def test_a_hostile_name_is_refused_on_a_command_line(name):
    with pytest.raises(ConfigError):
        check([*GIVEN, f"loss._target_={name}"])


@pytest.mark.parametrize("module", ["os", "builtins", "subprocess", "importlib"])
def test_the_standard_library_cannot_be_trusted(module):
    with pytest.raises(ConfigError, match="expected a function of framework"):
        targets.find(f"{module}.system", [module])


@pytest.mark.parametrize(
    "override",
    [
        "+optim._target_=os.system",
        "+data.train.0._target_=os.system",
        "data.train=[{path: a, _target_: os.system}]",
        "+tracker.hook={_target_: os.system}",
        "+callbacks=[{_target_: os.system}]",
        "+loss.extra={_target_: os.system}",
        "+loss.extra=[[{_target_: os.system}]]",
        "+loss._args_=[1]",
        "+loss._recursive_=true",
        "loss._partial_=false",
        "+adapter.targets={_target_: os.system}",
        "model.path={_target_: os.system}",
    ],
)
def test_targets_stand_only_where_a_function_is_expected(override):
    with pytest.raises(ConfigError):
        check([*GIVEN, override])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A user's own package with losses good and bad, and a dangerous import."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage/__init__.py").write_text("")
    (tmp_path / "mypackage/losses.py").write_text(
        textwrap.dedent("""
            from os import system
            from torch import load
            from framework.losses.items import Items

            def focal(logps, weight, *, gamma=2.0):
                return Items(-(1 - logps.exp()) ** gamma * logps, weight)

            def needy(logps, weight, *, beta):
                return Items(-beta * logps, weight)

            def mean(logps, weight):
                return -(logps * weight).sum() / weight.sum()

            def open(logps, weight, **anything):
                return Items(-logps, weight)

            def unrelated(*, command="rm"):
                raise AssertionError("was called")
        """)
    )
    yield "mypackage"
    for name in [name for name in sys.modules if name.startswith("mypackage")]:
        del sys.modules[name]


def run_with(function, *more):
    return compose([*GIVEN, f"loss._target_=mypackage.losses.{function}", "~loss.label_smoothing", *more])


def test_a_loss_of_a_trusted_package_is_bound(package):
    """-(1 - 1/2)^3 log(1/2) = 0.125 * 0.693147 = 0.0866434."""
    run = run_with("focal", "trusted_packages=[mypackage]", "+loss.gamma=3.0")
    items = targets.loss(run)(logps=torch.tensor([0.5]).log(), weight=torch.ones(1))
    assert items.total().item() == pytest.approx(0.0866434, abs=1e-6)


def test_a_package_is_not_trusted_by_itself(package):
    with pytest.raises(ConfigError, match=r"add trusted_packages=\[mypackage\]"):
        targets.loss(run_with("focal"))


@pytest.mark.parametrize("function", ["system", "load"])
def test_what_a_trusted_package_imports_is_not_its_own(package, function):
    with pytest.raises(ConfigError):
        targets.loss(run_with(function, "trusted_packages=[mypackage]"))


def test_a_loss_of_another_stage_is_told_so():
    run = compose([*GIVEN, "stage=distill", "stage.teacher=some/teacher", "loss=dft"])
    told = (
        "asks for logps, weight; expected a loss of stage=distill, which offers student_logps, teacher_logps"
    )
    with pytest.raises(ConfigError, match=f"{told}, weight; type loss=forward_kl"):
        targets.loss(run)


@pytest.mark.parametrize(
    ("function", "more", "told"),
    [
        ("focal", ["+loss.gama=2"], "loss.gama: mypackage.losses.focal has no such keyword; type loss.gamma"),
        ("focal", ["+loss.logps=2"], "loss.logps: is filled in while training"),
        ("focal", ["+loss.gamma=wide"], "loss.gamma=wide: mypackage.losses.focal refuses"),
        (
            "needy",
            [],
            "loss.beta: mypackage.losses.needy needs it and it is not set; type [+]loss.beta=VALUE",
        ),
        ("mean", [], "returned Tensor; expected Items"),
        ("open", ["+loss.a={_target_: os.system}"], "loss.a._target_: found inside of loss.a"),
        ("open", ["+loss.a=[[{_target_: os.system}]]"], r"loss.a\[0\]\[0\]._target_: found inside"),
        ("open", ["+loss._args_=[1]"], "loss._args_: found inside of loss"),
        ("unrelated", [], "asks for nothing; expected a loss of stage=sft"),
        ("focl", [], "no focl in mypackage.losses; type loss._target_=mypackage.losses.focal"),
    ],
)
def test_a_misfit_is_told_before_any_weight_is_loaded(package, function, more, told):
    with pytest.raises(ConfigError, match=told):
        targets.loss(run_with(function, "trusted_packages=[mypackage]", *more))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("+loss.label_smoohting=0.1", "type loss.label_smoothing"),
        ("loss.label_smoothing=2", r"label_smoothing=2 is outside \[0, 1\)"),
        ("loss._target_=framework.losses.sft.stf", "type loss._target_=framework.losses.sft.sft"),
        ("loss._target_=framework.loses.sft.sft", "type loss._target_=framework.losses.sft.sft"),
        ("loss._target_=mising.losses.sft", "expected a function of framework; if mising is your own"),
    ],
)
def test_a_mistyped_name_is_told_with_the_nearest(override, told):
    with pytest.raises(ConfigError, match=told):
        check([*GIVEN, override])


def test_resolving_calls_nothing(package):
    node = Target.model_validate(
        {"_target_": "mypackage.losses.unrelated", "_partial_": True, "command": "x"}
    )
    bound = targets.resolve(node, ["mypackage"])
    assert bound.keywords == {"command": "x"}
