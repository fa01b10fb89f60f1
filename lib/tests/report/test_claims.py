"""The ledger: rules are read and applied as written, every claim has a home, and writing twice changes nothing."""

import json
import math

import pandas as pd
import pytest
from helpers.home import CLAIMS, HEADER, NOTEBOOK, make_home
from hypothesis import given
from hypothesis import strategies as st

from effnn import paths, report
from effnn.base import InvalidInput
from effnn.report import (
    ResultWriter,
    Rule,
    bench,
    claims,
    ledger,
    markers,
    results,
    rules,
    tables,
    verdict_table,
    write_claims,
)
from effnn.report.__main__ import main
from effnn.report.rules import judge

numbers = st.floats(-1e6, 1e6, allow_nan=False)
spans = st.tuples(numbers, numbers).map(sorted).map(tuple)
comparisons = {
    "<=": lambda x, y: x <= y,
    ">=": lambda x, y: x >= y,
    "==": lambda x, y: x == y,
    "<": lambda x, y: x < y,
    ">": lambda x, y: x > y,
}
any_rule = st.one_of(
    st.builds(lambda sign, bound: Rule.parse(f"{sign}{bound!r}"), st.sampled_from(sorted(comparisons)), numbers),
    spans.map(lambda span: Rule.parse(f"{span[0]!r}..{span[1]!r}")),
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    return make_home(tmp_path / "home", monkeypatch)


def record(profile="laptop", notebook=NOTEBOOK, **samples):
    with ResultWriter(notebook, profile, seeds=range(3)) as writer:
        for key, values in samples.items():
            writer.value(f"demo.{key}", samples=values)


def words():
    return {entry.claim.id: entry.verdict.word for entry in ledger()}


# rules


@given(st.sampled_from(sorted(comparisons)), numbers, numbers)
def test_a_comparison_is_what_it_says(sign, bound, value):
    rule = Rule.parse(f" {sign} {bound!r} ")
    assert rule.holds(value) == comparisons[sign](value, bound)
    assert rule.holds(bound) == ("=" in sign)
    assert not rule.holds(math.nan)


@given(spans, numbers)
def test_a_range_includes_its_ends(span, value):
    rule = Rule.parse(f"{span[0]!r}..{span[1]!r}")
    assert rule.holds(value) == (span[0] <= value <= span[1])
    assert rule.holds_over(span)


@given(any_rule, spans, st.floats(0, 1))
def test_over_an_interval_means_at_every_point(rule, span, share):
    inside = min(max(span[0] + share * (span[1] - span[0]), span[0]), span[1])
    if rule.holds_over(span):
        assert rule.holds(inside)
    else:
        assert not all(rule.holds(end) for end in span)


@given(any_rule, any_rule, numbers)
def test_the_weaker_rule_is_true_wherever_the_stronger_is(weak, strong, value):
    if weak.contains(strong) and strong.holds(value):
        assert weak.holds(value)
    assert weak.contains(weak)


@given(any_rule)
def test_a_rule_reads_back_its_own_text(rule):
    assert Rule.parse(str(rule)) == rule


@pytest.mark.parametrize("text", ["", "  "])
def test_no_rule(text):
    assert Rule.parse(text) is None


@pytest.mark.parametrize(
    "text", ["1", "=1", "=>1", "<= ", "<=nan", "<=inf", "2..1", "1...2", "<=1,000", "~1", ">1e999"]
)
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(InvalidInput, match="rule"):
        Rule.parse(text)


@given(st.text(max_size=12))
def test_any_text_is_a_rule_nothing_or_an_error(text):
    try:
        rule = Rule.parse(text)
    except InvalidInput:
        return
    assert (rule is None) == (not text.strip())


# verdicts


def given_rules(kind, held, direction, *measured, **more):
    return judge(kind, Rule.parse(held), Rule.parse(direction), *measured, **more)


@pytest.mark.parametrize(
    ("held", "direction", "value", "interval", "word"),
    [
        ("<=1", "<=3", 0.5, (0.2, 0.8), rules.HELD),
        ("<=1", "<=3", 0.5, (0.0, 1.0), rules.HELD),
        ("<1", "<=3", 0.5, (0.0, 1.0), rules.IN_DIRECTION),
        ("<=1", "<=3", 1.5, (0.5, 2.5), rules.IN_DIRECTION),
        ("<=1", "<=3", 0.9, (-3.0, 4.8), rules.IN_DIRECTION),  # the first on the mean only
        ("<=1", "<=3", 1.5, (-1.0, 4.0), rules.DID_NOT_HOLD),
        ("<=1", "<=3", 5.0, (4.0, 6.0), rules.DID_NOT_HOLD),
        (">0", "", 0.5, (0.1, 0.9), rules.HELD),
        (">0", "", 0.5, (-0.1, 1.1), rules.IN_DIRECTION),  # the rule itself, on the mean only
        (">0", "", -0.5, (-1.1, 0.1), rules.DID_NOT_HOLD),
        ("0.5..2", "0.1..10", 1.0, (0.6, 1.4), rules.HELD),
        ("0.5..2", "0.1..10", 1.0, (0.4, 1.6), rules.IN_DIRECTION),
        ("<=1", "<=3", 0.5, None, rules.IN_DIRECTION),  # too few samples for more
        ("<=1", "<=3", 2.0, None, rules.IN_DIRECTION),
        ("<=1", "<=3", 4.0, None, rules.DID_NOT_HOLD),
        (">0", "", 0.5, None, rules.IN_DIRECTION),
        (">0", "", -0.5, None, rules.DID_NOT_HOLD),
    ],
)
def test_verdict_over_the_interval(held, direction, value, interval, word):
    given_verdict = given_rules("direction", held, direction, value, interval)
    assert given_verdict.word == word
    assert held in given_verdict.reason and rules.number(value) in given_verdict.reason
    if interval is None:
        assert "of the 3 paired samples" in given_verdict.reason
    else:
        assert rules.span_text(interval) in given_verdict.reason


def test_an_exact_quantity_needs_one_value_but_all_its_samples():
    one = given_rules("exact", "==1", "", 1.0)
    assert one.word == rules.HELD and "one value suffices" in one.reason
    assert given_rules("exact", "==1", "", 0.999).word == rules.DID_NOT_HOLD
    assert given_rules("exact", "<=1e-5", "", 2e-6, (-1e-6, 5e-6), samples=[1e-6, 2e-6, 3e-6]).word == rules.HELD
    assert given_rules("exact", "<=1e-5", "", 5e-6, samples=[1e-6, 2e-6, 2e-5]).word == rules.DID_NOT_HOLD
    assert given_rules("exact", "<=1e-5", "<=1e-3", 1e-4).word == rules.IN_DIRECTION


def test_not_attempted_says_what_it_needs_and_figures_are_seen():
    missing = given_rules("value", "<=1", "", None, note="needs a GPU")
    assert (missing.word, missing.reason) == (rules.NOT_ATTEMPTED, "needs a GPU")
    assert given_rules("figure", "", "", None, note="x").word == rules.SEE_FIGURE
    assert given_rules("table", "", "", 3.0).word == rules.SEE_TABLE
    with pytest.raises(InvalidInput, match="kinds are"):
        given_rules("guess", "<=1", "", 1.0)


@given(any_rule, any_rule, numbers, st.lists(numbers, min_size=3, max_size=5))
def test_held_is_never_said_unless_the_rule_is_true_throughout(held, direction, value, samples):
    span = (min(samples), max(samples))
    word = judge("value", held, direction, value, span).word
    assert (word == rules.HELD) == held.holds_over(span)
    assert judge("value", held, direction, value, None).word != rules.HELD


# the rows of the project


def test_the_rows_are_those_of_the_talk_and_every_method_has_some():
    found = claims.rows()
    methods = {claim.id.partition(".")[0] for claim in found}
    assert {"ltp", "tokens", "staged", "tasc", "dqrm", "comm"} <= methods
    assert len({claim.id for claim in found}) == len(found) > 30


def test_a_notebook_that_exists_has_recorded_every_claim_that_it_answers():
    built = {path.stem[:2]: path.stem for path in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")}
    assert "01" in built
    for claim in claims.rows():
        if claim.notebook in built and claim.profile == "laptop" and claim.kind not in ("figure", "table"):
            recorded = results.load("laptop", built[claim.notebook])
            assert recorded is not None and claim.id in recorded.values, claim.id


def test_the_committed_ledger_is_the_one_that_the_committed_results_give():
    """Verdicts, values and intervals; `make claims` writes the files again."""
    listed = json.loads((paths.RESULTS / "claims.json").read_text(encoding="utf-8"))
    found = ledger()
    assert [row["id"] for row in listed] == [entry.claim.id for entry in found]
    for row, entry in zip(listed, found, strict=True):
        assert (row["verdict"], row["reason"]) == (entry.verdict.word, entry.verdict.reason), row["id"]
        assert row["value"] == (entry.result.value if entry.result else None), row["id"]
    assert (paths.RESULTS / "CLAIMS.md").read_text(encoding="utf-8") == tables.claims_markdown(found)
    readme = (paths.HOME / "README.md").read_text(encoding="utf-8")
    assert markers.fill(readme, "claims", tables.readme_lines(found)) == readme
    assert (paths.RESULTS / "BENCH.md").read_text(encoding="utf-8") == bench.bench_markdown()


def test_the_ledger_agrees_with_the_rules_taken_one_by_one():
    """Plain arithmetic on the samples that results.json holds: mean, t interval, comparison."""
    from scipy.stats import t as student

    compare = {"<=": lambda x, y: x <= y, ">=": lambda x, y: x >= y}
    seen = 0
    for row in json.loads((paths.RESULTS / "claims.json").read_text(encoding="utf-8")):
        samples = row["samples"]
        if len(samples) < 3 or row["held"][:2] not in compare or row["verdict"] in (rules.NOT_BUILT, rules.NO_RESULT):
            continue
        middle = sum(samples) / len(samples)
        error = math.sqrt(sum((x - middle) ** 2 for x in samples) / (len(samples) - 1) / len(samples))
        half = student.ppf(0.975, len(samples) - 1) * error
        throughout = all(compare[row["held"][:2]](middle + sign * half, float(row["held"][2:])) for sign in (-1, 1))
        assert row["value"] == pytest.approx(middle)
        assert row["spread"] == pytest.approx([middle - half, middle + half])
        assert (row["verdict"] == rules.HELD) == throughout, row["id"]
        seen += 1
    assert seen >= 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.b,s,c,guess,,u,<=1,,01,laptop", r"line 2 \(a.b\): unknown kind 'guess'"),
        ("a.b,s,c,value,,u,about 1,,01,laptop", "rule 'about 1'"),
        ("a.b,s,c,value,,u,<=1,about 3,01,laptop", "rule 'about 3'"),
        ("a.b,s,c,value,many,u,<=1,,01,laptop", "published 'many' is not a number"),
        ("a.b,s,c,value,nan,u,<=1,,01,laptop", "published 'nan' is not a number"),
        ("a.b,s,c,value,,u,,,01,laptop", "needs a `held` rule"),
        ("a.b,s,c,value,,u,<=3,<=1,01,laptop", "must be weaker"),
        ("a.b,s,c,value,,u,<=1,,1,laptop", "two digits"),
        ("a.b,s,c,value,,u,<=1,,01,smoke", "unknown profile 'smoke'"),
        ("Upper,s,c,value,,u,<=1,,01,laptop", "id 'Upper'"),
        ("a.b,s,c,value,,u,<=1,,01", "too few cells"),
        ("a.b,s,c, d,value,,u,<=1,,01,laptop", "too many or too few cells"),
        ("a.b,s,c,value,,u,<=1,,01,laptop\na.b,s,c,value,,u,<=1,,01,laptop", "line 3.*twice"),
    ],
)
def test_a_wrong_row_is_refused_naming_file_and_line(home, row, message):
    paths.CLAIMS.write_text(HEADER + row + "\n")
    with pytest.raises(InvalidInput, match=message) as caught:
        claims.rows()
    assert "claims.csv line" in str(caught.value)


def test_extra_columns_are_welcome_and_missing_ones_refused(home):
    paths.CLAIMS.write_text(CLAIMS.replace("profile\n", "profile,why\n", 1).replace("laptop\n", "laptop,loosened\n"))
    assert len(claims.rows()) == 6
    paths.CLAIMS.write_text(HEADER.replace("unit,", "") + "\n")
    with pytest.raises(InvalidInput, match=r"missing column\(s\) unit"):
        claims.rows()


# the ledger


def test_what_is_not_there_is_said_with_the_command_that_makes_it(home):
    found = {entry.claim.id: entry.verdict for entry in ledger()}
    assert found["later.thing"].word == rules.NOT_BUILT
    assert found["demo.loss"].word == rules.NO_RESULT
    assert "make reproduce NOTEBOOK=01" in found["demo.loss"].reason
    assert "make study" in found["demo.study"].reason
    record(loss=[0.1, 0.2, 0.3])
    found = {entry.claim.id: entry.verdict for entry in ledger()}
    assert found["demo.loss"].word == rules.HELD
    assert found["demo.exact"].word == rules.NO_RESULT and "has no value" in found["demo.exact"].reason


def test_verdicts_follow_the_results(home):
    record(loss=[1.4, 1.5, 1.6], exact=[1.0], strict=[-1.0, 0.5, 2.0], picture=[1.0])
    assert words() == {
        "demo.loss": rules.IN_DIRECTION,
        "demo.exact": rules.HELD,
        "demo.study": rules.NO_RESULT,
        "demo.strict": rules.IN_DIRECTION,
        "demo.picture": rules.SEE_FIGURE,
        "later.thing": rules.NOT_BUILT,
    }
    record(loss=[7.0, 7.1, 7.2])
    assert words()["demo.loss"] == rules.DID_NOT_HOLD


@pytest.mark.parametrize(("load", "said"), [(None, False), (0.5, False), (3.0, False), (3.1, True), (8.0, True)])
def test_a_time_measured_on_a_busy_machine_says_so(home, monkeypatch, load, said):
    monkeypatch.setattr(report.provenance, "cores", lambda: 2)
    with ResultWriter(NOTEBOOK, "laptop") as writer:
        writer.value("demo.loss", samples=[0.1, 0.2, 0.3], load=load)
        reasons = [verdict_table(["demo.loss"], writer).reason["demo.loss"]]
    entry = next(entry for entry in ledger() if entry.claim.id == "demo.loss")
    assert entry.verdict.word == rules.HELD and entry.result.load == load
    tables.write_claims()
    reasons += [entry.verdict.reason, (paths.RESULTS / "CLAIMS.md").read_text()]
    words = f"measured on a busy machine (load {load:.1f} on 2 cores)" if said else "measured on a busy machine"
    assert all((words in text) == said for text in reasons)


def test_results_carry_the_load_at_start_and_end(home, monkeypatch):
    loads = iter([1.25, 7.5, float("nan"), float("nan")])
    monkeypatch.setattr(report.results, "load_average", lambda: next(loads))
    monkeypatch.setattr(report.provenance, "load_average", lambda: next(loads))
    ResultWriter(NOTEBOOK, "laptop").finish()
    origin = report.load("laptop", NOTEBOOK).provenance
    assert (origin["load_start"], origin["load_end"]) == (1.25, 7.5)
    assert "s, load 1.2 to 7.5; " in tables.origin_text(origin)
    ResultWriter(NOTEBOOK, "laptop").finish()
    origin = report.load("laptop", NOTEBOOK).provenance
    assert (origin["load_start"], origin["load_end"]) == (None, None) and "load" not in tables.origin_text(origin)


def test_a_study_claim_is_answered_by_the_study_else_by_the_laptop_and_labelled(home):
    record("laptop", study=[5.0, 6.0, 7.0])
    entry = next(entry for entry in ledger() if entry.claim.id == "demo.study")
    assert (entry.verdict.word, entry.answered_by) == (rules.IN_DIRECTION, "laptop")
    assert "laptop" in entry.verdict.reason and "(laptop)" in tables.ours(entry)
    record("study", study=[25.0, 26.0, 27.0], loss=[9.0, 9.1, 9.2])
    entry = next(entry for entry in ledger() if entry.claim.id == "demo.study")
    assert (entry.verdict.word, entry.answered_by) == (rules.HELD, "study")
    assert words()["demo.loss"] == rules.NO_RESULT  # a laptop claim is not answered by the study


@pytest.mark.parametrize("profile", ["smoke", "paper", "mine"])
def test_other_profiles_never_enter(home, profile):
    record(profile, loss=[0.1, 0.2, 0.3])
    assert words()["demo.loss"] == rules.NO_RESULT


def test_a_corrupt_result_file_stops_the_ledger(home, caplog):
    record(loss=[0.1, 0.2, 0.3])
    (paths.RESULTS / "laptop" / NOTEBOOK / "results.json").write_text('{"values": {')
    with pytest.raises(InvalidInput, match="results.json is not a result file"):
        ledger()
    assert main(["claims"]) == 1
    assert "make reproduce NOTEBOOK=01" in caplog.text


def test_two_notebooks_of_one_number_are_refused(home):
    (paths.NOTEBOOKS / "01_other.ipynb").write_text("{}")
    with pytest.raises(InvalidInput, match="several notebooks"):
        ledger()


def test_data_that_differ_between_laptop_and_study_are_said(home):
    for profile, digest in (("laptop", "a" * 64), ("study", "b" * 64)):
        writer = ResultWriter(NOTEBOOK, profile)
        writer.fingerprint("text", digest)
        writer.finish()
    assert "not comparable" in claims.data_notes(NOTEBOOK)[0]
    assert "not comparable" in tables.claims_markdown(ledger())


# files


def test_files_are_complete_and_a_second_run_changes_nothing(home):
    record(loss=[0.1, 0.2, 0.3], exact=[1.0])
    record("study", study=[25.0, 26.0, 27.0])
    assert main(["claims"]) == 0
    names = [paths.RESULTS / name for name in ("claims.json", "CLAIMS.md", "BENCH.md")] + [home / "README.md"]
    first = [path.read_bytes() for path in names]
    write_claims()
    assert [path.read_bytes() for path in names] == first
    listed = json.loads(first[0])
    assert [row["id"] for row in listed] == [claim.id for claim in claims.rows()]
    wanted = "id slide claim verdict value spread published unit reason provenance notebook profile".split()
    assert all(set(wanted) <= row.keys() for row in listed)
    loss = next(row for row in listed if row["id"] == "demo.loss")
    assert loss["verdict"] == "held" and loss["spread"][0] < loss["value"] < loss["spread"][1]
    assert loss["provenance"]["file"] == "results/laptop/01_demo/results.json"
    ledger_page, bench_page, readme = (text.decode() for text in first[1:])
    assert all(claim.id in ledger_page for claim in claims.rows())
    assert "| **held** |" in ledger_page and "26 [" in ledger_page and "(study)" in ledger_page
    assert "`demo.speed`" in bench_page and "`later.speed`" in bench_page
    assert readme.startswith("# Demo\n") and readme.endswith("last line\n") and "\nold\n" not in readme
    assert "| [01 A demonstration](notebooks/01_demo.ipynb) | 5 | 3 held, 2 no result yet |" in readme
    assert "Not built yet: 1 claims (1 in 02 later)." in readme


def test_a_readme_without_markers_is_refused_and_left_alone(home):
    (home / "README.md").write_text("# Demo\n")
    with pytest.raises(InvalidInput, match="README.md.*claims:begin"):
        write_claims()
    assert (home / "README.md").read_text() == "# Demo\n"


@given(st.text(), st.text(), st.text(max_size=30))
def test_filling_twice_is_filling_once(before, after, body):
    text = f"{before}<!-- x:begin -->anything<!-- x:end -->{after}"
    if any("<!-- x:" in part for part in (before, after, body)):
        return
    once = markers.fill(text, "x", body)
    assert markers.fill(once, "x", body) == once
    assert once.startswith(before) and once.endswith(after)


@pytest.mark.parametrize("text", ["", "<!-- x:begin -->", "<!-- x:end --><!-- x:begin -->"])
def test_wrong_markers_are_refused(text):
    with pytest.raises(InvalidInput, match="expected one"):
        markers.fill(text, "x", "body")


def test_cells_cannot_break_a_markdown_table():
    assert markers.table(["a"], [["x | y\nz"]]).splitlines()[-1] == r"| x \| y z |"


def test_verdict_table_in_a_notebook(home):
    writer = ResultWriter(NOTEBOOK, "smoke")
    writer.value("demo.loss", samples=[0.1, 0.2, 0.3])
    table = verdict_table(["demo.loss", "demo.exact"], writer)
    assert isinstance(table, pd.DataFrame)
    assert table.verdict.to_dict() == {"demo.loss": rules.HELD, "demo.exact": rules.NO_RESULT}
    assert list(verdict_table("demo", writer).index) == [c.id for c in claims.rows() if c.id.startswith("demo.")]
    with pytest.raises(InvalidInput, match="no claim demo.lost"):
        verdict_table(["demo.lost"], writer)
    with pytest.raises(InvalidInput, match="prefixes are demo, later"):
        verdict_table("dem", writer)


# benchmarks


def test_bench_table_puts_the_bar_beside_the_median(home):
    assert bench.bench().state.tolist() == ["not measured", "not built yet"]
    (home / "notebooks" / "02_later.ipynb").write_text('{"cells": []}')
    measured = {"median": 1.25, "min": 1.2, "max": 1.4, "runs": [1.2, 1.25, 1.4], "unit": "ratio", "note": ""}
    keys = {"demo.speed": measured, "later.speed": measured}
    (paths.RESULTS / "bench.json").write_text(json.dumps(keys))
    assert bench.bench().state.tolist() == ["meets the bar", "misses the bar"]
    assert (
        "| `demo.speed` | <=1.5 | 1.25 [1.2, 1.4], 3 runs | meets the bar | ours over theirs |" in bench.bench_table()
    )
    for share, state in ((0.9, "meets the bar"), (1.01, "misses the bar")):
        bounded = measured | {"details": {"peak_over_bound": share, "peak_bytes": 5.0}}
        (paths.RESULTS / "bench.json").write_text(json.dumps({"demo.speed": bounded}))
        assert bench.bench().state[0] == state
        assert f"3 runs; peak over bound {share} | {state}" in bench.bench_table()
    busy = measured | {"load": [0.5, 9.0, float("nan")], "provenance": {"cores": 4}}
    (paths.RESULTS / "bench.json").write_text(json.dumps({"demo.speed": busy}))
    assert bench.bench().state[0] == "meets the bar, measured on a busy machine (load 9.0 on 4 cores)"
    (paths.RESULTS / "bench.json").write_text('{"demo.speed": {}}')
    with pytest.raises(InvalidInput, match="bench.json is damaged"):
        bench.bench()


def test_the_projects_bars_can_be_read():
    assert len(bench.bench()) >= 19 and len(bench.bench_table().splitlines()) >= 21
