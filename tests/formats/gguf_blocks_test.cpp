// SPDX-License-Identifier: Apache-2.0
#include <dcp/formats/gguf_blocks.hpp>
#include <dcp/formats/safetensors_header.hpp>

#include "golden.hpp"
#include "support/generate.hpp"
#include "support/gguf_oracle.hpp"
#include "support/sha256.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <map>

using namespace dcp;
using namespace dcp::gguf;
using dcp::detail::Instructions;
using golden::outcome;
using Oracle = dcp::test::GgufOracle;

namespace {

std::vector<std::uint32_t> decodable() {
  std::vector<std::uint32_t> found;
  for (std::uint32_t type = 0; type < 50; ++type)
    if (can_decode(type)) found.push_back(type);
  return found;
}
std::int64_t elements_of(std::uint32_t type) { return type_facts(type)->elements; }
std::size_t bytes_of(std::uint32_t type) { return static_cast<std::size_t>(type_facts(type)->bytes); }

ConstByteSpan bytes_of(std::vector<float> const& values) { return std::as_bytes(std::span{values}); }

std::vector<float> decoded(std::uint32_t type, ConstByteSpan blocks, Instructions instructions = dcp::detail::best_instructions()) {
  std::int64_t const count = static_cast<std::int64_t>(blocks.size() / bytes_of(type));
  std::vector<float> out(static_cast<std::size_t>(count * elements_of(type)) + 1, 12345.0f);
  gguf::detail::decode_blocks_with(instructions, type, blocks.data(), count, out.data());
  CHECK(out.back() == 12345.0f);   // nothing is written behind the last element
  out.pop_back();
  return out;
}
Bytes encoded(std::uint32_t type, std::vector<float> const& values) {
  Bytes out(values.size() / 32 * bytes_of(type) + 1, std::byte{0x5A});
  encode_blocks(type, values.data(), static_cast<std::int64_t>(values.size() / 32), out.data());
  CHECK(out.back() == std::byte{0x5A});
  out.pop_back();
  return out;
}
std::string hex(ConstByteSpan bytes) { return hex_text(bytes); }
Bytes from_hex(std::string const& text) {
  Bytes out;
  std::string digits;
  for (char const c : text)
    if (c != ' ') digits += c;
  for (std::size_t i = 0; i < digits.size(); i += 2) out.push_back(static_cast<std::byte>(std::stoul(digits.substr(i, 2), nullptr, 16)));
  return out;
}

/// The bytes of a well-known generator, without the bit that halves need to be infinite or NaN.
Bytes tame_bytes(std::size_t size) {
  Bytes out(size);
  std::uint32_t state = 7;
  for (auto& byte : out) byte = static_cast<std::byte>((state = state * 1664525u + 1013904223u) >> 24 & 0xBFu);
  return out;
}

/// Blocks whose largest numbers go from 2^-15 to 2^14.
std::vector<float> tame_numbers() {
  std::vector<float> out;
  std::uint32_t state = 1;
  for (int block = 0; block < 64; ++block)
    for (int i = 0; i < 32; ++i) {
      state = state * 1664525u + 1013904223u;
      out.push_back(static_cast<float>(static_cast<std::int32_t>(state)) * std::ldexp(1.0f, -31 + block * 7 % 30 - 15));
    }
  return out;
}

std::vector<float> steps() {
  std::vector<float> out;
  for (int i = 0; i < 32; ++i) out.push_back(static_cast<float>(i - 16));
  return out;
}

/// Block bytes (37 k + 11) mod 256.
Bytes ramp(std::uint32_t type) {
  Bytes out(bytes_of(type));
  for (std::size_t k = 0; k < out.size(); ++k) out[k] = static_cast<std::byte>((37 * k + 11) & 255);
  return out;
}
void put(Bytes& block, std::size_t at, std::string const& hexadecimal) {
  Bytes const bytes = from_hex(hexadecimal);
  std::copy(bytes.begin(), bytes.end(), block.begin() + static_cast<std::ptrdiff_t>(at));
}

/// Some elements of a block of 256 K-quants, and what they are where d is 1 and dmin one half.
constexpr std::array places{0, 1, 15, 16, 31, 32, 33, 63, 64, 96, 127, 128, 129, 160, 191, 192, 224, 240, 255};
struct Known {
  std::uint32_t type;
  std::size_t d, least;   // where they lie; least: 0 for none
  std::array<float, places.size()> values;
  double sum;
};

}  // namespace

TEST_CASE("decode_blocks: every tensor of the golden files has the bits that gguf-py gave") {
  int tensors = 0;
  for (auto const& path : golden::files_below(golden::root() / "gguf", ".gguf")) {
    if (!std::filesystem::exists(path.parent_path() / "expected.safetensors")) continue;
    std::string const file = golden::text_of(path), expected = golden::text_of(path.parent_path() / "expected.safetensors");
    auto const n = static_cast<std::size_t>(safetensors::header_bytes(as_byte_span(expected).first(8), expected.size()));
    auto const wanted = safetensors::parse_header(as_byte_span(expected).subspan(8, n), expected.size());
    for (auto const& tensor : parse_header(as_byte_span(file)).tensors) {
      CAPTURE(path.string());
      CAPTURE(tensor.name);
      if (!can_decode(tensor.type)) continue;
      auto const found = std::find_if(wanted.tensors.begin(), wanted.tensors.end(), [&](auto const& one) { return one.name == tensor.name; });
      REQUIRE(found != wanted.tensors.end());
      CHECK(found->shape == tensor.shape);
      auto const blocks = as_byte_span(file).subspan(static_cast<std::size_t>(tensor.offset), static_cast<std::size_t>(tensor.bytes));
      auto const bits = std::string_view{expected}.substr(static_cast<std::size_t>(wanted.data_begin + found->begin), static_cast<std::size_t>(found->end - found->begin));
      CHECK(as_text(bytes_of(decoded(tensor.type, blocks))) == bits);
      CHECK(as_text(bytes_of(decoded(tensor.type, blocks, Instructions::portable))) == bits);
      ++tensors;
    }
  }
  CHECK(tensors == 12 + 5 + 2 + 2);
}

TEST_CASE("decode_blocks: 64 blocks of every type have the bits that gguf-py 0.19 gave for them") {
  std::map<std::uint32_t, std::string> const digests{
      {types::q4_0, "a7467b6dd5eea1b0e723a88cbe8ad78bc283ee566679cd51a273f9002cb7bc4b"},   {types::q4_1, "a4efd17d95c47f2f942da986afb989e079b5efc1007918ddb297641300586121"},
      {types::q5_0, "1a7e78d9d17ab39247ca50088824c4e249440c2432f185f32bd34e1483a94cb2"},   {types::q5_1, "6d8eae4de6fd663da2b9ae606ca3eb7a68f8f3146307ddafb998444c7c4179a3"},
      {types::q8_0, "bf3d32ede6d4ea4cc5af21cbd234f0017d167fdf9b2ceebc204cb8f1a936d02a"},   {types::q2_k, "78e4199d25fcfe0c2c7f27a310366699186957ed48709b6f2763ac609201febc"},
      {types::q3_k, "c4d3064a1b883ff5a5572b88874ee6380b9b2dc9f7a6a8e9eed620082530206b"},   {types::q4_k, "a2668af49889ad66226aadbdd2b283298febb656f63c0912be769a65441d4cbb"},
      {types::q5_k, "c3c077027b17bde990c64acaec61b54a6aea0b164bd35f1920a4ba4262fc8a1f"},   {types::q6_k, "798b9eedb33e67e124d5532b0765d8f2837428712b9eb19076a817ace275291b"},
      {types::iq4_nl, "e784087a323efdc61c10422b513c4218658a0ff8323e4d406bfb6e3162347009"}, {types::iq4_xs, "6d046d24a9e0ac1466e57533268f19359ada73a1e58d8f91729f924c99e19730"},
      {types::tq1_0, "4b20a56e8bf5e19286549558cf29975872ffe8cdb541ac4bd79f148913a6a45b"},  {types::tq2_0, "22b0ccb1583969e099d5531168a6944b5acd620889a8921242da85a881bcfb17"},
      {types::mxfp4, "bd2a7a77727061812f0f1aafd5a103e9465d9c43e5d3628b683ad538fa20a37d"},  {types::nvfp4, "9f7e9895cab95a8658eb4bc3b3bf29ae0f5aff7290962d12f28ad190b4cddeb4"}};
  for (auto const& [type, digest] : digests) {
    std::uint32_t const t = type;
    CAPTURE(t);
    CHECK(test::sha256(bytes_of(decoded(t, tame_bytes(64 * bytes_of(t))))) == digest);
  }
  CHECK(decodable().size() == digests.size() + 2);   // gguf-py does not know Q8_1 and Q8_K
}

TEST_CASE("decode_blocks: random blocks of every type are what the formulas say, with all instructions") {
  std::uint64_t const seed = test::first_seed();
  CAPTURE(seed);
  test::Random random{seed};
  for (auto const type : decodable()) {
    CAPTURE(type);
    constexpr std::int64_t count = 300;
    Bytes blocks = random.bytes(count * bytes_of(type));
    if (type == types::mxfp4)
      for (std::size_t b = 0; b < count; ++b)
        if (blocks[17 * b] == std::byte{255}) blocks[17 * b] = std::byte{1};
    auto const fast = decoded(type, blocks), portable = decoded(type, blocks, Instructions::portable);
    CHECK(std::memcmp(fast.data(), portable.data(), 4 * fast.size()) == 0);
    std::int64_t wrong = 0;
    for (std::int64_t b = 0; b < count; ++b) {
      Oracle const oracle{type, blocks.data() + b * static_cast<std::int64_t>(bytes_of(type))};
      for (std::int64_t i = 0; i < elements_of(type); ++i) {
        float const wanted = oracle(static_cast<int>(i)), got = portable[static_cast<std::size_t>(b * elements_of(type) + i)];
        wrong += std::isnan(wanted) ? !std::isnan(got) : std::bit_cast<std::uint32_t>(wanted) != std::bit_cast<std::uint32_t>(got);
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("decode_blocks: every half is its number as the scale of a block") {
  Bytes block(34);
  block[2] = std::byte{1};
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    std::memcpy(block.data(), &bits, 2);
    float out[32];
    decode_blocks(types::q8_0, block.data(), 1, out);
    float const wanted = static_cast<float>(f16::from_bits(static_cast<std::uint16_t>(bits)));
    if (std::isnan(wanted) ? !std::isnan(out[0]) : std::bit_cast<std::uint32_t>(wanted) != std::bit_cast<std::uint32_t>(out[0])) FAIL(bits);
  }
}

#if DCP_X86_KERNELS
TEST_CASE("decode_blocks: a processor that flushes subnormal numbers to zero and rounds down gives the same bits") {
  unsigned const before = __builtin_ia32_stmxcsr();
  for (auto const type : decodable()) {
    CAPTURE(type);
    Bytes const blocks = tame_bytes(16 * bytes_of(type));
    auto const wanted = decoded(type, blocks);
    __builtin_ia32_ldmxcsr(before | 0x8040u | 0x2000u);
    auto const got = decoded(type, blocks);
    __builtin_ia32_ldmxcsr(before);
    CHECK(std::memcmp(got.data(), wanted.data(), 4 * got.size()) == 0);
  }
}
#endif

TEST_CASE("decode_blocks: known blocks of ggml's own quantizers") {
  std::vector<float> const x = steps();
  std::vector<float> const q4{-16, -14, -14, -12, -12, -10, -10, -8, -8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14, 14};
  CHECK(decoded(types::q4_0, from_hex("00 40 80 91 91 a2 a2 b3 b3 c4 c4 d5 d5 e6 e6 f7 f7 f8")) == q4);
  CHECK(decoded(types::q5_0, from_hex("00 3c 00 00 ff ff 00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff")) == x);
  CHECK(decoded(types::q5_1, from_hex("00 3c 00 cc 00 00 ff ff 00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff")) == x);
  std::string const codes = "81 89 91 99 a1 a9 b1 b9 c0 c8 d0 d8 e0 e8 f0 f8 00 08 10 18 20 28 30 38 40 47 4f 57 5f 67 6f 77";
  auto const q8 = decoded(types::q8_0, from_hex("08 30" + codes));
  CHECK(q8[0] == doctest::Approx(-15.9990234));
  CHECK(q8[31] == doctest::Approx(14.9912109));
  CHECK(decoded(types::q8_1, from_hex("08 30 00 cc" + codes)) == q8);
  auto const mxfp4 = decoded(types::mxfp4, from_hex("81 0e 0e 1d 1d 2d 2d 3c 3c 4c 4b 4b 5a 5a 59 59 60"));
  CHECK(mxfp4[0] == -16);
  CHECK(mxfp4[15] == 0);
  CHECK(mxfp4[31] == 16);   // of 15: the codes between 4 and 6 times the scale of 4 are far apart
}

TEST_CASE("decode_blocks: the known values of K-quants") {
  std::array<Known, 6> const known{{
      {types::q2_k, 80, 82, {33, 0, 22, -1.5f, -1.5f, 7.5f, -2.5f, 6.5f, 10.5f, 2, 42, 7.5f, -1.5f, 22.5f, -3, 15, 2.5f, 4.5f, 4.5f}, 2059},
      {types::q3_k, 108, 0, {81, -108, -54, -96, 64, -22, 44, 10, 34, 50, 72, 2, -0.0f, 26, 81, 100, 12, -28, 42}, 958},
      {types::q4_k, 0, 2, {315.5f, -25.5f, 160.5f, 315.5f, 160.5f, 8, 20, 40, 420.5f, 193, 81, 423, -6, 525, 45, 530.5f, 0.5f, 30.5f, 48.5f}, 54440},
      {types::q5_k, 0, 2, {811.5f, -25.5f, 160.5f, 811.5f, 160.5f, 112, -4, 80, 420.5f, 333, -3, 1047, -6, 165, 645, 1314.5f, 60.5f, 90.5f, 108.5f}, 116216},
      {types::q6_k, 208, 0, {-1431, 1696, -318, -432, -96, 231, -672, -580, -3040, -870, 1500, -351, 416, 671, -980, -484, 846, 130, -60}, 4612},
      {types::q8_k, 0, 0, {-97, -60, -54, -17, 26, 63, 100, -70, -33, 127, -6, 31, 68, -65, 58, 95, -1, 79, 122}, -128},
  }};
  for (auto const& one : known) {
    CAPTURE(one.type);
    Bytes block = ramp(one.type);
    put(block, one.d, one.type == types::q8_k ? "0000803f" : "003c");
    if (one.least != 0) put(block, one.least, "0038");
    auto const out = decoded(one.type, block);
    double sum = 0;
    for (float const value : out) sum += value;
    CHECK(sum == one.sum);
    for (std::size_t i = 0; i < places.size(); ++i) {
      CAPTURE(places[i]);
      CHECK(out[static_cast<std::size_t>(places[i])] == one.values[i]);
    }
  }
}

TEST_CASE("decode_blocks: an MXFP4 scale that is no number is refused before anything is written") {
  Bytes blocks(51);
  blocks[34] = std::byte{255};
  std::vector<float> out(96, 3.0f);
  CHECK_THROWS_WITH_AS(decode_blocks(types::mxfp4, blocks.data(), 3, out.data()), doctest::Contains("block 2"), Error);
  CHECK(outcome([&] { decode_blocks(types::mxfp4, blocks.data(), 3, out.data()); }) == "quant_mismatch");
  CHECK(out == std::vector<float>(96, 3.0f));
}

TEST_CASE("decode_blocks and encode_blocks: types that they do not know are refused") {
  for (std::uint32_t const type : {types::f32, types::iq2_xxs, types::q1_0, 4u, 4000u}) {
    CHECK(!can_decode(type));
    CHECK(outcome([&] { decode_blocks(type, nullptr, 0, nullptr); }) == "unsupported");
  }
  for (std::uint32_t const type : {types::f32, types::q4_k, types::mxfp4, types::q8_1, 4000u}) {
    CHECK(!can_encode(type));
    CHECK(outcome([&] { encode_blocks(type, nullptr, 0, nullptr); }) == "unsupported");
  }
  decode_blocks(types::q4_0, nullptr, 0, nullptr);
  encode_blocks(types::q4_0, nullptr, 0, nullptr);
}

TEST_CASE("encode_blocks: known blocks of ggml's own quantizers") {
  std::vector<float> const x = steps();
  CHECK(hex(encoded(types::q4_0, x)) == "004080" "9191a2a2b3b3c4c4d5d5e6e6f7f7f8");
  CHECK(hex(encoded(types::q4_1, x)) == "224000cc" "80809191a2a2b3b3c4c4d5d5e6e6f7f7");
  CHECK(hex(encoded(types::q5_0, x)) == "003c0000ffff" "00112233445566778899aabbccddeeff");
  CHECK(hex(encoded(types::q5_1, x)) == "003c00cc0000ffff" "00112233445566778899aabbccddeeff");
  CHECK(hex(encoded(types::q8_0, x)) == "0830" "81899199a1a9b1b9c0c8d0d8e0e8f0f800081018202830384047" "4f575f676f77");
  std::vector<float> ties(32);
  ties[5] = -127, ties[6] = 0.5f, ties[7] = -0.5f, ties[8] = 1.5f, ties[9] = 2.5f;
  CHECK(hex(encoded(types::q8_0, ties)) == "003c" "0000000000" "8101ff0203" + std::string(44, '0'));   // away from zero
  std::vector<float> const zeros(32);
  CHECK(hex(encoded(types::q8_0, zeros)) == std::string(68, '0'));
  CHECK(hex(encoded(types::q4_0, zeros)) == "0080" "88888888888888888888888888888888");
}

TEST_CASE("encode_blocks: 64 blocks of every type have the bytes that gguf-py 0.19 gave for them") {
  std::map<std::uint32_t, std::string> const digests{{types::q4_0, "856e2a08d052bcb3c5bade03832d263bd192be24cd6cb3f2e3b576831839d465"},
                                                     {types::q4_1, "50c0cbbc43ab42510f61c10f925c99f3ba4ec2eb67d6346bb038afd4daa06fac"},
                                                     {types::q5_0, "73d20d9358f8b354ff626bb201947a682879b1fd1a370962f02202752cdebae1"},
                                                     {types::q5_1, "ba4495b76ef9b9c9e804cb930c7fd7d3e201dca2114e67010f199bff74af172a"},
                                                     {types::q8_0, "f0545f5e32f339665340ff3465455bab745267c6a394b29e74bc0046dae79df2"}};
  int types_seen = 0;
  for (std::uint32_t type = 0; type < 50; ++type) {
    if (!can_encode(type)) continue;
    CAPTURE(type);
    CHECK(test::sha256(encoded(type, tame_numbers())) == digests.at(type));
    ++types_seen;
  }
  CHECK(types_seen == 5);
}

TEST_CASE("encode_blocks: errors stay within the bounds of each type, signs are kept and order is kept") {
  std::uint64_t const seed = test::first_seed();
  CAPTURE(seed);
  std::mt19937_64 engine{seed};
  std::normal_distribution<float> normal;
  std::cauchy_distribution<float> heavy;
  for (int round = 0; round < 2000; ++round) {
    std::vector<float> x(32);
    int const kind = round % 5;
    float const constant = normal(engine), scale = kind == 3 ? 1e-3f : kind == 4 ? 1e4f : 1.0f;
    for (auto& value : x) {
      value = kind == 1 ? std::min(std::max(heavy(engine), -1e4f), 1e4f) : kind == 2 ? constant : normal(engine) * scale;
      value = std::min(std::max(value, -6e4f), 6e4f);
    }
    float furthest = 0, least = x[0], largest = x[0];
    for (float const value : x) furthest = std::max(furthest, std::abs(value)), least = std::min(least, value), largest = std::max(largest, value);
    for (std::uint32_t const type : {types::q8_0, types::q4_0, types::q5_0, types::q4_1, types::q5_1}) {
      auto const y = decoded(type, encoded(type, x));
      // Half a step, and the error of scale and offset as halves, which counts as often as the largest code says.
      float const d = type == types::q8_0 ? furthest / 127 : type == types::q4_0 ? furthest / 8 : type == types::q5_0 ? furthest / 16 : (largest - least) / (type == types::q4_1 ? 15.0f : 31.0f);
      float const most = type == types::q8_0 ? 127.0f : type == types::q4_0 ? 8.0f : type == types::q5_0 ? 16.0f : type == types::q4_1 ? 15.0f : 31.0f;
      float const half_error = std::max(d * 0x1p-11f, 0x1p-25f) * most + (type == types::q4_1 || type == types::q5_1 ? std::max(std::abs(least) * 0x1p-11f, 0x1p-25f) : 0.0f);
      // The number opposite to the furthest one has no code of its own in the types whose codes go from -8 to 7.
      float const bound = ((type == types::q4_0 || type == types::q5_0 ? 1.0f : 0.5f) * d + half_error) * (1 + 0x1p-20f);
      for (std::size_t i = 0; i < 32; ++i) {
        if (std::abs(x[i] - y[i]) > bound) FAIL_CHECK("type " << type << ", kind " << kind << ": " << x[i] << " became " << y[i] << ", bound " << bound);
        if (type != types::q4_1 && type != types::q5_1 && y[i] != 0 && std::signbit(x[i]) != std::signbit(y[i])) FAIL_CHECK("a sign changed");
        for (std::size_t k = 0; k < i; ++k)
          if ((x[i] <= x[k] && y[i] > y[k]) || (x[k] <= x[i] && y[k] > y[i])) FAIL_CHECK("the order changed");
      }
      if (type == types::q8_0 && d >= 0x1p-14f) CHECK(bound <= 0.5625f * furthest / 127 * (1 + 0x1p-10f));
    }
  }
}

TEST_CASE("encode_blocks: numbers that a type can hold come back as they were") {
  std::uint64_t const seed = test::first_seed();
  CAPTURE(seed);
  test::Random random{seed};
  for (int round = 0; round < 500; ++round) {
    float const unit = std::ldexp(1.0f, static_cast<int>(random.between(-10, 8)));
    std::vector<float> q8(32), q4(32), q5(32);
    for (std::size_t i = 0; i < 32; ++i) {
      q8[i] = static_cast<float>(random.between(-127, 127)) * unit;
      q4[i] = static_cast<float>(random.between(-8, 7)) * unit;
      q5[i] = static_cast<float>(random.between(-16, 15)) * unit;
    }
    q8[3] = 127 * unit, q4[5] = -8 * unit, q5[7] = -16 * unit;
    q4[9] = 7 * unit, q5[11] = 15 * unit;
    CHECK(decoded(types::q8_0, encoded(types::q8_0, q8)) == q8);
    CHECK(decoded(types::q4_0, encoded(types::q4_0, q4)) == q4);
    CHECK(decoded(types::q4_1, encoded(types::q4_1, q4)) == q4);
    CHECK(decoded(types::q5_0, encoded(types::q5_0, q5)) == q5);
    CHECK(decoded(types::q5_1, encoded(types::q5_1, q5)) == q5);
  }
}

TEST_CASE("encode_blocks: numbers too small for the scale of a block all become zero") {
  for (float const scale : {1e-44f, 1e-40f, 1e-38f, 1e-30f, 1e-10f})
    for (std::uint32_t const type : {types::q8_0, types::q4_0, types::q5_0, types::q4_1, types::q5_1}) {
      std::vector<float> x(32);
      for (std::size_t i = 0; i < 32; ++i) x[i] = scale * (static_cast<float>(i) - 15);
      CAPTURE(scale);
      CAPTURE(type);
      for (float const value : decoded(type, encoded(type, x))) CHECK(value == 0.0f);
    }
}

TEST_CASE("encode_blocks: NaN, infinity and numbers beyond a scale are refused, with their place") {
  for (std::uint32_t const type : {types::q8_0, types::q4_0, types::q5_0, types::q4_1, types::q5_1}) {
    CAPTURE(type);
    for (float const bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), 3e38f, -3e38f, 1e8f}) {
      CAPTURE(bad);
      std::vector<float> x(96, 1.0f);
      x[77] = bad;
      Bytes out(3 * bytes_of(type));
      CHECK(outcome([&] { encode_blocks(type, x.data(), 3, out.data()); }) == "invalid_argument");
      try {
        encode_blocks(type, x.data(), 3, out.data());
      } catch (Error const& error) {
        CHECK(error.message().starts_with("element 77 "));
      }
    }
  }
  CHECK(outcome([] { encoded(types::q8_0, std::vector<float>(32, 65504.0f * 127)); }) == "ok");
  CHECK(outcome([] { encoded(types::q8_0, std::vector<float>(32, 65536.0f * 127)); }) == "invalid_argument");
  CHECK(outcome([] { encoded(types::q4_1, std::vector<float>(32, -65504.0f)); }) == "ok");
  CHECK(outcome([] { encoded(types::q4_1, std::vector<float>(32, -70000.0f)); }) == "invalid_argument");
}
