"""The plots of a report: each function takes plain arrays and returns a figure."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

PRIOR, TRAINED, ACCENT = "#9a9a9a", "#1f5fa8", "#c2571a"
_SIZE = (6.4, 3.6)
_DPI = 140


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def training_curve(steps: Sequence[float], loss: Sequence[float], log_reward: Sequence[float]) -> Figure:
    """Return loss and mean log reward of the sampler's own trajectories over the training steps."""
    figure, (upper, lower) = _figure(rows=2)
    _curve(upper, steps, loss, TRAINED)
    upper.set_yscale("log")
    upper.set_ylabel("loss")
    _curve(lower, steps, log_reward, ACCENT)
    lower.set_ylabel("mean log reward")
    lower.set_xlabel("training step")
    upper.set_title("Training")
    return figure


def distribution(
    samples: Mapping[str, NDArray[np.float64]], label: str, *, target: float | tuple[float, float] | None = None
) -> Figure:
    """Return the distribution of one property in several sets of samples, the first one drawn as the background.

    Args:
        samples: Values by the name of the set, such as "prior" and "trained".
        label: Name and unit of the property.
        target: Wanted value or window, marked.
    """
    figure, (axes,) = _figure()
    finite = {name: values[np.isfinite(values)] for name, values in samples.items()}
    together = np.concatenate([*finite.values(), np.atleast_1d(np.array(target if target is not None else []))])
    low, high = np.quantile(together, [0.005, 0.995]) if len(together) else (0.0, 1.0)
    bins = np.linspace(low, high if high > low else low + 1.0, 50)
    colours = [PRIOR, TRAINED, ACCENT] if len(finite) > 1 else [TRAINED]
    for (name, values), colour in zip(finite.items(), colours, strict=False):
        if len(values):
            weights = np.full(len(values), 100.0 / len(values))
            clipped = values.clip(bins[0], bins[-1])
            axes.hist(
                clipped, bins.tolist(), weights=weights, alpha=0.65, color=colour, label=f"{name} ({len(values):,})"
            )
    if isinstance(target, tuple):
        axes.axvspan(*target, color=ACCENT, alpha=0.18, label="wanted")
    elif target is not None:
        axes.axvline(target, color=ACCENT, linewidth=1.6, label="wanted")
    axes.set_xlabel(label)
    axes.set_ylabel("% of samples")
    axes.legend(loc="upper right", frameon=False, fontsize=8)
    return figure


def rounds(
    numbers: Sequence[int],
    hit_rate: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    errors: Mapping[str, Sequence[float]],
) -> Figure:
    """Return the hit rate of each round with its 95 % interval, and the proxies' errors before they learnt from it.

    Args:
        numbers: Of the rounds.
        hit_rate: Share of the structures checked, failures included.
        low: Lower end of the interval.
        high: Upper end.
        errors: Mean absolute error by the name of the property with its unit.
    """
    figure, (upper, lower) = _figure(rows=2)
    rate, ends = 100 * np.asarray(hit_rate), 100 * np.asarray([low, high])
    upper.errorbar(numbers, rate, yerr=np.abs(ends - rate), color=TRAINED, marker="o", capsize=3)
    upper.set_ylabel("hits, % of checked")
    upper.set_ylim(0, 100)
    for (name, values), colour in zip(errors.items(), (TRAINED, ACCENT, PRIOR), strict=False):
        lower.plot(numbers, values, marker="o", color=colour, label=name)
    lower.set_ylim(bottom=0)
    lower.set_ylabel("error of the proxies")
    lower.set_xlabel("round")
    lower.set_xticks(list(numbers))
    lower.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(errors) or 1, frameon=False, fontsize=8)
    return figure


def bars(counts: Mapping[str, float], title: str, *, y_label: str = "% of candidates", most: int = 40) -> Figure:
    """Return a bar chart of the largest of `counts`, in descending order."""
    figure, (axes,) = _figure()
    largest = sorted(counts.items(), key=lambda item: -item[1])[:most]
    axes.bar(range(len(largest)), [value for _, value in largest], color=TRAINED, width=0.8)
    axes.set_xticks(range(len(largest)), [name for name, _ in largest], fontsize=6.5 if len(largest) > 25 else 8)
    axes.margins(x=0.01)
    axes.set_ylabel(y_label)
    axes.set_title(title + (f" (the {most} most frequent of {len(counts)})" if len(counts) > most else ""))
    return figure


def _figure(rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=_SIZE if rows == 1 else (_SIZE[0], 4.6), layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return figure, axes


def _curve(axes: Axes, steps: Sequence[float], values: Sequence[float], colour: str) -> None:
    """Draw the values faintly and their running mean over a fiftieth of the run boldly."""
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    width = max(1, len(y) // 50)
    if width > 1:
        smooth = np.convolve(y, np.ones(width) / width, mode="valid")
        axes.plot(x[width // 2 : width // 2 + len(smooth)], smooth, color=colour, linewidth=1.6)
