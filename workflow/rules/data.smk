if SCENES:

    rule scenes:
        output:
            directory(ROOT),
        log:
            f"{RESULTS}/logs/scenes.log",
        benchmark:
            f"{RESULTS}/benchmarks/scenes.tsv"
        threads: COMPUTE.threads
        params:
            settings=decides("scenes"),
            version=settings.RESULT_VERSION["scenes"],
        shell:
            "orl scenes --settings {params.settings:q} --output {output:q} --threads {threads} 2>&1 | tee {log:q}"


if RUN.data.fetch:

    # It leaves alone what is there.
    rule fetch_coco:
        output:
            touch(FETCHED),
        log:
            f"{RESULTS}/logs/fetch_coco.log",
        params:
            root=ROOT,
            parts=[*RUN.data.folders, "annotations"],
        shell:
            "orl fetch coco --output {params.root:q} --parts {params.parts:q} 2>&1 | tee {log:q}"


if RUN.downstream.voc07_svm.fetch:

    rule fetch_voc2007:
        output:
            touch(FETCHED_VOC),
        log:
            f"{RESULTS}/logs/fetch_voc2007.log",
        params:
            root=Path(FETCHED_VOC).parents[2],
        shell:
            "orl fetch voc2007 --output {params.root:q} 2>&1 | tee {log:q}"


rule manifest:
    input:
        photos=ROOT if SCENES else [],
        annotations=[] if SCENES or RUN.data.fetch else annotations(),
        fetched=FETCHED if RUN.data.fetch else [],
    output:
        manifest=f"{RESULTS}/manifest.csv",
        rejected=f"{RESULTS}/rejected.csv",
    log:
        f"{RESULTS}/logs/manifest.log",
    benchmark:
        f"{RESULTS}/benchmarks/manifest.tsv"
    threads: COMPUTE.threads
    params:
        settings=decides("manifest"),
        version=settings.RESULT_VERSION["manifest"],
        root=lambda _: ROOT,
    shell:
        "orl manifest --settings {params.settings:q} --root {params.root:q} --output {output.manifest:q} "
        "--rejected {output.rejected:q} --threads {threads} 2>&1 | tee {log:q}"
