"""Figures of the learned proxies on labelled crystals they were not trained on."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from discover.data import PreparedData, prepare
from discover.errors import DataError
from envs.crystal import CrystalBatch
from proxies import Prediction, load_pretrained, median_gap, p_metastable
from proxies.calibration import interval_coverage, spearman
from proxies.stability import METASTABLE
from proxies.views import PredictsAll

METAL_GAP = 1e-4  # eV; smaller gaps are metals
_MIN_TIMED_CRYSTALS = 20_000
_SMALLEST_SET = 2

Figures = dict[str, float | int | dict[str, float | int]]


def evaluate_proxy(
    data_path: Path | str,
    ensemble: PredictsAll | None = None,
    *,
    train_path: Path | str | None = None,
    letters: bool = True,
    n_workers: int = 2,
    progress: bool = True,
) -> Figures:
    """Return errors, calibration and scoring rate on a CSV.

    Coverage and rank correlation of the band gap are those of non-metals, given that there is a gap. Its `mae` is that
    of the predicted median, `mae_of_mean` that of the mean.

    Args:
        data_path: CSV in the field's form.
        ensemble: The shipped one by default.
        train_path: CSV the ensemble was trained on; adds the same figures for chemical systems that it lacks, under
            `new_chemical_systems`.
        letters: Whether the proxies see the Wyckoff letters.
        n_workers: Processes that prepare the data.
        progress: Show bars.

    Raises:
        DataError: If the CSV cannot be used or has no labels.
    """
    model = load_pretrained() if ensemble is None else ensemble
    data = prepare(data_path, n_workers=n_workers, progress=progress)
    crystals = data.crystals if letters else data.crystals.without_letters()
    predictions = model.predict_all(crystals)
    everything = torch.ones(len(data), dtype=torch.bool)
    figures: Figures = dict(property_figures(data, predictions, everything))
    if not figures:
        raise DataError(f"{data_path} has no labels to compare with")
    if train_path is not None:
        seen = set(_labelled_systems(prepare(train_path, n_workers=n_workers, progress=progress)))
        new = torch.tensor([system not in seen for system in data.crystals.chemical_systems()])
        figures["new_chemical_systems"] = property_figures(data, predictions, new)  # type: ignore[assignment]
    figures["scoring_rate_per_s"] = scoring_rate(model, crystals)
    figures["n_threads"] = torch.get_num_threads()
    figures["n_skipped"] = len(data.failures)
    return figures


def property_figures(
    data: PreparedData, predictions: Mapping[str, Prediction], rows: Tensor
) -> dict[str, dict[str, float | int]]:
    """Return {property: figures} over `rows` ((n,) bool) that have the label; a property without labels is left out."""
    figures: dict[str, dict[str, float | int]] = {}
    for name, prediction in predictions.items():
        chosen = rows & ~data.labels[name].isnan()
        if int(chosen.sum()) < _SMALLEST_SET:
            continue
        label, part = data.labels[name][chosen], _rows_of(prediction, chosen)
        figures[name] = gap_figures(part, label) if name == "band_gap" else energy_figures(part, label)
        if name == "e_above_hull":
            stable = label < METASTABLE
            figures[name]["metastable_roc_auc"] = roc_auc(p_metastable(part), stable)
    return figures


def energy_figures(prediction: Prediction, label: Tensor) -> dict[str, float | int]:
    """Return the figures of a property with a Gaussian prediction; `label` is (n,)."""
    error = prediction.mean - label
    one, two = interval_coverage(error, prediction.std)
    return {
        "mae": float(error.abs().mean()),
        "rmse": float((error**2).mean().sqrt()),
        "bias": float(error.mean()),
        "coverage_1sigma": one,
        "coverage_2sigma": two,
        "spearman_error_sigma": spearman(error.abs(), prediction.std),
        "n": len(label),
    }


def gap_figures(prediction: Prediction, label: Tensor) -> dict[str, float | int]:
    """Return the figures of band gaps; `label` is (n,) in eV."""
    error = median_gap(prediction) - label
    figures: dict[str, float | int] = {
        "mae": float(error.abs().mean()),
        "mae_of_mean": float((prediction.mean - label).abs().mean()),
        "rmse": float(((prediction.mean - label) ** 2).mean().sqrt()),
    }
    gapped = label >= METAL_GAP
    if int(gapped.sum()) >= _SMALLEST_SET and prediction.p_metal is not None:
        p_gap = 1.0 - prediction.p_metal
        mean = prediction.mean / p_gap
        std = ((prediction.std**2 + prediction.mean**2) / p_gap - mean**2).sqrt()
        given = energy_figures(Prediction(mean[gapped], std[gapped]), label[gapped])
        figures.update(
            {f"{name}": given[name] for name in ("coverage_1sigma", "coverage_2sigma", "spearman_error_sigma")}
        )
        figures["mae_of_non_metals"] = given["mae"]
        figures["metal_roc_auc"] = roc_auc(prediction.p_metal, ~gapped)
        figures["metal_log_loss"] = float(
            torch.nn.functional.binary_cross_entropy(prediction.p_metal, (~gapped).double())
        )
    figures["n"] = len(label)
    figures["n_non_metals"] = int(gapped.sum())
    return figures


def roc_auc(score: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve: P(score of a positive > score of a negative), ties counting half."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    _, inverse, counts = torch.unique(score, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2.0).double()[inverse]
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def scoring_rate(model: PredictsAll, crystals: CrystalBatch, seconds: float = 2.0) -> float:
    """Return crystals per second that `predict_all` scores, features included, on the threads torch has."""
    repeats = -(-_MIN_TIMED_CRYSTALS // max(len(crystals), 1))
    batch = CrystalBatch.cat([crystals] * repeats)
    model.predict_all(batch.select(slice(0, 2048)))  # warm up
    n_scored, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        model.predict_all(batch)
        n_scored += len(batch)
    return n_scored / elapsed


def _rows_of(prediction: Prediction, rows: Tensor) -> Prediction:
    """Return the prediction of `rows`."""
    p_metal = None if prediction.p_metal is None else prediction.p_metal[rows]
    return Prediction(prediction.mean[rows], prediction.std[rows], p_metal)


def _labelled_systems(data: PreparedData) -> list[str]:
    """Return the chemical systems of rows with a formation energy."""
    labelled = ~data.labels["formation_energy_per_atom"].isnan()
    return data.crystals.select(labelled).chemical_systems()
