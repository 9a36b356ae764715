// conv2d(x, w, [bias]; stride, padding, dilation, groups, activation, low, high): geometry in conv.h. w may
// be compact.
#include "activation.h"
#include "conv.h"

namespace pockc::ref {
namespace {

Epilogue read(const Call& call, Attributes& attributes, Conv& conv) {
  read_conv(attributes, conv);
  set_shapes(call.inputs[0], call.inputs[1], call.outputs[0], conv);
  return read_epilogue(attributes);
}

// One tap for all output channels of one pixel: y[o] += x[its group] . w[o, tap].
void add_tap(const Conv& conv, const float* x, const float* w, float* y) {
  const int64_t depth = conv.group_channels(),
                w_stride = conv.window.kernel[0] * conv.window.kernel[1] * depth;
  const int64_t per_group = conv.group_outputs();
  for (int64_t group = 0; group < conv.groups; ++group) {
    for (int64_t o = group * per_group; o < (group + 1) * per_group; ++o) {
      y[o] += dot(x + group * depth, w + o * w_stride, depth);
    }
  }
}

// The same with compact weights.
void add_compact_tap(const Conv& conv, const float* x, const CompactRows& w, int64_t tap, float* y) {
  const int64_t depth = conv.group_channels();
  for (int64_t o = 0; o < conv.out_channels; ++o) {
    for_decoded(w, o, tap * depth, depth, [&](const float* values, int64_t begin, int64_t count) {
      y[o] += dot(x + conv.first_channel(o) + begin, values, count);
    });
  }
}

}  // namespace

Status check_conv2d(const Call& call) {
  if (!has_operands(call, 2, 3, 1, 1) || !all_f32(call, 1)) return PK_BAD_FILE;
  const Tensor &x = call.inputs[0], &w = call.inputs[1], &y = call.outputs[0];
  if (!all_rank_4(x, w, y)) return PK_BAD_FILE;
  Attributes attributes(call);
  Conv conv;
  read(call, attributes, conv);
  if (call.input_count == 3 && !has_shape(call.inputs[2], {w.dims[0]})) return PK_BAD_FILE;
  return verdict(attributes.valid() && fits_conv(x, w, y, conv));
}

Status run_conv2d(const Call& call) {
  Attributes attributes(call);
  Conv conv;
  const Epilogue epilogue = read(call, attributes, conv);
  const float* x = call.inputs[0].as<float>();
  const float* w = call.inputs[1].as<float>();
  const float* bias = call.input_count == 3 ? call.inputs[2].as<float>() : nullptr;
  float* y = call.outputs[0].as<float>();
  fill_zero(call.outputs[0]);
  if (is_compact(call.inputs[1].dtype)) {
    const CompactRows rows = compact_rows(call.inputs[1]);
    for_each_tap(conv, [&](int64_t x_pixel, int64_t y_pixel, int64_t tap) {
      add_compact_tap(conv, x + x_pixel * conv.channels, rows, tap, y + y_pixel * conv.out_channels);
    });
  } else {
    for_each_tap(conv, [&](int64_t x_pixel, int64_t y_pixel, int64_t tap) {
      add_tap(conv, x + x_pixel * conv.channels, w + tap * conv.group_channels(),
              y + y_pixel * conv.out_channels);
    });
  }
  const int64_t pixels = conv.batch * conv.out_height * conv.out_width;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    finish_row(epilogue, bias, y + pixel * conv.out_channels, conv.out_channels);
  }
  return PK_OK;
}

}  // namespace pockc::ref
