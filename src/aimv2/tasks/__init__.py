"""What a run may learn, one file a task; ``objective.name`` imports it by name."""

from __future__ import annotations

from aimv2.config.objective import find_task
from aimv2.config.schema import Config
from aimv2.tasks.task import Task


def task_of(config: Config) -> Task:
    """A new instance of the task that ``objective.name`` names."""
    task: Task = find_task(config.objective.name)(config)
    return task
