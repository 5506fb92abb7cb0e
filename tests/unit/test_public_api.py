"""The public names, their laziness and their signatures."""

from __future__ import annotations

import inspect
import subprocess
import sys

import tlora


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names():
    assert set(tlora.__all__) >= {
        "get_tlora_model",
        "sensitivity",
        "allocate",
        "input_subspaces",
        "build_adapter",
        "fold_scaling",
        "freeze_a",
    }
    assert set(tlora.__all__) <= set(dir(tlora))
    for name in tlora.__all__:
        assert callable(getattr(tlora, name))
        assert getattr(tlora, name).__doc__


def test_signatures_begin_as_documented():
    expected = {
        "sensitivity": ["model", "batches", "target_modules"],
        "allocate": ["sensitivity", "r", "lora_alpha", "shapes", "variant"],
        "input_subspaces": ["model", "batches", "ranks", "algorithm", "center"],
        "build_adapter": ["model", "allocation", "subspaces", "freeze_a"],
        "fold_scaling": ["adapter_dir", "out_dir"],
        "get_tlora_model": ["model", "batches", "r", "lora_alpha", "target_modules"],
    }
    for name, parameters in expected.items():
        found = list(inspect.signature(getattr(tlora, name)).parameters)
        assert found[: len(parameters)] == parameters
    defaults = inspect.signature(tlora.input_subspaces).parameters
    assert defaults["algorithm"].default == "sketch"
    assert defaults["center"].default is False


def test_importing_the_package_loads_no_heavy_library():
    run(
        "import sys, tlora, tlora.adapter, tlora.subspace, tlora.peft_folder\n"
        "tlora.allocate, tlora.sensitivity, tlora.fold_scaling\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_function_is_not_hidden_by_the_module_of_its_name():
    run("import tlora.sensitivity\nfrom tlora import sensitivity\nassert sensitivity.__module__")
    run(
        "from tlora.sensitivity import sensitivity as one\n"
        "from tlora import sensitivity as two\n"
        "import tlora\n"
        "assert one is two is tlora.sensitivity"
    )


def test_unknown_name():
    run(
        "import tlora\n"
        "try: tlora.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit(1)"
    )
