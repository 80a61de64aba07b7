// The CPU kernels of one instruction set. Every function works on the half-open range [begin, end) of its
// units and may run on any thread; the binding splits the work.
#pragma once

#include "../common/params.h"

namespace fastgen {

// What a core can do at best, for the bounds of benchmarks; see probe.inl.
struct Probes {
  double (*multiply_adds)(int64_t count);         // fp32
  double (*multiply_adds_double)(int64_t count);  // fp64
  double (*multiply_adds_bf16)(int64_t count);    // of bf16, summed in fp32
  double (*reads)(const float* from, int64_t count, int64_t times);
};

struct KernelTable {
  const char* isa;
  Probes probe;
  void (*random)(const RandomParams&, int64_t begin, int64_t end);                                   // elements
  void (*reparameterize)(const ReparameterizeParams&, int64_t begin, int64_t end);                   // pieces
  void (*reparameterize_add_pieces)(const ReparameterizeParams&, int64_t begin, int64_t end);        // rows
  void (*reparameterize_backward)(const ReparameterizeBackwardParams&, int64_t begin, int64_t end);  // pieces
  RecurrentSizes (*recurrent_sizes)(const RecurrentParams&, int64_t rows);
  void (*recurrent)(const RecurrentParams&, const RecurrentWork&);
  RecurrentBackwardSizes (*recurrent_backward_sizes)(const RecurrentBackwardParams&, int64_t rows);
  void (*recurrent_backward)(const RecurrentBackwardParams&, const RecurrentBackwardWork&);
  void (*recurrent_cell)(const CellParams&, int64_t begin, int64_t end);                   // blocks of kCellUnits
  void (*recurrent_cell_rows)(const CellParams&, int64_t begin, int64_t end);              // rows
  void (*recurrent_cell_backward)(const CellBackwardParams&, int64_t begin, int64_t end);  // rows
  void (*linear_rows)(const LinearRowsParams&, int64_t begin, int64_t end);                // blocks of kLinearOutputs
  void (*linear_rows_backward)(const LinearRowsBackwardParams&, int64_t begin, int64_t end);  // linear_backward_units
  AttentionSizes (*attention_sizes)(const AttentionParams&);
  void (*attention)(const AttentionParams&, AttentionPhase, int64_t unit, void* scratch);
  AttentionBackwardSizes (*attention_backward_sizes)(const AttentionBackwardParams&);
  void (*attention_backward)(const AttentionBackwardParams&, AttentionBackwardPhase, int64_t unit, void* scratch);
  MatrixSizes (*matrix_sizes)(const MatrixParams&, int64_t threads);
  void (*matrix_product)(const MatrixParams&, const MatrixSizes&, int64_t unit, void* scratch);
  void (*activation)(const ActivationParams&, int64_t begin, int64_t end);                     // rows
  void (*activation_backward)(const ActivationBackwardParams&, int64_t begin, int64_t end);    // blocks of rows
  void (*activation_add_blocks)(const ActivationBackwardParams&, int64_t begin, int64_t end);  // columns
  void (*draw_tokens)(const DrawParams&, int64_t begin, int64_t end);                          // rows
};

constexpr int64_t kGrain = 16384;  // elements below which a second thread does not pay

extern const KernelTable kGenericKernels;
#if defined(FASTGEN_X86)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;

// What a table for AVX-512 with BF16 has in place of kAvx512Kernels.
double multiply_adds_bf16(int64_t count);
RecurrentSizes recurrent_sizes_bf16(const RecurrentParams&, int64_t rows);
void recurrent_bf16(const RecurrentParams&, const RecurrentWork&);
RecurrentBackwardSizes recurrent_backward_sizes_bf16(const RecurrentBackwardParams&, int64_t rows);
void recurrent_backward_bf16(const RecurrentBackwardParams&, const RecurrentBackwardWork&);
AttentionSizes attention_sizes_bf16(const AttentionParams&);
void attention_bf16(const AttentionParams&, AttentionPhase, int64_t unit, void* scratch);
AttentionBackwardSizes attention_backward_sizes_bf16(const AttentionBackwardParams&);
void attention_backward_bf16(const AttentionBackwardParams&, AttentionBackwardPhase, int64_t unit, void* scratch);
void activation_bf16(const ActivationParams&, int64_t begin, int64_t end);
void activation_backward_bf16(const ActivationBackwardParams&, int64_t begin, int64_t end);
#endif

}  // namespace fastgen
