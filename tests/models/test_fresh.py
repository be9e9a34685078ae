from dataclasses import replace

import pytest
import torch
from torch import nn

from models import Family, ModelConfig, build_model
from models.fresh import drawn_apart


def fresh(family: Family, seed: int, num_layers: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    config = ModelConfig(family, None, 64, num_layers, num_heads=2, ffn_dim=96)
    if family == Family.mmdit:
        config = replace(config, input_skip=True, frame_place=True)
    return build_model(config, latent_channels=8, text_dim=48).state_dict()


@pytest.mark.parametrize("family", Family)
def test_first_weights_depend_on_the_seed_and_their_name_alone(family):
    weights, again, more, other = fresh(family, 0), fresh(family, 0), fresh(family, 0, num_layers=4), fresh(family, 1)
    drawn = {name for name, weight in weights.items() if weight.std() > 0}
    assert len(drawn) > 20
    assert len({weights[name].flatten()[0].item() for name in drawn}) == len(drawn)  # no two are drawn alike
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
        assert torch.equal(weight, other[name]) == (name not in drawn), name
    for name in drawn:
        assert torch.equal(weights[name], more[name]), name


@pytest.mark.parametrize("family", Family)
def test_first_weights_are_of_the_sizes_that_their_layers_say(family, monkeypatch):
    weights = fresh(family, 0)
    monkeypatch.setattr("models.drawn_apart", lambda build: build())
    for name, weight in fresh(family, 0).items():
        assert weights[name].mean() == pytest.approx(weight.mean().item(), abs=0.05), name
        if weight.numel() > 256:
            assert weights[name].std() == pytest.approx(weight.std().item(), rel=0.15), name


def test_what_a_thread_raises_is_raised(monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("no generator")

    monkeypatch.setattr(torch, "Generator", failing)
    with pytest.raises(RuntimeError, match="no generator"):
        drawn_apart(lambda: nn.Linear(2, 3))


@pytest.mark.parametrize("number", [0.0, 1.0, 2.0])
def test_a_weight_that_is_set_after_its_draw_stays_so(number):
    def build() -> nn.Linear:
        linear = nn.Linear(3, 3)
        {0.0: nn.init.zeros_, 1.0: nn.init.ones_}.get(number, lambda x: nn.init.constant_(x, number))(linear.weight)
        with torch.no_grad():
            linear.bias.copy_(torch.tensor(number))
        return linear

    assert all((weight == number).all() for weight in drawn_apart(build).parameters())
