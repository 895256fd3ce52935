rule report:
    input:
        manifest=found("manifest"),
        rejected=f"{RESULTS}/rejected.csv",
        metrics=trained("metrics.csv"),
        scores=scores(),
        recalls=measured("proposals_recall"),
        neighbors=found("neighbors"),
        proposals=found("proposals"),
        correspondences=found("correspondences"),
    output:
        f"{RESULTS}/report/index.html",
    log:
        f"{RESULTS}/logs/report.log",
    params:
        settings=decides("report"),
        version=settings.RESULT_VERSION["report"],
        name=RUN.name,
        root=ROOT,
    shell:
        "orl report --settings {params.settings:q} --run-name {params.name:q} --root {params.root:q} "
        "--manifest {input.manifest:q} --rejected {input.rejected:q} --metrics {input.metrics:q} "
        "--scores {input.scores:q} --recalls {input.recalls:q} --neighbors {input.neighbors:q} "
        "--proposals {input.proposals:q} --correspondences {input.correspondences:q} --output {output:q} "
        "2>&1 | tee {log:q}"
