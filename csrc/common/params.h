// What the binding hands to a kernel: one plain struct an op. Pointers are borrowed, strides count
// elements, tensors of one op share one dtype.
#pragma once

#include "dtype.h"

namespace fastgen {

enum class Distribution : int32_t { kBits, kUniform, kNormal, kExponential, kBernoulli };

struct RandomParams {
  Distribution distribution;
  DType dtype;  // of out
  uint64_t seed, offset;
  double a, b, c;  // kUniform: low, high - low, largest value below high. kNormal: mean, std.
                   // kExponential: rate. kBernoulli: the integer threshold p * 2^32.
  void* out;       // [count], contiguous
  int64_t count;
};

constexpr int kMaxDims = 8;

// Shape of a reparameterisation: rows of `inner` elements, addressed by up to kMaxDims outer dimensions.
// An element's number in row-major order, which is also its number in the random stream, is
// row * inner + column.
struct Shape {
  int outer_dims;
  int64_t outer[kMaxDims];
  int64_t rows, inner;
};

// An operand of that shape. Broadcast dimensions have stride 0; data is null where the op has no such
// operand.
struct Operand {
  const void* data;
  int64_t outer_stride[kMaxDims];
  int64_t inner_stride;
};

// Rows are worked on in pieces of at most kPiece elements, the unit of work of the reparameterisation
// kernels; what a piece computes does not depend on which thread has it.
constexpr int64_t kPiece = 1024;

struct ReparameterizeParams {
  DType dtype;
  Shape shape;
  uint64_t seed, offset;  // used where eps.data is null
  Operand mu, logvar, eps;
  void* z;            // [rows, inner], contiguous
  void* kl;           // [rows] or null
  double* kl_pieces;  // [rows, pieces of a row]: sums still to be added up, where a row has several pieces
};

struct ReparameterizeBackwardParams {
  DType dtype;
  Shape shape;
  uint64_t seed, offset;
  Operand grad_z, grad_kl, mu, logvar, eps;  // grad_kl has inner stride 0; null: no such gradient
  void* grad_mu;                             // [rows, inner] or null
  void* grad_logvar;                         // [rows, inner]
};

// Offset of a row of an operand, in elements.
FASTGEN_FN int64_t row_offset(const Shape& shape, const int64_t (&stride)[kMaxDims], int64_t row) {
  int64_t offset = 0;
  for (int d = shape.outer_dims - 1; d > 0; --d) {
    offset += row % shape.outer[d] * stride[d];
    row /= shape.outer[d];
  }
  return shape.outer_dims > 0 ? offset + row * stride[0] : offset;
}

FASTGEN_FN int64_t pieces_per_row(const Shape& shape) { return (shape.inner + kPiece - 1) / kPiece; }

}  // namespace fastgen
