"""What starting each verb of the command line costs beside importing everything the project uses.

    python tests/benchmarks/start_up.py [--breakdown] [--floors]

A grid of one run and the base model is made once by real snakemake, a process a job; each verb's
process notes at its end which modules it had loaded, in their order. Then processes that import the
same modules and nothing else are timed, in turn with one that imports torch, transformers with its
Trainer, peft, deepspeed, datasets, pandas, mlflow, snakemake and all of tlora; medians. Verbs that
start no job are timed whole. The bare start of Python, the same on both sides, is in all times.
`--breakdown` prints what `-X importtime` says of the dearest packages of each verb instead.
`--floors` times what the libraries themselves take, without a line of tlora, to load a tokenizer, a
model, a model with an adapter and a Trainer: no verb that needs one can start faster.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import measuring
from checkout import copy_checkout

ROOT = Path(__file__).resolve().parents[2]
PRESET = """\
models: [tiny]
tasks: [arithmetic]
methods: [tlora]
seeds: [1]
set: {data.train: 8, data.validation: 4, batch_size: 4, calibration_samples: 4}
overrides:
  - {benchmarks: [arithmetic], set: {data.test: 4, max_new_tokens: 2}}
"""
EVERYTHING = """\
import datasets, deepspeed, mlflow, pandas, peft, snakemake.api, torch, transformers
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
import importlib, pkgutil, tlora
for module in pkgutil.walk_packages(tlora.__path__, "tlora."):
    if "vllm" not in module.name and "worker" not in module.name:
        importlib.import_module(module.name)
import sys
print(len(sys.modules))
"""
REPLAY = """\
import importlib, json, sys
for name in json.load(open(sys.argv[1])):
    try:
        importlib.import_module(name)
    except Exception:
        pass
print(len(sys.modules))
"""
WHOLE = """\
import atexit, sys
atexit.register(lambda: print(len(sys.modules)))
from tlora.cli import program
sys.exit(program())
"""
# What `tlora` is in the small run: it notes what the first call of each verb had loaded.
COMMAND = """\
#!{python}
import json, os, sys
sys.path[0] = {folder!r}
from tlora.cli import main
status = main()
found = [
    name for name, module in list(sys.modules.items())
    if getattr(getattr(module, "__spec__", None), "has_location", False) and name != "__main__"
]
path = os.path.join({notes!r}, sys.argv[1] + ".json")
if status == 0 and not os.path.exists(path):
    json.dump(found, open(path, "w"))
sys.exit(status)
"""
FLOORS = {
    "a tokenizer": "AutoTokenizer.from_pretrained(folder)",
    "a model": "AutoModelForCausalLM.from_pretrained(folder)",
    "a model with an adapter": "from peft import LoraConfig, get_peft_model\n"
    "get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig())",
    "a Trainer of a model with an adapter": "from peft import LoraConfig, get_peft_model\n"
    "model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig())\n"
    "Trainer(model, TrainingArguments(report_to=[], use_cpu=True))",
}
FLOOR = """\
import sys
folder = "workflow/resources/tiny"
from transformers import {names}
{code}
print(len(sys.modules))
"""
# Verbs that start no job, with their arguments.
PLAIN = {
    "--help": ["--help"],
    "list": ["list"],
    "validate": ["validate", "config/config.yaml"],
    "where": ["where", "config/config.yaml"],
    "show": ["show", "config/config.yaml", "arithmetic", "tlora"],
    "table": ["table", "config/small.yaml"],
    "plan": ["plan", "config/config.yaml"],
    "download": ["download", "config/config.yaml"],
    "doctor": ["doctor"],
    "params": ["params", "tiny", "lora"],
}


class Checkout:
    """A copy of the project in which a small grid can be made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder / "checkout", folder / "notes"
        self.notes.mkdir()
        copy_checkout(ROOT, self.folder)
        (self.folder / "config/small.yaml").write_text(PRESET, encoding="utf-8")
        command = folder / "bin/tlora"
        command.parent.mkdir()
        values = {"folder": str(self.folder), "notes": str(self.notes)}
        command.write_text(COMMAND.format(python=sys.executable, **values), encoding="utf-8")
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        hidden = ("SNAKEMAKE", "MLFLOW", "PYTHON", "TLORA")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        self.environment = kept | {
            "PATH": os.pathsep.join([str(command.parent), kept["PATH"]]),
            "PYTHONPATH": str(self.folder),
            "TLORA_FORKS": "off",
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, *command: object) -> str:
        """Run a command in the checkout and return what it says."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))[:200]}:\n{done.stdout[-3000:]}")
        return done.stdout

    def make(self) -> list[str]:
        """Make the small grid and a choice; return the verbs whose modules are known."""
        snakemake = [sys.executable, "-m", "snakemake", "--configfile", "config/small.yaml"]
        self.run(*snakemake, "--cores", "2")
        scores = sorted(self.folder.glob("results/score/**/score.json"))[:2]
        trials = [
            {"settings": {"rank": n}, "score": one.parent.name} for n, one in enumerate(scores)
        ]
        given = [f"trial{number}={path}" for number, path in enumerate(scores)]
        spec = json.dumps({"trials": trials})
        self.run("tlora", "choose", "--spec", spec, "--input", *given, "--out", "results/chosen")
        return [path.stem for path in sorted(self.notes.glob("*.json"))]

    def replay(self, verb: str) -> list[str]:
        """Return the command that imports what a verb had loaded, and nothing else."""
        return [sys.executable, "-c", REPLAY, str(self.notes / f"{verb}.json")]

    def plain(self, verb: str) -> list[str]:
        """Return the command of a verb that starts no job, without notes."""
        return [sys.executable, "-c", WHOLE, *PLAIN[verb]]

    def floor(self, what: str) -> list[str]:
        """Return the command that loads something with the libraries alone."""
        known = ("AutoTokenizer", "AutoModelForCausalLM", "Trainer", "TrainingArguments")
        code = FLOORS[what]
        names = [name for name in known if f"{name}(" in code or f"{name}." in code]
        return [sys.executable, "-c", FLOOR.format(names=", ".join(names), code=code)]

    def breakdown(self, command: list[str]) -> str:
        """Return the dearest packages of a process: milliseconds of their own modules."""
        told = self.run(sys.executable, "-X", "importtime", *command[1:])
        spent: collections.Counter[str] = collections.Counter()
        for line in told.splitlines():
            own, _, name = line.removeprefix("import time:").partition("|")
            if line.startswith("import time:") and own.strip().isdigit():
                spent[name.partition("|")[2].strip().partition(".")[0]] += int(own)
        return ", ".join(f"{name} {used / 1000:.0f} ms" for name, used in spent.most_common(8))


def main() -> None:
    """Measure and print a row for each verb."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--breakdown", action="store_true", help="where the time goes, no rows")
    parser.add_argument("--floors", action="store_true", help="only what the libraries take")
    options = parser.parse_args()
    if options.small:
        options.repeat = 1
    with tempfile.TemporaryDirectory() as root:
        checkout = Checkout(Path(root))
        verbs = [] if options.small or options.floors else checkout.make()
        commands = {verb: checkout.replay(verb) for verb in verbs}
        plain = ["--help", "validate"] if options.small else list(PLAIN)
        if options.floors:
            commands = {what: checkout.floor(what) for what in FLOORS}
        else:
            commands |= {verb: checkout.plain(verb) for verb in plain if verb not in commands}
        if options.breakdown:
            for verb, command in commands.items():
                print(f"{verb}: {checkout.breakdown(command)}", flush=True)
            return
        eager = [sys.executable, "-c", EVERYTHING]
        modules: dict[str, int] = {}

        def start(verb: str, command: list[str]) -> None:
            modules[verb] = int(checkout.run(*command).split()[-1])

        seconds = measuring.alternating(
            {
                verb: functools.partial(start, verb, command)
                for verb, command in {"": eager, **commands}.items()
            },
            options.repeat,
        )
        theirs = f"{seconds['']:.2f} s, {modules['']:,} modules"
        versions = measuring.machine("torch", "transformers", "peft", "mlflow")
        measuring.header()
        for verb in commands:
            what = f"`tlora {verb}`: the whole process"
            if verb in verbs:
                what = f"`tlora {verb}`: what a job imports"
            elif options.floors:
                what = f"the libraries alone, to load {verb}"
            ours = f"{seconds[verb]:.2f} s, {modules[verb]:,} modules"
            ratio = seconds[verb] / seconds[""]
            measuring.row(what, ours, theirs, ratio, versions)


if __name__ == "__main__":
    main()
