"""The structured cases hold what the tests of all backends rely on: any two settings meet there,
and most batches have something to lose.
"""

import collections
import itertools

import pytest
import torch

from conr_kernels import reference
from tests.helpers.cases import EMPTY_KINDS, FACTORS, KINDS, VARIANTS, Case, cover, structured_cases

#: What one factor is given, as tests of slower backends do.
SMALL = dict(n=(17, 33))


def pairs(choice: dict) -> set:
    return set(itertools.combinations(choice.items(), 2))


def all_pairs(factors: dict) -> set:
    return {
        ((a, u), (b, v))
        for (a, of_a), (b, of_b) in itertools.combinations(factors.items(), 2)
        for u, v in itertools.product(of_a, of_b)
    }


def sets(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n_i > 0]`` and ``[m_i > 0]``."""
    _, positive, negative = reference.masks(case.y, case.p, case.y, case.p, 0, case.settings)
    return positive.any(1), negative.any(1)


def has_anchors(case: Case) -> bool:
    has_positives, has_negatives = sets(case)
    return bool((has_positives & has_negatives).any())


def test_a_cover_holds_every_pair_in_few_choices():
    factors = dict(a=(1, 2, 3), b=("x", "y"), c=(False, True), d=(0.1, 0.2, 0.3))
    choices = list(cover(factors))
    assert set().union(*map(pairs, choices)) == all_pairs(factors)
    assert len(choices) <= 12
    assert choices == list(cover(factors)) != list(cover(factors, seed=1))


@pytest.mark.parametrize("changed", [{}, SMALL], ids=["all sizes", "small"])
@pytest.mark.parametrize("seed", [0, 1000])
def test_any_two_settings_meet_in_a_batch_with_anchors(seed, changed):
    met = set()
    for case in structured_cases(seed, **changed):
        if case.choice["kind"] in KINDS:
            assert has_anchors(case), str(case)
            met |= pairs(case.choice)
    assert met == all_pairs(FACTORS | changed)


@pytest.mark.parametrize("seed", [0, 1000])
def test_most_batches_have_anchors_whatever_the_setting(seed):
    found = collections.defaultdict(list)
    for case in structured_cases(seed):
        for setting in case.choice.items():
            found[setting].append(has_anchors(case))
    for (name, value), anchors in found.items():
        share = sum(anchors) / len(anchors)
        message = f"{name} = {value}: anchors in {share:.0%} of the batches"
        assert share >= 0.6 or value in EMPTY_KINDS, message


def test_every_setting_meets_empty_sets_of_either_kind():
    met = collections.defaultdict(set)
    for case in structured_cases():
        has_positives, has_negatives = sets(case)
        for setting in case.choice.items():
            met[setting] |= {
                name
                for name, rows in (
                    ("rows without positives", ~has_positives),
                    ("rows without negatives", ~has_negatives),
                    ("no positives at all", ~has_positives.any()),
                    ("no negatives at all", ~has_negatives.any()),
                )
                if rows.any()
            }
    lacking = {
        setting: of_setting
        for setting, of_setting in met.items()
        if setting[0] != "kind" and len(of_setting) < 4
    }
    assert not lacking


def test_any_two_flags_of_variants_meet():
    flags = [
        dict(
            log=v.log, negatives=v.negatives, unit_terms=v.unit_terms, count_self=v.count_self,
            weighted_rows=v.weighted_rows,
        )
        for v in VARIANTS.values()
    ]  # fmt: skip
    legal = all_pairs({name: {of[name] for of in flags} for name in flags[0]})
    legal.remove((("log", "outside"), ("count_self", True)))
    assert set().union(*map(pairs, flags)) == legal


def test_some_batches_have_one_row_and_some_weights_of_zero_and_zero_rows():
    cases = structured_cases()
    assert {len(case.x) for case in cases} >= {1, 2, 3, *FACTORS["n"]}
    assert any(case.w is not None and bool((case.w == 0).any()) for case in cases)
    assert any(bool((case.x == 0).all(1).any()) and has_anchors(case) for case in cases)
    assert {case.choice["kind"] for case in cases} == {*KINDS, *EMPTY_KINDS}
