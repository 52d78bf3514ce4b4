// SPDX-License-Identifier: Apache-2.0
#include "../support/object_memory.hpp"

#include "../support/fault_medium.hpp"
#include "../support/medium_conformance.hpp"

#include <doctest/doctest.h>

using namespace dcp;
using namespace dcp::test;

TEST_CASE("ObjectMemory keeps the contract of a medium that renames nothing") {
  check_object_medium([](std::string& directory) {
    directory = "/place";
    return ObjectMemory{};
  });
}

TEST_CASE("FaultMedium over a medium that renames nothing keeps its contract, and can fail what it puts") {
  check_object_medium([](std::string& directory) {
    directory = "/place";
    return FaultMedium{ObjectMemory{}};
  });
  FaultMedium medium{ObjectMemory{}};
  medium.add({.call = Call::put_file, .system_error = EIO, .after = true});
  CHECK(error_of([&] { medium.put_file("/f", as_byte_span("abc"), {}); }).system_error() == EIO);
  CHECK(get(medium, "/f") == "abc");
}

TEST_CASE("ObjectMemory: a replay holds the first changes, and a change that comes late is refused as it would have been") {
  ObjectMemory store;
  store.put_file("/f", as_byte_span("one"), {});
  store.put_file("/f", as_byte_span("two"), Expected::these(as_byte_span("one")));
  store.remove_file("/f");
  auto const changes = store.changes();
  REQUIRE(changes.size() == 3);
  auto replayed = store.replay(1);
  CHECK(get(replayed, "/f") == "one");
  CHECK(store.replay(3).changes().empty());
  CHECK(replayed.apply(changes[1]));
  CHECK(!replayed.apply(changes[1]));
  CHECK(get(replayed, "/f") == "two");
}
