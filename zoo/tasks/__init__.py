"""Tasks that need depth, generated with exact labels: prefix sums, mazes, Pathfinder."""

from .catalog import TASKS, Task, find_task, task_of_model
from .examples import Examples
from .files import read_examples
from .mazes import mazes
from .pathfinder import pathfinder
from .prefix import prefix_sums
from .recipe import RECIPES, Recipe, recipe_for
from .scoring import Score, alignment, curve, score
from .training import Trained, train_task

__all__ = [
    "RECIPES",
    "TASKS",
    "Examples",
    "Recipe",
    "Score",
    "Task",
    "Trained",
    "alignment",
    "curve",
    "find_task",
    "mazes",
    "pathfinder",
    "prefix_sums",
    "read_examples",
    "recipe_for",
    "score",
    "task_of_model",
    "train_task",
]
