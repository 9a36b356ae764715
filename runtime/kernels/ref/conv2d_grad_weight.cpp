// conv2d_grad_weight(x, ct; kernel, stride, padding, dilation, groups) -> [O, kh, kw, C / groups]
// dw[o, tap, c] = sum over pixels of ct[pixel, o] * x[the pixel that the tap read, c]: long sums over all
// images, hence f32 within one row of the image and f64 across rows.
#include "conv.h"

namespace pockc::ref {
namespace {

Tuple read(const Call& call, Attributes& attributes, Conv& conv) {
  const Tuple kernel = attributes.tuple_of(2, 1, kMaxWindow);
  read_conv(attributes, conv);
  set_shapes(call.inputs[0], call.outputs[0], call.inputs[1], conv);
  return kernel;
}

constexpr int kTileOutputs = 4;
constexpr int kTileChannels = 16;

// A part of dw at one tap: output channels [output, output + outputs) against x's channels [channel, channel
// + channels), the latter within one group. In the depthwise case each output channel has but its own input
// channel, and the tile is one row: output channels [output, output + channels).
struct Tile {
  int64_t row_tap, column_tap;
  int64_t output, outputs;
  int64_t channel, channels;
};

using Sums = double[kTileOutputs][kTileChannels];

// Adds the products of one image row. A full tile has constant bounds, for the compiler to unroll.
template <bool kFull>
void add_row(const Conv& conv, const Tile& tile, const float* x, const float* ct, Sums& total) {
  float sums[kTileOutputs][kTileChannels] = {};
  const int64_t outputs = kFull ? kTileOutputs : tile.outputs,
                channels = kFull ? kTileChannels : tile.channels;
  for (int64_t j = 0; j < conv.out_width; ++j) {
    const int64_t column = conv.window.position(1, j, tile.column_tap);
    if (column < 0 || column >= conv.width) continue;
    const float* pixel = x + column * conv.channels + tile.channel;
    const float* gradient = ct + j * conv.out_channels + tile.output;
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t c = 0; c < channels; ++c) sums[o][c] += gradient[o] * pixel[c];
    }
  }
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t c = 0; c < channels; ++c) total[o][c] += sums[o][c];
  }
}

void add_row_depthwise(const Conv& conv, const Tile& tile, const float* x, const float* ct, Sums& total) {
  float sums[kTileChannels] = {};
  for (int64_t j = 0; j < conv.out_width; ++j) {
    const int64_t column = conv.window.position(1, j, tile.column_tap);
    if (column < 0 || column >= conv.width) continue;
    const float* pixel = x + column * conv.channels + tile.channel;
    const float* gradient = ct + j * conv.out_channels + tile.channel;
    for (int64_t c = 0; c < tile.channels; ++c) sums[c] += gradient[c] * pixel[c];
  }
  for (int64_t c = 0; c < tile.channels; ++c) total[0][c] += sums[c];
}

void sum_tile(const Conv& conv, const Tile& tile, const float* x, const float* ct, Sums& total) {
  const bool full = tile.outputs == kTileOutputs && tile.channels == kTileChannels;
  for (int64_t image = 0; image < conv.batch; ++image) {
    for (int64_t i = 0; i < conv.out_height; ++i) {
      const int64_t row = conv.window.position(0, i, tile.row_tap);
      if (row < 0 || row >= conv.height) continue;
      const float* x_row = x + (image * conv.height + row) * conv.width * conv.channels;
      const float* ct_row = ct + (image * conv.out_height + i) * conv.out_width * conv.out_channels;
      if (conv.depthwise()) {
        add_row_depthwise(conv, tile, x_row, ct_row, total);
      } else if (full) {
        add_row<true>(conv, tile, x_row, ct_row, total);
      } else {
        add_row<false>(conv, tile, x_row, ct_row, total);
      }
    }
  }
}

int64_t at_most(int64_t count, int64_t limit) { return count < limit ? count : limit; }

// All tiles of one tap, for a convolution that is not depthwise.
void run_tap(const Conv& conv, Tile tile, const float* x, const float* ct, float* dw) {
  const int64_t depth = conv.group_channels(), per_group = conv.group_outputs();
  const int64_t dw_stride = conv.window.kernel[0] * conv.window.kernel[1] * depth;
  for (tile.output = 0; tile.output < conv.out_channels; tile.output += tile.outputs) {
    tile.outputs = at_most(per_group - tile.output % per_group, kTileOutputs);
    for (int64_t c = 0; c < depth; c += kTileChannels) {
      tile.channel = conv.first_channel(tile.output) + c;
      tile.channels = at_most(depth - c, kTileChannels);
      Sums total = {};
      sum_tile(conv, tile, x, ct, total);
      for (int64_t o = 0; o < tile.outputs; ++o) {
        for (int64_t k = 0; k < tile.channels; ++k) {
          dw[(tile.output + o) * dw_stride + c + k] = static_cast<float>(total[o][k]);
        }
      }
    }
  }
}

void run_tap_depthwise(const Conv& conv, Tile tile, const float* x, const float* ct, float* dw) {
  const int64_t taps = conv.window.kernel[0] * conv.window.kernel[1];
  for (tile.channel = 0; tile.channel < conv.channels; tile.channel += kTileChannels) {
    tile.channels = at_most(conv.channels - tile.channel, kTileChannels);
    Sums total = {};
    sum_tile(conv, tile, x, ct, total);
    for (int64_t k = 0; k < tile.channels; ++k)
      dw[(tile.channel + k) * taps] = static_cast<float>(total[0][k]);
  }
}

}  // namespace

Status check_conv2d_grad_weight(const Call& call) {
  if (!has_operands(call, 2, 2, 1) || !all_f32(call)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &ct = call.inputs[1], &w = call.outputs[0];
  if (!all_rank_4(x, w, ct)) return PK_BAD_FILE;
  Attributes attributes(call);
  Conv conv;
  const Tuple kernel = read(call, attributes, conv);
  return verdict(attributes.valid() && w.dims[1] == kernel[0] && w.dims[2] == kernel[1] &&
                 fits_conv(x, w, ct, conv));
}

Status run_conv2d_grad_weight(const Call& call) {
  Attributes attributes(call);
  Conv conv;
  read(call, attributes, conv);
  const float* x = call.inputs[0].as<float>();
  const float* ct = call.inputs[1].as<float>();
  float* dw = call.outputs[0].as<float>();
  Tile tile = {};
  for (tile.row_tap = 0; tile.row_tap < conv.window.kernel[0]; ++tile.row_tap) {
    for (tile.column_tap = 0; tile.column_tap < conv.window.kernel[1]; ++tile.column_tap) {
      const int64_t tap = tile.row_tap * conv.window.kernel[1] + tile.column_tap;
      float* part = dw + tap * conv.group_channels();
      if (conv.depthwise()) {
        run_tap_depthwise(conv, tile, x, ct, part);
      } else {
        run_tap(conv, tile, x, ct, part);
      }
    }
  }
  return PK_OK;
}

}  // namespace pockc::ref
