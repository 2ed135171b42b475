"""ConceptPrompt: checks, files, and how the router applies a concept."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hostile_concepts import hostile_files
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptseg_hf import ConceptPrompt, ConceptSegmentationPipeline, ShortcutRouter
from conceptseg_hf.concept_prompt import CandidateScore, as_concept, concept_hash

GREEDY = {"max_new_tokens": 6}
SCORES = (CandidateScore("red star", 0.8, (0.9, 0.7)), CandidateScore("star", 0.4, (0.5, 0.3)))


def make_concept(**changes) -> ConceptPrompt:
    fields = {"prompt": "the odd one out", "phrases": ("red star",), "rule": "find red", "threshold": 0.2}
    return ConceptPrompt(**{**fields, "score": 0.8, "scores": SCORES, **changes})


def same(first: ConceptPrompt, second: ConceptPrompt) -> bool:
    tokens = first.concept_embeds, second.concept_embeds
    others = [{**vars(each), "concept_embeds": None} for each in (first, second)]
    return others[0] == others[1] and (tokens[0] is tokens[1] is None or torch.equal(tokens[0], tokens[1]))


@pytest.mark.parametrize("tokens", [None, torch.arange(12.0).view(3, 4)])
def test_file_round_trip(tmp_path, tokens):
    scores = {
        "reasoning_score": 0.5,
        "reasoning_ious": (0.25, 0.75),
        "rule_score": 0.625,
        "rule_ious": (0.5, 0.75),
    }
    concept = make_concept(concept_embeds=tokens, model_hash="abc", **scores)
    path = concept.save(tmp_path / "c.safetensors")
    assert same(ConceptPrompt.load(path), concept) and same(as_concept(str(path)), concept)
    assert as_concept(concept) is concept
    header = path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]]
    assert "the odd one out" in json.loads(json.loads(header)["__metadata__"]["concept"])["prompt"]


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.text(), st.floats(0, 1), st.none() | st.floats(0, 1))
def test_any_text_survives_a_file(tmp_path_factory, phrase, rule, threshold, score):
    try:
        (phrase + rule).encode()
    except UnicodeEncodeError:
        return  # an unpaired surrogate, which the processor refuses
    concept = make_concept(phrases=(phrase,), rule=rule, threshold=threshold, score=score)
    path = concept.save(tmp_path_factory.mktemp("any") / "c.safetensors")
    assert same(ConceptPrompt.load(path), concept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phrases": ()}, "neither phrases nor concept tokens"),
        ({"phrases": (" ",)}, "phrase 0 is ' '"),
        ({"phrases": ("x" * 20_000,)}, "phrase 0 has 20000 characters"),
        ({"prompt": ""}, "prompt is ''"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"score": float("nan")}, "score is nan"),
        ({"concept_embeds": torch.zeros(3)}, r"shape \(3,\)"),
        ({"concept_embeds": torch.full((2, 4), float("nan"))}, "not finite"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        make_concept(**changes)


@pytest.mark.parametrize(
    ("ious", "reasoning", "reliable"),
    [
        ((0.8, 0.8, 0.8, 0.8), (0.8, 0.8, 0.8, 0.8), True),
        ((0.8, 0.8, 0.8, 0.8), (0.86, 0.86, 0.86, 0.86), False),  # more than 0.05 below reasoning
        ((0.9, 0.9, 0.2, 0.9), (0.5, 0.5, 0.5, 0.5), True),  # mean 0.72, cautious mean 0.64
        ((0.9, 0.9, 0.2, 0.9), (0.7, 0.7, 0.7, 0.7), False),  # 0.65 required
        ((0.5, 0.2, 0.2, 0.4), (0.0, 0.0, 0.0, 0.0), False),  # mean 0.33, cautious mean 0.29
        ((0.9, 0.9, 0.1, 0.9), (0.5, 0.5, 0.5, 0.5), False),  # misses one of four references
        ((0.9, 0.9, 0.1, 0.9, 0.9), (0.5, 0.5, 0.5, 0.5, 0.5), True),  # misses less than a quarter
        ((0.1, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9), (0.5,) * 8, False),  # misses a quarter
        ((0.9, 0.9, 0.3, 0.9), (0.5, 0.5, 0.9, 0.8), True),  # difference 0.08, cautiously -0.04
        ((0.9, 0.9, 0.3, 0.9), (0.5, 0.5, 0.98, 0.85), False),  # difference 0.04, cautiously -0.09
        ((0.7, 0.7), (), True),  # reasoning is known on other references only
        ((), (), True),  # the score of a candidate without those of the references
    ],
)
def test_a_concept_is_reliable_if_it_is_cautiously_as_good_as_reasoning(ious, reasoning, reliable):
    score = sum(ious) / len(ious) if ious else 0.7
    concept = make_concept(
        score=score,
        scores=(CandidateScore("red star", score, ious),),
        reasoning_score=sum(reasoning) / len(reasoning) if reasoning else 0.6,
        reasoning_ious=reasoning,
    )
    assert concept.is_reliable is reliable
    assert ("full reasoning" in concept.summary()) is not reliable


def test_a_rule_that_misses_a_reference_is_not_reliable():
    verified = {"rule": "the lowest object", "rule_score": 0.7, "reasoning_score": 0.4}
    assert make_concept(**verified, rule_ious=(0.9, 0.2, 0.9, 0.9)).rule_is_reliable
    assert not make_concept(**verified, rule_ious=(0.9, 0.1, 0.9, 0.9)).rule_is_reliable
    assert make_concept(**verified).rule_is_reliable, "a file without the IoU on each reference"
    assert make_concept(**verified, rule_ious=(0.9, 0.9)).with_rule("the star").rule_ious == ()


def test_the_summary_names_missed_references():
    scores = (CandidateScore("star", 0.69, (0.9, 0.96, 0.0, 0.9)),)
    concept = make_concept(score=0.69, scores=scores, reasoning_score=0.3)
    assert concept.summary() == (
        "'red star' explains the references with a mean IoU of 0.69. It misses 1 of 4 references, so the adaptive "
        "router uses full reasoning; reference 2 fits worst (0.00)."
    )


@pytest.mark.parametrize(
    ("rule", "rule_score", "reasoning_score", "reliable"),
    [("red", 0.7, 0.6, True), ("red", 0.69, 0.6, False), ("red", None, 0.6, False), (None, 0.9, 0.6, False)],
)
def test_a_rule_is_reliable_if_it_is_better_than_reasoning(rule, rule_score, reasoning_score, reliable):
    concept = make_concept(rule=rule, rule_score=rule_score, reasoning_score=reasoning_score, score=0.2)
    assert concept.rule_is_reliable is reliable and not concept.is_reliable
    assert ("uses the rule" in concept.summary()) is reliable
    edited = concept.with_rule("the blue one")
    assert edited.rule_score is None and not edited.rule_is_reliable


def test_the_router_has_three_tiers(model, processor, picture):
    inputs = processor([picture(0), picture(1)], "the odd one out")

    def tiers(concept, router="adaptive", **options):
        results = model.segment(inputs, router, GREEDY, processor=processor, concept=concept, **options)
        return {(result.route, result.route_reason, result.rule) for result in results}

    verified = {"rule": "the red star", "rule_score": 0.9, "reasoning_score": 0.5}
    low = {"score": 0.2, **verified}
    accepted = tiers(make_concept(threshold=0.0, **verified))
    assert {(route, rule) for route, _, rule in accepted} == {("concept", None)}
    assert all(reason.endswith("reaches the threshold 0.00") for _, reason, _ in accepted)
    assert tiers(make_concept(**low)) == {("rule", "the concept is not reliable", "the red star")}
    assert tiers(make_concept(score=None, **verified)) == {
        ("rule", "the concept is not verified", "the red star")
    }
    declined = tiers(make_concept(threshold=1.0, **verified))
    assert {(route, rule) for route, _, rule in declined} == {("rule", "the red star")}
    assert all("is below the threshold 1.00" in reason for _, reason, _ in declined)
    unverified = make_concept(**{**low, "rule_score": 0.5})
    assert {route for route, _, _ in tiers(unverified)} == {"reasoning"}
    forced = tiers(make_concept(**low), "full_reasoning")
    assert {(route, reason) for route, reason, _ in forced} == {("reasoning", "router 'full_reasoning'")}
    assert {route for route, _, _ in tiers(make_concept(**low), "sam_only")} == {"concept"}
    by_hand = tiers(make_concept(**low), rule="the blue circle")
    assert {rule for _, _, rule in by_hand} == {"the blue circle"}
    with pytest.raises(ValueError, match="contains the tag"):
        tiers(make_concept(**{**low, "rule": "a</rule>"}))


@pytest.mark.parametrize("name", hostile_files())
def test_files_that_are_no_concept_give_one_sentence(tmp_path, name):
    path = tmp_path / "c.safetensors"
    path.write_bytes(hostile_files()[name])
    with pytest.raises(ValueError) as caught:
        ConceptPrompt.load(path)
    message = str(caught.value)
    assert "c.safetensors" in message and len(message) < 400 and "\n" not in message


def test_equal_concepts_have_equal_files(tmp_path):
    """In any process, although safetensors writes the entries of a header in a random order."""
    concept = make_concept(concept_embeds=torch.arange(12.0).view(3, 4))
    content = concept.to_bytes()
    assert same(ConceptPrompt.from_bytes(content), concept) and concept.to_bytes() == content
    names = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]
    assert list(names) == ["concept", "format", "version"]
    assert concept.save(tmp_path / "c.safetensors").read_bytes() == content
    with pytest.raises(ValueError, match="'from the database' is not a concept"):
        ConceptPrompt.from_bytes(b"", "from the database")


def test_files_that_are_too_large_are_not_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    with path.open("wb") as file:
        file.truncate(20_000_000)
    with pytest.raises(ValueError, match="has 20 MB, too much for a concept"):
        ConceptPrompt.load(path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        ConceptPrompt.load(tmp_path / "none.safetensors")


def test_edits_have_to_be_verified_again():
    concept = make_concept(concept_embeds=torch.zeros(2, 4))
    assert concept.is_reliable and "0.80" in concept.summary()
    edited = concept.with_phrase("blue star", "star")
    assert edited.phrases == ("blue star", "star") and edited.concept_embeds is None
    assert edited.score is None and not edited.is_reliable and "not been verified" in edited.summary()
    assert concept.with_rule("find blue").score == concept.score
    assert make_concept(score=0.4, reasoning_score=0.42).is_reliable
    assert not make_concept(score=0.8, reasoning_score=0.9).is_reliable
    assert not make_concept(score=0.25, reasoning_score=0.1).is_reliable
    weak = make_concept(score=0.3, scores=(CandidateScore("star", 0.3, (0.5, 0.1)),))
    assert weak.worst_reference == 1 and "reference 1 fits worst (0.10)" in weak.summary()
    assert "reference b.png fits worst (0.10)" in weak.summary(["a.png", "b.png"])


def test_concepts_of_other_weights_are_refused(model, processor, picture, make_model):
    concept = make_concept(model_hash=concept_hash(model))
    inputs = processor([picture(0)], "star")
    assert model.segment(inputs, "sam_only", processor=processor, concept=concept)[0].route == "concept"
    with pytest.raises(ValueError, match="made with other weights"):
        make_model(seed=3).segment(inputs, processor=processor, concept=concept)


def test_router_applies_reliable_concepts(model, processor, picture, tmp_path):
    inputs = processor([picture(0), picture(1, (70, 30))], "the odd one out")
    options = {"processor": processor, "generation_config": GREEDY, "return_heatmap": True}
    concept = make_concept(threshold=0.0)
    applied = model.segment(inputs, concept=concept, **options)
    by_words = model.segment(processor([picture(0), picture(1, (70, 30))], "red star"), "sam_only", **options)
    for result, other in zip(applied, by_words):
        assert result.route == "concept" and other.route == "shortcut" and result.completion is None
        assert result.label == "the odd one out" and result.mask.tobytes() == other.mask.tobytes()
    assert (
        model.segment(inputs, concept=str(concept.save(tmp_path / "c.safetensors")), **options)[0].route
        == "concept"
    )
    presence = applied[0].presence
    strict = make_concept(threshold=min(1.0, presence + 1e-3))
    result = model.segment(inputs, concept=strict, **options)[0]
    assert (
        result.route == "reasoning" and result.presence == presence and result.threshold == strict.threshold
    )
    unreliable = make_concept(threshold=0.0, score=0.1)
    assert {each.route for each in model.segment(inputs, concept=unreliable, **options)} == {"reasoning"}
    assert {each.route for each in model.segment(inputs, "sam_only", concept=unreliable, **options)} == {
        "concept"
    }
    reasoned = model.segment(inputs, ShortcutRouter("full_reasoning"), concept=concept, **options)
    assert {each.route for each in reasoned} == {"reasoning"} and reasoned[0].presence is None


def test_several_phrases_compete_by_presence_and_tokens_join_them(model, processor, picture):
    inputs = processor([picture(0), picture(1), picture(2)], "the odd one out")
    single = {
        phrase: model.segment(
            inputs, "sam_only", processor=processor, concept=make_concept(phrases=(phrase,))
        )
        for phrase in ("red star", "large circle")
    }
    both = model.segment(
        inputs, "sam_only", processor=processor, concept=make_concept(phrases=("red star", "large circle"))
    )
    for index, result in enumerate(both):
        best = max(single, key=lambda phrase: single[phrase][index].presence)
        assert result.mask.tobytes() == single[best][index].mask.tobytes()
    width = model.config.ctm_config.sam_hidden_size
    tokens = make_concept(concept_embeds=torch.randn(4, width), phrases=("red star",))
    with_tokens = model.segment(inputs, "sam_only", processor=processor, concept=tokens)
    assert with_tokens[0].presence != single["red star"][0].presence
    alone = make_concept(concept_embeds=torch.randn(4, width), phrases=())
    assert model.segment(inputs, "sam_only", processor=processor, concept=alone)[0].error is None


def test_pipeline_takes_a_concept_or_its_file(model, processor, picture, tmp_path):
    pipe = ConceptSegmentationPipeline(model=model, processor=processor)
    concept = make_concept(threshold=0.0)
    path = concept.save(tmp_path / "c.safetensors")
    results = [pipe([picture(0), picture(1)], concept=given, batch_size=2) for given in (concept, path)]
    for result in results[0]:
        assert result["route"] == "concept" and result["label"] == "the odd one out"
    assert [result["mask"].tobytes() for result in results[0]] == [
        result["mask"].tobytes() for result in results[1]
    ]
    assert pipe(picture(0), prompt="star", concept=concept)["label"] == "star"
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        pipe(picture(0), concept=tmp_path / "none.safetensors")


def test_useful_references_of_many():
    ious = (0.9, 0.1, 0.7, 0.8, 0.2, 0.8)
    concept = make_concept(scores=(CandidateScore("star", 0.58, ious),), score=0.58)
    assert concept.useful_references() == (0, 2, 3, 5) and concept.useful_references(2) == (0, 3)
    assert concept.summary().endswith("To reason with, references 0, 2, 3 and 5 are the most useful.")
    assert concept.summary([f"{name}.png" for name in "abcdef"]).endswith(
        "references a.png, c.png, d.png and f.png are the most useful."
    )
    few = make_concept(scores=(CandidateScore("star", 0.58, ious[:4]),))
    assert few.useful_references() == (0, 1, 2, 3) and "useful" not in few.summary()
    assert make_concept(scores=()).useful_references() == ()


def test_concepts_with_equal_tokens_are_equal():
    tokens = torch.arange(12.0).view(3, 4)
    first, second = make_concept(concept_embeds=tokens), make_concept(concept_embeds=tokens.clone())
    assert first == second and hash(first) == hash(second)
    assert first != make_concept(concept_embeds=tokens + 1) and first != make_concept() and first != "star"
