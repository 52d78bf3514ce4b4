// SPDX-License-Identifier: Apache-2.0
#pragma once
// CRCs of long inputs by carry-less products, for every reflected polynomial P of degree 64 or less.
//
// Folding. 16 bytes in a register are V = low * x^64 + high (the low half came first in memory). Moving V over d later bits is
//   V * x^d  ==  low * x^(d+64) + high * x^d   (mod P),
// two products of 64-bit words, each at most 128 bits long: the same shape as V again, so they are added to the 16 bytes that lie d
// bits later, and no remainder is taken until the end. A carry-less product of two reflected words, read as a reflected 128-bit
// word, comes out as a * b * x, because bits i and j land on bit i + j while x^(63-i) * x^(63-j) belongs on bit i + j + 1; hence
// the exponents of CrcFold are one less than in the formula.
//
// `Crc`, the parameter of all that follows, is a polynomial with the portable way to compute:
//   Word                                 of the raw CRC
//   tables(bytes, size, state)           the raw CRC, continued from `state`, without these instructions
//   fold_over<Bits>()                    the CrcFold for d = Bits
//   remainder(low, high)                 the raw CRC of the 16 bytes of a register
//   reduce(low, high)                    low * x^64 + high mod P, for crc_multiply_clmul only

#include <dcp/base/config.hpp>
#include <dcp/base/instructions.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace dcp::detail {

/// x^(d+63) and x^(d-1) mod P as reflected 64-bit words: bit i is the coefficient of x^(63-i).
struct CrcFold {
  std::uint64_t low, high;
};

#if DCP_X86_KERNELS
#define DCP_TARGET_CLMUL __attribute__((target("pclmul,sse4.1")))
#define DCP_TARGET_VCLMUL __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.1")))

// Vectors and products by the compilers' own names: <immintrin.h> takes g++ 12 0.35 s in every file that includes it.
typedef long long CrcLanes2 __attribute__((vector_size(16)));
typedef long long CrcLanes8 __attribute__((vector_size(64)));
#define DCP_CLMUL_128 __builtin_ia32_pclmulqdq128
#ifdef __clang__
#define DCP_CLMUL_512 __builtin_ia32_pclmulqdq512
#else
#define DCP_CLMUL_512 __builtin_ia32_vpclmulqdq_v8di
#endif

template <class = Deferred>
DCP_TARGET_CLMUL CrcLanes2 crc_load(std::byte const* bytes) {
  CrcLanes2 lanes;
  std::memcpy(&lanes, bytes, sizeof lanes);
  return lanes;
}
template <class = Deferred>
DCP_TARGET_CLMUL CrcLanes2 crc_factors(CrcFold fold) { return CrcLanes2{static_cast<long long>(fold.low), static_cast<long long>(fold.high)}; }
template <class = Deferred>
DCP_TARGET_CLMUL CrcLanes2 crc_fold(CrcLanes2 value, CrcLanes2 factors, CrcLanes2 later) {
  return later ^ (DCP_CLMUL_128(value, factors, 0x00) ^ DCP_CLMUL_128(value, factors, 0x11));
}

// The remainder of `value` followed by the bytes that are left.
template <class Crc>
DCP_TARGET_CLMUL typename Crc::Word crc_finish(CrcLanes2 value, std::byte const* bytes, std::size_t size) {
  CrcLanes2 const over_128 = crc_factors(Crc::template fold_over<128>());
  for (; size >= 16; bytes += 16, size -= 16) value = crc_fold(value, over_128, crc_load(bytes));
  return Crc::tables(bytes, size, Crc::remainder(static_cast<std::uint64_t>(value[0]), static_cast<std::uint64_t>(value[1])));
}

// Four accumulators, because a carry-less product takes three to seven cycles and one can start in each.
template <class Crc>
DCP_TARGET_CLMUL typename Crc::Word crc_raw_clmul(std::byte const* bytes, std::size_t size, typename Crc::Word state) {
  if (size < 16) return Crc::tables(bytes, size, state);
  CrcLanes2 a = crc_load(bytes) ^ CrcLanes2{static_cast<long long>(state), 0};
  if (size < 64) return crc_finish<Crc>(a, bytes + 16, size - 16);
  CrcLanes2 b = crc_load(bytes + 16), c = crc_load(bytes + 32), d = crc_load(bytes + 48);
  bytes += 64, size -= 64;
  CrcLanes2 const over_512 = crc_factors(Crc::template fold_over<512>());
  for (; size >= 64; bytes += 64, size -= 64) {
    a = crc_fold(a, over_512, crc_load(bytes));
    b = crc_fold(b, over_512, crc_load(bytes + 16));
    c = crc_fold(c, over_512, crc_load(bytes + 32));
    d = crc_fold(d, over_512, crc_load(bytes + 48));
  }
  CrcLanes2 const over_128 = crc_factors(Crc::template fold_over<128>());
  return crc_finish<Crc>(crc_fold(crc_fold(crc_fold(a, over_128, b), over_128, c), over_128, d), bytes, size);
}

// The product, shifted to undo the factor x of the instruction, is low * x^64 + high.
template <class Crc>
DCP_TARGET_CLMUL typename Crc::Word crc_multiply_clmul(std::uint64_t a, std::uint64_t b) {
  CrcLanes2 const product = DCP_CLMUL_128((CrcLanes2{static_cast<long long>(a), 0}), (CrcLanes2{static_cast<long long>(b), 0}), 0x00);
  auto const low = static_cast<std::uint64_t>(product[0]), high = static_cast<std::uint64_t>(product[1]);
  return Crc::reduce(low << 1, high << 1 | low >> 63);
}

template <class = Deferred>
DCP_TARGET_VCLMUL CrcLanes8 crc_load_512(std::byte const* bytes) {
  CrcLanes8 lanes;
  std::memcpy(&lanes, bytes, sizeof lanes);
  return lanes;
}
template <class = Deferred>
DCP_TARGET_VCLMUL CrcLanes8 crc_factors_512(CrcFold fold) {
  auto const low = static_cast<long long>(fold.low), high = static_cast<long long>(fold.high);
  return CrcLanes8{low, high, low, high, low, high, low, high};
}
// Both compilers make one ternary operation of the two exclusive ors.
template <class = Deferred>
DCP_TARGET_VCLMUL CrcLanes8 crc_fold_512(CrcLanes8 value, CrcLanes8 factors, CrcLanes8 later) {
  return later ^ DCP_CLMUL_512(value, factors, 0x00) ^ DCP_CLMUL_512(value, factors, 0x11);
}

template <class Crc>
DCP_TARGET_VCLMUL typename Crc::Word crc_raw_vclmul(std::byte const* bytes, std::size_t size, typename Crc::Word state) {
  if (size < 256) return crc_raw_clmul<Crc>(bytes, size, state);
  CrcLanes8 a = crc_load_512(bytes) ^ CrcLanes8{static_cast<long long>(state), 0, 0, 0, 0, 0, 0, 0};
  CrcLanes8 b = crc_load_512(bytes + 64), c = crc_load_512(bytes + 128), d = crc_load_512(bytes + 192);
  bytes += 256, size -= 256;
  CrcLanes8 const over_2048 = crc_factors_512(Crc::template fold_over<2048>());
  for (; size >= 256; bytes += 256, size -= 256) {
    a = crc_fold_512(a, over_2048, crc_load_512(bytes));
    b = crc_fold_512(b, over_2048, crc_load_512(bytes + 64));
    c = crc_fold_512(c, over_2048, crc_load_512(bytes + 128));
    d = crc_fold_512(d, over_2048, crc_load_512(bytes + 192));
  }
  CrcLanes8 const over_512 = crc_factors_512(Crc::template fold_over<512>());
  d = crc_fold_512(crc_fold_512(crc_fold_512(a, over_512, b), over_512, c), over_512, d);
  for (; size >= 64; bytes += 64, size -= 64) d = crc_fold_512(d, over_512, crc_load_512(bytes));
  alignas(64) std::array<std::byte, 64> lanes;
  std::memcpy(lanes.data(), &d, sizeof d);
  CrcLanes2 const over_128 = crc_factors(Crc::template fold_over<128>());
  CrcLanes2 value = crc_load(lanes.data());
  for (std::size_t lane = 16; lane < 64; lane += 16) value = crc_fold(value, over_128, crc_load(lanes.data() + lane));
  return crc_finish<Crc>(value, bytes, size);
}
#undef DCP_TARGET_CLMUL
#undef DCP_TARGET_VCLMUL
#undef DCP_CLMUL_128
#undef DCP_CLMUL_512
#endif

}  // namespace dcp::detail
