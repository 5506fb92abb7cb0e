PREPARE = pattern("prepare", "model", "task")


rule prepare:
    input:
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
