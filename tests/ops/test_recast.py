"""Test that modules of a model are replaced by subclasses that keep everything else."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from flashmoe.ops.recast import recast


class Doubled(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.rest = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())]
        self.scale = 3.0

    def __call__(self, x):
        return self.scale * self.rest[1](self.rest[0](self.first(x)))


class Louder(Pair):
    pass


def test_replaced_modules_keep_their_parameters_and_compute_otherwise():
    model = Pair()
    x = mx.random.normal((2, 4))
    before, parameters = model.first(x), dict(tree_flatten(model.parameters()))
    paths = []

    def choose(path, module):
        paths.append(path)
        return Doubled if path == "first" else None

    assert recast(model, choose) == [model.first]
    assert set(paths) == {"first", "rest.0", "rest.1", "rest.1.layers.0", "rest.1.layers.1"}
    assert type(model.first) is Doubled
    assert type(model.rest[0]) is nn.Linear
    assert mx.array_equal(model.first(x), 2 * before)
    assert dict(tree_flatten(model.parameters())).keys() == parameters.keys()


def test_children_inside_lists_are_replaced_before_their_parent():
    model = nn.Module()
    model.inner = Pair()
    kinds = {nn.Linear: Doubled, Pair: Louder}
    made = recast(model, lambda path, module: kinds.get(type(module)))
    assert [type(m) for m in made] == [Doubled, Doubled, Doubled, Louder]
    assert made[-1] is model.inner
    assert model.inner.scale == 3.0
    assert model.inner.first is made[0]
    assert model.inner.rest[1].layers[0] is made[2]


def test_lists_without_a_replaced_module_stay_the_same_object():
    model = Pair()
    rest = model.rest
    assert recast(model, lambda path, module: None) == []
    assert model.rest is rest
