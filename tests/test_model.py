"""The network's parts against formulas written out by hand, its sizes and its shapes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dheads.conditioning import Condition, Cues
from dheads.config import Config, override, preset
from dheads.extensions.codes import codes_of
from dheads.extensions.motion import MotionCondition, condition_with
from dheads.extensions.network import ExtendedUNet
from dheads.model import AttentionBlock, Output, ResBlock, modulation, timestep_embedding

TINY = preset("tiny")


def condition(config: Config, batch: int = 2) -> MotionCondition:
    cond, size, tables = config.conditioning, config.network.image_size, config.extensions.codes
    codes = {c.name: torch.randn(batch, 2 * tables[c.name].context + 1, c.dims) for c in codes_of(config)}
    return condition_with(
        config,
        torch.randn(batch, 3, size, size),
        torch.randn(batch, cond.motion_frames, 3, size, size),
        Cues(torch.randn(batch, 2 * cond.audio_context + 1, cond.speech_dim), codes),
    )


def randomise(module: nn.Module) -> None:
    """Zero-initialised layers would hide what comes before them."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)


def forward(unet: ExtendedUNet, batch: int = 2) -> Output:
    size = unet.config.network.image_size
    with torch.no_grad():
        return unet(torch.randn(batch, 3, size, size), torch.arange(batch) * 400, condition(unet.config, batch))


def parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ExtendedUNet(config).parameters())


# --- Sizes and shapes


def test_number_of_parameters() -> None:
    """The paper's network has 204 M; gray motion frames save four input channels of the first convolution."""
    assert parameters(preset("crema")) == pytest.approx(204e6, rel=0.01)
    assert parameters(preset("crema")) - parameters(preset("lrw")) == 4 * 256 * 9


@pytest.mark.parametrize(
    ("name", "changes", "extensions", "has_variance", "has_gates"),
    [
        ("tiny", {}, {}, False, True),
        ("tiny", {"learned_variance": True}, {"copying": {"gates": False}}, True, False),
        ("tiny", {"learned_variance": True}, {}, True, True),
        ("tiny", {"num_res_blocks": 2, "channel_mult": [1, 2, 2], "attn_resolutions": [16]}, {}, False, True),
        ("tiny", {"learned_variance": True}, {"patches": {"size": 2, "detail_channels": 16}}, True, True),
        ("small", {}, {}, False, True),
    ],
)
def test_shapes(
    name: str, changes: dict[str, object], extensions: dict[str, object], has_variance: bool, has_gates: bool
) -> None:
    config = override(preset(name), {"network": changes, "extensions": extensions})
    size = config.network.image_size
    output = forward(ExtendedUNet(config).eval())
    assert output.prediction.shape == (2, 3, size, size)
    assert (output.var_frac.shape == (2, 3, size, size)) if has_variance else output.var_frac is None
    assert (output.gates.shape == (2, 2, size, size)) if has_gates else output.gates is None


@pytest.mark.parametrize("patch", [2, 4])
def test_patches_keep_the_shapes(patch: int) -> None:
    """A patch of n x n px becomes n^2 channels: the network works at 1/n of the side, and gives back whole pictures."""
    unet = ExtendedUNet(override(TINY, {"extensions": {"patches": {"size": patch}}})).eval()
    assert unet.stem.in_channels == 12 * patch**2
    sides: list[int] = []
    unet.stem.register_forward_hook(lambda module, given, h: sides.append(h.shape[-1]))
    output = forward(unet)
    assert sides == [32 // patch]
    assert output.prediction.shape == (2, 3, 32, 32)
    assert output.gates.shape == (2, 2, 32, 32)


def test_detail_adds_nothing_at_first() -> None:
    """Weights without the detail network say the same with a new one, and it sees patches of half the side."""
    plain = ExtendedUNet(override(TINY, {"extensions": {"patches": {"size": 4}}})).eval()
    randomise(plain)
    fine = ExtendedUNet(override(TINY, {"extensions": {"patches": {"size": 4, "detail_channels": 8}}})).eval()
    fine.load_state_dict(fine.state_dict() | plain.state_dict())
    sides: list[int] = []
    fine.detail.stem.register_forward_hook(lambda module, given, h: sides.append(h.shape[-1]))
    torch.manual_seed(1)
    ours = forward(fine)
    torch.manual_seed(1)
    theirs = forward(plain)
    assert sides == [16]
    torch.testing.assert_close(ours.prediction, theirs.prediction)
    torch.testing.assert_close(ours.gates, theirs.gates)
    assert torch.equal(ours.keep, torch.zeros(2, 1, 32, 32))
    assert theirs.keep is None


def test_a_new_network_predicts_zero() -> None:
    output = forward(ExtendedUNet(override(TINY, {"network": {"learned_variance": True}})))
    for tensor in (output.prediction, output.var_frac, output.gates):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_extras_are_there_only_when_asked_for() -> None:
    plain = {"copying": {"gates": False}, "motion": {"noise": 0.0}, "codes": {"lips": None, "eyes": None}}
    unet = ExtendedUNet(override(TINY, {"extensions": plain}))
    assert unet.lip_predictor is unet.noise_embed is None
    assert not any(name.startswith(("lip", "eye")) for name, _ in unet.named_modules())
    assert unet.out_conv.out_channels == 3
    unet = ExtendedUNet(TINY)
    assert None not in (unet.lip_predictor, unet.lip_embed, unet.noise_embed)
    assert unet.out_conv.out_channels == 3 + 2
    with torch.device("meta"):
        paper = ExtendedUNet(preset("crema"))
        core = ExtendedUNet(preset("crema"))
    assert paper.state_dict().keys() == core.state_dict().keys()
    assert paper.out_conv.out_channels == 6
    assert [layer.attn is not None for layer in (*paper.down, *paper.middle, *paper.up)].count(True) == 1


# --- Parts


@pytest.mark.parametrize("max_period", [10_000.0, 10.0])
def test_timestep_embedding(max_period: float) -> None:
    """cos and sin of t P^(-i / (C/2)); the released network's frequencies span 1 .. 0.1 only."""
    embedding = timestep_embedding(torch.tensor([0, 7, 999]), 8, max_period)
    for row, t in zip(embedding.tolist(), (0, 7, 999), strict=True):
        angles = [t * max_period ** (-i / 4) for i in range(4)]
        assert row == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=2e-4)


def test_modulation_is_time_first_then_audio() -> None:
    time, audio, h = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 3)
    scale, shift = modulation(time, audio)
    (t_s, t_b), (y_s, y_b) = time.chunk(2, 1), audio.chunk(2, 1)
    torch.testing.assert_close(scale * h + shift, (1 + y_s) * ((1 + t_s) * h + t_b) + y_b)


def shrink(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def grow(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize(("resample", "resized"), [(None, lambda x: x), ("down", shrink), ("up", grow)])
@pytest.mark.parametrize("outputs", [32, 64])
def test_residual_block(resample: str | None, resized: object, outputs: int) -> None:
    """h' = y_s (t_s GN(h) + t_b) + y_b with 1 + scale for both, on the branch; time first, then audio."""
    block = ResBlock(32, outputs, 16, 0.5, resample).eval()
    randomise(block)
    x, time_emb, audio_emb = torch.randn(2, 32, 8, 8), torch.randn(2, 16), torch.randn(2, 16)

    def norm(x: Tensor, module: nn.GroupNorm) -> Tensor:
        grouped = x.unflatten(1, (32, -1))
        mean = grouped.mean((2, 3, 4), keepdim=True)
        var = grouped.var((2, 3, 4), correction=0, keepdim=True)
        flat = ((grouped - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
        return flat * module.weight[:, None, None] + module.bias[:, None, None]

    def affine(emb: Tensor, module: nn.Linear) -> list[Tensor]:
        return list((emb @ module.weight.T + module.bias)[:, :, None, None].split(outputs, 1))

    h = F.conv2d(resized(F.silu(norm(x, block.in_norm))), block.in_conv.weight, block.in_conv.bias, padding=1)
    t_s, t_b = affine(time_emb, block.time_affine)
    y_s, y_b = affine(audio_emb, block.audio_affine)
    h = (1 + y_s) * ((1 + t_s) * norm(h, block.out_norm) + t_b) + y_b
    h = F.conv2d(F.silu(h), block.out_conv.weight, block.out_conv.bias, padding=1)
    skip = resized(x)
    if outputs != 32:
        skip = torch.einsum("oi,bihw->bohw", block.skip.weight[:, :, 0, 0], skip) + block.skip.bias[:, None, None]
    given = modulation(block.time_affine(time_emb), block.audio_affine(audio_emb))
    torch.testing.assert_close(block(x, *given), skip + h, rtol=1e-4, atol=1e-4)


def test_attention_is_softmax_of_scaled_products() -> None:
    block = AttentionBlock(32, 8)  # 4 heads of 8 channels
    randomise(block)
    x = torch.randn(2, 32, 3, 3)
    flat = F.group_norm(x, 32, block.norm.weight, block.norm.bias).flatten(2)
    heads = []
    qkv = torch.einsum("oi,bil->bol", block.qkv.weight[:, :, 0], flat) + block.qkv.bias[:, None]
    for head in range(4):
        q, k, v = qkv[:, 24 * head : 24 * (head + 1)].split(8, dim=1)  # each head's q, k, v lie side by side
        weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(8), dim=2)
        heads.append(torch.einsum("bqk,bck->bcq", weights, v))
    projected = torch.einsum("oi,bil->bol", block.proj.weight[:, :, 0], torch.cat(heads, 1)) + block.proj.bias[:, None]
    torch.testing.assert_close(block(x), x + projected.view_as(x), rtol=1e-4, atol=1e-5)


def test_a_new_residual_branch_is_the_identity() -> None:
    x, told = torch.randn(2, 32, 8, 8), torch.randn(2, 32)
    assert torch.equal(ResBlock(32, 32, 16, 0.0)(x, told, told), x)
    assert torch.equal(AttentionBlock(32, 8)(x), x)


# --- The whole


@pytest.fixture
def unet() -> ExtendedUNet:
    """A network whose every layer does something."""
    unet = ExtendedUNet(override(TINY, {"network": {"dropout": 0.5}})).eval()
    randomise(unet)
    return unet


def test_evaluation_is_deterministic_and_training_drops_out(unet: ExtendedUNet) -> None:
    given = torch.randn(1, 3, 32, 32), torch.tensor([500]), condition(TINY, 1)
    with torch.no_grad():
        assert torch.equal(unet(*given).prediction, unet(*given).prediction)
        unet.train()
        assert not torch.equal(unet(*given).prediction, unet(*given).prediction)


def test_examples_do_not_see_each_other(unet: ExtendedUNet) -> None:
    x_t, t, given = torch.randn(2, 3, 32, 32), torch.tensor([10, 900]), condition(TINY)
    alone = MotionCondition(given.identity[1:], given.motion_frames[1:], given.cues[1:], given.motion_noise[1:])
    with torch.no_grad():
        both, second = unet(x_t, t, given), unet(x_t[1:], t[1:], alone)
    torch.testing.assert_close(both.prediction[1:], second.prediction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("field", ["identity", "motion_frames", "audio_window", "lips", "motion_noise", "eyes"])
def test_the_output_depends_on_everything_that_is_given(unet: ExtendedUNet, field: str) -> None:
    x_t, t, given = torch.randn(2, 3, 32, 32), torch.tensor([10, 900]), condition(TINY)
    if field == "audio_window":
        other = replace(given, cues=Cues(given.cues.audio_window + 0.2, given.cues.codes))
    elif field in given.cues.codes:
        codes = {**given.cues.codes, field: given.cues.codes[field] + 0.2}
        other = replace(given, cues=Cues(given.cues.audio_window, codes))
    else:
        other = replace(given, **{field: getattr(given, field) + 0.2})
    with torch.no_grad():
        change = (unet(x_t, t, given).prediction - unet(x_t, t, other).prediction).abs().amax((1, 2, 3))
        assert (change > 1e-4).all()
        assert not torch.equal(unet(x_t, t, given).prediction, unet(x_t, t + 50, given).prediction)


def test_an_empty_extensions_table_is_the_papers_network() -> None:
    """The extended network computes what the core's does, from the same weights."""
    config = override(preset("crema"), {"network": {"image_size": 32, "model_channels": 32}})
    core, extended = ExtendedUNet(config).eval(), ExtendedUNet(config).eval()
    randomise(core)
    extended.load_state_dict(core.state_dict())
    x_t, t, given = torch.randn(2, 3, 32, 32), torch.tensor([10, 900]), condition(config)
    with torch.no_grad():
        ours, theirs = extended(x_t, t, given), core(x_t, t, Condition(given.identity, given.motion_frames, given.cues))
    assert torch.equal(ours.prediction, theirs.prediction)
    assert torch.equal(ours.var_frac, theirs.var_frac)
