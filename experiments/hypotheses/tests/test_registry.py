"""The registry, and what is refused of a study's own file, in one line that names the place."""

import re
from pathlib import Path

import planted
import pytest
import yaml

from experiments.hypotheses.measures import Evidence
from experiments.hypotheses.registry import MEASURES, find, load_registry
from peft_vit.base.errors import UserError
from peft_vit.lab.analysis import analyze
from peft_vit.lab.analysis.findings import SENTENCES

pytestmark = pytest.mark.part("analyzer")

ENTRY = """\
hypotheses:
  - id: mine
    sentence: Int8 is at least as good
    measure: accuracy_against_float
    parameters: {of: {methods: [qa_lora]}}
    unit: share
    margin: 0.01
    test: noninferiority
    family: mine
    needs: [quantization]
    refuted_by: a loss above the margin
    source: me
"""


def own(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    return file


def test_every_sentence_says_what_would_refute_it_or_why_nothing_can() -> None:
    registry = load_registry()
    for hypothesis in registry.hypotheses:
        assert (hypothesis.refuted_by is None) == (hypothesis.test in ("described", "untestable"))
        assert (hypothesis.reason is None) != (hypothesis.refuted_by is None)
    assert {h.id for h in registry.hypotheses if h.test == "untestable"} == {
        "interpretable",
        "simple",
        "first",
        "novel",
    }
    assert {h.measure for h in registry.hypotheses} - {None} == MEASURES.keys(), "each measure is in use"


def test_findings_of_reports_are_those_of_the_registry() -> None:
    ours = {one.id: one for one in load_registry().hypotheses}
    for sentence in SENTENCES:
        entry = ours[sentence.id]
        assert (entry.sentence, entry.test, entry.unit) == (sentence.text, sentence.test, sentence.unit)
        assert (entry.margin, entry.expected) == (sentence.margin, sentence.expected)
        assert entry.family in (sentence.family or sentence.id, None)
    analysis = analyze(planted.study_of(planted.quickstart(seeds=tuple(range(8)))))
    by_registry = {
        (one.sentence.id, one.subject): one for one in find([Evidence(analysis.study)], load_registry(), "one")
    }
    assert {one.verdict for one in analysis.findings} == {"supported", "refuted", "not decided"}
    assert {one.sentence.id for one in analysis.findings} == {sentence.id for sentence in SENTENCES}
    for one in analysis.findings:
        again = by_registry[one.sentence.id, one.subject]
        assert again.by_seed == pytest.approx(one.by_seed, abs=1e-12)
        assert (again.verdict, again.outcome, again.test, again.note) == (one.verdict, one.outcome, one.test, one.note)
        assert (again.adjusted_p, again.opposite_p, again.n_of) == (one.adjusted_p, one.opposite_p, one.n_of)


def test_an_entrys_digest_is_of_its_content_not_of_its_form(tmp_path) -> None:
    plain = load_registry(own(tmp_path, ENTRY)).digests["mine"]
    (content,) = yaml.safe_load(ENTRY)["hypotheses"]
    turned = yaml.safe_dump({"hypotheses": [dict(reversed(content.items()))]}, sort_keys=False, width=30)
    assert load_registry(own(tmp_path, f"# a comment\n{turned}")).digests["mine"] == plain
    assert load_registry(own(tmp_path, ENTRY.replace("0.01", "0.02"))).digests["mine"] != plain


def test_a_digest_covers_the_family_that_the_test_is_corrected_over(tmp_path) -> None:
    second = ENTRY.removeprefix("hypotheses:\n").replace("id: mine", "id: other")
    both = load_registry(own(tmp_path, ENTRY + second)).digests
    alone = load_registry(own(tmp_path, ENTRY)).digests
    moved = load_registry(own(tmp_path, ENTRY + second.replace("family: mine", "family: other"))).digests
    assert both["mine"] != alone["mine"], "without the other, Holm's correction would be gone and the mark still there"
    assert moved["mine"] == alone["mine"] != both["mine"]
    packaged = load_registry().digests
    assert {id_: both[id_] for id_ in packaged} == packaged, "own families leave those that come along as they are"
    turned = "hypotheses:\n" + second + ENTRY.removeprefix("hypotheses:\n")
    assert load_registry(own(tmp_path, turned)).digests == both


def test_an_own_file_adds(tmp_path) -> None:
    registry = load_registry(own(tmp_path, ENTRY))
    assert [h.id for h in registry.hypotheses] == [*(h.id for h in load_registry().hypotheses), "mine"]


@pytest.mark.parametrize(
    ("change", "to", "line", "expected"),
    [
        ("id: mine", "id: attention-over-mlp", 2, "the id 'attention-over-mlp' stands in hypotheses.yaml already"),
        ("accuracy_against_float", "accuracy", 4, "there is no measure 'accuracy'; there are above_majority, "),
        ("{of: {methods", "{off: {methods", 5, "hypotheses[0].parameters.off: unknown key here"),
        ("[qa_lora]", "[qlora]", 5, "hypotheses[0].parameters.of.methods[0]"),
        ("{methods: [qa_lora]}", "{where: {qa_lora.bits: 4}}", 5, "an experiment has no setting 'qa_lora.bits'"),
        ("{methods: [qa_lora]}", "{where: {qa_lora.rank: four}}", 5, "qa_lora.rank is never 'four'"),
        ("    margin: 0.01\n", "", 2, "test: noninferiority needs the field 'margin'; add it"),
        ("margin: 0.01", "margin: 0", 2, "test: noninferiority needs a margin above 0"),
        ("unit: share", "unit: points", 6, "the measure's unit is 'share', not 'points'"),
        ("noninferiority", "inferiority", 8, "hypotheses[0].test: "),
        ("    family: mine\n", "", 2, "needs the field 'family'"),
        ("[quantization]", "[quantisation]", 2, "a record has no field 'quantisation'"),
        ("    source: me\n", "", 2, "hypotheses[0].source: is missing"),
        ("source: me", "sauce: me", 12, "hypotheses[0].sauce: unknown key here"),
        ("refuted_by: a loss above the margin", "reason: none", 2, "needs the field 'refuted_by'"),
        ("id: mine", "id: Mine!", 2, "hypotheses[0].id: "),
        ("hypotheses:", "hypothesis:", 1, "hypothesis: unknown key here"),
    ],
)
def test_what_is_refused(tmp_path, change, to, line, expected) -> None:
    assert change in ENTRY
    file = own(tmp_path, ENTRY.replace(change, to))
    with pytest.raises(UserError) as refused:
        load_registry(file)
    assert str(refused.value).startswith(f"{file}:{line}: ")
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_id_twice_is_refused(tmp_path) -> None:
    file = own(tmp_path, ENTRY + ENTRY.removeprefix("hypotheses:\n"))
    with pytest.raises(UserError, match=r"own\.yaml:13: hypotheses\[1\]\.id: the id 'mine' stands twice; rename one"):
        load_registry(file)


@pytest.mark.parametrize("field", ["margin: 0.1", "family: mine", "needs: [steps]", "refuted_by: nothing"])
def test_what_an_untestable_sentence_needs_not(tmp_path, field) -> None:
    text = f"hypotheses:\n  - {{id: mine, sentence: s, test: untestable, reason: r, source: me, {field}}}\n"
    with pytest.raises(UserError, match="has no effect with test: untestable; remove it"):
        load_registry(own(tmp_path, text))


def test_a_reference_that_names_nothing_is_refused(tmp_path) -> None:
    text = ENTRY.replace("accuracy_against_float", "difference").replace(
        "{of: {methods: [qa_lora]}}", "{of: {}, against: {}, quantity: test_accuracy, better: higher}"
    )
    with pytest.raises(UserError, match=r"parameters\.against: says nothing of what to compare with"):
        load_registry(own(tmp_path, text))


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_what_is_no_file_is_refused(tmp_path, name) -> None:
    with pytest.raises(UserError, match="is no file"):
        load_registry(tmp_path / name)


def test_the_documentation_names_every_measure_and_its_example_loads(tmp_path) -> None:
    document = (Path(__file__).parents[1] / "docs/hypotheses.md").read_text()
    (example,) = (block for block in re.findall(r"```yaml\n(.*?)```", document, re.DOTALL) if "hypotheses:\n" in block)
    assert load_registry(own(tmp_path, example)).hypotheses[-1].id == "rank-8-is-enough"
    table = document[document.index("| measure |") :]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == MEASURES.keys()
