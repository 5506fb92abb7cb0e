"""The command line: argument parsing only."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tlora.devices import claim as claim_gpus
from tlora.distributed import launched, rank
from tlora.errors import UserError
from tlora.estimate import Assumptions
from tlora.forks import VERBS, handed_over, leave
from tlora.lease import held, lease_folder, stamp_of

STAGES = {
    "download": "fetch what a preset reads of the hub: tlora download PRESET",
    "overlap": "look for a benchmark's test records in a task's training data",
    "prepare": "render, tokenise and split a task's records",
    "calibrate": "compute one statistic of the base model",
    "allocate": "turn a sensitivity into ranks and scalings",
    "initialize": "compute an adapter's A0 and B0",
    "train": "fine-tune",
    "export": "write the trained weights in the form that others load",
    "check": "compare what was exported with what was trained",
    "generate": "complete a benchmark's prompts",
    "score": "judge completions: tlora score BENCHMARK generations.jsonl --out score.json",
    "choose": "pick the best of a method's trials",
    "compare": "build a preset's tables and plots",
    "index": "build a preset's page, down to single completions",
    "track": "make MLflow equal to the files",
    "tiny_base": "make the embedded base model",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `tlora VERB`; return the exit status: 0, or 1 with one line on stderr for bad input."""
    options = _parser().parse_args(arguments)
    if arguments is None and options.verb in VERBS:
        status = handed_over()
        if status is not None:
            return status
    log = getattr(options, "log", None)
    _logging(log)
    try:
        options.run(options)
    except UserError as error:
        if log is not None:
            logging.getLogger("tlora").error("%s", error)
        print(f"tlora: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        if log is None:
            raise
        logging.getLogger("tlora").error("%s", traceback.format_exc())
        print(f"tlora: {type(error).__name__}: {error} (see {log})", file=sys.stderr)
        return 2
    return 0


def program() -> int:
    """Be the command line; return only where little was loaded."""
    status = main()
    if "torch" in sys.modules:
        leave(status)
    return status


def _logging(path: str | None) -> None:
    """Log to a file where one is given; otherwise warnings go to stderr."""
    if path is None:
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=path if rank() == 0 else f"{path}.{rank()}",
        # The process that started these has begun the file.
        filemode="a" if launched() else "w",
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.captureWarnings(True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tlora", description="Compare LoRA-type methods.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in STAGES.items():
        stage = verbs.add_parser(verb, help=summary, description=summary)
        if verb == "download":
            stage.add_argument("preset", nargs="*", type=Path, help="a preset's YAML")
            _config_option(stage)
        if verb == "score":
            stage.add_argument("benchmark", nargs="?", help="a benchmark or a scorer")
            stage.add_argument("generations", nargs="?", type=Path, help="JSON lines")
            stage.add_argument(
                "--unsafe-no-sandbox",
                action="store_true",
                help="run generated code with all your rights where no sandbox can be had",
            )
            stage.add_argument("--workers", type=int, help="processes of a file's scoring")
        if verb == "export":
            stage.add_argument("--for", dest="engine", choices=["vllm"], help="a serving engine")
            stage.add_argument("adapter", nargs="?", type=Path, help="an exported adapter")
            stage.add_argument("folder", nargs="?", type=Path, help="a new folder")
        stage.add_argument("--spec", help="what to compute, as JSON")
        stage.add_argument("--input", nargs="*", default=[], metavar="NAME=PATH")
        where = "where the artefact goes"
        stage.add_argument(
            "--out", type=Path, required=verb not in ("download", "export"), help=where
        )
        stage.add_argument("--place", default="{}", help="where and how to compute, as JSON")
        stage.add_argument("--log", help="log file")
        stage.set_defaults(run=_stage)
    for verb, summary, run in (
        ("list", "list models, tasks, methods and benchmarks; with a preset, its cells", _list),
        ("where", "list the paths of a preset's artefacts", _where),
        ("validate", "check a preset without running anything", _validate),
        ("table", "print a preset's comparison table", _table),
    ):
        command = verbs.add_parser(verb, help=summary, description=summary)
        count = "*" if verb == "list" else "+"
        command.add_argument("preset", nargs=count, type=Path, help="a preset's YAML")
        _config_option(command)
        if verb == "where":
            command.add_argument("--stage", help="only this stage")
        command.set_defaults(run=run)
    show = verbs.add_parser("show", help="print a cell's effective values and their origin")
    show.add_argument("preset", type=Path, help="a preset's YAML")
    show.add_argument("task")
    show.add_argument("method")
    show.add_argument("--model", help="where the preset has several")
    _config_option(show)
    show.set_defaults(run=_show)
    summary = "count the parameters that methods train; no weights are loaded"
    params = verbs.add_parser("params", help=summary, description=summary)
    params.add_argument("model", help="a file of config/models")
    params.add_argument("method", nargs="+", help="files of config/methods")
    params.add_argument("--task", help="take rank and targets from a file of config/tasks")
    params.add_argument("--rank", type=int, help="default: the task's, else 8")
    params.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="default: the task's, else all-linear"
    )
    ranks = "ranks of a run: its allocation.json, or an adapter's folder"
    params.add_argument("--allocation", type=Path, help=ranks)
    params.set_defaults(run=_params)
    summary = "estimate what a preset costs: jobs, hours, disk and what is fetched, by stage"
    cost = verbs.add_parser("plan", help=summary, description=summary)
    cost.add_argument("preset", nargs="+", type=Path, help="a preset's YAML")
    _config_option(cost)
    for one in dataclasses.fields(Assumptions):
        name, kind = one.name.replace("_", "-"), int if one.type == "int" else float
        text = f"{one.metadata['text']} (%(default)s)"
        cost.add_argument(f"--{name}", type=kind, default=one.default, metavar="N", help=text)
    cost.set_defaults(run=_estimate)
    summary = "check this machine; with a preset, also whether what it reads is here"
    doctor = verbs.add_parser("doctor", help=summary, description=summary)
    doctor.add_argument("preset", nargs="*", type=Path, help="a preset's YAML")
    _config_option(doctor)
    doctor.set_defaults(run=_doctor)
    summary = "write the files of a new method"
    new = verbs.add_parser("new", help=summary, description=summary)
    new.add_argument("kind", choices=["method"])
    new.add_argument("name", help="lower-case letters, digits and _")
    new.add_argument("--extends", metavar="METHOD", help="only a variant of this method's options")
    new.set_defaults(run=_new)
    return parser


def _config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", nargs="*", default=[], metavar="KEY=VALUE", help="as snakemake's --config"
    )


def _stage(options: argparse.Namespace) -> None:
    if options.verb == "download" and options.preset:
        _download(options)
        return
    if options.verb == "score" and options.benchmark is not None:
        _score_file(options)
        return
    if options.verb == "export" and (options.engine or options.adapter):
        _export_for(options)
        return
    for option in ("spec", "out"):
        if getattr(options, option) is None:
            expected = "a spec as JSON" if option == "spec" else "a folder"
            raise UserError(f"{options.verb}: --{option}: expected {expected}")
    spec = _json("--spec", options.spec)
    place = _json("--place", options.place)
    inputs = {}
    for pair in options.input:
        name, _, path = pair.partition("=")
        if not Path(path).exists():
            raise UserError(f"--input: {pair!r}: expected NAME=PATH of a file that exists")
        inputs[name] = Path(path)
    place["log"] = options.log
    stamp = place["stamp"] = stamp_of(options.verb, spec, inputs)
    options.out.mkdir(parents=True, exist_ok=True)
    stage = importlib.import_module(f"tlora.stages.{options.verb}")
    run = functools.partial(getattr(stage, options.verb), spec, inputs, options.out, place)
    if options.verb == "tiny_base" or (launched() and rank() > 0):
        run()
        return
    with held(lease_folder(options.verb, options.out)) as claim:
        if claim.finished_meanwhile(options.out, lambda: stamp):
            logging.getLogger("tlora").info("another job made it meanwhile: nothing to do")
            return
        claim_gpus(options.verb, place)
        run()
        claim.finish(options.out, stamp)


def _json(option: str, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{option}: {text[:60]!r}: expected JSON: {error}") from error


def _download(options: argparse.Namespace) -> None:
    """Fetch all that a preset reads, into the cache of the hub; jobs then run offline."""
    from tlora.stages.download import download

    units = _plan(options).of("download")
    for unit in units:
        if not unit.main.is_file():
            unit.folder.mkdir(parents=True, exist_ok=True)
            download(unit.spec, {}, unit.folder, {})
        content = json.loads(unit.main.read_text(encoding="utf-8"))
        for item in content["items"]:
            name = item.get("repo") or item.get("url") or item["data"]
            print(f"{item['kind']}\t{name}\t{item.get('bytes', 0):,} bytes")
    if not units:
        print("nothing to fetch: everything is local or embedded")


def _score_file(options: argparse.Namespace) -> None:
    """Score any file of completions by a benchmark of config/, or by a scorer."""
    from tlora.benchmarks import Context, names
    from tlora.stages.score import score_file

    if options.generations is None:
        raise UserError("score: generations: expected a file of JSON lines")
    implementation, scorer_options = options.benchmark, {}
    if implementation not in names():
        from tlora.config import Library

        benchmark, _ = Library(Path("config")).benchmark(implementation, "score")
        implementation, scorer_options = benchmark.implementation, benchmark.options
    place = _json("--place", options.place)
    if options.unsafe_no_sandbox:
        place["unsafe_no_sandbox"] = True
    if options.workers:
        place["workers"] = options.workers
    context = Context(place=place)
    result = score_file(implementation, options.generations, options.out, scorer_options, context)
    shares = result["metric"] != "score"
    metrics = ", ".join(
        f"{name} {value:.2%}" if shares else f"{name} {value:.3f}"
        for name, value in result["metrics"].items()
    )
    print(
        f"{options.benchmark}: {metrics}; n = {result['n']}, "
        f"{result['unextracted']} without an answer; verdicts in {options.out}"
    )


def _export_for(options: argparse.Namespace) -> None:
    """Write an exported adapter for a serving engine."""
    from tlora.serving import for_vllm

    if not (options.engine and options.adapter and options.folder):
        raise UserError("export: expected --for vllm ADAPTER_DIR OUT_DIR")
    rank = for_vllm(options.adapter, options.folder)
    print(f"{options.folder}: an adapter for PEFT and vLLM; vLLM needs max_lora_rank={rank}")
    serve = f"vllm serve BASE --enable-lora --max-lora-rank {rank}"
    print(f"{serve} --lora-modules NAME={options.folder}")


def _params(options: argparse.Namespace) -> None:
    from tlora.config import Library
    from tlora.params import table

    library = Library(Path("config"))
    rank, targets = options.rank, options.target_modules
    if options.task is not None:
        task, _ = library.task(options.task, "params")
        rank, targets = rank or task.rank, targets or task.target_modules
    if rank is not None and rank < 1:
        raise UserError(f"--rank: {rank}: expected at least 1")
    if isinstance(targets, list) and len(targets) == 1 and targets[0] == "all-linear":
        targets = "all-linear"
    print(
        table(
            library,
            options.model,
            options.method,
            rank or 8,
            targets or "all-linear",
            options.allocation,
        )
    )


def _new(options: argparse.Namespace) -> None:
    from tlora.scaffold import new_method

    for path in new_method(options.name, options.extends):
        print(f"wrote {path}")
    print(f"add {options.name} to a preset's methods; tlora validate PRESET checks it")


def _plan(options: argparse.Namespace, files: list[Path] | None = None) -> Any:
    from tlora.config import command_line
    from tlora.plan import Plan

    return Plan(files or options.preset, command_line(options.config))


def _estimate(options: argparse.Namespace) -> None:
    from tlora.estimate import estimate, table

    fields = dataclasses.fields(Assumptions)
    assumptions = Assumptions(**{one.name: getattr(options, one.name) for one in fields})
    print(table(estimate(_plan(options), assumptions)))


def _doctor(options: argparse.Namespace) -> None:
    from tlora.doctor import CHECKS, examine, of_preset, report

    build = functools.partial(_plan, options)
    findings = examine({**CHECKS, "preset": of_preset(build)} if options.preset else CHECKS)
    print(report(findings))
    if any(finding.needed and finding.state == "fail" for finding in findings):
        sys.exit(1)


def _validate(options: argparse.Namespace) -> None:
    plan = _plan(options)
    trials = sum(len(choice.trials) for choice in plan.choices)
    runs = sum(len(one.cells or one.seeds) for one in plan.choices) + len(plan.settled)
    tuned = f"{trials} trials, " if trials else ""
    print(f"{plan.document.path}: {runs} cells, {tuned}{len(plan.units)} units of work: valid")


def _list(options: argparse.Namespace) -> None:
    from tlora.config import KINDS, Library

    if not options.preset:
        library = Library(Path("config"))
        for kind in KINDS:
            print(f"{kind}: {', '.join(library.names(kind))}")
        return
    plan = _plan(options)
    for choice in plan.choices:
        for trial in choice.trials:
            values = ", ".join(f"{key}={value}" for key, value in trial.trial.items())
            print(f"{trial.model}\t{trial.task}\t{trial.row.name}\t{trial.seed}\ttrial {values}")
        for seed in [] if choice.cells else choice.seeds:
            print(f"{choice.model}\t{choice.task}\t{choice.row.name}\t{seed}\tafter its trials")
    for cell in plan.cells:
        seed = "-" if cell.seed is None else cell.seed
        print(f"{cell.model}\t{cell.task}\t{cell.row.name}\t{seed}")


def _where(options: argparse.Namespace) -> None:
    plan = _plan(options)
    for (stage, _), unit in plan.units.items():
        if options.stage in (None, stage):
            state = "made" if unit.main.is_file() else "missing"
            print(f"{unit.main}\t{state}")


def _show(options: argparse.Namespace) -> None:
    from tlora.config import nearest
    from tlora.selection import Setting

    plan = _plan(options, [options.preset])
    model = options.model or next(iter(plan.models))
    rows = {row.name: row for row in plan.rows}
    for kind, name, known in (
        ("model", model, plan.models),
        ("task", options.task, plan.tasks),
        ("method", options.method, rows),
    ):
        if name not in known:
            raise UserError(f"{options.preset}: {kind}: {name!r}: {nearest(name, known)}")
    settings = plan.settings(model, options.task, rows[options.method])
    for choice in plan.choices:
        if (choice.model, choice.task, choice.row.name) == (model, options.task, options.method):
            if choice.cells:
                settings = choice.cells[0].settings
            else:
                at, grid = plan.tuned_grid(choice.row.method)
                place = plan.document.where(at)
                settings |= {
                    key: Setting(f"one of {values}", place) for key, values in grid.items()
                }
    width = max(map(len, settings))
    values = {key: str(setting.value) for key, setting in settings.items()}
    column = max(map(len, values.values()))
    for key, setting in settings.items():
        print(f"{key:{width}}  {values[key]:{column}}  {setting.source}")


def _table(options: argparse.Namespace) -> None:
    from tlora.comparison.tables import text

    plan = _plan(options)
    folder = plan.comparison
    if not (folder / "table.csv").is_file():
        raise UserError(f"{folder}/table.csv: not there yet: run snakemake first")
    print(text(folder))
    if (folder / "index.html").is_file():
        print(f"page    {folder}/index.html")
    print(f"tables  {folder}/table.{{csv,md,tex,html}}, costs.{{csv,md}}")
    print(f"plots   {folder}/plots/")
    if (folder / "report.html").is_file():
        print(f"report  {folder}/report.html")
    print("MLflow  mlflow ui --backend-store-uri sqlite:///results/mlflow.db")


if __name__ == "__main__":
    sys.exit(program())
