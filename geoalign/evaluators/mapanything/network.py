"""The pose path of MapAnything: DINOv2 encoder, alternating-attention trunk, pose and scale heads.

Written from the description in Keetha et al., "MapAnything" (arXiv 2509.13414) and checked against numbers of the
published code. Only what the camera poses read is here: the dense head reads the trunk without feeding back, and with
images as the only input the geometric encoders contribute exactly zero. Parameter names are the published ones.

The forward pass has static shapes, draws no random numbers and never waits for the device, so it can be captured in a
CUDA graph. The position table is interpolated once per image size by :meth:`PoseNetwork.set_size`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoalign.errors import UsageError
from geoalign.evaluators.mapanything.blocks import LAYER_NORM_EPS, Block, CastLinear
from geoalign.evaluators.mapanything.layout import PoseNetworkLayout

_POSE_HIDDEN, _POSE_RESIDUAL_BLOCKS = 784, 2
_SCALE_HIDDEN, _SCALE_LAYERS = 196, 2
_MIN_SCALE = 1e-8
# DINOv2 adds this to the patch count before it forms the resize factor; the trained weights expect the shift.
_TABLE_OFFSET = 0.1


class RawPoses(NamedTuple):
    """Poses as the network states them: every view, the first included, in a frame of the network's choice.

    Attributes:
        translation: ``[B, V, 3]`` float32, camera centres in metres (scale applied).
        quaternion: ``[B, V, 4]`` float32, unit, x y z w, camera-to-world, arbitrary sign.
        scale: ``[B, 1]`` float32, the metric scale that ``translation`` contains.
    """

    translation: Tensor
    quaternion: Tensor
    scale: Tensor


class PoseBackend(Protocol):
    """Anything that maps normalised images to poses (this network, or the published package)."""

    patch: int

    def __call__(self, images: Tensor) -> RawPoses:
        """``[B, V, 3, H, W]`` float32, ImageNet-normalised, H and W multiples of ``patch``."""
        ...


class PatchEmbed(nn.Module):
    """Linear embedding of image patches (a convolution whose stride is its kernel)."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, tokens, C]``, row by row."""
        return self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """DINOv2 without registers, cut after ``encoder_depth`` blocks."""

    def __init__(self, layout: PoseNetworkLayout) -> None:
        super().__init__()
        width = layout.encoder_width
        self.table_side = layout.table_side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + layout.table_side**2, width))
        self.patch_embed = PatchEmbed(layout.patch, width)
        self.blocks = nn.ModuleList(
            Block(width, layout.encoder_heads, layout.encoder_ffn, layer_scale=True)
            for _ in range(layout.encoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS) if layout.encoder_norm else nn.Identity()

    def position_table(self, rows: int, columns: int) -> Tensor:
        """``[1, 1 + rows * columns, C]`` float32: the trained table resized to the patch grid, class token first."""
        side = self.table_side
        if rows == columns == side:
            return self.pos_embed.float()
        head, grid = self.pos_embed[:, :1].float(), self.pos_embed[:, 1:].float()
        resized = F.interpolate(
            grid.view(1, side, side, -1).permute(0, 3, 1, 2),
            scale_factor=((rows + _TABLE_OFFSET) / side, (columns + _TABLE_OFFSET) / side),
            mode="bicubic",
        )
        if resized.shape[-2:] != (rows, columns):
            raise UsageError(f"the position table cannot be resized to {rows} x {columns} patches; use a smaller image")
        return torch.cat([head, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    def forward(self, images: Tensor, table: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, 1 + tokens, C]`` float32, class token first."""
        patches = self.patch_embed(images).float()
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + table
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Encoder(nn.Module):
    """Holds the vision transformer under the name of the published checkpoints (``encoder.model``)."""

    def __init__(self, layout: PoseNetworkLayout) -> None:
        super().__init__()
        self.model = VisionTransformer(layout)


class Trunk(nn.Module):
    """Alternating attention: even blocks over all tokens of a scene, odd blocks within each view.

    The scale token takes part in the even blocks only. View 0 is the reference: a constant vector marks its tokens; the
    other views are an unordered set.
    """

    def __init__(self, layout: PoseNetworkLayout) -> None:
        super().__init__()
        width = layout.trunk_width
        self.register_buffer("view_pos_table", torch.arange(width, dtype=torch.float32).remainder(2).view(1, width))
        self.proj_embed = CastLinear(layout.encoder_width, width) if layout.projects else nn.Identity()
        self.self_attention_blocks = nn.ModuleList(
            Block(width, layout.trunk_heads, layout.trunk_ffn, layer_scale=layout.trunk_layer_scale)
            for _ in range(layout.trunk_depth)
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, tokens: Tensor, scale_token: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, V, N, C_in]`` and ``[B, 1, C_in]`` to the same with the trunk's width, float32."""
        batch, views, per_view, _ = tokens.shape
        views_x = self.proj_embed(tokens).float()
        scale_x = self.proj_embed(scale_token).float()
        marked = views_x[:, :1] + self.view_pos_table
        x = torch.cat([marked, views_x[:, 1:]], dim=1).flatten(1, 2)
        for index, block in enumerate(self.self_attention_blocks):
            if index % 2 == 0:
                x, scale_x = block(torch.cat([x, scale_x], dim=1)).split([views * per_view, 1], dim=1)
            else:
                x = block(x.reshape(batch * views, per_view, -1)).view(batch, views * per_view, -1)
        return self.norm(x).view(batch, views, per_view, -1), self.norm(scale_x)


class ResidualConv(nn.Module):
    """Three 1 x 1 convolutions with ReLU, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.res_conv1 = nn.Conv2d(width, width, 1)
        self.res_conv2 = nn.Conv2d(width, width, 1)
        self.res_conv3 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.res_conv1(x))
        residual = F.relu(self.res_conv2(residual))
        return x + F.relu(self.res_conv3(residual))


class PoseHead(nn.Module):
    """Patch features of a view to a translation (before the metric scale) and a raw quaternion."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = _POSE_HIDDEN
        self.proj = nn.Conv2d(width, hidden, 1)
        self.res_conv = nn.ModuleList(ResidualConv(hidden) for _ in range(_POSE_RESIDUAL_BLOCKS))
        self.more_mlps = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.fc_t = nn.Linear(hidden, 3)
        self.fc_rot = nn.Linear(hidden, 4)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, tokens, C]`` float32 to ``[N, 3]`` and ``[N, 4]``."""
        x = self.proj(patches.transpose(1, 2).unsqueeze(-1))
        for block in self.res_conv:
            x = block(x)
        x = self.more_mlps(x.mean(dim=(2, 3)))
        return self.fc_t(x), self.fc_rot(x)


class ScaleHead(nn.Module):
    """The trunk's scale token to the logarithm of the metric scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = _SCALE_HIDDEN
        self.proj = nn.Linear(width, hidden)
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()) for _ in range(_SCALE_LAYERS))
        self.output_proj = nn.Linear(hidden, 1)

    def forward(self, token: Tensor) -> Tensor:
        """``[B, C]`` float32 to ``[B, 1]``."""
        x = self.proj(token)
        for layer in self.mlp:
            x = layer(x)
        return self.output_proj(x)


class PoseNetwork(nn.Module):
    """Pose-only MapAnything. Load it (``checkpoint.load_pose_network``), ``set_size``, then call it."""

    def __init__(self, layout: PoseNetworkLayout) -> None:
        super().__init__()
        self.layout = layout
        self.patch = layout.patch
        self.scale_token = nn.Parameter(torch.zeros(layout.encoder_width))
        self.encoder = Encoder(layout)
        self.fusion_norm_layer = nn.LayerNorm(layout.encoder_width, eps=LAYER_NORM_EPS)
        self.info_sharing = Trunk(layout)
        self.pose_head = PoseHead(layout.trunk_width)
        self.scale_head = ScaleHead(layout.trunk_width)
        self.register_buffer("position_table", torch.empty(0), persistent=False)

    def set_size(self, height: int, width: int) -> PoseNetwork:
        """Interpolate the position table for images of ``height`` x ``width`` pixels; returns self.

        Raises UsageError when a side is not a multiple of the patch size.
        """
        if height % self.patch or width % self.patch:
            raise UsageError(f"image size {height} x {width} is not a multiple of the patch size {self.patch}")
        with torch.no_grad():
            self.position_table = self.encoder.model.position_table(height // self.patch, width // self.patch)
        return self

    def use_matrix_dtype(self, dtype: torch.dtype) -> PoseNetwork:
        """Store the matrices of encoder and trunk in ``dtype`` (norms, tables, heads stay float32); returns self."""
        self.encoder.model.patch_embed.to(dtype)
        for module in self.modules():
            if isinstance(module, CastLinear):
                module.to(dtype)
        return self

    def forward(self, images: Tensor) -> RawPoses:
        """Poses of B scenes with V views each.

        Args:
            images: ``[B, V, 3, H, W]`` float32, ImageNet-normalised, of the size set; view 0 is the reference.
        """
        batch, views, _, height, width = images.shape
        tokens = 1 + (height // self.patch) * (width // self.patch)
        if self.position_table.shape[1:2] != (tokens,):
            raise UsageError(
                f"the pose network is set to another size than {height} x {width}; call set_size(height, width)"
            )
        features = self.encoder.model(images.flatten(0, 1), self.position_table).view(batch, views, tokens, -1)
        fused = self.fusion_norm_layer(features[:, :, 1:])
        if self.layout.class_token_per_view:
            fused = torch.cat([fused, features[:, :, :1]], dim=2)
        scale_token = self.scale_token.view(1, 1, -1).expand(batch, 1, -1)
        shared, scale_features = self.info_sharing(fused, scale_token)
        translation, quaternion = self.pose_head(shared[:, :, : tokens - 1].flatten(0, 1))
        scale = self.scale_head(scale_features[:, 0]).exp().clamp_min(_MIN_SCALE)
        quaternion = F.normalize(quaternion.view(batch, views, 4), dim=-1)
        return RawPoses(translation.view(batch, views, 3) * scale[:, None], quaternion, scale)
