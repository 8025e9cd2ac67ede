# ruff: noqa: INP001 - an example that is executed, no package
"""Parsl on a SLURM cluster: `engine.name=parsl engine.config=slurm.py` on the login node. Adapt what is in capitals."""

from parsl.addresses import address_by_interface
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.launchers import SrunLauncher
from parsl.providers import SlurmProvider

config = Config(
    executors=[
        HighThroughputExecutor(
            label="slurm",
            address=address_by_interface("INTERFACE"),  # the network that compute nodes reach this node by: `ip addr`
            max_workers_per_node=32,  # one label each; no more than cores, and 2 GB of memory each
            cores_per_worker=1,
            provider=SlurmProvider(
                partition="PARTITION",
                account="ACCOUNT",
                nodes_per_block=1,
                init_blocks=1,
                min_blocks=0,
                max_blocks=4,  # jobs at a time
                walltime="04:00:00",  # what runs when a job ends is tried again in the next one
                exclusive=True,
                worker_init="source PATH/TO/.venv/bin/activate",
                launcher=SrunLauncher(),
            ),
        )
    ],
    strategy="simple",  # jobs come and go with the work
)
