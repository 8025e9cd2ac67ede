import pytest

from benchmarks.flow_steps import FlowStepsConfig, plot
from discover.errors import ConfigError


def test_the_plot_has_a_line_for_each_solver_in_three_panels() -> None:
    rows = [
        {
            "solver": solver,
            "n_steps": n_steps,
            "match_rate": 0.6,
            "match_rate_interval": (0.5, 0.7),
            "rmse_all": 0.2,
            "rmse_all_interval": (0.15, 0.25),
            "cpu_seconds_per_structure": 0.01 * n_steps,
        }
        for solver in ("euler", "heun")
        for n_steps in (5, 100)
    ]
    figure = plot(rows, "two settings")
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert [line.get_xdata().tolist() for line, *_ in axes.containers] == [[5, 100], [5, 100]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "data=FILE"),
        ({"data": "val.csv", "solvers": ("rk4",)}, "euler and heun, got rk4"),
        ({"data": "val.csv", "steps": (0, 5)}, "at least 1"),
    ],
)
def test_settings_are_checked(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowStepsConfig(**settings)
