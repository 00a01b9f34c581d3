# SPDX-License-Identifier: Apache-2.0
"""The task of a run, its devices, and the modes beside training."""

from __future__ import annotations

from contrastive.config import choices, conditions as when
from contrastive.config.fields import derived, field, group


@group("Task")
class Mode:
    """Task of this run; `--mode=NAME --help` shows its flags alone."""

    mode: str = field("train", table="commands")


@group("Task")
class TrainMode:
    """How the networks are trained.

    Attributes:
        train_mode: Trains without labels (pretrain), or trains a classifier on the encoder of
            --checkpoint (finetune).
        preset: Named recipe for pretraining or evaluation. Flags on the command line override its
            values.
    """

    train_mode: str = field("pretrain", choices=("pretrain", "finetune"), inherit="data")
    preset: str | None = field(None, table="presets")


@group("Task")
class Seed:
    """Random seed for weight initialization, data order and augmentation."""

    seed: int = field(0, minimum=0)


@group("Task", applies=(when.PRETRAINING,))
class ObjectiveChoice:
    """The objective of pretraining.

    Attributes:
        objective: Pretraining objective; chi is another name of rpc, nce of simclr.
        use_siglip: Same as --objective=siglip, for --objective=relic.
    """

    objective: str = field("rpc", table="objectives", inherit="data")
    use_siglip: bool = field(False, applies=when.flag("objective", "relic", "siglip"))


@group("Task")
class DryRun:
    """Print the training plan (steps, learning rate, sizes) and exit.

    Neither the devices nor the data need to be available.
    """

    dry_run: bool = field(False)


@group("Task")
class Start:
    """The weights that a run starts from or reads.

    Attributes:
        checkpoint: Run directory, checkpoint or weights file of another program. Training starts
            from its encoder and projection head; the other modes read it. `none` trains from
            scratch.
        evaluate_target: Read the target network (EMA weights) of --checkpoint instead of the online
            network.
    """

    checkpoint: str | None = field(None)
    evaluate_target: bool = field(
        False,
        applies=(
            when.given("checkpoint"),
            when.modes(*when.TRAINING_MODES, "probe", "embed", "export"),
        ),
    )


@group("Task")
class RunDirectory:
    """Directory for checkpoints, TensorBoard events and results.

    An existing run in this directory is resumed.
    """

    model_dir: str = field(derived("runs/TRAIN_MODE-OBJECTIVE-DATASET; in a probe, --checkpoint"))


@group("Compatibility")
class Ignored:
    """Flags of the programs whose command lines work here; they do nothing.

    Attributes:
        variable_schema: Ignored: the encoder and projection head are restored as objects, the
            classifier and the optimizer are new.
        eval_name: Ignored: results of evaluation go to MODEL_DIR/eval.
        keep_hub_module_max: Ignored: evaluation exports no module.
        cache_dataset: Ignored: data that fits in memory is always held there.
    """

    variable_schema: str | None = field(None)
    eval_name: str | None = field(None)
    keep_hub_module_max: int | None = field(None)
    cache_dataset: bool | None = field(None)


@group("Devices")
class Devices:
    """The devices of a run.

    Attributes:
        strategy: Devices: a TPU; several GPUs of this machine (mirrored); several machines, which
            TF_CONFIG names; one device. auto takes the first of these that is available.
        use_tpu: Run on a TPU, or not. Unset: as --strategy says.
        tpu_name: Name of the Cloud TPU, local, or grpc://... Unset: the environment variable
            TPU_NAME, or local.
        tpu_zone: Zone of the Cloud TPU. Unset: from the machine's metadata.
        gcp_project: Project of the Cloud TPU. Unset: from the machine's metadata.
        master: Address of the TPU, instead of its name.
        tpu_wait_minutes: Minutes to wait for a named TPU to be ready.
        cpu_replicas: Number of logical CPU devices on a machine without accelerators, to try
            several replicas.
        deterministic: Use bit-reproducible operations.
        jit_compile: Compile the step with XLA.
    """

    strategy: str = field("auto", choices=("auto", *choices.STRATEGIES), applies=when.STRATEGY)
    use_tpu: bool | None = field(None)
    tpu_name: str | None = field(None, applies=when.MAY_USE_TPU)
    tpu_zone: str | None = field(None, applies=when.NAMED_TPU)
    gcp_project: str | None = field(None, applies=when.NAMED_TPU)
    master: str | None = field(None, applies=when.MAY_USE_TPU)
    tpu_wait_minutes: float = field(20.0, minimum=0, applies=when.NAMED_TPU)
    cpu_replicas: int = field(1, minimum=1)
    deterministic: bool = field(derived("on CPUs only, where it costs little"))
    jit_compile: bool = field(derived("on one GPU only"))


@group("Devices")
class Precision:
    """Use bfloat16 activations and float32 weights."""

    mixed_precision: bool = field(False)


@group("TPU check")
class Topology:
    """The slice that a check or a plan is made for.

    Attributes:
        tpu_topology: TPU slice by the name it is rented as, or chip and topology: v5litepod-32,
            v5e:4x8.
    """

    tpu_topology: str | None = field(None, applies=when.TOPOLOGY)


@group("TPU check")
class BatchSearch:
    """Search for the largest batch that fits the slice."""

    find_batch: bool = field(False)


@group("Evaluation")
class EvaluationSteps:
    """The steps of an evaluation.

    Attributes:
        eval_batch_size: Global batch size of evaluation; rounded up to a multiple of the number of
            replicas.
        eval_steps: Number of evaluation steps; 0 evaluates all images.
    """

    eval_batch_size: int = field(256, minimum=1, applies=when.EVALUATES)
    eval_steps: int = field(0, minimum=0, applies=when.MEASURES)


@group("Evaluation")
class Following:
    """The evaluation beside a training run.

    Attributes:
        eval_timeout_minutes: Minutes that --mode=eval waits for a sign of life of the trainer: for
            its run to start, and later for a new checkpoint or event. 0 waits for ever.
    """

    eval_timeout_minutes: float = field(120.0, minimum=0)


@group("Probe")
class Probe:
    """The measurements of a probe.

    Attributes:
        knn_k: Number of nearest neighbours that vote.
        knn_temperature: Temperature of a neighbour's vote, whose weight is exp(cosine /
            temperature).
        label_budgets: Numbers of labels per class, or percentages of all labels, that a classifier
            is trained on.
        probe_seeds: Number of draws of the labels of each budget.
        probe_max_train: Number of training images used, drawn at random; 0 uses all.
        feature_cache: Directory where features are kept for the next probe; none keeps no features.
            Unset: MODEL_DIR/features.
    """

    knn_k: int = field(20, minimum=1)
    knn_temperature: float = field(0.07, minimum=0.01)
    label_budgets: tuple[str, ...] = field(
        ("1", "5", "10", "1%", "10%"), check=choices.check_label_budget
    )
    probe_seeds: int = field(5, minimum=1)
    probe_max_train: int = field(50_000, minimum=0)
    feature_cache: str | None = field(None)


@group("Embedding and prediction")
class Input:
    """The images that are embedded or classified.

    Attributes:
        input: Images to read, as --dataset.
        input_split: Split of --input.
        output: File to write: .npz or .parquet with --mode=embed; .csv or .npz with --mode=predict,
            which by default writes to standard output.
    """

    input: str = field("")
    input_split: str = field("all")
    output: str | None = field(None)


@group("Embedding and prediction")
class TopClasses:
    """Number of most probable classes per image."""

    top_k: int = field(5, minimum=1)


@group("Export")
class Export:
    """The files of an export.

    Attributes:
        format: File formats to write.
        export_dir: Directory for exports. Unset: `export` beside the checkpoint.
    """

    format: tuple[str, ...] = field(tuple(choices.FORMATS), choices=choices.FORMATS)
    export_dir: str | None = field(None)
