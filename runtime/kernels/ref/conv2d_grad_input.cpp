// conv2d_grad_input(ct, w; size, stride, padding, dilation, groups) -> [N, H, W, C]
// conv2d_grad_input_masked(ct, w, gate; size, ..., groups, low, high, inclusive): zero where the gate is a
//   mask whose bit is not set, or floats that are not in range, both as in masks.cpp
// Each ct[pixel, o] sends w[o, tap] * ct to the pixel of x that its tap had read. w may be compact.
#include <cmath>

#include "conv.h"

namespace pockc::ref {
namespace {

Tuple read(const Call& call, Attributes& attributes, Conv& conv) {
  const Tuple size = attributes.tuple_of(2, 1, kMaxElements);
  read_conv(attributes, conv);
  set_shapes(call.outputs[0], call.inputs[1], call.inputs[0], conv);
  return size;
}

// One tap of one pixel: x[its group] += ct[o] * w[o, tap] for all output channels.
void scatter_tap(const Conv& conv, const float* ct, const float* w, float* x) {
  const int64_t depth = conv.group_channels(),
                w_stride = conv.window.kernel[0] * conv.window.kernel[1] * depth;
  const int64_t per_group = conv.group_outputs();
  for (int64_t group = 0; group < conv.groups; ++group) {
    for (int64_t o = group * per_group; o < (group + 1) * per_group; ++o) {
      add_scaled(ct[o], w + o * w_stride, x + group * depth, depth);
    }
  }
}

struct Range {
  float low = 0, high = 0;
  bool inclusive = false;

  explicit Range(Attributes& attributes)
      : low(attributes.number_f32()), high(attributes.number_f32()), inclusive(attributes.boolean()) {}
  bool holds(float x) const {
    const bool above = low == -INFINITY || (inclusive ? x >= low : x > low);
    const bool below = high == INFINITY || (inclusive ? x <= high : x < high);
    return above && below;
  }
};

// The same with compact weights.
void scatter_compact_tap(const Conv& conv, const float* ct, const CompactRows& w, int64_t tap, float* x) {
  const int64_t depth = conv.group_channels();
  for (int64_t o = 0; o < conv.out_channels; ++o) {
    for_decoded(w, o, tap * depth, depth, [&](const float* values, int64_t begin, int64_t count) {
      add_scaled(ct[o], values, x + conv.first_channel(o) + begin, count);
    });
  }
}

bool has_size(const Tensor& x, const Tuple& size) { return x.dims[1] == size[0] && x.dims[2] == size[1]; }

void run(const Call& call, Attributes& attributes) {
  Conv conv;
  read(call, attributes, conv);
  const float* ct = call.inputs[0].as<float>();
  const float* w = call.inputs[1].as<float>();
  float* x = call.outputs[0].as<float>();
  fill_zero(call.outputs[0]);
  if (is_compact(call.inputs[1].dtype)) {
    const CompactRows rows = compact_rows(call.inputs[1]);
    for_each_tap(conv, [&](int64_t x_pixel, int64_t y_pixel, int64_t tap) {
      scatter_compact_tap(conv, ct + y_pixel * conv.out_channels, rows, tap, x + x_pixel * conv.channels);
    });
  } else {
    for_each_tap(conv, [&](int64_t x_pixel, int64_t y_pixel, int64_t tap) {
      scatter_tap(conv, ct + y_pixel * conv.out_channels, w + tap * conv.group_channels(),
                  x + x_pixel * conv.channels);
    });
  }
}

}  // namespace

Status check_conv2d_grad_input(const Call& call) {
  if (!has_operands(call, 2, 2, 1, 1) || !all_f32(call, 1)) return PK_BAD_FILE;
  const Tensor &ct = call.inputs[0], &w = call.inputs[1], &x = call.outputs[0];
  if (!all_rank_4(x, w, ct)) return PK_BAD_FILE;
  Attributes attributes(call);
  Conv conv;
  const Tuple size = read(call, attributes, conv);
  return verdict(attributes.valid() && has_size(x, size) && fits_conv(x, w, ct, conv));
}

Status check_conv2d_grad_input_masked(const Call& call) {
  if (!has_operands(call, 3, 3, 1, 1)) return PK_BAD_FILE;
  const Tensor &ct = call.inputs[0], &w = call.inputs[1], &gate = call.inputs[2], &x = call.outputs[0];
  if (!is_f32(ct) || !is_weight(w) || !is_f32(x) || !all_rank_4(x, w, ct)) return PK_BAD_FILE;
  const bool bits = gate.dtype == DType::kU8 && has_shape(gate, {(x.elements() + 7) / 8});
  if (!bits && !same_type(gate, x)) return PK_BAD_FILE;
  Attributes attributes(call);
  Conv conv;
  const Tuple size = read(call, attributes, conv);
  const Range range(attributes);
  return verdict(attributes.valid() && has_size(x, size) && fits_conv(x, w, ct, conv));
}

Status run_conv2d_grad_input(const Call& call) {
  Attributes attributes(call);
  run(call, attributes);
  return PK_OK;
}

Status run_conv2d_grad_input_masked(const Call& call) {
  Attributes attributes(call);
  run(call, attributes);
  const Range range(attributes);
  const Tensor& gate = call.inputs[2];
  const bool bits = gate.dtype == DType::kU8;
  float* x = call.outputs[0].as<float>();
  const int64_t elements = call.outputs[0].elements();
  for (int64_t i = 0; i < elements; ++i) {
    const bool passes =
        bits ? (gate.as<uint8_t>()[i / 8] >> (i % 8) & 1) != 0 : range.holds(gate.as<float>()[i]);
    if (!passes) x[i] = 0.0f;
  }
  return PK_OK;
}

}  // namespace pockc::ref
