"""The network of a flow map: a flow's own at first, whatever the end of a step and the guidance scale."""

from __future__ import annotations

import pytest
import torch

from lamamba import LaMambaUNet, UNetConfig
from lamamba.inference.conditioning import ConditionedNetwork, UnpreparedNetwork
from tests.networks import random_inputs, random_network, two_blocks

GUIDED = dict(objective="flow-map", guidance_range=(1.0, 4.0), in_channels=1)


def test_it_is_its_flow_at_first():
    flow = random_network(two_blocks(objective="flow", in_channels=1))
    model = LaMambaUNet(two_blocks(**GUIDED)).eval()
    missing, unexpected = model.load_state_dict(flow.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"gap_embedding", "guidance_embedding"}
    x, t, y = random_inputs(flow.architecture, batch=3)
    with torch.no_grad():
        expected = flow(x, t, y)
        assert torch.equal(model(x, t, y), expected)
        for end, scale in ((0.0, 1.0), (t / 2, 4.0), (t, torch.tensor([1.0, 2.0, 3.0]))):
            assert torch.equal(model(x, t, y, end_timestep=end, guidance_scale=scale), expected)


def test_it_reads_both_times_and_the_scale():
    model = random_network(two_blocks(**GUIDED))
    x, t, y = random_inputs(model.architecture)
    with torch.no_grad():
        outputs = [model(x, t, y, end_timestep=end, guidance_scale=scale)
                   for end, scale in ((0.0, 1.0), (0.0, 2.0), (t / 2, 1.0), (t, 1.0))]
        assert torch.equal(model(x, t, y), outputs[-1])                         # no length, the lowest scale
    for number, output in enumerate(outputs):
        for other in outputs[:number]:
            assert (output - other).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [ConditionedNetwork, UnpreparedNetwork])
def test_conditioning_ahead_knows_where_steps_end(kind):
    model = random_network(two_blocks(**GUIDED))
    x, _, y = random_inputs(model.architecture)
    network = kind(model, [1000.0, 400.0])
    with torch.no_grad():
        for scale in (1.5, 3.0):
            network.set_guidance_scale(scale)
            network.prepare(y.tolist())
            for t, r in ((1000.0, 400.0), (400.0, 0.0)):
                expected = model(x, t, y, end_timestep=r, guidance_scale=scale)
                torch.testing.assert_close(network(x, torch.full((2,), t), y), expected)
        with pytest.raises(ValueError, match="no step of this run begins at timestep 700"):
            network(x, torch.full((2,), 700.0), y)


def test_wrong_inputs_are_named():
    model = random_network(two_blocks(**GUIDED))
    x, t, y = random_inputs(model.architecture)
    with pytest.raises(ValueError, match="guidance_scale runs from 5 to 5; this network takes 1 to 4"):
        model(x, t, y, guidance_scale=5.0)
    with pytest.raises(ValueError, match="timestep - end_timestep runs from -1 to -1"):
        model(x, t, y, end_timestep=t + 1)
    flow = random_network(two_blocks(objective="flow", in_channels=1))
    with pytest.raises(ValueError, match="end_timestep is for flow maps"):
        flow(x, t, y, end_timestep=0.0)
    with pytest.raises(ValueError, match="guidance_scale is for flow maps with a guidance_range"):
        flow(x, t, y, guidance_scale=2.0)


def test_its_configuration_is_of_version_two_and_others_of_version_one():
    config = two_blocks(**GUIDED)
    values = config.to_dict()
    assert (values["config_version"], values["guidance_range"]) == (2, [1.0, 4.0])
    assert UNetConfig.from_dict(values) == config
    others = two_blocks(objective="flow").to_dict()
    assert others["config_version"] == 1
    assert "guidance_range" not in others
    assert not any("gap" in name or "guidance" in name for name in LaMambaUNet(two_blocks()).state_dict())


@pytest.mark.parametrize(("changes", "said"), [
    (dict(guidance_range=(4.0, 1.0)), "1 <= low < high"),
    (dict(guidance_range=(0.5, 2.0)), "1 <= low < high"),
    (dict(guidance_range=(1.0, float("nan"))), "1 <= low < high"),
    (dict(objective="flow"), "is for flow maps with classes"),
    (dict(num_classes=0), "is for flow maps with classes"),
])
def test_ranges_that_do_not_fit(changes, said):
    with pytest.raises(ValueError, match=said):
        two_blocks(**{**GUIDED, **changes})


def test_scales_out_of_range_are_refused_with_the_range():
    with pytest.raises(ValueError, match="guidance 5 is out of range: this flow map takes 1 to 4"):
        two_blocks(**GUIDED).check_guidance(5)
    with pytest.raises(ValueError, match="this flow map takes 1 alone"):
        two_blocks(objective="flow-map").check_guidance(2)
    two_blocks(objective="flow").check_guidance(50)
