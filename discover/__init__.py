"""Compose environments, policies and proxies into runs.

`discover.run` is the main job; `sample`, `train`, `evaluate`, `report` and `fetch` are the other commands. Each command
is a thin face over documented functions, so that a notebook can do the same. Nothing below this package knows of it.
"""
