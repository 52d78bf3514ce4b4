// SPDX-License-Identifier: Apache-2.0
#pragma once
// Blocks of quantized GGUF tensors to float32, bit for bit what gguf-py's dequantize gives, and back for the simple types, byte for byte what its
// quantize gives.
//
// Every type decodes in two steps: the packed bits of a block to one signed byte per element, and for each group of 16 or 32 elements
// a scale and, for some types, an offset; then scale * code (- or + offset), each operation rounded for itself. The loops are plain and of
// fixed length, so that compilers make vectors of them, once for what every program may use and once for AVX2; the results cannot differ.
// Source    gguf-py 0.19 (quants.py), ggml's ggml-quants.c for the layouts

#include <dcp/base/config.hpp>
#include <dcp/base/bytes.hpp>
#include <dcp/base/error.hpp>
#include <dcp/base/instructions.hpp>
#include <dcp/core/dtype.hpp>
#include <dcp/formats/gguf.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>

namespace dcp::gguf {

namespace detail {

#if defined(__GNUC__)
#define DCP_GGUF_INLINE inline __attribute__((always_inline))   // into functions that are compiled for more instructions
#else
#define DCP_GGUF_INLINE inline
#endif

DCP_GGUF_INLINE unsigned byte_at(std::byte const* block, int i) { return static_cast<unsigned>(block[i]); }

/// The number of an IEEE half.
DCP_GGUF_INLINE float half_at(std::byte const* at) {
  unsigned const bits = byte_at(at, 0) | byte_at(at, 1) << 8, magnitude = bits & 0x7FFFu, sign = (bits & 0x8000u) << 16;
  if (magnitude >= 0x7C00u) return std::bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  if (magnitude >= 0x400u) return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));   // exact
}

/// What two 4-bit codes of a byte stand for in the types that look them up: E2M1 doubled, and the levels of IQ4.
inline constexpr std::array<std::int8_t, 16> fp4_doubled{0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
inline constexpr std::array<std::int8_t, 16> iq4_levels{-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

enum class Offset : std::uint8_t { none, plus, minus };

/// Codes, scales and offsets of one block. `Group`: elements of a scale.
template <int Elements, int Group, Offset Kind>
struct Unpacked {
  static constexpr int elements = Elements, group = Group, groups = Elements / Group;
  static constexpr Offset offset_kind = Kind;
  std::array<std::int8_t, static_cast<std::size_t>(Elements)> codes;
  std::array<float, static_cast<std::size_t>(groups)> scales;
  std::array<float, static_cast<std::size_t>(groups)> offsets;
};

DCP_GGUF_INLINE std::int8_t code(unsigned value) { return static_cast<std::int8_t>(static_cast<std::uint8_t>(value)); }
DCP_GGUF_INLINE std::int8_t code_minus(unsigned value, unsigned bias) { return static_cast<std::int8_t>(static_cast<std::uint8_t>(value - bias)); }

/// `Bytes` bytes to twice as many codes: all low halves, then all high ones.
template <int Bytes>
DCP_GGUF_INLINE void nibbles(std::byte const* from, unsigned bias, std::int8_t* codes) {
  for (int i = 0; i < Bytes; ++i) codes[i] = code_minus(byte_at(from, i) & 15u, bias);
  for (int i = 0; i < Bytes; ++i) codes[Bytes + i] = code_minus(byte_at(from, i) >> 4, bias);
}
template <int Bytes>
DCP_GGUF_INLINE void look_up_nibbles(std::byte const* from, std::array<std::int8_t, 16> const& levels, std::int8_t* codes) {
  for (int i = 0; i < Bytes; ++i) codes[i] = levels[byte_at(from, i) & 15u], codes[Bytes + i] = levels[byte_at(from, i) >> 4];
}
/// Adds 16 to the codes whose bit of the 32 at `from` is set.
DCP_GGUF_INLINE void fifth_bits(std::byte const* from, std::int8_t* codes) {
  constexpr std::array<std::uint8_t, 8> masks{1, 2, 4, 8, 16, 32, 64, 128};
  for (int b = 0; b < 4; ++b) {
    auto const bits = static_cast<std::uint8_t>(byte_at(from, b));
    for (int i = 0; i < 8; ++i) codes[8 * b + i] = code(static_cast<unsigned>(codes[8 * b + i]) + ((bits & masks[static_cast<std::size_t>(i)]) != 0 ? 16u : 0u));
  }
}

/// Where the offset is NaN, no other NaN may reach the sum: which one a processor keeps of two depends on the order of the operands, and
/// that is the compiler's choice.
template <class Block>
DCP_GGUF_INLINE void scale_and_offset(std::byte const* block, Block& out) {
  out.offsets[0] = half_at(block + 2);
  bool const no_number = ((byte_at(block, 2) | byte_at(block, 3) << 8) & 0x7FFFu) > 0x7C00u;
  out.scales[0] = no_number ? 0.0f : half_at(block);
}

struct Q4_0 : Unpacked<32, 32, Offset::none> {
  static constexpr int bytes = 18;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    scales[0] = half_at(block);
    nibbles<16>(block + 2, 8, codes.data());
  }
};
struct Q4_1 : Unpacked<32, 32, Offset::plus> {
  static constexpr int bytes = 20;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    scale_and_offset(block, *this);
    nibbles<16>(block + 4, 0, codes.data());
  }
};
struct Q5_0 : Unpacked<32, 32, Offset::none> {
  static constexpr int bytes = 22;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    scales[0] = half_at(block);
    nibbles<16>(block + 6, 16, codes.data());
    fifth_bits(block + 2, codes.data());
  }
};
struct Q5_1 : Unpacked<32, 32, Offset::plus> {
  static constexpr int bytes = 24;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    scale_and_offset(block, *this);
    nibbles<16>(block + 8, 0, codes.data());
    fifth_bits(block + 4, codes.data());
  }
};
struct Q8_0 : Unpacked<32, 32, Offset::none> {
  static constexpr int bytes = 34;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    scales[0] = half_at(block);
    std::memcpy(codes.data(), block + 2, 32);
  }
};
struct Q8_1 : Unpacked<32, 32, Offset::none> {
  static constexpr int bytes = 36;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    scales[0] = half_at(block);
    std::memcpy(codes.data(), block + 4, 32);
  }
};
struct Q8_K : Unpacked<256, 256, Offset::none> {
  static constexpr int bytes = 292;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    scales[0] = load_little_endian<float>(block);
    std::memcpy(codes.data(), block + 4, 256);
  }
};

/// 64 bytes to 256 codes of two bits: of each half, the lowest bits of its 32 bytes, then the next ones.
DCP_GGUF_INLINE void two_bits(std::byte const* from, unsigned bias, std::int8_t* codes) {
  for (int n = 0; n < 2; ++n)
    for (int j = 0; j < 4; ++j)
      for (int l = 0; l < 32; ++l) codes[128 * n + 32 * j + l] = code_minus(byte_at(from, 32 * n + l) >> (2 * j) & 3u, bias);
}

struct Q2_K : Unpacked<256, 16, Offset::minus> {
  static constexpr int bytes = 84;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    float const d = half_at(block + 80), least = half_at(block + 82);
    for (int k = 0; k < 16; ++k) {
      scales[static_cast<std::size_t>(k)] = rounded(d * static_cast<float>(byte_at(block, k) & 15u));
      offsets[static_cast<std::size_t>(k)] = rounded(least * static_cast<float>(byte_at(block, k) >> 4));
    }
    two_bits(block + 16, 0, codes.data());
  }
};
struct Q3_K : Unpacked<256, 16, Offset::none> {
  static constexpr int bytes = 110;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    std::byte const* const packed = block + 96;
    float const d = half_at(block + 108);
    for (int k = 0; k < 16; ++k) {
      unsigned const low = k < 8 ? byte_at(packed, k) & 15u : byte_at(packed, k - 8) >> 4, high = byte_at(packed, 8 + (k & 3)) >> (2 * (k >> 2)) & 3u;
      scales[static_cast<std::size_t>(k)] = d * static_cast<float>(static_cast<int>(low | high << 4) - 32);
    }
    two_bits(block + 32, 4, codes.data());
    for (int b = 0; b < 8; ++b)
      for (int l = 0; l < 32; ++l) codes[static_cast<std::size_t>(32 * b + l)] = code(static_cast<unsigned>(codes[static_cast<std::size_t>(32 * b + l)]) + ((byte_at(block, l) >> b & 1u) << 2));
  }
};

/// The scales and offsets of Q4_K and Q5_K: six bits each, of which those of the last four are spread over two bytes.
template <class Block>
DCP_GGUF_INLINE void six_bit_pairs(std::byte const* block, Block& out) {
  float const d = half_at(block), least = half_at(block + 2);
  std::byte const* const packed = block + 4;
  for (int k = 0; k < 4; ++k) {
    unsigned const a = byte_at(packed, k), b = byte_at(packed, k + 4), c = byte_at(packed, k + 8);
    auto const low = static_cast<std::size_t>(k), high = static_cast<std::size_t>(k + 4);
    out.scales[low] = rounded(d * static_cast<float>(a & 63u));
    out.offsets[low] = rounded(least * static_cast<float>(b & 63u));
    out.scales[high] = rounded(d * static_cast<float>((c & 15u) | (a >> 6) << 4));
    out.offsets[high] = rounded(least * static_cast<float>(c >> 4 | (b >> 6) << 4));
  }
}

struct Q4_K : Unpacked<256, 32, Offset::minus> {
  static constexpr int bytes = 144;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    six_bit_pairs(block, *this);
    for (int g = 0; g < 4; ++g) nibbles<32>(block + 16 + 32 * g, 0, codes.data() + 64 * g);
  }
};
struct Q5_K : Unpacked<256, 32, Offset::minus> {
  static constexpr int bytes = 176;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    six_bit_pairs(block, *this);
    for (int g = 0; g < 4; ++g) nibbles<32>(block + 48 + 32 * g, 0, codes.data() + 64 * g);
    for (int k = 0; k < 8; ++k)
      for (int l = 0; l < 32; ++l) codes[static_cast<std::size_t>(32 * k + l)] = code(static_cast<unsigned>(codes[static_cast<std::size_t>(32 * k + l)]) + ((byte_at(block, 16 + l) >> k & 1u) << 4));
  }
};
struct Q6_K : Unpacked<256, 16, Offset::none> {
  static constexpr int bytes = 210;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    float const d = half_at(block + 208);
    for (int k = 0; k < 16; ++k) scales[static_cast<std::size_t>(k)] = d * static_cast<float>(code(byte_at(block, 192 + k)));
    for (int n = 0; n < 2; ++n) {
      nibbles<64>(block + 64 * n, 0, codes.data() + 128 * n);
      for (int t = 0; t < 4; ++t)
        for (int l = 0; l < 32; ++l) {
          auto const i = static_cast<std::size_t>(128 * n + 32 * t + l);
          codes[i] = code_minus(static_cast<unsigned>(codes[i]) | (byte_at(block, 128 + 32 * n + l) >> (2 * t) & 3u) << 4, 32);
        }
    }
  }
};

struct Iq4Nl : Unpacked<32, 32, Offset::none> {
  static constexpr int bytes = 18;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    scales[0] = half_at(block);
    look_up_nibbles<16>(block + 2, iq4_levels, codes.data());
  }
};
struct Iq4Xs : Unpacked<256, 32, Offset::none> {
  static constexpr int bytes = 136;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    float const d = half_at(block);
    for (int k = 0; k < 8; ++k) {
      unsigned const low = byte_at(block, 4 + k / 2) >> (4 * (k % 2)) & 15u, high = byte_at(block, 2 + k / 4) >> (2 * (k % 4)) & 3u;
      scales[static_cast<std::size_t>(k)] = d * static_cast<float>(static_cast<int>(low | high << 4) - 32);
      look_up_nibbles<16>(block + 8 + 16 * k, iq4_levels, codes.data() + 32 * k);
    }
  }
};
struct Mxfp4 : Unpacked<32, 32, Offset::none> {
  static constexpr int bytes = 17;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    unsigned const e = byte_at(block, 0);
    scales[0] = std::bit_cast<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23);   // half of 2^(e - 127), for codes that are doubled
    look_up_nibbles<16>(block + 1, fp4_doubled, codes.data());
  }
};
struct Nvfp4 : Unpacked<64, 16, Offset::none> {
  static constexpr int bytes = 36;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    for (int k = 0; k < 4; ++k) {
      unsigned const e = byte_at(block, k), exponent = e >> 3 & 15u, mantissa = e & 7u;
      // Half of an E4M3 number without its sign; of the two NaNs, gguf-py takes the positive one for zero and the other one for 480.
      scales[static_cast<std::size_t>(k)] = e == 0x7Fu         ? 0.0f
                                            : exponent == 0 ? static_cast<float>(mantissa) * 0x1p-10f
                                                            : std::bit_cast<float>((exponent + 127 - 8) << 23 | mantissa << 20);
      look_up_nibbles<8>(block + 4 + 8 * k, fp4_doubled, codes.data() + 16 * k);
    }
  }
};

/// Three ternary digits, -1 to 1: the first digit of a byte is that of byte / 256 in base 3.
struct Tq1_0 : Unpacked<256, 256, Offset::none> {
  static constexpr int bytes = 54;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    constexpr std::array<unsigned, 5> powers{1, 3, 9, 27, 81};
    scales[0] = half_at(block + 52);
    std::int8_t* to = codes.data();
    auto const digits = [&](int first, int count, std::size_t places) {
      for (std::size_t p = 0; p < places; ++p)
        for (int i = 0; i < count; ++i) *to++ = code_minus((byte_at(block, first + i) * powers[p] & 255u) * 3 >> 8, 1);
    };
    digits(0, 32, 5), digits(32, 16, 5), digits(48, 4, 4);
  }
};
struct Tq2_0 : Unpacked<256, 256, Offset::none> {
  static constexpr int bytes = 66;
  DCP_GGUF_INLINE void unpack(std::byte const* block) {
    scales[0] = half_at(block + 64);
    two_bits(block, 1, codes.data());
  }
};

/// Rounds all of `values` to floats now, as rounded() does, and leaves the loops around it vectors.
template <class Floats>
DCP_GGUF_INLINE void round_all(Floats& values) {
#if defined(__GNUC__) && !defined(__CUDA_ARCH__)
  __asm__("" : "+m"(values));
#else
  for (auto& value : values) value = rounded(value);
#endif
}

/// Decodes blocks of one type. Always inlined: the caller says for which instructions.
template <class Block>
DCP_GGUF_INLINE void decode_all(std::byte const* blocks, std::int64_t count, float* out) {
  Block block;
  for (std::int64_t b = 0; b < count; ++b, blocks += Block::bytes) {
    block.unpack(blocks);
    for (std::size_t g = 0; g < static_cast<std::size_t>(Block::groups); ++g) {
      constexpr auto group = static_cast<std::size_t>(Block::group);
      float const scale = block.scales[g];
      std::int8_t const* const codes = block.codes.data() + g * group;
      if constexpr (Block::offset_kind == Offset::none) {
        for (std::size_t i = 0; i < group; ++i) out[i] = scale * static_cast<float>(codes[i]);
      } else {
        float const offset = block.offsets[g];
        std::array<float, group> products;
        for (std::size_t i = 0; i < group; ++i) products[i] = scale * static_cast<float>(codes[i]);
        round_all(products);
        for (std::size_t i = 0; i < group; ++i) out[i] = Block::offset_kind == Offset::plus ? products[i] + offset : products[i] - offset;
      }
      out += group;
    }
  }
}

template <class Block>
void decode_portable(std::byte const* blocks, std::int64_t count, float* out) { decode_all<Block>(blocks, count, out); }
#if DCP_X86_KERNELS
template <class Block>
DCP_TARGET_AVX2 void decode_avx2(std::byte const* blocks, std::int64_t count, float* out) { decode_all<Block>(blocks, count, out); }
#endif

using Decoder = void (*)(std::byte const*, std::int64_t, float*);

#if defined(__clang__)
inline constexpr int avx2_pays_from = 32;
#else
// g++ 12 stores the codes of a small block in halves and loads them whole, and the load waits for both: 2.7 instead of 7 elements a nanosecond.
inline constexpr int avx2_pays_from = 256;
#endif

template <class Block>
Decoder decoder_for(Instructions instructions) {
#if DCP_X86_KERNELS
  if constexpr (Block::elements >= avx2_pays_from)
    if (instructions == Instructions::avx2) return &decode_avx2<Block>;
#endif
  static_cast<void>(instructions);
  return &decode_portable<Block>;
}

/// nullptr for types that cannot be decoded.
template <class = Deferred>
Decoder decoder_of(std::uint32_t type, Instructions instructions) {
  switch (type) {
    case types::q4_0: return decoder_for<Q4_0>(instructions);
    case types::q4_1: return decoder_for<Q4_1>(instructions);
    case types::q5_0: return decoder_for<Q5_0>(instructions);
    case types::q5_1: return decoder_for<Q5_1>(instructions);
    case types::q8_0: return decoder_for<Q8_0>(instructions);
    case types::q8_1: return decoder_for<Q8_1>(instructions);
    case types::q2_k: return decoder_for<Q2_K>(instructions);
    case types::q3_k: return decoder_for<Q3_K>(instructions);
    case types::q4_k: return decoder_for<Q4_K>(instructions);
    case types::q5_k: return decoder_for<Q5_K>(instructions);
    case types::q6_k: return decoder_for<Q6_K>(instructions);
    case types::q8_k: return decoder_for<Q8_K>(instructions);
    case types::iq4_nl: return decoder_for<Iq4Nl>(instructions);
    case types::iq4_xs: return decoder_for<Iq4Xs>(instructions);
    case types::tq1_0: return decoder_for<Tq1_0>(instructions);
    case types::tq2_0: return decoder_for<Tq2_0>(instructions);
    case types::mxfp4: return decoder_for<Mxfp4>(instructions);
    case types::nvfp4: return decoder_for<Nvfp4>(instructions);
    default: return nullptr;
  }
}

template <class = Deferred>
void decode_blocks_with(Instructions instructions, std::uint32_t type, std::byte const* blocks, std::int64_t count, float* out) {
  Decoder const decode = decoder_of(type, instructions);
  if (decode == nullptr) throw Error{ErrorCode::unsupported, "blocks of ggml type " + std::to_string(type) + " cannot be decoded"};
  if (type == types::mxfp4)
    for (std::int64_t b = 0; b < count; ++b)
      if (blocks[17 * b] == std::byte{255}) throw Error{ErrorCode::quant_mismatch, "MXFP4 block " + std::to_string(b) + " has a scale that is no number (255)"};
  StandardArithmetic const standard;
  decode(blocks, count, out);
}


// --- back to blocks

/// The half nearest to `value`; false for what has none (beyond 65504, infinite, NaN).
inline bool store_half(float value, std::byte* to) {
  std::uint16_t const bits = f16{value}.bits();
  std::memcpy(to, &bits, sizeof bits);
  return (bits & 0x7C00u) != 0x7C00u;
}

/// 1 / `scale`, as codes are computed with it. A scale whose inverse is infinite is zero as a half, so that all codes mean zero.
inline float inverse(float scale) {
  float const result = scale == 0 ? 0.0f : 1.0f / scale;
  return (std::bit_cast<std::uint32_t>(result) & 0x7F800000u) == 0x7F800000u ? 0.0f : result;
}

inline float magnitude(float value) { return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & 0x7FFFFFFFu); }

/// The element of the 32 that is largest, without its sign; the first of several.
inline float furthest_from_zero(float const* in) {
  std::int32_t largest = 0;   // bits of magnitudes are in the order of the magnitudes
  for (int i = 0; i < 32; ++i) largest = std::max(largest, std::bit_cast<std::int32_t>(magnitude(in[i])));
  int first = 0;
  while (std::bit_cast<std::int32_t>(magnitude(in[first])) != largest) ++first;
  return in[first];
}

using Block32 = std::array<float, 32>;

/// Puts (products[i] + middle) without its fraction, below `levels`, into nibbles at `qs`, and the fifth bits into `qh`, if there is one.
inline void store_codes(Block32& products, float middle, int levels, std::byte* qh, std::byte* qs) {
  round_all(products);
  std::array<std::int32_t, 32> codes;   // never negative
  for (std::size_t i = 0; i < 32; ++i) codes[i] = std::min(static_cast<std::int32_t>(products[i] + middle), levels - 1);
  for (std::size_t i = 0; i < 16; ++i) qs[i] = static_cast<std::byte>((codes[i] & 15) | (codes[i + 16] & 15) << 4);
  if (qh == nullptr) return;
  std::uint32_t fifth = 0;
  for (std::size_t i = 0; i < 32; ++i) fifth |= static_cast<std::uint32_t>(codes[i] >> 4) << i;
  std::memcpy(qh, &fifth, sizeof fifth);
}

/// One block of a type; false if a scale does not fit into a half. `in`: 32 finite numbers.
inline bool encode_q8_0(float const* in, std::byte* out) {
  float const d = magnitude(furthest_from_zero(in)) / 127, id = inverse(d);
  Block32 scaled;
  for (std::size_t i = 0; i < 32; ++i) scaled[i] = in[i] * id;
  round_all(scaled);
  std::array<std::int32_t, 32> codes;
  for (std::size_t i = 0; i < 32; ++i) {
    auto const whole = static_cast<std::int32_t>(scaled[i]);                         // towards zero
    codes[i] = whole + static_cast<std::int32_t>(2 * (scaled[i] - static_cast<float>(whole)));   // half away from zero: what is left, doubled, is exact
  }
  for (std::size_t i = 0; i < 32; ++i) out[2 + i] = static_cast<std::byte>(static_cast<std::int8_t>(codes[i]));
  return store_half(d, out);
}
/// Q4_0 and Q5_0: codes below 2 * `half`, of which `half` means zero.
inline bool encode_symmetric(float const* in, int half, std::byte* qh, std::byte* qs, std::byte* out) {
  float const d = furthest_from_zero(in) / static_cast<float>(-half), id = inverse(d);
  float const middle = d != 0 && id == 0 ? 0.0f : static_cast<float>(half) + 0.5f;   // gguf-py takes code 0 where the inverse is infinite
  Block32 products;
  for (std::size_t i = 0; i < 32; ++i) products[i] = in[i] * id;
  store_codes(products, middle, 2 * half, qh, qs);
  return store_half(d, out);
}
/// Q4_1 and Q5_1: codes from the smallest number up to the largest one, which is `most`.
inline bool encode_from_least(float const* in, int most, std::byte* qh, std::byte* qs, std::byte* out) {
  float least = in[0], largest = in[0];
  for (int i = 1; i < 32; ++i) {
    if (in[i] < least) least = in[i];
    if (in[i] > largest) largest = in[i];
  }
  float const d = (largest - least) / static_cast<float>(most);
  if (!store_half(d, out) || !store_half(least, out + 2)) return false;
  float const id = inverse(d);
  Block32 products;
  for (std::size_t i = 0; i < 32; ++i) products[i] = (in[i] - least) * id;
  store_codes(products, 0.5f, most + 1, qh, qs);
  return true;
}

inline bool encode_block(std::uint32_t type, float const* in, std::byte* out) {
  switch (type) {
    case types::q8_0: return encode_q8_0(in, out);
    case types::q4_0: return encode_symmetric(in, 8, nullptr, out + 2, out);
    case types::q5_0: return encode_symmetric(in, 16, out + 2, out + 6, out);
    case types::q4_1: return encode_from_least(in, 15, nullptr, out + 4, out);
    default: return encode_from_least(in, 31, out + 4, out + 8, out);
  }
}

inline bool all_finite(float const* in) {
  unsigned found = 0;
  for (int i = 0; i < 32; ++i) found |= (std::bit_cast<std::uint32_t>(in[i]) & 0x7F800000u) == 0x7F800000u ? 1u : 0u;
  return found == 0;
}

}  // namespace detail

/// Whether decode_blocks knows `type`.
template <class = Deferred>
bool can_decode(std::uint32_t type) { return detail::decoder_of(type, detail::Instructions::portable) != nullptr; }

/// `count` whole blocks to float32, in the order of the elements: the bits that gguf-py gives.
///
/// Throws    Error: unsupported for other types; quant_mismatch for an MXFP4 scale that is no number, before anything is written
template <class = Deferred>
void decode_blocks(std::uint32_t type, std::byte const* blocks, std::int64_t count, float* out) {
  detail::decode_blocks_with(detail::best_instructions(), type, blocks, count, out);
}

/// Whether encode_blocks knows `type`: Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1, all in blocks of 32 elements.
template <class = Deferred>
bool can_encode(std::uint32_t type) {
  return type == types::q8_0 || type == types::q4_0 || type == types::q4_1 || type == types::q5_0 || type == types::q5_1;
}

/// `count` whole blocks of float32 to `type`: the bytes that gguf-py gives.
///
/// Throws    Error: unsupported for other types; invalid_argument for NaN, infinity and numbers too large for the scale of a block, with
///           the element, counted from `in`. Blocks before it are written then
template <class = Deferred>
void encode_blocks(std::uint32_t type, float const* in, std::int64_t count, std::byte* out) {
  if (!can_encode(type)) throw Error{ErrorCode::unsupported, "blocks of ggml type " + std::to_string(type) + " cannot be encoded"};
  TypeFacts const& facts = *type_facts(type);
  detail::StandardArithmetic const standard;
  for (std::int64_t b = 0; b < count; ++b, in += 32, out += facts.bytes) {
    auto const refuse = [&](std::int64_t i, char const* problem) {
      throw Error{ErrorCode::invalid_argument, "element " + std::to_string(32 * b + i) + ' ' + problem + ' ' + std::string{facts.name}};
    };
    if (!detail::all_finite(in))
      for (int i = 0; i < 32; ++i)
        if ((std::bit_cast<std::uint32_t>(in[i]) & 0x7F800000u) == 0x7F800000u) refuse(i, "is infinite or no number, which cannot be said in");
    if (!detail::encode_block(type, in, out)) {
      int furthest = 0;
      for (int i = 1; i < 32; ++i)
        if (detail::magnitude(in[i]) > detail::magnitude(in[furthest])) furthest = i;
      refuse(furthest, "is too large for a block of");
    }
  }
}

}  // namespace dcp::gguf

#undef DCP_GGUF_INLINE
