# Multi-label: SVMs on features of the photos of downstream.voc07_svm.
rule features:
    input:
        backbone=evaluated,
        scenes=ROOT if SCENES else [],
        labels=lambda wildcards: label_files(wildcards.v),
    output:
        f"{RESULTS}/downstream/{{model}}{{v}}/features.h5",
    log:
        f"{RESULTS}/logs/downstream/{{model}}{{v}}/features.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{model}}{{v}}/features.tsv"
    threads: COMPUTE.threads
    resources:
        **asks(6000, 60, 600, disk=4000),
        gpu=min(1, COMPUTE.gpus),
    params:
        settings=decides("features"),
        version=settings.RESULT_VERSION["features"],
        root=lambda wildcards: labels(wildcards.v),
    shell:
        "orl features --settings {params.settings:q} --backbone {input.backbone:q} --root {params.root:q} "
        "--output {output:q} --threads {threads} --gpus {resources.gpu} 2>&1 | tee {log:q}"


rule voc07_svm:
    input:
        features=downstream_of("features"),
        scenes=ROOT if SCENES else [],
        labels=lambda wildcards: label_files(wildcards.v),
    output:
        shown(
            f"{RESULTS}/downstream/{{model}}{{v}}/voc07_svm.json",
            "voc07_svm",
            "Scores of the models",
            task="Linear SVMs (VOC07)",
            model="{model}{v}",
        ),
    log:
        f"{RESULTS}/logs/downstream/{{model}}{{v}}/voc07_svm.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{model}}{{v}}/voc07_svm.tsv"
    threads: COMPUTE.threads
    resources:
        **asks(4000, 120, 2000),
    params:
        settings=decides("voc07_svm"),
        version=settings.RESULT_VERSION["voc07_svm"],
        root=lambda wildcards: labels(wildcards.v),
    shell:
        "orl evaluate voc07_svm --settings {params.settings:q} --features {input.features:q} "
        "--name {wildcards.model}{wildcards.v} --root {params.root:q} --output {output:q} "
        "--threads {threads} 2>&1 | tee {log:q}"


rule voc07_lowshot:
    input:
        lists=lowshot_lists,
        features=downstream_of("features"),
        scenes=ROOT if SCENES else [],
        labels=lambda wildcards: label_files(wildcards.v),
    output:
        shown(
            f"{RESULTS}/downstream/{{model}}{{v}}/voc07_lowshot.json",
            "voc07_lowshot",
            "Scores of the models",
            task="Low-shot SVMs (VOC07)",
            model="{model}{v}",
        ),
    log:
        f"{RESULTS}/logs/downstream/{{model}}{{v}}/voc07_lowshot.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{model}}{{v}}/voc07_lowshot.tsv"
    threads: COMPUTE.threads
    resources:
        **asks(4000, 120, 2000),
    params:
        settings=decides("voc07_lowshot"),
        version=settings.RESULT_VERSION["voc07_lowshot"],
        root=lambda wildcards: labels(wildcards.v),
    shell:
        "orl evaluate voc07_lowshot --settings {params.settings:q} --features {input.features:q} "
        "--name {wildcards.model}{wildcards.v} --root {params.root:q} --output {output:q} "
        "--threads {threads} 2>&1 | tee {log:q}"


# One class a photo: the labelled sets of downstream.sets.
rule set_features:
    input:
        backbone=evaluated,
        scenes=ROOT if SCENES else [],
        lists=set_files,
    output:
        f"{RESULTS}/downstream/{{model}}{{v}}/{{set}}.features.h5",
    log:
        f"{RESULTS}/logs/downstream/{{model}}{{v}}/{{set}}.features.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{model}}{{v}}/{{set}}.features.tsv"
    threads: COMPUTE.threads
    resources:
        **asks(6000, 240, 600, disk=6000),
        gpu=min(1, COMPUTE.gpus),
    params:
        settings=decides("set_features"),
        version=settings.RESULT_VERSION["set_features"],
        root=lambda wildcards: set_root(wildcards.set, wildcards.v),
    shell:
        "orl features --settings {params.settings:q} --set {wildcards.set} --backbone {input.backbone:q} "
        "--root {params.root:q} --output {output:q} --threads {threads} --gpus {resources.gpu} 2>&1 | tee {log:q}"


rule knn:
    input:
        features=downstream_of("set_features"),
        scenes=ROOT if SCENES else [],
        lists=set_files,
    output:
        shown(
            f"{RESULTS}/downstream/{{model}}{{v}}/knn.{{set}}.json",
            "knn",
            "Scores of the models",
            task="Nearest neighbours, {set}",
            model="{model}{v}",
        ),
    log:
        f"{RESULTS}/logs/downstream/{{model}}{{v}}/knn.{{set}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{model}}{{v}}/knn.{{set}}.tsv"
    threads: COMPUTE.threads
    resources:
        **asks(20_000, 120),
    params:
        settings=decides("knn"),
        version=settings.RESULT_VERSION["knn"],
        root=lambda wildcards: set_root(wildcards.set, wildcards.v),
    shell:
        "orl evaluate knn --settings {params.settings:q} --set {wildcards.set} --features {input.features:q} "
        "--name {wildcards.model}{wildcards.v} --root {params.root:q} --output {output:q} "
        "--threads {threads} 2>&1 | tee {log:q}"


rule linear:
    input:
        backbone=evaluated,
        scenes=ROOT if SCENES else [],
        lists=set_files,
    output:
        shown(
            f"{RESULTS}/downstream/{{model}}{{v}}/linear.{{set}}.json",
            "linear",
            "Scores of the models",
            task="Linear heads, {set}",
            model="{model}{v}",
        ),
    log:
        f"{RESULTS}/logs/downstream/{{model}}{{v}}/linear.{{set}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{model}}{{v}}/linear.{{set}}.tsv"
    threads: COMPUTE.threads * max(1, COMPUTE.gpus)
    resources:
        **asks(4000 * max(1, COMPUTE.gpus), 24 * 60, 600),
        **LIMITS,
        gpu=COMPUTE.gpus,
    params:
        settings=decides("linear"),
        version=settings.RESULT_VERSION["linear"],
        root=lambda wildcards: set_root(wildcards.set, wildcards.v),
    shell:
        "orl evaluate linear --settings {params.settings:q} --set {wildcards.set} --backbone {input.backbone:q} "
        "--name {wildcards.model}{wildcards.v} --root {params.root:q} --output {output:q} "
        "--threads {threads} --gpus {resources.gpu} --checkpoint-minutes {resources.checkpoint_minutes} "
        "--log-every {resources.log_every} 2>&1 | tee {log:q}"


rule subset:
    input:
        given=subset_list,
        scenes=ROOT if SCENES else [],
        lists=set_files,
    output:
        f"{RESULTS}/downstream/subset{{v}}/{{set}}/{{share}}.txt",
    log:
        f"{RESULTS}/logs/downstream/subset{{v}}/{{set}}/{{share}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/subset{{v}}/{{set}}/{{share}}.tsv"
    resources:
        **asks(2000, 30),
    params:
        settings=decides_share("subset"),
        version=settings.RESULT_VERSION["subset"],
        root=lambda wildcards: set_root(wildcards.set, wildcards.v),
    shell:
        "orl subset --settings {params.settings:q} --set {wildcards.set} --root {params.root:q} "
        "--share {wildcards.share} --output {output:q} 2>&1 | tee {log:q}"


rule semi_grid:
    input:
        backbone=evaluated,
        labels=lambda wildcards: f"{found(f'subset.{wildcards.set}', wildcards.v)}/{wildcards.share}.txt",
        scenes=ROOT if SCENES else [],
        lists=set_files,
    output:
        f"{RESULTS}/downstream/{{model}}{{v}}/semi.{{set}}/{{share}}-lr{{lr}}-x{{head}}.json",
    log:
        f"{RESULTS}/logs/downstream/{{model}}{{v}}/semi.{{set}}/{{share}}-lr{{lr}}-x{{head}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{model}}{{v}}/semi.{{set}}/{{share}}-lr{{lr}}-x{{head}}.tsv"
    threads: COMPUTE.threads
    resources:
        **asks(6000, 12 * 60, 600),
        **LIMITS,
        gpu=min(1, COMPUTE.gpus),
    params:
        settings=decides_share("semi_run"),
        version=settings.RESULT_VERSION["semi_run"],
        root=lambda wildcards: set_root(wildcards.set, wildcards.v),
    shell:
        "orl evaluate semi_run --settings {params.settings:q} --set {wildcards.set} --backbone {input.backbone:q} "
        "--list {input.labels:q} --share {wildcards.share} --lr {wildcards.lr} --head {wildcards.head} "
        "--name {wildcards.model}{wildcards.v} --root {params.root:q} --output {output:q} "
        "--threads {threads} --gpus {resources.gpu} --checkpoint-minutes {resources.checkpoint_minutes} "
        "--log-every {resources.log_every} 2>&1 | tee {log:q}"


rule semi_run:
    input:
        backbone=evaluated,
        labels=lambda wildcards: f"{found(f'subset.{wildcards.set}', wildcards.v)}/{wildcards.share}.txt",
        grid=lambda wildcards: semi_grid(wildcards.set, wildcards.model, wildcards.v)[
            wildcards.share
        ],
        scenes=ROOT if SCENES else [],
        lists=set_files,
    output:
        f"{RESULTS}/downstream/{{model}}{{v}}/semi.{{set}}/{{share}}-run{{number}}.json",
    log:
        f"{RESULTS}/logs/downstream/{{model}}{{v}}/semi.{{set}}/{{share}}-run{{number}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{model}}{{v}}/semi.{{set}}/{{share}}-run{{number}}.tsv"
    threads: COMPUTE.threads
    resources:
        **asks(6000, 12 * 60, 600),
        **LIMITS,
        gpu=min(1, COMPUTE.gpus),
    params:
        settings=decides_share("semi_run"),
        version=settings.RESULT_VERSION["semi_run"],
        root=lambda wildcards: set_root(wildcards.set, wildcards.v),
    shell:
        "orl evaluate semi_run --settings {params.settings:q} --set {wildcards.set} --backbone {input.backbone:q} "
        "--list {input.labels:q} --share {wildcards.share} --best {input.grid:q} --run {wildcards.number} "
        "--name {wildcards.model}{wildcards.v} --root {params.root:q} --output {output:q} "
        "--threads {threads} --gpus {resources.gpu} --checkpoint-minutes {resources.checkpoint_minutes} "
        "--log-every {resources.log_every} 2>&1 | tee {log:q}"


rule semi:
    input:
        semi_runs,
    output:
        shown(
            f"{RESULTS}/downstream/{{model}}{{v}}/semi.{{set}}.json",
            "semi",
            "Scores of the models",
            task="Few labels, {set}",
            model="{model}{v}",
        ),
    log:
        f"{RESULTS}/logs/downstream/{{model}}{{v}}/semi.{{set}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{model}}{{v}}/semi.{{set}}.tsv"
    resources:
        **asks(2000, 10),
    params:
        version=settings.RESULT_VERSION["semi"],
    shell:
        "orl evaluate semi --runs {input:q} --name {wildcards.model}{wildcards.v} --output {output:q} 2>&1 | tee {log:q}"


# Objects: photos with masks, or the run's own photos with boxes.
rule detection:
    input:
        backbone=evaluated,
        scenes=ROOT if SCENES else [],
        annotations=mask_files,
    output:
        result=shown(
            f"{RESULTS}/downstream/{{model}}{{v}}/detection.json",
            "detection",
            "Scores of the models",
            task="Detection",
            model="{model}{v}",
        ),
        predictions=f"{RESULTS}/downstream/{{model}}{{v}}/detection.predictions.json",
    log:
        f"{RESULTS}/logs/downstream/{{model}}{{v}}/detection.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{model}}{{v}}/detection.tsv"
    threads: COMPUTE.threads * max(1, COMPUTE.gpus)
    resources:
        **asks(4000 * max(1, COMPUTE.gpus), 24 * 60, 600),
        **LIMITS,
        gpu=COMPUTE.gpus,
        faster_coco_eval=int(COMPUTE.faster_coco_eval),
    params:
        settings=decides("detection"),
        version=settings.RESULT_VERSION["detection"],
        root=lambda wildcards: mask_root(wildcards.v),
    shell:
        "orl evaluate detection --settings {params.settings:q} --backbone {input.backbone:q} "
        "--name {wildcards.model}{wildcards.v} --root {params.root:q} --output {output.result:q} "
        "--predictions {output.predictions:q} --faster-coco-eval {resources.faster_coco_eval} "
        "--threads {threads} --gpus {resources.gpu} --checkpoint-minutes {resources.checkpoint_minutes} "
        "--log-every {resources.log_every} 2>&1 | tee {log:q}"


rule segmentation:
    input:
        backbone=evaluated,
        scenes=ROOT if SCENES else [],
        annotations=mask_files,
    output:
        shown(
            f"{RESULTS}/downstream/{{model}}{{v}}/segmentation.json",
            "segmentation",
            "Scores of the models",
            task="Segmentation",
            model="{model}{v}",
        ),
    log:
        f"{RESULTS}/logs/downstream/{{model}}{{v}}/segmentation.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{model}}{{v}}/segmentation.tsv"
    threads: COMPUTE.threads * max(1, COMPUTE.gpus)
    resources:
        **asks(4000 * max(1, COMPUTE.gpus), 24 * 60, 600),
        **LIMITS,
        gpu=COMPUTE.gpus,
    params:
        settings=decides("segmentation"),
        version=settings.RESULT_VERSION["segmentation"],
        root=lambda wildcards: mask_root(wildcards.v),
    shell:
        "orl evaluate segmentation --settings {params.settings:q} --backbone {input.backbone:q} "
        "--name {wildcards.model}{wildcards.v} --root {params.root:q} --output {output:q} "
        "--threads {threads} --gpus {resources.gpu} --checkpoint-minutes {resources.checkpoint_minutes} "
        "--log-every {resources.log_every} 2>&1 | tee {log:q}"


rule localization:
    input:
        manifest=of("manifest"),
        backbone=evaluated,
        annotations=object_files(),
    output:
        shown(
            f"{RESULTS}/downstream/{{model}}{{v}}/localization.json",
            "localization",
            "Scores of the models",
            task="Objects without labels",
            model="{model}{v}",
        ),
    log:
        f"{RESULTS}/logs/downstream/{{model}}{{v}}/localization.log",
    benchmark:
        f"{RESULTS}/benchmarks/downstream/{{model}}{{v}}/localization.tsv"
    threads: COMPUTE.threads
    resources:
        **asks(6000, 120, 600),
        gpu=min(1, COMPUTE.gpus),
    params:
        settings=decides("localization"),
        version=settings.RESULT_VERSION["localization"],
        root=lambda _: ROOT,
        annotations=holders,
    shell:
        "orl evaluate localization --settings {params.settings:q} --root {params.root:q} --manifest {input.manifest:q} "
        "--backbone {input.backbone:q} --annotations {params.annotations:q} --name {wildcards.model}{wildcards.v} "
        "--output {output:q} --threads {threads} --gpus {resources.gpu} 2>&1 | tee {log:q}"


rule pair_boxes:
    input:
        manifest=of("manifest"),
        proposals=of("proposals"),
        correspondences=of("correspondences"),
        annotations=object_files(),
    output:
        shown(
            f"{RESULTS}/downstream/localization{{v}}.json",
            "pair_boxes",
            "Regions and pairs (stage 2)",
            measured="Objects that the most paired boxes hit",
            run="localization{v}",
        ),
    log:
        f"{RESULTS}/logs/pair_boxes{{v}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/pair_boxes{{v}}.tsv"
    resources:
        **asks(4000, 60),
    params:
        settings=decides("pair_boxes"),
        version=settings.RESULT_VERSION["pair_boxes"],
        annotations=holders,
    shell:
        "orl evaluate localization --settings {params.settings:q} --manifest {input.manifest:q} "
        "--proposals {input.proposals:q} --correspondences {input.correspondences:q} "
        "--annotations {params.annotations:q} --name pairs{wildcards.v} --output {output:q} 2>&1 | tee {log:q}"


rule attention:
    input:
        unpack(looked_at),
        scenes=ROOT if SCENES else [],
    output:
        shown(
            directory(f"{RESULTS}/attention{{v}}"),
            "attention",
            "Attention maps",
            patterns=["contact_{sheet}.png"],
            run="attention{v}",
        ),
    log:
        f"{RESULTS}/logs/attention{{v}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/attention{{v}}.tsv"
    threads: COMPUTE.threads
    resources:
        **asks(6000, 30),
        gpu=min(1, COMPUTE.gpus),
    params:
        settings=decides("attention"),
        version=settings.RESULT_VERSION["attention"],
        root=lambda _: ROOT,
        backbones=lambda wildcards, input: [
            f"{model}={file}"
            for model, file in zip(models_of(wildcards.v), input.backbones)
        ],
        stage2=lambda wildcards: [
            part
            for name, file in stage2(
                wildcards.v, "proposals", "correspondences"
            ).items()
            for part in (f"--{name}", file)
        ],
    shell:
        "orl attention --settings {params.settings:q} --root {params.root:q} --manifest {input.manifest:q} "
        "--backbones {params.backbones:q} {params.stage2:q} --output {output:q} "
        "--threads {threads} --gpus {resources.gpu} 2>&1 | tee {log:q}"


rule export:
    input:
        f"{RESULTS}/models/{{trained}}{{v}}/backbone.safetensors",
    output:
        f"{RESULTS}/models/{{trained}}{{v}}/{{format}}.{{extension}}",
    log:
        f"{RESULTS}/logs/export/{{trained}}{{v}}-{{format}}-{{extension}}.log",
    resources:
        **asks(2000, 10),
    params:
        version=settings.RESULT_VERSION["export"],
    shell:
        "orl export --format {wildcards.format} --backbone {input:q} --output {output:q} 2>&1 | tee {log:q}"


# A card tells the scores of its model beside those of stage 1 and of random weights.
rule card:
    input:
        manifest=lambda wildcards: (
            []
            if wildcards.trained == "stage1" and given(wildcards.v)
            else of("manifest")(wildcards)
        ),
        backbone=f"{RESULTS}/models/{{trained}}{{v}}/backbone.safetensors",
        metrics=f"{RESULTS}/models/{{trained}}{{v}}/metrics.csv",
        scores=lambda wildcards: where(
            PLACES.told(MODELS[wildcards.trained], wildcards.v)
        ),
    output:
        f"{RESULTS}/models/{{trained}}{{v}}/README.md",
    log:
        f"{RESULTS}/logs/card/{{trained}}{{v}}.log",
    resources:
        **asks(2000, 10),
    params:
        settings=lambda wildcards: decides(f"{MODELS[wildcards.trained]}_card")(
            wildcards
        ),
        version=lambda wildcards: settings.RESULT_VERSION[
            f"{MODELS[wildcards.trained]}_card"
        ],
        name=RUN.name,
    shell:
        "orl card --settings {params.settings:q} --run-name {params.name:q} --name {wildcards.trained}{wildcards.v} "
        "--backbone {input.backbone:q} --metrics {input.metrics:q} --manifest {input.manifest:q} "
        "--scores {input.scores:q} --output {output:q} 2>&1 | tee {log:q}"


rule proposals_recall:
    input:
        manifest=of("manifest"),
        proposals=of("proposals"),
        annotations=object_files(),
    output:
        shown(
            f"{RESULTS}/downstream/proposals{{v}}.json",
            "proposals_recall",
            "Regions and pairs (stage 2)",
            measured="Recall of objects by the boxes kept",
            run="proposals{v}",
        ),
    log:
        f"{RESULTS}/logs/proposals_recall{{v}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/proposals_recall{{v}}.tsv"
    resources:
        **asks(4000, 60),
    params:
        settings=decides("proposals_recall"),
        version=settings.RESULT_VERSION["proposals_recall"],
        annotations=holders,
    shell:
        "orl evaluate proposals --settings {params.settings:q} --manifest {input.manifest:q} "
        "--proposals {input.proposals:q} --annotations {params.annotations:q} --name proposals{wildcards.v} "
        "--output {output:q} 2>&1 | tee {log:q}"


rule pair_precision:
    input:
        manifest=of("manifest"),
        proposals=of("proposals"),
        correspondences=of("correspondences"),
        annotations=object_files(),
    output:
        shown(
            f"{RESULTS}/downstream/pairs{{v}}.json",
            "pair_precision",
            "Regions and pairs (stage 2)",
            measured="Precision of the RoI pairs",
            run="pairs{v}",
        ),
    log:
        f"{RESULTS}/logs/pair_precision{{v}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/pair_precision{{v}}.tsv"
    resources:
        **asks(4000, 60),
    params:
        settings=decides("pair_precision"),
        version=settings.RESULT_VERSION["pair_precision"],
        annotations=holders,
    shell:
        "orl evaluate pairs --settings {params.settings:q} --manifest {input.manifest:q} "
        "--proposals {input.proposals:q} --correspondences {input.correspondences:q} "
        "--annotations {params.annotations:q} --name pairs{wildcards.v} --output {output:q} 2>&1 | tee {log:q}"
