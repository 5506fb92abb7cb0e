GRID = canonical(PLAN.grid())


# What the tables are about. Labels are for people: changing one reruns nothing, and the next
# table that is built shows it.
rule grid:
    localrule: True
    output:
        COMPARISON / "grid.json",
    params:
        spec=spec_id(PLAN.grid()),
        text=lambda wildcards, output: json.dumps(PLAN.labelled_grid(), indent=1),
    run:
        Path(output[0]).write_text(params.text + "\n")


rule compare:
    input:
        grid=COMPARISON / "grid.json",
        scores=[str(unit.main) for unit in PLAN.of("score")],
        runs=[str(unit.main) for unit in PLAN.of("train")],
        code=[relative(path) for path in stage_files("compare", {})],
    output:
        csv=report(
            COMPARISON / "table.csv", category="comparison", caption="../report/table.rst"
        ),
        markdown=COMPARISON / "table.md",
        latex=COMPARISON / "table.tex",
        html=report(
            COMPARISON / "table.html", category="comparison", caption="../report/table.rst"
        ),
        ledger=COMPARISON / "ledger.csv",
        plots=report(
            directory(COMPARISON / "plots"),
            patterns=["{task}/{name}.png"],
            category="{task}",
            subcategory="plots",
            caption="../report/plot.rst",
        ),
    log:
        "logs/compare/" + PLAN.name + ".log",
    params:
        out=folder,
    conda:
        "../../envs/core.yaml"
    message:
        "compare"
    shell:
        "tlora compare --spec '{{}}' --input grid={input.grid:q} --out {params.out:q} --log {log:q}"


rule track:
    input:
        grid=COMPARISON / "grid.json",
        table=COMPARISON / "table.csv",
        code=[relative(path) for path in stage_files("track", {})],
    output:
        COMPARISON / "tracked.json",
    log:
        "logs/track/" + PLAN.name + ".log",
    params:
        out=folder,
    conda:
        "../../envs/core.yaml"
    message:
        "track in MLflow"
    shell:
        "tlora track --spec '{{}}' --input grid={input.grid:q} --out {params.out:q} --log {log:q}"
