# What the tables are about: too long for a command line.
rule grid:
    output:
        COMPARISON / "grid.json",
    log:
        f"logs/grid/{PLAN.name}.log",
    localrule: True
    params:
        spec=spec_id(PLAN.grid()),
    run:
        write_json(Path(output[0]), PLAN.grid())


rule compare:
    input:
        grid=COMPARISON / "grid.json",
        scores=[str(unit.main) for unit in PLAN.of("score")],
        runs=[str(unit.main) for unit in PLAN.of("train")],
        overlaps=[str(unit.main) for unit in PLAN.of("overlap")],
        published=[relative(path) for path in PLAN.published()],
        code=[relative(path) for path in stage_files("compare", {})],
    output:
        csv=report(COMPARISON / "table.csv", category="comparison", caption="../report/table.rst"),
        markdown=COMPARISON / "table.md",
        latex=COMPARISON / "table.tex",
        html=report(COMPARISON / "table.html", category="comparison", caption="../report/table.rst"),
        ledger=COMPARISON / "ledger.csv",
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
