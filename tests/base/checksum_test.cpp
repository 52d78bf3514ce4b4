// SPDX-License-Identifier: Apache-2.0
#include <dcp/base/checksum.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string_view>
#include <vector>

using namespace dcp;

namespace {

// The definition, bit by bit and unreflected: long division of the bit-reversed bytes by P. Shares nothing with the header.
std::uint64_t divide(ConstByteSpan bytes, std::uint64_t init) {
  std::uint64_t remainder = init;   // zero or all ones, which are their own reflections
  for (std::byte const b : bytes)
    for (int bit = 0; bit < 8; ++bit) {
      bool const in = ((std::to_integer<unsigned>(b) >> bit) & 1U) != 0;
      bool const out = (remainder >> 63) != 0;
      remainder = (remainder << 1) ^ (in != out ? 0xad93d23594c93659U : 0U);
    }
  std::uint64_t reflected = 0;
  for (int bit = 0; bit < 64; ++bit, remainder >>= 1) reflected = (reflected << 1) | (remainder & 1);
  return reflected;
}

struct Random {
  std::uint64_t seed = std::random_device{}();
  std::mt19937_64 engine{seed};
  std::uint64_t below(std::uint64_t limit) { return std::uniform_int_distribution<std::uint64_t>{0, limit - 1}(engine); }
  Bytes bytes(std::uint64_t size) {
    Bytes result(static_cast<std::size_t>(size));
    for (auto& b : result) b = static_cast<std::byte>(engine());
    return result;
  }
};

ConstByteSpan part(Bytes const& bytes, std::uint64_t offset, std::uint64_t size) {
  return ConstByteSpan{bytes}.subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(size));
}

Bytes joined(ConstByteSpan a, ConstByteSpan b) {
  Bytes result(a.begin(), a.end());
  result.insert(result.end(), b.begin(), b.end());
  return result;
}

struct Run {
  std::uint64_t offset, size;
};

}  // namespace

TEST_CASE("crc64: the check value of the catalogue, from every implementation") {
  auto const digits = as_byte_span("123456789");
  CHECK(crc64(digits) == 0xae8b14860a799888U);
  CHECK(crc64({}) == 0);
  CHECK(divide(digits, ~std::uint64_t{0}) == ~std::uint64_t{0xae8b14860a799888U});
  for (auto const& implementation : crc64_implementations()) {
    CAPTURE(implementation.name);
    CHECK(~implementation.raw(digits.data(), digits.size(), ~std::uint64_t{0}) == 0xae8b14860a799888U);
  }
}

TEST_CASE("crc64: the published values of the NVM Express specification") {
  Bytes block(4096, std::byte{0});
  CHECK(crc64(block) == 0x6482d367eb22b64eU);
  std::fill(block.begin(), block.end(), std::byte{0xff});
  CHECK(crc64(block) == 0xc0ddba7302eca3acU);
  for (std::size_t i = 0; i < block.size(); ++i) block[i] = static_cast<std::byte>(i);
  CHECK(crc64(block) == 0x3e729f5f6750449cU);
  std::reverse(block.begin(), block.end());
  CHECK(crc64(block) == 0x9a2df64b8e9e517eU);
}

TEST_CASE("crc64_implementations: the portable tables are always there, and names are distinct") {
  auto const list = crc64_implementations();
  REQUIRE(list.size() >= 1);
  CHECK(std::string_view{list.front().name} == "tables");
  for (std::size_t i = 1; i < list.size(); ++i) CHECK(std::string_view{list[i].name} != std::string_view{list[i - 1].name});
#if defined(__x86_64__)
  CHECK((list.size() > 1) == (__builtin_cpu_supports("pclmul") != 0));
#endif
}

TEST_CASE("law: every implementation gives the remainder of long division, at every length to 600 and every offset to 64") {
  Random random;
  CAPTURE(random.seed);
  Bytes const bytes = random.bytes(700);
  std::uint64_t const state = random.engine();
  for (std::uint64_t size = 0; size <= 600; ++size) {
    auto const offset = size % 64;
    Bytes const exact = joined(part(bytes, offset, size), {});   // ends where its allocation ends, so that a sanitizer sees a read past it
    auto const expected = divide(exact, 0);
    auto const continued = expected ^ crc64_shift(state, size);
    for (auto const& implementation : crc64_implementations()) {
      CAPTURE(implementation.name);
      CAPTURE(size);
      REQUIRE(implementation.raw(exact.data(), exact.size(), 0) == expected);
      REQUIRE(implementation.raw(exact.data(), exact.size(), state) == continued);
    }
  }
  for (std::uint64_t offset = 0; offset <= 64; ++offset)
    for (unsigned const size : {0U, 1U, 15U, 16U, 17U, 63U, 64U, 65U, 255U, 256U, 257U, 300U, 511U, 576U}) {
      auto const run = part(bytes, offset, size);
      auto const expected = divide(run, 0);
      for (auto const& implementation : crc64_implementations()) {
        CAPTURE(implementation.name);
        CAPTURE(offset);
        CAPTURE(size);
        REQUIRE(implementation.raw(run.data(), run.size(), 0) == expected);
      }
    }
}

TEST_CASE("law: the implementations agree on large inputs") {
  Random random;
  CAPTURE(random.seed);
  Bytes const bytes = random.bytes(2 << 20);
  for (int round = 0; round < 20; ++round) {
    auto const offset = random.below(1 << 20);
    auto const run = part(bytes, offset, random.below(1 << 20));
    std::uint64_t const state = random.engine();
    auto const expected = crc64_implementations().front().raw(run.data(), run.size(), state);
    for (auto const& implementation : crc64_implementations()) {
      CAPTURE(implementation.name);
      CHECK(implementation.raw(run.data(), run.size(), state) == expected);
    }
    CHECK(crc64_raw(run, state) == expected);
  }
  auto const block = part(bytes, 1, 100'000);
  CHECK(crc64_raw(block) == divide(block, 0));
  CHECK(crc64(block) == ~divide(block, ~std::uint64_t{0}));
}

TEST_CASE("law: the products of all implementations are those of polynomials modulo P") {
  Random random;
  CAPTURE(random.seed);
  std::uint64_t const one = std::uint64_t{1} << 63, x = std::uint64_t{1} << 62;
  for (int round = 0; round < 500; ++round) {
    std::uint64_t const a = random.engine(), b = random.engine(), c = random.engine();
    for (auto const& implementation : crc64_implementations()) {
      CAPTURE(implementation.name);
      auto const multiply = implementation.multiply;
      REQUIRE(multiply(a, b) == crc64_implementations().front().multiply(a, b));
      REQUIRE(multiply(a, b) == multiply(b, a));
      REQUIRE(multiply(a, b ^ c) == (multiply(a, b) ^ multiply(a, c)));
      REQUIRE(multiply(multiply(a, b), c) == multiply(a, multiply(b, c)));
      REQUIRE(multiply(a, one) == a);
      REQUIRE(multiply(a, 0) == 0);
      // Appending a zero bit, by the definition.
      REQUIRE(multiply(a, x) == ((a >> 1) ^ ((a & 1) != 0 ? std::uint64_t{0x9a6c9329ac4bc9b5U} : 0U)));
    }
  }
}

TEST_CASE("law: the raw CRC is linear, continues, and does not see leading zeros") {
  Random random;
  CAPTURE(random.seed);
  for (int round = 0; round < 200; ++round) {
    auto const size = random.below(3000);
    Bytes const a = random.bytes(size), b = random.bytes(size), tail = random.bytes(random.below(700));
    Bytes sum = a;
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] ^= b[i];
    CHECK(crc64_raw(sum) == (crc64_raw(a) ^ crc64_raw(b)));
    CHECK(crc64_raw(joined(a, tail)) == crc64_raw(tail, crc64_raw(a)));
    CHECK(crc64_raw(Bytes(a.size())) == 0);
    CHECK(crc64_raw(joined(Bytes(tail.size()), a)) == crc64_raw(a));
  }
}

TEST_CASE("law: crc64_shift appends zeros") {
  Random random;
  CAPTURE(random.seed);
  Bytes const bytes = random.bytes(100);
  auto const raw = crc64_raw(bytes);
  for (std::uint64_t zeros = 0; zeros < 600; ++zeros) REQUIRE(crc64_shift(raw, zeros) == crc64_raw(joined(bytes, Bytes(zeros))));
  for (int round = 0; round < 20; ++round) {
    auto const zeros = random.below(1 << 21);
    CHECK(crc64_shift(raw, zeros) == crc64_raw(Bytes(static_cast<std::size_t>(zeros)), raw));
  }
  for (int round = 0; round < 200; ++round) {   // distances that no test can hold in memory
    std::uint64_t const m = random.engine() >> 1, n = random.engine() >> 1;
    CHECK(crc64_shift(crc64_shift(raw, m), n) == crc64_shift(raw, m + n));
    CHECK(crc64_shift(0, m) == 0);
  }
}

TEST_CASE("law: the standard CRC and the raw CRC determine each other, given the size") {
  Random random;
  CAPTURE(random.seed);
  for (int round = 0; round < 200; ++round) {
    Bytes const bytes = random.bytes(random.below(5000));
    CHECK(crc64_from_raw(crc64_raw(bytes), bytes.size()) == crc64(bytes));
    CHECK(crc64_from_raw(crc64(bytes), bytes.size()) == crc64_raw(bytes));
  }
  CHECK(crc64_from_raw(0, 4096) == 0x6482d367eb22b64eU);   // 4 KiB of zeros that nobody had to look at
}

TEST_CASE("law: crc64_combine is the CRC of the concatenation, and associative") {
  Random random;
  CAPTURE(random.seed);
  for (int round = 0; round < 200; ++round) {
    Bytes const a = random.bytes(random.below(2000)), b = random.bytes(random.below(2000)), c = random.bytes(random.below(2000));
    Bytes const ab = joined(a, b), abc = joined(ab, c);
    auto const combined = crc64_combine(crc64(a), crc64(b), b.size());
    CHECK(combined == crc64(ab));
    CHECK(crc64_combine(combined, crc64(c), c.size()) == crc64(abc));
    CHECK(crc64_combine(crc64(a), crc64_combine(crc64(b), crc64(c), c.size()), b.size() + c.size()) == crc64(abc));
  }
}

TEST_CASE("law: the contributions of the ranks XOR to the chunk, whatever the partition and the order") {
  Random random;
  CAPTURE(random.seed);
  for (int round = 0; round < 100; ++round) {
    Bytes const chunk = random.bytes(1 + random.below(20'000));
    std::vector<std::uint64_t> cuts{0, chunk.size()};
    for (auto n = random.below(40); n > 0; --n) cuts.push_back(random.below(chunk.size() + 1));   // equal cuts give empty runs
    std::sort(cuts.begin(), cuts.end());
    std::vector<Run> runs;
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i) runs.push_back({cuts[i], cuts[i + 1] - cuts[i]});
    std::shuffle(runs.begin(), runs.end(), random.engine);

    std::vector<PositionedCrc> ranks(1 + random.below(5), PositionedCrc{chunk.size()});
    std::uint64_t alone = 0, together = 0, bytes = 0;
    for (auto const& run : runs) {
      auto const data = part(chunk, run.offset, run.size);
      alone ^= crc64_contribution(data, run.offset, chunk.size());
      ranks[random.below(ranks.size())].add(run.offset, data);
    }
    for (auto const& rank : ranks) together ^= rank.contribution(), bytes += rank.bytes();
    CHECK(alone == crc64_raw(chunk));
    CHECK(together == crc64_raw(chunk));
    CHECK(bytes == chunk.size());
    CHECK(crc64_from_raw(together, chunk.size()) == crc64(chunk));
  }
}

TEST_CASE("crc64_contribution: it is the raw CRC of the chunk with zeros everywhere else") {
  Random random;
  CAPTURE(random.seed);
  for (int round = 0; round < 100; ++round) {
    Bytes const run = random.bytes(random.below(1000));
    auto const offset = random.below(1000), after = random.below(1000);
    Bytes chunk = joined(Bytes(offset), run);
    chunk.resize(chunk.size() + static_cast<std::size_t>(after));
    CHECK(crc64_contribution(run, offset, chunk.size()) == crc64_raw(chunk));
  }
}

TEST_CASE("law: the columns of a matrix, rank by rank, XOR to the chunk, though its edges cut rows and columns") {
  Random random;
  CAPTURE(random.seed);
  for (int round = 0; round < 60; ++round) {
    auto const width = 1 + random.below(600), parts = 1 + random.below(7), column = ceil_div(width, parts);
    Bytes const chunk = random.bytes(1 + random.below(30'000));
    auto const lead = random.below(width);   // the chunk starts inside a row
    std::uint64_t together = 0, bytes = 0;
    for (std::uint64_t rank = 0; rank < parts; ++rank) {
      auto const first = std::min(rank * column, width), last = std::min(first + column, width);
      PositionedCrc strided{chunk.size()};
      std::uint64_t sum = 0;
      for (std::uint64_t row = 0; row * width < lead + chunk.size(); ++row) {
        auto const begin = std::clamp(row * width + first, lead, lead + chunk.size()) - lead;
        auto const end = std::clamp(row * width + last, lead, lead + chunk.size()) - lead;
        strided.add(begin, part(chunk, begin, end - begin));
        sum ^= crc64_contribution(part(chunk, begin, end - begin), begin, chunk.size());
      }
      CHECK(strided.contribution() == sum);
      together ^= strided.contribution();
      bytes += strided.bytes();
    }
    CHECK(together == crc64_raw(chunk));
    CHECK(bytes == chunk.size());
  }
}

TEST_CASE("law: any changed, dropped or misplaced run changes the sum or the count") {
  Random random;
  CAPTURE(random.seed);
  Bytes const chunk = random.bytes(4096);
  for (int round = 0; round < 200; ++round) {
    auto const cut = 64 + random.below(3900);
    auto const head = part(chunk, 0, cut), tail = part(chunk, cut, chunk.size() - cut);
    Bytes flipped(tail.begin(), tail.end());
    flipped[random.below(flipped.size())] ^= static_cast<std::byte>(1U << random.below(8));
    auto const whole = crc64_raw(chunk), first = crc64_contribution(head, 0, chunk.size());
    CHECK((first ^ crc64_contribution(flipped, cut, chunk.size())) != whole);
    CHECK((first ^ crc64_contribution(tail, cut - 1, chunk.size())) != whole);
    CHECK(first != whole);
  }
  // What the sum cannot see, the count does.
  Bytes const half_zero = joined(part(chunk, 0, 2048), Bytes(2048));
  PositionedCrc once{4096}, thrice{4096};
  once.add(0, part(half_zero, 0, 2048));
  for (int i = 0; i < 3; ++i) thrice.add(0, part(half_zero, 0, 2048));
  CHECK(once.contribution() == crc64_raw(half_zero));
  CHECK(thrice.contribution() == crc64_raw(half_zero));
  CHECK(once.bytes() == 2048);
  CHECK(thrice.bytes() == 3 * 2048);
}

TEST_CASE("PositionedCrc: a run that does not lie in the chunk is refused, and the sum stays as it was") {
  Bytes const run(16, std::byte{1});
  PositionedCrc crc{100};
  crc.add(84, run);
  auto const before = crc.contribution();
  for (std::uint64_t const offset : {std::uint64_t{85}, std::uint64_t{101}, ~std::uint64_t{0}, ~std::uint64_t{15}}) {
    CHECK_THROWS_AS(crc.add(offset, run), Error);
    CHECK_THROWS_AS(crc64_contribution(run, offset, 100), Error);
  }
  CHECK(crc.contribution() == before);
  CHECK(crc.bytes() == 16);
  CHECK_NOTHROW(crc.add(100, {}));
}
