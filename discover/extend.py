"""More rounds for a run that has finished: ``python -m discover.run resume=DIR rounds=5 oracle.budget=100``."""

import shutil
from dataclasses import replace

from discover.campaign import Campaign, check_campaign, learnt_folder
from discover.config import RunConfig
from discover.errors import ConfigError
from discover.run_folder import RunFolder


def extended(folder: RunFolder, config: RunConfig, *, rounds: int | None, budget: int | None) -> RunConfig:
    """Return the settings of a run that is given more rounds, once its folder holds them.

    What was chosen and checked stays; what is added to the budget is for the added rounds. To ask for what the run has
    changes nothing, so that the same command goes on after a kill.

    Args:
        folder: The run's.
        config: Its settings.
        rounds: How many it is to have; None: as many as it has.
        budget: Structures to check over all rounds; None: as the settings say.

    Raises:
        ConfigError: If that is less than it has, leaves nothing to do, or the run cannot learn.
        RunFolderError: If the run's labels are elsewhere, or the folder cannot be written.
    """
    rounds = config.rounds if rounds is None else rounds
    if rounds == config.rounds and budget in (None, config.budget):
        return config
    has = f"{folder.path} has rounds={config.rounds} and oracle.budget={config.budget}"
    if rounds < config.rounds or (budget is not None and budget < config.budget):
        raise ConfigError(f"{has}; resume= can raise them, not lower them")
    if rounds == config.rounds:
        raise ConfigError(f"{has}; a larger budget is for rounds to come: raise rounds as well")
    oracle = config.oracle if budget is None else replace(config.oracle, budget=budget)
    more = replace(config, rounds=rounds, oracle=oracle, extends=(config.rounds, config.budget))
    check_campaign(more)
    campaign = Campaign.open(config, folder)
    with campaign.store as store:
        n_chosen = len(store.rounds(campaign.run))
    if n_chosen < config.rounds:
        raise ConfigError(
            f"{folder.path} has come to round {n_chosen + 1} of {config.rounds}; finish it with resume={folder.path}, "
            "then ask for more"
        )
    # What the end of the run has taught knows no results that came later: the first added round is taught anew. The old
    # goes before the settings change, since a kill in between then leaves a run that only has to finish again.
    if (stale := learnt_folder(folder, config.rounds + 1)).exists():
        shutil.rmtree(stale)
    folder.log("extended", rounds=[config.rounds, rounds], budget=[config.budget, more.budget])
    folder.write_config(more)
    return more
