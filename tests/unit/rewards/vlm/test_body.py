"""The static Qwen2-VL path against stock transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.frozen.frames import SharedFrames
from geoalign.frozen.qwen_patches import fit_size, sample_frames
from geoalign.rewards.vlm.body import (
    RewardQwen,
    hpsv3_head,
    text_table,
    videoalign_head,
    vision_table,
)
from geoalign.rewards.vlm.layout import HPSV3_BODY, VIDEOALIGN_BODY, QwenLayout
from geoalign.rewards.vlm.scorers import StaticBody

TINY = QwenLayout(32, 2, 2, 64, 64, 2, 4, 2, 128, rows=512)
SIZE, FRAMES = (56, 84), 4
TOKENS = 12  # 2 slices x (4 x 6 patches) / 4
VIDEO_ID, READ = 501, (20, 30)


def network_of(seed: int = 0) -> RewardQwen:
    torch.manual_seed(seed)
    network = RewardQwen(TINY, videoalign_head(TINY)).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
        else:
            parameter.normal_(mean=1.0, std=0.1)
    return network


def stock_model(network: RewardQwen):
    """Stock transformers with the same weights, through transformers' own module names."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 128, "vocab_size": 512, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
        image_token_id=500, video_token_id=VIDEO_ID, vision_start_token_id=502, vision_end_token_id=503,
    )  # fmt: skip
    model = Qwen2VLModel(config).eval().requires_grad_(False)
    ours = network.state_dict()
    renamed = {
        name.replace("model.", "language_model.", 1) if name.startswith("model.") else name: value
        for name, value in ours.items()
        if not name.startswith("rm_head")
    }
    model.load_state_dict(renamed, strict=True)
    return model.to(network.model.norm.weight.dtype)


def inputs(batch: int = 2, length: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches, tokens, and where the visual tokens go and the head reads."""
    rng = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (batch, FRAMES, 3, *SIZE), generator=rng, dtype=torch.uint8)
    patches = SharedFrames().clip(range, lambda height, width: (height, width))(frames).inputs
    ids = torch.randint(0, 400, (batch, length), generator=rng)
    ids[:, 5 : 5 + TOKENS] = VIDEO_ID
    return patches, ids, torch.arange(5, 5 + TOKENS), torch.tensor([READ] * batch)


def static_body(network: RewardQwen, length: int = 32) -> StaticBody:
    return StaticBody(network, (SIZE[0] // 14, SIZE[1] // 14), length, range(5, 5 + TOKENS))


def stock_hidden(model, patches: Tensor, ids: Tensor, positions: Tensor | None) -> Tensor:
    """Stock hidden states; patches and grid go through the stock vision tower and its per-segment split."""
    grid = torch.tensor([[FRAMES // 2, 4, 6]] * len(ids))
    flat = patches.flatten(0, 2).to(model.dtype)
    types = (ids == VIDEO_ID).int() * 2
    out = model(
        input_ids=ids, pixel_values_videos=flat, video_grid_thw=grid, position_ids=positions, mm_token_type_ids=types
    )
    return out.last_hidden_state


def trained_positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand(3, *ids.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_path_equals_stock_transformers(dtype: torch.dtype) -> None:
    network = network_of()
    patches, ids, _, pool = inputs()
    # Both take the same (rounded) weights; the truth is stock transformers in float64.
    network.use_matrix_dtype(dtype)
    stock = stock_hidden(stock_model(network), patches, ids, trained_positions(ids))
    truth_network = RewardQwen(TINY, videoalign_head(TINY)).requires_grad_(False)
    truth_network.load_state_dict(network.state_dict())
    truth = stock_hidden(stock_model(truth_network.double().eval()), patches.double(), ids, trained_positions(ids))
    rows = pool[..., None].expand(-1, -1, TINY.width)
    expected, exact = (network.rm_head(hidden.gather(1, rows).float()) for hidden in (stock, truth))
    ours = static_body(network)(patches, ids, pool)["raw"]
    assert ours.dtype == torch.float32 and ours.shape == (2, 2, 1)
    if dtype == torch.float32:
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    # At most twice stock's own rounding error, plus one step of the storage dtype at the size of the outputs.
    step = torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (expected - exact).abs().max() + step


def test_stock_default_positions_would_change_scores() -> None:
    network = network_of()
    patches, ids, _, _ = inputs()
    model = stock_model(network)
    trained = stock_hidden(model, patches, ids, trained_positions(ids))
    default = stock_hidden(model, patches, ids, None)
    assert (trained - default).abs().max() > 1e-3


def test_prefix_cut_right_padding_and_batching_change_nothing() -> None:
    network = network_of()
    patches, ids, _, pool = inputs()
    full = static_body(network)(patches, ids, pool)["raw"]
    cut = static_body(network, 31)(patches, ids[:, :31], pool)["raw"]
    padded_ids = torch.cat((ids, torch.randint(0, 400, (2, 32))), dim=1)
    padded = static_body(network, 64)(patches, padded_ids, pool)["raw"]
    alone = static_body(network)(patches[1:], ids[1:], pool[1:])["raw"]
    # Other shapes let the matrix library sum in another order: a few float32 roundings of outputs of size one.
    bound = 16 * torch.finfo(torch.float32).eps * full.abs().max()
    for other, same in ((cut, full), (padded, full), (alone, full[1:])):
        assert (other - same).abs().max() <= bound


def test_what_follows_the_read_token_is_never_seen() -> None:
    network = network_of()
    patches, ids, _, pool = inputs()
    changed = ids.clone()
    changed[:, READ[-1] + 1 :] = 7
    body = static_body(network)
    assert torch.equal(body(patches, ids, pool)["raw"], body(patches, changed, pool)["raw"])


def test_frame_choice_and_sizes_of_the_published_scorer() -> None:
    counts = {fps: len(sample_frames(81, fps)) for fps in (30, 25, 24, 16, 15, 12, 8)}
    assert counts == {30: 6, 25: 6, 24: 6, 16: 10, 15: 10, 12: 14, 8: 20}
    assert sample_frames(81, 16) == (0, 9, 18, 27, 36, 44, 53, 62, 71, 80)
    assert fit_size(480, 832, factor=28, min_pixels=200704, max_pixels=200704) == (336, 588)
    with pytest.raises(UsageError, match="aspect ratio"):
        fit_size(2, 4000, factor=28, min_pixels=1, max_pixels=200704)
    with pytest.raises(UsageError, match="at least 4 frames"):
        sample_frames(3, 16)


@pytest.mark.parametrize(
    ("layout", "head", "body", "tensors"),
    [(VIDEOALIGN_BODY, videoalign_head, 2_208_600_000, 730), (HPSV3_BODY, hpsv3_head, 7_747_000_000, 735)],
)
def test_published_sizes(layout: QwenLayout, head, body: int, tensors: int) -> None:
    with torch.device("meta"):
        network = RewardQwen(layout, head(layout))
    count = sum(p.numel() for part in (network.visual, network.model) for p in part.parameters())
    assert count == pytest.approx(body, rel=1e-3)
    # 730 tensors of Qwen2-VL with its language head, which this body lacks; plus the head's.
    assert len(network.state_dict()) == tensors


def test_tables_have_the_shapes_of_the_grid() -> None:
    cos, sin = vision_table((24, 42), VIDEOALIGN_BODY)
    assert cos.shape == sin.shape == (1008, 80) and text_table(1836, VIDEOALIGN_BODY)[0].shape == (1836, 128)
    with pytest.raises(UsageError, match="merge window"):
        vision_table((3, 4), VIDEOALIGN_BODY)
