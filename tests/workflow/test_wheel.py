"""The built wheel alone, in an environment without snakemake and mlflow, runs the three lines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

THREE_LINES = """
from importlib.util import find_spec
assert not any(map(find_spec, ("snakemake", "mlflow"))), "the environment is not clean"
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

torch.manual_seed(0)
llama = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2))
t5 = T5ForConditionalGeneration(T5Config(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
    decoder_start_token_id=0))
for model in (llama.eval(), t5.eval()):
    ids = torch.randint(3, 64, (8, 12))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    with torch.no_grad():
        before = model(**batches[0]).logits

    from tlora import get_tlora_model
    model = get_tlora_model(model, batches, r=4, lora_alpha=4, target_modules="all-linear")

    with torch.no_grad():
        assert torch.equal(model.eval()(**batches[0]).logits, before)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.01)
    losses = []
    for _ in range(5):
        loss = model(**batches[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
import tlora
print(tlora.__file__)
"""


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (root / name).is_file():
            shutil.copyfile(root / name, source / name)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "tlora", source / "tlora", ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--quiet", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True)
    (found,) = out.glob("*.whl")
    return found


def test_wheel_holds_the_package_and_nothing_else(wheel, root):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tlora"}
    sources = {p.relative_to(root).as_posix() for p in (root / "tlora").rglob("*.py")}
    assert sources <= names
    assets = {p.relative_to(root).as_posix() for p in (root / "tlora/comparison/assets").iterdir()}
    assert assets and assets <= names


def test_three_lines_in_a_clean_environment(wheel, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*install, "--no-index", "--quiet", str(wheel)], check=True)
    # Tests install nothing from a network: the libraries are linked from this environment.
    (site,) = (environment / "lib").glob("python*/site-packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        absent = entry.name.lower().startswith(("snakemake", "mlflow", "tlora", "__editable__"))
        if not absent and entry.suffix != ".pth" and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    result = subprocess.run(
        [str(python), "-c", textwrap.dedent(THREE_LINES)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.split()[-1]).is_relative_to(environment)
