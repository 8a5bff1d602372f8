// One output tile of one channel of one frame, in three phases that a barrier separates. Every phase is a plain loop
// over (thread, threads), so a host program can run the very same code thread by thread and check it without a GPU.
#pragma once

#include "geoalign/frame_preprocess.h"

namespace geoalign {

constexpr int kTileHeight = 14, kTileWidth = 84;

struct Tile {
  int32_t target, clip, frame, channel;
  int32_t y, x, height, width;                         // output pixels
  int32_t source_y, source_x, source_rows, source_columns;  // input pixels that they read
};

GEOALIGN_HD int32_t tiles_of(const Resize& resize) {
  return ((resize.y.size + kTileHeight - 1) / kTileHeight) * ((resize.x.size + kTileWidth - 1) / kTileWidth);
}

GEOALIGN_HD int32_t all_tiles(const FramePreprocess& p) {
  return tiles_of(p.resize[kGeometry]) + tiles_of(p.resize[kClip]) + tiles_of(p.resize[kStill]);
}

GEOALIGN_HD Tile make_tile(const FramePreprocess& p, int32_t index, int32_t channel, int32_t image) {
  Tile t;
  t.target = kGeometry;
  while (index >= tiles_of(p.resize[t.target])) index -= tiles_of(p.resize[t.target++]);
  t.clip = image / p.frames;
  t.frame = image % p.frames;
  t.channel = channel;
  const Axis& ay = p.resize[t.target].y;
  const Axis& ax = p.resize[t.target].x;
  const int32_t across = (ax.size + kTileWidth - 1) / kTileWidth;
  t.y = index / across * kTileHeight;
  t.x = index % across * kTileWidth;
  t.height = ay.size - t.y < kTileHeight ? ay.size - t.y : kTileHeight;
  t.width = ax.size - t.x < kTileWidth ? ax.size - t.x : kTileWidth;
  t.source_y = ay.first[t.y];
  t.source_x = ax.first[t.x];
  t.source_rows = ay.first[t.y + t.height - 1] + ay.taps - t.source_y;
  t.source_columns = ax.first[t.x + t.width - 1] + ax.taps - t.source_x;
  return t;
}

GEOALIGN_HD bool wanted(const FramePreprocess& p, const Tile& t) { return shows(p, t.target, t.frame); }

template <Pixel kPixel>
GEOALIGN_HD void load_tile_of(const FramePreprocess& p, const Tile& t, uint8_t* source, int32_t thread, int32_t threads) {
  const int64_t image = static_cast<int64_t>(t.clip) * p.frames + t.frame;
  const int64_t plane = (image * 3 + t.channel) * p.height * p.width;
  for (int32_t i = thread; i < t.source_rows * t.source_columns; i += threads) {
    const int32_t row = t.source_y + i / t.source_columns, column = t.source_x + i % t.source_columns;
    source[i] = static_cast<uint8_t>(read_level<kPixel>(p.video, plane + static_cast<int64_t>(row) * p.width + column));
  }
}

// Phase 1: source levels of the tile to `source` [source_rows, source_columns] as bytes.
GEOALIGN_HD void load_tile(const FramePreprocess& p, const Tile& t, uint8_t* source, int32_t thread, int32_t threads) {
  if (p.pixel == Pixel::kUint8) return load_tile_of<Pixel::kUint8>(p, t, source, thread, threads);
  if (p.pixel == Pixel::kFloat32) return load_tile_of<Pixel::kFloat32>(p, t, source, thread, threads);
  load_tile_of<Pixel::kBFloat16>(p, t, source, thread, threads);
}

// Phase 2: horizontal pass to `rows` [source_rows, width].
GEOALIGN_HD void resample_rows(const FramePreprocess& p, const Tile& t, const uint8_t* source, float* rows,
                               int32_t thread, int32_t threads) {
  const Axis& axis = p.resize[t.target].x;
  for (int32_t i = thread; i < t.source_rows * t.width; i += threads) {
    const int32_t row = i / t.width, x = t.x + i % t.width;
    const uint8_t* in = source + row * t.source_columns + axis.first[x] - t.source_x;
    const float* weights = axis.weights + static_cast<int64_t>(x) * axis.taps;
    float sum = 0.0f;
    for (int32_t k = 0; k < axis.taps; ++k) sum += weights[k] * static_cast<float>(in[k]);
    rows[i] = rounds_twice(t.target) ? truncf(half_up(sum)) : sum;
  }
}

// Phase 3: vertical pass, rounding, normalisation, store in the order of the target.
GEOALIGN_HD void store_tile(const FramePreprocess& p, const Tile& t, const float* rows, int32_t thread,
                            int32_t threads) {
  const Axis& axis = p.resize[t.target].y;
  const float* levels = p.levels + ((t.target == kGeometry ? 0 : 3) + t.channel) * 256;
  for (int32_t i = thread; i < t.height * t.width; i += threads) {
    const int32_t y = t.y + i / t.width, x = t.x + i % t.width;
    const float* in = rows + (axis.first[y] - t.source_y) * t.width + i % t.width;
    const float* weights = axis.weights + static_cast<int64_t>(y) * axis.taps;
    float sum = 0.0f;
    for (int32_t k = 0; k < axis.taps; ++k) sum += weights[k] * in[k * t.width];
    const float value = levels[static_cast<int32_t>(rounds_twice(t.target) ? half_up(sum) : half_even(sum))];
    if (t.target == kGeometry) {
      geometry_plane(p, t.clip, t.frame, t.channel)[static_cast<int64_t>(y) * p.resize[kGeometry].x.size + x] = value;
    } else {
      const int64_t offset = patch_offset(t.channel, y, x, p.resize[t.target].x.size);
      float* out = patch_slice(p, t.target, t.clip, t.frame) + offset;
      *out = value;
      if (t.target == kStill) out[kPatchArea] = value;
    }
  }
}

}  // namespace geoalign
