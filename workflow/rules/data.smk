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
    params:
        settings=decides("manifest"),
        version=settings.RESULT_VERSION["manifest"],
        root=lambda _: ROOT,
    shell:
        "orl manifest --settings {params.settings:q} --root {params.root:q} --output {output.manifest:q} "
        "--rejected {output.rejected:q} --threads {threads} 2>&1 | tee {log:q}"
