# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401 - The imported names are the interface of this module.
"""The index of the objectives: every loss by name, and what belongs to it.

A loss is a pure function of the projections of this replica's images and of a `gather`, which
returns those of all replicas. It returns the mean over this replica's rows, so that the average
over replicas is the loss of the global batch. The batch sizes, b per replica and B globally, must
be static: they have to be known when a loss is traced.

Losses of two views take the projections `z1`, `z2` of both; losses of many views take sequences of
online and of target views, see `contrastive/objectives/comparison.py`.
"""

from contrastive.objectives.barlow_twins import (
    BarlowTwins,
    barlow_twins_loss,
)
from contrastive.objectives.base import (
    Embedded,
    Objective,
    StepContext,
    Training,
)
from contrastive.objectives.bounds import (
    DV,
    JS,
    NWJ,
    dv_loss,
    js_loss,
    nwj_loss,
)
from contrastive.objectives.byol import BYOL, byol_loss
from contrastive.objectives.common import Gather
from contrastive.objectives.comparison import num_pairs, sample_negatives
from contrastive.objectives.pseudo_labels import (
    draw_semantic_positives,
    pseudo_labels,
)
from contrastive.objectives.relic import ReLIC, ReLICv2, SigLIP
from contrastive.objectives.relic_losses import (
    KL_FORMS,
    KL_GRADS,
    KL_SMALLS,
    critic_temperature,
    relic_loss,
    siglip_loss,
)
from contrastive.objectives.rpc import (
    RPC,
    WPC,
    gradient_penalty,
    rpc_loss,
    wpc_loss,
)
from contrastive.objectives.semppl import (
    SEMPOS_NEGATIVES,
    SemPPL,
    semppl_loss,
)
from contrastive.objectives.simclr import SimCLR, simclr_loss
from contrastive.objectives.two_view import contrastive_metrics, positive_scores
from contrastive.objectives.vicreg import VICReg, vicreg_loss

# An objective is a frozen dataclass of hyperparameters, see `contrastive/objectives/base.py`. To
# add one: a new file and a line here.
OBJECTIVES: dict[str, type[Objective]] = {
    "simclr": SimCLR,
    "rpc": RPC,
    "wpc": WPC,
    "dv": DV,
    "nwj": NWJ,
    "js": JS,
    "byol": BYOL,
    "relic": ReLIC,
    "siglip": SigLIP,
    "relicv2": ReLICv2,
    "semppl": SemPPL,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
}
# Names of the RPC code.
ALIASES = {"chi": "rpc", "nce": "simclr"}
