"""Notebook 03, without training: when to grow, read off the validation curves that the authors published.

Six runs from scratch (Shen et al. 2022, the branch `updates` of their repository; data/published/staged_curves.csv). A
projected saving is read off two of them under the assumption that growth keeps loss and dynamics. The authors projected
their savings in the same way: none of these numbers is from a run with growth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from effnn import staged
from effnn.base import InvalidInput
from effnn.report import published

SHAPES = {
    "GPT2_base": (12, 768),
    "GPT2_base_div2_depth": (6, 768),
    "GPT2_base_div2_width": (12, 384),
    "GPT2_large": (24, 1536),
    "GPT2_large_div2_depth": (12, 1536),
    "GPT2_large_div2_width": (24, 768),
}
"""Layers and width of the six runs; the authors' large is 24 layers of width 1536."""

WARMUP = 3000
"""Steps of the authors' warm-up, which a loss law leaves out."""

TOKENS_PER_STEP = 512 * 1024
"""The authors' batch."""


@dataclass(frozen=True)
class Pair:
    """A small model and its target among the six runs. published: the pair's name in data/published/staged.csv."""

    operator: str  # "depth" or "width", each twofold
    size: str  # "base" or "large"
    published: str

    @property
    def name(self) -> str:
        """As in the ids of the claims: depth_base, width_large, ..."""
        return f"{self.operator}_{self.size}"

    @property
    def small(self) -> str:
        """Run of the small model."""
        return f"GPT2_{self.size}_div2_{self.operator}"

    @property
    def target(self) -> str:
        """Run of the target."""
        return f"GPT2_{self.size}"

    @property
    def size_ratio(self) -> float:
        """Non-embedding parameters of the target over those of the small model."""
        return parameters(self.target) / parameters(self.small)


PAIRS = (
    Pair("depth", "base", "GPT2_base_div2_depth->GPT2_base"),
    Pair("depth", "large", "GPT2_large_div2_depth->GPT2_large"),
    Pair("width", "base", "GPT2_base_div4->GPT2_base"),  # a quarter of the parameters is half of the width
    Pair("width", "large", "GPT2_large_div4->GPT2_large"),
)

_METRICS = {
    "saving": "oracle compute saving (%)",
    "pre": "S_pre: steps before growth",
    "target": "S_target: equivalent step of grown model",
    "opt": "S_opt: step where target model slope=-0.052",
    "loss": "loss at growth",
    "rho": "rho=S_pre/S_target",
}


def parameters(model: str) -> int:
    """Non-embedding parameters, 12 L d^2."""
    layers, width = SHAPES[model]
    return 12 * layers * width**2


def flops_per_step(model: str) -> float:
    """FLOPs of one step of the authors' batch, 6 N per token."""
    return 6 * parameters(model) * TOKENS_PER_STEP


def authors_curves() -> dict[str, staged.Curve]:
    """Return the six validation curves over steps, by run: nats per token, one evaluation every 50 steps.

    The logs count the first step as 0, so the first evaluation, after 50 steps, is at 49. The numbers stay so, since
    the authors' growth points count in the same way (the thinned rows of staged.csv count from 1).
    """
    rows = published.points("staged_curves", metric="val_loss")
    return {model: staged.Curve(group.x.tolist(), group.y.tolist()) for model, group in rows.groupby("model")}


def published_projection(pair: Pair) -> dict[str, float]:
    """Return the authors' numbers of a pair: saving (percent), pre, target, opt (steps), loss and rho.

    Raises InvalidInput where one of them is missing in data/published/staged.csv.
    """
    rows = published.points("staged", model=pair.published).set_index("metric").y
    if missing := [metric for metric in _METRICS.values() if metric not in rows.index]:
        raise InvalidInput(f"staged.csv has no row {missing[0]!r} for {pair.published}; expected one for each pair")
    return {name: float(rows[metric]) for name, metric in _METRICS.items()}


def projections() -> pd.DataFrame:
    """Return one row per pair with its projected saving by five rules. Savings are percent, the others steps or ratios.

    published_*  the authors' numbers (saving, pre: S_pre, target: S_target, opt: S_opt, rho), from staged.csv.
    authors_*    their rule in our code on their full logs: `staged.authors_projection` with their thresholds.
    robust_*     S_pre by `find_crossing` with `growth_tau(size_ratio)`, which needs the small model's curve alone;
                 S_target interpolated. robust_saving is at the authors' S_opt, as the others; robust_own_saving is at
                 robust_opt, where the target passes `stopping_tau`.
    best_*       the S_pre with the largest saving at the authors' S_opt, and the first and last S_pre within one
                 percentage point of it (between them the saving may be lower: the curves are noisy).
    closed_*     closed_rho is `growth_rho(size_ratio)`; closed_pre the S_pre at which S_pre / S_target of the two
                 curves passes it (halfway between the first above and the last below); the saving is at the authors'
                 S_opt.
    """
    curves = authors_curves()
    return pd.DataFrame([_projection(pair, curves[pair.small], curves[pair.target]) for pair in PAIRS])


def _projection(pair: Pair, small: staged.Curve, target: staged.Curve) -> dict[str, object]:
    ratio, stated = pair.size_ratio, published_projection(pair)
    opt = stated["opt"]
    theirs = staged.authors_projection(small, target, ratio, staged.TAUS[pair.operator])
    pre = _crossing(small, staged.growth_tau(ratio))
    robust_opt = _crossing(target, staged.stopping_tau())
    robust = staged.project(small, target, ratio, pre, opt)
    found = staged.best_projection(small, target, ratio, opt)
    rho = staged.growth_rho(ratio)
    closed = _where_rho_passes(saving_curve(pair), rho)
    row = {"pair": pair.name, "operator": pair.operator, "size": pair.size, "small": pair.small, "target": pair.target}
    row["size_ratio"] = ratio
    row |= {f"published_{name}": stated[name] for name in ("saving", "pre", "target", "opt", "rho")}
    row |= {f"authors_{name}": getattr(theirs, name) for name in ("pre", "target", "opt", "rho")}
    row["authors_saving"] = 100 * theirs.saving
    row |= {"robust_pre": pre, "robust_target": robust.target, "robust_rho": robust.rho, "robust_opt": robust_opt}
    row["robust_saving"] = 100 * robust.saving
    row["robust_own_saving"] = 100 * staged.project(small, target, ratio, pre, robust_opt).saving
    row |= {"best_pre": found.best.pre, "best_first": found.first, "best_last": found.last}
    row |= {"best_rho": found.best.rho, "best_saving": 100 * found.best.saving}
    return row | {"closed_rho": rho, "closed_pre": closed.pre, "closed_saving": closed.saving}


def saving_curve(pair: Pair, step: float = 50) -> pd.DataFrame:
    """Return the projected saving against the growth point, every `step` steps: pair, pre, target, rho, saving.

    saving: percent, at the authors' S_opt. pre: every S_pre at which the small model has a loss of the target before
    S_opt.
    """
    curves = authors_curves()
    small, target, opt = curves[pair.small], curves[pair.target], published_projection(pair)["opt"]
    highest, lowest = float(target.losses[0]), target.loss_at(opt)
    first, last = float(small.x[0]), float(small.x[-1])
    rows = []
    for pre in (first + i * step for i in range(int((last - first) / step) + 1)):
        if lowest <= small.loss_at(pre) <= highest:
            found = staged.project(small, target, pair.size_ratio, pre, opt)
            rows.append((pair.name, pre, found.target, found.rho, 100 * found.saving))
    return pd.DataFrame(rows, columns=["pair", "pre", "target", "rho", "saving"])


def law_fit(warmup: float = WARMUP) -> staged.LawFit:
    """Return `fit_loss_law` on all six curves, evaluations after `warmup` steps; `.rms` is its error in log loss."""
    curves = authors_curves()
    return staged.fit_loss_law([parameters(model) for model in curves], list(curves.values()), warmup)


def best_paths(
    targets: Sequence[str] = ("GPT2_base", "GPT2_large"), warmups: Sequence[float] = (WARMUP, 2000, 4000)
) -> pd.DataFrame:
    """Return `best_plans` under the fitted law: one row per target, path of `PATHS` and warm-up cut of the fit.

    The final loss is the law's for the target at the authors' S_opt; growth is allowed from step `WARMUP` on.
    warmups: the fit is repeated on the evaluations after each of these; the spread of the savings shows how uncertain
    they are. Columns: target, path, warmup, rms (of the fit), saving (percent of scratch), continued (compute that the
    smallest model needs for the loss without growth, over scratch; infinite if it never has it), and switches (the
    stages, with the steps after which a model of that size from scratch has the loss at the end of each).
    """
    stops = {pair.target: published_projection(pair)["opt"] for pair in PAIRS}
    if unknown := [target for target in targets if target not in stops]:
        raise InvalidInput(f"no S_opt is published for {', '.join(unknown)}; choices: {', '.join(stops)}")
    rows = []
    for warmup in warmups:
        fit = law_fit(warmup)
        for target in targets:
            loss = fit.law.loss(parameters(target), stops[target])
            for plan in staged.best_plans(
                fit.law, *SHAPES[target], loss, earliest=WARMUP, tokens_per_step=TOKENS_PER_STEP
            ):
                switches = ", ".join(f"{stage.layers} x {stage.width} to {stage.last:.0f}" for stage in plan.stages)
                row = {"target": target, "path": plan.path, "warmup": warmup, "rms": fit.rms}
                row |= {"saving": 100 * plan.saving, "continued": plan.continued_flops / plan.scratch_flops}
                rows.append(row | {"switches": switches})
    return pd.DataFrame(rows)


def _crossing(curve: staged.Curve, tau: float) -> float:
    """Step of `staged.crossing`."""
    return float(curve.x[staged.crossing(curve.x, curve.losses, tau)])


def _where_rho_passes(tried: pd.DataFrame, rho: float) -> pd.Series:
    """The row of a saving curve at which its rho, which rises with S_pre, passes the given one."""
    above, below = tried.pre[tried.rho >= rho], tried.pre[tried.rho < rho]
    if above.empty or below.empty:
        raise InvalidInput(f"S_pre / S_target never passes {rho:.3f} on these curves: they must be longer")
    middle = (above.iloc[0] + below.iloc[-1]) / 2
    return tried.loc[(tried.pre - middle).abs().idxmin()]
