TRAIN = pattern("train", "model", "task", "method")


rule train:
    input:
        prepare=artefact("train", "prepare"),
        initialize=artefact("train", "initialize"),
        code=code("train"),
    output:
        card=f"{TRAIN}/train.json",
        history=f"{TRAIN}/log.jsonl",
        probe=f"{TRAIN}/probe.safetensors",
        weights=directory(f"{TRAIN}/weights"),
    log:
        f"logs/{TRAIN}.log",
    conda:
        "../../envs/train.yaml"
    resources:
        gpu=gpus("train"),
    params:
        spec=spec("train"),
        place=place("train"),
        inputs=inputs,
        out=folder,
    message:
        "train {wildcards.model} with {wildcards.method} on {wildcards.task}"
    shell:
        f"tlora train {ARGUMENTS}"


EXPORT = pattern("export", "model", "task", "method")


rule export:
    input:
        train=artefact("export", "train"),
        initialize=artefact("export", "initialize"),
        code=code("export"),
    output:
        card=f"{EXPORT}/export.json",
        weights=directory(f"{EXPORT}/weights"),
    log:
        f"logs/{EXPORT}.log",
    conda:
        "../../envs/core.yaml"
    params:
        spec=spec("export"),
        place=place("export"),
        inputs=inputs,
        out=folder,
    message:
        "export {wildcards.method} on {wildcards.task}"
    shell:
        f"tlora export {ARGUMENTS}"


CHECK = pattern("check", "model", "task", "method")


rule check:
    input:
        prepare=artefact("check", "prepare"),
        allocate=artefact("check", "allocate"),
        initialize=artefact("check", "initialize"),
        train=artefact("check", "train"),
        export=artefact("check", "export"),
        code=code("check"),
    output:
        verdict=f"{CHECK}/check.json",
        figures=f"{CHECK}/figures.json",
    log:
        f"logs/{CHECK}.log",
    conda:
        "../../envs/train.yaml"
    resources:
        gpu=gpus("check"),
    params:
        spec=spec("check"),
        place=place("check"),
        inputs=inputs,
        out=folder,
    message:
        "check {wildcards.method} on {wildcards.task}"
    shell:
        f"tlora check {ARGUMENTS}"
