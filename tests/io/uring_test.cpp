// SPDX-License-Identifier: Apache-2.0
#include <dcp/io/uring.hpp>

#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

TEST_CASE("Uring: writes that were begun together all end, each with its own id, and the file holds them") {
  auto const ring = dcp::Uring<>::open(8);
  REQUIRE(ring);   // left out by CMake where the kernel gives none
  dcp::test::TemporaryDirectory directory;
  int const file = ::open((directory.path() + "/file").c_str(), O_RDWR | O_CREAT, 0600);
  REQUIRE(file >= 0);
  std::vector<std::vector<std::byte>> blocks;
  for (int i = 0; i < 8; ++i) blocks.emplace_back(10'000, static_cast<std::byte>(i + 1));
  for (int round = 0; round < 3; ++round) {
    for (std::size_t i = 0; i < blocks.size(); ++i) REQUIRE(ring->write(file, i * 10'000, blocks[i], i) == 0);
    std::set<std::size_t> ended;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      dcp::Uring<>::Ended one{};
      REQUIRE(ring->wait(one) == 0);
      CHECK(one.result == 10'000);
      ended.insert(one.id);
    }
    CHECK(ended.size() == blocks.size());
  }
  std::vector<std::byte> found(80'000);
  REQUIRE(::pread(file, found.data(), found.size(), 0) == 80'000);
  for (std::size_t i = 0; i < found.size(); ++i) REQUIRE(found[i] == static_cast<std::byte>(i / 10'000 + 1));
  ::close(file);
}

TEST_CASE("Uring: a write to a file that is not open for writing ends with the system's reason") {
  auto const ring = dcp::Uring<>::open(2);
  REQUIRE(ring);
  dcp::test::TemporaryDirectory directory;
  auto const path = directory.path() + "/file";
  int const file = ::open(path.c_str(), O_RDONLY | O_CREAT, 0600);
  REQUIRE(file >= 0);
  std::vector<std::byte> const block(100);
  dcp::Uring<>::Ended ended{};
  REQUIRE(ring->write(file, 0, block, 1) == 0);
  REQUIRE(ring->wait(ended) == 0);
  CHECK(ended.id == 1);
  CHECK(ended.result == -EBADF);
  ::close(file);
}
