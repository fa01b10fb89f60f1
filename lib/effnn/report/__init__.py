"""Results with provenance, published numbers, the claims ledger, figures and the report: see README.md beside this."""

from effnn.report import bench, claims, figures, provenance, published, results, rules, tables
from effnn.report.bench import bench_table
from effnn.report.claims import Claim, ledger, verdict, verdict_table
from effnn.report.figures import (
    LINE_STYLES,
    MARKERS,
    PALETTE,
    band,
    draw_published,
    heatmap,
    legend_outside,
    new_figure,
    use_style,
)
from effnn.report.html import build_report
from effnn.report.results import Results, ResultWriter, Value, load
from effnn.report.rules import Rule, Verdict
from effnn.report.tables import write_claims

__all__ = [
    "LINE_STYLES",
    "MARKERS",
    "PALETTE",
    "Claim",
    "ResultWriter",
    "Results",
    "Rule",
    "Value",
    "Verdict",
    "band",
    "bench",
    "bench_table",
    "build_report",
    "claims",
    "draw_published",
    "figures",
    "heatmap",
    "ledger",
    "legend_outside",
    "load",
    "new_figure",
    "provenance",
    "published",
    "results",
    "rules",
    "tables",
    "use_style",
    "verdict",
    "verdict_table",
    "write_claims",
]
