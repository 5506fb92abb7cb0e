PREPARE = pattern("prepare", "model", "task")


rule prepare:
    input:
        after=ancient(after("prepare")),
        code=code("prepare"),
    output:
        card=f"{PREPARE}/card.json",
        train=f"{PREPARE}/train.parquet",
        validation=f"{PREPARE}/validation.parquet",
    log:
        f"logs/{PREPARE}.log",
    conda:
        "../../envs/core.yaml"
    params:
        spec=spec("prepare"),
        place=place("prepare"),
        inputs=inputs,
        out=folder,
    message:
        "prepare {wildcards.task} for {wildcards.model}"
    shell:
        f"tlora prepare {ARGUMENTS}"


OVERLAP = pattern("overlap", "task", "benchmark")


rule overlap:
    input:
        after=ancient(after("overlap")),
        code=code("overlap"),
    output:
        f"{OVERLAP}/overlap.json",
    log:
        f"logs/{OVERLAP}.log",
    conda:
        "../../envs/core.yaml"
    params:
        spec=spec("overlap"),
        place=place("overlap"),
        inputs=inputs,
        out=folder,
    message:
        "overlap of {wildcards.benchmark} with {wildcards.task}"
    shell:
        f"tlora overlap {ARGUMENTS}"
