"""The powder pattern that a structure would show: Cu Kα, kinematic, by pymatgen."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pymatgen.analysis.diffraction.xrd import XRDCalculator
from pymatgen.core import Structure

from discover.plots import TRAINED

RADIATION = "CuKa"  # the weighted mean of Kα1 and Kα2, 1.54184 Å
TWO_THETA = (5.0, 90.0)
_SYMPREC = 0.01  # Å; tight enough that making the conventional cell exact moves no peak
_LABELLED = 12  # peaks that get their indices written, the strongest


def powder_pattern(structure: Structure, *, two_theta: tuple[float, float] = TWO_THETA) -> pd.DataFrame:
    """Return the peaks of the powder pattern, from low to high angle.

    No temperature factors, no absorption, no preferred orientation; the Lorentz-polarisation factor is in. Peaks below
    a thousandth of the strongest are left out.

    Args:
        structure: An ordered structure.
        two_theta: Range of angles in degrees.

    Returns:
        A row per peak: `two_theta` in degrees, `d` in Å, `intensity` with 100 for the strongest, `hkl` such as
        "1 1 0", of the conventional cell, four indices if that is hexagonal, `multiplicity` of all planes in
        the peak.
    """
    pattern = XRDCalculator(wavelength=RADIATION, symprec=_SYMPREC).get_pattern(structure, two_theta_range=two_theta)
    return pd.DataFrame(
        {
            "two_theta": np.asarray(pattern.x, dtype=np.float64),
            "d": np.asarray(pattern.d_hkls, dtype=np.float64),
            "intensity": np.asarray(pattern.y, dtype=np.float64),
            "hkl": [" + ".join(" ".join(map(str, plane["hkl"])) for plane in planes) for planes in pattern.hkls],
            "multiplicity": [sum(plane["multiplicity"] for plane in planes) for planes in pattern.hkls],
        }
    )


def plot_pattern(
    pattern: pd.DataFrame, title: str = "", *, two_theta: tuple[float, float] = TWO_THETA, width: float = 0.25
) -> Figure:
    """Return a figure of a pattern: sticks, their sum with broadened lines, and indices of the strongest.

    Args:
        pattern: What `powder_pattern` returned.
        title: Such as the formula.
        two_theta: Range of angles in degrees.
        width: Full width at half maximum of the Gaussian lines, in degrees.
    """
    figure = Figure(figsize=(6.4, 2.9), layout="constrained")
    axes = figure.subplots()
    angles, heights = pattern["two_theta"].to_numpy(float), pattern["intensity"].to_numpy(float)
    grid = np.arange(two_theta[0], two_theta[1], width / 10)
    curve = np.zeros_like(grid)
    for angle, height in zip(angles, heights, strict=True):
        curve += height * np.exp(-4 * np.log(2) * ((grid - angle) / width) ** 2)
    axes.plot(grid, curve, color=TRAINED, linewidth=0.9)
    axes.vlines(angles, -6, -2, color="#444444", linewidth=0.7)
    for _, peak in pattern.nlargest(_LABELLED, "intensity").iterrows():
        first = str(peak["hkl"]).split(" + ")[0]
        index = first.replace(" ", "") if all(len(part) == 1 for part in first.split()) else first
        top = float(np.interp(peak["two_theta"], grid, curve))
        axes.annotate(
            index,
            (peak["two_theta"], top),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            rotation=90,
            fontsize=6,
        )
    axes.set_xlim(*two_theta)
    axes.set_ylim(-8, 1.25 * max(100.0, float(curve.max(initial=0.0))))
    axes.set_xlabel("2θ (degrees), Cu Kα")
    axes.set_ylabel("intensity")
    axes.set_yticks([])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, fontsize=9)
    return figure
