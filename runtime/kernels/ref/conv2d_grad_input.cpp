// conv2d_grad_input(ct, w; size, stride, padding, dilation, groups) -> [N, H, W, C]
// Each ct[pixel, o] sends w[o, tap] * ct to the pixel of x that its tap had read. w may be compact.
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

// The same with compact weights.
void scatter_compact_tap(const Conv& conv, const float* ct, const CompactRows& w, int64_t tap, float* x) {
  const int64_t depth = conv.group_channels();
  for (int64_t o = 0; o < conv.out_channels; ++o) {
    for_decoded(w, o, tap * depth, depth, [&](const float* values, int64_t begin, int64_t count) {
      add_scaled(ct[o], values, x + conv.first_channel(o) + begin, count);
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
  return verdict(attributes.valid() && x.dims[1] == size[0] && x.dims[2] == size[1] &&
                 fits_conv(x, w, ct, conv));
}

Status run_conv2d_grad_input(const Call& call) {
  Attributes attributes(call);
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
  return PK_OK;
}

}  // namespace pockc::ref
