// Whole vectors and the first lanes of one, by count (after a vec_*.h, which defines Isa).
#pragma once

#include "../common/distributions.h"

namespace fastgen {
namespace {

// The `count` elements at `from`; the lanes past them are zero.
template <class F, class Storage>
FASTGEN_FN F take(const Storage* from, int count) {
  F value;
  if (count == kLanes<typename WorkType<Storage>::T>) {
    load(from, value);
  } else {
    load_first(from, count, value);
  }
  return value;
}

template <class Storage, class F>
FASTGEN_FN void put(Storage* out, F value, int count) {
  if (count == kLanes<typename WorkType<Storage>::T>) return store(out, value);
  store_first(out, count, value);
}

// Calls body with a number of the dtype.
template <class Body>
FASTGEN_FN void with_storage(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat64: return body(double());
    case DType::kBFloat16: return body(BFloat16());
    case DType::kFloat16: return body(Float16());
    default: return body(float());
  }
}

}  // namespace
}  // namespace fastgen
