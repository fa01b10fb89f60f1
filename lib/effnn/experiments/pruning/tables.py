"""Tables of notebook 01 that are worked out from what was run: samples of the claims, and the times."""

import pandas as pd


def claim_samples(frame: pd.DataFrame, family: str, calibration_seed: int) -> dict[str, list[float]]:
    """Values of the ltp.* claims that the sweep answers, one for each checkpoint seed of one family.

    Points of accuracy on dev, or a ratio of times. Only the calibration draw and the budgets that all checkpoints share
    count.
    """
    chosen = frame[(frame.family == family) & (frame.calibration_seed == calibration_seed)]
    accuracy = chosen.pivot_table(index=["seed", "budget"], columns="method", values="accuracy")
    dense = chosen.groupby("seed").dense_accuracy.first()
    samples: dict[str, list[float]] = {}
    shared = [b for b, group in chosen.groupby("budget") if group.seed.nunique() == chosen.seed.nunique()]
    retrained = chosen[chosen.method == "retrain"]
    if len(retrained):
        samples["ltp.time"] = list((retrained.seconds / retrained.prune_seconds).groupby(retrained.seed).mean())
        if 0.6 in shared:
            at = accuracy.xs(0.6, level="budget")
            samples["ltp.tradeoff"] = list(100 * (at.retrain - at.tune))
    if 0.5 in shared:
        samples["ltp.half"] = list(100 * (dense - accuracy.xs(0.5, level="budget").tune))
    steps = accuracy[accuracy.index.get_level_values("budget").isin(shared)]
    gains = pd.DataFrame(
        {"rearrange": steps["rearrange"] - steps["search"], "tune": steps["tune"] - steps["rearrange"]}
    )
    samples["ltp.stages"] = list(100 * gains.groupby("seed").mean().min(axis=1))
    return samples


def latency_kept(targets: pd.DataFrame) -> tuple[list[float], str]:
    """Return the largest measured latency over its budget, one number per checkpoint, and a note with all of them."""
    over = (targets.measured / targets.budget).groupby(targets.seed).max()
    each = targets.groupby("budget", sort=False).measured.mean()
    note = "measured, mean over checkpoints: " + ", ".join(
        f"{share:.3f} for {budget:g}" for budget, share in each.items()
    )
    refused = int(targets.refused.sum())
    return over.tolist(), note + (f"; {refused} of {len(targets)} refused as impossible" if refused else "")


def time_table(frame: pd.DataFrame, published: pd.DataFrame, epochs: int) -> pd.DataFrame:
    """The talk's table of retraining epochs and end-to-end hours, and below it what was measured here, in turn."""
    rows = []
    for method, group in published.groupby("method", sort=False):
        value = group.set_index("metric").value
        rows.append(
            {"method": method, "epochs": float(value["training epochs"]), "hours": float(value["end-to-end time"])}
        )
    table = pd.DataFrame(rows).assign(source="talk")
    retrained = frame[frame.method == "retrain"]
    here = {"prune_seconds": ("post-training pruning", 0), "seconds": ("prune, then retrain", epochs)}
    for column, (name, count) in here.items():
        if len(retrained):
            table.loc[len(table)] = [name, count, retrained[column].median() / 3600, "measured here"]
    return table.assign(seconds=table.hours * 3600)


def epoch_note(table: pd.DataFrame) -> str:
    """How one epoch of the retraining compares with the pruning, from `time_table`."""
    here = table[table.source == "measured here"].set_index("epochs").seconds
    if 0 not in here or len(here) < 2:
        return "no retraining ran: no ratio"
    epochs = float(here.index.max())
    return f"one epoch of retraining takes {here[epochs] / epochs / here[0]:.1f} times as long as pruning"
