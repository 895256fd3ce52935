rule embed:
    input:
        manifest=of("manifest"),
        model=of("stage1", "model.safetensors"),
    output:
        f"{RESULTS}/discovery{{v}}/embeddings/{{shard}}.h5",
    log:
        f"{RESULTS}/logs/embed{{v}}/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/embed{{v}}/{{shard}}.tsv"
    cache: bool(CACHE)
    threads: COMPUTE.threads
    resources:
        **asks(6000, 60, 600),
        gpu=min(1, COMPUTE.gpus),
    params:
        settings=decides("embeddings"),
        version=settings.RESULT_VERSION["embeddings"],
        shard=number_of,
        root=lambda _: RUN.data.root,
        photos=photos,
    shell:
        "orl embed --settings {params.settings:q} --root {ROOT:q} --manifest {input.manifest:q} "
        "--model {input.model:q} --output {output:q} --shard {params.shard} --threads {threads} --gpus {resources.gpu} "
        "2>&1 | tee {log:q}"


rule propose:
    input:
        manifest=of("manifest"),
    output:
        f"{RESULTS}/discovery{{v}}/proposals/{{shard}}.h5",
    log:
        f"{RESULTS}/logs/propose{{v}}/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/propose{{v}}/{{shard}}.tsv"
    cache: bool(CACHE)
    threads: COMPUTE.threads
    resources:
        **asks(2000, 60, 600),
    params:
        settings=decides("proposals"),
        version=settings.RESULT_VERSION["proposals"],
        shard=number_of,
        root=lambda _: RUN.data.root,
        photos=photos,
    shell:
        "orl propose --settings {params.settings:q} --root {ROOT:q} --manifest {input.manifest:q} "
        "--output {output:q} --shard {params.shard} --threads {threads} 2>&1 | tee {log:q}"


rule neighbors:
    input:
        manifest=of("manifest"),
        embeddings=of("embeddings"),
    output:
        f"{RESULTS}/discovery{{v}}/neighbors.h5",
    log:
        f"{RESULTS}/logs/neighbors{{v}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/neighbors{{v}}.tsv"
    threads: COMPUTE.threads
    resources:
        **asks(8000, 60),
        gpu=min(1, COMPUTE.gpus),
    params:
        settings=decides("neighbors"),
        version=settings.RESULT_VERSION["neighbors"],
    shell:
        "orl neighbors --settings {params.settings:q} --manifest {input.manifest:q} "
        "--embeddings {input.embeddings:q} --output {output:q} --threads {threads} --gpus {resources.gpu} "
        "2>&1 | tee {log:q}"


rule rois:
    input:
        manifest=of("manifest"),
        proposals=of("proposals"),
        backbone=of("stage1", "backbone.safetensors"),
    output:
        f"{RESULTS}/discovery{{v}}/rois/{{shard}}.h5",
    log:
        f"{RESULTS}/logs/rois{{v}}/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/rois{{v}}/{{shard}}.tsv"
    cache: bool(CACHE)
    threads: COMPUTE.threads
    resources:
        **asks(6000, 120, 600, disk=22_000 // COMPUTE.shards.rois),
        gpu=min(1, COMPUTE.gpus),
    params:
        settings=decides("rois"),
        version=settings.RESULT_VERSION["rois"],
        shard=number_of,
        root=lambda _: RUN.data.root,
        photos=photos,
    shell:
        "orl rois --settings {params.settings:q} --root {ROOT:q} --manifest {input.manifest:q} "
        "--proposals {input.proposals:q} --backbone {input.backbone:q} --output {output:q} --shard {params.shard} "
        "--threads {threads} --gpus {resources.gpu} 2>&1 | tee {log:q}"


rule correspond:
    input:
        manifest=of("manifest"),
        neighbors=of("neighbors"),
        proposals=of("proposals"),
        rois=lambda wildcards: shards("rois", wildcards.v),
    output:
        f"{RESULTS}/discovery{{v}}/correspondences/{{shard}}.h5",
    log:
        f"{RESULTS}/logs/correspond{{v}}/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/correspond{{v}}/{{shard}}.tsv"
    threads: COMPUTE.threads
    resources:
        **asks(2000, 60, 500),
    params:
        settings=decides("correspondences"),
        version=settings.RESULT_VERSION["correspondences"],
        shard=number_of,
    shell:
        "orl correspond --settings {params.settings:q} --manifest {input.manifest:q} --neighbors {input.neighbors:q} "
        "--proposals {input.proposals:q} --rois {input.rois:q} --output {output:q} --shard {params.shard} "
        "--threads {threads} 2>&1 | tee {log:q}"


rule merge:
    input:
        lambda wildcards: shards(wildcards.merged, wildcards.v),
    output:
        f"{RESULTS}/discovery{{v}}/{{merged}}.h5",
    log:
        f"{RESULTS}/logs/merge{{v}}/{{merged}}.log",
    resources:
        **asks(2000, 30),
    shell:
        "orl merge --output {output:q} {input:q} 2>&1 | tee {log:q}"


if CACHE:  # beside which Snakemake refuses benchmarks
    for shared in (rules.stage1, rules.embed, rules.propose, rules.rois):
        shared.rule._benchmark = None
