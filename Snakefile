# The workflow itself lies where the Snakemake workflow catalog expects it. An `include` keeps the
# default target of the including file, so it is named here.
include: "workflow/Snakefile"


workflow.default_target = "all"
