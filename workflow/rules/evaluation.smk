GENERATE = pattern("generate", "model", "task", "method", "benchmark")


rule generate:
    input:
        export=artefact("generate", "export"),
        prepare=artefact("generate", "prepare"),
        after=ancient(after("generate")),
        code=code("generate"),
    output:
        generations=f"{GENERATE}/generations.jsonl",
        cost=f"{GENERATE}/generate.json",
    log:
        f"logs/{GENERATE}.log",
    conda:
        "../../envs/train.yaml"
    resources:
        gpu=gpus("generate"),
    params:
        spec=spec("generate"),
        place=place("generate"),
        inputs=inputs,
        out=folder,
    message:
        "generate {wildcards.benchmark} with {wildcards.method}"
    shell:
        f"tlora generate {ARGUMENTS}"


SCORE = pattern("score", "model", "task", "method", "benchmark")


rule score:
    input:
        generate=artefact("score", "generate"),
        check=artefact("score", "check"),
        code=code("score"),
    output:
        score=report(
            f"{SCORE}/score.json",
            category="{task}",
            subcategory="{method}",
            labels={"score": "{benchmark}", "model": "{model}", "id": "{id}"},
            caption="../report/score.rst",
        ),
    log:
        f"logs/{SCORE}.log",
    conda:
        "../../envs/code.yaml"
    params:
        spec=spec("score"),
        place=place("score"),
        inputs=inputs,
        out=folder,
    message:
        "score {wildcards.benchmark} of {wildcards.method}"
    shell:
        f"tlora score {ARGUMENTS}"
