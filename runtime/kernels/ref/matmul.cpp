// matmul(a, b, [bias]; transpose_a, transpose_b, activation, low, high) -> activation(op(a) op(b) + bias)
// The last two axes are the matrices, after the transpositions; the axes before them broadcast. A matrix b,
// alone, may be compact.
#include "activation.h"

namespace pockc::ref {
namespace {

struct Matmul {
  bool transpose_a;
  bool transpose_b;
  Epilogue epilogue;
};

Matmul read(Attributes& attributes) {
  Matmul matmul;
  matmul.transpose_a = attributes.boolean();
  matmul.transpose_b = attributes.boolean();
  matmul.epilogue = read_epilogue(attributes);
  return matmul;
}

// A matrix as op() sees it: rows and columns after the transposition, and their strides.
struct Matrix {
  const float* data;
  int64_t rows, columns, row_stride, column_stride;
  CompactRows compact = {};  // instead of data
};

Matrix matrix_of(const Tensor& tensor, bool transpose) {
  const int64_t rows = tensor.dims[tensor.rank - 2], columns = tensor.dims[tensor.rank - 1];
  Matrix matrix = {tensor.as<float>(), rows, columns, columns, 1};
  if (transpose) matrix = {tensor.as<float>(), columns, rows, 1, columns};
  if (is_compact(tensor.dtype)) matrix.compact = compact_rows(tensor);
  return matrix;
}

// The tensor without its matrix axes.
Tensor batch_of(const Tensor& tensor) {
  Tensor batch = tensor;
  batch.rank = tensor.rank - 2;
  return batch;
}

constexpr int kTileRows = 4;
constexpr int kTileColumns = 16;
constexpr int64_t kDepthBlock = 256;  // summed in f32; the blocks are added in f64

// out[4, 16] = a[4, depth] b[depth, 16], for b with contiguous rows.
void full_tile(const Matrix& a, const Matrix& b, int64_t row, int64_t column, float* out,
               int64_t out_stride) {
  double total[kTileRows][kTileColumns] = {};
  for (int64_t block = 0; block < a.columns; block += kDepthBlock) {
    const int64_t end = block + kDepthBlock < a.columns ? block + kDepthBlock : a.columns;
    float sums[kTileRows][kTileColumns] = {};
    for (int64_t k = block; k < end; ++k) {
      const float* b_row = b.data + k * b.row_stride + column;
      const float* a_column = a.data + row * a.row_stride + k * a.column_stride;
      for (int i = 0; i < kTileRows; ++i) {
        const float factor = a_column[i * a.row_stride];
        for (int j = 0; j < kTileColumns; ++j) sums[i][j] += factor * b_row[j];
      }
    }
    for (int i = 0; i < kTileRows; ++i) {
      for (int j = 0; j < kTileColumns; ++j) total[i][j] += sums[i][j];
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < kTileColumns; ++j) out[i * out_stride + j] = static_cast<float>(total[i][j]);
  }
}

float one_element(const Matrix& a, const Matrix& b, int64_t row, int64_t column) {
  const float* x = a.data + row * a.row_stride;
  const float* y = b.data + column * b.column_stride;
  double total = 0.0;
  for (int64_t k = 0; k < a.columns; ++k) {
    total += static_cast<double>(x[k * a.column_stride]) * y[k * b.row_stride];
  }
  return static_cast<float>(total);
}

// b has contiguous rows: tiles of outputs, then the rims.
void multiply_by_rows(const Matrix& a, const Matrix& b, float* out) {
  const int64_t rows = a.rows - a.rows % kTileRows, columns = b.columns - b.columns % kTileColumns;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    for (int64_t column = 0; column < columns; column += kTileColumns) {
      full_tile(a, b, row, column, out + row * b.columns + column, b.columns);
    }
  }
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t column = row < rows ? columns : 0; column < b.columns; ++column) {
      out[row * b.columns + column] = one_element(a, b, row, column);
    }
  }
}

// a has contiguous rows and b contiguous columns (a linear layer): dot products of both.
void multiply_by_dots(const Matrix& a, const Matrix& b, float* out) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const float* x = a.data + row * a.row_stride;
    for (int64_t column = 0; column < b.columns; ++column) {
      out[row * b.columns + column] = dot(x, b.data + column * b.column_stride, a.columns);
    }
  }
}

float strided_dot(const float* x, int64_t stride, const float* y, int64_t count) {
  if (stride == 1) return dot(x, y, count);
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += static_cast<double>(x[i * stride]) * y[i];
  return static_cast<float>(total);
}

// b is compact: every piece of a stored row meets all rows of a, as part of a column of op(b) or of a row.
void multiply_compact(const Matmul& matmul, const Matrix& a, const Matrix& b, float* out) {
  for (int64_t i = 0; i < a.rows * b.columns; ++i) out[i] = 0.0f;
  const int64_t stored_rows = matmul.transpose_b ? b.columns : b.rows;
  for (int64_t stored = 0; stored < stored_rows; ++stored) {
    for_decoded(b.compact, stored, 0, b.compact.columns,
                [&](const float* values, int64_t begin, int64_t count) {
                  for (int64_t row = 0; row < a.rows; ++row) {
                    const float* x = a.data + row * a.row_stride;
                    float* y = out + row * b.columns;
                    if (matmul.transpose_b) {
                      y[stored] += strided_dot(x + begin * a.column_stride, a.column_stride, values, count);
                    } else {
                      add_scaled(x[stored * a.column_stride], values, y + begin, count);
                    }
                  }
                });
  }
}

void multiply(const Matmul& matmul, const Matrix& a, const Matrix& b, const float* bias, float* out) {
  if (b.compact.data != nullptr) {
    multiply_compact(matmul, a, b, out);
  } else if (matmul.transpose_b && !matmul.transpose_a) {
    multiply_by_dots(a, b, out);
  } else if (!matmul.transpose_b) {
    multiply_by_rows(a, b, out);
  } else {
    for (int64_t i = 0; i < a.rows * b.columns; ++i) out[i] = one_element(a, b, i / b.columns, i % b.columns);
  }
  for (int64_t row = 0; row < a.rows; ++row)
    finish_row(matmul.epilogue, bias, out + row * b.columns, b.columns);
}

}  // namespace

Status check_matmul(const Call& call) {
  if (!has_operands(call, 2, 3, 1, 1) || !all_f32(call, 1)) return PK_BAD_FILE;
  const Tensor &left = call.inputs[0], &right = call.inputs[1], &out = call.outputs[0];
  if (left.rank < 2 || right.rank < 2 || out.rank < 2) return PK_BAD_FILE;
  if (is_compact(right.dtype) && right.rank != 2) return PK_BAD_FILE;
  Attributes attributes(call);
  const Matmul matmul = read(attributes);
  if (!attributes.valid()) return PK_BAD_FILE;
  const Matrix a = matrix_of(left, matmul.transpose_a), b = matrix_of(right, matmul.transpose_b);
  const Tensor left_batch = batch_of(left), right_batch = batch_of(right);
  if (call.input_count == 3 && !has_shape(call.inputs[2], {b.columns})) return PK_BAD_FILE;
  return verdict(a.columns == b.rows && out.dims[out.rank - 2] == a.rows &&
                 out.dims[out.rank - 1] == b.columns &&
                 is_broadcast_of(batch_of(out), {&left_batch, &right_batch}));
}

Status run_matmul(const Call& call) {
  Attributes attributes(call);
  const Matmul matmul = read(attributes);
  const Matrix a = matrix_of(call.inputs[0], matmul.transpose_a);
  const Matrix b = matrix_of(call.inputs[1], matmul.transpose_b);
  const float* bias = call.input_count == 3 ? call.inputs[2].as<float>() : nullptr;
  const Tensor left_batch = batch_of(call.inputs[0]), right_batch = batch_of(call.inputs[1]);
  const Nest<3> batches = broadcast_nest<3>(batch_of(call.outputs[0]), {&left_batch, &right_batch});
  float* out = call.outputs[0].as<float>();
  batches.for_each_row([&](const int64_t (&at)[3], int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      Matrix x = a, y = b;
      x.data += (at[1] + i * batches.step(1)) * a.rows * a.columns;
      y.data += (at[2] + i * batches.step(2)) * b.rows * b.columns;
      multiply(matmul, x, y, bias, out + (at[0] + i * batches.step(0)) * a.rows * b.columns);
    }
  });
  return PK_OK;
}

}  // namespace pockc::ref
