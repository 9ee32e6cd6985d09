"""What BPS consists of, and why adding it to a U-Net is safe."""
import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from bps import BPS, BPSConfig, build_bps, config_for, load_bps, posterior, save_bps
from inputs import options
from inputs.checkpoints import load_unet
from inputs.options import FEET
from studies.wiring import port_table
from unet import UNet, UNetConfig
from weights import UserError

SMALL = UNetConfig(channels=(32, 64), attention=(True, False), heads=(2, 4), blocks_per_level=1,
                   context_dim=24)
B, H, W, FACTOR = 3, 12, 8, 4       # all different, H != W


@pytest.fixture
def parts():
    """A small random U-Net, a fresh BPS for it, and inputs."""
    torch.manual_seed(0)
    unet = UNet(SMALL).eval().requires_grad_(False)
    bps = BPS(config_for(SMALL, cond_channels=2, factor=FACTOR))
    inputs = dict(z_t=torch.randn(B, 4, H, W), t=torch.tensor([1, 500, 999]),
                  context=torch.randn(B, 5, 24))
    return unet, bps, inputs, torch.rand(B, 2, H * FACTOR, W * FACTOR)


def randomize_ports(bps):
    """Make every zero convolution of BPS non-zero in place, as training would."""
    for parameter in bps.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


@pytest.mark.parametrize("foot", FEET)
def test_steered_unet_equals_the_base_exactly_at_initialization(foot, parts):
    unet, _, inputs, cond = parts
    bps = build_bps(config_for(SMALL, 2, FACTOR, foot=foot))
    residuals = bps(cond, unet.time_embedding(inputs["t"]))
    assert torch.equal(unet(**inputs, residuals=residuals), unet(**inputs))


def test_only_port_convolutions_get_a_gradient_in_the_first_step(parts):
    unet, bps, inputs, cond = parts
    residuals = bps(cond, unet.time_embedding(inputs["t"]))
    unet(**inputs, residuals=residuals).square().mean().backward()
    ports = {f"zero_blocks.{i}" for i, port in enumerate(bps.zero_blocks) if port is not None}
    ports |= {f"output_blocks.{i}.1" for i in range(len(bps.output_blocks))}
    for name, parameter in bps.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == (name.rsplit(".", 1)[0] in ports), name
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_sd15_size_has_the_published_number_of_parameters_and_21_ports():
    with torch.device("meta"):
        bps, unet = BPS(BPSConfig()), UNet(UNetConfig())
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    # 692,370,894 in the authors' checkpoint less 14 scalar weights and 4 unused port convolutions
    unused = sum(9 * c * c + c for c in (320, 320, 640, 1280))
    assert sum(p.numel() for p in bps.parameters()) == 692_370_894 - 14 - unused
    ports = sum(port is not None for port in bps.zero_blocks) + len(bps.output_blocks)
    assert ports == 21


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("foot", FEET)
@pytest.mark.parametrize("port_weights", [
    (16, 8, 0, 0), (0, 8, 0, 0), (0, 0, 16, 0), (0, 0, 0, 1), (16, 8, 16, 0), (16, 8, 0, 1),
    (0, 0, 16, 1), (16, 8, 16, 1)], ids=str)
def test_weight_0_is_no_port_and_everything_built_is_used(port_weights, foot, parts):
    unet, _, inputs, cond = parts
    outer, inner, middle, expansive = (weight > 0 for weight in port_weights)
    bps = build_bps(config_for(SMALL, 2, FACTOR, port_weights, foot))
    randomize_ports(bps)
    residuals = bps(cond, unet.time_embedding(inputs["t"]))
    has_port = [residual is not None for residual in residuals]
    assert has_port == [False, outer, False, inner, middle, *[expansive] * len(unet.output_blocks)]
    unet(**inputs, residuals=residuals).square().mean().backward()
    unused = {name for name, p in bps.named_parameters() if p.grad is None}
    assert unused == set()


def test_a_light_foot_has_40_percent_of_the_parameters_at_most():
    with torch.device("meta"):
        for unet_config, factor in ((UNetConfig(), 8), (load_unet(options.BASE).config, 4)):
            faithful, light = (parameters(build_bps(config_for(unet_config, 1, factor, foot=foot)))
                               for foot in FEET)
            assert light <= 0.4 * faithful


def test_a_light_foot_reads_the_end_of_each_level_and_the_middle(parts):
    unet, _, inputs, cond = parts
    light, outputs, seen = build_bps(config_for(SMALL, 2, FACTOR, foot="light")), {}, []
    for name, block in (("1", light.input_blocks[1]), ("3", light.input_blocks[3]),
                        ("middle", light.middle_block[-1])):
        block.register_forward_hook(lambda *a, name=name: outputs.update({name: a[2]}))
    for shared, _ in light.output_blocks:
        shared.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    light(cond, unet.time_embedding(inputs["t"]))
    inner, outer = seen
    assert torch.equal(inner, torch.cat([outputs["middle"], outputs["3"]], dim=1))
    assert torch.equal(outer[:, -32:], outputs["1"])


@pytest.mark.parametrize("foot", FEET)
@pytest.mark.parametrize("port_weights", [(16, 8, 4, 2, 16, 1), (16, 8, 4, 2, 0, 0),
                                          (0, 0, 0, 0, 16, 1)], ids=str)
def test_the_table_of_ports_accounts_for_every_parameter(port_weights, foot):
    with torch.device("meta"):
        bps = build_bps(config_for(UNetConfig(), 1, 8, port_weights, foot))
    rows = port_table(bps, 64)
    assert sum(row[-1] for row in rows) == parameters(bps)
    a, b, c, d, middle, expansive = (weight or "-" for weight in port_weights)
    assert [row[4] for row in rows] == ["-", a, a, "-", b, b, "-", c, c, "-", d, d, middle,
                                        *[expansive] * 12]


def test_posterior_is_prior_plus_weighted_differences():
    prior, first, second = torch.randn(3, 2, 4, 3, 5)
    assert torch.equal(posterior(prior, [first], [0.0]), prior)
    torch.testing.assert_close(posterior(prior, [first, second], [0.5, 2.0]),
                               -1.5 * prior + 0.5 * first + 2 * second)
    with pytest.raises(ValueError, match="argument 2 is shorter than argument 1"):
        posterior(prior, [first, second], [1.0])


def test_a_condition_that_does_not_fit_is_refused(parts):
    unet, bps, inputs, cond = parts
    t_emb = unet.time_embedding(inputs["t"])
    with pytest.raises(ValueError, match="must have 2 channels"):
        bps(cond[:, :1], t_emb)
    with pytest.raises(ValueError, match="multiples of 4"):
        bps(cond[..., 1:], t_emb)


def test_a_saved_bps_comes_back_with_config_and_metadata(tmp_path):
    bps = BPS(config_for(SMALL, 2, FACTOR, (16, 8, 16, 1)))     # weights may be whole numbers
    randomize_ports(bps)
    bps = bps.half().float()                                # files are fp16
    save_bps(bps, tmp_path / "bps.safetensors", dict(task="sketch", size=64))
    loaded = load_bps(tmp_path / "bps.safetensors")
    assert loaded.config == bps.config and loaded.metadata == dict(task="sketch", size=64)
    assert all(torch.equal(a, b) for a, b in zip(bps.state_dict().values(),
                                                 loaded.state_dict().values()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    first = (tmp_path / "bps.safetensors").read_bytes()
    save_bps(bps, tmp_path / "bps.safetensors", dict(task="sketch", size=64))
    assert (tmp_path / "bps.safetensors").read_bytes() == first


@pytest.mark.parametrize("foot", ["faithful", "light"])
def test_a_bps_whose_ports_are_still_zero_can_be_loaded(foot, tmp_path):
    bps = build_bps(config_for(SMALL, 2, FACTOR, "head-heavy", foot))
    save_bps(bps, tmp_path / "bps.safetensors", dict(task="sketch", size=64))
    assert load_bps(tmp_path / "bps.safetensors").config == bps.config


@pytest.mark.parametrize("config, training, message", [
    (dict(norm_groups=0), {}, "norm_groups must be a whole number in .*, got 0"),
    (dict(blocks_per_level=10**6), {}, "no BPS has these sizes .2000000 layers in 86 tensors"),
    (dict(input_weights=["16", "8"]), {}, "input_weights must be a list, each entry a number in"),
    ({}, dict(size=64.0), "size must be a whole number in .*, got 64.0"),
    ({}, dict(classes={"#000000": 5}), "classes must be a list, each entry text"),
    ({}, dict(classes=[1]), "is not a BPS file")], ids=str)
def test_a_bps_file_that_makes_no_sense_is_refused_in_one_line(config, training, message, parts,
                                                               tmp_path):
    config = json.loads(json.dumps(dataclasses.asdict(parts[1].config))) | config
    save_file(parts[1].state_dict(), tmp_path / "bad.safetensors",
              dict(bps=json.dumps(dict(config=config, training=training))))
    with pytest.raises(UserError, match=message):
        load_bps(tmp_path / "bad.safetensors")


def test_a_file_that_is_no_bps_is_refused(tmp_path):
    for metadata in (None, dict(bps="[" * 100_000), dict(bps="[]"), dict(bps='{"config": 1}')):
        save_file(dict(a=torch.zeros(2)), tmp_path / "other.safetensors", metadata)
        with pytest.raises(UserError, match="not a BPS file"):
            load_bps(tmp_path / "other.safetensors")
