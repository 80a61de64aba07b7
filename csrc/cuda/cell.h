// The kernels of single steps, as the loop of a generation calls them beside their ops.
#pragma once

#include <cuda_runtime.h>

#include "../common/params.h"

namespace fastgen {

// Which rows of its operands a kernel works on: those that a list names, or the first ones, but for those whose stage
// is below `least`. In a tile that has any row to work on the others are computed too.
struct RowChoice {
  const int32_t* numbers;  // by their place; null: in order
  const int32_t* stages;   // of all rows; null: none is left out
  int32_t least;

  FASTGEN_MEMBER int64_t row(int64_t place) const { return numbers == nullptr ? place : numbers[place]; }
  FASTGEN_MEMBER bool wanted(int64_t row) const { return stages == nullptr || stages[row] >= least; }
  FASTGEN_MEMBER bool any_wanted(int64_t first, int64_t end) const {
    bool any = stages == nullptr;
    for (int64_t place = first; !any && place < end; ++place) any = wanted(row(place));
    return any;
  }
};

// A step of p.batch rows; all operands are read and written at the numbers of the rows, as is the index of the input.
// sums: with layer norm, float32 of all rows, [2][G H] each.
void launch_step(const CellParams& p, const RowChoice& rows, float* sums, cudaStream_t stream);

// The same of linear_rows.
void launch_linear_rows(const LinearRowsParams& p, const RowChoice& rows, cudaStream_t stream);

}  // namespace fastgen
