// conv2d_int8(x u8, w u8[kh, kw, C / groups, O], factor f32[O], offset f32[O]; zero_point, stride, padding,
// dilation, groups, low, high): y[o] = code(factor[o] * sum((x - zero_point) * (w - 128)) + offset[o]).
// Geometry in conv.h, codes in quantized.h; padding is x = zero_point, which adds nothing. The sum is exact.
#include "conv.h"
#include "quantized.h"

namespace pockc::ref {
namespace {

constexpr int64_t kMostProducts = int64_t{1} << 16;  // of magnitude 255 * 128 at most: sums fit into 32 bits
constexpr int64_t kPiece = 256;                      // output channels that are added up together

struct Conv8 {
  Conv conv;
  int32_t zero = 0;
  Bounds bounds;
};

Conv8 read(const Call& call, Attributes& attributes) {
  Conv8 read;
  read.zero = static_cast<int32_t>(attributes.integer(0, kLargestCode));
  read_conv(attributes, read.conv);
  const Tensor& w = call.inputs[1];
  Tensor filters_first = w;
  filters_first.dims[0] = w.dims[3];
  filters_first.dims[1] = w.dims[0];
  filters_first.dims[2] = w.dims[1];
  filters_first.dims[3] = w.dims[2];
  set_shapes(call.inputs[0], filters_first, call.outputs[0], read.conv);
  read.bounds = read_bounds(attributes);
  return read;
}

bool fits(const Conv8& c, const Tensor& x, const Tensor& w, const Tensor& y) {
  const Conv& conv = c.conv;
  if (w.dims[0] > kMaxWindow || w.dims[1] > kMaxWindow) return false;
  if (conv.channels % conv.groups != 0 || conv.out_channels % conv.groups != 0) return false;
  if (w.dims[0] * w.dims[1] > kMostProducts / w.dims[2]) return false;
  return w.dims[2] == conv.group_channels() && y.dims[0] == x.dims[0] && y.dims[3] == w.dims[3] &&
         y.dims[1] == conv.window.outputs(0, x.dims[1]) && y.dims[2] == conv.window.outputs(1, x.dims[2]);
}

// The sums of output channels [first, first + count) of one pixel, which belong to one group.
void add_up(const Conv8& c, const uint8_t* x, const uint8_t* w, int64_t image, int64_t i, int64_t j,
            int64_t first, int64_t count, int32_t* sums) {
  const Conv& conv = c.conv;
  const int64_t depth = conv.group_channels(), from = conv.first_channel(first);
  for (int64_t o = 0; o < count; ++o) sums[o] = 0;
  for_each_tap(conv, image, i, j, [&](int64_t x_pixel, int64_t, int64_t tap) {
    for (int64_t k = 0; k < depth; ++k) {
      const int32_t value = x[x_pixel * conv.channels + from + k] - c.zero;
      const uint8_t* row = w + (tap * depth + k) * conv.out_channels + first;
      for (int64_t o = 0; o < count; ++o) sums[o] += value * (row[o] - kWeightZero);
    }
  });
}

}  // namespace

Status check_conv2d_int8(const Call& call) {
  if (!has_operands(call, 4, 4, 1)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &w = call.inputs[1], &y = call.outputs[0];
  if (!is_codes(x) || !is_codes(w) || !is_codes(y) || !all_rank_4(x, w, y)) return PK_BAD_FILE;
  for (int i = 2; i < 4; ++i) {
    if (!is_f32(call.inputs[i]) || !has_shape(call.inputs[i], {w.dims[3]})) return PK_BAD_FILE;
  }
  Attributes attributes(call);
  const Conv8 c = read(call, attributes);
  return verdict(attributes.valid() && c.bounds.valid() && fits(c, x, w, y));
}

Status run_conv2d_int8(const Call& call) {
  Attributes attributes(call);
  const Conv8 c = read(call, attributes);
  const Conv& conv = c.conv;
  const uint8_t* x = call.inputs[0].as<uint8_t>();
  const uint8_t* w = call.inputs[1].as<uint8_t>();
  const float* factor = call.inputs[2].as<float>();
  const float* offset = call.inputs[3].as<float>();
  uint8_t* y = call.outputs[0].as<uint8_t>();
  int32_t sums[kPiece];
  const int64_t pixels = conv.batch * conv.out_height * conv.out_width;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t row = pixel / conv.out_width;
    for (int64_t first = 0; first < conv.out_channels;) {
      const int64_t group_end = (first / conv.group_outputs() + 1) * conv.group_outputs();
      const int64_t count = group_end - first < kPiece ? group_end - first : kPiece;
      add_up(c, x, w, row / conv.out_height, row % conv.out_height, pixel % conv.out_width, first, count,
             sums);
      for (int64_t o = 0; o < count; ++o) {
        const float scaled = static_cast<float>(sums[o]) * factor[first + o] + offset[first + o];
        y[pixel * conv.out_channels + first + o] = to_code(scaled, c.bounds);
      }
      first += count;
    }
  }
  return PK_OK;
}

}  // namespace pockc::ref
