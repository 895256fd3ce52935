if SCENES:

    rule scenes:
        output:
            directory(ROOT),
        log:
            f"{RESULTS}/logs/scenes.log",
        benchmark:
            f"{RESULTS}/benchmarks/scenes.tsv"
        threads: COMPUTE.threads
        resources:
            **asks(2000, 60, 300),
        params:
            settings=decides("scenes"),
            version=settings.RESULT_VERSION["scenes"],
        shell:
            "orl scenes --settings {params.settings:q} --output {output:q} --threads {threads} 2>&1 | tee {log:q}"


localrules:
    fetch_coco,
    fetch_voc2007,


# For people to ask for by name. They leave alone what is there, and no other rule depends on them.
rule fetch_coco:
    log:
        f"{RESULTS}/logs/fetch_coco.log",
    params:
        root=lambda _: ROOT,
        parts=lambda _: [
            *RUN.data.folders,
            "annotations",
            *(
                ["image_info_unlabeled"]
                if any(
                    "image_info_un" in file for file in RUN.data.annotations.values()
                )
                else []
            ),
        ],
    shell:
        "orl fetch coco --output {params.root:q} --parts {params.parts:q} 2>&1 | tee {log:q}"


rule fetch_voc2007:
    log:
        f"{RESULTS}/logs/fetch_voc2007.log",
    params:
        root=lambda _: as_argument(str(Path(RUN.downstream.voc07_svm.root).parents[1])),
    shell:
        "orl fetch voc2007 --output {params.root:q} 2>&1 | tee {log:q}"


rule manifest:
    input:
        photos=ROOT if SCENES else [],
        annotations=[] if SCENES else annotations(),
    output:
        manifest=f"{RESULTS}/manifest.csv",
        rejected=f"{RESULTS}/rejected.csv",
    log:
        f"{RESULTS}/logs/manifest.log",
    benchmark:
        f"{RESULTS}/benchmarks/manifest.tsv"
    threads: COMPUTE.threads
    resources:
        **asks(2000, 60, 300),
    params:
        settings=decides("manifest"),
        version=settings.RESULT_VERSION["manifest"],
        root=lambda _: RUN.data.root,
    shell:
        "orl manifest --settings {params.settings:q} --root {ROOT:q} --output {output.manifest:q} "
        "--rejected {output.rejected:q} --threads {threads} 2>&1 | tee {log:q}"
