// SPDX-License-Identifier: Apache-2.0
#include <dcp/io/direct.hpp>

#include <doctest/doctest.h>

#include "support/generate.hpp"
#include "support/temporary_directory.hpp"

#include <filesystem>
#include <string>
#include <thread>
#include <vector>

using namespace dcp;
using dcp::test::Random;
using dcp::test::TemporaryDirectory;

namespace {
Bytes contents(std::string const& path) {
  auto const file = FileHandle::open_read(path);
  Bytes bytes(static_cast<std::size_t>(file.size()));
  file.read_at(0, bytes);
  return bytes;
}
}  // namespace

TEST_CASE("law: blocks written directly in any order, from any memory, by several writers, are the file") {
  auto const seed = dcp::test::first_seed();
  TemporaryDirectory directory;
  if (auto const probe = DirectFile<>::open(directory / "probe", 4096, false); !probe) {
    MESSAGE("not run: direct writes (the file system of the temporary directory does not take them)");
    return;
  }
  for (std::uint64_t round = 0; round < 40; ++round) {
    CAPTURE(seed + round);
    Random random{seed + round};
    std::uint64_t const block = std::uint64_t{4096} << random.between(0, 2);
    auto const size = static_cast<std::size_t>(random.between(0, 40) * 4096 + (random.one_in(3) ? 0 : random.between(1, 4095)));
    Bytes const wanted = random.bytes(size);
    std::string const path = directory / ("file-" + std::to_string(round));
    std::vector<DirectFile<>> writers;
    for (int w = 0; w < 2; ++w) {
      auto file = DirectFile<>::open(path, block, false);
      REQUIRE(file.has_value());
      file->resize(size);
      writers.push_back(std::move(*file));
    }
    std::vector<std::pair<std::size_t, std::size_t>> pieces;
    for (std::size_t at = 0; at < size;) {
      std::size_t const end = std::min<std::size_t>(size, at + static_cast<std::size_t>(random.between(1, 5)) * static_cast<std::size_t>(block));
      pieces.emplace_back(at, end);
      at = end;
    }
    random.shuffle(pieces);
    for (auto const& [begin, end] : pieces) {
      AlignedBuffer aligned{end - begin + 64};
      std::size_t const shift = random.one_in(2) ? 0 : static_cast<std::size_t>(random.between(1, 64));
      std::copy(wanted.begin() + static_cast<std::ptrdiff_t>(begin), wanted.begin() + static_cast<std::ptrdiff_t>(end), aligned.data() + shift);
      writers[random.one_in(2) ? 0 : 1].write_at(begin, {aligned.data() + shift, end - begin});
    }
    for (auto& writer : writers) {
      writer.sync();
      writer.close();
    }
    CHECK(contents(path) == wanted);
  }
}

TEST_CASE("direct file: a write that begins inside a block is refused, with the range") {
  TemporaryDirectory directory;
  auto file = DirectFile<>::open(directory / "file", 4096, false);
  if (!file) return;
  Bytes const bytes(4096);
  CHECK_THROWS_AS(file->write_at(512, bytes), Error);
}

TEST_CASE("direct file: a file that cannot be opened this way is left to the plain open, which says why") {
  TemporaryDirectory directory;
  CHECK_FALSE(DirectFile<>::open(directory / "missing/file", 4096, false).has_value());
  CHECK_FALSE(DirectFile<>::open(directory / "file", 512, false).has_value());   // blocks smaller than a page
  std::filesystem::create_directory((directory / "folder").c_str());
  CHECK_FALSE(DirectFile<>::open(directory / "folder", 4096, false).has_value());
}
