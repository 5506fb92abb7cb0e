# What jobs read of the Hugging Face hub, fetched on the machine that snakemake runs on: one job a
# repository and its splits, none for local and embedded data. Compute nodes may have no way out.
if workflow.remote_exec:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

DOWNLOAD = pattern("download", "kind", "repository")


rule download:
    input:
        code=code("download"),
    output:
        card=f"{DOWNLOAD}/download.json",
    log:
        f"logs/{DOWNLOAD}.log",
    localrule: True
    conda:
        "../../envs/core.yaml"
    params:
        spec=spec("download"),
        place=place("download"),
        inputs=inputs,
        out=folder,
    message:
        "download {wildcards.repository}"
    shell:
        f"tlora download {ARGUMENTS}"
