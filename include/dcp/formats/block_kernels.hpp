// SPDX-License-Identifier: Apache-2.0
#pragma once
// Codes of eight and four bits to floats, and floats to narrower ones: the inner loops of decoding. Each is there for every processor, and
// with AVX2, which gives the same bits.
//
// Vectors are the compilers' own: <immintrin.h> takes g++ 12 0.35 s in every file that includes it.

#include <dcp/base/config.hpp>
#include <dcp/base/instructions.hpp>
#include <dcp/core/dtype.hpp>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dcp::detail {

/// E2M1 by its code.
/// Source    OCP Microscaling Formats specification 1.0, 5.3.3
inline constexpr std::array<float, 16> e2m1_values{0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

/// What becomes of a group's table beside its scale: nothing, or one more product or quotient (NVFP4).
struct SecondScale {
  enum class Kind : std::uint8_t { none, multiply, divide } kind = Kind::none;
  float value = 1;

  float operator()(float x) const { return kind == Kind::none ? x : kind == Kind::multiply ? x * value : x / value; }
};

/// The inner loops, for one set of instructions. All take any alignment and any count.
struct BlockKernels {
  /// out[i] = E4M3(codes[i]) * scale
  void (*e4m3)(std::byte const* codes, std::size_t count, float scale, float* out);
  void (*e5m2)(std::byte const* codes, std::size_t count, float scale, float* out);
  /// e4m3() for groups of `each` codes each: the scale of group g is scales[g]
  void (*e4m3_groups)(std::byte const* codes, std::size_t groups, std::size_t each, float const* scales, float* out);
  /// out[i] = (codes[i] - zero) * scale, of signed and of unsigned bytes
  void (*i8)(std::byte const* codes, std::size_t count, float zero, float scale, float* out);
  void (*u8)(std::byte const* codes, std::size_t count, float zero, float scale, float* out);
  /// out[i] = (((words[i] >> bit) & 15) - zero) * scale
  void (*nibble_of_words)(std::uint32_t const* words, std::size_t count, int bit, float zero, float scale, float* out);
  /// out[2 i] = table[codes[i] & 15], out[2 i + 1] = table[codes[i] >> 4]
  void (*nibbles)(std::byte const* codes, std::size_t bytes, float const* table, float* out);
  /// The same with the high four bits first.
  void (*nibbles_high_first)(std::byte const* codes, std::size_t bytes, float const* table, float* out);
  /// nibbles() for groups of `bytes` bytes each: table[c] = second(base[c] * scales[g])
  void (*nibble_groups)(std::byte const* codes, std::size_t groups, std::size_t bytes, float const* base, float const* scales, SecondScale second, float* out);
  /// bfloat16 and half numbers as floats.
  void (*from_bf16)(std::byte const* in, std::size_t count, float* out);
  void (*from_f16)(std::byte const* in, std::size_t count, float* out);
  /// Rounded to nearest, ties to even.
  void (*to_bf16)(float const* in, std::size_t count, std::byte* out);
  void (*to_f16)(float const* in, std::size_t count, std::byte* out);
};

struct PortableKernels {
  template <class F>
  static void small_floats(std::byte const* codes, std::size_t count, float scale, float* out) {
    for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<float>(F::from_bits(static_cast<std::uint8_t>(codes[i]))) * scale;
  }
  static void e4m3_groups(std::byte const* codes, std::size_t groups, std::size_t each, float const* scales, float* out) {
    for (std::size_t g = 0; g < groups; ++g) small_floats<f8_e4m3>(codes + g * each, each, scales[g], out + g * each);
  }
  static void i8(std::byte const* codes, std::size_t count, float zero, float scale, float* out) {
    for (std::size_t i = 0; i < count; ++i) out[i] = (static_cast<float>(static_cast<std::int8_t>(codes[i])) - zero) * scale;
  }
  static void u8(std::byte const* codes, std::size_t count, float zero, float scale, float* out) {
    for (std::size_t i = 0; i < count; ++i) out[i] = (static_cast<float>(static_cast<std::uint8_t>(codes[i])) - zero) * scale;
  }
  static void nibble_of_words(std::uint32_t const* words, std::size_t count, int bit, float zero, float scale, float* out) {
    for (std::size_t i = 0; i < count; ++i) out[i] = (static_cast<float>((words[i] >> bit) & 15u) - zero) * scale;
  }
  static void nibbles(std::byte const* codes, std::size_t bytes, float const* table, float* out) {
    for (std::size_t i = 0; i < bytes; ++i) {
      auto const byte = static_cast<unsigned>(codes[i]);
      out[2 * i] = table[byte & 15u], out[2 * i + 1] = table[byte >> 4];
    }
  }
  static void nibbles_high_first(std::byte const* codes, std::size_t bytes, float const* table, float* out) {
    for (std::size_t i = 0; i < bytes; ++i) {
      auto const byte = static_cast<unsigned>(codes[i]);
      out[2 * i] = table[byte >> 4], out[2 * i + 1] = table[byte & 15u];
    }
  }
  static void nibble_groups(std::byte const* codes, std::size_t groups, std::size_t bytes, float const* base, float const* scales, SecondScale second, float* out) {
    float table[16];
    for (std::size_t g = 0; g < groups; ++g) {
      for (int c = 0; c < 16; ++c) table[c] = second(rounded(base[c] * scales[g]));
      nibbles(codes + g * bytes, bytes, table, out + 2 * g * bytes);
    }
  }
  template <class F>
  static void widen(std::byte const* in, std::size_t count, float* out) {
    for (std::size_t i = 0; i < count; ++i) {
      std::uint16_t bits;
      std::memcpy(&bits, in + 2 * i, 2);
      out[i] = static_cast<float>(F::from_bits(bits));
      if (std::is_same_v<F, f16> && (bits & 0x7FFF) > 0x7C00) out[i] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(out[i]) | 0x00400000u);   // quiet, as processors make it
    }
  }
  template <class F>
  static void narrow(float const* in, std::size_t count, std::byte* out) {
    for (std::size_t i = 0; i < count; ++i) {
      auto const bits = F{in[i]}.bits();
      std::memcpy(out + 2 * i, &bits, 2);
    }
  }
};

inline constexpr BlockKernels portable_kernels{PortableKernels::small_floats<f8_e4m3>, PortableKernels::small_floats<f8_e5m2>, PortableKernels::e4m3_groups, PortableKernels::i8, PortableKernels::u8, PortableKernels::nibble_of_words, PortableKernels::nibbles, PortableKernels::nibbles_high_first,
                                               PortableKernels::nibble_groups, PortableKernels::widen<bf16>, PortableKernels::widen<f16>, PortableKernels::narrow<bf16>, PortableKernels::narrow<f16>};

#if DCP_X86_KERNELS
// Eight elements at a time; what is left over goes the portable way.
struct Avx2Kernels {
  typedef float F8 __attribute__((vector_size(32)));
  typedef std::int32_t I8 __attribute__((vector_size(32)));
  typedef std::uint32_t U8 __attribute__((vector_size(32)));
  typedef std::uint16_t Halves8 __attribute__((vector_size(16)));
  typedef std::int16_t Shorts8 __attribute__((vector_size(16)));
  typedef std::uint8_t Bytes16 __attribute__((vector_size(16)));
  typedef std::int8_t Signed16 __attribute__((vector_size(16)));
  typedef std::uint16_t Halves16 __attribute__((vector_size(32)));
  typedef std::int16_t Shorts16 __attribute__((vector_size(32)));
  struct Shorts {
    Shorts8 low, high;
  };
  struct Floats {
    F8 low, high;
  };

  template <class V, class T>
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) V splat(T x) {
    return V{x, x, x, x, x, x, x, x};
  }
  template <class V>
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) V load(void const* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }

  // A cast would go through memory.
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) Shorts split(Shorts16 numbers) {
    typedef std::int64_t Quarters __attribute__((vector_size(32)));
    typedef std::int64_t Halves __attribute__((vector_size(16)));
    Quarters const quarters = (Quarters)numbers;
    return {(Shorts8)Halves{quarters[0], quarters[1]}, (Shorts8)Halves{quarters[2], quarters[3]}};
  }
  // Sixteen at a time: compilers widen sixteen bytes by one instruction, and eight by several.
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) Floats halves(Halves16 bits) {
    Shorts const parts = split((Shorts16)bits);
    return {(F8)__builtin_ia32_vcvtph2ps256(parts.low), (F8)__builtin_ia32_vcvtph2ps256(parts.high)};
  }
  // By way of halves, which the processor converts, subnormal ones too, at full speed.
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) Floats e4m3_of(std::byte const* codes) {
    // A half with the bits of a code has a value 2^8 times too small.
    Halves16 const magnitude_mask = splat16(0x7F), sign_mask = splat16(0x8000), nan = splat16(0x7E00);
    Halves16 const code = __builtin_convertvector(load<Bytes16>(codes), Halves16), magnitude = code & magnitude_mask;
    Halves16 const special = (Halves16)(magnitude == magnitude_mask);
    Floats const small = halves(((magnitude << 7) & ~special) | (nan & special) | ((code << 8) & sign_mask));
    return {small.low * splat<F8>(256.0f), small.high * splat<F8>(256.0f)};
  }
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) Floats i8_of(std::byte const* codes) { return integers(__builtin_convertvector(load<Signed16>(codes), Shorts16)); }
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) Floats u8_of(std::byte const* codes) { return integers((Shorts16)__builtin_convertvector(load<Bytes16>(codes), Halves16)); }
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) Floats integers(Shorts16 numbers) {
    Shorts const parts = split(numbers);
    return {__builtin_convertvector(__builtin_convertvector(parts.low, I8), F8), __builtin_convertvector(__builtin_convertvector(parts.high, I8), F8)};
  }
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) Halves16 splat16(std::uint16_t x) { return Halves16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) void store(F8 low, F8 high, float* out) {
    std::memcpy(out, &low, sizeof low);
    std::memcpy(out + 8, &high, sizeof high);
  }

  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) void e4m3_run(std::byte const* codes, std::size_t count, float scale, float* out) {
    F8 const scales = splat<F8>(scale);
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16) {
      Floats const value = e4m3_of(codes + i);
      store(value.low * scales, value.high * scales, out + i);
    }
    PortableKernels::small_floats<f8_e4m3>(codes + i, count - i, scale, out + i);
  }
  DCP_TARGET_AVX2 static void e4m3(std::byte const* codes, std::size_t count, float scale, float* out) { e4m3_run(codes, count, scale, out); }
  DCP_TARGET_AVX2 static void e4m3_groups(std::byte const* codes, std::size_t groups, std::size_t each, float const* scales, float* out) {
    for (std::size_t g = 0; g < groups; ++g) e4m3_run(codes + g * each, each, scales[g], out + g * each);
  }
  DCP_TARGET_AVX2 static void e5m2(std::byte const* codes, std::size_t count, float scale, float* out) {
    F8 const scales = splat<F8>(scale);
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16) {
      Floats const value = halves(__builtin_convertvector(load<Bytes16>(codes + i), Halves16) << 8);   // the upper half of a half
      store(value.low * scales, value.high * scales, out + i);
    }
    PortableKernels::small_floats<f8_e5m2>(codes + i, count - i, scale, out + i);
  }
  DCP_TARGET_AVX2 static void i8(std::byte const* codes, std::size_t count, float zero, float scale, float* out) {
    F8 const zeros = splat<F8>(zero), scales = splat<F8>(scale);
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16) {
      Floats const value = i8_of(codes + i);
      store((value.low - zeros) * scales, (value.high - zeros) * scales, out + i);
    }
    PortableKernels::i8(codes + i, count - i, zero, scale, out + i);
  }
  DCP_TARGET_AVX2 static void u8(std::byte const* codes, std::size_t count, float zero, float scale, float* out) {
    F8 const zeros = splat<F8>(zero), scales = splat<F8>(scale);
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16) {
      Floats const value = u8_of(codes + i);
      store((value.low - zeros) * scales, (value.high - zeros) * scales, out + i);
    }
    PortableKernels::u8(codes + i, count - i, zero, scale, out + i);
  }

  DCP_TARGET_AVX2 static void nibble_of_words(std::uint32_t const* words, std::size_t count, int bit, float zero, float scale, float* out) {
    U8 const shift = splat<U8>(static_cast<std::uint32_t>(bit)), mask = splat<U8>(15u);
    F8 const zeros = splat<F8>(zero), scales = splat<F8>(scale);
    std::size_t i = 0;
    for (; i + 8 <= count; i += 8) {
      F8 const value = (__builtin_convertvector((I8)((load<U8>(words + i) >> shift) & mask), F8) - zeros) * scales;
      std::memcpy(out + i, &value, sizeof value);
    }
    PortableKernels::nibble_of_words(words + i, count - i, bit, zero, scale, out + i);
  }

  // Sixteen floats, and eight of them by the low four bits of `index`.
  struct Table {
    F8 low, high;
  };
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) F8 look_up(Table const& table, U8 index) {
    F8 const low = __builtin_ia32_permvarsf256(table.low, (I8)index), high = __builtin_ia32_permvarsf256(table.high, (I8)index);
    return __builtin_ia32_blendvps256(low, high, (F8)(index << splat<U8>(28u)));
  }
  template <bool HighFirst>
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) void nibbles_of(std::byte const* codes, std::size_t bytes, Table const& table, float const* plain, float* out) {
    U8 const shifts = HighFirst ? U8{4u, 0u, 12u, 8u, 20u, 16u, 28u, 24u} : U8{0u, 4u, 8u, 12u, 16u, 20u, 24u, 28u};
    U8 const mask = splat<U8>(15u);
    std::size_t i = 0;
    for (; i + 4 <= bytes; i += 4) {
      std::uint32_t word;
      std::memcpy(&word, codes + i, 4);
      F8 const value = look_up(table, (splat<U8>(word) >> shifts) & mask);
      std::memcpy(out + 2 * i, &value, sizeof value);
    }
    if (i == bytes) return;
    if constexpr (HighFirst) PortableKernels::nibbles_high_first(codes + i, bytes - i, plain, out + 2 * i);
    else PortableKernels::nibbles(codes + i, bytes - i, plain, out + 2 * i);
  }
  DCP_TARGET_AVX2 static void nibbles(std::byte const* codes, std::size_t bytes, float const* table, float* out) { nibbles_of<false>(codes, bytes, {load<F8>(table), load<F8>(table + 8)}, table, out); }
  DCP_TARGET_AVX2 static void nibbles_high_first(std::byte const* codes, std::size_t bytes, float const* table, float* out) { nibbles_of<true>(codes, bytes, {load<F8>(table), load<F8>(table + 8)}, table, out); }
  DCP_TARGET_AVX2 static void nibble_groups(std::byte const* codes, std::size_t groups, std::size_t bytes, float const* base, float const* scales, SecondScale second, float* out) {
    F8 const low = load<F8>(base), high = load<F8>(base + 8), other = splat<F8>(second.value);
    for (std::size_t g = 0; g < groups; ++g) {
      F8 const scale = splat<F8>(scales[g]);
      Table table{low * scale, high * scale};
      if (second.kind == SecondScale::Kind::multiply) table.low = table.low * other, table.high = table.high * other;
      if (second.kind == SecondScale::Kind::divide) table.low = table.low / other, table.high = table.high / other;
      float plain[16];
      if (bytes % 4 != 0) std::memcpy(plain, &table.low, sizeof table.low), std::memcpy(plain + 8, &table.high, sizeof table.high);
      nibbles_of<false>(codes + g * bytes, bytes, table, plain, out + 2 * g * bytes);
    }
  }

  DCP_TARGET_AVX2 static void from_bf16(std::byte const* in, std::size_t count, float* out) {
    std::size_t i = 0;
    for (; i + 8 <= count; i += 8) {
      U8 const bits = __builtin_convertvector(load<Halves8>(in + 2 * i), U8) << splat<U8>(16u);
      std::memcpy(out + i, &bits, sizeof bits);
    }
    PortableKernels::widen<bf16>(in + 2 * i, count - i, out + i);
  }
  DCP_TARGET_AVX2 static void from_f16(std::byte const* in, std::size_t count, float* out) {
    std::size_t i = 0;
    for (; i + 8 <= count; i += 8) {
      auto const floats = __builtin_ia32_vcvtph2ps256(load<Shorts8>(in + 2 * i));
      std::memcpy(out + i, &floats, sizeof floats);
    }
    PortableKernels::widen<f16>(in + 2 * i, count - i, out + i);
  }
  // bfloat16 bits of eight floats, each in 32.
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) U8 narrowed(U8 bits) {
    U8 const half = splat<U8>(0x7FFFu), one = splat<U8>(1u), shift = splat<U8>(16u), magnitude = splat<U8>(0x7FFFFFFFu), infinity = splat<U8>(0x7F800000u), quiet = splat<U8>(0x7FC0u), sign = splat<U8>(0x8000u);
    U8 const rounded_bits = (bits + half + ((bits >> shift) & one)) >> shift;
    U8 const is_nan = (U8)((I8)(bits & magnitude) > (I8)infinity);
    return (rounded_bits & ~is_nan) | ((quiet | ((bits >> shift) & sign)) & is_nan);
  }
  DCP_TARGET_AVX2 static inline __attribute__((always_inline)) void store_bf16(F8 first, F8 second, std::byte* out) {
    typedef std::int64_t Quarters __attribute__((vector_size(32)));
    // Packing works on halves of the vectors; the quarters are then put in order.
    Quarters const quarters = (Quarters)__builtin_ia32_packusdw256((I8)narrowed((U8)first), (I8)narrowed((U8)second));
    Quarters const ordered{quarters[0], quarters[2], quarters[1], quarters[3]};
    std::memcpy(out, &ordered, sizeof ordered);
  }
  DCP_TARGET_AVX2 static void to_bf16(float const* in, std::size_t count, std::byte* out) {
    std::size_t i = 0;
    for (; i + 16 <= count; i += 16) store_bf16(load<F8>(in + i), load<F8>(in + i + 8), out + 2 * i);
    PortableKernels::narrow<bf16>(in + i, count - i, out + 2 * i);
  }
  DCP_TARGET_AVX2 static void to_f16(float const* in, std::size_t count, std::byte* out) {
    Shorts8 const magnitude = splat<Shorts8>(std::int16_t{0x7FFF}), infinity = splat<Shorts8>(std::int16_t{0x7C00}), quiet = splat<Shorts8>(std::int16_t{0x7E00}), sign = ~magnitude;
    std::size_t i = 0;
    for (; i + 8 <= count; i += 8) {
      auto const halves = (Shorts8)__builtin_ia32_vcvtps2ph256(load<F8>(in + i), 0);
      // The processor keeps what else a NaN says; there is one NaN of each sign here.
      Shorts8 const is_nan = (halves & magnitude) > infinity;
      Shorts8 const result = (halves & ~is_nan) | (((halves & sign) | quiet) & is_nan);
      std::memcpy(out + 2 * i, &result, 16);
    }
    PortableKernels::narrow<f16>(in + i, count - i, out + 2 * i);
  }
};
inline constexpr BlockKernels avx2_kernels{Avx2Kernels::e4m3, Avx2Kernels::e5m2, Avx2Kernels::e4m3_groups, Avx2Kernels::i8, Avx2Kernels::u8, Avx2Kernels::nibble_of_words, Avx2Kernels::nibbles, Avx2Kernels::nibbles_high_first, Avx2Kernels::nibble_groups, Avx2Kernels::from_bf16, Avx2Kernels::from_f16, Avx2Kernels::to_bf16, Avx2Kernels::to_f16};
#endif

template <class = Deferred>
BlockKernels const& kernels_of(Instructions instructions) {
#if DCP_X86_KERNELS
  if (instructions == Instructions::avx2) return avx2_kernels;
#endif
  static_cast<void>(instructions);
  return portable_kernels;
}
/// The fastest that this processor runs.
template <class = Deferred>
BlockKernels const& block_kernels() { return kernels_of(best_instructions()); }

}  // namespace dcp::detail
