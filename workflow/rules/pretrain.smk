# What both trainings do alike.
LIMITS = {
    "checkpoint_minutes": COMPUTE.checkpoint_minutes,
    "log_every": COMPUTE.log_every,
    "compile_step": int(COMPUTE.compile),
    "deterministic": int(COMPUTE.deterministic),
}
# On several nodes, a job that srun divides: the plugin for SLURM then starts the shell once, on the first of them.
NODES = {"nodes": COMPUTE.nodes}
if COMPUTE.nodes > 1:
    NODES |= {"mpi": "srun", "tasks": COMPUTE.nodes, "tasks_per_gpu": 0}
OPTIONS = (
    '--output "$(dirname {output.backbone:q})" --threads {threads} '
    "--gpus {resources.gpu} --nodes {resources.nodes} --compile {resources.compile_step} --deterministic {resources.deterministic} "
    "--checkpoint-minutes {resources.checkpoint_minutes} --log-every {resources.log_every} 2>&1 | tee {log:q}"
)


# The folder models/MODEL/state, which is not declared, holds the checkpoints: Snakemake deletes a failed job's outputs.
rule random:
    output:
        backbone=f"{RESULTS}/models/random{{v}}/backbone.safetensors",
        model=f"{RESULTS}/models/random{{v}}/model.safetensors",
    log:
        f"{RESULTS}/logs/random{{v}}.log",
    resources:
        **asks(2000, 10),
    params:
        settings=decides("random"),
        version=settings.RESULT_VERSION["random"],
    shell:
        'orl pretrain --stage random --settings {params.settings:q} --output "$(dirname {output.backbone:q})" 2>&1 | tee {log:q}'


rule supervised:
    input:
        lambda wildcards: RUNS[wildcards.v].supervised,
    output:
        backbone=f"{RESULTS}/models/supervised{{v}}/backbone.safetensors",
        model=f"{RESULTS}/models/supervised{{v}}/model.safetensors",
        metrics=f"{RESULTS}/models/supervised{{v}}/metrics.csv",
    log:
        f"{RESULTS}/logs/supervised{{v}}.log",
    resources:
        **asks(2000, 10),
    params:
        settings=decides("supervised"),
        version=settings.RESULT_VERSION["supervised"],
    shell:
        'orl pretrain --stage supervised --settings {params.settings:q} --output "$(dirname {output.backbone:q})" '
        "2>&1 | tee {log:q}"


rule stage1:
    input:
        manifest=lambda wildcards: (
            [] if given(wildcards.v) else of("manifest")(wildcards)
        ),
        weights=lambda wildcards: given(wildcards.v) or [],
    output:
        backbone=f"{RESULTS}/models/stage1{{v}}/backbone.safetensors",
        model=f"{RESULTS}/models/stage1{{v}}/model.safetensors",
        metrics=shown(
            f"{RESULTS}/models/stage1{{v}}/metrics.csv",
            "training",
            "Trainings",
            model="stage1{v}",
        ),
    log:
        f"{RESULTS}/logs/stage1{{v}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/stage1{{v}}.tsv"
    cache: bool(CACHE)
    threads: COMPUTE.threads * max(1, COMPUTE.gpus)
    resources:
        **asks(4000 * max(1, COMPUTE.gpus), 24 * 60, 600),
        **LIMITS,
        **NODES,
        gpu=lambda wildcards: 0 if given(wildcards.v) else COMPUTE.gpus * COMPUTE.nodes,
    params:
        settings=decides("stage1"),
        version=settings.RESULT_VERSION["stage1"],
        root=lambda wildcards: None if given(wildcards.v) else RUN.data.root,
        photos=photos,
    shell:
        "orl pretrain --stage stage1 --settings {params.settings:q} --root {ROOT:q} --manifest {input.manifest:q} "
        + OPTIONS


rule stage3:
    input:
        manifest=of("manifest"),
        proposals=of("proposals"),
        correspondences=of("correspondences"),
    output:
        backbone=f"{RESULTS}/models/orl{{v}}/backbone.safetensors",
        model=f"{RESULTS}/models/orl{{v}}/model.safetensors",
        metrics=shown(
            f"{RESULTS}/models/orl{{v}}/metrics.csv",
            "training",
            "Trainings",
            model="orl{v}",
        ),
    log:
        f"{RESULTS}/logs/orl{{v}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/orl{{v}}.tsv"
    threads: COMPUTE.threads * max(1, COMPUTE.gpus)
    resources:
        **asks(4000 * max(1, COMPUTE.gpus), 24 * 60, 600),
        **LIMITS,
        **NODES,
        gpu=COMPUTE.gpus * COMPUTE.nodes,
    params:
        settings=decides("stage3"),
        version=settings.RESULT_VERSION["stage3"],
        root=lambda _: ROOT,
    shell:
        "orl pretrain --stage stage3 --settings {params.settings:q} --root {params.root:q} "
        "--manifest {input.manifest:q} --proposals {input.proposals:q} --correspondences {input.correspondences:q} "
        + OPTIONS
