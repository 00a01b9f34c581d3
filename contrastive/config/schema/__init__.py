# SPDX-License-Identifier: Apache-2.0
"""The groups of configuration fields; each field is also a flag.

Hyperparameters of objectives are declared by the objectives themselves, in
`contrastive/objectives`.
"""

from contrastive.config.schema.data import (
    AugmentationOverrides as AugmentationOverrides,
    Backgrounds as Backgrounds,
    Channels as Channels,
    DataDirectory as DataDirectory,
    EvaluationData as EvaluationData,
    ImageSize as ImageSize,
    Labels as Labels,
    Normalization as Normalization,
    TrainingData as TrainingData,
    Views as Views,
)
from contrastive.config.schema.networks import (
    Encoder as Encoder,
    Heads as Heads,
    OnlineClassifier as OnlineClassifier,
    Recomputation as Recomputation,
    ResNet as ResNet,
)
from contrastive.config.schema.task import (
    BatchSearch as BatchSearch,
    Devices as Devices,
    DryRun as DryRun,
    EvaluationSteps as EvaluationSteps,
    Export as Export,
    Following as Following,
    Ignored as Ignored,
    Input as Input,
    Mode as Mode,
    ObjectiveChoice as ObjectiveChoice,
    Precision as Precision,
    Probe as Probe,
    RunDirectory as RunDirectory,
    Seed as Seed,
    Start as Start,
    TopClasses as TopClasses,
    Topology as Topology,
    TrainMode as TrainMode,
)
from contrastive.config.schema.training import (
    Batch as Batch,
    Checkpointing as Checkpointing,
    FineTuning as FineTuning,
    Length as Length,
    Optimizer as Optimizer,
    Regularization as Regularization,
    Sweep as Sweep,
    Target as Target,
)

ENCODER_GROUPS = (
    ImageSize,
    Channels,
    Normalization,
    Encoder,
    ResNet,
    Recomputation,
    Heads,
    OnlineClassifier,
)
PRETRAINING_GROUPS = (
    ObjectiveChoice,
    Target,
    Labels,
    Views,
    Backgrounds,
    AugmentationOverrides,
)
# Groups that describe a training step: its data, networks and optimizers.
STEP_GROUPS = (
    Mode,
    TrainMode,
    Seed,
    Start,
    TrainingData,
    DataDirectory,
    *ENCODER_GROUPS,
    *PRETRAINING_GROUPS,
    Batch,
    Optimizer,
    Regularization,
    FineTuning,
    Precision,
)
# Groups that describe the forward pass of a trained network.
FORWARD_GROUPS = (
    Mode,
    DataDirectory,
    ImageSize,
    Channels,
    EvaluationSteps,
    Devices,
    Precision,
)
GROUPS = (
    *STEP_GROUPS,
    DryRun,
    RunDirectory,
    EvaluationData,
    Length,
    Checkpointing,
    EvaluationSteps,
    Following,
    Sweep,
    Probe,
    Input,
    TopClasses,
    Export,
    Devices,
    Topology,
    BatchSearch,
    Ignored,
)
