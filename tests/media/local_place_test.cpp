// SPDX-License-Identifier: Apache-2.0
#include <dcp/media/local_place.hpp>

#include "../support/medium_conformance.hpp"
#include "../support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <filesystem>
#include <string>

using namespace dcp;
using namespace dcp::test;
using dcp::detail::resolve_local_place;

namespace {

std::string refusal(std::string const& place) {
  auto const error = error_of([&] { resolve_local_place(place); });
  CHECK(error.code() == ErrorCode::invalid_argument);
  CHECK_FALSE(error.hint().empty());
  return error.message();
}

bool says(std::string const& message, char const* words) { return message.find(words) != std::string::npos; }

}  // namespace

TEST_CASE("resolve_place: a link as the place is its target, there or not") {
  TemporaryDirectory directory;
  std::filesystem::create_directories(directory / "store/step-1");
  std::filesystem::create_directory_symlink("store/step-1", directory / "latest");
  std::filesystem::create_directory_symlink("store/step-2", directory / "next");
  std::filesystem::create_directory_symlink("next", directory / "again");
  std::filesystem::create_directory_symlink(directory / "store", directory / "absolute");
  CHECK(resolve_local_place(directory / "latest") == directory / "store/step-1");
  CHECK(resolve_local_place(directory / "latest/") == directory / "store/step-1");
  CHECK(resolve_local_place(directory / "next") == directory / "store/step-2");
  CHECK(resolve_local_place(directory / "again") == directory / "store/step-2");
  CHECK(resolve_local_place(directory / "absolute/new/place") == directory / "store/new/place");
  CHECK(resolve_local_place(directory / "latest/../x") == directory / "store/x");
}

TEST_CASE("resolve_place: a loop of links is an error, not a hang") {
  TemporaryDirectory directory;
  std::filesystem::create_symlink("b", directory / "a");
  std::filesystem::create_symlink("a", directory / "b");
  CHECK(error_of([&] { resolve_local_place(directory / "a"); }).system_error() == ELOOP);
  CHECK(error_of([&] { resolve_local_place(directory / "a/x"); }).system_error() == ELOOP);
}

TEST_CASE("resolve_place: refuses in words what cannot be replaced as a whole") {
  TemporaryDirectory directory;
  CHECK(says(refusal(""), "empty path"));
  CHECK(says(refusal("/"), "root"));
  CHECK(says(refusal("///"), "root"));
  CHECK(says(refusal("."), "\".\""));
  CHECK(says(refusal(directory / ".."), "\"..\""));
  CHECK(says(refusal(directory / "new/../x"), "does not exist"));
  CHECK(says(refusal(std::string("a\0b", 3)), "zero byte"));
  CHECK(says(refusal("/proc"), "mount point"));
  std::filesystem::create_directory_symlink("/", directory / "root");
  CHECK(says(refusal(directory / "root"), "root"));
  std::filesystem::create_directory_symlink("/proc", directory / "mounted");
  CHECK(says(refusal(directory / "mounted"), "mount point"));
}

TEST_CASE("resolve_place: the current directory and those above it are refused, those beside it are not") {
  TemporaryDirectory directory;
  std::filesystem::create_directories(directory / "a/b");
  std::filesystem::create_directories(directory / "a/bc");
  auto const before = std::filesystem::current_path();
  std::filesystem::current_path(directory / "a/b");
  CHECK(says(refusal(directory / "a/b"), "current directory"));
  CHECK(says(refusal(directory / "a"), "current directory"));
  CHECK(says(refusal("../../a/b"), "current directory"));
  CHECK(resolve_local_place(directory / "a/bc") == directory / "a/bc");
  CHECK(resolve_local_place("c") == directory / "a/b/c");
  std::filesystem::current_path(before);
}

TEST_CASE("resolve_place: a path through a file is an error") {
  TemporaryDirectory directory;
  FileHandle::open_write(directory / "f");
  CHECK(error_of([&] { resolve_local_place(directory / "f/x"); }).system_error() == ENOTDIR);
}
