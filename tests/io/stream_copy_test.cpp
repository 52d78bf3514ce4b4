// SPDX-License-Identifier: Apache-2.0
#include <dcp/io/stream_copy.hpp>

#include "support/generate.hpp"

#include <doctest/doctest.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

TEST_CASE("stream_copy: law: copies what memcpy copies and touches nothing else, for any size and alignment") {
  auto const seed = dcp::test::first_seed();
  constexpr std::size_t most = 200'000, margin = 256;
  std::vector<std::byte> target(most + 2 * margin), wanted;
  for (std::uint64_t round = 0; round < 400; ++round) {
    CAPTURE(seed);
    CAPTURE(round);
    dcp::test::Random random{seed + round};
    auto const size = static_cast<std::size_t>(random.one_in(2) ? random.between(0, 5000) : random.between(0, most));
    auto const from = static_cast<std::size_t>(random.between(0, 200)), to = static_cast<std::size_t>(random.between(0, 200));
    CAPTURE(size);
    auto const source = random.bytes(most + margin);
    std::fill(target.begin(), target.end(), std::byte{0xa5});
    wanted = target;
    std::memcpy(wanted.data() + to, source.data() + from, size);
    dcp::stream_copy(target.data() + to, source.data() + from, size);
    REQUIRE(target == wanted);
  }
}

TEST_CASE("stream_copy: reads nothing behind the source and writes nothing behind the target") {
  constexpr std::size_t page = 4096, pages = 9;
  auto const guarded = [] {
    auto* const memory = static_cast<std::byte*>(::mmap(nullptr, (pages + 1) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    REQUIRE(static_cast<void*>(memory) != MAP_FAILED);
    REQUIRE(::mprotect(memory + pages * page, page, PROT_NONE) == 0);
    return memory;
  };
  std::byte* const source = guarded();
  std::byte* const target = guarded();
  for (std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{1023}, std::size_t{1024}, std::size_t{1025}, 4 * page - 1, 4 * page, 4 * page + 65, pages * page}) {
    CAPTURE(size);
    std::memset(source, static_cast<int>(size % 251), pages * page);
    dcp::stream_copy(target + pages * page - size, source + pages * page - size, size);
    CHECK(std::memcmp(target + pages * page - size, source, size) == 0);
  }
  ::munmap(source, (pages + 1) * page);
  ::munmap(target, (pages + 1) * page);
}

#if defined(__x86_64__)
TEST_CASE("stream_copy: every way to copy a block that this processor has copies the same") {
  dcp::test::Random random{dcp::test::first_seed()};
  auto const source = random.bytes(dcp::detail::stream_block + 1);
  auto const check = [&](auto copy) {
    alignas(64) static std::byte target[dcp::detail::stream_block];
    std::memset(target, 0, sizeof target);
    copy(target, source.data() + 1);
    CHECK(std::memcmp(target, source.data() + 1, sizeof target) == 0);
  };
  check(dcp::detail::stream_a_block<>);
  if (__builtin_cpu_supports("avx512f")) check(dcp::detail::stream_a_block_512<>);
}
#endif
