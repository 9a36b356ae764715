// conv2d_winograd(x, w, [bias]; outputs, padding, transposed, activation, low, high): what conv2d computes
// for 3x3 taps and stride 1, or where transposed, what conv2d_grad_input does, with the padding of the equal
// convolution. Here as the plain sum, as exact as theirs: the algorithm is in simd/. w may be compact.
#include "activation.h"
#include "conv.h"

namespace pockc::ref {
namespace {

constexpr int64_t kTaps = 3;

struct Geometry {
  Conv conv;
  bool transposed = false;
  Epilogue epilogue;
};

Geometry read(const Call& call, Attributes& attributes) {
  Geometry geometry;
  Conv& conv = geometry.conv;
  if (attributes.integer(2, 4) == 3) attributes.integer(1, 0);  // 2 or 4: no other value passes both
  const Tuple padding = attributes.tuple_of(4, 0, kMaxWindow);
  for (int i = 0; i < 2; ++i) {
    conv.window.before[i] = padding[2 * i];
    conv.window.after[i] = padding[2 * i + 1];
  }
  geometry.transposed = attributes.boolean();
  geometry.epilogue = read_epilogue(attributes);
  set_shapes(call.inputs[0], call.inputs[1], call.outputs[0], conv);
  return geometry;
}

bool fits(const Tensor& x, const Tensor& w, const Tensor& y, const Geometry& geometry) {
  if (!all_rank_4(x, w, y) || w.dims[1] != kTaps || w.dims[2] != kTaps) return false;
  const Window& window = geometry.conv.window;
  const int in = geometry.transposed ? 0 : 3;  // the weight's axis of x's channels
  return w.dims[in] == x.dims[3] && w.dims[3 - in] == y.dims[3] && y.dims[0] == x.dims[0] &&
         y.dims[1] == window.outputs(0, x.dims[1]) && y.dims[2] == window.outputs(1, x.dims[2]);
}

// One tap for all channels of one pixel, rows of the weight from `offset` on: y[o] += x . w[o], or transposed
// y += x[o] w[o].
void add_tap(const Geometry& geometry, const float* x, const Tensor& w, int64_t offset, float* y) {
  const int64_t columns = w.dims[3];
  const auto add = [&](int64_t row, const float* values, int64_t begin, int64_t count) {
    if (geometry.transposed) {
      add_scaled(x[row], values, y + begin, count);
    } else {
      y[row] += dot(x + begin, values, count);
    }
  };
  for (int64_t row = 0; row < w.dims[0]; ++row) {
    if (is_compact(w.dtype)) {
      for_decoded(compact_rows(w), row, offset, columns,
                  [&](const float* values, int64_t begin, int64_t count) { add(row, values, begin, count); });
    } else {
      add(row, w.as<float>() + row * kTaps * kTaps * columns + offset, 0, columns);
    }
  }
}

}  // namespace

Status check_conv2d_winograd(const Call& call) {
  if (!has_operands(call, 2, 3, 1, 1) || !all_f32(call, 1)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &w = call.inputs[1], &y = call.outputs[0];
  if (!all_rank_4(x, w, y)) return PK_BAD_FILE;
  Attributes attributes(call);
  const Geometry geometry = read(call, attributes);
  if (call.input_count == 3 && !has_shape(call.inputs[2], {y.dims[3]})) return PK_BAD_FILE;
  return verdict(attributes.valid() && fits(x, w, y, geometry));
}

Status run_conv2d_winograd(const Call& call) {
  Attributes attributes(call);
  const Geometry geometry = read(call, attributes);
  const Conv& conv = geometry.conv;
  const Tensor& w = call.inputs[1];
  const float* x = call.inputs[0].as<float>();
  const float* bias = call.input_count == 3 ? call.inputs[2].as<float>() : nullptr;
  float* y = call.outputs[0].as<float>();
  fill_zero(call.outputs[0]);
  for_each_tap(conv, [&](int64_t x_pixel, int64_t y_pixel, int64_t tap) {
    const int64_t in_weight = geometry.transposed ? kTaps * kTaps - 1 - tap : tap;
    add_tap(geometry, x + x_pixel * conv.channels, w, in_weight * w.dims[3], y + y_pixel * conv.out_channels);
  });
  const int64_t pixels = conv.batch * conv.out_height * conv.out_width;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    finish_row(geometry.epilogue, bias, y + pixel * conv.out_channels, conv.out_channels);
  }
  return PK_OK;
}

}  // namespace pockc::ref
