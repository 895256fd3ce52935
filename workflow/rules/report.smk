# The run's own files of stage 2, which the page shows where the run makes them.
STAGE2 = stage2("", "neighbors", "proposals", "correspondences")


# What the page draws: the jobs of this run, as Snakemake itself plans them.
rule graph:
    output:
        f"{RESULTS}/report/jobs.dot",
    log:
        f"{RESULTS}/logs/graph.log",
    localrule: True
    params:
        snakefile=workflow.main_snakefile,
        config=f"{RESULTS}/config.json",
        goals=scores()
        + trained("backbone.safetensors")
        + measured("proposals_recall")
        + measured("pair_precision")
        + seen()
        + exports(),
    shell:
        "snakemake --snakefile {params.snakefile:q} --configfile {params.config:q} --profile none "
        "--workflow-profile none --nolock --forceall --dag dot > {output:q} 2> {log:q}"


rule report:
    input:
        **STAGE2,
        graph=f"{RESULTS}/report/jobs.dot",
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
        results=lambda _: RESULTS,
        left_out=LEFT_OUT,
        stage2=lambda _, input: [
            part for name in STAGE2 for part in (f"--{name}", input[name])
        ],
    shell:
        "orl report --settings {params.settings:q} --run-name {params.name:q} --root {params.root:q} "
        "--manifest {input.manifest:q} --rejected {input.rejected:q} --metrics {input.metrics:q} "
        "--scores {input.scores:q} --attention {input.attention:q} --recalls {input.recalls:q} --pairs {input.pairs:q} "
        "{params.stage2:q} --results {params.results:q} --graph {input.graph:q} --left-out {params.left_out:q} "
        "--output {output:q} "
        "2>&1 | tee {log:q}"
