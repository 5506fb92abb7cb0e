CALIBRATE = pattern("calibrate", "model", "task", "statistic")


rule calibrate:
    input:
        prepare=artefact("calibrate", "prepare"),
        code=code("calibrate"),
    output:
        card=f"{CALIBRATE}/calibration.json",
        tensors=f"{CALIBRATE}/calibration.safetensors",
    log:
        f"logs/{CALIBRATE}.log",
    cache: CACHED
    conda:
        "../../envs/train.yaml"
    resources:
        gpu=gpus("calibrate"),
    params:
        spec=spec("calibrate"),
        place=place("calibrate"),
        inputs=inputs,
        out=folder,
    message:
        "calibrate {wildcards.statistic} of {wildcards.model} on {wildcards.task}"
    shell:
        f"tlora calibrate {ARGUMENTS}"


ALLOCATE = pattern("allocate", "model", "task", "method")


rule allocate:
    input:
        calibrate=artefact("allocate", "calibrate"),
        code=code("allocate"),
    output:
        allocation=f"{ALLOCATE}/allocation.json",
    log:
        f"logs/{ALLOCATE}.log",
    cache: CACHED
    conda:
        "../../envs/core.yaml"
    params:
        spec=spec("allocate"),
        place=place("allocate"),
        inputs=inputs,
        out=folder,
    message:
        "allocate ranks for {wildcards.method} on {wildcards.task}"
    shell:
        f"tlora allocate {ARGUMENTS}"


INITIALIZE = pattern("initialize", "model", "task", "method")


rule initialize:
    input:
        allocate=artefact("initialize", "allocate"),
        covariance=artefact("initialize", "covariance"),
        gradient=artefact("initialize", "gradient"),
        prepare=artefact("initialize", "prepare"),
        after=ancient(after("initialize")),
        code=code("initialize"),
    output:
        card=f"{INITIALIZE}/adapter_init.json",
        config=f"{INITIALIZE}/adapter_config.json",
        weights=f"{INITIALIZE}/adapter_model.safetensors",
    log:
        f"logs/{INITIALIZE}.log",
    cache: CACHED
    conda:
        "../../envs/train.yaml"
    resources:
        gpu=gpus("initialize"),
    params:
        spec=spec("initialize"),
        place=place("initialize"),
        inputs=inputs,
        out=folder,
    message:
        "initialize {wildcards.method} on {wildcards.task}"
    shell:
        f"tlora initialize {ARGUMENTS}"
