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

}  // namespace
}  // namespace fastgen
