// SPDX-License-Identifier: Apache-2.0
#include <dcp/base/result.hpp>

#include <doctest/doctest.h>

#include <memory>
#include <string>

using namespace dcp;

TEST_CASE("Result: a value is reached like through a pointer") {
  Result<std::string> result = std::string{"abc"};
  REQUIRE(result);
  CHECK(*result == "abc");
  CHECK(result->size() == 3);
  result.value() += 'd';
  Result<std::string> const same = result;
  CHECK(same.value() == "abcd");
  CHECK(same->back() == 'd');
}

TEST_CASE("Result: an error is thrown by whoever asks for the value") {
  Result<int> const result = Error{ErrorCode::not_found, "nothing there"};
  REQUIRE_FALSE(result);
  CHECK(result.error().code() == ErrorCode::not_found);
  CHECK_THROWS_WITH_AS(static_cast<void>(*result), doctest::Contains("nothing there"), Error);
  CHECK_THROWS_AS(static_cast<void>(result.value()), Error);
}

TEST_CASE("Result: may hold what cannot be copied, and an Error as a value's twin") {
  Result<std::unique_ptr<int>> result = std::make_unique<int>(5);
  REQUIRE(result);
  std::unique_ptr<int> const taken = std::move(*result);
  CHECK(*taken == 5);
}
