"""What evaluation takes, beside what people use: one row of a Markdown table for each comparison.

    python tests/benchmarks/evaluation.py [server|batches|scoring|evalplus ...] [--data-root DIR]

server
    8 adapters x 2 benchmarks on the shipped tiny model: jobs that share a vLLM server against jobs
    with an engine each, which are timed on some of the jobs and counted up. Needs `make vllm-test`.
batches
    The transformers backend against its own batches in the data's order, and against plain batches
    of `generate`. A model that counts down says exactly as many tokens as it is told, so that the
    lengths are like GSM8K's while the work is that of any model.
scoring
    1,319 numbers and 5,000 answers like MATH's, made up, against math-verify called on one after
    the other as its README does.
evalplus
    The first problems of HumanEval+ and MBPP+ with their reference solutions, against EvalPlus' own
    command line. Needs --data-root with code/HumanEvalPlus-v0.1.10.jsonl.gz and
    code/MbppPlus-v0.2.0.jsonl.gz; the latter runs the solutions without a sandbox.

Without names: all of them; what cannot run here says why.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measuring
from vllm_server import SETTINGS, vllm_server

if TYPE_CHECKING:
    from tlora.generation import Prompt
    from tlora.generation.transformers import TransformersBackend

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "workflow/resources/tiny"
THREADS = 2


def main() -> None:
    """Print the rows of what is asked for."""
    parser = measuring.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--data-root", type=Path, help="a folder with code/*.jsonl.gz")
    parser.add_argument("--prompts", type=int, default=100, help="of each benchmark (server)")
    parser.add_argument("--problems", type=int, default=40, help="of each data set (evalplus)")
    options = parser.parse_args()
    names = options.names or [name for name in MEASUREMENTS if not options.small or name in QUICK]
    if unknown := set(names) - set(MEASUREMENTS):
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(MEASUREMENTS)}")
    measuring.header()
    for name in names:
        MEASUREMENTS[name](options)


def faster(ours: float, theirs: float) -> str:
    """Return how many times as fast ours is, from seconds."""
    return f"{theirs / ours:.2f} x as fast"


# --- scoring -------------------------------------------------------------------------------------

KINDS = {"integer": 62, "fraction": 13, "terms": 8, "root": 5, "interval": 2, "tuple": 2}
KINDS |= {"text": 2, "list": 2, "decimal": 2, "matrix": 1, "degrees": 1}
"""Per cent of MATH's 5,000 answers, about."""


def answer(kind: str, rng: random.Random) -> tuple[str, str, str]:
    """Return an answer, the same one written otherwise, and a wrong one of its kind."""
    a, b, c = rng.randint(2, 60), rng.randint(2, 15), rng.choice((2, 3, 5, 7, 11))
    wrong, minus = a + rng.randint(1, 9), rng.choice(("", "-"))
    if kind == "integer":
        a = a if rng.random() < 0.8 else a * rng.randint(100, 9999)
        other = rng.choice((f"${a}$", f"{a:,}", f"x = {a}", f"{a}.0", f"{a} \\text{{ units}}"))
        return f"{minus}{a}", minus * (other[0].isdigit()) + other if minus else other, str(wrong)
    if kind == "fraction":
        divisor = math.gcd(a, b)
        top, low = a // divisor, b // divisor + (b // divisor == 1)
        written = (f"{minus}{top}/{low}", f"{minus}\\dfrac{{{top}}}{{{low}}}")
        other = rng.choice((*written, f"\\frac{{{minus}{top}}}{{{low}}}"))
        return f"{minus}\\frac{{{top}}}{{{low}}}", other, f"{minus}\\frac{{{wrong}}}{{{low}}}"
    if kind == "terms":
        return (
            f"{b}x^2 + {a}x - {c}",
            rng.choice((f"{a}x + {b}x^2 - {c}", f"{b}x^{{2}}+{a}x-{c}", f"y={b}x^2+{a}x-{c}")),
            f"{b}x^2 + {wrong}x - {c}",
        )
    if kind == "root":
        other = rng.choice((f"\\sqrt{{{b * b * c}}}", f"{b}\\cdot\\sqrt{{{c}}}", f"{b} \\sqrt {c}"))
        return f"{b}\\sqrt{{{c}}}", other, f"{wrong}\\sqrt{{{c}}}"
    if kind == "interval":
        both = f"(-\\infty,{-b}] \\cup [{a},\\infty)"
        left = f"\\left(-\\infty, -{b}\\right] \\cup \\left[{a}, \\infty\\right)"
        return both, left, f"(-\\infty,{-b}) \\cup ({a},\\infty)"
    if kind == "tuple":
        pair = f"\\left( {a}, \\frac{{\\pi}}{{{b}}} \\right)"
        return pair, f"({a}, \\pi/{b})", f"({wrong}, \\pi/{b})"
    if kind == "text":
        word, other = rng.sample(("Friday", "Navin", "even", "hyperbola", "Evelyn", "neither"), 2)
        return f"\\text{{{word}}}", word, other
    if kind == "list":
        listed = [str(value) for value in rng.sample(range(-20, 40), 3)]
        return ",".join(listed), ", ".join(reversed(listed)), f"{listed[0]}, {wrong}"
    if kind == "decimal":
        return f"{a}.{b}", f"{a}.{b}0", f"{wrong}.{b}"
    if kind == "matrix":
        rows = f"{a} & {b} \\\\ {c} & {minus}1"
        written = f"\\begin{{bmatrix}} {rows} \\end{{bmatrix}}"
        cells = f"\\begin{{pmatrix}} {rows} \\end{{pmatrix}}"
        return cells, written, cells.replace(str(a), str(wrong))
    return f"{a}^\\circ", rng.choice((str(a), f"{a} degrees")), f"{wrong}^\\circ"


def completions(count: int, kinds: dict[str, int], rng: random.Random) -> list[dict[str, Any]]:
    """Return records to score: of 100 answers 45 are right, 18 of them written otherwise."""
    records = []
    for at, kind in enumerate(rng.choices(list(kinds), list(kinds.values()), k=count)):
        right, other, wrong = answer(kind, rng)
        said = rng.choices((right, other, wrong, ""), (27, 18, 52, 3))[0]
        text = f"Let us think step by step.\nThe answer is: {said}" if said else "I do not know."
        records.append({"id": str(at), "prompt": "", "completion": text, "reference": right})
    return records


def scoring(options: argparse.Namespace) -> None:
    """Score completions, with their own rule and by math-verify."""
    from math_verify import parse, verify

    from tlora.benchmarks import Context, gsm8k, hendrycks_math

    rng, small = random.Random(0), options.small
    numbers = completions(20 if small else 1319, {"integer": 95, "decimal": 5}, rng)
    terms = completions(20 if small else 5000, KINDS, rng)
    records, found = numbers + terms, {}

    def ours() -> None:
        context = Context(place={"workers": THREADS})
        items = []
        for scorer, part in ((gsm8k, numbers), (hendrycks_math, terms)):
            items += scorer.score(part, scorer.Options(), context)["items"]
        found["ours"] = [bool(item["math_verify_correct"]) for item in items]

    def theirs() -> None:
        found["theirs"] = []
        for record in records:
            said = record["completion"].rpartition("The answer is: ")[2]
            pair = (parse(f"${record['reference']}$"), parse(f"${said}$"))
            found["theirs"].append(verify(*pair))

    times = measuring.alternating({"ours": ours, "theirs": theirs}, 1 if small else 2)
    same = sum(map(bool.__eq__, found["ours"], found["theirs"]))
    measuring.row(
        f"scoring {len(numbers):,} + {len(terms):,} answers ({sum(found['ours']):,} equal; "
        f"{same:,} of {len(records):,} verdicts agree), {THREADS} workers; theirs: math-verify "
        "alone, one after the other",
        f"{times['ours']:.1f} s",
        f"{times['theirs']:.1f} s",
        faster(times["ours"], times["theirs"]),
        measuring.machine("math-verify"),
    )


# --- batches -------------------------------------------------------------------------------------


def counting(width: int, layers: int) -> TransformersBackend:
    """Return a model of Llama's shape whose next token is the one below the last, down to the end.

    What its layers add is too small to change the largest logit.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tlora.base_model import load_tokenizer
    from tlora.generation.transformers import TransformersBackend

    torch.manual_seed(0)
    tokenizer = load_tokenizer({"model": str(TINY)})
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 11 // 4 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=1e-3,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        names = torch.nn.functional.normalize(torch.randn(config.vocab_size, width), dim=1)
        model.model.embed_tokens.weight.copy_(names * width**0.5)
        model.lm_head.weight.copy_(names.roll(-1, 0))
    return TransformersBackend(model, tokenizer)


def lengths(count: int) -> list[tuple[int, int]]:
    """Return tokens of prompts and of completions, distributed like those of GSM8K.

    Medians 58 of the question and 89 of the answer, deviations of the logarithms 0.37 and 0.41,
    correlation 0.53 (the test set's words and digits); 45 tokens of a template are added.
    """
    rng, found = random.Random(0), []
    for _ in range(count):
        one, other = rng.gauss(0, 1), rng.gauss(0, 1)
        linked = 0.53 * one + math.sqrt(1 - 0.53**2) * other
        asked, said = 58 * math.exp(0.37 * one), 89 * math.exp(0.41 * linked)
        found.append((45 + round(asked), min(500, max(8, round(said)))))
    return found


def plain(backend: TransformersBackend, prompts: Sequence[Prompt], most: int) -> dict[str, str]:
    """Return completions by id as scripts make them: batches in order, to their last row's end."""
    import torch

    said = {}
    for start in range(0, len(prompts), backend.rows):
        batch = prompts[start : start + backend.rows]
        width = max(len(prompt.input_ids) for prompt in batch)
        ids = torch.full((len(batch), width), backend.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
            mask[row, width - len(prompt.input_ids) :] = 1
        with torch.inference_mode():
            made = backend.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False
            )
        for prompt, tokens in zip(batch, made[:, width:].tolist(), strict=True):
            said[prompt.id] = backend.rules.completion(prompt, tokens, most, []).text
    return said


def texts(backend: TransformersBackend, prompts: Sequence[Prompt], most: int) -> dict[str, str]:
    """Return completions by id."""
    groups = backend.generate(prompts, most, [])
    return {item.id: item.text for group in groups for item in group}


def in_order(backend: TransformersBackend, prompts: Sequence[Prompt], most: int) -> dict[str, str]:
    """Return completions by id, of batches in the order of the prompts."""
    said = {}
    for start in range(0, len(prompts), backend.rows):
        said |= texts(backend, prompts[start : start + backend.rows], most)
    return said


def batches(options: argparse.Namespace) -> None:
    """Decode prompts in batches of different make."""
    import torch

    from tlora.generation import Prompt, transformers
    from tlora.tasks import arithmetic
    from tlora.tasks.prompts import encode_prompt, render

    # A second thread made it five times slower on a machine with other work to do.
    torch.set_num_threads(1)
    small = options.small
    backend = counting(64 if small else 384, 1 if small else 4)
    backend.rows = 4 if small else backend.rows
    rng = random.Random(0)
    sizes = lengths(16 if small else 96)
    # The last token is how many follow, above the end's own number.
    end = min(backend.rules.ends)
    prompts = [
        Prompt(str(at), (*rng.choices(range(3, 1024), k=asked - 1), end + said))
        for at, (asked, said) in enumerate(sizes)
    ]
    kinds: dict[str, Callable[..., dict[str, str]]] = {
        "ours": texts,
        "in order": in_order,
        "plain": plain,
    }
    said: dict[str, dict[str, str]] = {}

    def run(kind: str) -> Callable[[], None]:
        return lambda: said.__setitem__(kind, kinds[kind](backend, prompts, 512))

    times = measuring.alternating({kind: run(kind) for kind in kinds}, 1 if small else 2)
    assert said["ours"] == said["in order"] == said["plain"]
    tokens = sum(said for _, said in sizes)
    speed = {kind: tokens / taken for kind, taken in times.items()}

    # Equal texts of a model whose logits are close to each other.
    real = transformers.load(
        {"dtype": "float32", "architecture": "causal"}, None, {"model": str(TINY)}
    )
    from tlora.base_model import load_tokenizer

    tokenizer = load_tokenizer({"model": str(TINY)})
    records = arithmetic.load(arithmetic.Data(), "test", None)
    template = "### Instruction:\n{instruction}\n\n### Response:"
    asked = []
    for at in range(8 if small else 100):
        shots = "".join(record["instruction"] + "\n" for record in rng.choices(records, k=at % 5))
        text = shots + render(template, records[at])
        asked.append(Prompt(str(at), tuple(encode_prompt(tokenizer, text))))
    one, other = texts(real, asked, 48), plain(real, asked, 48)
    equal = sum(one[key] == other[key] for key in one)
    versions = measuring.machine("torch", "transformers")
    what = (
        f"transformers backend, {len(prompts)} prompts with lengths like GSM8K's, "
        f"{backend.model.num_parameters() / 1e6:.0f}M parameters, "
        f"at most {backend.rows} rows, 1 thread"
    )
    for kind, told in (
        ("in order", "our batches in the data's order"),
        ("plain", "batches of `generate` in the data's order"),
    ):
        note = f"; {equal} of {len(asked)} texts of the tiny model equal" if kind == "plain" else ""
        measuring.row(
            f"{what}; theirs: {told}{note}",
            f"{speed['ours']:,.0f} tokens/s",
            f"{speed[kind]:,.0f} tokens/s",
            faster(times["ours"], times[kind]),
            versions,
        )


# --- server --------------------------------------------------------------------------------------

BENCHMARKS = ("arithmetic", "choice")
IDENTITY = {"dtype": "float32", "architecture": "causal"}
THREADED = {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive"}
"""Environment of the server: as many threads as the engines of jobs have together."""
PLAIN = ("--disable-log-stats", "--disable-uvicorn-access-log", "--no-enable-prefix-caching")
"""What the engine of a job goes without, too."""


def adapters(folder: Path, count: int) -> list[Path]:
    """Write random adapters of the tiny model as exports and return them."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tlora.artefact import sha256_tree, write_json
    from tlora.base_model import load_model

    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load_model(IDENTITY, {"model": str(TINY)}), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.01)
        out = folder / f"adapter{seed}"
        model.save_pretrained(out / "weights")
        files = sha256_tree(out / "weights")
        write_json(out / "export.json", {"form": "adapter", "files": files})
        made.append(out / "export.json")
    return made


def jobs(exports: Sequence[Path], folder: Path, limit: int, url: str | None) -> list[list[str]]:
    """Return the arguments of the command line of every job."""
    import yaml

    made = []
    for benchmark in BENCHMARKS:
        path = ROOT / f"config/benchmarks/{benchmark}.yaml"
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
        task = yaml.safe_load((ROOT / f"config/tasks/{benchmark}.yaml").read_text(encoding="utf-8"))
        keys = ("source", "data", "max_new_tokens")
        for export in exports:
            out = folder / f"{export.parent.name}-{benchmark}"
            spec = {
                "model": IDENTITY,
                "export": export.parent.name,
                "prompt": task["prompt"],
                "benchmark": {key: asked[key] for key in keys} | {"stop": [], "limit": limit},
                "backend": "vllm",
            }
            place = {"model": str(TINY), "revision": None, "data_root": None, "server": url}
            place |= {"threads": 1, "work": f"{out}.work"}
            made.append(
                [
                    *("generate", "--spec", json.dumps(spec), "--place", json.dumps(place)),
                    *("--out", str(out), "--log", f"{out}.log", "--input", f"export={export}"),
                ]
            )
    return made


def work_off(python: Path, waiting: list[list[str]], at_once: int, env: dict[str, str]) -> None:
    """Run jobs, so many at once, as the workflow does."""
    running: list[tuple[subprocess.Popen, list[str]]] = []
    waiting = list(waiting)
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            command = [str(python), "-m", "tlora.cli", *job]
            log = subprocess.DEVNULL
            running.append((subprocess.Popen(command, env=env, stdout=log, stderr=log), job))
        for process, job in list(running):
            if process.poll() is not None:
                running.remove((process, job))
                if process.returncode:
                    log = Path(job[job.index("--log") + 1]).read_text(encoding="utf-8")
                    raise RuntimeError(f"{' '.join(job)[:300]}\n{log[-3000:]}")
        time.sleep(0.02)


def server(options: argparse.Namespace) -> None:
    """Share an engine among jobs, or start one for each."""
    from tlora import forks

    python = ROOT / ".venv-vllm/bin/python"
    stamp = python.parents[1] / ".stamp"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8").strip() != str(ROOT):
        print("server: no vLLM here: expected what `make vllm-test` installs", file=sys.stderr)
        return
    runs, limit, alone = (2, 8, 1) if options.small else (8, options.prompts, 8)
    # Not the PATH of a shell: vLLM looks for its own programs there.
    settings = SETTINGS | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    env = os.environ | settings
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exports = adapters(folder, runs)
        for kind in ("shared", "own"):
            (folder / kind).mkdir()
        own = jobs(exports, folder / "own", limit, None)
        picked = own[:alone] + own[runs : runs + alone]
        seconds_own = measuring.seconds(lambda: work_off(python, picked, THREADS, env))

        # Jobs of one machine are forks where the workflow runs them; whatever they are forked from
        # has loaded its libraries for the job that trained the first adapter.
        forks.begin()
        (earlier,) = jobs(exports[:1], folder / "earlier", 1, None)[:1]
        backends = ('"backend": "vllm"', '"backend": "transformers"')
        earlier = [word.replace(*backends) for word in earlier]
        work_off(Path(sys.executable), [earlier], 1, os.environ | settings)

        def shared() -> None:
            log, lora = folder / "server.log", ("--max-lora-rank", 8, "--max-loras", 4)
            with vllm_server(python, TINY, log, env | THREADED, *PLAIN, *lora) as url:
                at = time.perf_counter()
                todo = jobs(exports, folder / "shared", limit, url)
                work_off(Path(sys.executable), todo, THREADS, os.environ | settings)
                phases["jobs"] = time.perf_counter() - at

        phases: dict[str, float] = {}
        seconds_shared = measuring.seconds(shared)
        equal = sum(
            (folder / "own" / path.name / "generations.jsonl").read_bytes()
            == (path / "generations.jsonl").read_bytes()
            for path in sorted((folder / "shared").iterdir())
            if path.is_dir() and (folder / "own" / path.name).is_dir()
        )
    whole = seconds_own * len(own) / len(picked)
    measuring.row(
        f"vLLM: {runs} adapters x {len(BENCHMARKS)} benchmarks x {limit} prompts on the tiny model "
        f"(start and end of the server included: {seconds_shared - phases['jobs']:.0f} s; "
        f"{equal} of {len(picked)} files equal); theirs: an engine for each job, "
        f"{len(picked)} of {len(own)} jobs timed, 1 thread each; both: {THREADS} jobs at once; the "
        f"server has {THREADS} threads",
        f"{seconds_shared:.0f} s",
        f"{whole:.0f} s",
        faster(seconds_shared, whole),
        measuring.machine("torch", "transformers") + ", vLLM for the CPU",
    )


# --- evalplus ------------------------------------------------------------------------------------

SCORE = """
import sys
from pathlib import Path
from tlora.benchmarks import Context
from tlora.stages.score import score_file
made = score_file("evalplus", Path(sys.argv[1]), Path(sys.argv[2]), {"sanitize": False},
                  Context(place={"workers": int(sys.argv[3])}))
print(made["metrics"])
"""
FILES = {"humaneval": "HumanEvalPlus-v0.1.10.jsonl.gz", "mbpp": "MbppPlus-v0.2.0.jsonl.gz"}


def evalplus(options: argparse.Namespace) -> None:
    """Judge reference solutions by EvalPlus' tests."""
    if options.data_root is None:
        print("evalplus: --data-root: expected the folder of code/*.jsonl.gz", file=sys.stderr)
        return
    count = 2 if options.small else options.problems
    for dataset in FILES:
        with tempfile.TemporaryDirectory() as folder:
            _judge(dataset, options.data_root, count, Path(folder))


def _judge(dataset: str, data_root: Path, count: int, folder: Path) -> None:
    from tlora.tasks import evalplus as source

    with gzip.open(data_root / "code" / FILES[dataset], "rt", encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(count), strict=False)]
    (folder / "problems.jsonl").write_text("".join(lines), encoding="utf-8")
    problems = [json.loads(line) for line in lines]
    records = source.load(source.Data(dataset), "test", data_root)[: len(problems)]
    rows = [{**record, "completion": record["response"]} for record in records]
    _write(folder / "generations.jsonl", rows)
    solutions = [
        {
            "task_id": problem["task_id"],
            "solution": problem["prompt"] + problem["canonical_solution"],
        }
        for problem in problems
    ]
    _write(folder / "samples.jsonl", solutions)

    command = [sys.executable, "-c", SCORE, folder / "generations.jsonl", folder / "score.json"]
    ours = measuring.child([*command, THREADS], cwd=ROOT)
    verdicts = json.loads((folder / "score.json").read_text(encoding="utf-8"))
    passed = [sum(item[key] for item in verdicts["items"]) for key in ("correct", "plus_correct")]

    # Its cache is made in the first run; the second has it.
    tool = Path(sys.executable).with_name("evalplus.evaluate")
    command = [tool, "--dataset", dataset, "--samples", folder / "samples.jsonl"]
    command += ["--parallel", THREADS]
    if os.geteuid() == 0 and shutil.which("unshare"):
        command = ["unshare", "--net", *command]
    env = os.environ | {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    env[f"{dataset.upper()}_OVERRIDE_PATH"] = str(folder / "problems.jsonl")
    (folder / "cache/evalplus").mkdir(parents=True)
    results, times = folder / "samples_eval_results.json", []
    for _ in range(2):
        results.unlink(missing_ok=True)
        start = time.time()
        measuring.child([*command], env=env, cwd=folder)
        # It then sleeps for up to 20 seconds more.
        times.append(results.stat().st_mtime - start)
    judged = json.loads(results.read_text(encoding="utf-8"))["eval"]
    keys = {"correct": "base_status", "plus_correct": "plus_status"}
    differ = [
        item["id"]
        for item in verdicts["items"]
        if any(item[key] != (judged[item["id"]][0][name] == "pass") for key, name in keys.items())
    ]
    measuring.row(
        f"EvalPlus, {dataset}: the first {len(problems)} reference solutions ({passed[0]} pass the "
        f"base, {passed[1]} the plus tests; EvalPlus differs on {', '.join(differ) or 'none'}), "
        f"{THREADS} workers; ours in a sandbox; theirs "
        f"without one (with the expected values kept of a first run: {times[1]:.1f} s)",
        f"{ours.seconds:.1f} s",
        f"{times[0]:.1f} s",
        faster(ours.seconds, times[0]),
        measuring.machine("evalplus"),
    )


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "server": server,
    "batches": batches,
    "scoring": scoring,
    "evalplus": evalplus,
}
QUICK = ("batches", "scoring")
"""What `--small` runs without names: a server starts, and EvalPlus ends, in more time."""

if __name__ == "__main__":
    main()
