"""The tasks of `tithe train`: one file each, and this table of them; `terms` says what a recipe may say of each."""

from __future__ import annotations

from collections.abc import Mapping

from tithe.app.train.recipe import Recipe
from tithe.app.train.tasks.base import Task
from tithe.app.train.tasks.causal_lm import CausalLm
from tithe.app.train.tasks.image_classification import ImageClassification
from tithe.app.train.tasks.multi_label import MultiLabel
from tithe.app.train.tasks.seq2seq import Seq2Seq
from tithe.app.train.tasks.text_classification import TextClassification
from tithe.app.train.tasks.text_regression import TextRegression
from tithe.app.train.tasks.token_classification import TokenClassification

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        TextClassification(),
        TextRegression(),
        ImageClassification(),
        CausalLm(),
        TokenClassification(),
        MultiLabel(),
        Seq2Seq(),
    )
}


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe."""
    return TASKS[recipe.data.task]
