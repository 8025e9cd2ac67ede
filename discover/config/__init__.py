"""What each command can be told, as frozen dataclasses that check themselves before anything slow starts.

A setting that would do nothing in the run at hand (a target for a reward that has none, a band-gap scale without a band
gap) is an error, not a silent no-op.
"""

from discover.config.checks import settings
from discover.config.evaluate import EvaluateConfig
from discover.config.finished import AddResultsConfig, ExportConfig, ReportConfig, SampleConfig
from discover.config.reward import (
    DEFAULT_ALPHA,
    DEFAULT_BETA,
    DEFAULT_KAPPA,
    DEFAULT_POINT_TOLERANCE,
    DEFAULT_WINDOW_TOLERANCE,
    REWARDS,
    TARGET_UNITS,
    RewardConfig,
    RewardTerm,
    Target,
    convert_target,
    parse_reward,
)
from discover.config.run import (
    AcquireConfig,
    EngineConfig,
    LearnConfig,
    OracleConfig,
    RestrictConfig,
    RunConfig,
    ScreenConfig,
    TrainingConfig,
    absolute,
    refuse_beside_resume,
)
from discover.config.structures import GenerateConfig, Pick, PredictConfig
from discover.config.train import TrainConfig

__all__ = [
    "DEFAULT_ALPHA",
    "DEFAULT_BETA",
    "DEFAULT_KAPPA",
    "DEFAULT_POINT_TOLERANCE",
    "DEFAULT_WINDOW_TOLERANCE",
    "REWARDS",
    "TARGET_UNITS",
    "AcquireConfig",
    "AddResultsConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "LearnConfig",
    "OracleConfig",
    "Pick",
    "PredictConfig",
    "ReportConfig",
    "RestrictConfig",
    "RewardConfig",
    "RewardTerm",
    "RunConfig",
    "SampleConfig",
    "ScreenConfig",
    "Target",
    "TrainConfig",
    "TrainingConfig",
    "absolute",
    "convert_target",
    "parse_reward",
    "refuse_beside_resume",
    "settings",
]
