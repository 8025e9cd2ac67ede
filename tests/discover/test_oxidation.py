import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Composition
from torch import Tensor

from discover.gap_scale import REFERENCE_GAPS
from discover.oxidation import assign, assignment_strings, load_oxidation_states, oxidation_score, usual_charges
from envs.chemistry import load_elements

ELEMENTS = list(load_elements().values())


def compositions(*formulas: str) -> Tensor:
    table = torch.zeros(len(formulas), 119, dtype=torch.int64)
    for row, formula in enumerate(formulas):
        for element, count in Composition(formula).items():
            table[row, element.Z] = int(count)
    return table


def brute_force(amounts: dict[int, int]) -> float:
    """Return the best score by trying every assignment in plain Python."""
    table = load_oxidation_states()
    options = []
    for z in amounts:
        states = [
            (int(table.states[sign, z, i]), float(table.log_frequency[sign, z, i]))
            for sign in (0, 1)
            for i in range(int(table.n_states[sign, z]))
        ]
        options.append(states)
    best = -math.inf
    for picked in itertools.product(*options):
        charge = sum(state * count for (state, _), count in zip(picked, amounts.values(), strict=True))
        cations = [float(table.electronegativity[z]) for (q, _), z in zip(picked, amounts, strict=True) if q > 0]
        anions = [float(table.electronegativity[z]) for (q, _), z in zip(picked, amounts, strict=True) if q < 0]
        if charge == 0 and cations and anions and max(cations) < min(anions):
            best = max(best, sum(score for _, score in picked))
    return best


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from([e.atomic_number for e in ELEMENTS]), st.integers(1, 8), min_size=1, max_size=4))
def test_the_best_assignment_equals_brute_force(amounts: dict[int, int]) -> None:
    row = torch.zeros(1, 119, dtype=torch.int64)
    for z, count in amounts.items():
        row[0, z] = count
    assert float(oxidation_score(row)) == pytest.approx(brute_force(amounts))


def test_a_batch_gives_what_single_rows_give() -> None:
    rows = compositions("NaCl", "Fe", "CaTiO3", "CuInS2", "FeNi", "LiFePO4", "Al2O3", "GaAs")
    together = oxidation_score(rows)
    alone = torch.cat([oxidation_score(rows[i : i + 1]) for i in range(len(rows))])
    assert torch.equal(together, alone)


def test_textbook_states_are_found() -> None:
    rows = compositions("Fe2O3", "CaTiO3", "CsPbBr3", "LiFePO4", "Fe3O4", "Fe")
    assert assignment_strings(assign(rows)) == [
        "Fe3+ O2-",
        "Ca2+ Ti4+ O2-",
        "Cs1+ Pb2+ Br1-",
        "Li1+ Fe2+ P5+ O2-",
        "",  # needs two states of iron
        "",  # no anion
    ]


def test_usual_compounds_score_above_exotic_ones() -> None:
    usual = oxidation_score(compositions("NaCl", "TiO2", "GaAs", "CaF2", "BaTiO3"))
    exotic = oxidation_score(compositions("Ca2O", "CuO2", "NaO3", "Li3O"))
    assert float(usual.min()) > -3
    assert float(usual.min()) > float(exotic.max())


def test_the_score_tells_textbook_semiconductors_from_random_valid_compositions() -> None:
    real = oxidation_score(compositions(*(formula for formula, *_ in REFERENCE_GAPS)))
    generator = torch.Generator().manual_seed(0)
    random = torch.zeros(4000, 119, dtype=torch.int64)
    numbers = torch.tensor([element.atomic_number for element in ELEMENTS])
    for row in random:
        picked = numbers[torch.randperm(len(numbers), generator=generator)[:3]]
        row[picked] = torch.randint(1, 9, (3,), generator=generator)
    valid = oxidation_score(random)
    valid = valid[valid.isfinite()]
    assert len(valid) > 300
    above = (real[real.isfinite()].unsqueeze(1) > valid).double().mean()  # area under the ROC curve
    assert float(above) > 0.9


def test_multiples_of_a_formula_score_the_same() -> None:
    one, three = oxidation_score(compositions("Fe2O3")), oxidation_score(3 * compositions("Fe2O3"))
    assert torch.equal(one, three)


def test_usual_charges_are_states_of_the_elements_and_those_of_textbooks() -> None:
    elements = list(load_elements().values())
    charges = usual_charges([element.atomic_number for element in elements])
    seen = {element.symbol: set(states) for *states, element in zip(*charges, elements, strict=True)}
    assert all(seen[element.symbol] <= set(element.oxidation_states) for element in elements)
    assert [seen[symbol] for symbol in ("Na", "Ca", "Al", "O", "F")] == [{1}, {2}, {3}, {-2}, {-1}]
    assert (seen["Fe"], seen["Cu"], seen["Sn"], seen["N"]) == ({2, 3}, {1, 2}, {2, 4}, {-3, 5})
    assert {-3, 5} <= seen["P"]
    assert {-2, 6} <= seen["S"]


@pytest.mark.parametrize("formula", ["Al2O3", "FeO", "Ca3P2", "CaSO4", "Na3PS4", "KNO3", "SrTiO3", "Cu2O", "PbCl2"])
def test_one_of_the_usual_ways_balances_a_textbook_salt(formula: str) -> None:
    amounts = Composition(formula).get_el_amt_dict()
    charges = usual_charges([load_elements()[symbol].atomic_number for symbol in amounts])
    assert 0.0 in [sum(map(math.prod, zip(row, amounts.values(), strict=True))) for row in charges]
