// SPDX-License-Identifier: Apache-2.0
#pragma once
// What every consumer of tests/packaging does with the library.

#include <dcp/core/dtype.hpp>
#include <dcp/core/shape.hpp>

static_assert(__cplusplus >= 202002L, "the target brings the standard");

/// True; computed by the library.
inline bool uses_dcp() {
  dcp::Extents const shape{7, 5};
  return shape.elements() == 35 && dcp::Shape<7, 5>::rank == shape.rank() && dcp::dtype_of<dcp::bf16> == dcp::DType::bf16;
}
