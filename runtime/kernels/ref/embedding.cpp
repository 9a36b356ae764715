// embedding(weight[V,D], ids i64[...]; padding_index) -> [..., D]: rows of the table, which may be compact.
// embedding_grad(ct, ids, [base]; rows, padding_index) -> [rows, D]: each row of ct added to the row of its
// id of base (zeros without), but for the padding index, whose row gets nothing. The output may be base. An
// id outside the table: PK_INVALID_ARGUMENT.
#include "common.h"

namespace pockc::ref {
namespace {

// `rows` is what one looks up: the ids' shape with the table's width appended.
bool fits(const Tensor& table, const Tensor& ids, const Tensor& rows) {
  if (!is_weight(table) || !is_f32(rows) || ids.dtype != DType::kI64) return false;
  if (table.rank != 2 || rows.rank != ids.rank + 1 || last_dim(rows) != table.dims[1]) return false;
  Tensor leading = rows;
  leading.rank = ids.rank;
  return same_shape(leading, ids);
}

}  // namespace

Status check_embedding(const Call& call) {
  if (!has_operands(call, 2, 2, 1, 0)) return PK_BAD_FILE;
  Attributes attributes(call);
  const int64_t padding_index = attributes.integer(-1);
  return verdict(attributes.valid() && fits(call.inputs[0], call.inputs[1], call.outputs[0]) &&
                 padding_index < call.inputs[0].dims[0]);
}

Status run_embedding(const Call& call) {
  const Tensor &table = call.inputs[0], &ids = call.inputs[1];
  const Status status = require_range<int64_t>(ids, table.dims[0], "id");
  if (status != PK_OK) return status;
  const int64_t width = table.dims[1], count = ids.elements();
  float* out = call.outputs[0].as<float>();
  if (is_compact(table.dtype)) {
    const CompactRows rows = compact_rows(table);
    for (int64_t i = 0; i < count; ++i) decode(rows, ids.as<int64_t>()[i], 0, width, out + i * width);
    return PK_OK;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float* row = table.as<float>() + ids.as<int64_t>()[i] * width;
    std::memcpy(out + i * width, row, static_cast<size_t>(width) * sizeof(float));
  }
  return PK_OK;
}

Status check_embedding_grad(const Call& call) {
  if (!has_operands(call, 2, 3, 1)) return PK_BAD_FILE;
  if (call.input_count == 3 && !same_type(call.inputs[2], call.outputs[0])) return PK_BAD_FILE;
  const Tensor& table = call.outputs[0];
  Attributes attributes(call);
  const int64_t rows = attributes.integer(1, kMaxElements);
  attributes.integer(-1, rows - 1);
  return verdict(attributes.valid() && fits(table, call.inputs[1], call.inputs[0]) && table.dims[0] == rows);
}

Status run_embedding_grad(const Call& call) {
  const Tensor &ct = call.inputs[0], &ids = call.inputs[1], &out = call.outputs[0];
  Attributes attributes(call);
  const int64_t rows = attributes.integer(1, kMaxElements);
  const int64_t padding_index = attributes.integer();
  const Status status = require_range<int64_t>(ids, rows, "id");
  if (status != PK_OK) return status;
  const int64_t width = out.dims[1], count = ids.elements();
  if (call.input_count == 2) {
    fill_zero(out);
  } else if (out.data != call.inputs[2].data) {
    std::memcpy(out.data, call.inputs[2].data, byte_count(out));
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = ids.as<int64_t>()[i];
    if (id == padding_index) continue;
    add_scaled(1.0f, ct.as<float>() + i * width, out.as<float>() + id * width, width);
  }
  return PK_OK;
}

}  // namespace pockc::ref
