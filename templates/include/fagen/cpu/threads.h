// Work shared by the threads, one item at a time.
#pragma once
#include <omp.h>
#include <stdint.h>

namespace fagen {

template <bool kBlocked, class Body>
void share(int64_t items, Body body) {
  if constexpr (kBlocked) {
#pragma omp parallel for schedule(static)
    for (int64_t item = 0; item < items; ++item) body(item);
  } else {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) body(item);
  }
}

}  // namespace fagen
