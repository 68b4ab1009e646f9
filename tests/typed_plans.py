"""What a type checker infers of `attach`: each method's own plan. Read by pyright (`make lint`), never run."""

from typing import assert_type

from torch import nn

import tithe


def plans(model: nn.Module, method: tithe.FISH | tithe.VRPGE, own: tithe.SparseMethod) -> None:
    assert_type(tithe.attach(model, tithe.FISH(k=1)), tithe.SparsePlan)
    assert_type(tithe.attach(model, tithe.TraDy(tithe.Budget("1MB"))), tithe.SparsePlan)
    assert_type(tithe.attach(model, tithe.VRPGE(keep=0.5)), tithe.NarrowPlan)
    assert_type(tithe.attach(model, tithe.TWA("checkpoints")), tithe.SubspacePlan)
    assert_type(tithe.attach(model, method), tithe.SparsePlan | tithe.NarrowPlan)
    assert_type(tithe.attach(model, own), tithe.SparsePlan)
