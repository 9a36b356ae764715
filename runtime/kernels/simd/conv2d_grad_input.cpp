// conv2d_grad_input, in gather form. y[oh] reads x[oh s - p + r d]; so x[h] receives from oh = (h + p - r d)
// / s, for those taps r where that division is exact. Which taps these are depends on h mod s alone: the
// pixels of one such phase (per axis) form a grid, along which oh steps by one. Each phase is therefore an
// ordinary implicit GEMM over the patches of ct, k = (its taps, out channel), and no multiplication by an
// inserted zero is ever done. Workspace: the most gemm_scratch floats of any phase (depthwise: see
// convolution.h).
//
// conv2d_grad_input_masked: the same, and each row of results is gated while it is in the cache.
#include "simd/convolution.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

Convolution describe(const Call& call, Gate* gate = nullptr) {
  Convolution c;
  c.set_y(call.inputs[0]);
  c.set_kernel(call.inputs[1]);
  c.set_x(call.outputs[0]);
  Attributes attributes(call);
  int64_t size[2];
  attributes.tuple(size, 2);
  c.read_attributes(&attributes);
  if (gate != nullptr) gate->read_attributes(&attributes);
  return c;
}

// The taps of one axis that reach the pixels of `phase`: descending, so that their offsets ascend as memory
// does.
int phase_taps(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t phase,
               int64_t* offsets, int64_t* taps) {
  int count = 0;
  for (int64_t r = kernel - 1; r >= 0; --r) {
    const int64_t shifted = phase + padding - r * dilation;
    if (shifted % stride != 0) continue;
    offsets[count] = shifted / stride;
    taps[count++] = r;
  }
  return count;
}

void zero_phase(const Call& call, const Gemm& g) {
  parallel(call, g.m, 256, [&](int64_t begin, int64_t end, int) {
    with_elements(g.c.dtype, [&](auto zero) {
      for (int64_t m = begin; m < end; ++m) zero_run(output_row<decltype(zero)>(g.c, m), g.n);
    });
  });
}

// The product of one phase of the first group.
struct Phase {
  Patches patches;
  int64_t offsets[kMaxTaps * kMaxTaps];  // of the taps, in a weight's row
  int64_t first_output;                  // the first pixel's place
  Gemm gemm;

  Phase(const Call& call, const Convolution& c, int64_t phase_h, int64_t phase_w);
  Phase(const Phase&) = delete;
  Phase& operator=(const Phase&) = delete;
};

Phase::Phase(const Call& call, const Convolution& c, int64_t phase_h, int64_t phase_w) {
  Patches& p = patches;
  p.dtype = call.inputs[0].dtype;
  p.image = call.inputs[0].data;
  p.height = c.out_height, p.width = c.out_width, p.pitch = c.out_channels, p.channels = c.group_out();
  p.grid_height = divide_up(c.height - phase_h, c.stride[0]);
  p.grid_width = divide_up(c.width - phase_w, c.stride[1]);
  int64_t rows[kMaxTaps], columns[kMaxTaps];
  p.taps_h = phase_taps(c.kernel_h, c.stride[0], c.padding[0], c.dilation[0], phase_h, p.tap_h, rows);
  p.taps_w = phase_taps(c.kernel_w, c.stride[1], c.padding[2], c.dilation[1], phase_w, p.tap_w, columns);
  p.finish();
  Gemm& g = gemm;
  g.m = c.batch * p.grid_height * p.grid_width;
  g.n = c.group_in();
  g.k = p.depth();
  for (int r = 0; r < p.taps_h; ++r) {
    for (int s = 0; s < p.taps_w; ++s) offsets[r * p.taps_w + s] = (rows[r] * c.kernel_w + columns[s]) * g.n;
  }
  g.a.data = p.image;
  g.a.dtype = p.dtype;
  g.a.stride = c.out_channels;
  if (!c.pointwise()) g.a.patches = &p;
  g.b.group_offsets = c.taps() == 1 ? nullptr : offsets;
  g.b.group_size = c.group_out();
  first_output = (phase_h * c.width + phase_w) * c.channels;
  g.c.dtype = call.outputs[0].dtype;
  g.c.stride = c.channels * c.stride[1];
  if (c.stride[0] == 1 && c.stride[1] == 1) return;  // the pixels of the image, one after the other
  g.c.grid_height = p.grid_height, g.c.grid_width = p.grid_width;
  g.c.row_pitch = c.channels * c.width * c.stride[0];
  g.c.image_pitch = c.channels * c.width * c.height;
}

template <typename Body>
void for_phases(const Call& call, const Convolution& c, Body&& body) {
  for (int64_t h = 0; h < minimum(c.stride[0], c.height); ++h) {
    for (int64_t w = 0; w < minimum(c.stride[1], c.width); ++w) {
      Phase phase(call, c, h, w);
      body(phase);
    }
  }
}

void run_phase(const Call& call, const Convolution& c, const Gate* gate, Phase& phase) {
  Gemm& g = phase.gemm;
  g.epilogue.gate = gate;
  const Tensor &ct = call.inputs[0], &dx = call.outputs[0];
  phase.patches.end = element(ct, elements(ct));
  for (int64_t group = 0; group < c.groups; ++group) {
    g.a.data = phase.patches.image = element(ct, group * c.group_out());
    g.c.data = element(dx, phase.first_output + group * g.n);
    if (g.k == 0) {
      zero_phase(call, g);
    } else {
      set_weight(call.inputs[1], group * c.group_out(), c.taps() * g.n, &g.b);
      gemm_parallel(call, g, workspace(call));
    }
  }
}

Status run(const Call& call, const Convolution& c, const Gate* gate) {
  if constexpr (!kHalfProducts) {
    if (c.depthwise()) {
      depthwise_grad_input(call, c, gate);
      return PK_OK;
    }
  }
  for_phases(call, c, [&](Phase& phase) { run_phase(call, c, gate, phase); });
  return PK_OK;
}

}  // namespace

bool accepts_conv2d_grad_input(const Call& call) {
  const Convolution c = describe(call);
  if (!convolution_fits(call, c, call.inputs[0].dtype)) return false;
  if constexpr (!kHalfProducts) {
    if (c.depthwise()) return has_workspace(call, 0, depthwise_floats(c));
  }
  int64_t most = 0;
  for_phases(call, c, [&](const Phase& phase) {
    if (phase.gemm.k > 0) most = maximum(most, gemm_scratch(phase.gemm, thread_count(call)));
  });
  return has_workspace(call, 0, most);
}

Status run_conv2d_grad_input(const Call& call) { return run(call, describe(call), nullptr); }

bool accepts_conv2d_grad_input_masked(const Call& call) { return accepts_conv2d_grad_input(call); }

Status run_conv2d_grad_input_masked(const Call& call) {
  Gate gate;
  const Convolution c = describe(call, &gate);
  gate.gradient = call.outputs[0].as<float>();
  if (is_f32(call.inputs[2])) {
    gate.values = call.inputs[2].as<float>();
  } else {
    gate.bits = call.inputs[2].as<uint8_t>();
  }
  return run(call, c, &gate);
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
