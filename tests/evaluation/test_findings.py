"""Each symptom on figures made for it, and none on those of a policy that only got better."""

import dataclasses
import re

import pytest

from minirlhf.evaluation.findings import BestOfNPoint, Comparison, Evaluation, Figures, symptoms
from minirlhf.evaluation.statistics import Estimate


def sure(mean):
    return Estimate(mean, mean - 0.02, mean + 0.02)


BEFORE = Figures(sure(0.6), sure(0.6), 13.0, 0.10, 0.48, 0.73, 0.40, 16.0, 16.0, 0.08)
AFTER = Figures(sure(0.9), sure(0.85), 11.0, 0.08, 0.40, 0.65, 0.50, 15.5, 16.0, 0.10)
EQUAL = BestOfNPoint(12.0, 1.6, sure(0.95), sure(0.9))
FINE = Comparison(
    ("酒店",), AFTER, BEFORE, sure(0.3), sure(0.25), sure(1.6), sure(1.6), sure(1.6), (), EQUAL, sure(-0.05), ()
)


def changed(**fields):
    return dataclasses.replace(FINE, **fields)


def after(**fields):
    return changed(policy=dataclasses.replace(AFTER, **fields))


def test_a_policy_that_got_better_has_none():
    assert symptoms(FINE, FINE) == symptoms(FINE, None) == ()
    assert symptoms(changed(second_gain=None, equal_kl=None), None) == ()


@pytest.mark.parametrize(("comparison", "words"), [
    (changed(second_gain=sure(0.01)), "the reward rose by 0.300 .*, the second scorer did not: 0.010"),
    (changed(second_gain=sure(-0.2)), "the second scorer did not"),
    (changed(second_gain=sure(0.05)), r"the second scorer rose by 0.050 .*, less than 25% of the 0.300 that"),
    (after(distinct_2=0.2), "distinct-2 fell from 0.480 to 0.200"),
    (after(self_bleu=0.75), "self-BLEU rose from 0.400 to 0.750"),
    (after(repeated=0.3), "repeat themselves: 8% to 30% of their characters"),
    (after(perplexity=30.0), "perplexity 13.0 to 30.0"),
    (after(characters=30.0), "from 16.0 to 30.0 characters"), (after(characters=9.0), "from 16.0 to 9.0 characters"),
])  # fmt: skip
def test_each_symptom_is_named_with_its_figures_alone(comparison, words):
    assert len(symptoms(comparison, None)) == 1
    (found,) = symptoms(comparison, FINE)
    assert re.search(words, found)


@pytest.mark.parametrize("comparison", [
    after(distinct_2=0.25), after(self_bleu=0.69), after(repeated=0.17), after(perplexity=25.9), after(characters=23.9),
    changed(gain=sure(0.01), second_gain=sure(0.0)),  # nothing rose: there is nothing to have been hacked
])  # fmt: skip
def test_below_the_limits_there_is_none(comparison):
    assert symptoms(comparison, None) == ()


def test_a_gain_that_does_not_carry_over_is_a_symptom():
    (found,) = symptoms(FINE, changed(gain=sure(0.05)))
    assert "on the given prompts, and by 0.050" in found
    assert symptoms(FINE, changed(gain=sure(0.2))) == ()  # less, but most of it


def test_where_the_reference_is_good_already_a_smaller_gain_is_no_symptom():
    """Of the 0.35 and 0.16 that best-of-n has above the reference 0.3 and 0.13 were gained: 86% and 81%."""
    good = dataclasses.replace(BEFORE, reward=sure(0.79))
    held_out = changed(reference=good, gain=sure(0.13))
    assert symptoms(FINE, held_out) == ()
    (found,) = symptoms(FINE, changed(reference=good, gain=sure(0.04)))
    assert "86% and 25% of what best-of-n has above the reference" in found
    without = {"equal_kl": None, "best_of_n": ()}
    (found,) = symptoms(changed(**without), changed(gain=sure(0.05), **without))
    assert found.endswith("on held-out ones")


def test_texts_on_held_out_prompts_are_looked_at_too():
    (found,) = symptoms(FINE, after(distinct_2=0.1))
    assert found.startswith("on held-out prompts the samples lost variety")


@pytest.mark.parametrize(("comparison", "words"), [
    (FINE, "one sample of the policy is worth the best of 12 of the reference, which would be sampled and scored"),
    (changed(best_of_n=(dataclasses.replace(EQUAL, n=4, reward=sure(0.9)),)), "worth the best of 4 of"),
    (changed(equal_kl=dataclasses.replace(EQUAL, reward=sure(0.8))), "more reward than the best of 12 of"),
    (changed(gain=sure(0.01)), "no more reward than one of the reference"),
])  # fmt: skip
def test_what_training_buys_beside_best_of_n_is_said(comparison, words):
    assert words in comparison.in_use and comparison.in_use in list(comparison.remarks())


def test_an_evaluation_has_a_short_repr_and_tables_for_a_notebook():
    found = Evaluation({}, FINE, FINE, ("<odd>",))
    assert repr(found) == "Evaluation(reward 0.600 -> 0.900 at KL 1.60, 1 symptoms, 0 samples)"
    page = found._repr_html_()
    assert page.count("<table>") == 5 and "given prompts" in page and "&lt;odd&gt;" in page and "<odd>" not in page
