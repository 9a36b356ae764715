// conv2d_winograd: a 3x3 convolution of stride 1 by Winograd's algorithm (winograd.h), for tiles of 2 x 2 or
// 4 x 4 outputs, forward or as the input gradient of another one.
//
// For each of the s^2 places t of a tile: M[t] = V[t] U[t], a matrix product over channels, in which V[t] is
// [tiles, depth], what the inputs of all tiles have there, and U[t] is [depth, columns], what the weight has.
// Nothing is kept as a whole: V is made for some tiles at a time and U for some columns, as many as fit into
// a cache. The weight is transformed on the way and never stored in that form, which would take 16/9 or 4
// times its bytes: a multiplication of V with it reads each element once per tile, so that making it costs
// little more.
//
// Input gradients: dx[h] sums ct[h + p - r] w[r] over taps r, which is the convolution of ct with the taps in
// reverse order, padded by 2 - p. So `transposed` reads the weight as [depth = O, columns = C], reversed.
//
// Bits. The products are those of gemm.h and the transforms work on single tiles: neither blocks nor threads
// enter.
#include "simd/convolution.h"
#include "simd/winograd.h"

namespace pockc {
namespace POCKC_SIMD_NAMESPACE {
namespace {

// Most floats of V and of U at a time, if there are enough tiles and columns. The planner knows them too.
constexpr int64_t kInputFloats = 64 * 1024;
constexpr int64_t kWeightFloats = 128 * 1024;
constexpr int64_t kLeastTiles = 64;
constexpr int64_t kLeastColumns = 48;
constexpr int64_t kPlacePadding = 16;  // floats between places: they would fall on the same cache sets

struct Plan {
  Convolution c;
  Epilogue epilogue;
  int64_t outputs = 2;  // of a tile, per axis
  bool transposed = false;
  int64_t depth = 0, columns = 0;  // of the products
  int64_t tiles_h = 0, tiles_w = 0, tiles = 0;
  int64_t block_tiles = 0, block_columns = 0;

  int64_t places() const { return (outputs + kTaps - 1) * (outputs + kTaps - 1); }
  int64_t input_place() const { return block_tiles * depth + kPlacePadding; }
  int64_t weight_place() const { return block_columns * depth + kPlacePadding; }
  int64_t product_place() const { return block_tiles * block_columns + kPlacePadding; }
  int64_t product_scratch() const {
    LeftMatrix a;
    a.stride = depth;
    return part_scratch(block_tiles, block_columns, depth, copied(a));
  }
  bool is_threaded() const { return places() * block_tiles * block_columns * depth >= kThreadedWork; }
  int64_t floats(int threads) const {
    const int64_t shared = places() * (input_place() + weight_place() + product_place());
    return shared + (is_threaded() ? threads : 1) * product_scratch();
  }
};

// As many of `count` at a time as `most` allows, or `least`; nearly the same number each time, a multiple
// of 16.
int64_t block_of(int64_t count, int64_t most, int64_t least) {
  const int64_t blocks = divide_up(count, maximum(most, least));
  return round_up(divide_up(count, blocks), 16);
}

Plan describe(const Call& call) {
  Plan plan;
  Convolution& c = plan.c;
  c.set_x(call.inputs[0]);
  c.set_y(call.outputs[0]);
  c.set_kernel(call.inputs[1]);
  Attributes attributes(call);
  plan.outputs = attributes.integer();
  attributes.tuple(c.padding, 4);
  plan.transposed = attributes.boolean();
  plan.epilogue.activation = attributes.integer();
  plan.epilogue.low = attributes.real();
  plan.epilogue.high = attributes.real();
  if (call.input_count > 2) plan.epilogue.bias = call.inputs[2].as<float>();
  plan.depth = c.channels;
  plan.columns = c.out_channels;
  plan.tiles_h = divide_up(c.out_height, plan.outputs);
  plan.tiles_w = divide_up(c.out_width, plan.outputs);
  plan.tiles = c.batch * plan.tiles_h * plan.tiles_w;
  const int64_t place_depth = plan.places() * plan.depth;
  plan.block_tiles = block_of(plan.tiles, kInputFloats / place_depth, kLeastTiles);
  plan.block_columns = block_of(plan.columns, kWeightFloats / place_depth, kLeastColumns);
  return plan;
}

// Neighbours, from `begin` on.
struct Part {
  int64_t begin, count;
};

// --- weight ---

// U of one row of the weight (an output channel of it) and some of its input channels. Element (k, n) of the
// matrix is at n * depth + k, or transposed at k * columns + n: runs of input channels either way.
template <int Outputs, typename Rows>
void transform_row(const Plan& plan, const Rows& rows, int64_t row, Part channels, float* to) {
  constexpr int size = Outputs + kTaps - 1;
  const int64_t all = plan.transposed ? plan.columns : plan.depth, place = plan.weight_place();
  for_vectors(0, channels.count, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
    vf w[kTaps * kTaps], half[kTaps * size], u[size];
    POCKC_UNROLL
    for (int tap = 0; tap < kTaps * kTaps; ++tap) {
      const int from = plan.transposed ? kTaps * kTaps - 1 - tap : tap;
      w[tap] = rows.load(row, from * all + channels.begin + i, valid);
    }
    POCKC_UNROLL
    for (int r = 0; r < kTaps; ++r) Winograd<Outputs>::weight(w + r * kTaps, half + r * size);
    POCKC_UNROLL
    for (int s = 0; s < size; ++s) {
      const vf column[kTaps] = {half[s], half[size + s], half[2 * size + s]};
      Winograd<Outputs>::weight(column, u);
      POCKC_UNROLL
      for (int r = 0; r < size; ++r) store_n(to + (r * size + s) * place + i, u[r], valid);
    }
  });
}

template <int Outputs>
void transform_weight(const Call& call, const Plan& plan, Part columns, float* to) {
  const Tensor& w = call.inputs[1];
  const Part rows = plan.transposed ? Part{0, plan.depth} : columns;
  const Part channels = plan.transposed ? columns : Part{0, plan.depth};
  const int64_t grain = maximum<int64_t>(1, kElementGrain / (kTaps * kTaps * channels.count));
  parallel(call, rows.count, grain, [&](int64_t begin, int64_t end, int) {
    const auto transform = [&](const auto& from) {
      for (int64_t i = begin; i < end; ++i)
        transform_row<Outputs>(plan, from, rows.begin + i, channels, to + i * channels.count);
    };
    if (is_compact(w.dtype)) {
      with_compact_rows(compact_rows(w), transform);
    } else {
      transform(FloatRows{w.as<float>(), elements(w) / w.dims[0]});
    }
  });
}

// --- input and output ---

// A tile's first output, and the image that it is in.
struct TilePosition {
  int64_t n, h, w;

  TilePosition(const Plan& plan, int64_t tile)
      : n(tile / (plan.tiles_h * plan.tiles_w)),
        h(tile / plan.tiles_w % plan.tiles_h * plan.outputs),
        w(tile % plan.tiles_w * plan.outputs) {}
};

template <int Outputs>
void transform_tile(const Plan& plan, const float* x, int64_t tile, float* to) {
  constexpr int size = Outputs + kTaps - 1;
  const Convolution& c = plan.c;
  const TilePosition at(plan, tile);
  const float* pixel[size * size];  // null outside of the image
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      const int64_t h = at.h - c.padding[0] + i, w = at.w - c.padding[2] + j;
      const bool inside = h >= 0 && h < c.height && w >= 0 && w < c.width;
      pixel[i * size + j] = inside ? x + ((at.n * c.height + h) * c.width + w) * c.channels : nullptr;
    }
  }
  const int64_t place = plan.input_place();
  for_vectors(0, plan.depth, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
    vf d[size * size], v[size * size];
    POCKC_UNROLL
    for (int p = 0; p < size * size; ++p) d[p] = pixel[p] == nullptr ? vf{} : load_n(pixel[p] + i, valid);
    transform_square<size, size>(d, v, Winograd<Outputs>::input);
    POCKC_UNROLL
    for (int p = 0; p < size * size; ++p) store_n(to + p * place + i, v[p], valid);
  });
}

template <int Outputs>
void finish_tile(const Plan& plan, const float* products, int64_t tile, Part columns, float* y) {
  constexpr int size = Outputs + kTaps - 1;
  const Convolution& c = plan.c;
  const Epilogue& epilogue = plan.epilogue;
  const TilePosition at(plan, tile);
  const int64_t rows = minimum<int64_t>(Outputs, c.out_height - at.h);
  const int64_t across = minimum<int64_t>(Outputs, c.out_width - at.w);
  const int64_t place = plan.product_place();
  float* first = y + ((at.n * c.out_height + at.h) * c.out_width + at.w) * c.out_channels + columns.begin;
  for_vectors(0, columns.count, [&](int64_t i, int64_t valid) POCKC_LAMBDA {
    vf m[size * size], result[Outputs * Outputs];
    POCKC_UNROLL
    for (int p = 0; p < size * size; ++p) m[p] = load_n(products + p * place + i, valid);
    transform_square<size, Outputs>(m, result, Winograd<Outputs>::output);
    const vf bias = epilogue.bias == nullptr ? vf{} : load_n(epilogue.bias + columns.begin + i, valid);
    POCKC_UNROLL
    for (int r = 0; r < Outputs; ++r) {
      POCKC_UNROLL
      for (int s = 0; s < Outputs; ++s) {
        if (r >= rows || s >= across) continue;
        vf value = result[r * Outputs + s] + bias;
        if (epilogue.activation == kClip) value = clip(value, splat(epilogue.low), splat(epilogue.high));
        store_n(first + (r * c.out_width + s) * c.out_channels + i, value, valid);
      }
    }
  });
  if (epilogue.activation <= kClip) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t s = 0; s < across; ++s) {
      activate(first + (r * c.out_width + s) * c.out_channels, columns.count,
               static_cast<Activation>(epilogue.activation));
    }
  }
}

// --- all of it ---

struct Scratch {
  float *inputs, *weights, *products, *gemm;

  Scratch(const Call& call, const Plan& plan)
      : inputs(workspace(call)),
        weights(inputs + plan.places() * plan.input_place()),
        products(weights + plan.places() * plan.weight_place()),
        gemm(products + plan.places() * plan.product_place()) {}
};

// M = V U for each place.
void multiply(const Call& call, const Plan& plan, Part tiles, Part columns, const Scratch& scratch) {
  const int64_t grain = plan.is_threaded() ? 1 : plan.places();
  parallel(call, plan.places(), grain, [&](int64_t begin, int64_t end, int thread) {
    Gemm g;
    g.m = tiles.count;
    g.n = columns.count;
    g.k = plan.depth;
    g.a.stride = plan.depth;
    g.b.transposed = !plan.transposed;
    g.b.stride = plan.transposed ? columns.count : plan.depth;
    g.c.stride = columns.count;
    for (int64_t p = begin; p < end; ++p) {
      g.a.data = scratch.inputs + p * plan.input_place();
      g.b.data = scratch.weights + p * plan.weight_place();
      g.c.data = scratch.products + p * plan.product_place();
      gemm_alone(g, scratch.gemm + thread * plan.product_scratch());
    }
  });
}

template <int Outputs>
void run(const Call& call, const Plan& plan) {
  const Scratch scratch(call, plan);
  const float* x = call.inputs[0].as<float>();
  float* y = call.outputs[0].as<float>();
  const int64_t grain = maximum<int64_t>(1, kElementGrain / (plan.places() * plan.depth));
  int64_t transformed = -1;  // the columns whose U is there
  for (int64_t t = 0; t < plan.tiles; t += plan.block_tiles) {
    const Part tiles = {t, minimum(plan.block_tiles, plan.tiles - t)};
    parallel(call, tiles.count, grain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        transform_tile<Outputs>(plan, x, t + i, scratch.inputs + i * plan.depth);
    });
    for (int64_t n = 0; n < plan.columns; n += plan.block_columns) {
      const Part columns = {n, minimum(plan.block_columns, plan.columns - n)};
      if (transformed != n) transform_weight<Outputs>(call, plan, columns, scratch.weights);
      transformed = n;
      multiply(call, plan, tiles, columns, scratch);
      parallel(call, tiles.count, grain, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i)
          finish_tile<Outputs>(plan, scratch.products + i * columns.count, t + i, columns, y);
      });
    }
  }
}

}  // namespace

bool accepts_conv2d_winograd(const Call& call) {
  const Plan plan = describe(call);
  return convolution_fits(call, plan.c, call.inputs[0].dtype) &&
         has_workspace(call, 0, plan.floats(thread_count(call)));
}

Status run_conv2d_winograd(const Call& call) {
  const Plan plan = describe(call);
  if (plan.outputs == 2) {
    run<2>(call, plan);
  } else {
    run<4>(call, plan);
  }
  return PK_OK;
}

}  // namespace POCKC_SIMD_NAMESPACE
}  // namespace pockc
