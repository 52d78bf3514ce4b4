// SPDX-License-Identifier: Apache-2.0
#include <dcp/media/memory.hpp>

#include "../support/medium_conformance.hpp"

#include <doctest/doctest.h>

using namespace dcp;
using namespace dcp::test;

TEST_CASE("Memory keeps the contract of a medium") {
  check_medium([](std::string& directory) {
    Memory memory;
    memory.create_directory(directory = "/place");
    return memory;
  });
}

TEST_CASE("Memory: copies of the handle see the same files, copy() does not") {
  Memory memory;
  auto same = memory;
  put(memory, "f", "one");
  auto other = memory.copy();
  put(same, "/f", "two");
  CHECK(get(memory, "f") == "two");
  CHECK(get(other, "f") == "one");
}

TEST_CASE("Memory: what is leased is not leased in a copy") {
  Memory memory;
  auto const lease = memory.acquire_lease("lease");
  auto copy = memory.copy();
  CHECK(memory.acquire_lease("lease") == nullptr);
  CHECK(copy.acquire_lease("lease") != nullptr);
}

TEST_CASE("Memory: the root is always there and stays") {
  Memory memory;
  CHECK(memory.kind("/") == EntryKind::directory);
  CHECK_FALSE(memory.create_directory("/"));
  CHECK(error_of([&] { memory.remove_tree("/"); }).system_error() == EBUSY);
  CHECK(memory.list("").empty());
  CHECK(memory.resolve_place("a//b/./c/../d") == "/a/b/d");
}
