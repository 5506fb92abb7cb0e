# The recipe of the shipped base model. It declares no output, so it is in no other target's DAG:
# `snakemake tiny_base` runs it whenever it is asked for, and nothing else does.


rule tiny_base:
    params:
        spec="{}",
    log:
        "results/logs/tiny_base.log",
    threads: 1
    conda:
        "../../envs/train.yaml"
    shell:
        "tlora tiny_base --spec {params.spec:q} --out workflow/resources/tiny --log {log:q}"
