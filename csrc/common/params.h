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

// The recurrent family (fastgen/reference/recurrent.py): gates in torch's order, LSTM i, f, g, o and GRU r, z, n.
enum class CellMode : int64_t { kLstm, kGru, kTanh, kRelu };

FASTGEN_FN int gate_count(CellMode mode) { return mode == CellMode::kLstm ? 4 : mode == CellMode::kGru ? 3 : 1; }
FASTGEN_FN bool has_gates(CellMode mode) { return mode == CellMode::kLstm || mode == CellMode::kGru; }

// Layer norm of an LSTM, and zoneout.
struct CellOptions {
  const void *norm_ih, *norm_hh;     // [4 H]: gains of the norms of W_ih x and W_hh h; null: no layer norm
  const void *norm_c, *norm_c_bias;  // [H]: of the norm of c'
  double norm_eps;
  // Probabilities with which a unit of c and of h keeps its value. Drawn from the stream: the element of a unit of c
  // is offset + row * H + unit, that of h stands behind all of c's likewise. Not drawn: shares.
  double zoneout_c, zoneout_h;
  bool zoneout_drawn;
  uint64_t seed, offset;
};

// One layer in one direction. Row (t, b) of the results has the number
//   t * row_step + b * row_batch        padded
//   step_rows[t] + b                    packed: step t has the first batch_sizes[t] rows of the batch
// Weights, biases and states are contiguous; null is "has none".
struct RecurrentParams : CellOptions {
  CellMode mode;
  DType dtype;
  bool reverse;
  int64_t steps, batch, input_size, hidden_size, output_size;  // T, B, I, H, P
  const int64_t* batch_sizes;                                  // [T]
  const int64_t* step_rows;                                    // [T]
  int64_t row_step, row_batch;
  const void* input;                // rows of I with unit stride
  int64_t input_step, input_batch;  // elements from one step, and from one row of the batch, to the next
  const void *w_ih, *w_hh;          // [G H, I], [G H, P]
  const void *b_ih, *b_hh;          // [G H]
  const void* w_hr;                 // [P, H]
  const void *h_0, *c_0;            // [B, P], [B, H]
  const void* h_mask;               // [B, P], multiplies the h that is fed into the recurrent product
  void* output;                     // rows of P
  void *h_n, *c_n;                  // [B, P], [B, H]
  void *gates, *cells;              // rows of saved_gates * H, and of H + saved_scales in the work type
  void* packed;                     // the weights in panels, RecurrentSizes::packed bytes
  int64_t rows;                     // of all steps
};

// Whether the cell needs whole rows of units, and not a tile of sums at a time.
FASTGEN_FN bool by_rows(const CellOptions& p) { return p.norm_ih != nullptr || p.zoneout_c > 0 || p.zoneout_h > 0; }
// Columns of `gates` over H, what a unit keeps for the backward pass: the activated gates, for a GRU W_hn h + b_hn as
// well; with layer norm the standardised W_ih x and W_hh h; of an RNN with zoneout h before it.
FASTGEN_FN int saved_gates(const RecurrentParams& p) {
  return has_gates(p.mode) ? p.norm_ih != nullptr ? 12 : 4 : p.zoneout_h > 0 ? 1 : 0;
}
// Behind the cells of a row: 1 / standard deviation of W_ih x and of W_hh h, with layer norm.
FASTGEN_FN int saved_scales(const RecurrentParams& p) { return p.norm_ih != nullptr ? 2 : 0; }

// The backward pass; the results of the forward pass stand in the base. A gradient that is null is not there, or not
// wanted. Sums over rows are made in the work type: where that is not the dtype, in the *_sum buffers.
struct RecurrentBackwardParams : RecurrentParams {
  const void* grad_output;          // rows of P with unit stride
  int64_t grad_step, grad_batch;    // elements from one step, and from one row of the batch, to the next
  const void *grad_h_n, *grad_c_n;  // [B, P], [B, H]
  void* grad_gates;                 // [rows, gate_stride]: see gate_gradients; room for 64 bytes behind it
  void *hidden, *grad_hidden;       // with a projection: h before it, [rows, H], and d h behind it, [rows, P]
  void *grad_h_0, *grad_c_0;        // [B, P], [B, H]
  void* grad_input;                 // [rows, I]
  void *grad_w_ih, *grad_w_hh;      // [G H, I], [G H, P], in the work type
  void *grad_b_ih, *grad_b_hh;      // [G H], in the work type
  void* grad_w_hr;                  // [P, H], in the work type
  void *grad_norm_ih, *grad_norm_hh, *grad_norm_c, *grad_norm_c_bias;  // [4 H] and [H], in the work type
  const void** input_rows;                                             // [rows]: the rows of the input, by number
  const void** state_rows;                                             // [rows]: the h that each row's step began with
  const void** mask_rows;                                              // [rows]: its rows of h_mask
};

// Columns of grad_gates over H: the gradients before the activations, for a GRU r, z, r n (which reaches W_hn h + b_hn)
// and n (which reaches W_in x + b_in). With layer norm: of W_hh h; of W_ih x; of the gates' sums, which the gains and
// biases take; of what the norm of c' gave with its gain and bias, and that norm before them.
FASTGEN_FN int gate_gradients(const RecurrentParams& p) {
  return has_gates(p.mode) ? p.norm_ih != nullptr ? 14 : 4 : 1;
}

// What the kernels of one instruction set need for given parameters.
struct RecurrentSizes {
  int64_t blocks;  // of units, and of outputs of the projection: how finely a step can be split
  int64_t projection_blocks;
  int64_t packed;   // bytes of the packed weights
  int64_t chunk;    // steps whose input products are taken at once
  int64_t scratch;  // bytes of scratch for the given number of rows
};

struct RecurrentBackwardSizes {
  int64_t blocks, projection_blocks;  // of units or outputs; of hidden units behind a projection
  int64_t panels;                     // of all packed weights
  int64_t packed;
  int64_t scratch;        // for the given number of rows
  int64_t input_scratch;  // for kInput and kWeights
  int64_t weight_scratch;
};

// A piece of the work, over half-open ranges. kRows does everything for some rows of the batch; the other phases are
// its parts, for where all rows go together and a step is split over blocks of units. Where the cell needs whole rows,
// kCells and kEmit are theirs: of a step, the rows [first_block, end_block) of those that `scratch` is for.
enum class RecurrentPhase { kPack, kRows, kStart, kGather, kInput, kStep, kCells, kProject, kEmit, kFinish };
enum class RecurrentBackwardPhase {
  kPack,
  kRows,
  kStart,
  kReturn,
  kEmit,
  kStep,
  kCells,
  kFinish,
  kPoint,
  kInput,
  kWeights
};
template <class Phase>
struct RecurrentPiece {
  Phase phase;
  int64_t first_row, end_row;      // of the batch
  int64_t first_step, end_step;    // in the order of processing
  int64_t first_block, end_block;  // kPack: of all panels
  void* scratch;                   // for end_row - first_row rows
};
using RecurrentWork = RecurrentPiece<RecurrentPhase>;
using RecurrentBackwardWork = RecurrentPiece<RecurrentBackwardPhase>;

// Rows of a matrix whose elements are adjacent: row i stands `stride` elements after row i - 1. With an index,
// row i is row index[i] of the memory.
struct RowsOperand {
  const void* data;
  int64_t stride;
  const int64_t* index;
};

// One step of a recurrent layer. `batch` rows of input (I), h (P) and c (H, LSTM only); w_ih (G H, I), w_hh (G H, P);
// biases (G H) contiguous, both or neither. h_1 (batch, H) must not overlap h; row b of c_1 belongs to row b of c, with
// its stride and index, and may be that row itself.
constexpr int64_t kCellUnits = 16;  // the unit of work: this many hidden units, for the whole batch

struct CellParams : CellOptions {
  DType dtype;
  CellMode mode;
  int64_t batch, input_size, state_size, hidden_size;
  RowsOperand input, h, c, w_ih, w_hh;
  const void *b_ih, *b_hh;
  void *h_1, *c_1;
  // What the backward pass reads; null: not kept.
  void* gates;  // (batch, 4 H): LSTM i, f, g, o; GRU r, z, n and W_hn h + b_hn. RNN: (batch, H), h_1
  void* cells;  // LSTM: (batch, H), c_1 in the work type
  // Where the cell needs whole rows: [batch][cell_row_size] in the work type. Units give the sums, and then rows of the
  // batch the rest; gates are not kept.
  void* sums;
};

FASTGEN_FN int saved_cell_gates(CellMode mode) { return has_gates(mode) ? 4 : 1; }
FASTGEN_FN int64_t cell_stride(const CellParams& p) {
  return (p.hidden_size + kCellUnits - 1) / kCellUnits * kCellUnits;
}
// Sums of all gates from the input and from the state, c, and the d of zoneout.
FASTGEN_FN int64_t cell_row_size(const CellParams& p) { return (2 * gate_count(p.mode) + 2) * cell_stride(p); }

// The backward pass of a step past its products: the gradients of the sums that the gates are made of. All operands
// (batch, H) and contiguous but h; null: zero, of results not wanted.
struct CellBackwardParams {
  DType dtype;
  CellMode mode;
  int64_t batch, hidden_size;
  const void *grad_h_1, *grad_c_1;
  RowsOperand h;                    // GRU
  const void *c, *gates, *cells;    // as of the step
  void *to_gates_ih, *to_gates_hh;  // (batch, G H), one and the same but for a GRU; on the CPU in the work type
  void* direct;                     // GRU: what reaches h past the product, z dh; likewise
  void* grad_c;
};

// y = x W^T + b in dot form, a result row independent of the others. Unit of work: kLinearOutputs outputs.
constexpr int64_t kLinearOutputs = 16;

struct LinearRowsParams {
  DType dtype;
  int64_t batch, inputs, outputs;
  RowsOperand x, w;
  const void* bias;  // (outputs) or null
  void* y;           // (batch, outputs), contiguous
};

// Its backward pass. Units of work: kLinearColumns columns of grad_x, or kLinearOutputs outputs of grad_w and
// grad_bias. Null: not wanted.
constexpr int64_t kLinearColumns = 128;

struct LinearRowsBackwardParams {
  DType dtype;
  int64_t batch, inputs, outputs;
  const void* grad_y;  // (batch, outputs), contiguous, in the work type
  RowsOperand x, w;
  const void* direct;                 // (batch, inputs), contiguous, in the work type: is added to grad_x; or null
  void *grad_x, *grad_w, *grad_bias;  // contiguous
};

FASTGEN_FN int64_t linear_panels(const LinearRowsBackwardParams& p) {
  return p.grad_x == nullptr ? 0 : (p.inputs + kLinearColumns - 1) / kLinearColumns;
}
FASTGEN_FN int64_t linear_backward_units(const LinearRowsBackwardParams& p) {
  const bool outputs = p.grad_w != nullptr || p.grad_bias != nullptr;
  return linear_panels(p) + (outputs ? (p.outputs + kLinearOutputs - 1) / kLinearOutputs : 0);
}

// How the next token of a row is drawn from its scores: fastgen/reference/generate.py, pick_tokens.
struct DrawOptions {
  DType dtype;
  int64_t vocabulary;  // V
  double temperature, top_p, min_p, repetition_penalty;
  int64_t top_k;
};

// Unit of work: rows.
struct DrawParams : DrawOptions {
  const void* logits;  // (rows, V), contiguous
  const bool* seen;    // null, or rows of V of which seen_rows[i] is that of row i
  const int64_t* seen_rows;
  const uint64_t *seeds, *elements;  // (rows)
  int64_t* weights;                  // (rows, V), scratch
  int64_t* tokens;                   // (rows); -1 where there is none to draw
};

// A tensor of four dimensions: (batch, heads, rows, elements), or a mask (batch, heads, queries, keys). A dimension
// that is broadcast has stride 0.
struct Tensor4 {
  const void* data;
  int64_t stride[4];
};

// Attention (fastgen/reference/attention.py). Query i of a sequence stands at place i + shift among its keys, where
// shift is 0 or, with lower_right, keys - queries of that sequence; it sees the keys from `left` before to `right`
// behind its place.
struct AttentionParams {
  DType dtype, mask_dtype;
  int64_t batch;            // of sequences
  int64_t heads, kv_heads;  // query head h reads key head h / (heads / kv_heads)
  int64_t queries, keys;    // of every sequence; ragged: of all together
  int64_t width, value_width;
  const int64_t *query_starts, *key_starts;  // ragged: [batch + 1]; otherwise null
  const int64_t* first_units;                // ragged: of each sequence, [batch + 1]; see AttentionSizes
  Tensor4 query, key, value;                 // ragged: batch stride 0
  Tensor4 mask;                              // bool (true: seen) or added; or null
  const void* slopes;                        // of ALiBi, in the work type; or null
  int64_t slope_batch, slope_head;           // strides
  double scale, softcap;                     // softcap 0: none
  int64_t left, right;                       // kUnlimited at most
  bool lower_right;
  uint64_t keep;       // a weight is kept where its word of the stream is below; 2^32: no dropout
  double kept_weight;  // what a kept one is multiplied with
  uint64_t seed, offset;
  void* sums;   // AttentionSizes::sums bytes
  Tensor4 out;  // last stride 1
  void* lse;    // row (b heads + h) queries + i, ragged: h queries + query_starts[b] + i; in the work type
};
constexpr int64_t kUnlimited = int64_t(1) << 60;

// What the kernels of one instruction set need for given parameters. Units are independent of each other, and so are
// their results of who computes them.
struct AttentionSizes {
  int64_t units;  // ragged: heads for each `unit_queries` of a sequence, as first_units says
  int64_t unit_queries;
  int64_t scratch;     // bytes for a unit at work
  int64_t join_units;  // where the keys of a head are cut into chunks: of the phase that joins their sums
  int64_t sums;        // bytes of these
};
enum class AttentionPhase { kKeys, kJoin };

// The backward pass; the results of the forward pass stand in the base. A gradient whose data is null is not wanted,
// or, of the results of the forward pass, zero.
struct AttentionBackwardParams : AttentionParams {
  Tensor4 grad_out;
  const void* grad_lse;                      // as lse
  Tensor4 grad_query, grad_key, grad_value;  // last stride 1
  void* grad_mask;                           // contiguous
  int64_t mask_size[4];
  int64_t most_queries, most_keys;  // of a sequence
  int64_t rows;                     // of lse
  int64_t chunk;                    // keys of a unit
  int64_t most_chunks;              // of a sequence
  void* query_sums;                 // [most_chunks][rows][width] in the work type, or null where there is one chunk
  double* slope_sums;               // [batch][heads][most_chunks], or null
};

struct AttentionBackwardSizes {
  int64_t units, scratch;  // ragged: key heads for each `chunk` of a sequence, as first_units says
  int64_t mask_units, mask_scratch;
};

// Gradients of the mask; of keys and values, and, where there is one chunk of keys, of queries; of queries from the
// sums of the chunks, a unit for each head of each sequence.
enum class AttentionBackwardPhase { kMask, kKeys, kQueries };

// out (rows, columns) = left (rows, depth) right (depth, columns) + bias; float32 or float64. One of the two
// strides of a side is 1; if left_step is not, right_column is, and there is no bias.
struct MatrixParams {
  DType dtype;
  int64_t rows, columns, depth;
  const void* left;
  int64_t left_row, left_step;  // strides
  const void* right;
  int64_t right_row, right_column;
  const void* bias;  // (columns), contiguous, or null; null with left_step not 1
  void* out;         // contiguous
};

struct MatrixSizes {
  int64_t units;
  int64_t unit_rows, unit_columns;
  int64_t scratch;  // bytes for a unit at work
};

// What stands between the two products of a feed-forward layer (fastgen/reference/activation.py), row by row.
enum class Activation : int32_t { kGelu, kGeluTanh, kSwiglu };

struct ActivationParams {
  Activation activation;
  DType dtype, bias_dtype;
  int64_t rows, width;  // of out
  const void* input;    // [rows][width], kSwiglu: [rows][2][width]; contiguous
  const void* bias;     // [width] or null; in dtype or float32
  void* out;            // [rows][width]
};

// Rows are worked on in blocks, whose sums for the gradient of the bias are added up in order.
constexpr int64_t kActivationRows = 64;

struct ActivationBackwardParams : ActivationParams {
  const void* grad;  // [rows][width]
  void* grad_input;  // as input
  void* sums;        // [blocks of rows][width] in the work type, or null
  void* grad_bias;   // [width] in bias_dtype, where there are sums
};

}  // namespace fastgen
