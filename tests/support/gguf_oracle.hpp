// SPDX-License-Identifier: Apache-2.0
#pragma once
// The elements of GGUF's blocks by their formulas, one at a time: an oracle that shares no code with the decoder.

#include <dcp/core/dtype.hpp>
#include <dcp/formats/gguf.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace dcp::test {

/// One element by its formula. Each operation is one of doubles, rounded to float, which for two floats is the operation of floats.
class GgufOracle {
 public:
  GgufOracle(std::uint32_t type, std::byte const* block) : type_{type}, block_{block} {}

  float operator()(int i) const {
    int const n = i / 128, j = i % 128 / 32, l = i % 32;
    switch (type_) {
      case gguf::types::q4_0: return times(half(0), nibble(2, i) - 8);
      case gguf::types::q4_1: return plus(times(half(0), nibble(4, i)), half(2));
      case gguf::types::q5_0: return times(half(0), nibble(6, i) + 16 * bit(2, i) - 16);
      case gguf::types::q5_1: return plus(times(half(0), nibble(8, i) + 16 * bit(4, i)), half(2));
      case gguf::types::q8_0: return times(half(0), signed_at(2 + i));
      case gguf::types::q8_1: return times(half(0), signed_at(4 + i));
      case gguf::types::q8_k: {
        float d = 0;
        std::memcpy(&d, block_, 4);
        return times(d, signed_at(4 + i));
      }
      case gguf::types::q2_k: {
        int const s = at(8 * n + 2 * j + l / 16), q = at(16 + 32 * n + l) >> (2 * j) & 3;
        return plus(times(times(half(80), s & 15), q), -times(half(82), s >> 4));
      }
      case gguf::types::q3_k: {
        int const k = 8 * n + 2 * j + l / 16, low = k < 8 ? at(96 + k) & 15 : at(96 + k - 8) >> 4;
        int const scale = low + 16 * (at(96 + 8 + (k & 3)) >> (2 * (k >> 2)) & 3);
        int const q = (at(32 + 32 * n + l) >> (2 * j) & 3) - ((at(l) >> (4 * n + j) & 1) != 0 ? 0 : 4);
        return times(times(half(108), scale - 32), q);
      }
      case gguf::types::q4_k:
      case gguf::types::q5_k: {
        int const g = i / 64, h = i % 64 >= 32 ? 1 : 0, k = 2 * g + h;
        int const scale = k < 4 ? at(4 + k) & 63 : (at(4 + k + 4) & 15) | (at(4 + k - 4) >> 6) << 4;
        int const least = k < 4 ? at(4 + k + 4) & 63 : at(4 + k + 4) >> 4 | (at(4 + k) >> 6) << 4;
        int const packed = at((type_ == gguf::types::q4_k ? 16 : 48) + 32 * g + l);
        int q = h != 0 ? packed >> 4 : packed & 15;
        if (type_ == gguf::types::q5_k) q += 16 * (at(16 + l) >> k & 1);
        return plus(times(times(half(0), scale), q), -times(half(2), least));
      }
      case gguf::types::q6_k: {
        int const packed = at(64 * n + l + 32 * (j & 1)), low = (j >> 1) != 0 ? packed >> 4 : packed & 15, high = at(128 + 32 * n + l) >> (2 * j) & 3;
        return times(times(half(208), signed_at(192 + 8 * n + l / 16 + 2 * j)), low + 16 * high - 32);
      }
      case gguf::types::mxfp4: return times(std::ldexp(1.0, at(0) - 127), e2m1(nibble(1, i)));
      case gguf::types::nvfp4: {
        int const s = i / 16, k = i % 16, packed = at(4 + 8 * s + k % 8), e = at(s);
        double const scale = e == 0x7F ? 0 : (e & 0x78) == 0 ? std::ldexp(e & 7, -9) : std::ldexp(8 + (e & 7), (e >> 3 & 15) - 10);
        return times(scale, e2m1(k < 8 ? packed & 15 : packed >> 4));
      }
      case gguf::types::iq4_nl: return times(half(0), level(nibble(2, i)));
      case gguf::types::iq4_xs: {
        int const k = i / 32, packed = at(8 + 16 * k + l % 16);
        int const scale = (at(4 + k / 2) >> (4 * (k % 2)) & 15) | ((at(2) | at(3) << 8) >> (2 * k) & 3) << 4;
        return times(times(half(0), scale - 32), level(l < 16 ? packed & 15 : packed >> 4));
      }
      case gguf::types::tq1_0: {
        int byte = 0, digit = 0;
        if (i < 160) byte = i % 32, digit = i / 32;
        else if (i < 240) byte = 32 + (i - 160) % 16, digit = (i - 160) / 16;
        else byte = 48 + (i - 240) % 4, digit = (i - 240) / 4;
        int value = at(byte);
        for (int d = 0; d < digit; ++d) value = value * 3 % 256;
        return times(half(52), value * 3 / 256 - 1);
      }
      case gguf::types::tq2_0: return times(half(64), (at(32 * n + l) >> (2 * j) & 3) - 1);
      default: throw std::logic_error{"no formula for this type"};
    }
  }

 private:
  static float times(double a, double b) { return static_cast<float>(a * b); }
  static float plus(double a, double b) { return static_cast<float>(a + b); }
  static int level(int q) {
    constexpr std::array levels{-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    return levels[static_cast<std::size_t>(q)];
  }
  static double e2m1(int q) {
    constexpr std::array values{0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0};
    double const size = values[static_cast<std::size_t>(q & 7)];
    return q > 8 ? -size : size;   // minus zero is zero there
  }
  int at(int i) const { return static_cast<int>(block_[i]); }
  int signed_at(int i) const { return static_cast<std::int8_t>(block_[i]); }
  int nibble(int from, int i) const { return i < 16 ? at(from + i) & 15 : at(from + i - 16) >> 4; }
  int bit(int from, int i) const { return at(from + i / 8) >> (i % 8) & 1; }
  double half(int i) const { return static_cast<float>(f16::from_bits(static_cast<std::uint16_t>(at(i) | at(i + 1) << 8))); }

  std::uint32_t type_;
  std::byte const* block_;
};

}  // namespace dcp::test
