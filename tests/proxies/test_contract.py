"""Checks that every proxy passes, whatever it is made of."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from envs.crystal import CrystalBatch
from proxies import (
    BandGapProxy,
    DensityProxy,
    FormationEnergyProxy,
    Prediction,
    Proxy,
    StabilityProxy,
    load_ensemble,
    load_pretrained,
    sklearn_ensemble,
)
from proxies.base import ProxyError
from proxies.elements import element_properties
from proxies.sklearn_ensemble import TreeEnsemble
from proxies.views import PropertyView
from tests.proxies.textbook import TEXTBOOK, random_crystals, textbook

NAMES = {
    "density": "g/cm^3",
    "formation_energy_per_atom": "eV/atom",
    "band_gap": "eV",
    "e_above_hull": "eV/atom",
}


@pytest.fixture(scope="session")
def small_trees() -> TreeEnsemble:
    """Trees fitted on a made-up law, enough to check the interface."""
    crystals = random_crystals(2500, seed=3)
    labels = {name: made_up_label(crystals) for name in ("formation_energy_per_atom", "e_above_hull")}
    labels["band_gap"] = (made_up_label(crystals) - 1.0).clamp_min(0.0)
    return TreeEnsemble.fit(crystals, labels, torch.full((119,), 2.7), n_trees=8, n_jobs=1)


def made_up_label(crystals: CrystalBatch) -> Tensor:
    return (crystals.elements * crystals.counts).sum(1).double() / crystals.n_atoms / 40.0


@pytest.fixture(params=["density", "formation_energy", "band_gap", "stability", "trees_energy", "trees_gap"])
def proxy(request) -> Proxy:
    if request.param.startswith("trees"):
        view = FormationEnergyProxy if request.param == "trees_energy" else BandGapProxy
        return view(request.getfixturevalue("small_trees"))
    shipped = {
        "density": DensityProxy,
        "formation_energy": FormationEnergyProxy,
        "band_gap": BandGapProxy,
        "stability": StabilityProxy,
    }
    return shipped[request.param]()


def moments(prediction: Prediction) -> Tensor:
    columns = [prediction.mean, prediction.std]
    return torch.stack(columns if prediction.p_metal is None else [*columns, prediction.p_metal], dim=-1)


class TestContract:
    """One class of checks for all proxies."""

    def test_name_and_unit_are_the_agreed_ones(self, proxy: Proxy) -> None:
        assert isinstance(proxy, Proxy)
        assert NAMES[proxy.name] == proxy.unit

    def test_shapes_dtypes_and_finiteness(self, proxy: Proxy) -> None:
        crystals = CrystalBatch.cat([textbook(*TEXTBOOK), random_crystals(40)])
        prediction = proxy.predict(crystals)
        assert prediction.mean.shape == prediction.std.shape == (len(crystals),)
        assert prediction.mean.dtype == prediction.std.dtype == torch.float64
        assert moments(prediction).isfinite().all()
        assert (prediction.std >= 0).all()
        assert not prediction.mean.requires_grad
        if proxy.name == "band_gap":
            assert ((prediction.p_metal > 0) & (prediction.p_metal < 1)).all()
            assert (prediction.mean >= 0).all()
        else:
            assert prediction.p_metal is None

    def test_input_is_left_untouched(self, proxy: Proxy) -> None:
        crystals = random_crystals(20)
        before = [tensor.clone() for tensor in vars(crystals).values()]
        proxy.predict(crystals)
        assert all(torch.equal(old, new) for old, new in zip(before, vars(crystals).values(), strict=True))

    def test_batch_of_one_equals_row_of_many(self, proxy: Proxy) -> None:
        crystals = random_crystals(30)
        together = moments(proxy.predict(crystals))
        alone = torch.cat([moments(proxy.predict(crystals.select([row]))) for row in range(len(crystals))])
        assert_close(together, alone, rtol=1e-4, atol=1e-4)

    def test_an_empty_batch_gives_an_empty_prediction(self, proxy: Proxy) -> None:
        assert proxy.predict(random_crystals(3).select([])).mean.shape == (0,)

    def test_padding_does_not_matter(self, proxy: Proxy) -> None:
        crystals = random_crystals(20)
        wide = CrystalBatch.cat([crystals, random_crystals(1, max_orbits=13)]).select(slice(0, 20))
        assert wide.elements.shape[1] == 13
        assert_close(moments(proxy.predict(wide)), moments(proxy.predict(crystals)), rtol=1e-4, atol=1e-4)

    def test_order_of_orbits_does_not_matter(self, proxy: Proxy) -> None:
        crystals = random_crystals(20)
        turned = CrystalBatch(
            crystals.space_group,
            crystals.elements.flip(1),
            crystals.letters.flip(1),
            crystals.counts.flip(1),
            crystals.lattice_parameters,
        )
        assert_close(moments(proxy.predict(turned)), moments(proxy.predict(crystals)), rtol=1e-4, atol=1e-4)

    def test_crystals_without_letters_are_accepted(self, proxy: Proxy) -> None:
        assert moments(proxy.predict(textbook(*TEXTBOOK).without_letters())).isfinite().all()

    def test_cells_of_80_atoms_and_odd_lattices_are_accepted(self, proxy: Proxy) -> None:
        counts = torch.tensor([[16, 16, 16, 16, 16], [1, 79, 0, 0, 0]])
        elements = torch.tensor([[3, 13, 14, 26, 8], [89, 9, 0, 0, 0]])
        lattice = torch.tensor([[0.9, 0.9, 0.9, 90, 90, 90], [100, 90, 80, 60, 75, 100]], dtype=torch.float64)
        crystals = CrystalBatch(torch.tensor([2, 1]), elements, torch.full_like(elements, -1), counts, lattice)
        assert moments(proxy.predict(crystals)).isfinite().all()

    def test_same_input_same_output(self, proxy: Proxy) -> None:
        crystals = random_crystals(600)
        assert torch.equal(moments(proxy.predict(crystals)), moments(proxy.predict(crystals)))


def test_trees_learn_what_is_learnable(small_trees: TreeEnsemble) -> None:
    crystals = random_crystals(300, seed=9)
    error = small_trees.predict_all(crystals)["formation_energy_per_atom"].mean - made_up_label(crystals)
    assert error.abs().mean() < 0.35 * made_up_label(crystals).std()


def test_trees_are_saved_as_arrays_and_read_back(small_trees: TreeEnsemble, tmp_path, monkeypatch) -> None:
    small_trees.save(tmp_path)
    again = load_ensemble(tmp_path)
    crystals = random_crystals(50)
    for name, prediction in small_trees.predict_all(crystals).items():
        assert torch.equal(moments(prediction), moments(again.predict_all(crystals)[name]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trees.json", "trees.safetensors"]
    monkeypatch.setattr(sklearn_ensemble, "element_properties", lambda: 1.1 * element_properties())  # other releases
    for name, prediction in small_trees.predict_all(crystals).items():
        assert torch.equal(moments(prediction), moments(again.predict_all(crystals)[name]))


def test_trees_of_before_read_the_table_of_today(small_trees: TreeEnsemble, tmp_path) -> None:
    small_trees.save(tmp_path)
    tensors = load_file(tmp_path / "trees.safetensors")
    del tensors["properties"]
    save_file(tensors, tmp_path / "trees.safetensors")
    assert torch.equal(load_ensemble(tmp_path).properties, small_trees.properties)


def test_a_folder_of_trees_and_networks_is_refused(small_trees: TreeEnsemble, tmp_path) -> None:
    small_trees.save(tmp_path)
    load_pretrained().save(tmp_path)
    with pytest.raises(ProxyError, match="holds trees and networks"):
        load_ensemble(tmp_path)


def test_views_share_one_ensemble(small_trees: TreeEnsemble) -> None:
    crystals = random_crystals(5)
    everything = small_trees.predict_all(crystals)
    for view in (FormationEnergyProxy, BandGapProxy, StabilityProxy):
        proxy: PropertyView = view(small_trees)
        assert torch.equal(proxy.predict(crystals).mean, everything[proxy.name].mean)
