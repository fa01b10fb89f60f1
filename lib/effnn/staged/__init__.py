"""Staged training: grow a GPT-2 in width and depth, with its optimizer, without a change of its loss.

    from effnn import staged
    grown = staged.grow(model, optimizer, scheduler, width=2, depth=2)
    grown.model, grown.optimizer, grown.scheduler       # new ones; the originals are untouched
    grown.model.save_pretrained(folder)                 # a stock GPT-2: GPT2LMHeadModel.from_pretrained(folder)

    state = staged.train(config, [staged.Stage(800), staged.Stage(400, width=2)], recipe, tokens, validation)
    state.model, state.points                           # the grown model, and the loss over steps, tokens and FLOPs

Shen et al., "Staged Training for Transformer Language Models", 2022, arXiv 2203.06211.
"""

from effnn.staged.growth.config import GrowthRecord, factors, history, total_width
from effnn.staged.growth.depth import INITS, ORDERS
from effnn.staged.growth.grow import Grown, evaluate_loss, grow
from effnn.staged.growth.optimizer import MOMENTS, WIDTH_RULES
from effnn.staged.planning.curves import Curve
from effnn.staged.planning.flops import CONVENTIONS, Shape, compute_saving, staged_flops, training_flops
from effnn.staged.planning.growth_plans import PATHS, GrowthPlan, PlannedStage, best_plans
from effnn.staged.planning.learning_rate import REWARM_STEPS, Rewarmed, WarmupStableDecay, peak_learning_rate
from effnn.staged.planning.loss_law import KAPLAN, LawFit, LossLaw, fit_loss_law
from effnn.staged.planning.projection import (
    RHOS,
    BestProjection,
    Projection,
    authors_projection,
    best_projection,
    growth_rho,
    project,
    target_step,
)
from effnn.staged.planning.slope import (
    TAU_OPT,
    TAUS,
    authors_crossing,
    crossing,
    find_crossing,
    growth_tau,
    local_slope,
    stopping_tau,
)
from effnn.staged.training.checkpoints.optimizer_file import load_optimizer, save_optimizer
from effnn.staged.training.clipping import clip_grad_norm_, gradient_norm
from effnn.staged.training.state import PRECISIONS, Diverged, Point, Recipe, Stage, TrainState
from effnn.staged.training.train import train

__all__ = [
    "PRECISIONS",
    "Diverged",
    "Point",
    "Recipe",
    "Stage",
    "TrainState",
    "train",
    "KAPLAN",
    "Curve",
    "LawFit",
    "LossLaw",
    "fit_loss_law",
    "CONVENTIONS",
    "Shape",
    "compute_saving",
    "staged_flops",
    "training_flops",
    "REWARM_STEPS",
    "Rewarmed",
    "WarmupStableDecay",
    "peak_learning_rate",
    "PATHS",
    "PlannedStage",
    "GrowthPlan",
    "best_plans",
    "RHOS",
    "BestProjection",
    "Projection",
    "authors_projection",
    "best_projection",
    "growth_rho",
    "project",
    "target_step",
    "TAU_OPT",
    "TAUS",
    "authors_crossing",
    "crossing",
    "find_crossing",
    "growth_tau",
    "local_slope",
    "stopping_tau",
    "INITS",
    "MOMENTS",
    "ORDERS",
    "WIDTH_RULES",
    "Grown",
    "GrowthRecord",
    "clip_grad_norm_",
    "evaluate_loss",
    "factors",
    "gradient_norm",
    "grow",
    "history",
    "load_optimizer",
    "save_optimizer",
    "total_width",
]
