// Depthwise convolution, NHWC, vectorised over channels: forward and input gradient.
//
// Both are the same row operation: outputs i = 0..count of one row, each a sum over a few input rows and a
// few taps per row, reading the input at i * step + offset[s]. The forward step is the stride; the input
// gradient is taken per phase of the stride (see conv2d_grad_input.cpp), where the step is 1. Several
// neighbouring outputs are computed at once, so that an input vector is loaded once for all the taps that use
// it. Weights are first laid out as [tap][channel] in the workspace. Every output is one chain of fma over
// its taps.
//
// A tile goes along the channels of many pixels at once, an order that the hardware does not foresee. So what
// the tile to the right will touch for the first time is asked of the memory meanwhile, in the order in which
// it lies there.
#include "simd/convolution.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

constexpr int64_t kLineBytes = 64;

// Of images of T.
template <typename T>
struct Row {
  int rows = 0;   // input rows that exist, with their weights
  int fresh = 1;  // the last of these, which no output row above has read
  const T* x[kMaxTaps];
  const float* w[kMaxTaps];
  int taps = 0;
  int64_t offset[kMaxTaps];  // ascending
  int64_t weight[kMaxTaps];  // of tap s, floats from w
  bool adjacent = true;      // offset[s] = offset[0] + s and weight[s] = weight[0] + s * weight_step
  int64_t weight_step = 0;
  int64_t step = 1, width = 0, channels = 0;
  T* out = nullptr;
  int64_t out_step = 0, count = 0;
  const Epilogue* epilogue = nullptr;
};

template <typename T>
POCKC_INLINE void finish(const Epilogue& e, vf sum, int64_t c, T* to, int64_t valid) {
  if (e.bias != nullptr) sum += load_n(e.bias + c, valid);
  if (e.activation == kClip) sum = clip(sum, splat(e.low), splat(e.high));
  store_n(to, sum, valid);
}

// Output i, any taps, with a test per tap: kernels without a fast path.
template <typename T>
void single_output(const Row<T>& row, int64_t i) {
  const int64_t position = i * row.step;
  int first = 0, end = row.taps;
  while (first < end && position + row.offset[first] < 0) ++first;
  while (end > first && position + row.offset[end - 1] >= row.width) --end;
  for_vectors(0, row.channels, [&](int64_t c, int64_t valid) POCKC_LAMBDA {
    vf sum = {};
    for (int r = 0; r < row.rows; ++r) {
      for (int s = first; s < end; ++s) {
        const vf x = load_n(row.x[r] + (position + row.offset[s]) * row.channels + c, valid);
        sum = fma(x, load_n(row.w[r] + row.weight[s] + c, valid), sum);
      }
    }
    finish(*row.epilogue, sum, c, row.out + i * row.out_step + c, valid);
  });
}

// The next `Count` elements.
template <int64_t Count, typename T>
POCKC_INLINE void ask(const T* from, bool to_write) {
  POCKC_UNROLL
  for (int64_t i = 0; i < Count; i += kLineBytes / static_cast<int64_t>(sizeof(T))) {
    if (to_write) {
      __builtin_prefetch(from + i, 1);
    } else {
      __builtin_prefetch(from + i);
    }
  }
}

// Outputs [i, i + Tile) of at least one whole vector of channels: the last vector may overlap the one before
// it, and writes the same sums again. Where Edge is set, inputs outside of the image count as zero and
// outputs past the end of the row are not stored.
template <int Taps, int Step, int Tile, bool Edge, typename T>
POCKC_INLINE void tile_outputs(const Row<T>& row, int64_t i) {
  constexpr int kInputs = (Tile - 1) * Step + Taps;
  const int64_t first = i * Step + row.offset[0];
  const int64_t channels = row.channels, weight_step = row.weight_step, weight_start = row.weight[0];
  const int rows = row.rows;
  // Copies stay in registers: anything that has an address could be part of what is written.
  const Epilogue epilogue = *row.epilogue;
  const int64_t out_step = row.out_step;
  T* const out = row.out + i * out_step;
  bool inside[kInputs];
  for (int j = 0; j < kInputs; ++j) inside[j] = !Edge || (first + j >= 0 && first + j < row.width);
  const int64_t stored = Edge ? minimum<int64_t>(Tile, row.count - i) : Tile;
  const int64_t next_input = (first + kInputs) * channels;
  const T* next_output = out + Tile * out_step;
  for (int64_t begin = 0; begin < channels; begin += W) {
    for (int r = rows - row.fresh; r < rows; ++r) {
      ask<Tile * Step * W>(row.x[r] + next_input + begin * Tile * Step, false);
    }
    for (int64_t pixel = 0; pixel < out_step; pixel += channels, next_output += Tile * W) {
      ask<Tile * W>(next_output, true);
    }
    const int64_t c = minimum<int64_t>(begin, channels - W);
    vf sum[Tile];
    POCKC_UNROLL
    for (int t = 0; t < Tile; ++t) sum[t] = vf{};
    for (int r = 0; r < rows; ++r) {
      const T* from = row.x[r] + first * channels + c;
      const float* w = row.w[r] + weight_start + c;
      vf weight[Taps];
      POCKC_UNROLL
      for (int s = 0; s < Taps; ++s) weight[s] = load(w + s * weight_step);
      POCKC_UNROLL
      for (int j = 0; j < kInputs; ++j) {
        const vf x = !Edge || inside[j] ? load(from + j * channels) : vf{};
        // Of output t this is tap j - t * Step, which ascends with j.
        POCKC_UNROLL
        for (int t = 0; t < Tile; ++t) {
          const int s = j - t * Step;
          if (s >= 0 && s < Taps) sum[t] = fma(x, weight[s], sum[t]);
        }
      }
    }
    POCKC_UNROLL
    for (int t = 0; t < Tile; ++t) {
      if (!Edge || t < stored) finish(epilogue, sum[t], c, out + t * out_step + c, W);
    }
  }
}

template <int Taps, int Step, int Tile, typename T>
void run_tiles(const Row<T>& row) {
  for (int64_t i = 0; i < row.count; i += Tile) {
    const int64_t first = i * Step + row.offset[0];
    if (first >= 0 && i + Tile <= row.count && first + (Tile - 1) * Step + Taps <= row.width) {
      tile_outputs<Taps, Step, Tile, false>(row, i);
    } else {
      tile_outputs<Taps, Step, Tile, true>(row, i);
    }
  }
}

// The tile that wastes least: widths are mostly 7, 14, 28, ... or multiples of 4. Each size is unrolled code
// of its own, hence no more of them.
template <int Taps, int Step, typename T>
void run_row_fast(const Row<T>& row) {
  if (round_up(row.count, 7) <= round_up(row.count, 4)) {
    run_tiles<Taps, Step, 7>(row);
  } else {
    run_tiles<Taps, Step, 4>(row);
  }
}

template <typename T>
void run_row(const Row<T>& row) {
  const auto is = [&](int taps, int64_t step) {
    return row.adjacent && row.channels >= W && row.taps == taps && row.step == step;
  };
  if (is(3, 1)) {
    run_row_fast<3, 1>(row);
  } else if (is(3, 2)) {
    run_row_fast<3, 2>(row);
  } else if (is(5, 1)) {
    run_row_fast<5, 1>(row);
  } else if (is(5, 2)) {
    run_row_fast<5, 2>(row);
  } else if (is(2, 1)) {
    run_tiles<2, 1, 7>(row);
  } else if (is(1, 1)) {
    run_tiles<1, 1, 7>(row);
  } else {
    for (int64_t i = 0; i < row.count; ++i) single_output(row, i);
  }
}

void decode_weights(const Convolution& c, const CompactRows& rows, float* packed) {
  float taps[kMaxTaps];
  for (int64_t channel = 0; channel < c.channels; ++channel) {
    for (int64_t begin = 0; begin < c.taps(); begin += kMaxTaps) {
      const int64_t count = minimum<int64_t>(kMaxTaps, c.taps() - begin);
      decode(rows, channel, begin, count, taps);
      for (int64_t i = 0; i < count; ++i) packed[(begin + i) * c.channels + channel] = taps[i];
    }
  }
}

// Weights [C][taps] to [taps][C].
void repack_weights(const Convolution& c, const Tensor& weight, float* packed) {
  if (is_compact(weight.dtype)) {
    decode_weights(c, compact_rows(weight), packed);
    return;
  }
  const float* w = weight.as<float>();
  for (int64_t tap = 0; tap < c.taps(); ++tap) {
    for (int64_t channel = 0; channel < c.channels; ++channel) {
      packed[tap * c.channels + channel] = w[channel * c.taps() + tap];
    }
  }
}

template <typename T>
void finish_taps(Row<T>* row) {
  row->weight_step = row->taps > 1 ? row->weight[1] - row->weight[0] : 0;
  for (int s = 1; s < row->taps; ++s) {
    row->adjacent = row->adjacent && row->offset[s] == row->offset[0] + s &&
                    row->weight[s] == row->weight[0] + s * row->weight_step;
  }
}

int64_t row_grain(const Convolution& c, int64_t columns) {
  return maximum<int64_t>(1, kElementGrain / maximum<int64_t>(1, columns * c.channels));
}

// One row of the input gradient: all phases of its width.
template <typename T>
void grad_input_row(const Call& call, const Convolution& c, const float* packed, int64_t n, int64_t h) {
  static constexpr Epilogue kPlain;
  const T* ct = call.inputs[0].as<T>();
  Row<T> row;
  for (int64_t r = c.kernel_h - 1; r >= 0; --r) {
    const int64_t shifted = h + c.padding[0] - r * c.dilation[0];
    if (shifted < 0 || shifted % c.stride[0] != 0 || shifted / c.stride[0] >= c.out_height) continue;
    row.x[row.rows] = ct + (n * c.out_height + shifted / c.stride[0]) * c.out_width * c.channels;
    row.w[row.rows++] = packed + r * c.kernel_w * c.channels;
  }
  row.fresh = minimum(row.rows, 1);
  row.width = c.out_width;
  row.channels = c.channels;
  row.out_step = c.channels * c.stride[1];
  row.epilogue = &kPlain;
  for (int64_t phase = 0; phase < minimum(c.stride[1], c.width); ++phase) {
    row.taps = 0;
    row.adjacent = true;
    for (int64_t s = c.kernel_w - 1; s >= 0; --s) {
      const int64_t shifted = phase + c.padding[2] - s * c.dilation[1];
      if (shifted % c.stride[1] != 0) continue;
      row.offset[row.taps] = shifted / c.stride[1];
      row.weight[row.taps++] = s * c.channels;
    }
    finish_taps(&row);
    row.count = divide_up(c.width - phase, c.stride[1]);
    row.out = call.outputs[0].as<T>() + ((n * c.height + h) * c.width + phase) * c.channels;
    run_row(row);
  }
}

template <typename T>
void forward(const Call& call, const Convolution& c, const Epilogue& epilogue, const float* packed) {
  const T* x = call.inputs[0].as<T>();
  Row<T> shared;
  shared.taps = static_cast<int>(c.kernel_w);
  for (int s = 0; s < shared.taps; ++s) {
    shared.offset[s] = s * c.dilation[1] - c.padding[2];
    shared.weight[s] = s * c.channels;
  }
  finish_taps(&shared);
  shared.step = c.stride[1];
  shared.width = c.width;
  shared.channels = c.channels;
  shared.out_step = c.channels;
  shared.count = c.out_width;
  shared.epilogue = &epilogue;
  const int64_t row_floats = c.out_width * c.channels;
  parallel(call, c.batch * c.out_height, row_grain(c, c.out_width), [&](int64_t begin, int64_t end, int) {
    Row<T> row = shared;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / c.out_height;
      row.rows = 0;
      for (int64_t r = 0; r < c.kernel_h; ++r) {
        const int64_t y = (i - n * c.out_height) * c.stride[0] - c.padding[0] + r * c.dilation[0];
        if (y < 0 || y >= c.height) continue;
        row.x[row.rows] = x + (n * c.height + y) * c.width * c.channels;
        row.w[row.rows++] = packed + r * c.kernel_w * c.channels;
      }
      row.fresh = static_cast<int>(minimum<int64_t>(row.rows, c.stride[0]));
      row.out = call.outputs[0].as<T>() + i * row_floats;
      run_row(row);
      if constexpr (std::is_same_v<T, float>) {  // halves are not accepted with these: they would be rounded
                                                 // twice
        if (epilogue.activation > kClip) {
          activate(row.out, row_floats, static_cast<Activation>(epilogue.activation));
        }
      }
    }
  });
}

}  // namespace

int64_t depthwise_floats(const Convolution& c) { return round_up(c.taps() * c.channels, 16); }

void depthwise_forward(const Call& call, const Convolution& c, const Epilogue& epilogue) {
  float* packed = workspace(call);
  repack_weights(c, call.inputs[1], packed);
  with_elements(call.inputs[0].dtype, [&](auto zero) { forward<decltype(zero)>(call, c, epilogue, packed); });
}

void depthwise_grad_input(const Call& call, const Convolution& c, const Gate* gate) {
  float* packed = workspace(call);
  repack_weights(c, call.inputs[1], packed);
  const int64_t row_floats = c.width * c.channels;
  parallel(call, c.batch * c.height, row_grain(c, c.width), [&](int64_t begin, int64_t end, int) {
    with_elements(call.inputs[0].dtype, [&](auto zero) {
      for (int64_t i = begin; i < end; ++i) {
        grad_input_row<decltype(zero)>(call, c, packed, i / c.height, i % c.height);
        if (gate != nullptr) close_gate(*gate, call.outputs[0].as<float>() + i * row_floats, row_floats);
      }
    });
  });
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
