# The recipe of the shipped base model. It declares no output, so it is in no other target's DAG:
# `snakemake tiny_base` runs it whenever it is asked for, and nothing else does.


rule tiny_base:
    log:
        "results/logs/tiny_base.log",
    conda:
        "../../envs/train.yaml"
    threads: 1
    params:
        spec="{}",
    shell:
        "tlora tiny_base --spec {params.spec:q} --out workflow/resources/tiny --log {log:q}"
