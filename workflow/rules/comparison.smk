CHOOSE = pattern("choose", "model", "task", "method")


# The runs with fresh seeds are known when the trials have been compared.
checkpoint choose:
    input:
        trials=lambda wildcards: [
            str(one.main) for one in unit("choose", wildcards).inputs.values()
        ],
        code=code("choose"),
    output:
        chosen=f"{CHOOSE}/chosen.json",
    log:
        f"logs/{CHOOSE}.log",
    localrule: True
    conda:
        "../../envs/core.yaml"
    params:
        spec=spec("choose"),
        inputs=lambda wildcards, input: [
            f"trial{number}={path}" for number, path in enumerate(input.trials)
        ],
        out=folder,
    message:
        "choose for {wildcards.method} on {wildcards.task}"
    shell:
        "tlora choose --spec {params.spec:q} --input {params.inputs:q} --out {params.out:q} "
        "--log {log:q}"


CHOICES = [COMPARISON / "choices.json"] if PLAN.choices else []


# Which trials the preset compares. Snakemake looks for changes only in jobs whose inputs are known
# before any checkpoint, as those of the tables are not.
rule choices:
    input:
        [str(choice.unit.main) for choice in PLAN.choices],
    output:
        COMPARISON / "choices.json",
    log:
        f"logs/choices/{PLAN.name}.log",
    localrule: True
    params:
        chosen=[choice.unit.id for choice in PLAN.choices],
    run:
        write_json(Path(output[0]), {"chosen": params.chosen})


# What the tables are about: too long for a command line.
rule grid:
    input:
        *[confirmed(choice) for choice in PLAN.choices],
        choices=CHOICES,
    output:
        COMPARISON / "grid.json",
    log:
        f"logs/grid/{PLAN.name}.log",
    localrule: True
    params:
        spec=lambda wildcards: spec_id(PLAN.grid()),
    run:
        write_json(Path(output[0]), PLAN.grid())


rule compare:
    input:
        *[confirmed(choice) for choice in PLAN.choices],
        grid=COMPARISON / "grid.json",
        choices=CHOICES,
        scores=[str(one.main) for cell in PLAN.settled for one in cell.scores.values()],
        runs=[str(cell.units["train"].main) for cell in PLAN.settled if not cell.base],
        overlaps=[str(unit.main) for unit in PLAN.of("overlap")],
        published=[relative(path) for path in PLAN.published()],
        code=[relative(path) for path in stage_files("compare", {})],
    output:
        csv=report(COMPARISON / "table.csv", category="comparison", caption="../report/table.rst"),
        markdown=COMPARISON / "table.md",
        latex=COMPARISON / "table.tex",
        methods=[COMPARISON / "methods.md", COMPARISON / "methods.tex"],
        fingerprints=COMPARISON / "fingerprints.json",
        html=report(COMPARISON / "table.html", category="comparison", caption="../report/table.rst"),
        ledger=COMPARISON / "ledger.csv",
        costs=[COMPARISON / "costs.csv", COMPARISON / "costs.md"],
        published=COMPARISON / "published.csv",
        plots=report(
            directory(COMPARISON / "plots"),
            patterns=["{task}/{picture}__{model}__{method}.png"],
            category="{task}",
            subcategory="{method}",
            labels={"picture": "{picture}", "model": "{model}"},
            caption="../report/plot.rst",
        ),
    log:
        f"logs/compare/{PLAN.name}.log",
    conda:
        "../../envs/core.yaml"
    params:
        out=folder,
        place=labels,
        inputs=printed,
    message:
        "compare"
    shell:
        "tlora compare --spec '{{}}' --place {params.place:q} --input grid={input.grid:q} "
        "{params.inputs:q} --out {params.out:q} --log {log:q}"


# The page is built after the tables, whose plots it shows. table.html stands for them, as it holds
# them all: of a folder only the time of change is looked at, which touching files would change.
rule index:
    input:
        grid=COMPARISON / "grid.json",
        tables=COMPARISON / "table.html",
        published=[relative(path) for path in PLAN.published()],
        code=[relative(path) for path in stage_files("index", {})],
        assets=[relative(path) for path in sorted((PACKAGE / "comparison/assets").iterdir())],
    output:
        html=COMPARISON / "index.html",
        files=directory(COMPARISON / "index_files"),
    log:
        f"logs/index/{PLAN.name}.log",
    conda:
        "../../envs/core.yaml"
    params:
        out=folder,
        place=labels,
        inputs=printed,
        pictures=str(COMPARISON / "plots/pictures.json"),
    message:
        "index"
    shell:
        "tlora index --spec '{{}}' --place {params.place:q} --input grid={input.grid:q} "
        "pictures={params.pictures:q} {params.inputs:q} --out {params.out:q} "
        "--log {log:q}"


# A dead MLflow server fails nothing; what it missed is made up for by the next run.
if workflow.is_main_process and outdated(COMPARISON / "tracked.json", tracking_uri({})):
    (COMPARISON / "tracked.json").unlink()


rule track:
    input:
        grid=COMPARISON / "grid.json",
        table=COMPARISON / "table.csv",
        code=[relative(path) for path in stage_files("track", {})],
    output:
        COMPARISON / "tracked.json",
    log:
        f"logs/track/{PLAN.name}.log",
    conda:
        "../../envs/core.yaml"
    params:
        out=folder,
    message:
        "track in MLflow"
    shell:
        "tlora track --spec '{{}}' --input grid={input.grid:q} --out {params.out:q} --log {log:q}"
