# ORL: photos in, pre-trained backbones and their scores out. See README.md and config/README.md.
if (
    not workflow.config_settings.configfiles
):  # a config of your own replaces the shipped one, key by key nothing is mixed

    configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/discovery.smk"
include: "workflow/rules/downstream.smk"
include: "workflow/rules/plan.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        f"{RESULTS}/report/index.html",
        trained("backbone.safetensors"),
        scores(),
        measured("proposals_recall"),
        measured("pair_precision"),
        exports(),
        trained("README.md"),
