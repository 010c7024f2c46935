# The study as a graph. Each job runs one notebook through gk_mvlp.study.run, which checks parameters and keeps failed notebooks.
# Priorities: what most jobs wait for first, then the longest; so that the tables of tasks are made beside other jobs and few are left
# for the end.
# Called by `gk-mvlp paper`. Settings are plain params, so that Snakemake sees when they change. Checkpoints are not declared as
# outputs, because outputs of a failed job are deleted and a resumed job needs them.
import json
from dataclasses import asdict

from snakemake.scheduling.job_scheduler import JobScheduler

from gk_mvlp.config import finetune_section, load_preset
from gk_mvlp.study.launch import classification_jobs, pretrained, probing_jobs, study_jobs, task_jobs
from gk_mvlp.study.run import STAGE_PACKAGES, code_hash
from gk_mvlp.study.variants import method_settings

localrules: all, manifest

# Snakemake looks at all waiting jobs again a second after each look (its limit on starts), and each job that ends begins one more
# such chain: a third of a core after a hundred jobs. A look when a job ends is enough.
JobScheduler._schedule_reevalutation = lambda self, delay: None

PRESET, DATA = config["preset"], config.get("data") or ""     # "data=" on the command line arrives as None
RUNS, RESULTS = config["runs"], config["results"]
P = load_preset(PRESET)
SETTINGS = asdict(P)
DETECTOR = f"{RUNS}/detector"
# as a param: as inputs, sixty files would be looked at again for every waiting job whenever one ends
CODE = {k: code_hash(k) for k in STAGE_PACKAGES}
PUBLISHED = expand("paper_results/published/{f}.csv", f=glob_wildcards("paper_results/published/{f}.csv").f)
RUN = ("OMP_NUM_THREADS={threads} python -S -E gk_mvlp/study/warm.py gk_mvlp.study.run {input.nb} $(dirname {output[0]}) "
       "--label {params.label:q} --params {params.p:q}")

wildcard_constraints:
    seed=r"\d+", dataset="[a-z_]+", method=r"[a-z_]+(-[a-z\d_.]+)?", ratio=r"[\d.]+"

def given(**params):
    "A job's notebook parameters as JSON."
    return json.dumps({"preset": PRESET, "data": DATA, **params})

def settings_of(method):
    "What a variant changes, as notebook parameters."
    overrides = method_settings(P, method)[1]
    return {"overrides": overrides} if overrides else {}

def model_of(w):
    "The folder of a method's pre-trained model; '' for a method without pre-training."
    return f"{RUNS}/pretrain/{w.method}-s{w.seed}/model" if pretrained(w.method) else ""

def needs_model(w):
    return [f"{RUNS}/pretrain/{w.method}-s{w.seed}/metrics.json"] if pretrained(w.method) else []

# Every run is a target: results that came with the repository are no reason to run nothing, and a run that is gone is made again.
rule all:
    input: f"{RESULTS}/manifest.json", [f"{RUNS}/{j}/metrics.json" for j in study_jobs(P)]

rule detector:
    input: nb="nbs/experiments/70_detector.ipynb"
    output: f"{DETECTOR}/metrics.json"
    params:
        code=CODE["detector"],
        label="detector",
        p=given(seed=P.seeds[0]),
        settings=json.dumps([P.data, P.detector, P.detector_dataset, P.dataset_options.get(P.detector_dataset)])
    threads: int(config.get("cores", 1))  # it runs alone: all others wait for it
    shell: RUN

rule pretrain:
    input: nb="nbs/experiments/71_pretrain.ipynb", detector=f"{DETECTOR}/metrics.json"
    priority: 4
    output: f"{RUNS}/pretrain/{{method}}-s{{seed}}/metrics.json"
    params:
        code=CODE["pretrain"],
        label=lambda w: f"pretrain {w.method}, seed {w.seed}",
        p=lambda w: given(objective=method_settings(P, w.method)[0], seed=int(w.seed), detector=DETECTOR, **settings_of(w.method)),
        settings=json.dumps([P.data, P.model, P.pretrain, P.pretrain_dataset, P.pretrain_ratio, P.dataset_options.get(P.pretrain_dataset)])
    shell: RUN

rule classification:
    input: needs_model, nb="nbs/experiments/72_classification.ipynb", detector=f"{DETECTOR}/metrics.json"
    priority: 2
    output: f"{RUNS}/classification/{{dataset}}-{{method}}-r{{ratio}}-s{{seed}}/metrics.json"
    params:
        code=CODE["classification"],
        label=lambda w: f"classification of {w.dataset}, {w.method}, {w.ratio} %, seed {w.seed}",
        p=lambda w: given(dataset=w.dataset, method=w.method, ratio=float(w.ratio), seed=int(w.seed), detector=DETECTOR,
                          checkpoint=model_of(w)),
        settings=lambda w: json.dumps([P.data, P.model, finetune_section(SETTINGS, "classification"), P.dataset_options.get(w.dataset),
                                       P.classes.get(w.dataset)])
    shell: RUN

TASK_NOTEBOOKS = {"zero_shot": "73", "localization": "74", "report_generation": "75", "vqa": "76"}

rule task:
    input: needs_model, nb=lambda w: f"nbs/experiments/{TASK_NOTEBOOKS[w.task]}_{w.task}.ipynb", detector=f"{DETECTOR}/metrics.json"
    priority: 3
    output: f"{RUNS}/{{task}}/{{dataset}}-{{method}}-r{{ratio}}-s{{seed}}/metrics.json"
    wildcard_constraints: task="|".join(TASK_NOTEBOOKS)
    params:
        code=CODE["vqa"],
        label=lambda w: f"{w.task} on {w.dataset}, {w.method}, {w.ratio} %, seed {w.seed}",
        p=lambda w: given(dataset=w.dataset, method=w.method, ratio=float(w.ratio), seed=int(w.seed), detector=DETECTOR,
                          checkpoint=model_of(w)),
        settings=lambda w: json.dumps([P.data, P.model, finetune_section(SETTINGS, w.task), P.localization, P.generation,
                                       P.dataset_options.get(w.dataset), P.classes.get(w.dataset)])
    shell: RUN

rule probing:
    input: needs_model, nb="nbs/experiments/78_probing.ipynb", detector=f"{DETECTOR}/metrics.json"
    output: f"{RUNS}/probing/{{dataset}}-{{method}}-s{{seed}}/metrics.json"
    params:
        code=CODE["probing"],
        label=lambda w: f"probing {w.method} on {w.dataset}, seed {w.seed}",
        p=lambda w: given(dataset=w.dataset, method=w.method, seed=int(w.seed), detector=DETECTOR, checkpoint=model_of(w),
                          **settings_of(w.method)),
        settings=lambda w: json.dumps([P.data, P.model, P.probing, P.generation, P.ratios, P.dataset_options.get(w.dataset),
                                       P.classes.get(w.dataset)])
    shell: RUN

CLASSIFICATION = [f"{RUNS}/classification/{j}/metrics.json" for j in classification_jobs(P)]

rule tables:
    input: CLASSIFICATION, f"{DETECTOR}/metrics.json", PUBLISHED, nb="nbs/paper/90_tables.ipynb"
    priority: 2
    output: f"{RUNS}/tables/metrics.json"
    params: code=CODE["paper"], label="tables", p=given(runs=RUNS, results=RESULTS)
    shell: RUN

rule task_tables:
    input: [f"{RUNS}/{j}/metrics.json" for j in task_jobs(P)], PUBLISHED, nb="nbs/paper/92_task_tables.ipynb"
    priority: 3
    output: f"{RUNS}/task_tables/metrics.json"
    params: code=CODE["paper"], label="tables of the tasks", p=given(runs=RUNS, results=RESULTS)
    shell: RUN

rule study:
    input:
        [f"{RUNS}/probing/{j}/metrics.json" for j in probing_jobs(P)], rules.tables.output,
        rules.task_tables.output if P.tasks else [], nb="nbs/paper/97_study.ipynb"
    output: f"{RUNS}/study/metrics.json"
    params: code=CODE["paper"], label="ablations, robustness, grounding, subgroups, scaling", p=given(runs=RUNS, results=RESULTS)
    shell: RUN

rule figures:
    input: rules.tables.output, rules.study.output if P.probing else [], nb="nbs/paper/91_figures.ipynb"
    output: f"{RUNS}/figures/metrics.json"
    params: code=CODE["paper"], label="figures", p=given(runs=RUNS, results=RESULTS)
    shell: RUN

rule report:
    input:
        rules.tables.output, rules.figures.output, rules.task_tables.output if P.tasks else [],
        rules.study.output if P.probing else [], nb="nbs/paper/93_report.ipynb"
    output: f"{RUNS}/report/metrics.json"
    params: code=CODE["paper"], label="report", p=given(runs=RUNS, results=RESULTS)
    shell: RUN

rule manifest:
    input:
        rules.tables.output, rules.figures.output, rules.task_tables.output if P.tasks else [],
        rules.study.output if P.probing else [], rules.report.output
    output: f"{RESULTS}/manifest.json"
    shell: "python -m gk_mvlp.study.collect {RUNS} {RESULTS}"
