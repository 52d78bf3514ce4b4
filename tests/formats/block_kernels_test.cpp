// SPDX-License-Identifier: Apache-2.0
// The inner loops of decoding against the formats' specifications, and against each other.
#include <dcp/formats/block_codecs.hpp>
#include <dcp/formats/block_kernels.hpp>

#include "support/exact_floats.hpp"
#include "support/generate.hpp"

#include <doctest/doctest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

using namespace dcp;
using namespace dcp::detail;
namespace exact = dcp::test::exact;
using exact::same;

namespace {

/// The sets of instructions that this processor has.
std::vector<Instructions> all_instructions() {
  std::vector<Instructions> all{Instructions::portable};
  if (best_instructions() != Instructions::portable) all.push_back(best_instructions());
  return all;
}

float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

/// Every byte once.
Bytes all_bytes() {
  Bytes bytes(256);
  for (std::size_t i = 0; i < 256; ++i) bytes[i] = static_cast<std::byte>(i);
  return bytes;
}

/// Scales from the smallest subnormal float to the largest number, both signs, and some without round bits.
std::vector<float> some_scales(test::Random& random) {
  std::vector<float> scales{1.0f, -1.0f, 0.5f, 1.0f / 448, 0x1p-126f, 0x1p-127f, 0x1p-149f, 0x1.fffffep127f, 0x1p127f, 0x1.8p-140f, 3.0f};
  for (int i = 0; i < 60; ++i) {
    float const scale = float_of(static_cast<std::uint32_t>(random.between(0, 0xFFFFFFFFll)));
    if (std::isfinite(scale) && scale != 0) scales.push_back(scale);
  }
  return scales;
}

/// Half floats and bfloat16 numbers of every code, as bytes.
Bytes all_halves() {
  Bytes bytes(2 * 65536);
  for (std::uint32_t i = 0; i < 65536; ++i) {
    auto const code = static_cast<std::uint16_t>(i);
    std::memcpy(bytes.data() + 2 * i, &code, 2);
  }
  return bytes;
}
std::uint32_t half_at(Bytes const& bytes, std::size_t i) {
  std::uint16_t code;
  std::memcpy(&code, bytes.data() + 2 * i, 2);
  return code;
}

/// Every number of a format with 16 bits, the middle of it and the next one, and what is nearest to those on both sides; NaNs of many kinds.
std::vector<float> edges(exact::Format const& format) {
  std::vector<float> edges;
  auto const add = [&](double value) {
    for (float const x : {static_cast<float>(value), std::nextafterf(static_cast<float>(value), INFINITY), std::nextafterf(static_cast<float>(value), -INFINITY)}) edges.push_back(x), edges.push_back(-x);
  };
  std::uint32_t const infinity = ((1u << format.exponent) - 1) << format.mantissa;
  for (std::uint32_t code = 0; code < infinity; ++code) {
    double const here = exact::value_of(format, code);
    // Beyond the largest number the next one is where infinity would be, if it were a number.
    double const next = code + 1 < infinity ? exact::value_of(format, code + 1) : 2 * here - exact::value_of(format, code - 1);
    add(here), add((here + next) / 2);
  }
  for (std::uint32_t const nan : {0x7F800001u, 0x7F80FFFFu, 0x7FBFFFFFu, 0x7FC00000u, 0x7FC0DEADu, 0x7FFFFFFFu}) edges.push_back(float_of(nan)), edges.push_back(float_of(nan | 0x80000000u));
  for (float const x : {INFINITY, -INFINITY, std::numeric_limits<float>::max(), -std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min()}) edges.push_back(x);
  return edges;
}

}  // namespace

TEST_CASE("block_kernels: every code of E4M3 and E5M2 times any scale is the product of both, rounded once, with all instructions") {
  std::uint64_t const seed = test::first_seed();
  CAPTURE(seed);
  test::Random random{seed};
  Bytes const codes = all_bytes();
  for (auto const instructions : all_instructions())
    for (float const scale : some_scales(random)) {
      BlockKernels const& kernels = kernels_of(instructions);
      std::array<float, 256> four{}, five{};
      kernels.e4m3(codes.data(), 256, scale, four.data());
      kernels.e5m2(codes.data(), 256, scale, five.data());
      std::array<float, 8> scales{};
      for (auto& other : scales) other = scale * static_cast<float>(random.between(1, 9));
      std::array<float, 256> groups{};
      kernels.e4m3_groups(codes.data(), 8, 32, scales.data(), groups.data());
      int wrong = 0;
      for (std::uint32_t c = 0; c < 256; ++c) {
        wrong += !same(groups[c], exact::value_of(exact::e4m3, c) * static_cast<double>(scales[c / 32]));
        wrong += !same(four[c], exact::value_of(exact::e4m3, c) * static_cast<double>(scale));
        wrong += !same(five[c], exact::value_of(exact::e5m2, c) * static_cast<double>(scale));
      }
      CAPTURE(scale);
      CHECK(wrong == 0);
    }
}

TEST_CASE("block_kernels: every signed and unsigned byte less any zero point times any scale is rounded once, with all instructions") {
  std::uint64_t const seed = test::first_seed();
  CAPTURE(seed);
  test::Random random{seed};
  Bytes const codes = all_bytes();
  for (auto const instructions : all_instructions())
    for (float const scale : some_scales(random)) {
      BlockKernels const& kernels = kernels_of(instructions);
      auto const zero = static_cast<float>(random.between(-128, 255));
      std::array<float, 256> with_sign{}, without{};
      kernels.i8(codes.data(), 256, zero, scale, with_sign.data());
      kernels.u8(codes.data(), 256, zero, scale, without.data());
      int wrong = 0;
      for (int c = 0; c < 256; ++c) {
        auto const at = static_cast<std::size_t>(c);
        wrong += !same(with_sign[at], (static_cast<double>(c < 128 ? c : c - 256) - static_cast<double>(zero)) * static_cast<double>(scale));
        wrong += !same(without[at], (static_cast<double>(c) - static_cast<double>(zero)) * static_cast<double>(scale));
      }
      CAPTURE(scale);
      CAPTURE(zero);
      CHECK(wrong == 0);
    }
}

TEST_CASE("block_kernels: every E2M1 code with every power of two, E4M3 scale, and float is what the formulas of MXFP4 and NVFP4 say, with all instructions") {
  std::uint64_t const seed = test::first_seed();
  CAPTURE(seed);
  test::Random random{seed};
  for (std::uint32_t c = 0; c < 16; ++c) CHECK(same(e2m1_values[c], exact::value_of(exact::e2m1, c)));
  Bytes codes;   // of a group: all pairs of codes
  for (int group = 0; group < 256; ++group) append(codes, all_bytes());
  std::vector<float> powers, small;
  for (std::uint32_t s = 0; s < 256; ++s) {
    powers.push_back(static_cast<float>(f8_e8m0::from_bits(static_cast<std::uint8_t>(s))));
    small.push_back(static_cast<float>(f8_e4m3::from_bits(static_cast<std::uint8_t>(s))));
    CHECK(same(powers.back(), exact::e8m0(s)));
    CHECK(same(small.back(), exact::value_of(exact::e4m3, s)));
  }
  std::vector<float> out(256 * 512);
  auto const check = [&](BlockKernels const& kernels, std::vector<float> const& scales, SecondScale second) {
    kernels.nibble_groups(codes.data(), 256, 256, e2m1_values.data(), scales.data(), second, out.data());
    int wrong = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      std::size_t const byte = i / 2 % 256;
      double const product = static_cast<float>(exact::value_of(exact::e2m1, static_cast<std::uint32_t>(i % 2 == 0 ? byte & 15 : byte >> 4)) * static_cast<double>(scales[i / 512]));
      double const other = second.value;
      wrong += !same(out[i], second.kind == SecondScale::Kind::none ? product : second.kind == SecondScale::Kind::multiply ? product * other : product / other);
    }
    CHECK(wrong == 0);
  };
  for (auto const instructions : all_instructions()) {
    BlockKernels const& kernels = kernels_of(instructions);
    check(kernels, powers, {});
    check(kernels, small, {});
    for (float const second : some_scales(random)) {
      CAPTURE(second);
      check(kernels, small, {SecondScale::Kind::multiply, second});
      check(kernels, small, {SecondScale::Kind::divide, second});
    }
    std::vector<float> any;
    for (std::size_t s = 0; s < 256; ++s) any.push_back(static_cast<float>(random.between(-1'000'000, 1'000'000)) * 0x1p-20f);
    check(kernels, any, {});
    check(kernels, any, {SecondScale::Kind::multiply, 1.1f});
    check(kernels, any, {SecondScale::Kind::divide, 1.1f});
  }
}

TEST_CASE("numbers_of: every scale in E8M0 and E4M3 is its number, and no scheme takes one that is not a finite number") {
  Bytes const codes = all_bytes();
  for (bool const e8m0 : {true, false}) {
    EncodedPart const part{"s", e8m0 ? DType::f8_e8m0 : DType::f8_e4m3, Extents{256}, PartGrid::flat(32)};
    auto const numbers = numbers_of(part, {codes.data(), Box::whole(Extents{256})});
    for (std::uint32_t s = 0; s < 256; ++s) {
      double const wanted = e8m0 ? exact::e8m0(s) : exact::value_of(exact::e4m3, s);
      CHECK(same(numbers[s], wanted));
      EncodedPart const one{"s", part.dtype, Extents{1}, PartGrid::flat(32)};
      PartBytes const bytes{codes.data() + s, Box::whole(Extents{1})};
      if (std::isnan(wanted)) CHECK_THROWS_WITH_AS(scales_of(one, bytes, {true, true}), doctest::Contains("NaN"), Error);
      else if (wanted == 0) CHECK_THROWS_AS(scales_of(one, bytes, {false, true}), Error);
      else if (wanted < 0) CHECK_THROWS_AS(scales_of(one, bytes, {true, false}), Error);
      else CHECK(same(scales_of(one, bytes, {})[0], wanted));
    }
  }
}

TEST_CASE("block_kernels: all kernels give equal bits with all instructions, for any count and alignment, and touch nothing behind") {
  std::uint64_t const seed = test::first_seed();
  CAPTURE(seed);
  test::Random random{seed};
  constexpr std::size_t most = 70;
  constexpr float untouched = 12345.0f;
  std::array<float, 16> table{};
  for (auto& entry : table) entry = static_cast<float>(random.between(-1000, 1000));
  std::vector<float> scales(most);
  for (auto& scale : scales) scale = static_cast<float>(random.between(1, 1000)) * 0x1p-7f;
  float const zero = static_cast<float>(random.between(-8, 8));
  // Each decodes `count` codes from memory that ends with the last of them.
  using Decode = void (*)(BlockKernels const&, std::byte const*, std::size_t, float const*, float const*, float, float*);
  struct Case {
    std::string name;
    std::size_t bytes, floats;   // of a code
    Decode decode;
  };
  std::array<Case, 16> const cases{{
      {"e4m3", 1, 1, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const*, float const* s, float, float* out) { k.e4m3(in, n, s[0], out); }},
      {"e5m2", 1, 1, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const*, float const* s, float, float* out) { k.e5m2(in, n, s[0], out); }},
      {"E4M3 in groups of 32", 32, 32, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const*, float const* s, float, float* out) { k.e4m3_groups(in, n, 32, s, out); }},
      {"E4M3 in groups of 19", 19, 19, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const*, float const* s, float, float* out) { k.e4m3_groups(in, n, 19, s, out); }},
      {"i8", 1, 1, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const*, float const* s, float z, float* out) { k.i8(in, n, z, s[0], out); }},
      {"u8", 1, 1, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const*, float const* s, float z, float* out) { k.u8(in, n, z, s[0], out); }},
      {"nibbles", 1, 2, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const* t, float const*, float, float* out) { k.nibbles(in, n, t, out); }},
      {"nibbles, high first", 1, 2, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const* t, float const*, float, float* out) { k.nibbles_high_first(in, n, t, out); }},
      {"groups of 16 bytes", 16, 32, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const* t, float const* s, float, float* out) { k.nibble_groups(in, n, 16, t, s, {}, out); }},
      {"groups of 8 bytes, multiplied", 8, 16, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const* t, float const* s, float, float* out) { k.nibble_groups(in, n, 8, t, s, {SecondScale::Kind::multiply, 0.3f}, out); }},
      {"groups of 8 bytes, divided", 8, 16, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const* t, float const* s, float, float* out) { k.nibble_groups(in, n, 8, t, s, {SecondScale::Kind::divide, 0.3f}, out); }},
      {"groups of 3 bytes, multiplied", 3, 6, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const* t, float const* s, float, float* out) { k.nibble_groups(in, n, 3, t, s, {SecondScale::Kind::multiply, 0.3f}, out); }},
      {"groups of 7 bytes, divided", 7, 14, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const* t, float const* s, float, float* out) { k.nibble_groups(in, n, 7, t, s, {SecondScale::Kind::divide, 0.3f}, out); }},
      {"nibbles of words", 4, 1, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const*, float const* s, float z, float* out) {
         std::vector<std::uint32_t> words(n);
         if (n > 0) std::memcpy(words.data(), in, 4 * n);
         k.nibble_of_words(words.data(), n, static_cast<int>(n * 4 % 32), z, s[0], out);
         for (std::size_t i = 0; i < n; ++i) CHECK(out[i] == (static_cast<float>(words[i] >> (n * 4 % 32) & 15u) - z) * s[0]);
       }},
      {"from bfloat16", 2, 1, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const*, float const*, float, float* out) { k.from_bf16(in, n, out); }},
      {"from half", 2, 1, [](BlockKernels const& k, std::byte const* in, std::size_t n, float const*, float const*, float, float* out) { k.from_f16(in, n, out); }},
  }};
  for (auto const& one : cases)
    for (std::size_t count = 0; count <= most; ++count)
      for (std::size_t shift = 0; shift < 32; ++shift) {
        Bytes const codes = random.bytes(shift + count * one.bytes);
        std::size_t const place = (shift * 5 + count) % 8;   // of the floats
        std::vector<float> wanted;
        bool right = true;
        for (auto const instructions : all_instructions()) {
          std::vector<float> out(place + count * one.floats + 1, untouched);
          one.decode(kernels_of(instructions), codes.data() + shift, count, table.data(), scales.data(), zero, out.data() + place);
          for (std::size_t i = 0; i < place; ++i) right = right && out[i] == untouched;
          right = right && out.back() == untouched;
          if (wanted.empty()) wanted = std::move(out);
          else right = right && std::memcmp(out.data(), wanted.data(), 4 * out.size()) == 0;
        }
        if (!right) FAIL(one.name << ", " << count << " codes, " << shift << " bytes from an alignment");
      }
  // Back: floats of all kinds to memory of any alignment.
  for (bool const to_bf16 : {true, false})
    for (std::size_t count = 0; count <= most; ++count)
      for (std::size_t shift = 0; shift < 32; ++shift) {
        std::size_t const place = shift % 8;
        std::vector<float> in(place + count);
        for (auto& value : in) value = random.one_in(2) ? float_of(static_cast<std::uint32_t>(random.between(0, 0xFFFFFFFFll))) : std::ldexp(static_cast<float>(random.between(-9000, 9000)), static_cast<int>(random.between(-40, 8)));
        Bytes wanted;
        bool right = true;
        for (auto const instructions : all_instructions()) {
          BlockKernels const& kernels = kernels_of(instructions);
          Bytes out(shift + 2 * count + 1, std::byte{0x5A});
          (to_bf16 ? kernels.to_bf16 : kernels.to_f16)(in.data() + place, count, out.data() + shift);
          for (std::size_t i = 0; i < shift; ++i) right = right && out[i] == std::byte{0x5A};
          right = right && out.back() == std::byte{0x5A};
          if (wanted.empty()) wanted = std::move(out);
          else right = right && out == wanted;
        }
        if (!right) FAIL(std::string{to_bf16 ? "to bfloat16, " : "to half, "} << count << " floats, " << shift << " bytes from an alignment");
      }
}

TEST_CASE("to_bf16, to_f16: every number, every middle of two and their neighbours are rounded to nearest, ties to even, with all instructions") {
  for (auto const instructions : all_instructions())
    for (bool const bfloat : {true, false}) {
      exact::Format const& format = bfloat ? exact::bfloat : exact::half;
      for (auto const& other : {exact::bfloat, exact::half}) {   // each also for the numbers of the other
        std::vector<float> const in = edges(other);
        Bytes out(2 * in.size());
        (bfloat ? kernels_of(instructions).to_bf16 : kernels_of(instructions).to_f16)(in.data(), in.size(), out.data());
        std::int64_t wrong = 0;
        for (std::size_t i = 0; i < in.size(); ++i) {
          std::uint32_t const code = half_at(out, i);
          wrong += std::isnan(in[i]) ? !std::isnan(exact::value_of(format, code)) || (code >> 15 != 0) != std::signbit(in[i]) : code != exact::code_of(format, static_cast<double>(in[i]));
        }
        CHECK(wrong == 0);
      }
    }
}

TEST_CASE("to_bf16, to_f16: a NaN stays a NaN and keeps its sign, and bits are equal with all instructions") {
  std::vector<float> in;
  for (std::uint32_t bits = 0x7F800001u; bits < 0x80000000u; bits += 0x1FFFu) in.push_back(float_of(bits)), in.push_back(float_of(bits | 0x80000000u));
  for (bool const bfloat : {true, false}) {
    Bytes wanted;
    for (auto const instructions : all_instructions()) {
      Bytes out(2 * in.size());
      (bfloat ? kernels_of(instructions).to_bf16 : kernels_of(instructions).to_f16)(in.data(), in.size(), out.data());
      for (std::size_t i = 0; i < in.size(); ++i) CHECK(std::isnan(exact::value_of(bfloat ? exact::bfloat : exact::half, half_at(out, i))));
      if (wanted.empty()) wanted = std::move(out);
      else CHECK(std::equal(out.begin(), out.end(), wanted.begin(), wanted.end()));
    }
  }
}

TEST_CASE("from_bf16, from_f16: all 65,536 codes are their numbers, with all instructions") {
  Bytes const codes = all_halves();
  std::array<std::vector<float>, 2> first;
  for (auto const instructions : all_instructions())
    for (bool const bfloat : {true, false}) {
      std::vector<float> out(65536);
      (bfloat ? kernels_of(instructions).from_bf16 : kernels_of(instructions).from_f16)(codes.data(), out.size(), out.data());
      int wrong = 0;
      for (std::uint32_t c = 0; c < 65536; ++c) wrong += !same(out[c], exact::value_of(bfloat ? exact::bfloat : exact::half, c));
      CHECK(wrong == 0);
      auto& wanted = first[bfloat ? 0 : 1];
      if (wanted.empty()) wanted = out;
      CHECK(std::memcmp(out.data(), wanted.data(), 4 * out.size()) == 0);
    }
}

#if DCP_X86_KERNELS
TEST_CASE("decode: a processor that flushes subnormal numbers to zero, takes them for zero and rounds elsewhere gives the same bits, and stays as it is") {
  // Values below the smallest normal float, and ties of halves.
  Bytes const codes = all_bytes();
  struct Subject {
    Codes kind;
    EncodedPart codes, scales;
    Extents shape;
    Bytes scale_bytes;
  };
  auto const float_bytes = [](std::vector<float> const& values) {
    auto const bytes = std::as_bytes(std::span{values});
    return Bytes(bytes.begin(), bytes.end());
  };
  auto const rows = [](std::int64_t last) { return PartGrid::along({PartAxis{0, 1}, PartAxis{1, last}}); };
  Extents const plain{2, 128}, two{2, 256};
  std::vector<Subject> const subjects{
      {Codes::floats, {"w", DType::f8_e4m3, plain, rows(1)}, {"s", DType::f32, Extents{2, 1}, rows(128)}, plain, float_bytes({0x1.8p-130f, 0x1.1p-124f})},
      {Codes::floats, {"w", DType::f8_e5m2, plain, rows(1)}, {"s", DType::f32, Extents{2, 1}, rows(128)}, plain, float_bytes({0x1.3p-120f, 0x1.234566p-30f})},
      {Codes::i8, {"w", DType::i8, plain, rows(1)}, {"s", DType::f32, Extents{2, 1}, rows(128)}, plain, float_bytes({0x1.8p-145f, 0x1.1p-11f})},
      {Codes::packed, {"w", DType::u8, plain, rows(2)}, {"s", DType::f32, Extents{2, 1}, rows(256)}, two, float_bytes({0x1.8p-147f, 0x1.1p-11f})},
      {Codes::e2m1, {"w", DType::u8, plain, rows(2)}, {"s", DType::f8_e8m0, Extents{2, 8}, rows(32)}, two, Bytes{std::byte{0}, std::byte{1}, std::byte{2}, std::byte{3}, std::byte{127}, std::byte{99}, std::byte{100}, std::byte{101}, std::byte{0}, std::byte{1}, std::byte{2}, std::byte{3}, std::byte{127}, std::byte{103}, std::byte{104}, std::byte{105}}},
  };
  unsigned const before = __builtin_ia32_stmxcsr();
  for (auto const& subject : subjects) {
    GroupSpec spec;
    spec.shape = subject.shape;
    spec.kind = subject.kind;
    spec.bits = subject.kind == Codes::packed ? 4 : 8;
    spec.codes = subject.codes;
    spec.scales = subject.scales;
    GroupEncoding<> const encoding{spec};
    std::array<PartBytes, 2> const given{{{codes.data(), Box::whole(subject.codes.shape)}, {subject.scale_bytes.data(), Box::whole(subject.scales.shape)}}};
    for (DType const dtype : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
      auto const decoded = [&](unsigned mode) {
        Bytes memory(static_cast<std::size_t>(subject.shape.elements()) * 8);
        __builtin_ia32_ldmxcsr(mode);
        encoding.decode(Box::whole(subject.shape), given, dtype, {memory.data(), row_major_strides(subject.shape)});
        unsigned const after = __builtin_ia32_stmxcsr();
        __builtin_ia32_ldmxcsr(before);
        CHECK((after & ~0x3Fu) == (mode & ~0x3Fu));
        return memory;
      };
      Bytes const wanted = decoded(before);
      for (unsigned const mode : {0x8000u, 0x0040u, 0x8040u, 0x8040u | 0x2000u, 0x4000u, 0x6000u}) CHECK(decoded(before | mode) == wanted);
    }
  }
}
#endif
