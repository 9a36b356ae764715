// attention(q[B,H,T,D], k[B,G,S,D], v[B,G,S,E], [mask]; scale, causal) -> (out[B,H,T,E], logsumexp[B,H,T])
// attention_grad(ct, q, k, v, out, logsumexp, [mask]; scale, causal) -> (dq, dk, dv)
//
// Head h reads key/value head h / (H / G). Scores are s = scale * q . k, plus a f32 mask; a bool mask that is
// false, or a key after the query when causal, makes s = -inf. Rows of scores are never stored: each pass
// recomputes them.
//   p = exp(s - logsumexp), out = sum p v.  A query that sees no key has out = 0, logsumexp = -inf, and no
//   gradient. dv = sum over queries of p ct;  ds = p (ct . v - ct . out);  dq = scale sum ds k;  dk = scale
//   sum ds q
#include <cmath>

#include "common.h"

namespace pockc::ref {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Attention {
  int64_t batch, heads, key_heads, queries, keys, depth, value_depth;
  const float *q, *k, *v;
  const Tensor* mask;  // or null
  int64_t mask_strides[kMaxRank];
  float scale;
  bool causal;

  int64_t key_head(int64_t head) const { return head / (heads / key_heads); }
  const float* query(int64_t b, int64_t h, int64_t i) const {
    return q + ((b * heads + h) * queries + i) * depth;
  }
  int64_t key_row(int64_t b, int64_t h, int64_t j) const { return (b * key_heads + key_head(h)) * keys + j; }
  // Keys that a causal query may see come first.
  int64_t visible_keys(int64_t i) const { return causal && i + 1 < keys ? i + 1 : keys; }

  float score(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const float product = scale * dot(query(b, h, i), k + key_row(b, h, j) * depth, depth);
    if (mask == nullptr) return product;
    const int64_t at = b * mask_strides[0] + h * mask_strides[1] + i * mask_strides[2] + j * mask_strides[3];
    if (mask->dtype == DType::kBool) return mask->as<uint8_t>()[at] != 0 ? product : kMinusInfinity;
    return product + mask->as<float>()[at];
  }
};

// Reads the operands from q on; `mask_index` is where the mask is, if there is one.
Attention read(const Call& call, int first, int mask_index, Attributes& attributes) {
  const Tensor &q = call.inputs[first], &k = call.inputs[first + 1], &v = call.inputs[first + 2];
  Attention attention = {};
  attention.batch = q.dims[0];
  attention.heads = q.dims[1];
  attention.key_heads = k.dims[1];
  attention.queries = q.dims[2];
  attention.keys = k.dims[2];
  attention.depth = q.dims[3];
  attention.value_depth = v.dims[3];
  attention.q = q.as<float>();
  attention.k = k.as<float>();
  attention.v = v.as<float>();
  attention.scale = attributes.number_f32();
  attention.causal = attributes.boolean();
  if (call.input_count > mask_index) {
    Tensor scores = q;
    scores.dims[3] = k.dims[2];
    attention.mask = &call.inputs[mask_index];
    broadcast_strides(*attention.mask, scores, attention.mask_strides);
  }
  return attention;
}

bool fits(const Call& call, int first, int mask_index) {
  const Tensor &q = call.inputs[first], &k = call.inputs[first + 1], &v = call.inputs[first + 2];
  if (!is_f32(q) || !is_f32(k) || !is_f32(v) || q.rank != 4 || k.rank != 4 || v.rank != 4) return false;
  if (k.dims[0] != q.dims[0] || q.dims[1] % k.dims[1] != 0 || k.dims[3] != q.dims[3]) return false;
  if (!same_shape_except(k, v, 3)) return false;
  Attributes attributes(call);
  attributes.number();
  attributes.boolean();
  if (!attributes.valid()) return false;
  if (call.input_count <= mask_index) return true;
  const Tensor& mask = call.inputs[mask_index];
  Tensor scores = q;
  scores.dims[3] = k.dims[2];
  return mask.rank == 4 && (is_f32(mask) || mask.dtype == DType::kBool) && broadcasts_to(mask, scores);
}

bool fits_outputs(const Tensor& q, const Tensor& v, const Tensor& out, const Tensor& logsumexp) {
  return is_f32(out) && is_f32(logsumexp) && has_shape(out, {q.dims[0], q.dims[1], q.dims[2], v.dims[3]}) &&
         has_shape(logsumexp, {q.dims[0], q.dims[1], q.dims[2]});
}

// Calls body(batch, head, query, row) for every query; rows count [B, H, T].
template <typename Body>
void for_each_query(const Attention& attention, Body&& body) {
  int64_t row = 0;
  for (int64_t b = 0; b < attention.batch; ++b) {
    for (int64_t h = 0; h < attention.heads; ++h) {
      for (int64_t i = 0; i < attention.queries; ++i) body(b, h, i, row++);
    }
  }
}

// Writes one query's output row and returns its logsumexp.
float attend(const Attention& attention, int64_t b, int64_t h, int64_t i, float* out) {
  const int64_t visible = attention.visible_keys(i), width = attention.value_depth;
  float highest = kMinusInfinity;
  for (int64_t j = 0; j < visible; ++j) {
    const float score = attention.score(b, h, i, j);
    if (score > highest || score != score) highest = score;  // NaN stays, so that it shows in the output
  }
  for (int64_t e = 0; e < width; ++e) out[e] = 0.0f;
  if (highest == kMinusInfinity) return kMinusInfinity;
  double total = 0.0;
  for (int64_t j = 0; j < visible; ++j) {
    const float weight = std::exp(attention.score(b, h, i, j) - highest);
    total += weight;
    add_scaled(weight, attention.v + attention.key_row(b, h, j) * width, out, width);
  }
  for (int64_t e = 0; e < width; ++e) out[e] = static_cast<float>(out[e] / total);
  return static_cast<float>(highest + std::log(total));
}

struct Gradients {
  float *q, *k, *v;
};

// Adds what one query contributes: to its own row of dq, and to dk and dv of all keys that it sees.
void add_gradients(const Attention& attention, int64_t b, int64_t h, int64_t i, const float* ct,
                   const float* out, float logsumexp, const Gradients& gradients) {
  if (logsumexp == kMinusInfinity) return;
  const int64_t width = attention.value_depth, depth = attention.depth;
  const float* query = attention.query(b, h, i);
  const float output_product = dot(ct, out, width);
  for (int64_t j = 0; j < attention.visible_keys(i); ++j) {
    const float score = attention.score(b, h, i, j);
    if (score == kMinusInfinity) continue;
    const float weight = std::exp(score - logsumexp);
    const int64_t row = attention.key_row(b, h, j);
    add_scaled(weight, ct, gradients.v + row * width, width);
    const float ds = weight * (dot(ct, attention.v + row * width, width) - output_product) * attention.scale;
    add_scaled(ds, attention.k + row * depth, gradients.q + (query - attention.q), depth);
    add_scaled(ds, query, gradients.k + row * depth, depth);
  }
}

}  // namespace

Status check_attention(const Call& call) {
  return verdict(has_operands(call, 3, 4, 2) && fits(call, 0, 3) &&
                 fits_outputs(call.inputs[0], call.inputs[2], call.outputs[0], call.outputs[1]));
}

Status run_attention(const Call& call) {
  Attributes attributes(call);
  const Attention attention = read(call, 0, 3, attributes);
  float* out = call.outputs[0].as<float>();
  float* logsumexp = call.outputs[1].as<float>();
  for_each_query(attention, [&](int64_t b, int64_t h, int64_t i, int64_t row) {
    logsumexp[row] = attend(attention, b, h, i, out + row * attention.value_depth);
  });
  return PK_OK;
}

Status check_attention_grad(const Call& call) {
  if (!has_operands(call, 6, 7, 3) || !fits(call, 1, 6)) return PK_BAD_FILE;
  const Tensor &ct = call.inputs[0], &q = call.inputs[1], &k = call.inputs[2], &v = call.inputs[3];
  return verdict(fits_outputs(q, v, call.inputs[4], call.inputs[5]) && same_type(ct, call.inputs[4]) &&
                 same_type(call.outputs[0], q) && same_type(call.outputs[1], k) &&
                 same_type(call.outputs[2], v));
}

Status run_attention_grad(const Call& call) {
  Attributes attributes(call);
  const Attention attention = read(call, 1, 6, attributes);
  const float* ct = call.inputs[0].as<float>();
  const float* out = call.inputs[4].as<float>();
  const float* logsumexp = call.inputs[5].as<float>();
  const Gradients gradients = {call.outputs[0].as<float>(), call.outputs[1].as<float>(),
                               call.outputs[2].as<float>()};
  for (int i = 0; i < 3; ++i) fill_zero(call.outputs[i]);
  for_each_query(attention, [&](int64_t b, int64_t h, int64_t i, int64_t row) {
    const int64_t at = row * attention.value_depth;
    add_gradients(attention, b, h, i, ct + at, out + at, logsumexp[row], gradients);
  });
  return PK_OK;
}

}  // namespace pockc::ref
