// SPDX-License-Identifier: Apache-2.0
#pragma once
// From a dtype at run time to the C++ type that stands for it.

#include <dcp/core/dtype.hpp>

#include <complex>
#include <cstdint>
#include <stdexcept>

namespace dcp::test {

/// Calls f.operator()<T>() with the element type of `dtype`.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::boolean: return f.template operator()<bool>();
    case DType::f4: return f.template operator()<f4>();
    case DType::f6_e2m3: return f.template operator()<f6_e2m3>();
    case DType::f6_e3m2: return f.template operator()<f6_e3m2>();
    case DType::u8: return f.template operator()<std::uint8_t>();
    case DType::i8: return f.template operator()<std::int8_t>();
    case DType::f8_e5m2: return f.template operator()<f8_e5m2>();
    case DType::f8_e4m3: return f.template operator()<f8_e4m3>();
    case DType::f8_e8m0: return f.template operator()<f8_e8m0>();
    case DType::f8_e4m3fnuz: return f.template operator()<f8_e4m3fnuz>();
    case DType::f8_e5m2fnuz: return f.template operator()<f8_e5m2fnuz>();
    case DType::i16: return f.template operator()<std::int16_t>();
    case DType::u16: return f.template operator()<std::uint16_t>();
    case DType::f16: return f.template operator()<f16>();
    case DType::bf16: return f.template operator()<bf16>();
    case DType::i32: return f.template operator()<std::int32_t>();
    case DType::u32: return f.template operator()<std::uint32_t>();
    case DType::f32: return f.template operator()<float>();
    case DType::c64: return f.template operator()<std::complex<float>>();
    case DType::f64: return f.template operator()<double>();
    case DType::i64: return f.template operator()<std::int64_t>();
    case DType::u64: return f.template operator()<std::uint64_t>();
    case DType::c32:
    case DType::c128: break;   // no C++ type stands for them
  }
  throw std::logic_error{"no dtype"};
}

}  // namespace dcp::test
