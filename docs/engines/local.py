# ruff: noqa: INP001 - an example that is executed, no package
"""Parsl on this machine: `engine.name=parsl engine.config=docs/engines/local.py`."""

from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider

config = Config(
    executors=[
        HighThroughputExecutor(
            label="local",
            address="127.0.0.1",
            loopback_address="127.0.0.1",
            heartbeat_period=5,  # s; how soon a worker that died is noticed
            heartbeat_threshold=30,
            max_workers_per_node=2,
            cores_per_worker=1,
            provider=LocalProvider(init_blocks=1, max_blocks=1),
        )
    ],
    strategy="none",  # the block is there from the start and stays
)
