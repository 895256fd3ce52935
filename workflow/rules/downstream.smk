rule voc07_svm:
    input:
        backbone=evaluated,
        photos=ROOT if SCENES else [],
        labels=lambda wildcards: label_files(wildcards.v),
    output:
        f"{RESULTS}/downstream/{{model}}{{v}}/voc07_svm.json",
    log:
        f"{RESULTS}/logs/voc07_svm.{{model}}{{v}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/voc07_svm.{{model}}{{v}}.tsv"
    threads: COMPUTE.threads
    resources:
        gpu=min(1, COMPUTE.gpus),
    params:
        settings=decides("voc07_svm"),
        version=settings.RESULT_VERSION["voc07_svm"],
        labels=lambda wildcards: labels(wildcards.v),
    shell:
        "orl evaluate voc07_svm --settings {params.settings:q} --backbone {input.backbone:q} "
        "--name {wildcards.model}{wildcards.v} --labels {params.labels:q} --output {output:q} --threads {threads} "
        "--gpus {resources.gpu} 2>&1 | tee {log:q}"


rule proposals_recall:
    input:
        manifest=of("manifest"),
        proposals=of("proposals"),
        annotations=ROOT if SCENES else objects(),
    output:
        f"{RESULTS}/downstream/proposals{{v}}.json",
    log:
        f"{RESULTS}/logs/proposals_recall{{v}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/proposals_recall{{v}}.tsv"
    params:
        settings=decides("proposals_recall"),
        version=settings.RESULT_VERSION["proposals_recall"],
        annotations=lambda _: objects(),
    shell:
        "orl evaluate proposals --settings {params.settings:q} --manifest {input.manifest:q} "
        "--proposals {input.proposals:q} --annotations {params.annotations:q} --name proposals{wildcards.v} "
        "--output {output:q} 2>&1 | tee {log:q}"


rule pair_precision:
    input:
        manifest=of("manifest"),
        proposals=of("proposals"),
        correspondences=of("correspondences"),
        annotations=ROOT if SCENES else objects(),
    output:
        f"{RESULTS}/downstream/pairs{{v}}.json",
    log:
        f"{RESULTS}/logs/pair_precision{{v}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/pair_precision{{v}}.tsv"
    params:
        settings=decides("pair_precision"),
        version=settings.RESULT_VERSION["pair_precision"],
        annotations=lambda _: objects(),
    shell:
        "orl evaluate pairs --settings {params.settings:q} --manifest {input.manifest:q} "
        "--proposals {input.proposals:q} --correspondences {input.correspondences:q} "
        "--annotations {params.annotations:q} --name pairs{wildcards.v} --output {output:q} 2>&1 | tee {log:q}"
