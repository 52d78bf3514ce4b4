// SPDX-License-Identifier: Apache-2.0
// ctest: alone
#include "support/kill_campaign.hpp"

#include <dcp/storage/torch_dcp.hpp>

#include <doctest/doctest.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

namespace {

namespace kills = dcp::test::kills;

struct LocalFsWithoutExchange : dcp::LocalFs {
  bool exchange_directories(std::string const&, std::string const&) { return false; }
};

// A broken protocol: the old checkpoint is removed to make space for the new one.
struct LocalFsThatMakesSpace : dcp::LocalFs {
  std::unique_ptr<dcp::WritableFile> open_blocks(std::string const& path, std::uint64_t block_bytes, dcp::DirectIo direct) {
    if (auto const at = path.find(".dcp-"); at != std::string::npos && path.ends_with(".safetensors")) remove_tree(path.substr(0, at));
    return LocalFs::open_blocks(path, block_bytes, direct);
  }
  bool exchange_directories(std::string const& a, std::string const& b) { return publish_new(a, b) && create_directory(a); }
};

}  // namespace

TEST_CASE("save: ranks that are killed at any time lose nothing") {
  auto const seed = dcp::test::first_seed();
  CAPTURE(seed);
  kills::check(kills::campaign<dcp::LocalFs>(seed, dcp::test::rounds(180, 1000), kills::time_of()), 5);
}

TEST_CASE("save: ranks that are killed at any time lose nothing where directories cannot be exchanged either") {
  auto const seed = dcp::test::first_seed() + 1'000'000;
  CAPTURE(seed);
  kills::check(kills::campaign<LocalFsWithoutExchange>(seed, dcp::test::rounds(130, 600), kills::time_of() / 2), 5);
}

TEST_CASE("save: ranks that are killed at any time lose nothing in PyTorch's format") {
  auto const seed = dcp::test::first_seed() + 2'000'000;
  CAPTURE(seed);
  kills::check(kills::campaign<dcp::LocalFs, dcp::BasicTorchDcp>(seed, dcp::test::rounds(130, 600), kills::time_of() / 2), 5);
}

TEST_CASE("harness: kills show that a save which removes the old checkpoint first loses it") {
  CHECK(kills::campaign<LocalFsThatMakesSpace>(77, 12, std::chrono::seconds{20}).lost > 0);
}
