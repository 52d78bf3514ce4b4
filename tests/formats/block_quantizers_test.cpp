// SPDX-License-Identifier: Apache-2.0
#include <dcp/formats/block_quantizers.hpp>

#include <support/generate.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

using namespace dcp;
using detail::E2m1Codes, detail::E4m3Codes, detail::E5m2Codes, detail::Instructions;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity(), not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr float largest_float = std::numeric_limits<float>::max(), smallest_float = 0x1p-149f;

float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }
float next_up(float x) { return std::nextafter(x, infinity); }
float next_down(float x) { return std::nextafter(x, -infinity); }

std::vector<Instructions> all_instructions() {
  std::vector<Instructions> result{Instructions::portable};
  if (detail::best_instructions() != Instructions::portable) result.push_back(detail::best_instructions());
  return result;
}

// The formats as their specifications give them; shares nothing with the header.
struct Format {
  int exponent, mantissa, bias;
  unsigned largest;   // the code of the largest finite magnitude
  unsigned sign() const { return 1u << (exponent + mantissa); }
  double value(unsigned code) const {
    unsigned const magnitude = code & (sign() - 1), e = magnitude >> mantissa, m = magnitude & ((1u << mantissa) - 1);
    double const absolute = e == 0 ? std::ldexp(m, 1 - bias - mantissa) : std::ldexp((1u << mantissa) + m, static_cast<int>(e) - bias - mantissa);
    return (code & sign()) != 0 ? -absolute : absolute;
  }
  // The nearest code, of two the even one, by looking at all of them.
  unsigned nearest(double x) const {
    x = std::clamp(x, -1e6, 1e6);   // differences from what is larger are all the same
    unsigned best = 0;
    for (unsigned code = 1; code <= largest; ++code) {
      double const now = std::abs(std::abs(x) - value(code)), before = std::abs(std::abs(x) - value(best));
      if (now < before || (now == before && code % 2 == 0)) best = code;
    }
    return best | (std::signbit(x) ? sign() : 0u);
  }
};
constexpr Format e4m3{4, 3, 7, 0x7E}, e5m2{5, 2, 15, 0x7B}, e2m1{2, 1, 1, 7};

// With every set of instructions, which give the same.
template <class Codes>
std::vector<std::uint8_t> codes(std::vector<float> const& x, float scale) {
  std::vector<std::uint8_t> result(x.size()), other(x.size());
  detail::codes_by<Codes>(Instructions::portable, x.data(), x.size(), scale, result.data());
  for (auto const instructions : all_instructions()) {
    detail::codes_by<Codes>(instructions, x.data(), x.size(), scale, other.data());
    REQUIRE(result == other);
  }
  return result;
}
template <class Codes>
unsigned code(float x, float scale = 1) {
  auto const nine = codes<Codes>(std::vector<float>(9, x), scale);
  REQUIRE(std::count(nine.begin(), nine.end(), nine[0]) == 9);
  return nine[0];
}
std::vector<std::int8_t> integers(std::vector<float> const& x, float scale, int bits) {
  int const limit = 1 << (bits - 1);
  std::vector<std::int8_t> result(x.size()), other(x.size());
  detail::integers_by(Instructions::portable, x.data(), x.size(), scale, -limit, limit - 1, result.data());
  for (auto const instructions : all_instructions()) {
    detail::integers_by(instructions, x.data(), x.size(), scale, -limit, limit - 1, other.data());
    REQUIRE(result == other);
  }
  return result;
}
float amax_of(std::vector<float> const& x) {
  float largest = 0;
  REQUIRE(quantize::absolute_maximum(x.data(), x.size(), largest));
  return largest;
}

// Blocks of every kind: of weights, with outliers, constant, of powers of two, near both ends of float, zero.
std::vector<float> any_block(std::mt19937_64& engine, std::size_t size) {
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform{0.001f, 1.0f};
  std::uniform_int_distribution<int> exponent{-149, 126};
  std::vector<float> x(size);
  float const scale = std::ldexp(1.0f + uniform(engine), exponent(engine));
  auto const kind = engine() % 10;
  for (auto& v : x) switch (kind) {
      case 0: v = normal(engine); break;
      case 1: v = normal(engine) / (uniform(engine) * uniform(engine)); break;
      case 2: v = scale; break;
      case 3: v = normal(engine) * 0x1p-126f; break;
      case 4: v = std::clamp(normal(engine) * 0x1p126f, -largest_float, largest_float); break;
      case 5: v = std::ldexp(static_cast<float>(engine() % 9) - 4.0f, -149); break;
      case 6: v = engine() % 3 == 0 ? -0.0f : 0.0f; break;
      case 7: v = std::ldexp(engine() % 2 == 0 ? 1.0f : -1.0f, exponent(engine)); break;
      case 8: v = std::clamp(normal(engine) * scale, -largest_float, largest_float); break;
      default: v = float_of(static_cast<std::uint32_t>(engine()) & 0xFF7FFFFFu); break;
    }
  if (engine() % 8 == 0) x[engine() % size] = engine() % 2 == 0 ? largest_float : -largest_float;
  if (engine() % 8 == 0) x[engine() % size] = float_of(0x7F7FFFFFu - static_cast<std::uint32_t>(engine() % 64));
  return x;
}

// What dequantizing gives, and what every scheme owes: finite, on the side of zero where it was, in order, within the bound.
template <class Bound>
void check_block(std::vector<float> const& x, std::vector<float> const& read, Bound bound) {
  std::vector<std::size_t> order(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return x[a] < x[b]; });
  for (std::size_t k = 0; k < x.size(); ++k) {
    std::size_t const i = order[k];
    CAPTURE(x[i]);
    CAPTURE(read[i]);
    REQUIRE(std::isfinite(read[i]));
    if (read[i] != 0) REQUIRE(std::signbit(read[i]) == std::signbit(x[i]));
    if (k > 0) REQUIRE(read[order[k - 1]] <= read[i]);
    REQUIRE(std::abs(double{x[i]} - double{read[i]}) <= bound(std::abs(double{x[i]})) * (1 + 0x1p-20) + 0x1p-149);
  }
}

template <class F>
void many_blocks(F check) {
  auto const seed = test::first_seed();
  for (std::uint64_t round = 0; round < 1500; ++round) {
    CAPTURE(seed + round);
    std::mt19937_64 engine{seed + round};
    check(any_block(engine, 1 + engine() % 70), engine);
  }
}

std::vector<float> multiplied(std::vector<std::uint8_t> const& codes, Format const& format, float scale) {
  std::vector<float> result;
  for (auto const code : codes) result.push_back(static_cast<float>(format.value(code)) * scale);
  return result;
}

}  // namespace

TEST_CASE("the edges of E4M3, E5M2 and E2M1 have the published codes") {
  struct Edge {
    std::uint32_t bits;
    unsigned e4m3, e5m2, e2m1;
  };
  static constexpr Edge edges[]{
      {0x00000000, 0x00, 0x00, 0x0}, {0x80000000, 0x80, 0x80, 0x8}, {0x3f800000, 0x38, 0x3c, 0x2}, {0x3f000000, 0x30, 0x38, 0x1}, {0x3e800000, 0x28, 0x34, 0x0},
      {0x3e800003, 0x28, 0x34, 0x1}, {0x3f400000, 0x34, 0x3a, 0x2}, {0x3fa00000, 0x3a, 0x3d, 0x2}, {0x3fe00000, 0x3e, 0x3f, 0x4}, {0x40200000, 0x42, 0x41, 0x4},
      {0x40600000, 0x46, 0x43, 0x6}, {0x40a00000, 0x4a, 0x45, 0x6}, {0x40a00001, 0x4a, 0x45, 0x7}, {0x40e00000, 0x4e, 0x47, 0x7}, {0x40e80000, 0x4e, 0x47, 0x7},
      {0x40f00000, 0x4f, 0x48, 0x7}, {0x41f00000, 0x5f, 0x50, 0x7}, {0x3dcccccd, 0x1d, 0x2e, 0x0}, {0x3e99999a, 0x2a, 0x35, 0x1}, {0x3eaaaaab, 0x2b, 0x35, 0x1},
      {0x40490fdb, 0x45, 0x42, 0x5}, {0x3c800000, 0x08, 0x24, 0x0}, {0x3b000000, 0x01, 0x18, 0x0}, {0x3a800000, 0x00, 0x14, 0x0}, {0x3a800001, 0x01, 0x14, 0x0},
      {0x3b400000, 0x02, 0x1a, 0x0}, {0x37800000, 0x00, 0x01, 0x0}, {0x37000000, 0x00, 0x00, 0x0}, {0x37000001, 0x00, 0x01, 0x0}, {0x43700000, 0x77, 0x5c, 0x7},
      {0x43d80000, 0x7e, 0x5f, 0x7}, {0x43e00000, 0x7e, 0x5f, 0x7}, {0x43e80000, 0x7e, 0x5f, 0x7}, {0x43e80001, 0x7e, 0x5f, 0x7}, {0x47600000, 0x7e, 0x7b, 0x7},
      {0x476fffff, 0x7e, 0x7b, 0x7}, {0x47700000, 0x7e, 0x7b, 0x7}, {0x477fe000, 0x7e, 0x7b, 0x7}, {0x477fefff, 0x7e, 0x7b, 0x7}, {0x477ff000, 0x7e, 0x7b, 0x7},
      {0x7f7fffff, 0x7e, 0x7b, 0x7}, {0x00000001, 0x00, 0x00, 0x0}, {0x33800000, 0x00, 0x00, 0x0}, {0x33000000, 0x00, 0x00, 0x0}, {0x33000001, 0x00, 0x00, 0x0},
      {0x3f808000, 0x38, 0x3c, 0x2}, {0x3f818000, 0x38, 0x3c, 0x2}, {0x7f800000, 0x7e, 0x7b, 0x7}, {0xff800000, 0xfe, 0xfb, 0xf}, {0x7fc00000, 0x7f, 0x7f, 0x7}};
  for (auto const& edge : edges) {
    CAPTURE(edge.bits);
    CHECK(code<E4m3Codes>(float_of(edge.bits)) == edge.e4m3);
    CHECK(code<E5m2Codes>(float_of(edge.bits)) == edge.e5m2);
    CHECK(code<E2m1Codes>(float_of(edge.bits)) == edge.e2m1);
    CHECK(code<E4m3Codes>(float_of(edge.bits ^ 0x80000000u)) == (edge.e4m3 ^ 0x80));
    CHECK(code<E5m2Codes>(float_of(edge.bits ^ 0x80000000u)) == (edge.e5m2 ^ 0x80));
    CHECK(code<E2m1Codes>(float_of(edge.bits ^ 0x80000000u)) == (edge.e2m1 ^ 0x8));
  }
}

TEST_CASE("every code is its own, and between two neighbours the middle goes to the even one") {
  auto const check = [](Format const& format, auto of) {
    for (unsigned n = 0; n <= format.largest; ++n) {
      for (unsigned const sign : {0u, format.sign()}) {
        CAPTURE(n);
        float const direction = sign == 0 ? 1.0f : -1.0f;
        CHECK(of(static_cast<float>(format.value(n)) * direction) == (n | sign));
        if (n == format.largest) continue;
        auto const middle = static_cast<float>((format.value(n) + format.value(n + 1)) / 2);
        CHECK(of(middle * direction) == ((n % 2 == 0 ? n : n + 1) | sign));
        CHECK(of(next_up(middle) * direction) == ((n + 1) | sign));
        CHECK(of(next_down(middle) * direction) == (n | sign));
      }
    }
  };
  check(e4m3, [](float x) { return code<E4m3Codes>(x); });
  check(e5m2, [](float x) { return code<E5m2Codes>(x); });
  check(e2m1, [](float x) { return code<E2m1Codes>(x); });
}

TEST_CASE("codes are those of the small floats of the library, for all bfloat16 numbers and for random floats") {
  auto const seed = test::first_seed();
  CAPTURE(seed);
  std::mt19937_64 engine{seed};
  std::vector<float> x;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) x.push_back(float_of(bits << 16));
  for (int i = 0; i < 300'000; ++i) x.push_back(float_of(static_cast<std::uint32_t>(engine())));
  for (int i = 0; i < 300'000; ++i) x.push_back(float_of(0x30000000u + static_cast<std::uint32_t>(engine() % 0x18000000u)));   // where the codes are
  auto const as_e4m3 = codes<E4m3Codes>(x, 1), as_e5m2 = codes<E5m2Codes>(x, 1), as_e2m1 = codes<E2m1Codes>(x, 1);
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(x[i])) {
      wrong += !std::isnan(static_cast<float>(f8_e4m3::from_bits(as_e4m3[i]))) || !std::isnan(static_cast<float>(f8_e5m2::from_bits(as_e5m2[i])));
      continue;
    }
    wrong += as_e4m3[i] != f8_e4m3{std::clamp(x[i], -448.0f, 448.0f)}.bits();
    wrong += as_e5m2[i] != f8_e5m2{std::clamp(x[i], -57344.0f, 57344.0f)}.bits();
    if (i % 7 == 0 && std::isfinite(x[i])) wrong += as_e2m1[i] != e2m1.nearest(double{x[i]});
  }
  CHECK(wrong == 0);
}

TEST_CASE("integers are rounded to nearest even and clamped") {
  auto const one = [](float x, int bits) { return int{integers(std::vector<float>(9, x), 1, bits)[8]}; };
  for (int bits = 2; bits <= 8; ++bits) {
    int const limit = 1 << (bits - 1);
    for (int n = -limit; n < limit; ++n) {
      auto const x = static_cast<float>(n), middle = x + 0.5f;
      CAPTURE(middle);
      CHECK(one(x, bits) == n);
      CHECK(one(middle, bits) == (n % 2 == 0 ? n : std::min(n + 1, limit - 1)));
      CHECK(one(next_up(middle), bits) == std::min(n + 1, limit - 1));
      CHECK(one(next_down(middle), bits) == n);
    }
    for (float const x : {1e3f, 1e10f, largest_float, infinity, not_a_number}) CHECK(one(x, bits) == limit - 1);
    for (float const x : {-1e3f, -1e10f, -largest_float, -infinity}) CHECK(one(x, bits) == -limit);
    for (float const x : {0.0f, -0.0f, 1e-10f, -1e-10f, smallest_float}) CHECK(one(x, bits) == 0);
  }
}

TEST_CASE("law: a code does not depend on instructions, on alignment, on its neighbours, or on how a block is cut; nothing else is written") {
  auto const seed = test::first_seed();
  CAPTURE(seed);
  std::mt19937_64 engine{seed};
  for (std::size_t offset = 0; offset < 9; ++offset)
    for (std::size_t size = 0; size <= 70; ++size) {
      CAPTURE(offset);
      CAPTURE(size);
      std::vector<float> x(offset + size);   // ends where its memory ends, so that a sanitizer sees a read past it
      for (auto& v : x) v = std::normal_distribution<float>{}(engine);
      if (!x.empty()) x[engine() % x.size()] *= 1e30f;
      float const scale = 0.01f;
      for (auto const instructions : all_instructions()) {
        std::vector<std::uint8_t> out(offset + size + 40, 0xAA), cut(size);
        detail::codes_by<E4m3Codes>(instructions, x.data() + offset, size, scale, out.data() + offset);
        for (std::size_t i = 0; i < size; ++i) REQUIRE(out[offset + i] == detail::code_of<E4m3Codes>(x[offset + i] / scale));
        REQUIRE(std::count(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(offset), 0xAA) == static_cast<std::ptrdiff_t>(offset));
        REQUIRE(std::count(out.end() - 40, out.end(), 0xAA) == 40);
        for (std::size_t at = 0; at < size;) {
          std::size_t const part = std::min<std::size_t>(size - at, 1 + engine() % 20);
          detail::codes_by<E4m3Codes>(instructions, x.data() + offset + at, part, scale, cut.data() + at);
          at += part;
        }
        REQUIRE(std::equal(cut.begin(), cut.end(), out.begin() + static_cast<std::ptrdiff_t>(offset)));
        detail::codes_by<E5m2Codes>(instructions, x.data() + offset, size, scale, cut.data());
        for (std::size_t i = 0; i < size; ++i) REQUIRE(cut[i] == detail::code_of<E5m2Codes>(x[offset + i] / scale));
        detail::codes_by<E2m1Codes>(instructions, x.data() + offset, size, scale, cut.data());
        for (std::size_t i = 0; i < size; ++i) REQUIRE(cut[i] == detail::code_of<E2m1Codes>(x[offset + i] / scale));
        std::vector<std::int8_t> whole(offset + size + 40, 0x55);
        detail::integers_by(instructions, x.data() + offset, size, scale, -128, 127, whole.data() + offset);
        for (std::size_t i = 0; i < size; ++i) REQUIRE(whole[offset + i] == detail::integer_of(x[offset + i] / scale, -128, 127));
        REQUIRE(std::count(whole.end() - 40, whole.end(), 0x55) == 40);

        float largest = 0;
        for (std::size_t i = 0; i < size; ++i) largest = std::max(largest, std::abs(x[offset + i]));
        REQUIRE(detail::largest_magnitude_by(instructions, x.data() + offset, size, 0) == std::bit_cast<std::uint32_t>(largest));
      }
      // The public ones.
      std::vector<std::uint8_t> best(size), by(size);
      quantize::to_e4m3(x.data() + offset, size, scale, best.data());
      CHECK(best == codes<E4m3Codes>({x.begin() + static_cast<std::ptrdiff_t>(offset), x.end()}, scale));
      quantize::to_e5m2(x.data() + offset, size, scale, best.data());
      CHECK(best == codes<E5m2Codes>({x.begin() + static_cast<std::ptrdiff_t>(offset), x.end()}, scale));
      quantize::to_e2m1(x.data() + offset, size, scale, best.data());
      CHECK(best == codes<E2m1Codes>({x.begin() + static_cast<std::ptrdiff_t>(offset), x.end()}, scale));
      std::vector<std::int8_t> eight(size);
      quantize::to_int(x.data() + offset, size, scale, -8, 7, eight.data());
      CHECK(eight == integers({x.begin() + static_cast<std::ptrdiff_t>(offset), x.end()}, scale, 4));
    }
}

#if DCP_X86_KERNELS
TEST_CASE("scales and codes are the same in a program that rounds up and flushes subnormal numbers to zero, and its settings stay") {
  auto const seed = test::first_seed();
  CAPTURE(seed);
  std::mt19937_64 engine{seed};
  for (int round = 0; round < 300; ++round) {
    auto const x = any_block(engine, 70);
    auto const all = [&] {
      std::vector<std::vector<std::uint8_t>> result;
      float largest = 0;
      quantize::absolute_maximum(x.data(), x.size(), largest);
      float const tensor = quantize::nvfp4_tensor_scale(largest);
      std::uint8_t const block = quantize::nvfp4_block_scale(largest, tensor);
      for (float const scale : {quantize::e4m3_scale(largest), quantize::e4m3_scale_power_of_two(largest), quantize::int_scale(largest, 8), tensor, quantize::nvfp4_step(block, tensor),
                                static_cast<float>(f8_e8m0::from_bits(quantize::e2m1_scale_code(largest)))})
        for (auto const instructions : all_instructions()) {
          auto const bits = std::bit_cast<std::array<std::uint8_t, 4>>(scale);
          result.emplace_back(bits.begin(), bits.end());
          result.emplace_back(x.size());
          detail::codes_by<E4m3Codes>(instructions, x.data(), x.size(), scale, result.back().data());
          result.emplace_back(x.size());
          detail::codes_by<E2m1Codes>(instructions, x.data(), x.size(), scale, result.back().data());
          result.emplace_back(x.size());
          detail::integers_by(instructions, x.data(), x.size(), scale, -128, 127, reinterpret_cast<std::int8_t*>(result.back().data()));
        }
      result.push_back({block});
      return result;
    };
    auto const usual = all();
    unsigned const before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(0x1F80u | 0x8040u | 0x4000u);   // flush results, read subnormal numbers as zero, round up
    auto const unusual = all();
    unsigned const after = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before);
    REQUIRE(usual == unusual);
    REQUIRE((after & ~0x3Fu) == (0x1F80u | 0x8040u | 0x4000u));
  }
}
#endif

TEST_CASE("absolute_maximum continues from what was so far, and tells NaN and infinity at every place") {
  float largest = 3;
  std::vector<float> const x{-2, 1, -0.0f};
  CHECK(quantize::absolute_maximum(x.data(), x.size(), largest));
  CHECK(largest == 3);
  CHECK(quantize::absolute_maximum(x.data(), 0, largest));
  CHECK(largest == 3);
  largest = 0;
  CHECK(quantize::absolute_maximum(x.data(), x.size(), largest));
  CHECK(largest == 2);
  largest = 0;
  std::vector<float> const denormal{0, -smallest_float};
  CHECK(quantize::absolute_maximum(denormal.data(), 2, largest));
  CHECK(largest == smallest_float);
  for (std::size_t size = 1; size <= 70; ++size)
    for (std::size_t i = 0; i < size; ++i)
      for (float const bad : {infinity, -infinity, not_a_number, float_of(0xFF800001u), float_of(0x7F800001u)}) {
        std::vector<float> y(size, -largest_float);
        float so_far = 0;
        REQUIRE(quantize::absolute_maximum(y.data(), size, so_far));
        REQUIRE(so_far == largest_float);
        y[i] = bad;
        for (auto const instructions : all_instructions()) REQUIRE(detail::largest_magnitude_by(instructions, y.data(), size, 0) >= 0x7F800000u);
        REQUIRE_FALSE(quantize::absolute_maximum(y.data(), size, so_far));
      }
}

TEST_CASE("scales of zero, of the smallest, and of the largest numbers") {
  CHECK(quantize::e4m3_scale(0) == 1);
  CHECK(quantize::e4m3_scale_power_of_two(0) == 1);
  CHECK(quantize::e2m1_scale_code(0) == 0);
  CHECK(quantize::mxfp8_scale_code(0) == 0);
  CHECK(quantize::nvfp4_tensor_scale(0) == 1);
  CHECK(quantize::nvfp4_block_scale(0, 1) == 0x38);
  CHECK(quantize::int_scale(0, 8) == 1);
  for (float const tiny : {smallest_float, 0x1p-140f, 0x1p-126f, 0x1p-120f}) {
    CHECK(quantize::e4m3_scale(tiny) == 0x1p-126f);
    CHECK(quantize::e4m3_scale_power_of_two(tiny) == 0x1p-126f);
    CHECK(quantize::mxfp8_scale_code(tiny) == 0);
    CHECK(quantize::nvfp4_tensor_scale(tiny) == 0x1p-126f);
    CHECK(quantize::nvfp4_block_scale(tiny, 1) == 1);
    CHECK(quantize::int_scale(tiny, 8) == 0x1p-126f);
  }
  CHECK(quantize::e2m1_scale_code(smallest_float) == 0);
  CHECK(quantize::e2m1_scale_code(next_down(0x1.cp-125f)) == 0);
  CHECK(quantize::e2m1_scale_code(0x1.cp-125f) == 1);
  for (std::uint32_t below = 0; below < 200; ++below) {   // roundings change a product by less than four last bits
    float const huge = float_of(0x7F7FFFFFu - below);
    CAPTURE(huge);
    float const scale = quantize::e4m3_scale(huge), tensor = quantize::nvfp4_tensor_scale(huge);
    CHECK(std::isfinite(scale * 448.0f));
    CHECK(scale * 448.0f >= next_down(huge));
    CHECK(scale * 448.0f <= next_up(huge));
    CHECK(quantize::e4m3_scale_power_of_two(huge) == 0x1p119f);
    CHECK(quantize::e2m1_scale_code(huge) == 252);
    CHECK(quantize::mxfp8_scale_code(huge) == 246);
    CHECK(quantize::nvfp4_block_scale(huge, tensor) == 0x7E);
    CHECK(std::isfinite(6.0f * 448.0f * tensor));
    CHECK(std::isfinite(448.0f * tensor * 6.0f));
    CHECK(std::isfinite(6.0f * 448.0f / (1.0f / tensor)));
    for (int bits = 2; bits <= 8; ++bits) CHECK(std::isfinite(quantize::int_scale(huge, bits) * static_cast<float>(1 << (bits - 1))));
  }
}

TEST_CASE("scales are the quotients that their rules say, and powers of two the ones next to powers of two") {
  auto const seed = test::first_seed();
  CAPTURE(seed);
  std::mt19937_64 engine{seed};
  for (int i = 0; i < 20'000; ++i) {
    float const amax = float_of(0x10000000u + static_cast<std::uint32_t>(engine() % 0x60000000u));
    CAPTURE(amax);
    REQUIRE(quantize::e4m3_scale(amax) == amax / 448.0f);
    REQUIRE(quantize::nvfp4_tensor_scale(amax) == amax / 2688.0f);
    REQUIRE(quantize::int_scale(amax, 8) == amax / 127.5f);
    REQUIRE(quantize::int_scale(amax, 4) == amax / 7.5f);
  }
  for (int e = -100; e <= 120; ++e)
    for (float const significand : {1.0f, next_up(1.0f), 1.25f, 1.5f, next_down(1.75f), 1.75f, next_up(1.75f), next_down(2.0f)}) {
      float const amax = std::ldexp(significand, e);
      CAPTURE(amax);
      int smallest = -140;   // the least power that lets nothing saturate
      while (std::ldexp(448.0, smallest) < double{amax}) ++smallest;
      CHECK(quantize::e4m3_scale_power_of_two(amax) == std::ldexp(1.0f, smallest));
      CHECK(int{quantize::mxfp8_scale_code(amax)} == smallest + 127 + (significand == 1.75f ? 1 : 0));
      CHECK(int{quantize::e2m1_scale_code(amax)} == e - 2 + 127 + (significand >= 1.75f ? 1 : 0));
    }
}

TEST_CASE("scales rounded up to bfloat16 and to half are the smallest that are not below") {
  auto const seed = test::first_seed();
  CAPTURE(seed);
  std::mt19937_64 engine{seed};
  for (int i = 0; i < 50'000; ++i) {
    float const scale = float_of(1 + static_cast<std::uint32_t>(engine() % 0x7F000000u));
    CAPTURE(scale);
    float const as_bf16 = quantize::rounded_up_to_bf16(scale), as_f16 = quantize::rounded_to_f16_up(scale);
    auto const bits = bf16{as_bf16}.bits();
    REQUIRE(static_cast<float>(bf16{as_bf16}) == as_bf16);
    REQUIRE(as_bf16 >= scale);
    REQUIRE((bits == 0 || static_cast<float>(bf16::from_bits(static_cast<std::uint16_t>(bits - 1))) < scale));
    REQUIRE(std::isinf(as_f16) == (scale > 65504.0f));
    REQUIRE(as_f16 >= scale);
    auto const half = f16{as_f16}.bits();
    REQUIRE(static_cast<float>(f16::from_bits(half)) == as_f16);
    REQUIRE(static_cast<float>(f16::from_bits(static_cast<std::uint16_t>(half - 1))) < scale);
  }
  CHECK(quantize::rounded_to_f16_up(smallest_float) == 0x1p-24f);
  CHECK(quantize::rounded_to_f16_up(65504.0f) == 65504.0f);
  CHECK(std::isinf(quantize::rounded_to_f16_up(next_up(65504.0f))));
  static_assert(quantize::rounded_up_to_bf16(1.0f) == 1.0f && quantize::rounded_up_to_bf16(0x1.000002p0f) == 0x1.02p0f);
}

TEST_CASE("law: FP8 by block is within its bound, and quantizing what was read gives the same codes") {
  many_blocks([](std::vector<float> const& x, std::mt19937_64&) {
    float const amax = amax_of(x), scale = quantize::e4m3_scale(amax);
    auto const stored = codes<E4m3Codes>(x, scale);
    auto const read = multiplied(stored, e4m3, scale);
    check_block(x, read, [&](double a) { return std::max(a / 16, double{scale} * 0x1p-10); });
    if (amax >= 0x1.cp-118f) check_block(x, read, [&](double) { return double{amax} / 28; });
    REQUIRE(codes<E4m3Codes>(read, quantize::e4m3_scale(amax_of(read))) == stored);

    float const rounded = quantize::rounded_up_to_bf16(scale);
    if (amax < 0x1p127f) check_block(x, multiplied(codes<E4m3Codes>(x, rounded), e4m3, rounded), [&](double a) { return std::max(a / 16, double{rounded} * 0x1p-10); });
  });
}

TEST_CASE("law: FP8 with powers of two is within its bound, and quantizing what was read gives the same numbers") {
  many_blocks([](std::vector<float> const& x, std::mt19937_64&) {
    float const amax = amax_of(x), scale = quantize::e4m3_scale_power_of_two(amax);
    auto const read = multiplied(codes<E4m3Codes>(x, scale), e4m3, scale);
    check_block(x, read, [&](double a) { return std::max({a / 16, double{scale} * 0x1p-10, amax > 0x1.cp127f ? double{amax} / 8 : 0.0}); });
    if (amax >= 0x1.cp-118f) REQUIRE(scale < 2 * double{amax} / 448);
    float const again = quantize::e4m3_scale_power_of_two(amax_of(read));
    REQUIRE(multiplied(codes<E4m3Codes>(read, again), e4m3, again) == read);
  });
}

TEST_CASE("law: MXFP8 is within its bound") {
  many_blocks([](std::vector<float> const& x, std::mt19937_64&) {
    float const amax = amax_of(x), scale = static_cast<float>(f8_e8m0::from_bits(quantize::mxfp8_scale_code(amax)));
    check_block(x, multiplied(codes<E4m3Codes>(x, scale), e4m3, scale),
                [&](double a) { return std::max({a / 16, double{scale} * 0x1p-10, amax >= 0x1.cp127f ? double{amax} / 8 : 0.0}); });
  });
}

TEST_CASE("law: E5M2 is within its bound") {
  many_blocks([](std::vector<float> const& x, std::mt19937_64&) {
    float const amax = amax_of(x), scale = detail::ratio_scale(amax, 57344.0f);
    check_block(x, multiplied(codes<E5m2Codes>(x, scale), e5m2, scale), [&](double a) { return std::max(a / 8, double{scale} * 0x1p-17); });
  });
}

TEST_CASE("law: MXFP4 is within its bounds, and quantizing what was read gives the same codes") {
  many_blocks([](std::vector<float> const& x, std::mt19937_64&) {
    float const amax = amax_of(x), scale = static_cast<float>(f8_e8m0::from_bits(quantize::e2m1_scale_code(amax)));
    auto const stored = codes<E2m1Codes>(x, scale);
    auto const read = multiplied(stored, e2m1, scale);
    double const X = double{scale};
    check_block(x, read, [&](double) { return amax >= 0x1.cp127f ? double{amax} / 4 : amax < 0x1p-125f ? std::max(double{amax} / 5, X / 4) : double{amax} / 5; });
    check_block(x, read, [&](double a) { return a <= 2 * X ? X / 4 : a <= 4 * X ? X / 2 : a <= 6 * X ? X : a - 6 * X; });
    auto const again = static_cast<float>(f8_e8m0::from_bits(quantize::e2m1_scale_code(amax_of(read))));
    REQUIRE(multiplied(codes<E2m1Codes>(read, again), e2m1, again) == read);
  });
}

TEST_CASE("law: NVFP4 is within its bounds, with the scale of a tensor that may be far larger than the block") {
  many_blocks([](std::vector<float> const& x, std::mt19937_64& engine) {
    float const amax = amax_of(x);
    double const larger = std::ldexp(double{amax}, static_cast<int>(engine() % 24));
    float const tensor_scale = quantize::nvfp4_tensor_scale(engine() % 2 == 0 || larger > 1e38 ? amax : static_cast<float>(larger));
    std::uint8_t const stored = quantize::nvfp4_block_scale(amax, tensor_scale);
    REQUIRE(stored >= 1);
    REQUIRE(stored <= 0x7E);
    float const step = quantize::nvfp4_step(stored, tensor_scale);
    REQUIRE(step > 0);
    auto const elements = codes<E2m1Codes>(x, step);
    auto const bound = [&](double) { return stored >= 8 ? 0.2 * double{amax} : stored > 1 ? 0.34 * double{amax} : std::max(0.34 * double{amax}, double{step} / 4); };
    check_block(x, multiplied(elements, e2m1, step), bound);
    auto read = multiplied(elements, e2m1, static_cast<float>(e4m3.value(stored)));   // a reader may multiply in this order
    for (auto& v : read) v *= tensor_scale;
    check_block(x, read, bound);
  });
}

TEST_CASE("law: symmetric integers are within half a scale, also with scales rounded up to bfloat16 and half") {
  many_blocks([](std::vector<float> const& x, std::mt19937_64& engine) {
    int const bits = static_cast<int>(2 + engine() % 7);
    float const amax = amax_of(x), scale = quantize::int_scale(amax, bits);
    bool const clamps = double{amax} > double{largest_float} * (1 - std::ldexp(1.0, -bits));
    auto const check = [&](float by) {
      std::vector<float> read;
      for (auto const q : integers(x, by, bits)) read.push_back(static_cast<float>(q) * by);
      check_block(x, read, [&](double) { return double{by} * (clamps ? 1.0 : 0.5 + 0x1p-16); });   // quotients next to a middle are rounded themselves
    };
    check(scale);
    if (amax < 0x1p126f) check(quantize::rounded_up_to_bf16(scale));
    if (float const half = quantize::rounded_to_f16_up(scale); !std::isinf(half)) check(half);
  });
}

TEST_CASE("representable blocks come back bit by bit") {
  for (int k : {-90, -20, 0, 3, 80}) {
    std::vector<float> four, eight;
    for (unsigned n = 0; n < 16; ++n) four.push_back(static_cast<float>(std::ldexp(e2m1.value(n), k)));
    for (unsigned n = 0; n < 256; ++n)
      if ((n & 0x7F) != 0x7F) eight.push_back(static_cast<float>(std::ldexp(e4m3.value(n), k)));
    auto const X = static_cast<float>(f8_e8m0::from_bits(quantize::e2m1_scale_code(amax_of(four))));
    CHECK(multiplied(codes<E2m1Codes>(four, X), e2m1, X) == four);
    float const scale = quantize::e4m3_scale(amax_of(eight));
    CHECK(scale == std::ldexp(1.0f, k));
    CHECK(multiplied(codes<E4m3Codes>(eight, scale), e4m3, scale) == eight);
    CHECK(quantize::e4m3_scale_power_of_two(amax_of(eight)) == scale);
  }
}

TEST_CASE("pack_nibbles puts the even element into the low bits, for every number of pairs, also in place") {
  std::mt19937_64 engine{1};
  for (std::size_t pairs = 0; pairs < 40; ++pairs) {
    std::vector<std::uint8_t> codes(2 * pairs), packed(pairs + 8, 0xEE);
    for (auto& c : codes) c = static_cast<std::uint8_t>(engine() % 16);
    quantize::pack_nibbles(codes.data(), pairs, packed.data());
    for (std::size_t i = 0; i < pairs; ++i) REQUIRE(packed[i] == codes[2 * i] + 16 * codes[2 * i + 1]);
    REQUIRE(std::count(packed.end() - 8, packed.end(), 0xEE) == 8);
    quantize::pack_nibbles(codes.data(), pairs, codes.data());
    REQUIRE(std::equal(codes.begin(), codes.begin() + static_cast<std::ptrdiff_t>(pairs), packed.begin()));
  }
}

TEST_CASE("MXFP4: a block with all codes is stored as published") {
  std::vector<float> x{0, 1, 2, 3, 4, 6, 8, 12, -0.0f, -1, -2, -3, -4, -6, -8, -12};
  x.resize(32, 0.0f);
  std::uint8_t const scale = quantize::e2m1_scale_code(amax_of(x));
  CHECK(int{scale} == 0x80);
  auto elements = codes<E2m1Codes>(x, static_cast<float>(f8_e8m0::from_bits(scale)));
  std::vector<std::uint8_t> packed(16);
  quantize::pack_nibbles(elements.data(), 16, packed.data());
  CHECK(packed == std::vector<std::uint8_t>{0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe, 0, 0, 0, 0, 0, 0, 0, 0});
}

TEST_CASE("NVFP4: a tensor of 5.25 and a block of 1.125") {
  float const tensor_scale = quantize::nvfp4_tensor_scale(5.25f);
  CHECK(tensor_scale == 0.001953125f);
  std::uint8_t const scale = quantize::nvfp4_block_scale(1.125f, tensor_scale);
  CHECK(int{scale} == 0x6C);
  float const step = quantize::nvfp4_step(scale, tensor_scale);
  CHECK(step == 0.1875f);
  auto const elements = codes<E2m1Codes>({1.125f, -0.3f, 0.28125f, 0.234375f}, step);
  CHECK(elements == std::vector<std::uint8_t>{7, 0xB, 3, 2});
  std::vector<std::uint8_t> packed(2);
  quantize::pack_nibbles(elements.data(), 2, packed.data());
  CHECK(packed == std::vector<std::uint8_t>{0xB7, 0x23});
  CHECK(multiplied(elements, e2m1, step) == std::vector<float>{1.125f, -0.28125f, 0.28125f, 0.1875f});
}

TEST_CASE("INT8: a channel of 1") {
  std::vector<float> const x{0.5f, -1.0f, 0.25f};
  float const scale = quantize::int_scale(amax_of(x), 8);
  CHECK(scale == 1.0f / 127.5f);
  CHECK(integers(x, scale, 8) == std::vector<std::int8_t>{64, -127, 32});
}

TEST_CASE("INT4: eight values and their word") {
  std::vector<float> const x{-4, -3.5f, -0.5f, 0, 0.5f, 1, 3, 3.5f};
  auto const elements = integers(x, 0.5f, 4);
  CHECK(elements == std::vector<std::int8_t>{-8, -7, -1, 0, 1, 2, 6, 7});
  std::vector<std::uint8_t> unsigned_elements, packed(4);
  for (auto const q : elements) unsigned_elements.push_back(static_cast<std::uint8_t>(q + 8));
  quantize::pack_nibbles(unsigned_elements.data(), 4, packed.data());
  CHECK(packed == std::vector<std::uint8_t>{0x10, 0x87, 0xa9, 0xfe});
}
