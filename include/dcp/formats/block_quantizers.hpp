// SPDX-License-Identifier: Apache-2.0
#pragma once
// Quantizing: the scale of a block from its largest magnitude, and the codes of its elements from that scale.
//
// A block is quantized in two steps, because the first may need several ranks: absolute_maximum over all of its elements, wherever they
// lie, then a scale rule, then one of the kernels to_... over any parts of it. Everything computes in float32, x / scale is a division
// (x * (1 / scale) rounds twice), and a code depends on nothing but its element and its scale: not on how a block is cut into calls, on
// threads, on the instructions of the processor, or on how the program has set its processor to round.
//
// What a rule of this header adds to those of the formats, so that finite numbers stay finite:
//   - a scale is at least 2^-126, the smallest normal float: blocks of less have fewer bits and never a division by zero;
//   - the largest code times a scale is finite: where a rule gives more, the scale is less and the largest numbers of the block saturate.
//
// u = 2^-24 is the error of one operation of float32; the bounds below leave it out: allow a factor of 1 + 2^-20, and 2^-149 where a
// product is below 2^-126.
//
// Speed in 10^9 elements per second from the first-level cache, one thread of a 2-core x86-64 VM (AMD EPYC), g++ 12 -O2; in brackets calls of
// 32 and of 16 elements, of which setting the processor to round as it should takes up to 10 ns each: absolute_maximum 30 (4, 1.9), to_e4m3
// and to_e5m2 3.6 to 4.4 (1.9, 1.1), to_e2m1 3.9 to 4.8 (2.2, 1.2), to_int 8.5 (2.6, 1.3), pack_nibbles 7 to 9 (7, 5); without AVX2 to_e4m3
// 0.4, to_int 0.9.

#include <dcp/base/bytes.hpp>
#include <dcp/base/config.hpp>
#include <dcp/base/instructions.hpp>
#include <dcp/core/dtype.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace dcp {
namespace detail {

// A float of few bits as the kernels need to know it.
struct E4m3Codes {
  static constexpr int mantissa = 3;
  static constexpr std::uint32_t smallest_normal = 0x3C800000u, largest = 0x43E00000u;   // 2^-6 and 448, as floats
  static constexpr std::uint32_t sign = 0x80u, nan = 0x7Fu;
};
struct E5m2Codes {
  static constexpr int mantissa = 2;
  static constexpr std::uint32_t smallest_normal = 0x38800000u, largest = 0x47600000u;   // 2^-14 and 57344
  static constexpr std::uint32_t sign = 0x80u, nan = 0x7Fu;
};
struct E2m1Codes {
  static constexpr int mantissa = 1;
  static constexpr std::uint32_t smallest_normal = 0x3F800000u, largest = 0x40C00000u;   // 1 and 6
  static constexpr std::uint32_t sign = 0x8u, nan = 0;                                    // has no NaN: it becomes the largest
};

/// a / b, whatever the flags of the compiler say of reciprocals; and between the ends of a StandardArithmetic, as a compiler that takes
/// arithmetic for independent of the state of the processor need not have it.
inline float quotient(float a, float b) {
#if DCP_X86_KERNELS
  __asm__ volatile("divss %1, %0" : "+x"(a) : "x"(b));
  return a;
#else
  return a / b;
#endif
}
/// `value`, known no earlier and no later than here.
inline float fenced(float value) {
#if DCP_X86_KERNELS
  __asm__ volatile("" : "+x"(value));
#endif
  return value;
}

// Rounding by addition: with e the power of two below a magnitude (the smallest normal one below that), a sum of magnitude and
// e * 2^(23 - mantissa) has its last bit at the last bit that a code keeps, so the addition rounds to nearest even, and the difference of
// the bits of sum and summand is the magnitude in units of that last bit. Binades then follow one another at a distance of
// 2^mantissa codes. A carry into the next binade needs nothing: its first code is the number after the last one of this.
template <class Codes>
std::uint8_t code_of(float value) {
  std::uint32_t const bits = std::bit_cast<std::uint32_t>(value), magnitude = bits & 0x7FFFFFFFu;
  std::uint32_t const limited = magnitude < Codes::largest ? magnitude : Codes::largest;
  std::uint32_t const binade = limited & 0x7F800000u;
  std::uint32_t const power = binade > Codes::smallest_normal ? binade : Codes::smallest_normal;
  std::uint32_t const summand = power + (static_cast<std::uint32_t>(23 - Codes::mantissa) << 23);
  std::uint32_t const sum = std::bit_cast<std::uint32_t>(fenced(std::bit_cast<float>(limited) + std::bit_cast<float>(summand)));
  std::uint32_t const code = sum - summand + ((power - Codes::smallest_normal) >> (23 - Codes::mantissa));
  std::uint32_t const sign = (bits >> 31) != 0 ? Codes::sign : 0u;
  return static_cast<std::uint8_t>(code | sign | (magnitude > 0x7F800000u ? Codes::nan : 0u));
}

template <class Codes>
void codes_portable(float const* x, std::size_t count, float scale, std::uint8_t* out) {
  for (std::size_t i = 0; i < count; ++i) out[i] = code_of<Codes>(quotient(x[i], scale));
}

inline constexpr float rounding_summand = 12582912.0f;   // 1.5 * 2^23: the last bit of a sum is 1, also if what is added is below zero

inline std::int8_t integer_of(float value, float low, float high) {
  float const at_most = value < high ? value : high, limited = at_most > low ? at_most : low;   // limits are integers: rounding does not leave them
  return static_cast<std::int8_t>(std::bit_cast<std::int32_t>(fenced(limited + rounding_summand)) - std::bit_cast<std::int32_t>(rounding_summand));
}
template <class = Deferred>
void integers_portable(float const* x, std::size_t count, float scale, float low, float high, std::int8_t* out) {
  for (std::size_t i = 0; i < count; ++i) out[i] = integer_of(quotient(x[i], scale), low, high);
}

// Magnitudes order as their bits do, with infinity and every NaN above all numbers.
template <class = Deferred>
std::uint32_t largest_magnitude_portable(float const* x, std::size_t count, std::uint32_t largest) {
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t const magnitude = std::bit_cast<std::uint32_t>(x[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

#if DCP_X86_KERNELS
typedef float FloatLanes8 __attribute__((vector_size(32)));
typedef int IntLanes8 __attribute__((vector_size(32)));
typedef short ShortLanes16 __attribute__((vector_size(32)));
typedef char ByteLanes32 __attribute__((vector_size(32)));

template <class = Deferred>
DCP_TARGET_AVX2 FloatLanes8 lanes_of(float v) { return FloatLanes8{v, v, v, v, v, v, v, v}; }
template <class = Deferred>
DCP_TARGET_AVX2 IntLanes8 lanes_of_bits(std::uint32_t bits) {
  int const v = static_cast<int>(bits);
  return IntLanes8{v, v, v, v, v, v, v, v};
}
template <class = Deferred>
DCP_TARGET_AVX2 FloatLanes8 quotients(float const* x, FloatLanes8 scale) {
  FloatLanes8 result;
  std::memcpy(&result, x, sizeof result);
  __asm__("vdivps %1, %0, %0" : "+x"(result) : "x"(scale));
  return result;
}

// code_of, eight times. Minimum and maximum of floats give their second operand if the first is NaN.
template <class Codes>
DCP_TARGET_AVX2 IntLanes8 codes_of(FloatLanes8 value) {
  IntLanes8 const bits = __builtin_bit_cast(IntLanes8, value), magnitude = bits & lanes_of_bits(0x7FFFFFFFu);
  FloatLanes8 const limited = __builtin_ia32_minps256(__builtin_bit_cast(FloatLanes8, magnitude), __builtin_bit_cast(FloatLanes8, lanes_of_bits(Codes::largest)));
  IntLanes8 const binade = __builtin_bit_cast(IntLanes8, limited) & lanes_of_bits(0x7F800000u), smallest = lanes_of_bits(Codes::smallest_normal);
  IntLanes8 const power = __builtin_bit_cast(IntLanes8, __builtin_ia32_maxps256(__builtin_bit_cast(FloatLanes8, binade), __builtin_bit_cast(FloatLanes8, smallest)));
  IntLanes8 const summand = power + lanes_of_bits(static_cast<std::uint32_t>(23 - Codes::mantissa) << 23);
  IntLanes8 const sum = __builtin_bit_cast(IntLanes8, limited + __builtin_bit_cast(FloatLanes8, summand));
  IntLanes8 code = sum - summand + ((power - smallest) >> (23 - Codes::mantissa));
  code |= (bits >> 31) & lanes_of_bits(Codes::sign);   // the shift copies the sign
  if constexpr (Codes::nan != 0) code |= (magnitude > lanes_of_bits(0x7F800000u)) & lanes_of_bits(Codes::nan);
  return code;
}
template <class = Deferred>
DCP_TARGET_AVX2 IntLanes8 integers_of(FloatLanes8 value, FloatLanes8 low, FloatLanes8 high) {
  FloatLanes8 const summand = lanes_of(rounding_summand);
  FloatLanes8 const limited = __builtin_ia32_maxps256(__builtin_ia32_minps256(value, high), low);
  return __builtin_bit_cast(IntLanes8, limited + summand) - __builtin_bit_cast(IntLanes8, summand);
}

// The low bytes of 32 numbers, in order: an instruction packs within halves of its registers.
template <class = Deferred>
DCP_TARGET_AVX2 IntLanes8 in_order(ByteLanes32 packed) { return __builtin_ia32_permvarsi256(__builtin_bit_cast(IntLanes8, packed), IntLanes8{0, 4, 1, 5, 2, 6, 3, 7}); }
template <class = Deferred>
DCP_TARGET_AVX2 IntLanes8 unsigned_bytes(IntLanes8 a, IntLanes8 b, IntLanes8 c, IntLanes8 d) {
  return in_order(__builtin_ia32_packuswb256(__builtin_ia32_packssdw256(a, b), __builtin_ia32_packssdw256(c, d)));
}
template <class = Deferred>
DCP_TARGET_AVX2 IntLanes8 signed_bytes(IntLanes8 a, IntLanes8 b, IntLanes8 c, IntLanes8 d) {
  return in_order(__builtin_ia32_packsswb256(__builtin_ia32_packssdw256(a, b), __builtin_ia32_packssdw256(c, d)));
}

// Eight at a time where 32 are too many (blocks may have 16); what is left of at least eight is done again with its predecessors.
template <class Codes>
DCP_TARGET_AVX2 void eight_codes_avx2(float const* x, FloatLanes8 scale, std::uint8_t* out) {
  IntLanes8 const code = codes_of<Codes>(quotients(x, scale)), packed = unsigned_bytes(code, code, code, code);
  std::memcpy(out, &packed, 8);
}
template <class Codes>
DCP_TARGET_AVX2 void codes_avx2(float const* x, std::size_t count, float scale, std::uint8_t* out) {
  if (count < 8) return codes_portable<Codes>(x, count, scale, out);
  FloatLanes8 const scales = lanes_of(scale);
  std::size_t i = 0;
  for (; count - i >= 32; i += 32) {
    IntLanes8 const packed = unsigned_bytes(codes_of<Codes>(quotients(x + i, scales)), codes_of<Codes>(quotients(x + i + 8, scales)),
                                            codes_of<Codes>(quotients(x + i + 16, scales)), codes_of<Codes>(quotients(x + i + 24, scales)));
    std::memcpy(out + i, &packed, sizeof packed);
  }
  for (; count - i >= 8; i += 8) eight_codes_avx2<Codes>(x + i, scales, out + i);
  if (i < count) eight_codes_avx2<Codes>(x + count - 8, scales, out + count - 8);
}

template <class = Deferred>
DCP_TARGET_AVX2 void eight_integers_avx2(float const* x, FloatLanes8 scale, FloatLanes8 low, FloatLanes8 high, std::int8_t* out) {
  IntLanes8 const code = integers_of(quotients(x, scale), low, high), packed = signed_bytes(code, code, code, code);
  std::memcpy(out, &packed, 8);
}
template <class = Deferred>
DCP_TARGET_AVX2 void integers_avx2(float const* x, std::size_t count, float scale, float low, float high, std::int8_t* out) {
  if (count < 8) return integers_portable(x, count, scale, low, high, out);
  FloatLanes8 const scales = lanes_of(scale), lows = lanes_of(low), highs = lanes_of(high);
  std::size_t i = 0;
  for (; count - i >= 32; i += 32) {
    IntLanes8 const packed = signed_bytes(integers_of(quotients(x + i, scales), lows, highs), integers_of(quotients(x + i + 8, scales), lows, highs),
                                          integers_of(quotients(x + i + 16, scales), lows, highs), integers_of(quotients(x + i + 24, scales), lows, highs));
    std::memcpy(out + i, &packed, sizeof packed);
  }
  for (; count - i >= 8; i += 8) eight_integers_avx2(x + i, scales, lows, highs, out + i);
  if (i < count) eight_integers_avx2(x + count - 8, scales, lows, highs, out + count - 8);
}

template <class = Deferred>
DCP_TARGET_AVX2 IntLanes8 magnitudes(float const* x) {
  IntLanes8 bits;
  std::memcpy(&bits, x, sizeof bits);
  return bits & lanes_of_bits(0x7FFFFFFFu);
}
template <class = Deferred>
DCP_TARGET_AVX2 IntLanes8 larger(IntLanes8 a, IntLanes8 b) {
  IntLanes8 const is_a = a > b;
  return (a & is_a) | (b & ~is_a);
}
template <class = Deferred>
DCP_TARGET_AVX2 std::uint32_t largest_magnitude_avx2(float const* x, std::size_t count, std::uint32_t largest) {
  if (count < 8) return largest_magnitude_portable(x, count, largest);
  IntLanes8 a = lanes_of_bits(largest), b = a, c = a, d = a;   // four, because a maximum waits for the one before
  std::size_t i = 0;
  for (; count - i >= 32; i += 32) {
    a = larger(a, magnitudes(x + i));
    b = larger(b, magnitudes(x + i + 8));
    c = larger(c, magnitudes(x + i + 16));
    d = larger(d, magnitudes(x + i + 24));
  }
  for (; count - i >= 8; i += 8) b = larger(b, magnitudes(x + i));
  if (i < count) c = larger(c, magnitudes(x + count - 8));
  a = larger(larger(a, b), larger(c, d));
  float lanes[8];
  std::memcpy(lanes, &a, sizeof lanes);
  return largest_magnitude_portable(lanes, 8, 0);
}
#endif

// Each kernel by the instructions that it may use; tests run all of them.
template <class Codes>
void codes_by(Instructions instructions, float const* x, std::size_t count, float scale, std::uint8_t* out) {
  StandardArithmetic const standard;
#if DCP_X86_KERNELS
  if (instructions == Instructions::avx2) return codes_avx2<Codes>(x, count, scale, out);
#endif
  static_cast<void>(instructions);
  codes_portable<Codes>(x, count, scale, out);
}
template <class = Deferred>
void integers_by(Instructions instructions, float const* x, std::size_t count, float scale, int low, int high, std::int8_t* out) {
  StandardArithmetic const standard;
#if DCP_X86_KERNELS
  if (instructions == Instructions::avx2) return integers_avx2(x, count, scale, static_cast<float>(low), static_cast<float>(high), out);
#endif
  static_cast<void>(instructions);
  integers_portable(x, count, scale, static_cast<float>(low), static_cast<float>(high), out);
}
template <class = Deferred>
std::uint32_t largest_magnitude_by(Instructions instructions, float const* x, std::size_t count, std::uint32_t largest) {
#if DCP_X86_KERNELS
  if (instructions == Instructions::avx2) return largest_magnitude_avx2(x, count, largest);
#endif
  static_cast<void>(instructions);
  return largest_magnitude_portable(x, count, largest);
}

inline constexpr float smallest_scale = 0x1p-126f;
/// amax / divisor, at least the smallest normal float; 1 for a block of zeros.
inline float ratio_scale(float amax, float divisor) {
  if (std::bit_cast<std::uint32_t>(amax) == 0) return 1.0f;
  StandardArithmetic const standard;
  float const scale = quotient(amax, divisor);
  return scale < smallest_scale ? smallest_scale : scale;
}

/// The field of the exponent of amax after `carry` was added to its fraction.
constexpr int exponent_field(float amax, std::uint32_t carry) { return static_cast<int>((std::bit_cast<std::uint32_t>(amax) + carry) >> 23); }
constexpr int limited(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

}  // namespace detail

namespace quantize {

/// Makes `so_far` the largest magnitude of x[0, count) and itself; false if an element is NaN or infinite (`so_far` is then without meaning).
///
/// Example   float amax = 0;  for (row...) finite = absolute_maximum(row, columns, amax) && finite;
template <class = Deferred>
bool absolute_maximum(float const* x, std::size_t count, float& so_far) {
  std::uint32_t const largest = detail::largest_magnitude_by(detail::best_instructions(), x, count, std::bit_cast<std::uint32_t>(so_far) & 0x7FFFFFFFu);
  so_far = std::bit_cast<float>(largest);
  return largest < 0x7F800000u;
}

// Scale rules. `amax` is the largest magnitude of the whole block, finite and not below zero.

/// FP8 E4M3 by block, channel or tensor: amax / 448; 1 for a block of zeros.
///
/// Bound     |x - x'| <= max(|x| / 16, scale * 2^-10), which is at most amax / 28 while amax >= 448 * 2^-126
/// How       at least 2^-126; 448 * scale is finite up to FLT_MAX (every amax from where a rounding might exceed it was tried)
/// Law       quantizing what was dequantized gives the same codes
inline float e4m3_scale(float amax) { return detail::ratio_scale(amax, 448.0f); }

/// The same with a power of two ("ue8m0"), the smallest that lets nothing saturate: 2^ceil(log2(amax / 448)); 1 for a block of zeros.
///
/// Bound     |x - x'| <= max(|x| / 16, scale * 2^-10), scale < 2 * amax / 448; amax / 8 if amax > 1.75 * 2^127
/// How       at least 2^-126; at most 2^119, where the largest numbers saturate so that they are not read as infinite
/// Law       quantizing what was dequantized gives the same numbers (not always the same codes: all numbers of a block may halve)
inline float e4m3_scale_power_of_two(float amax) {
  if (std::bit_cast<std::uint32_t>(amax) == 0) return 1.0f;
  int const field = detail::limited(detail::exponent_field(amax, 0x1FFFFFu) - 8, 1, 119 + 127);   // a fraction above 0.75 carries
  return std::bit_cast<float>(static_cast<std::uint32_t>(field) << 23);
}

/// MXFP4: the E8M0 code of 2^(E - 2), E the exponent of amax with 0.25 added to its significand (EVEN: 1.75 and above count as 2); 0 for
/// a block of zeros. The scale is dcp::f8_e8m0::from_bits(code).
///
/// Bound     |x - x'| <= amax / 5; max(amax / 5, scale / 4) where amax < 2^-125, as codes end at 0; amax / 4 where amax >= 1.75 * 2^127
/// How       at most code 252, where the largest numbers saturate so that they are not read as infinite
/// Source    the rule of compressed-tensors and of torchao's EVEN; OCP's floor(log2 amax) - 2 has the bound amax / 4
inline std::uint8_t e2m1_scale_code(float amax) { return static_cast<std::uint8_t>(detail::limited(detail::exponent_field(amax, 0x200000u) - 2, 0, 252)); }

/// MXFP8 of E4M3 elements: the E8M0 code of 2^(E - 8), E as in e2m1_scale_code; 0 for a block of zeros.
///
/// What      Significands below 1.75 become quotients from 256 to below 448, the others quotients from 224 to below 256: nothing saturates.
///           The same as 2^ceil(log2(amax / 448)), but twice that if amax is 448 times a power of two
/// Bound     |x - x'| <= max(|x| / 16, scale * 2^-10); amax / 8 if amax >= 1.75 * 2^127
/// How       at most code 246, where the largest numbers saturate so that they are not read as infinite
/// Source    compressed-tensors, generate_mx_scales: one rule for elements of 4 and of 8 bits. (OCP's and torchao's FLOOR is
///           floor(log2 amax) - 8 and saturates what is above 448; torchao's RCEIL is the ceiling above.)
inline std::uint8_t mxfp8_scale_code(float amax) { return static_cast<std::uint8_t>(detail::limited(detail::exponent_field(amax, 0x200000u) - 8, 0, 246)); }

/// NVFP4: the scale of the tensor, amax / 2688, with the largest magnitude of the whole tensor; 1 for a tensor of zeros. A reader multiplies
/// by it (compressed-tensors stores its reciprocal).
///
/// How       at least 2^-126; 6 * 448 * scale is finite up to FLT_MAX, in whichever order it is computed, also if divided by 1 / scale
inline float nvfp4_tensor_scale(float amax) { return detail::ratio_scale(amax, 2688.0f); }

/// NVFP4: the E4M3 code of the scale of a block, amax / (6 * tensor_scale) rounded to nearest even; 0x01 where that is 0 but amax is not, so
/// that no block is lost; 0x38 (one) for a block of zeros.
///
/// Bound     with the amax of the block: |x - x'| <= 0.2 * amax where the code is normal (0x08 to 0x7E), 0.34 * amax where it is 0x02 to
///           0x07, max(0.34 * amax, nvfp4_step / 4) where it is 0x01. (Where tensor_scale is that of another tensor, with less than a 2688th
///           of this amax, numbers saturate.)
inline std::uint8_t nvfp4_block_scale(float amax, float tensor_scale) {
  if (std::bit_cast<std::uint32_t>(amax) == 0) return 0x38;
  detail::StandardArithmetic const standard;
  std::uint8_t const code = detail::code_of<detail::E4m3Codes>(detail::quotient(amax, detail::fenced(tensor_scale) * 6.0f));
  return code == 0 ? std::uint8_t{1} : code;
}

/// NVFP4: what elements are divided by, float(block scale) * tensor scale.
inline float nvfp4_step(std::uint8_t block_scale, float tensor_scale) {
  detail::StandardArithmetic const standard;
  return detail::fenced(static_cast<float>(f8_e4m3::from_bits(block_scale)) * detail::fenced(tensor_scale));
}

/// Symmetric integers of 2 to 8 bits: amax / (2^(bits - 1) - 0.5), so amax / 127.5 and amax / 7.5; 1 for a block of zeros.
///
/// Bound     |x - x'| <= scale / 2 (clamped to all of -2^(bits - 1) to 2^(bits - 1) - 1); scale if amax > FLT_MAX * (1 - 2^-bits)
/// How       at least 2^-126; at most FLT_MAX / 2^(bits - 1), where the largest numbers are clamped so that they are not read as infinite
/// Source    compressed-tensors
inline float int_scale(float amax, int bits) {
  auto const limit = static_cast<float>(1 << (bits - 1));
  float const scale = detail::ratio_scale(amax, limit - 0.5f), largest = 0x1.fffffep127f / limit;   // exact: a power of two
  return scale > largest ? largest : scale;
}

/// The smallest bfloat16 that is not below `scale`, for checkpoints that store scales as BF16: nothing saturates that did not before.
/// Divide by what this gives. Pre: scale > 0. (A scale of numbers above 2^127 may so become one whose largest codes are read as infinite.)
constexpr float rounded_up_to_bf16(float scale) { return std::bit_cast<float>((std::bit_cast<std::uint32_t>(scale) + 0xFFFFu) & 0xFFFF0000u); }

/// The smallest half that is not below `scale`, for checkpoints that store scales as F16: 2^-24 for all that is below it, and infinite above
/// 65504, which the caller refuses. Pre: scale > 0.
constexpr float rounded_to_f16_up(float scale) {
  f16 half{scale};
  if (std::bit_cast<std::uint32_t>(static_cast<float>(half)) < std::bit_cast<std::uint32_t>(scale)) half = f16::from_bits(static_cast<std::uint16_t>(half.bits() + 1));
  return static_cast<float>(half);
}

// Kernels. Pointers need the alignment of their elements and no more; `x` and what is written do not overlap. Pre: scale > 0.

/// The E4M3 codes of x / scale, rounded to nearest even; beyond 448, 448. (NaN: 0x7F or 0xFF.)
///
/// Bound     of a quotient that does not saturate: |x - x'| <= |x| / 16 where |x / scale| >= 2^-6, scale * 2^-10 below
template <class = Deferred>
void to_e4m3(float const* x, std::size_t count, float scale, std::uint8_t* out) { detail::codes_by<detail::E4m3Codes>(detail::best_instructions(), x, count, scale, out); }

/// The E5M2 codes of x / scale, rounded to nearest even; beyond 57344, 57344. (NaN: 0x7F or 0xFF.)
///
/// Bound     of a quotient that does not saturate: |x - x'| <= |x| / 8 where |x / scale| >= 2^-14, scale * 2^-17 below
template <class = Deferred>
void to_e5m2(float const* x, std::size_t count, float scale, std::uint8_t* out) { detail::codes_by<detail::E5m2Codes>(detail::best_instructions(), x, count, scale, out); }

/// The E2M1 codes, 0 to 15, one in each byte, of x / scale, rounded to nearest even; beyond 6, 6. The sign stays, also of what becomes
/// zero. (NaN: 7 or 15.)
///
/// Bound     |x - x'| <= scale / 4 for |x| <= 2 * scale, scale / 2 to 4 * scale, scale to 6 * scale, |x| - 6 * scale above
template <class = Deferred>
void to_e2m1(float const* x, std::size_t count, float scale, std::uint8_t* codes) { detail::codes_by<detail::E2m1Codes>(detail::best_instructions(), x, count, scale, codes); }

/// x / scale, rounded to nearest even and clamped to [low, high], which lie in [-128, 127]. (NaN: high.)
///
/// Bound     of a quotient in [low - 0.5, high + 0.5]: |x - x'| <= scale / 2
template <class = Deferred>
void to_int(float const* x, std::size_t count, float scale, int low, int high, std::int8_t* out) {
  detail::integers_by(detail::best_instructions(), x, count, scale, low, high, out);
}

/// Two codes of four bits to the byte, the one of even index in the low bits. Pre: codes < 16. `out` may be `codes`.
template <class = Deferred>
void pack_nibbles(std::uint8_t const* codes, std::size_t pairs, std::uint8_t* out) {
  for (; pairs >= 4; pairs -= 4, codes += 8, out += 4) {
    auto eight = load_little_endian<std::uint64_t>(reinterpret_cast<std::byte const*>(codes));
    eight = (eight | eight >> 4) & 0x00FF00FF00FF00FFu;
    eight = (eight | eight >> 8) & 0x0000FFFF0000FFFFu;
    auto const four = static_cast<std::uint32_t>(eight | eight >> 16);
    std::memcpy(out, &four, sizeof four);
  }
  for (; pairs > 0; --pairs, codes += 2, ++out) *out = static_cast<std::uint8_t>(codes[0] | codes[1] << 4);
}

}  // namespace quantize
}  // namespace dcp
