# The run's own files of stage 2, which the page shows where the run makes them.
STAGE2 = stage2("", "neighbors", "proposals", "correspondences")


rule report:
    input:
        **STAGE2,
        manifest=found("manifest"),
        rejected=f"{RESULTS}/rejected.csv",
        metrics=trained("metrics.csv"),
        scores=scores() + measured("pair_boxes", "localization"),
        attention=seen(),
        recalls=measured("proposals_recall"),
        pairs=measured("pair_precision"),
    output:
        shown(f"{RESULTS}/report/index.html", "page", "Page of the run", run=RUN.name),
    log:
        f"{RESULTS}/logs/report.log",
    resources:
        **asks(4000, 30),
    params:
        settings=decides("report"),
        version=settings.RESULT_VERSION["report"],
        name=RUN.name,
        root=lambda _: ROOT,
        stage2=lambda _, input: [
            part for name in STAGE2 for part in (f"--{name}", input[name])
        ],
    shell:
        "orl report --settings {params.settings:q} --run-name {params.name:q} --root {params.root:q} "
        "--manifest {input.manifest:q} --rejected {input.rejected:q} --metrics {input.metrics:q} "
        "--scores {input.scores:q} --attention {input.attention:q} --recalls {input.recalls:q} --pairs {input.pairs:q} "
        "{params.stage2:q} --output {output:q} "
        "2>&1 | tee {log:q}"
